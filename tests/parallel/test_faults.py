"""Ranks that fail: what the others are told. The whole matrix of kinds and points: `python -m tests.faults`."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe.errors import ParallelError
from moe.parallel import start
from moe.parallel.inquest import Account, find_culprit
from moe.parallel.journal import Entry, Journal
from tests.faults import FEW

ROOT = Path(__file__).parents[2]


@cache
def outcomes(file: Path) -> list[dict[str, Any]]:
    # A process of its own: threads that a process has started do not survive its forks.
    command = [sys.executable, "-m", "tests.faults", "--few", "--timeout", "4", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    return json.loads(file.read_text())


@pytest.mark.parametrize("i", range(len(FEW)), ids=[f"{kind} at {point}" for kind, point in FEW])
def test_every_survivor_names_rank_step_layer_and_operation(i: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    outcome = outcomes(tmp_path_factory.getbasetemp() / "faults.json")[i]
    told = outcome["messages"]
    assert (outcome["rank"], outcome["operation"], outcome["survivors"]) == (3, 3, 3), told
    assert outcome["seconds"] < 30 and not outcome["stepped"], told
    assert all(message.isprintable() for message in told), told


# The collectives of a step; `number` counts from 1 over all steps.
OPERATIONS = ("gather", "counts", "rows", "results")


def did(*operations: str, step: int = 1) -> tuple[Entry, ...]:
    """A whole step, and then these."""
    names = [(0, name) for name in OPERATIONS] + [(step, name) for name in operations]
    return tuple(Entry(i, at, "mlp", name) for i, (at, name) in enumerate(names, 1))


def account(*operations: str, **more: Any) -> Account:
    entries = did(*operations)
    waiting = more.get("state", "failed") == "failed"
    return Account(**({"state": "failed", "waiting": waiting, "count": len(entries), "entries": entries} | more))


WAITS = account("gather", "counts", "rows", error="Connection closed by peer")
LATER = account("gather", "counts", "rows", "results", error="Connection closed by peer")
TOLD = account("gather", waiting=False, error="another rank has failed")
BEFORE = account("gather", "counts", state="running")


@pytest.mark.parametrize(
    ("accounts", "rank", "operation", "words"),
    [
        # The place is the earliest collective that somebody waits in, whatever the culprit wrote last.
        ([WAITS, LATER, account("gather", state="running", silent=5.0)], 2, "rows", "no sign of life for 5 s"),
        ([account("gather", silent=4.0, state="running"), TOLD, WAITS], 0, "rows", "no sign of life"),
        (
            [account(silent=4.0, state="running"), account(silent=4.0, state="running"), WAITS],
            0,
            "rows",
            "so did rank 1",
        ),
        ([WAITS, account("gather", own=True, waiting=False, error="ValueError: x"), TOLD], 1, "rows", "ValueError: x"),
        # Of two that failed on their own, the first.
        (
            [account(own=True, waiting=False, error="second", time=2.0), account(own=True, error="first", time=1.0)],
            1,
            "results",
            "first",
        ),
        ([account("gather", "counts", state="left"), WAITS, LATER], 0, "rows", "left the run"),
        ([WAITS, WAITS, BEFORE], 2, "rows", "has not come, and is alive: still after step 1, mlp, counts"),
        # Two against one, and, where there are but two, what came next the last time.
        ([WAITS, account("gather", "counts", "results"), WAITS], 1, "rows", "came to step 1, mlp, results"),
        ([account("gather", "counts", "results"), WAITS], 0, "rows", "skipped this"),
        ([WAITS, account("gather", "counts", "results")], 1, "rows", "skipped this"),
        ([WAITS, account("gather", "counts", "rows", blamed=0, error="sends 3 rows")], 0, "rows", "sends 3 rows"),
        ([WAITS, LATER], 0, "rows", "no rank answers for"),
    ],
)
def test_whose_fault(accounts: list[Account], rank: int, operation: str, words: str) -> None:
    found = find_culprit(dict(enumerate(accounts)), len(accounts))
    assert (found.rank, found.operation) == (rank, operation), found
    assert words in str(found) and str(found).startswith(f"rank {rank}, step ")


def test_a_rank_that_never_came() -> None:
    found = find_culprit({0: WAITS, 2: WAITS}, 3)
    assert found.rank == 1 and "has not started" in str(found)


def test_accounts_travel_as_text() -> None:
    assert Account.load(WAITS.dump()) == WAITS


def test_a_journal_keeps_count_and_digest() -> None:
    one, other = Journal(0), Journal(1)
    for journal in (one, other):
        journal.note("mlp", "rows")
        journal.note("mlp", "results", 7)
    assert (one.count, one.digest) == (other.count, other.digest)
    one.note("loss", "sum of counts", 3)
    other.note("loss", "sum of counts", 4)
    assert one.count == other.count and one.digest != other.digest


def test_start_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="RANK is not set: start with torchrun"), start():
        pass


def test_a_run_without_a_fault_says_nothing_and_leaves_no_thread(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import threading, torch, torch.distributed as dist\n"
        "from moe.parallel import start\n"
        "with start(timeout=20, device='cpu') as watch:\n"
        "    with watch.journal.collective('here', 'sum', size=1):\n"
        "        dist.all_reduce(torch.ones(1))\n"
        "assert not dist.is_initialized()\n"
        "assert [t.name for t in threading.enumerate()] == ['MainThread'], threading.enumerate()\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
