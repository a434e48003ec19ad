"""Training on your own batches: the step of `moe.train.loop.Trainer`, without its data, settings and files."""

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
"""A tensor of token ids, a dict of arguments of the model, or what `loss` understands."""


@dataclass(frozen=True)
class BatchReport:
    """What one optimizer step did: its number, its mean loss, and the norm of the gradient before clipping."""

    step: int
    loss: float
    grad_norm: float


class BatchTrainer:
    """Steps a model along your batches. Iterate over it, or call `step`; the number of steps is that of the batches.

        for report in BatchTrainer(model, batches, torch.optim.AdamW(model.parameters(), lr=1e-3), accumulation=4):
            print(report.step, report.loss)

    Without `loss`, a batch is a dict of arguments of the model (for example input_ids, labels and document_ids of
    `moe.Transformer`), or int64 token ids [B, S], which are also the labels; the loss is `model(**batch).loss`. That of
    a `moe.Transformer` is the mean over the tokens of all micro-batches of a step, whatever each of them counts.

    Args:
        model: any module, on the device of the batches. If it has routers with a correction bias, the bias is updated
            at each step, unless `moe.balance.attach` has been called before.
        batches: micro-batches; an endless iterable trains for as long as steps are taken.
        optimizers: one, or several that are stepped together.
        loss: called with model and batch; returns a scalar tensor. The loss of a step is the mean over its batches.
        accumulation: micro-batches in one step. The last step has those that are left.
        clip: largest norm of the gradient of all parameters; None for no clipping.
        schedule: called with the number of a step, from 1; what the learning rates that the optimizers have now are
            multiplied by.
        bias_update_speed: change of an expert's correction bias per step.

    Raises:
        ValueError: accumulation below 1, a clip that is not above 0, or no optimizer; in a step, a batch that the model
            cannot take or that has no scalar loss.
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
        """One optimizer step; None if there are no batches left. Raises NonFiniteError before any parameter changes."""
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
        """Add the gradients of a step's micro-batches; returns the loss of all."""
        total, model = 0.0, self.model
        weighed = self.loss is None and isinstance(model, Transformer)
        arguments = [_arguments(batch) for batch in batches] if self.loss is None else batches
        if isinstance(model, Transformer) and weighed:
            context = model.global_batch.step([model.loss_counts(**each) for each in arguments])
        else:
            balance.set_loss_scale(model, 1 / len(batches))  # of the losses that enter through autograd
            context = nullcontext()
        with context:
            for each in arguments:
                loss = model(**each).loss if self.loss is None else self.loss(model, each)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    way_out = "; a batch needs labels" if self.loss is None and "labels" not in each else ""
                    raise ValueError(f"loss: expected a scalar tensor; found {found}{way_out}")
                loss = loss if weighed else loss / len(batches)
                loss.backward()
                total += loss.item()
        return total


def _arguments(batch: Batch) -> dict[str, Any]:
    """The arguments of the model for a batch."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch, "labels": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    raise ValueError(f"batch: expected a dict of the model's arguments or token ids; found {type(batch).__name__}")
