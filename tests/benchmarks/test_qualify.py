"""`python -m benchmarks qualify` without a GPU: what fails is recorded, the rest goes on, and the report is true."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import qualify
from benchmarks import qualify_steps as steps
from benchmarks.__main__ import main
from benchmarks.harness import ROOT, BadInput
from benchmarks.qualify import Stage, Task, profile_rows
from benchmarks.qualify_results import RESULTS, judge, read
from benchmarks.report import SMOKE_TEST
from benchmarks.supervise import KEPT

HERE = {
    "run": "0",
    "device": "a test",
    "source": "0123",
    "small": True,
    "driver": None,
    "commit": "abc",
    "versions": {"torch": "2"},
}


@pytest.fixture(autouse=True)
def _described_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualify, "describe", lambda *_: (dict(HERE), [], ""))


def script(name: str, code: str, limit: float = 60.0, **how: Any) -> Task:
    """A task that runs Python code; `lines` is the file for its results."""
    start = "import json, os, signal, subprocess, sys, time\nlines = open(sys.argv[1], 'a', buffering=1)\n"
    return Task(name, (sys.executable, "-c", start + textwrap.dedent(code), "{lines}"), limit, **how)


def stage(name: str, *tasks: Task, limit: float = 600.0, **how: Any) -> Stage:
    return Stage(name, limit, lambda device, small: list(tasks), **how)


def call(out: Path, *stages: Stage, **options: Any) -> int:
    given = {"stage": [s.name for s in stages], "minutes": None, "resume": None, "device": "cpu", "small": True}
    return qualify.run(argparse.Namespace(**{**given, "out": out, **options}), stages)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


def ended(out: Path) -> dict[str, tuple[str, str]]:
    return {r["task"]: (r["status"], r["reason"]) for r in records(out) if r["kind"] == "task"}


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_task_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out, child = tmp_path / "out", tmp_path / "child"
    hangs = f"""
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        hows = ({{"env": {{}}}}, {{"start_new_session": True}})  # without a mark, and outside the group
        children = [subprocess.Popen([sys.executable, "-c", code], **how) for how in hows]
        print(*(child.pid for child in children), file=open({str(child)!r}, "w"), flush=True)
        time.sleep(600)
    """
    tasks = (
        script("right", "print(json.dumps({'check': 'one', 'found': 1, 'most': 2, 'right': True}), file=lines)"),
        script("status", "print('the last words'); sys.exit(5)"),
        script("reason", "print(json.dumps({'failed': 'logits: 3, at most 2'}), file=lines); sys.exit(1)"),
        script("signal", "os.kill(os.getpid(), signal.SIGSEGV)"),
        script("hangs", hangs, limit=20),
        script("silent", "print('{}', file=lines); time.sleep(600)", limit=600, tests=True),
        script("prints", "print('first'); print('x' * 2**23); print('last')"),
        script("cut", 'lines.write(\'{"check": "one", \'); lines.close()'),
        script("garbage", "print('what?', file=lines)"),
        script("missing", "print(json.dumps({'unusable': 'no such package'}), file=lines); sys.exit(3)"),
        Task("no program", ("/no/such/program",), 60),
        script("probe", "sys.exit(1)", probe=True),
        script("says", "print('ERROR SUMMARY: 0 errors')", says=r"ERROR SUMMARY: .*"),
        script("says nothing", "pass", says=r"ERROR SUMMARY: .*"),
        script("last", "pass"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qualify, "QUIET", 3.0)
        assert call(out, stage("one", *tasks, beside=8), stage("two", script("after", "pass"))) == 1
    found = ended(out)
    assert found["right"] == found["prints"] == found["last"] == found["after"] == ("passed", "")
    assert found["status"] == ("failed", "exit status 5: the last words")
    assert found["reason"] == ("failed", "logits: 3, at most 2")
    assert found["signal"][0] == "failed" and "ended by SIGSEGV" in found["signal"][1]
    assert found["hangs"][0] == "failed" and "not finished within 20 s" in found["hangs"][1]
    assert not any(alive(int(pid)) for pid in child.read_text().split())
    assert found["silent"][0] == "failed" and "no result for 3 s" in found["silent"][1]
    assert found["cut"] == ("failed", "the last line of its results is incomplete")
    assert found["garbage"][0] == "failed" and "not a JSON object" in found["garbage"][1]
    assert found["missing"] == ("not usable", "no such package")
    assert found["no program"] == ("failed", "/no/such/program cannot be started: No such file or directory")
    assert found["probe"][0] == "not usable"
    assert found["says"] == ("passed", "ERROR SUMMARY: 0 errors")
    assert found["says nothing"][0] == "failed"
    log = (out / "log.txt").read_text()
    assert "first\nxxx" in log and "xxx\nlast" in log and "bytes left out" in log and len(log) < 20 * KEPT
    assert "in <module>" in log  # where the one that hangs was, by Python's fault handler
    for record in records(out):
        assert record.items() >= HERE.items()
    report = (out / "report.md").read_text()
    assert "| one | failed | 4 of 15 passed |" in report and "| two | passed | 1 of 1 passed |" in report
    assert "- one: `status`: exit status 5: the last words" in report
    assert {path.name for path in out.iterdir()} == {"report.md", RESULTS, "log.txt"}
    shown = capfd.readouterr().out
    assert re.search(r"^two +passed +\d+ +1 of 1 passed", shown, re.MULTILINE)
    assert "\none: " in shown and f"report: {out / 'report.md'}" in shown


def pytest_task(name: str, file: Path, *options: str) -> Task:
    return Task(name, qualify._pytest(*options, str(file)), 300, tests=True)


def test_tests_after_a_crash_run_in_another_process(tmp_path: Path) -> None:
    """What a crash or a lost GPU leaves of a part is run by the next process, each test once."""
    file, out, ran = tmp_path / "test_some.py", tmp_path / "out", tmp_path / "ran"
    file.write_text(f"""
