"""The benchmark of expert parallelism: its counts and formulas by hand, and no number for what is wrong."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import packing, parallel, ranks
from benchmarks.__main__ import main
from benchmarks.harness import ROOT, once
from benchmarks.packing import Candidate, Entry, Packing, Step, by_mask, by_sort, members
from benchmarks.ranks import CountBytes, RankFailed, Scale, World, byte_record, miscounted, over, scale_record
from benchmarks.roofline import Ceilings
from benchmarks.shapes import Shape
from moe.parallel.dispatch import Traffic

SIZES = "24,32,16,8,2"  # T, d, n, E, K
SHAPE = Shape("tiny", d=32, n=16, experts=8, top_k=2, tokens=(24,))
ONES = Ceilings(1.0, 1.0)


def test_a_small_run_of_two_ranks(tmp_path, capsys):
    file = tmp_path / "new" / "parallel.jsonl"
    assert (
        main(["parallel", "--small", "--ranks", "1", "2", "--shape", SIZES, "--device", "cpu", "--json", str(file)])
        == 0
    )
    shown = capsys.readouterr()
    assert "left out for 16 ranks, which do not divide its 8 experts" in shown.err
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({r["run"] for r in records}) == 1 and all(r["commit"] and r["versions"]["torch"] for r in records)
    by_part = {part: [r for r in records if r["part"] == part] for part in parallel.PARTS}

    steps = {r["step"] for r in by_part["pack"] if r["ours"] and r["status"] == "right" and r["share"] > 0}
    assert steps == {"destinations", "permute", "routing", "quantise", "unpermute", "trip", "trip, fp8", "experts"}
    assert {r["status"] for r in by_part["pack"] if not r["ours"]} == {"right", "not the same work"}

    assert [(r["ranks"], r["routing"], r["payload"]) for r in by_part["bytes"]] == [
        (2, routing, payload) for routing in ("uniform", "zipf") for payload in ("same", "fp8")
    ]
    for r in by_part["bytes"]:
        assert r["status"] == "right" and r["expected_copies"] == pytest.approx(1 - 6 / 28)
        assert r["bytes"] == pytest.approx(r["copies"] * (r["row_bytes_out"] + r["row_bytes_back"]))
        assert r["of_expected"] == pytest.approx(r["copies"] / (1 - 6 / 28))

    assert [(r["ranks"], r["fixed"], r["tokens"]) for r in by_part["scaling"]] == [
        (1, "per rank", 24),
        (1, "total", 96),
        (2, "per rank", 48),
        (2, "total", 96),
    ]
    cores = len(os.sched_getaffinity(0))
    for r in by_part["scaling"]:
        assert r["limit_tokens_per_s"] == r["undivided_tokens_per_s"] * min(r["ranks"], cores)
        assert 0 < r["in_collectives"] < 1 and r["share"] > 0
    if cores < 2:
        assert f"this machine has {cores} cores" in shown.out


def entry(**changes: Any) -> Entry:
    return dataclasses.replace(Entry(SHAPE, 24, 4, "uniform", torch.float32, "cpu", 3), **changes)


def test_torchs_own_orders_are_those_of_sets():
    ids = torch.tensor([[5, 1], [0, 1], [7, 2], [2, 3]])
    assert members(ids, 4, 2) == [[0, 1], [2, 3], [0], [2]]
    assert members(torch.tensor([[5, -1]]), 4, 2) == [[], [], [0], []]
    for order in (by_mask, by_sort):
        token, counts = order(ids, 4, 2)
        assert token.tolist() == [0, 1, 2, 3, 0, 2] and counts.tolist() == [2, 2, 1, 1]


def test_bytes_of_the_steps_by_hand():
    job = Packing(entry())
    t, k, j, r, d = 24, 2, 2, job.rows, 32
    assert r == sum(job.counts) == sum(len({i // 2 for i in row}) for row in job.ids.tolist()) < t * k
    moved = {step.name: step.work.bytes for step in (make(job) for make in packing.COPYING)}
    assert moved["destinations"] == 8 * t * k + 8 * t * j
    assert moved["permute"] == 8 * t * k + 4 * d * (t + r)
    assert moved["routing"] == 12 * t * k + 8 * r * k
    assert moved["quantise"] == 4 * r * d + r * (d + 4)
    assert moved["unpermute"] == 4 * d * (t + r) + 8 * t * j
    trip = moved["permute"] + moved["routing"] + moved["unpermute"] + 20 * r * k
    assert moved["trip"] == trip and moved["trip, fp8"] == trip + 2 * moved["quantise"]


def test_the_slots_that_a_virtual_rank_computes():
    """The last of 4 ranks has experts 6 and 7; its rows are all tokens of 4 ranks that have one of them."""
    step = packing.Packing.experts(Packing(entry()))
    phase = step.work.phases[0]
    ids = packing.assign("uniform", 96, 8, 2, torch.Generator().manual_seed(4)).expert_ids
    slots, rows = int((ids >= 6).sum()), int((ids >= 6).any(1).sum())
    assert phase.flops == 6 * slots * 32 * 16
    assert phase.bytes == 4 * (2 * 3 * 32 * 16 + 2 * rows * 32 + 2 * slots * 16 + 2 * slots * 32)


def spoiled(step: Step, spoil: Callable[[Any], Any]) -> Step:
    ours, *others = step.candidates
    return dataclasses.replace(step, candidates=(Candidate(ours.name, lambda: spoil(ours.call())), *others))


def second_row_first(rows: Tensor) -> Tensor:
    return rows[[1, 0, *range(2, len(rows))]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "spoil"),
    [
        (Packing.destinations, lambda found: found.roll(1, 0)),
        (Packing.destinations, lambda found: torch.where(found < 0, found[:, :1], found)),
        (Packing.permute, lambda found: (second_row_first(found[0]), found[1])),
        (Packing.permute, lambda found: (found[0], found[1].roll(1))),
        (Packing.permute, lambda found: (found[0] + 1, found[1])),
        (Packing.routing, lambda found: second_row_first(found)),
        (Packing.routing, lambda found: found ^ 1),
        (Packing.quantise, lambda found: (found[0], found[1] * (1 + 2**-18))),
        (Packing.quantise, lambda found: ((found[0].view(torch.uint8) ^ 1).view(torch.float8_e4m3fn), found[1])),
        (Packing.unpermute, lambda found: second_row_first(found)),
        (Packing.unpermute, lambda found: found * 1.01),
        (Packing.trip, lambda found: second_row_first(found)),
        (Packing.trip_fp8, lambda found: second_row_first(found)),
        (Packing.trip_fp8, lambda found: found * 1.01),
        (Packing.experts, lambda found: found * 1.01),
        (Packing.experts, lambda found: second_row_first(found)),
        (Packing.experts, lambda found: found[1:]),
    ],
)
def test_a_wrong_candidate_gets_no_number(make, spoil, dtype):
    with torch.no_grad():
        step = make(Packing(entry(dtype=dtype)))
        first, *others = packing.measure(spoiled(step, spoil), ONES, 0.0, once)
    assert first["status"] == "wrong" and first["reason"] and not {"eager", "share", "gbytes"} & set(first)
    assert all("eager" in other for other in others)


def test_what_remembers_or_fails_gets_no_number():
    def fails() -> Any:
        raise ValueError("of its own")

    with torch.no_grad():
        step = Packing.unpermute(Packing(entry()))
        first = step.candidates[0].call()
        ours, *others = step.candidates
        step = dataclasses.replace(
            step, candidates=(Candidate(ours.name, lambda: first), Candidate("it", fails), *others)
        )
        remembers, failing, *right = packing.measure(step, ONES, 0.0, once)
    assert remembers["reason"].startswith("with other values of its inputs: error")
    assert failing["reason"] == "ValueError: of its own" and "eager" not in failing
    assert all(r["status"] == "right" for r in right)


JOB = CountBytes(SHAPE, "uniform", "fp8", 0)
# Two ranks; rank 0 has experts 0 to 3. Of its tokens 2 stay and 2 leave (the second does both), of rank 1's 1 comes.
IDS = [torch.tensor([[0, 1], [2, 5], [7, 4]]), torch.tensor([[4, 5], [6, 0], [7, 6]])]


def test_counts_by_hand():
    out, back = 32 + 4 + 2 * 8, 32 * 2
    assert ranks.row_bytes(JOB) == (out, back)
    assert ranks.row_bytes(dataclasses.replace(JOB, payload="same")) == (64 + 2 * 8, back)
    right = Traffic(sent=(2, 2), received=(2, 1), rank=0, bytes_out=out, bytes_back=back)
    left = 2 * out + 1 * back
    assert miscounted(JOB, IDS, right, left) == ""
    for what, changed in (
        ("rows sent", {"sent": (2, 3)}),
        ("rows received", {"received": (2, 2)}),
        ("bytes of a row", {"bytes_out": out + 4}),
        ("bytes of a row", {"bytes_back": 2 * back}),
    ):
        assert miscounted(JOB, IDS, dataclasses.replace(right, **changed), left).startswith(f"rank 0: {what}: ")
    said = miscounted(JOB, IDS, right, left + 1)
    assert said == f"rank 0: bytes handed to collectives: {left + 1}, expected {left}"


def test_the_record_of_bytes_by_hand():
    out, back = ranks.row_bytes(JOB)
    found = [
        {"sent": (20, 10), "bytes": 10 * out + 14 * back, "slots": 21, "fault": ""},
        {"sent": (14, 19), "bytes": 14 * out + 10 * back, "slots": 27, "fault": ""},
    ]
    record = byte_record(JOB, found)
    assert record["copies"] == 24 / 48 and record["bytes"] == 24 * (out + back) / 48
    assert record["naive_bytes"] == 48 * (32 + 4 + 8 + back) / 48
    assert record["dedup"] == record["naive_bytes"] / record["bytes"]
    reached = 1 - math.comb(4, 2) / math.comb(8, 2)
    assert record["expected_copies"] == pytest.approx(2 * reached / 2)
    found[1]["fault"] = "rank 1: rows sent"
    wrong = byte_record(JOB, found)
    assert (wrong["status"], wrong["reason"]) == ("wrong", "rank 1: rows sent") and "bytes" not in wrong


def test_the_record_of_scaling_by_hand():
    found = [
        {"fault": "", "together": [2.0, 4.0, 3.0], "waited": [1.0, 1.0, 1.5], "alone": [1.5, 1.0, 2.0]},
        {"fault": "", "together": [1.0, 5.0, 3.0], "waited": [0.5, 1.7, 1.5], "alone": [0.0, 0.0, 0.0]},
        {"fault": "", "together": [1.0, 1.0, 3.0], "waited": [0.5, 0.3, 1.5], "alone": [0.0, 0.0, 0.0]},
    ]
    per_rank = scale_record(Scale(SHAPE, "per rank", 3, 0), found, cores=2)
    assert per_rank["tokens"] == 72 and per_rank["tokens_per_s"] == 72 / 3.0  # 2, 5 and 3 seconds
    assert per_rank["undivided_tokens_per_s"] == 24 / 1.5 and per_rank["limit_tokens_per_s"] == 2 * 24 / 1.5
    assert per_rank["share"] == 24 / 32 and per_rank["in_collectives"] == 0.5  # 2 / 4, 3 / 10, 4.5 / 9
    total = scale_record(Scale(SHAPE, "total", 3, 0), found, cores=8)
    assert total["tokens"] == 24 and total["limit_tokens_per_s"] == 3 * 24 / 1.5
    assert Scale(SHAPE, "total", 3, 0).tokens(5) == [5, 5, 5, 5, 4]
    found[2]["fault"] = "rank 2: y"
    assert not {"share", "together"} & set(scale_record(Scale(SHAPE, "total", 3, 0), found, cores=8))


BROKEN = """
import sys
import benchmarks.ranks
from benchmarks.__main__ import main
from moe.parallel.dispatch import AllToAllDispatcher, _Return

