"""Whose fault it was: from what every rank has written down, the one that the others waited for, and where."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from moe.errors import ParallelError
from moe.parallel.journal import Entry, name_ranks

State = Literal["running", "left", "failed"]


@dataclass(frozen=True)
class Account:
    """What a rank says of itself.

    Attributes:
        beat, time: a number that grows with every sign of life, and when this one was given.
        count: collectives so far; `entries` are the last of them, all that are kept once something has failed.
        waiting: failed in its last collective, not before its next.
        error, own: in a line; whether it is this rank's own, and not what it noticed of another's.
        blamed: the rank whose fault it says it is.
        heard: it has heard the others, and needs the store no more.
        silent: seconds without a sign of life, if who reads this thinks that there should have been one.
    """

    state: State
    beat: int = 0
    time: float = 0.0
    count: int = 0
    entries: tuple[Entry, ...] = ()
    waiting: bool = False
    error: str = ""
    own: bool = False
    blamed: int | None = None
    heard: bool = False
    silent: float | None = None

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def load(text: bytes | str) -> "Account":
        fields: dict[str, Any] = json.loads(text)
        return Account(**{**fields, "entries": tuple(Entry(**entry) for entry in fields["entries"])})

    @property
    def last(self) -> Entry | None:
        return self.entries[-1] if self.entries else None


def find_culprit(accounts: dict[int, Account], size: int) -> ParallelError:
    """Of `size` ranks, those without an account have never given a sign of life.

    All ranks do the same collectives in the same order. So the earliest collective in which a rank still waits is the
    one that the culprit has not joined, and it says more than the culprit's own last sign of life, up to a second old.
    """
    stuck = [a.last for a in accounts.values() if a.waiting and a.last is not None]
    awaited = min(stuck, key=lambda entry: entry.number, default=None)

    def verdict(ranks: Sequence[int], problem: str, where: Entry | None = awaited) -> ParallelError:
        if len(ranks) > 1:
            problem = f"{problem} (so did {name_ranks(ranks[1:])})"
        return error_at(where or accounts[ranks[0]].last, problem, ranks[0])

    def having(condition: Any) -> list[int]:
        return [rank for rank, account in sorted(accounts.items()) if condition(account)]

    absent = [rank for rank in range(size) if rank not in accounts]
    if absent:
        return ParallelError("has not started", rank=absent[0])
    if own := having(lambda a: a.state == "failed" and a.own):
        first = min(own, key=lambda rank: accounts[rank].time)
        return verdict([first], f"failed with {accounts[first].error}")
    if silent := having(lambda a: a.silent is not None):
        return verdict(silent, f"no sign of life for {accounts[silent[0]].silent:.0f} s: killed, stopped or cut off")
    if blamed := Counter(a.blamed for a in accounts.values() if a.blamed is not None):
        rank = blamed.most_common(1)[0][0]
        return verdict([rank], next(a.error for a in accounts.values() if a.blamed == rank))
    if left := having(lambda a: a.state == "left"):
        return verdict(left, "has left the run")
    if difference := _first_difference(accounts):
        ranks, usual = difference
        instead = next(e for e in accounts[ranks[0]].entries if e.number == usual.number)
        return verdict(ranks, f"skipped this, and came to {instead}", usual)
    if running := having(lambda a: a.state == "running"):
        late = min(running, key=lambda rank: accounts[rank].count)
        last = accounts[late].last
        return verdict([late], "has not come, and is alive" + (f": still after {last}" if last else ""))
    first = min(accounts, key=lambda rank: accounts[rank].time)
    return verdict([first], f"noticed a failure that no rank answers for: {accounts[first].error}")


def error_at(entry: Entry | None, problem: str, rank: int) -> ParallelError:
    if entry is None:
        return ParallelError(problem, rank=rank)
    return ParallelError(problem, rank=rank, step=entry.step, layer=entry.layer, operation=entry.operation)


def _first_difference(accounts: dict[int, Account]) -> tuple[list[int], Entry] | None:
    """-> the ranks that left the others first, and what these did there."""
    by_number: dict[int, dict[int, Entry]] = {}
    for rank, account in sorted(accounts.items()):
        for entry in account.entries:
            by_number.setdefault(entry.number, {})[rank] = entry
    for number in sorted(by_number):
        done = by_number[number]
        kinds = Counter(done.values()).most_common(2)
        if len(kinds) == 1:
            continue
        usual = kinds[0][0]
        if kinds[0][1] == kinds[1][1]:  # nobody outvotes anybody: what came next when they were here before
            history = next(iter(accounts.values())).entries
            before = {(a.layer, a.operation): b for a, b in pairwise(e for e in history if e.number < number)}
            here = next((e for e in history if e.number == number - 1), None)
            known = before.get((here.layer, here.operation)) if here else None
            same = [e for e, _ in kinds if known and (e.layer, e.operation) == (known.layer, known.operation)]
            usual = same[0] if same else usual
        return [rank for rank, entry in done.items() if entry != usual], usual
    return None