import os, warnings, pytest, torch
@pytest.fixture(autouse=True)
def _noted(request):
    print(request.node.name, file=open({str(ran)!r}, "a"))
def test_a(): warnings.warn("of a new release", DeprecationWarning)
def test_b(): os.abort()
def test_c(): assert 1 == 2
def test_d(): pytest.skip("needs what is not here")
def test_e():
    def lost(): raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost
    assert 3 == 4
def test_f(): pass
def test_g(): warnings.warn("torch's operators run on cuda instead of moesmith's Triton kernels", RuntimeWarning)
def test_h(): os._exit(0)
""")
    assert call(out, stage("kernels", pytest_task("part", file))) == 1
    assert ran.read_text().split() == [f"test_{letter}" for letter in "abcdefgh"]
    (task,) = (r for r in records(out) if r["kind"] == "task")
    assert task["tests"] == {"passed": 2, "failed": 5, "skipped": 1}
    assert (task["status"], task["reason"]) == ("failed", "5 of 8 tests failed")
    reasons = {r["test"].partition("::")[2]: r["reason"] for r in records(out) if r["kind"] == "test"}
    assert set(reasons) == {"test_b", "test_c", "test_d", "test_e", "test_g", "test_h"}
    assert reasons["test_b"] == "in this test: ended by SIGABRT" and reasons["test_c"] == "assert 1 == 2"
    log = (out / "log.txt").read_text()
    assert "the GPU was lost after it: an illegal memory access" in log and "of a new release" in log
    assert "in test_b" in log  # the stack at the crash
    report = (out / "report.md").read_text()
    assert "2 tests passed, 5 tests failed, 1 tests skipped" in report
    assert "test_c`: assert 1 == 2" in report and "test_d`: Skipped: needs what is not here" in report


def test_parts_are_all_tests_once(tmp_path: Path) -> None:
    file, out = tmp_path / "test_some.py", tmp_path / "out"
    file.write_text("".join(f"def test_{i}(): pass\n" for i in range(5)))
    parts = [pytest_task(f"part {i}", file, "--part", f"{i}/2") for i in range(2)]
    assert call(out, stage("kernels", *parts, beside=2)) == 0
    assert sorted(r["tests"]["passed"] for r in records(out) if r["kind"] == "task") == [2, 3]
    assert "5 tests passed" in (out / "report.md").read_text()
    empty = tmp_path / "empty"
    assert call(empty, stage("kernels", pytest_task("none", file, "-k", "no_such_test"))) == 1
    assert ended(empty)["none"][0] == "failed"


@pytest.fixture
def switch(tmp_path: Path) -> Callable[[str], Task]:
    """A task that hangs until a file of its name is there, and notes that it ran."""

    def make(name: str) -> Task:
        wait, ran = str(tmp_path / name), str(tmp_path / "ran")
        return script(
            name,
            f"""
            print({name!r}, file=open({ran!r}, "a"), flush=True)
            print(json.dumps({{"fact": "begun", "value": 1}}), file=lines)
            while not os.path.exists({wait!r}): time.sleep(0.01)
            """,
        )

    return make


def test_minutes_stop_and_resume_continues(tmp_path: Path, switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, ran = tmp_path / "out", tmp_path / "ran"
    stages = (
        stage("one", switch("a"), switch("b"), switch("c")),
        stage("two", switch("d")),
        stage("three", switch("e")),
    )
    (tmp_path / "a").touch()

    def monotonic() -> float:  # an hour later once b has begun
        return time.monotonic() + (3600 if ran.exists() and "b" in ran.read_text() else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qualify, "time", SimpleNamespace(**{**vars(time), "monotonic": monotonic}))
        assert call(out, *stages, minutes=10, stage=["one", "two"]) == 0  # what is left has not failed
    assert {name: status for name, (status, _) in ended(out).items()} == {"a": "passed", "b": "stopped"}
    report = (out / "report.md").read_text()
    assert "| one | stopped | 1 of 1 passed |" in report and "--minutes reached, 2 of 3 left |" in report
    assert "| two | stopped |" in report and "| three | not run |" in report
    assert "- one: b, c" in report and f"--resume {out} --device cpu --minutes 10 --stage one two three" in report
    for name in "bcde":
        (tmp_path / name).touch()
    ran.unlink()
    assert call(out, *stages, resume=out) == 0  # --out is the resumed folder
    assert sorted(ran.read_text().split()) == ["b", "c", "d", "e"]
    report = (out / "report.md").read_text()
    assert "| one | passed | 3 of 3 passed |" in report and "Tasks left" not in report
    # In another folder, from the file alone, whose last line is cut.
    copied, other = tmp_path / "copied.jsonl", tmp_path / "other"
    copied.write_text((out / RESULTS).read_text() + '{"kind": "ta')
    ran.unlink()
    assert call(other, *stages, resume=copied) == 0
    assert not ran.exists() and "| one | passed | 3 of 3 passed |" in (other / "report.md").read_text()
    # Of another program or device nothing is done.
    monkeypatch.setattr(qualify, "describe", lambda *_: (HERE | {"source": "4567"}, [], ""))
    assert call(other, *stages, resume=other) == 0
    assert sorted(ran.read_text().split()) == ["a", "b", "c", "d", "e"]


def test_a_cut_line_is_not_continued(tmp_path: Path) -> None:
    out, one = tmp_path / "out", stage("one", script("a", "pass"))
    assert call(out, one) == 0
    with (out / RESULTS).open("a") as file:
        file.write('{"kind": "task", "sta')
    assert call(out, one, resume=out) == 0
    lines = (out / RESULTS).read_text().splitlines()
    cut = [line for line in lines if not line.endswith("}")]
    assert cut == ['{"kind": "task", "sta'] and len(read(out)) == len(lines) - 1


def test_a_stage_has_a_limit(tmp_path: Path, switch: Any) -> None:
    out = tmp_path / "out"
    assert call(out, stage("one", switch("a"), limit=1.5), stage("two", script("b", "pass"))) == 0
    report = (out / "report.md").read_text()
    assert "the stage's 1.5 s reached, 1 of 1 left" in report and "| two | passed |" in report


def test_ctrl_c_ends_with_a_report(tmp_path: Path, switch: Any) -> None:
    out, ran = tmp_path / "out", tmp_path / "ran"

    def interrupt() -> None:
        while not ran.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)  # which ends like Ctrl-C

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert call(out, stage("one", switch("a")), stage("two", script("b", "pass"))) == 130
    thread.join()
    report = (out / "report.md").read_text()
    assert "| one | stopped |  |" in report.replace("0 of 0 passed", "") and "interrupted, 1 of 1 left" in report
    assert "| two | not run |" in report


def test_what_needs_a_gpu_is_not_run_without_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(out, stage("cuda", script("a", "pass"), gpu=True)) == 0
    assert "| cuda | not run |  |  | needs a GPU |" in (out / "report.md").read_text()
    assert not ended(out)


@pytest.mark.parametrize("usable", [True, False])
def test_a_stage_waits_for_the_probe_of_its_tool(tmp_path: Path, usable: bool) -> None:
    out = tmp_path / "out"
    probes = stage(
        "environment",
        script("other", "pass"),
        script("ncu", "" if usable else "print('no counters'); sys.exit(1)", probe=True),
    )
    profile = stage("profile", script("a", "pass"), tool="ncu")
    assert call(out, probes, profile, stage=["profile"]) == 0
    report = (out / "report.md").read_text()
    if usable:
        assert list(ended(out)) == ["ncu", "a"] and "| profile | passed |" in report
    else:
        assert list(ended(out)) == ["ncu"]
        assert "| profile | not usable |  |  | exit status 1: no counters |" in report


def test_a_tool_that_was_not_usable_is_tried_once_in_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    probe = script("ncu", f"sys.exit(not os.path.exists({str(there)!r}))", probe=True)
    stages = stage("environment", probe), stage("profile", script("a", "pass"), tool="ncu")
    for run in ("1", "2", "3", "4"):
        if run == "3":
            there.touch()
        monkeypatch.setattr(qualify, "describe", lambda *_, run=run: (HERE | {"run": run}, [], ""))
        assert call(out, *stages, **({"resume": out} if run != "1" else {})) == 0
    done = [(r["run"], r["task"], r["status"]) for r in records(out) if r["kind"] == "task"]
    assert done == [
        ("1", "ncu", "not usable"),
        ("2", "ncu", "not usable"),
        ("3", "ncu", "passed"),
        ("3", "a", "passed"),
    ]


def task_record(name: str, status: str, **more: Any) -> dict[str, Any]:
    return {"kind": "task", "stage": "s", "task": name, "status": status, "reason": "why", "seconds": 1.0, **more}


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ({}, "not run"),
        ({"a": "passed", "b": "passed"}, "passed"),
        ({"a": "passed", "b": "failed"}, "failed"),
        ({"a": "failed"}, "failed"),
        ({"a": "passed"}, "stopped"),
        ({"a": "passed", "b": "stopped"}, "stopped"),
        ({"a": "passed", "b": "not usable"}, "passed"),
        ({"a": "not usable", "b": "not usable"}, "not usable"),
    ],
)
def test_verdicts(found: dict[str, str], status: str) -> None:
    given = [task_record(name, each) for name, each in found.items()]
    verdict = judge("s", ["a", "b"], given)
    assert verdict.status == status
    assert verdict.left == tuple(n for n in ("a", "b") if found.get(n) not in ("passed", "failed", "not usable"))
    # The last record of a task counts, whatever the ones before said.
    assert judge("s", ["a", "b"], [task_record("a", "failed"), *given]).status == (status if found else "failed")
    assert judge("s", ["a", "b"], given, "not run: needs a GPU").status == "not run"


def layer_record(candidate: str, seconds: float, status: str = "right", **more: Any) -> dict[str, Any]:
    record = {"op": "train", "shape": "olmoe", "tokens": 4096, "routing": "uniform", "dtype": "bf16"}
    record |= {"candidate": candidate, "ours": candidate == "moesmith", "status": status, "reason": None}
    record |= {
        "matmul_flops": 790e12,
        "copy_bytes": 4.3e12,
        "disturbed": True,
        "other_cores": 1.2,
        "cores": 4,
        "run": "r",
        "device": "another",
        "commit": "c",
    }
    timed = {"eager": {"median_s": 2 * seconds}, "graph": {"median_s": seconds}, "share": 1e-3 / seconds}
    return record | timed | {"tflops": 1 / seconds, "gbytes": 2 / seconds} | more


@pytest.mark.parametrize("small", [False, True])
def test_the_benchmark_is_reported_and_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    monkeypatch.setattr(qualify, "describe", lambda *_: (HERE | {"small": small}, [], ""))
    out = tmp_path / "out"
    given = [
        layer_record("moesmith", 0.002),
        layer_record("dense", 0.001),
        layer_record("torch", 0.005),
        layer_record("liger", 0.003),
        {
            k: v
            for k, v in layer_record("vllm", 1, "wrong", reason="dx: error 1").items()
            if k not in ("tflops", "share")
        },
    ]
    code = f"for record in json.loads({json.dumps(json.dumps(given))}): print(json.dumps(record), file=lines)"
    assert call(out, stage("benchmark", script("olmoe", code))) == 0
    report = (out / "report.md").read_text()
    assert (SMOKE_TEST in report) is small
    if small:
        assert "| train | olmoe | 4096 | right |" in report and "liger" not in report and "FLOP/s" not in report
        return
    assert "| train | olmoe | 4096 | 2 | 500 | 1000 | 50.0% | liger | 1.50 |" in report
    assert "\ndisturbed: other processes used 1.2 of 4 cores\n" in report
    assert "- train olmoe T 4096: vllm is wrong: dx: error 1" in report
    assert "bf16: matmul 790 to 790 TFLOP/s, copy 4300 to 4300 GB/s" in report and "![train](train.png)" in report
    names = {path.name for path in out.iterdir()}
    assert names == {"report.md", RESULTS, "log.txt", "train.png"}


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","lts__throughput.avg.pct_of_peak_sustained_elapsed","launch__x"
"","","","us","%",""
"0","7","up_kernel","12.5","61.2","1"
"1","7","up_kernel","13.5","60.2","1"
==PROF== Disconnected
"""