benchmarks.ranks.START = "fork"  # so that what is broken here is broken there; nothing has been computed yet
run = ["parallel", "--small", "--ranks", "2", "--shape", sys.argv[1], "--part", "bytes", "scaling", "--json"]

right = AllToAllDispatcher.destinations
AllToAllDispatcher.destinations = lambda self, ids: ids // self.experts_per_rank
assert main([*run, "copies.jsonl"]) == 1
AllToAllDispatcher.destinations = right

right_backward = _Return.backward
_Return.backward = staticmethod(lambda ctx, grad: right_backward(ctx, 1.01 * grad))
assert main([*run, "gradients.jsonl"]) == 1
"""


def test_a_wrong_dispatcher_gets_no_number(tmp_path):
    """One that sends a copy for each expert, and one whose gradients are a hundredth too large."""
    command = [sys.executable, "-c", BROKEN, SIZES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for broken, parts, says in (
        ("copies", {"bytes", "scaling"}, "rank 0: rows sent: ["),
        ("gradients", {"scaling"}, "gradient of x: error 1.0e-02"),
    ):
        records = [json.loads(line) for line in (tmp_path / f"{broken}.jsonl").read_text().splitlines()]
        wrong = [r for r in records if r["status"] == "wrong"]
        assert {r["part"] for r in wrong} == parts and len(wrong) == sum(r["part"] in parts for r in records)
        assert not any({"bytes", "dedup", "together", "share"} & set(r) for r in wrong)
        assert any(says in r["reason"] for r in wrong) and says in done.stdout


def ranks_of(world: World) -> int:
    return 10 * world.size + world.rank


def leaves(world: World) -> None:
    if world.rank == 1:
        os._exit(3)
    world.ep  # noqa: B018 - which waits for the other


def fails(world: World) -> None:
    if world.rank == 1:
        raise ValueError("of its own")
    world.ep  # noqa: B018


def test_results_come_by_rank_and_a_rank_that_fails_is_named():
    assert list(over(3, [ranks_of, ranks_of])) == [[30, 31, 32]] * 2
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 ended without a word$"):
        list(over(2, [leaves]))
    with pytest.raises(RankFailed, match=r"^rank 1 of 2: ValueError: of its own$"):
        list(over(2, [ranks_of, fails]))


def test_of_ranks_that_fail_the_first_is_named_whoever_is_heard_first():
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    pipes[0][1].send((None, "RuntimeError: connection closed", 2.0))
    pipes[1][1].send((None, "ValueError: of its own", 1.0))
    with pytest.raises(RankFailed, match=r"^rank 1 of 2: ValueError: of its own$"):
        ranks._gather([here for here, _ in pipes])


def test_a_device_that_fails_in_a_part_leaves_the_others(monkeypatch, capsys):
    def failing(*_):
        raise torch.AcceleratorError("an illegal memory access\nand how to debug it")

    asked = []
    monkeypatch.setattr(packing, "measure", failing)
    monkeypatch.setitem(parallel.MEASURE, "bytes", lambda of: iter(asked.append(of) or []))
    assert main(["parallel", "--part", "pack", "bytes", "--small", "--shape", SIZES, "--device", "cpu"]) == 1
    assert (
        capsys.readouterr().err.endswith("\npack: an illegal memory access and how to debug it\n") and len(asked) == 1
    )


def in_session(session: int) -> list[str]:
    """Processes of a session that are not waiting for their parent's notice."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(stat.parent.name)
    return found


