"""Diagnosis of a failed run: which rank failed and at which collective, from the reports of all ranks."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from moe.errors import ParallelError
from moe.parallel.collective_log import Entry, format_ranks

State = Literal["running", "left", "failed"]


@dataclass(frozen=True)
class RankReport:
    """What a rank reports about itself.

    Attributes:
        heartbeat, time: number that grows with every report, and when the report was written (seconds since the epoch).
        count: number of collectives so far. `entries` are the most recent ones: the last one while the run is healthy,
            all that are kept after a failure.
        waiting: the rank failed within its last collective, not before the next one.
        error: message in one line.
        own: the error is the rank's own, not a consequence of another rank's failure.
        failed_rank: the rank that `error` names as failed.
        finished: the rank has read the reports of the others and no longer needs the store.
        overdue: seconds since the report was written, set by the reader once a heartbeat is overdue.
    """

    state: State
    heartbeat: int = 0
    time: float = 0.0
    count: int = 0
    entries: tuple[Entry, ...] = ()
    waiting: bool = False
    error: str = ""
    own: bool = False
    failed_rank: int | None = None
    finished: bool = False
    overdue: float | None = None

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def load(text: bytes | str) -> "RankReport":
        fields: dict[str, Any] = json.loads(text)
        return RankReport(**{**fields, "entries": tuple(Entry(**entry) for entry in fields["entries"])})

    @property
    def last(self) -> Entry | None:
        return self.entries[-1] if self.entries else None


def diagnose(reports: dict[int, RankReport], size: int) -> ParallelError:
    """Find the rank that failed first, and where; of `size` ranks, those without a report have never started.

    All ranks perform the same collectives in the same order. The failed rank has therefore not joined the earliest
    collective in which another rank waits. That is more accurate than its own last report, which may be a second old.
    """
    stuck = [r.last for r in reports.values() if r.waiting and r.last is not None]
    awaited = min(stuck, key=lambda entry: entry.sequence_number, default=None)

    def failure(ranks: Sequence[int], problem: str, where: Entry | None = awaited) -> ParallelError:
        if len(ranks) > 1:
            problem = f"{problem} (also {format_ranks(ranks[1:])})"
        return error_at(where or reports[ranks[0]].last, problem, ranks[0])

    def ranks_where(condition: Callable[[RankReport], bool]) -> list[int]:
        return [rank for rank, report in sorted(reports.items()) if condition(report)]

    absent = [rank for rank in range(size) if rank not in reports]
    if absent:
        return ParallelError("has not started", rank=absent[0])
    if own := ranks_where(lambda r: r.state == "failed" and r.own):
        first = min(own, key=lambda rank: reports[rank].time)
        return failure([first], f"failed with {reports[first].error}")
    if overdue := ranks_where(lambda r: r.overdue is not None):
        seconds = f"{reports[overdue[0]].overdue:.0f} s"
        return failure(overdue, f"sent no heartbeat for {seconds}: killed, stopped or disconnected")
    if accused := Counter(r.failed_rank for r in reports.values() if r.failed_rank is not None):
        rank = accused.most_common(1)[0][0]
        return failure([rank], next(r.error for r in reports.values() if r.failed_rank == rank))
    if left := ranks_where(lambda r: r.state == "left"):
        return failure(left, "has left the job")
    if difference := _first_difference(reports):
        ranks, usual = difference
        instead = next(e for e in reports[ranks[0]].entries if e.sequence_number == usual.sequence_number)
        return failure(ranks, f"skipped this collective and started {instead}", usual)
    if running := ranks_where(lambda r: r.state == "running"):
        late = min(running, key=lambda rank: reports[rank].count)
        last = reports[late].last
        progress = f"; its last collective was {last}" if last else ""
        return failure([late], f"is alive but has not joined this collective{progress}")
    first = min(reports, key=lambda rank: reports[rank].time)
    return failure([first], f"reported a failure that no rank caused: {reports[first].error}")


def error_at(entry: Entry | None, problem: str, rank: int) -> ParallelError:
    """Error of `rank` at a collective, if one is known."""
    if entry is None:
        return ParallelError(problem, rank=rank)
    return ParallelError(problem, rank=rank, step=entry.step, layer=entry.layer, operation=entry.operation)


def _first_difference(reports: dict[int, RankReport]) -> tuple[list[int], Entry] | None:
    """The ranks that diverged first, and the entry of the other ranks there; None if all entries agree."""
    by_number: dict[int, dict[int, Entry]] = {}
    for rank, report in sorted(reports.items()):
        for entry in report.entries:
            by_number.setdefault(entry.sequence_number, {})[rank] = entry
    for number in sorted(by_number):
        done = by_number[number]
        kinds = Counter(done.values()).most_common(2)
        if len(kinds) == 1:
            continue
        usual = kinds[0][0]
        if kinds[0][1] == kinds[1][1]:  # no majority: expect what followed the same collective in earlier steps
            history = next(iter(reports.values())).entries
            following = {
                (a.layer, a.operation): b for a, b in pairwise(e for e in history if e.sequence_number < number)
            }
            here = next((e for e in history if e.sequence_number == number - 1), None)
            known = following.get((here.layer, here.operation)) if here else None
            same = [e for e, _ in kinds if known and (e.layer, e.operation) == (known.layer, known.operation)]
            usual = same[0] if same else usual
        return [rank for rank, entry in done.items() if entry != usual], usual
    return None
