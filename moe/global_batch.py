"""The global batch: what the ranks of a job train on together in one optimizer step."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor


class GlobalBatch:
    """Sums over the ranks that share the global batch, the scale of the loss, and the counts of the step.

    This one sums over a process group, or over nothing where torch.distributed does not run. A model on a mesh has
    `moe.parallel.apply.MeshBatch`, which also weighs each rank's part of the loss and logs every collective.

    A deep copy has the same ranks and a loss scale of its own. A process group cannot be pickled, so an unpickled
    object has the default one.

    Attributes:
        loss_scale: gradient of the auxiliary losses that are injected, see `moe.balance.set_loss_scale`.
    """

    lockstep = False
    """Whether each forward pass waits for the other ranks, so that all of them must make the same calls."""

    def __init__(self, group: Any = None, loss_scale: float = 1.0) -> None:
        self.group, self.loss_scale = group, loss_scale
        self._totals: dict[str, Tensor] | None = None

    def restrict(self, group: Any) -> None:
        """Sum over `group` from now on; None is the default group."""
        self.group = group

    def scale_loss(self, scale: float) -> None:
        self.loss_scale = scale

    def sum(self, values: Tensor, operation: str) -> Tensor:
        """Sum of all ranks' `values`, in place; `operation` names it in errors. A collective call."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, group=self.group)
        return values

    @contextlib.contextmanager
    def step(self, counts: Iterable[Mapping[str, Tensor]]) -> Iterator[None]:
        """Make the forward passes in the block micro-batches of one optimizer step, which has the loss of one batch.

        Each term of a loss is then multiplied by the micro-batch's share of what the step counts for that term, and by
        the number of ranks: losses and gradients are added over the micro-batches and averaged over the ranks, and are
        means over the step's tokens however they are spread. Without it each micro-batch is a batch of its own, and the
        mean of their means is that of the step only if their counts are equal.

            batches = [next(data) for _ in range(4)]
            with model.global_batch.step([model.loss_counts(**batch) for batch in batches]):
                for batch in batches:
                    model(**batch).loss.backward()  # not divided by 4
            optimizer.step()

        Args:
            counts: `Transformer.loss_counts` of each micro-batch of this rank. They are summed over the ranks, which is
                a collective call where torch.distributed runs.
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
        """This rank's means, each over its count, multiplied so that their mean over ranks is the global one.

        In a `step` that is the micro-batch's part of the step's. Otherwise they are unchanged here: a trainer such as
        DDP averages ranks as they are.
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
        """float64: the mean of each count over the ranks whose gradients are averaged; more than 0."""
        everywhere = self.sum(torch.stack(list(counts)), "sum of counts")
        ranks = dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1
        return everywhere.clamp_min(1).double() / ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __reduce__(self) -> Any:
        return GlobalBatch, (None, self.loss_scale)