def test_figures_of_the_profiler(tmp_path: Path) -> None:
    first, second = profile_rows(NCU)
    assert first == {
        "gpu__time_duration.sum [us]": "12.5",
        "lts__throughput.avg.pct_of_peak_sustained_elapsed [%]": "61.2",
    }
    assert second["gpu__time_duration.sum [us]"] == "13.5"
    assert profile_rows("==ERROR== no kernels were profiled") == []
    out = tmp_path / "out"
    tasks = (script("up", f"print({NCU!r})", kernel="up_kernel"), script("down", "pass", kernel="rows_kernel"))
    assert call(out, stage("profile", *tasks)) == 1
    assert ended(out) == {"up": ("passed", ""), "down": ("failed", "no measurements in ncu's output")}
    assert "| gpu__time_duration.sum [us] | 12.5 | 13.5 |" in (out / "report.md").read_text()


@pytest.mark.parametrize("wrong", ["a file", "other files", "results"])
def test_a_folder_that_cannot_take_the_results(tmp_path: Path, wrong: str) -> None:
    out = tmp_path / "out"
    if wrong == "a file":
        out.touch()
    else:
        out.mkdir()
        (out / ("notes.txt" if wrong == "other files" else RESULTS)).write_text("{}\n")
    expected = {"a file": "a file; expected a folder", "other files": "notes.txt", "results": "--resume"}[wrong]
    with pytest.raises(BadInput, match=expected):
        call(out, stage("one", script("a", "pass")))


