"""Errors of the other ranks when one fails. `python -m tests.faults` runs all kinds of faults at all collectives."""

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
from moe.parallel.collective_log import CollectiveLog, Entry
from moe.parallel.diagnosis import RankReport, diagnose
from tests.faults import FEW

ROOT = Path(__file__).parents[2]


@cache
def outcomes(file: Path) -> list[dict[str, Any]]:
    # In a separate process, because threads of this one would not survive its forks.
    command = [sys.executable, "-m", "tests.faults", "--few", "--timeout", "4", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    return json.loads(file.read_text())


@pytest.mark.parametrize("i", range(len(FEW)), ids=[f"{kind} at {point}" for kind, point in FEW])
def test_every_survivor_names_rank_step_layer_and_operation(i: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    outcome = outcomes(tmp_path_factory.getbasetemp() / "faults.json")[i]
    messages = outcome["messages"]
    assert (outcome["rank"], outcome["operation"], outcome["survivors"]) == (3, 3, 3), messages
    assert outcome["seconds"] < 30 and not outcome["stepped"], messages
    assert all(message.isprintable() for message in messages), messages


# The collectives of a step; sequence numbers count from 1 over all steps.
OPERATIONS = ("gather", "counts", "rows", "results")


def did(*operations: str, step: int = 1) -> tuple[Entry, ...]:
    """Entries of a complete step, followed by these operations."""
    names = [(0, name) for name in OPERATIONS] + [(step, name) for name in operations]
    return tuple(Entry(i, at, "mlp", name) for i, (at, name) in enumerate(names, 1))


def report(*operations: str, **more: Any) -> RankReport:
    entries = did(*operations)
    waiting = more.get("state", "failed") == "failed"
    return RankReport(**({"state": "failed", "waiting": waiting, "count": len(entries), "entries": entries} | more))


WAITS = report("gather", "counts", "rows", error="Connection closed by peer")
LATER = report("gather", "counts", "rows", "results", error="Connection closed by peer")
TOLD = report("gather", waiting=False, error="another rank has failed")
BEFORE = report("gather", "counts", state="running")


@pytest.mark.parametrize(
    ("reports", "rank", "operation", "words"),
    [
        # The place is the earliest collective in which a rank waits, whatever the failed rank last reported.
        ([WAITS, LATER, report("gather", state="running", overdue=5.0)], 2, "rows", "sent no heartbeat for 5 s"),
        ([report("gather", overdue=4.0, state="running"), TOLD, WAITS], 0, "rows", "sent no heartbeat"),
        (
            [report(overdue=4.0, state="running"), report(overdue=4.0, state="running"), WAITS],
            0,
            "rows",
            "(also rank 1)",
        ),
        ([WAITS, report("gather", own=True, waiting=False, error="ValueError: x"), TOLD], 1, "rows", "ValueError: x"),
        # If two ranks failed independently, the first.
        (
            [report(own=True, waiting=False, error="second", time=2.0), report(own=True, error="first", time=1.0)],
            1,
            "results",
            "first",
        ),
        ([report("gather", "counts", state="left"), WAITS, LATER], 0, "rows", "has left the job"),
        (
            [WAITS, WAITS, BEFORE],
            2,
            "rows",
            "is alive but has not joined this collective; its last collective was step 1, mlp, counts",
        ),
        # The majority is right; of two ranks, the one that did the same as in the step before.
        (
            [WAITS, report("gather", "counts", "results"), WAITS],
            1,
            "rows",
            "skipped this collective and started step 1, mlp, results",
        ),
        ([report("gather", "counts", "results"), WAITS], 0, "rows", "skipped this collective"),
        ([WAITS, report("gather", "counts", "results")], 1, "rows", "skipped this collective"),
        ([WAITS, report("gather", "counts", "rows", failed_rank=0, error="sends 3 rows")], 0, "rows", "sends 3 rows"),
        ([WAITS, LATER], 0, "rows", "that no rank caused"),
    ],
)
def test_diagnosis(reports: list[RankReport], rank: int, operation: str, words: str) -> None:
    found = diagnose(dict(enumerate(reports)), len(reports))
    assert (found.rank, found.operation) == (rank, operation), found
    assert words in str(found) and str(found).startswith(f"rank {rank}, step ")


def test_a_rank_that_never_started() -> None:
    found = diagnose({0: WAITS, 2: WAITS}, 3)
    assert found.rank == 1 and "has not started" in str(found)


def test_reports_are_sent_as_text() -> None:
    assert RankReport.load(WAITS.dump()) == WAITS


def test_the_log_counts_and_digests_its_entries() -> None:
    one, other = CollectiveLog(0), CollectiveLog(1)
    for log in (one, other):
        log.record("mlp", "rows")
        log.record("mlp", "results", 7)
    assert (one.count, one.digest) == (other.count, other.digest)
    one.record("loss", "sum of counts", 3)
    other.record("loss", "sum of counts", 4)
    assert one.count == other.count and one.digest != other.digest


def test_start_needs_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ParallelError, match="RANK is not set: start with torchrun"), start():
        pass


JOB = """
import threading, time
import torch
import torch.distributed as dist
from moe.parallel import job, start

def threads():
    return [thread.name for thread in threading.enumerate()]

def run_late(thread):
    run(thread)
    time.sleep(0.5)

run, job._Monitor.run = job._Monitor.run, run_late  # the thread ends late, as on a busy machine

def add(job):
    with job.log.collective("here", "sum", size=1):
        dist.all_reduce(torch.ones(1))
"""


def run_job(script: Path, program: str) -> tuple[int, str, str]:
    """Run `program` after `JOB` as two ranks; returns exit status, stdout and stderr."""
    script.write_text(JOB + program)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run([*command, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_without_a_fault_prints_nothing_and_leaves_no_thread(tmp_path: Path) -> None:
    program = """
with start(timeout=20, device="cpu") as job:
    add(job)
assert not dist.is_initialized()
assert threads() == ["MainThread"], threads()
"""
    assert run_job(tmp_path / "run.py", program) == (0, "", "")


def test_a_failed_run_leaves_no_thread(tmp_path: Path) -> None:
    # A thread in the store's C++ code at exit aborts the process, and its status is lost.
    program = """
try:
    with start(timeout=20, device="cpu") as job:
        add(job)
        raise ValueError("expected")
except ValueError:
    assert threads() == ["MainThread"], threads()
"""
    assert run_job(tmp_path / "run.py", program) == (0, "", "")
