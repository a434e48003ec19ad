"""What moves rows between the ranks that divide a layer's experts."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import ParallelError
from moe.parallel.journal import Journal

Splits = tuple[Sequence[int], Sequence[int]]
"""Rows for, and rows from, each rank."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

MAX_ROWS = 2**31  # from one rank to another; a larger count is corrupt


def eager(function: _Function) -> _Function:
    """Keep a function that communicates out of compiled graphs, which are broken there."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class Transport(Protocol):
    """The ranks that a dispatcher reaches. Each of them makes the same calls in the same order.

    Attributes:
        name: the layer's, for errors.
        size, rank: number of ranks, and which of them this is.
    """

    name: str
    size: int
    rank: int

    def agree(self, counts: Tensor) -> Splits:
        """int64 [size], rows for each rank -> these, and the rows that each rank has for this one."""
        ...

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Start to move rows [sum(sent), ...]. What is returned, [sum(received), ...], is complete after `wait`."""
        ...

    def wait(self, operation: str, rows: Tensor) -> None:
        """Wait for what `start` has returned. Raises ParallelError for any other tensor, a copy of it included."""
        ...


class AllToAll:
    """Transport by `all_to_all_single`, in a process group.

    Args:
        group: the ranks.
        name: the layer's, for errors.
        journal: what collectives are noted in; by default a new one.
    """

    def __init__(self, group: Any, name: str = "", journal: Journal | None = None) -> None:
        self.group, self.name = group, name
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.journal = journal if journal is not None else Journal(dist.get_rank())
        self._moving: dict[int, tuple[Tensor, Any]] = {}  # by storage, whose address is not used again meanwhile

    def agree(self, counts: Tensor) -> Splits:
        operation = "exchange of counts"
        with self.journal.collective(self.name, operation, self.group) as entry:
            # The ticket says which collective it is: no rows follow counts that were meant for another.
            leaving = torch.stack((counts, torch.full_like(counts, entry.ticket)), dim=1)
            arriving = torch.empty_like(leaving)
            dist.all_to_all_single(arriving, leaving, group=self.group)
        told = torch.cat((leaving, arriving), dim=1).tolist()
        for place, (_, ticket, rows, theirs) in enumerate(told):
            rank = dist.get_global_rank(self.group, place)
            if theirs != ticket:
                raise self.journal.error(f"rank {rank} came to another collective", self.name, operation)
            if not 0 <= rows < MAX_ROWS:
                raise self.journal.error(f"it wants to send {rows} rows", self.name, operation, culprit=rank)
        return [row[0] for row in told], [row[2] for row in told]

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        target = rows.new_empty((sum(received), *rows.shape[1:]))
        with self.journal.collective(self.name, operation, self.group, sent=sent, expected=received):
            work = dist.all_to_all_single(
                target, rows.contiguous(), list(received), list(sent), group=self.group, async_op=True
            )
        if torch.is_anomaly_enabled():  # it reads what one function of a backward pass hands to the next
            self.journal.wait(self.name, operation, work)
            work = None
        self._moving[target.untyped_storage()._cdata] = target, work
        return target

    def wait(self, operation: str, rows: Tensor) -> None:
        moving = self._moving.pop(rows.untyped_storage()._cdata, None)
        if moving is None:  # a copy, which may have been made before the rows had arrived
            raise ParallelError(f"{operation}: the rows are not those that were started", layer=self.name)
        if moving[1] is not None:
            self.journal.wait(self.name, operation, moving[1])


class Loopback:
    """One of `size` ranks without the others: what it sends comes back to it, unchanged and at once.

    For benchmarks and tests of what a rank does besides communication.
    """

    def __init__(self, size: int, rank: int = 0, name: str = "") -> None:
        self.size, self.rank, self.name = size, rank, name

    def agree(self, counts: Tensor) -> Splits:
        sent = counts.tolist()  # the host waits for it, as it does for other ranks' counts
        return sent, sent

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return rows.contiguous()

    def wait(self, operation: str, rows: Tensor) -> None:
        pass
