"""Transports, which move rows between the ranks that divide a layer's experts."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe.errors import ParallelError
from moe.parallel.collective_log import CollectiveLog

Splits = tuple[Sequence[int], Sequence[int]]
"""Numbers of rows sent to, and received from, each rank."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

MAX_ROWS = 2**31  # from one rank to another; a larger count is corrupt


def eager(function: _Function) -> _Function:
    """Exclude a function that communicates from compiled graphs; each call is a graph break."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


class Transport(Protocol):
    """Interface of a transport. All ranks make the same calls in the same order.

    Attributes:
        name: name of the layer, for errors.
        size, rank: number of ranks, and the index of this one.
    """

    name: str
    size: int
    rank: int

    def exchange_counts(self, counts: Tensor) -> Splits:
        """Send each rank the number of rows it will receive: int64 [size] -> numbers sent and received."""
        ...

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Start to move rows [sum(sent), ...]; returns [sum(received), ...], which is complete after `wait`."""
        ...

    def wait(self, operation: str, rows: Tensor) -> None:
        """Wait for the tensor that `start` returned. Raises ParallelError for any other tensor, even a copy of it."""
        ...


class AllToAll:
    """Transport by `all_to_all_single` in a process group.

    Args:
        group: process group of the ranks.
        name: name of the layer, for errors.
        log: collective log of this rank; default: a new one.
    """

    def __init__(self, group: Any, name: str = "", log: CollectiveLog | None = None) -> None:
        self.group, self.name = group, name
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.log = log if log is not None else CollectiveLog(dist.get_rank())
        self._moving: dict[int, tuple[Tensor, Any]] = {}  # by storage: its address is not reused meanwhile

    def exchange_counts(self, counts: Tensor) -> Splits:
        operation = "exchange of counts"
        with self.log.collective(self.name, operation, self.group) as entry:
            # The fingerprint identifies the collective: counts of a different one are rejected before rows move.
            sent = torch.stack((counts, torch.full_like(counts, entry.fingerprint)), dim=1)
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=self.group)
        exchanged = torch.cat((sent, received), dim=1).tolist()
        for index, (_, mine, rows, theirs) in enumerate(exchanged):
            rank = dist.get_global_rank(self.group, index)
            if theirs != mine:
                raise self.log.error(f"rank {rank} started a different collective", self.name, operation)
            if not 0 <= rows < MAX_ROWS:
                problem = f"row count to send; expected 0 to {MAX_ROWS - 1}; found {rows}"
                raise self.log.error(problem, self.name, operation, failed_rank=rank)
        return [row[0] for row in exchanged], [row[2] for row in exchanged]

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        target = rows.new_empty((sum(received), *rows.shape[1:]))
        with self.log.collective(self.name, operation, self.group, sent=sent, expected=received):
            work = dist.all_to_all_single(
                target, rows.contiguous(), list(received), list(sent), group=self.group, async_op=True
            )
        if torch.is_anomaly_enabled():  # it reads the tensors that are passed between backward functions
            self.log.wait(self.name, operation, work)
            work = None
        self._moving[target.untyped_storage()._cdata] = target, work
        return target

    def wait(self, operation: str, rows: Tensor) -> None:
        moving = self._moving.pop(rows.untyped_storage()._cdata, None)
        if moving is None:  # a copy may have been made before the rows arrived
            raise ParallelError(
                f"{operation}: expected the tensor that `start` returned; found another one or a copy", layer=self.name
            )
        if moving[1] is not None:
            self.log.wait(self.name, operation, moving[1])


class Loopback:
    """Transport of one of `size` ranks that returns the rows it sends to itself, without communication.

    For benchmarks of the work of a rank other than communication.
    """

    def __init__(self, size: int, rank: int = 0, name: str = "") -> None:
        self.size, self.rank, self.name = size, rank, name

    def exchange_counts(self, counts: Tensor) -> Splits:
        sent = counts.tolist()  # a host synchronisation, as in `AllToAll`
        return sent, sent

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return rows.contiguous()

    def wait(self, operation: str, rows: Tensor) -> None:
        pass
