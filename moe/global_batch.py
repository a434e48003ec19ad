"""Global batch: the data on which all ranks of a job train in one optimizer step."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor


class GlobalBatch:
    """Sums over the ranks that share the global batch, the loss scale, and the token counts of the step.

    Sums are over a process group, or over this process alone without torch.distributed. A model on a mesh uses
    `moe.parallel.apply.MeshBatch`, which also weights each rank's part of the loss and logs every collective.

    A deep copy has the same ranks and its own loss scale. A process group cannot be pickled, so an unpickled object has
    the default group.

    Attributes:
        scale: float64 scalar, the gradient of injected auxiliary losses; see `moe.balance.set_loss_scale`. It is a
            tensor, because compiled code would be recompiled for each new number.
    """

    lockstep = False
    """Whether each forward pass waits for the other ranks, so that all ranks must make the same calls."""

    def __init__(self, group: Any = None, loss_scale: float = 1.0) -> None:
        self.group = group
        self.scale = torch.tensor(loss_scale, dtype=torch.float64, device="cpu")
        self._totals: dict[str, Tensor] | None = None

    @property
    def loss_scale(self) -> float:
        """`scale` as a float."""
        return self.scale.item()

    def restrict(self, group: Any) -> None:
        """Set the process group of later sums; None is the default group."""
        self.group = group

    def scale_loss(self, scale: float | Tensor) -> None:
        """Set `scale`."""
        self.scale.fill_(scale)

    def move(self, device: torch.device) -> None:
        """Move the scale to a device, which is that of the routers; the meta device is ignored."""
        if device.type != "meta":
            self.scale = self.scale.to(device)

    def sum(self, values: Tensor, operation: str) -> Tensor:
        """Sum `values` over the ranks, in place; `operation` is its name in errors. A collective call."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, group=self.group)
        return values

    @contextlib.contextmanager
    def step(self, counts: Iterable[Mapping[str, Tensor]]) -> Iterator[None]:
        """Treat the forward passes in the block as micro-batches of one optimizer step, with the loss of one batch.

        Each loss term is weighted by the micro-batch's share of the step's count for that term, times the number of
        ranks. Summed over micro-batches and averaged over ranks, losses and gradients are then means over all tokens of
        the step. Outside this block each micro-batch is a batch of its own, and the mean of their means is the mean of
        the step only if their counts are equal.

            batches = [next(data) for _ in range(4)]
            with model.global_batch.step([model.loss_counts(**batch) for batch in batches]):
                for batch in batches:
                    model(**batch).loss.backward()  # not divided by 4
            optimizer.step()

        Args:
            counts: `Transformer.loss_counts` of each micro-batch of this rank. They are summed over the ranks, which is
                a collective call if torch.distributed is initialized.
        """
        summed: dict[str, Tensor] = {}
        for each in counts:
            summed = {key: count + summed[key] if key in summed else count for key, count in each.items()}
        before, self._totals = self._totals, dict(zip(summed, self._per_rank(list(summed.values())), strict=True))
        try:
            yield
        finally:
            self._totals = before

    def weigh(self, means: Sequence[Tensor], counts: Sequence[Tensor], keys: Sequence[str]) -> list[Tensor]:
        """Weight this rank's means by their counts, so that the average over ranks is the global mean.

        In a `step`, the result is the micro-batch's part of the mean of the step. Outside a step the means are
        unchanged, unless `lockstep`, because trainers such as DDP average ranks with equal weights.
        """
        if self._totals is not None:
            if missing := [key for key in keys if key not in self._totals]:
                raise ValueError(f"GlobalBatch.step: expected counts of all terms; found none of {', '.join(missing)}")
            totals = torch.stack([self._totals[key] for key in keys])
        elif self.lockstep:
            totals = self._per_rank(counts)
        else:
            return list(means)
        weights = torch.stack(list(counts)) / totals
        return [mean * weight.to(mean.dtype) for mean, weight in zip(means, weights, strict=True)]

    def _per_rank(self, counts: Sequence[Tensor]) -> Tensor:
        """Mean of each count over the ranks whose gradients are averaged, float64 and positive."""
        everywhere = self.sum(torch.stack(list(counts)), "sum of counts")
        ranks = dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1
        return everywhere.clamp_min(1).double() / ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self), scale=self.scale.clone())
        return made

    def __reduce__(self) -> Any:
        return GlobalBatch, (None, self.loss_scale)
