"""The global batch: what the ranks of a job train on together in one optimizer step."""

from collections.abc import Sequence
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor


class GlobalBatch:
    """Sums over the ranks that share the global batch, and the scale of the loss.

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

    def weigh(self, means: Sequence[Tensor], counts: Sequence[Tensor]) -> list[Tensor]:
        """This rank's means, each over its count, multiplied so that their mean over ranks is the global one.

        Unchanged here: a trainer such as DDP averages ranks as they are.
        """
        return list(means)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __reduce__(self) -> Any:
        return GlobalBatch, (None, self.loss_scale)
