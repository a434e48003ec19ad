"""Log of the collectives that a rank has performed, so that an error can name the step, layer and operation.

gloo matches messages by their order within a group. If a rank skips a call, the next rank receives the message of a
later one: a shorter message is accepted silently, and a longer one aborts the receiving process. With `check_order`,
the ranks of a group therefore first compare which collective they are about to start, in one small message of fixed
size. NCCL needs no such check, and there it would cost a host synchronisation.
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

MAX_ENTRIES = 256
POLL_INTERVAL = timedelta(seconds=0.5)
_GLOO_ERRORS = ("gloo/transport", "Application timeout caused pair closure", "Operation timed out")


class CollectiveError(ParallelError):
    """Failure of another rank, as seen by a collective on this rank."""


class SplitError(CollectiveError):
    """Rows sent that differ from the number announced; `rank` is the rank that sent them."""


class StoppedError(CollectiveError):
    """Raised instead of starting a collective, because another rank has failed."""


@dataclass(frozen=True)
class Entry:
    """One collective in a rank's log.

    Attributes:
        sequence_number: 1 for the first collective of the rank.
        step: the optimizer step.
        size: number of values that each rank contributes, if it is equal on all ranks; otherwise 0.
    """

    sequence_number: int
    step: int
    layer: str
    operation: str
    size: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {self.layer}, {self.operation}"

    @property
    def fingerprint(self) -> int:
        """62-bit number that is equal on ranks whose entries are equal: sequence number and checksum of the rest."""
        name = f"{self.step}|{self.layer}|{self.operation}|{self.size}"
        return (self.sequence_number & 0x3FFFFFFF) << 32 | zlib.crc32(name.encode())


@dataclass
class CollectiveLog:
    """Log of a rank's collectives, in order; the last `MAX_ENTRIES` are kept by name.

    In each step, every rank performs the same collectives, whatever its data. The first entries that differ therefore
    show which rank diverged.

    Attributes:
        step: optimizer step of the collectives that follow; see `set_step`.
        count, digest: number and checksum of all collectives so far; equal on all ranks.
        check_order: compare entries with the other ranks before each collective (gloo).
        stopped: error message of `stop`.
    """

    rank: int
    step: int = 0
    count: int = 0
    digest: int = 0
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=MAX_ENTRIES))
    check_order: bool = False
    stopped: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "CollectiveLog":
        return self  # a copy of a model communicates on the same rank

    def set_step(self, step: int) -> None:
        """Set the optimizer step of the collectives that follow. The training loop calls it in each step."""
        self.step = step

    def stop(self, problem: str) -> None:
        """Raise an error in the next collective, and on gloo in one that waits. Called from another thread."""
        self.stopped = problem

    def record(self, layer: str, operation: str, size: int = 0) -> Entry:
        """Append an entry."""
        self.count += 1
        entry = Entry(self.count, self.step, layer, operation, size)
        self.digest = zlib.crc32(entry.fingerprint.to_bytes(8), self.digest)
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
        """Record the collective that the block performs; its communication errors become `CollectiveError`s.

        Args:
            group: process group of the collective; None is the default group.
            size: number of values that this rank contributes, if it is equal on all ranks.
            sent, expected: rows to and from each rank of the group, if they are not equal.
        """
        if self.stopped is not None:
            raise StoppedError(self.stopped, rank=self.rank, step=self.step, layer=layer, operation=operation)
        entry = self.record(layer, operation, size)
        with self.locate_errors(layer, operation):
            if self.check_order:
                self._check_order(entry, group, sent, expected)
            yield entry

    @contextlib.contextmanager
    def locate_errors(self, layer: str, operation: str) -> Iterator[None]:
        """Convert communication errors of the block to `CollectiveError`s with the step, layer and operation."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ParallelError) or not is_communication_error(error):
                raise
            raise self.error(summarize(error), layer, operation) from error

    def error(self, problem: str, layer: str, operation: str, *, failed_rank: int | None = None) -> "CollectiveError":
        """Error for `failed_rank`, or for this rank if it is unknown which rank failed."""
        kind, rank = (CollectiveError, self.rank) if failed_rank is None else (SplitError, failed_rank)
        return kind(problem, rank=rank, step=self.step, layer=layer, operation=operation)

    def wait(self, layer: str, operation: str, work: Any) -> None:
        """Wait for a collective: on CUDA its stream waits, on the CPU this thread does until `stopped` is set."""
        with self.locate_errors(layer, operation):
            while self.check_order:
                if self.stopped is not None:
                    raise self.error(self.stopped, layer, operation)
                try:
                    work.wait(POLL_INTERVAL)
                except RuntimeError:
                    if work.is_completed():
                        break
                else:
                    return
            work.wait()

    def _check_order(self, entry: Entry, group: Any, sent: Sequence[int], expected: Sequence[int]) -> None:
        ranks = dist.get_process_group_ranks(group)
        size = len(ranks)
        # Equal length for every operation, so that the messages of different operations match.
        mine = [entry.fingerprint, *(sent or [0] * size), *(expected or [0] * size)]
        gathered = torch.empty(size, len(mine), dtype=torch.int64)
        work = dist.all_gather(list(gathered.unbind()), torch.tensor(mine), group=group, async_op=True)
        self.wait(entry.layer, entry.operation, work)
        rows = gathered.tolist()
        others = [rank for rank, row in zip(ranks, rows, strict=True) if row[0] != mine[0]]
        if others:
            raise self.error(f"{format_ranks(others)} started a different collective", entry.layer, entry.operation)
        sends, receives = [row[1 : 1 + size] for row in rows], [row[1 + size :] for row in rows]
        wrong = [(i, j) for i in range(size) for j in range(size) if sends[i][j] != receives[j][i]]
        if wrong:
            # A rank that contradicts itself is wrong; otherwise the rank that most of the pairs have in common.
            at = max(range(size), key=lambda rank: ((rank, rank) in wrong, sum(rank in pair for pair in wrong)))
            i, j = next(pair for pair in wrong if at in pair)
            problem = f"rank {ranks[i]} sends {sends[i][j]} rows to rank {ranks[j]}, which expects {receives[j][i]}"
            raise self.error(problem, entry.layer, entry.operation, failed_rank=ranks[at])


def is_communication_error(error: BaseException) -> bool:
    """Whether a process group raised the error because of what another rank did.

    gloo raises plain RuntimeErrors, which can only be recognised by their text.
    """
    if isinstance(error, CollectiveError | dist.DistError):
        return True
    return type(error) is RuntimeError and any(words in str(error) for words in _GLOO_ERRORS)


def summarize(error: BaseException) -> str:
    """Message of an exception in one line, without gloo's source locations and advice."""
    text = str(error).strip()
    if is_communication_error(error) and not isinstance(error, ParallelError):
        text = text.partition("] ")[2] if text.startswith("[") else text
        text = text.splitlines()[0].partition(". This is typically")[0] if text else type(error).__name__
        return one_line(text)
    return one_line(" ".join(text.split()) or type(error).__name__)


def format_ranks(ranks: Sequence[int]) -> str:
    """Format rank numbers: [3] -> "rank 3", [1, 2, 5] -> "ranks 1, 2 and 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = [str(rank) for rank in ranks] if len(ranks) <= 8 else [*map(str, ranks[:7]), f"{len(ranks) - 7} more"]
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"