def test_no_process_outlives_an_interrupted_run():
    command = [sys.executable, "-m", "benchmarks", "parallel", "--part", "scaling", "--ranks", "2", "4"]
    command += ["--shape", SIZES, "512,64,64,8,2"]
    for number in (signal.SIGINT, signal.SIGKILL):
        # One after the other: on a busy machine the second would be over when the first has been looked at.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell's background jobs ignore it, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            assert process.stderr is not None and process.stderr.readline().startswith("scaling: 2 ranks")
            assert len(in_session(process.pid)) >= 3
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            said = process.stderr.read()  # which ends when nobody is left who could write
        if number == signal.SIGINT:
            assert process.returncode == 130 and "Trace" not in said
            assert said.splitlines()[-1].startswith("interrupted: ")
        deadline = time.monotonic() + 10
        while in_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not in_session(process.pid)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ranks", "0"], "--ranks 0: expected numbers from 1 to 64, each rank being a process"),
        (["--ranks", "2", "65"], "--ranks 65: expected numbers from 1 to 64"),
        (["--ranks", "two"], "argument --ranks: invalid int value: 'two'"),
        (["--seed", "-1"], "--seed -1: expected an integer from 0, below 2^32"),
        (["--part", "send"], "argument --part: invalid choice: 'send'"),
        (["--shape", "olmo"], "--shape olmo: expected T,d,n,E,K or one of deepseek_v3"),
        (["--device", "cuda"], "--device cuda: this torch finds no GPU"),
        (["--json", "/proc/none.jsonl"], "--json /proc/none.jsonl: "),
    ],
)
def test_bad_input_is_one_line(options, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parallel, "MEASURE", {})
    try:
        status: Any = main(["parallel", *options])
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 2 and says in shown.err and shown.err.count("\n") == 1 and not shown.out
