"""The README is true: its examples run, its commands exist, its counts are what the code counts."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe
from moe.checkpoint.format.families import FAMILIES
from moe.cli import main
from moe.counts import count_parameters

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs_as_printed(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    command = [sys.executable, "-W", "error", script.name]
    if EXAMPLES[number].startswith("# torchrun"):  # whose own warnings are not ours
        launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, script.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_there_are_examples_of_ten_lines() -> None:
    assert len(EXAMPLES) >= 3
    assert all(len(example.strip().splitlines()) <= 14 for example in EXAMPLES)


def test_every_command_of_the_table_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"^\| `moesmith (\w+)", README, re.MULTILINE))
    assert commands == {"train", "eval", "generate", "inspect", "plan", "place", "convert", "cut", "doctor"}
    for command in commands:
        try:
            status: Any = main([command, "--help"])
        except SystemExit as stop:
            status = stop.code
        assert not status
        assert command in capsys.readouterr().out


def test_the_two_commands_a_newcomer_types() -> None:
    typed = re.findall(r"^pip install torch==.*$", README, re.MULTILINE)
    assert typed == [
        'pip install torch==2.13.0 -e ".[plot]" && moesmith train --preset tiny',
        'pip install torch==2.13.0 -e ".[test]" && python -m pytest -n 2',
    ]


def test_the_error_of_a_truncated_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    moe.Transformer(moe.preset("tiny")).save("checkpoint")
    shard = Path("checkpoint/model.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(moe.CheckpointError) as caught:
        moe.load("checkpoint")
    assert f"\n{caught.value}\n" in README


def test_the_families_in_the_table() -> None:
    table = README[README.index("| family |") :].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(FAMILIES)


def test_counts_in_the_text() -> None:
    counts = count_parameters(moe.preset("deepseek_v3"))
    for number in (counts.total, counts.activated, counts.activated_without_embedding):
        assert f"{number:,}" in README


def test_the_figures_of_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r'^python -c "(.*)" > zipf.json$', README, re.MULTILINE)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    file = tmp_path / "zipf.json"
    file.write_text(done.stdout)
    figures = []
    for slots in ("256", "288"):
        assert main(["place", str(file), "--gpus", "32", "--slots", slots]) == 0
        figures += re.findall(r"^all layers +(\S+) +(\S+)", capsys.readouterr().out, re.MULTILINE)
    (before, moved), (_, replicated) = figures
    text = " ".join(README.split())
    assert f"has {before} times the mean, without replicas {moved} times, with these 32 slots more {replicated}" in text


def test_every_name_of_a_benchmark_command_exists() -> None:
    commands = set(re.findall(r"python -m benchmarks (\w+)", README))
    assert commands == {"cpu", "layer", "load", "parallel", "qualify"}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", command, "--help"],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
