"""The global batch: what the ranks of a job train on together in one optimizer step."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor


class GlobalBatch:
    """Sums over the ranks that share the global batch, and the scale of the loss.

    This one sums over a process group, or over nothing where torch.distributed does not run. A model on a mesh has
    `moe.parallel.apply.MeshBatch`, which also weighs each rank's part of the loss and logs every collective.

    A deep copy has the same ranks and a loss scale of its own. A process group cannot be pickled, so an unpickled
    object has the default one.

    Attributes:
        scale: float64 scalar, the gradient of the auxiliary losses that are injected; see `moe.balance.set_loss_scale`.
            A tensor, because compiled code would have a number built in, and be compiled anew for each.
    """

    lockstep = False
    """Whether each forward pass waits for the other ranks, so that all of them must make the same calls."""

    def __init__(self, group: Any = None, loss_scale: float = 1.0) -> None:
        self.group = group
        self.scale = torch.tensor(loss_scale, dtype=torch.float64, device="cpu")

    @property
    def loss_scale(self) -> float:
        """`scale` as a number."""
        return self.scale.item()

    def restrict(self, group: Any) -> None:
        """Sum over `group` from now on; None is the default group."""
        self.group = group

    def scale_loss(self, scale: float | Tensor) -> None:
        self.scale.fill_(scale)

    def move(self, device: torch.device) -> None:
        """Keep the scale where the routers are."""
        if device.type != "meta":
            self.scale = self.scale.to(device)

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
        vars(made).update(vars(self), scale=self.scale.clone())
        return made

    def __reduce__(self) -> Any:
        return GlobalBatch, (None, self.loss_scale)
