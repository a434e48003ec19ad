"""What a rank has done: the collectives of its last steps, by name, so that an error can say where it happened.

gloo makes a check before each of them necessary. It matches messages by their order in a group, so that one rank's
skipped call gives another rank what was meant for the next: a shorter message arrives without a word, and a longer one
ends the process that receives it, by abort(). With `roll_call`, the ranks of a group therefore first compare what they
are about to do, in one small message of fixed size. That costs each collective a second one; on NCCL it would cost a
host synchronisation, and is left out.
"""

import contextlib
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe.errors import ParallelError, one_line

KEPT = 256
POLL = timedelta(seconds=0.5)
_OF_GLOO = ("gloo/transport", "Application timeout caused pair closure", "Operation timed out")


class CollectiveError(ParallelError):
    """What a rank notices of another's fault, in a collective."""


class SplitError(CollectiveError):
    """A rank sends other numbers of rows than it has announced; `rank` is the one."""


class StoppedError(CollectiveError):
    """A collective that was not begun, because another rank has failed."""


@dataclass(frozen=True)
class Entry:
    """One collective: its place in this rank's order, the optimizer step, the layer and the operation.

    `size` is the number of values that a rank brings, where all ranks bring equally many; else 0.
    """

    number: int
    step: int
    layer: str
    operation: str
    size: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.layer}, {self.operation}"

    @property
    def ticket(self) -> int:
        """A number for what all ranks have in common, in 62 bits."""
        name = f"{self.step}|{self.layer}|{self.operation}|{self.size}"
        return (self.number & 0x3FFFFFFF) << 32 | zlib.crc32(name.encode())


@dataclass
class Journal:
    """The collectives of a rank, in order; the last `KEPT` of them by name.

    Every rank of a step does the same ones, whatever its data: equal counts are a check, and the first entries that
    differ say which rank left the others.

    Attributes:
        step: of the optimizer.
        digest: of everything noted so far: equal on all ranks.
        roll_call: compare with the other ranks before each collective (gloo).
        stopped: what is raised instead of the next collective, once another rank has failed.
    """

    rank: int
    step: int = 0
    count: int = 0
    digest: int = 0
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=KEPT))
    roll_call: bool = False
    stopped: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Journal":
        return self  # a copy of a model does its collectives on the same rank

    def begin(self, step: int) -> None:
        """Number the collectives that follow as those of an optimizer step."""
        self.step = step

    def stop(self, reason: str) -> None:
        """Raise at the next collective of this rank, and in one that waits (gloo). Called from another thread."""
        self.stopped = reason

    def note(self, layer: str, operation: str, size: int = 0) -> Entry:
        self.count += 1
        entry = Entry(self.count, self.step, layer, operation, size)
        self.digest = zlib.crc32(entry.ticket.to_bytes(8), self.digest)
        self.entries.append(entry)
        return entry

    @contextlib.contextmanager
    def collective(
        self,
        layer: str,
        operation: str,
        group: Any = None,
        *,
        size: int = 0,
        sent: Sequence[int] = (),
        expected: Sequence[int] = (),
    ) -> Iterator[Entry]:
        """Notes the collective that the block does; what goes wrong in it becomes a `CollectiveError` that names it.

        Args:
            group: of the collective; None is the default one.
            size: values that this rank brings, where all bring equally many.
            sent, expected: rows to and from each rank of the group, where they do not.
        """
        if self.stopped is not None:
            raise StoppedError(self.stopped, rank=self.rank, step=self.step, layer=layer, operation=operation)
        entry = self.note(layer, operation, size)
        with self.during(layer, operation):
            if self.roll_call:
                self._compare(entry, group, sent, expected)
            yield entry

    @contextlib.contextmanager
    def during(self, layer: str, operation: str) -> Iterator[None]:
        """As `collective`, for the wait that ends one noted before."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ParallelError) or not is_communication(error):
                raise
            raise self.error(reason(error), layer, operation) from error

    def error(self, problem: str, layer: str, operation: str, *, culprit: int | None = None) -> "CollectiveError":
        """Of this rank where no other is known to be the `culprit`."""
        kind, rank = (CollectiveError, self.rank) if culprit is None else (SplitError, culprit)
        return kind(problem, rank=rank, step=self.step, layer=layer, operation=operation)

    def wait(self, layer: str, operation: str, work: Any) -> None:
        """Waits for a collective: on CUDA its stream does, on the CPU this thread, unless `stopped` ends it."""
        with self.during(layer, operation):
            while self.roll_call:
                if self.stopped is not None:
                    raise self.error(self.stopped, layer, operation)
                try:
                    work.wait(POLL)
                except RuntimeError:
                    if work.is_completed():
                        break
                else:
                    return
            work.wait()

    def _compare(self, entry: Entry, group: Any, sent: Sequence[int], expected: Sequence[int]) -> None:
        ranks = dist.get_process_group_ranks(group)
        size = len(ranks)
        # One length for every operation: only so do the messages of different ones match.
        mine = [entry.ticket, *(sent or [0] * size), *(expected or [0] * size)]
        everybody = torch.empty(size, len(mine), dtype=torch.int64)
        work = dist.all_gather(list(everybody.unbind()), torch.tensor(mine), group=group, async_op=True)
        self.wait(entry.layer, entry.operation, work)
        tickets = everybody.tolist()
        others = [rank for rank, ticket in zip(ranks, tickets, strict=True) if ticket[0] != mine[0]]
        if others:
            raise self.error(f"{name_ranks(others)} came to another collective", entry.layer, entry.operation)
        leaving, awaited = [t[1 : 1 + size] for t in tickets], [t[1 + size :] for t in tickets]
        wrong = [(i, j) for i in range(size) for j in range(size) if leaving[i][j] != awaited[j][i]]
        if wrong:
            # A rank that contradicts itself is wrong; else the one that most pairs have in common.
            at = max(range(size), key=lambda rank: ((rank, rank) in wrong, sum(rank in pair for pair in wrong)))
            i, j = next(pair for pair in wrong if at in pair)
            problem = f"rank {ranks[i]} sends {leaving[i][j]} rows to rank {ranks[j]}, which expects {awaited[j][i]}"
            raise self.error(problem, entry.layer, entry.operation, culprit=ranks[at])


def is_communication(error: BaseException) -> bool:
    """Whether a process group raised it, for something that another rank did or did not do.

    gloo raises plain RuntimeErrors, which say only where in its sources they come from.
    """
    if isinstance(error, CollectiveError | dist.DistError):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _OF_GLOO)


def reason(error: BaseException) -> str:
    """An exception in a line, without the place in gloo's sources and its advice."""
    text = str(error).strip()
    if is_communication(error) and not isinstance(error, ParallelError):
        text = text.partition("] ")[2] if text.startswith("[") else text
        text = text.splitlines()[0].partition(". This is typically")[0] if text else type(error).__name__
        return one_line(text)
    return one_line(" ".join(text.split()) or type(error).__name__)


def name_ranks(ranks: Sequence[int]) -> str:
    """[3] -> "rank 3", [1, 2, 5] -> "ranks 1, 2 and 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks] if len(ranks) <= 8 else [*map(str, ranks[:7]), f"{len(ranks) - 7} more"]
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"
