"""`python -m tests.processors`: each leg's limits are in effect, and its status is that of its tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import processors
from tests.processors import LEGS, ROOT, Leg, lacks, main, selected

LEG = Leg("default" if lacks("avx2") else "avx2", 1)


def test_a_leg_runs_under_its_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")  # of the caller: not this leg's
    capability = torch.backends.cpu.get_cpu_capability() if LEG.instructions == "default" else "AVX2"
    file = tmp_path / "test_it.py"
    file.write_text(
        "import os, torch\n"
        "def test_limits():\n"
        f"    assert (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()) == ({capability!r}, 1)\n"
        f"    assert os.environ.get('ONEDNN_MAX_CPU_ISA') == {LEG.environment.get('ONEDNN_MAX_CPU_ISA')!r}\n"
        "def test_wrong():\n"
        "    assert 'this' == 'wrong'\n"
    )
    if LEG.instructions == "default":
        monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert main(["--leg", str(LEG), "--", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("assert 'this' == 'wrong'" in line for line in lines)
    assert lines[-1].startswith(f"{LEG}: FAILED, ") and lines[-1].endswith(" s: 1 failed, 1 passed")
    assert main(["--leg", str(LEG), "--", f"{file}::test_limits"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{LEG}: passed, ") and line.endswith(" s: 1 passed")
    assert main(["--leg", str(LEG), "--", str(file), "-k", "nothing"]) == 1
    assert "FAILED" in capsys.readouterr().out.splitlines()[-1]


def test_limits_that_are_not_in_effect_are_refused(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("MOESMITH_LEG", "default-1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(pytest.UsageError, match=r"default-1: limits not in effect; .*; found \w+, 7 threads"):
        processors.pytest_configure(request.config)
    monkeypatch.setenv("MOESMITH_LEG", "avx2-2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(
        pytest.UsageError, match="avx2-2: limits not in effect; expected AVX2, 2 threads; found AVX512, 2 threads"
    ):
        processors.pytest_configure(request.config)


def test_instruction_sets_that_the_processor_lacks_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(leg: Leg, arguments: list[str]) -> bool:
        ran.append(str(leg))
        return str(leg) != "avx2-2"

    monkeypatch.setattr(processors, "lacks", lambda instructions: instructions == "avx512")
    monkeypatch.setattr(processors, "run", run)
    assert main([]) == 1 and ran == ["default-1", "default-2", "avx2-1", "avx2-2"]
    assert capsys.readouterr().out == "avx512: not run, because this processor does not support it\n"
    assert main(["--leg", "avx2-1", "avx2-1"]) == 0 and ran[4:] == ["avx2-1"]


def test_names_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--leg", "avx2-1", "avx3-1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"--leg: unknown leg; expected one of {', '.join(LEGS)}; found avx3-1\n"
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(LEGS) and listed[0] == "default-1: OMP_NUM_THREADS=1 MKL_NUM_THREADS=1"
    every, few = selected(False, ["-x"]), selected(True, ["-x"])
    assert all((ROOT / name).exists() for name in every[:-1])
    assert few[-3:] == ["-k", "not compile", "-x"] and set(few[:-3]) < set(every)
    assert selected(True, ["tests/ops/test_ops.py::test_route", "-x"]) == ["tests/ops/test_ops.py::test_route", "-x"]


def test_ctrl_c_is_one_line_and_status_130(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "test_it.py").write_text(
        f"import pathlib, time\ndef test_it():\n    pathlib.Path({str(mark)!r}).touch()\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "tests.processors", "--leg", "default-1", "--", str(tmp_path / "test_it.py")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
    )
    while not mark.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate() == ("", "interrupted\n") and process.returncode == 130