def test_a_call_that_was_ended_at_once_leaves_its_folder_usable(tmp_path: Path) -> None:
    (tmp_path / RESULTS).touch()
    (tmp_path / "log.txt").touch()
    assert call(tmp_path, stage("one", script("a", "pass"))) == 0


@pytest.mark.parametrize("content", [None, "", "not ours\n", '{"op": "train"}\n'])
def test_results_that_are_not_ours(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "results.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput, match="--resume"):
        call(tmp_path / "out", stage("one", script("a", "pass")), resume=file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stage", "nope"], "argument --stage: invalid choice: 'nope'"),
        (["--minutes", "soon"], "expected 0.5 to 10000 minutes; found 'soon'"),
        (["--device", "cuda"], "--device cuda: this torch finds no GPU"),
        (["--device", "cpu", "--resume", "/no/such"], "--resume /no/such: No such file or directory"),
    ],
)
def test_wrong_arguments_are_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    try:
        status = main(["qualify", *options])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1


def test_the_plan_names_every_case_that_there_is() -> None:
    """Shapes, operators and kernels are found by name on a machine that is there for half an hour."""
    import moe_triton.grouped_gemm
    import moe_triton.mlp

    from benchmarks.shapes import SHAPES, SONIC
    from tests.support.cases import BY_NAME, ROUTING_CASES

    for device in ("cpu", "cuda"):
        for each in qualify.STAGES:
            names = [task.name for task in each.tasks(device, False)]
            assert len(names) == len(set(names))
            assert all(task.limit <= each.limit for task in each.tasks(device, False))
    shapes = {task.name for task in qualify.benchmark("cuda", False)}
    assert shapes <= set(SHAPES) and {shape.name for shape in SONIC} < shapes and len(shapes) == 17
    for operator in steps.OPERATORS:
        kind, case = operator.split()
        assert case in BY_NAME or (kind == "route" and case in {routing.name for routing in ROUTING_CASES})
    for name in qualify.KERNELS:
        assert any(hasattr(page, name) for page in (moe_triton.grouped_gemm, moe_triton.mlp))


