"""Training on custom batches: the steps of `moe.train.loop.Trainer`, without its data, settings and files."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe import balance
from moe.model import Transformer
from moe.train.loop import NonFiniteError

Batch = Any
"""Tensor of token ids, dict of model arguments, or any argument of a custom `loss`."""


@dataclass(frozen=True)
class BatchReport:
    """Report of one optimizer step: its number, the mean loss, and the gradient norm before clipping."""

    step: int
    loss: float
    grad_norm: float


class BatchTrainer:
    """Trainer for custom batches. Iterate over it, or call `step`, until the batches are exhausted.

        for report in BatchTrainer(model, batches, torch.optim.AdamW(model.parameters(), lr=1e-3), accumulation=4):
            print(report.step, report.loss)

    Without `loss`, a batch is a dict of model arguments (for `moe.Transformer`, for example, input_ids, labels and
    document_ids), or int64 token ids [B, S], which are also the labels; the loss is `model(**batch).loss`. For a
    `moe.Transformer` it is the mean over the predicted tokens of all micro-batches of a step.

    Args:
        model: any module, on the device of the batches. If it has routers with a correction bias, `moe.balance.attach`
            is called unless it already was, so that the bias is updated at each step.
        batches: micro-batches, possibly endless.
        optimizers: one optimizer, or several that are stepped together.
        loss: function of model and batch that returns a scalar tensor. The loss of a step is the mean over its batches.
        accumulation: number of micro-batches per step. The last step may have fewer.
        clip: maximum global gradient norm; None for no clipping.
        schedule: function of the step number, from 1, that returns the factor of the optimizers' initial learning
            rates.
        bias_update_speed: change of an expert's correction bias per step.

    Raises:
        ValueError: accumulation below 1, a clip that is not above 0, or no optimizer; in a step, a batch that the model
            does not accept or that has no scalar loss.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
        accumulation: int = 1,
        clip: float | None = 1.0,
        schedule: Callable[[int], float] | None = None,
        bias_update_speed: float = 0.001,
    ) -> None:
        if accumulation < 1:
            raise ValueError(f"accumulation = {accumulation}: expected 1 or more")
        if clip is not None and not 0 < clip < math.inf:  # a negative norm would turn the gradients round
            raise ValueError(f"clip = {clip}: expected a finite number above 0, or None for no clipping")
        self.model, self.loss, self.accumulation, self.clip, self.schedule = model, loss, accumulation, clip, schedule
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        if not self.optimizers:
            raise ValueError("optimizers: expected one or more")
        self.step_number = 0
        self._batches = iter(batches)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        biased = [router for _, router in balance.routers(model) if router.e_score_correction_bias is not None]
        if biased and all(router.counter is None for router in biased):
            balance.attach(model, self.optimizers[-1], bias_update_speed=bias_update_speed)

    def __iter__(self) -> Iterator[BatchReport]:
        while (report := self.step()) is not None:
            yield report

    def step(self) -> BatchReport | None:
        """Run one optimizer step; None if no batches are left. Raises NonFiniteError before any parameter changes."""
        batches = list(itertools.islice(self._batches, self.accumulation))
        if not batches:
            return None
        number = self.step_number + 1
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak if self.schedule is None else peak * self.schedule(number)
            optimizer.zero_grad()
        self.model.train()
        loss = self._backward(batches)
        if not math.isfinite(loss):
            raise NonFiniteError(number, "loss", f"it is {loss}")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if self.clip is None else self.clip).item()
        if not math.isfinite(norm):
            raise NonFiniteError(number, "gradient", f"its norm is {norm}")
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_number = number
        return BatchReport(number, loss, norm)

    def _backward(self, batches: list[Batch]) -> float:
        """Accumulate the gradients of a step's micro-batches; return the loss of the step."""
        total, model = 0.0, self.model
        weighted = self.loss is None and isinstance(model, Transformer)
        arguments = [_arguments(batch) for batch in batches] if self.loss is None else batches
        if isinstance(model, Transformer) and weighted:
            context = model.global_batch.step([model.loss_counts(**each) for each in arguments])
        else:
            balance.set_loss_scale(model, 1 / len(batches))  # for losses that enter through autograd
            context = nullcontext()
        with context:
            for each in arguments:
                loss = model(**each).loss if self.loss is None else self.loss(model, each)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    hint = "; a batch needs labels" if self.loss is None and "labels" not in each else ""
                    raise ValueError(f"loss: expected a scalar tensor; found {found}{hint}")
                loss = loss if weighted else loss / len(batches)
                loss.backward()
                total += loss.item()
        return total


def _arguments(batch: Batch) -> dict[str, Any]:
    """Return the model arguments for a batch."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch, "labels": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    raise ValueError(f"batch: expected a dict of model arguments or token ids; found {type(batch).__name__}")
