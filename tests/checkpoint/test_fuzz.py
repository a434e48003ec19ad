"""The fuzzer itself: its cases repeat, and it detects every kind of failure that it counts."""

import dataclasses
import random
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from moe.checkpoint.format import comparison, header
from moe.checkpoint.reading import load as reading
from tests import fuzz
from tests.fuzz import INDEX, KINDS, Lab, Verdict, Worker, campaign, damage
from tests.support import hostile


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("fuzz") / "model")


def run(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_hundred_cases() -> None:
    status, output = run("--count", "100", "--seed", "7")
    assert status == 0, output
    counts = dict((kind, int(count)) for count, kind in re.findall(r"(\d+) ([a-z]+)(?:,|$)", output.strip()))
    assert sum(counts[kind] for kind in KINDS) == 100
    assert counts["refused"] > 60 and counts["unchanged"] + counts["legal"] > 2


@pytest.mark.parametrize(
    "arguments", [("--count", "0"), ("--count", "many"), ("--seed", "-1"), ("--only", "1.5"), ("--timeout", "nan")]
)
def test_arguments_that_make_no_sense(arguments: tuple[str, str]) -> None:
    status, output = run(*arguments)
    assert status == 2 and f"argument {arguments[0]}: '{arguments[1]}': expected" in output


def test_cases_repeat_and_differ(lab: Lab) -> None:
    cases = [damage(random.Random(f"1:{i}"), lab.files) for i in range(300)]
    assert cases == [damage(random.Random(f"1:{i}"), lab.files) for i in range(300)]
    assert len({str(sorted(changed.items())) for changed, _ in cases}) > 280
    done = {change.split(": ")[1] for _, changes in cases for change in changes}
    assert done >= {f.__name__ for f in (*fuzz.HEADERS, *fuzz.INDEXES)}


def test_the_valid_folder_is_unchanged_and_stays_so(lab: Lab) -> None:
    assert lab.judge({}).kind == "unchanged"
    name = sorted(lab.files)[0]
    assert lab.judge({name: lab.files[name][:-1], INDEX: b"{}"}).kind == "refused"
    assert {path.name: path.read_bytes() for path in lab.folder.glob("model*")} == lab.files
    assert lab.judge({}).kind == "unchanged"


def swapped(lab: Lab) -> dict[str, bytes]:
    """Two experts of one file have each other's data."""
    name = next(name for name in sorted(lab.files) if b"experts.0.up_proj" in lab.files[name] and name != INDEX)
    values, data = hostile.split(lab.folder / name)
    one, two = (values[f"model.layers.1.mlp.experts.0.{part}_proj.weight"] for part in ("gate", "up"))
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    return {name: hostile.join(values, data)}


def test_what_the_library_reads_too_is_legal(lab: Lab) -> None:
    verdict = lab.judge(swapped(lab))
    assert (verdict.kind, verdict.why) == ("legal", "layers.1.mlp.experts.gate_up_proj")


def test_what_only_we_accept_is_a_disagreement(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name in sorted(lab.files) if name != INDEX)
    longer = {name: lab.files[name] + b"\0"}
    assert lab.judge(longer).kind == "refused"
    monkeypatch.setattr(header, "_in_order", lambda tensors, path, start, size: tensors)
    assert lab.judge(longer).kind == "disagreement"


def test_what_only_we_read_so_is_a_disagreement(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    original = header.parse_entry

    def transposed(*args: Any) -> header.TensorInfo:
        info = original(*args)
        return dataclasses.replace(info, shape=info.shape[::-1])

    monkeypatch.setattr(header, "parse_entry", transposed)
    name = next(name for name in sorted(lab.files) if name != INDEX)
    assert lab.judge({name: lab.files[name]}).kind == "disagreement"


def test_a_model_that_is_neither_is_silent(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    original = reading.fill

    def wrong(files: Any, piece: Any, destination: torch.Tensor, todo: Any) -> None:
        original(files, piece, destination, todo)
        if "experts.3." in piece.info.name:
            destination.view(-1)[-1] = 0

    monkeypatch.setattr(reading, "fill", wrong)
    assert lab.judge({}).kind == "silent"
    assert lab.judge(swapped(lab)).kind == "silent"


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), RecursionError(), OSError("x")])
def test_any_other_exception_is_a_crash(lab: Lab, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(comparison, "read_tensors", fail)
    assert lab.judge({}).kind == "crash"


FAKE = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    if int(line) == 1:
        os._exit(7)
    if int(line) == 2:
        time.sleep(600)
    print(json.dumps({"kind": "refused", "why": "x", "changes": ["y"]}), flush=True)
"""


def test_ends_and_hangs_are_counted_and_the_next_case_runs(capsys: pytest.CaptureFixture[str]) -> None:
    class Patient(Worker):
        """A worker that waits indefinitely for cases that answer."""

        def ask(self, index: int) -> Verdict:
            self.seconds = 1.0 if index == 2 else 600.0
            return super().ask(index)

    worker = Patient([sys.executable, "-c", FAKE], 1.0)
    assert campaign(worker, range(5), 3) == 1
    assert worker.process is None
    output = capsys.readouterr().out
    assert "5 cases, seed 3: 3 refused, 0 unchanged, 0 legal, 1 crash, 1 hang, 0 silent, 0 disagreement" in output
    assert "crash: python -m tests.fuzz --seed 3 --only 1: the process ended with status 7" in output
    assert "hang: python -m tests.fuzz --seed 3 --only 2: no answer in 1 s" in output


def test_an_interrupt_ends_it_with_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(Worker):
        def ask(self, index: int) -> Verdict:
            if index == 3:
                raise KeyboardInterrupt
            return super().ask(index)

    worker = Interrupted([sys.executable, "-c", FAKE.replace("== 1", "== -1").replace("== 2", "== -2")], 60.0)
    assert campaign(worker, range(100), 0) == 130
    assert worker.process is None
    assert capsys.readouterr().out.startswith("interrupted\n3 cases, seed 0: 3 refused")