def run_step(name: str, tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    lines = tmp_path / "lines.jsonl"
    status = steps.main([name, *words, "--device", "cpu", "--lines", str(lines)])
    return status, [json.loads(line) for line in lines.read_text().splitlines()]


@pytest.mark.parametrize("wrong", [None, "mlp.experts.down_proj", "gate.weight"])
def test_a_wrong_model_on_the_device_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str | None
) -> None:
    import moe

    original = moe.load

    def load(folder: Path, **options: Any) -> Any:
        model = original(folder, **options)
        if wrong is not None and options:  # on the device
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if name.endswith(wrong)).mul_(-1)
        return model

    monkeypatch.setattr(moe, "load", load)
    status, lines = run_step("load", tmp_path)
    failed = [line["check"] for line in lines if line.get("right") is False]
    if wrong is None:
        assert status == 0 and not failed
    else:
        assert status == 1 and {"tensors that differ from the file's", "logits", "gradients"} <= set(failed)


def test_a_wrong_token_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe

    original, calls = moe.generate, []

    def generate(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        found = original(*args, **options)
        if len(calls) == 2:
            found[0, 20] = (found[0, 20] + 1) % 2048
        return found

    monkeypatch.setattr(moe, "generate", generate)
    status, lines = run_step("generate", tmp_path)
    assert status == 1 and "gap of the logits at token 20" in lines[-1]["failed"]


def test_a_check_of_nan_fails(tmp_path: Path) -> None:
    step = steps.Step("cpu", tmp_path / "lines", [])
    step.check("number", float("nan"), 1.0)
    assert step.failed


def test_the_kernels_absence_fails_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "torch's operators run on cuda instead of moesmith's Triton kernels: cannot import moe_triton"
    monkeypatch.setitem(steps.STEPS, "probe", lambda step: warnings.warn(message, RuntimeWarning, stacklevel=1))
    with warnings.catch_warnings(action="ignore"):  # as outside pytest, where no warning is an error
        status, lines = run_step("probe", tmp_path)
    assert status == 1 and "cannot import moe_triton" in lines[-1]["failed"]


def test_operators_and_one_training_step(tmp_path: Path) -> None:
    for operator in steps.OPERATORS:
        assert run_step("operator", tmp_path, *operator.split())[0] == 0, operator
    assert run_step("profile", tmp_path, "33,16,16,4,2", "33")[0] == 0


BLOCKED = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
names = {"tyro", "hypothesis", "transformers", "xdist", "tokenizers", "matplotlib"}
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda _, name, *rest: None if name.partition(".")[0] in names else find(name, *rest)
)
"""


def test_nothing_else_need_be_installed(tmp_path: Path) -> None:
    """From a clone, by an interpreter that finds no tyro, hypothesis, transformers, xdist, tokenizers, matplotlib."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "qualify", "--device", "cpu", "--small", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, "--stage", "environment"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {r["fact"]: r["value"] for r in records(out) if r["kind"] == "fact"}
    assert found["transformers"].startswith("not usable") and found["peer torch"] == "here"
    assert {r["check"] for r in records(out) if r["kind"] == "check"} == {"moe_mlp"}
    assert re.search(r"^environment +passed +\d+ 2 of 2 passed", done.stdout, re.MULTILINE)
