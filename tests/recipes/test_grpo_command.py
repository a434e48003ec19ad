"""`moesmith grpo` and `moesmith eval --task`: folder, continuation, summary, plot, several ranks."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe.cli import main
from moe.recipes.grpo_run import grpo
from moe.recipes.grpo_settings import GrpoSettings
from moe.train.state import load_latest_state
from tests.conftest import ROOT
from tests.support.command_line import fails_in_one_line, run, write_tokenizer
from tests.support.training import MICRO, QUIET, assert_same_state

TASK = """
class Letters:
    train = [f"text {i}:" for i in range(10)]
    test = [f"text {i}:" for i in range(10, 15)]

    def reward(self, prompt, completion):
        return sum(letter in "aeiou" for letter in completion) / 12


vowels = Letters()
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # set by the command otherwise, and for good
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a task."""
    folder = tmp_path_factory.mktemp("files")
    moe.Transformer(dataclasses.replace(MICRO, num_nextn_predict_layers=1)).save(folder / "base")
    write_tokenizer(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, folder / "base")
    (folder / "vowels.py").write_text(TASK)
    return folder


def settings(files: Path, **changes: Any) -> GrpoSettings:
    sizes: dict[str, Any] = dict(steps=4, batch_size=4, accumulation=2, group_size=4, max_new_tokens=12, seq_length=24)
    sizes |= dict(warmup=0, lr=0.01, optimizer="adamw", eval_every=2, save_every=0, keep=9)
    return GrpoSettings(init=files / "base", task=f"{files / 'vowels.py'}:vowels", **sizes | changes)


def command(files: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    return ["grpo", *settings(files, **changes).options(), "--out", str(out), *more]


def test_a_run_and_its_continuation(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    status, out, err = run(capsys, *command(files, whole, "--json", save_every=2, kl=0.01))
    assert status == 0
    summary = json.loads(out)
    assert f"task: {files / 'vowels.py'}:vowels, 10 prompts for training, 5 held out\n" in err
    assert "grpo: 2 prompts per step, 4 completions of each\n" in err
    assert {"reward", "length", "ended"} == summary["validation"]["after"].keys()
    assert summary["validation"]["prompts"] == 5 and summary["steps"] == 4
    assert summary["sample"]["prompt"] == "text 10:" and isinstance(summary["sample"]["text"], str)
    assert [Path(file).name for file in summary["plots"]] in (["grpo.png"], [])
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["step"]) for each in records] == [
        *(("validation", 0), ("train", 1), ("train", 2), ("validation", 2)),
        *(("train", 3), ("train", 4), ("validation", 4)),
    ]
    train = [each for each in records if each["kind"] == "train"]
    assert all(each["logprob_difference"] < 1e-4 and each["router_agreement"] > 0.9 for each in train)
    assert summary["sampled_tokens"] == sum(each["sampled_tokens"] for each in train)
    # The run continues from its state of step 2, whose folder alone names all options.
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("step-000004", "checkpoint", "summary.json"))
    status, out, err = run(capsys, "grpo", "--resume", str(part))
    assert status == 0 and "resuming after step 2 of 4" in err
    assert "after training" in out and "5 held-out prompts" in out
    assert_same_state(*(load_latest_state(folder / "states") or ({}, {}) for folder in (whole, part)))  # pyright: ignore
    for name in ("model.safetensors", "tokenizer.json"):
        assert (whole / "checkpoint" / name).read_bytes() == (part / "checkpoint" / name).read_bytes()
    assert fails_in_one_line(capsys, "sft", "--resume", str(whole)).endswith("found a run of moesmith grpo\n")


def test_the_function_is_the_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(files, steps=1, advantage="centered", replay="off", level="sequence")
    summary = grpo(chosen, tmp_path / "function", console=QUIET)
    assert summary is not None and summary["task"].endswith("vowels")
    assert main(["grpo", *chosen.options(), "--out", str(tmp_path / "command")]) == 0
    weights = [(tmp_path / name / "checkpoint/model.safetensors").read_bytes() for name in ("function", "command")]
    assert weights[0] == weights[1] != (files / "base/model.safetensors").read_bytes()


def test_two_ranks_do_what_one_process_does(files: Path, tmp_path: Path) -> None:
    chosen = settings(files, steps=1, kl=0.01, passes=2, eval_every=0)
    grpo(chosen, tmp_path / "one", console=QUIET)
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moe"]
    words = [sys.executable, *launcher, "grpo", *chosen.options(), "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    left_out = {"kind", "tokens_per_second", "sampling_share"}
    left_out |= {"router_agreement", "logprob_difference", "weight_difference"}  # of rounding
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - left_out:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), (a["kind"], a["step"], name)
    whole, shared = (moe.load(tmp_path / name / "checkpoint").state_dict() for name in ("one", "two"))
    for name, value in whole.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-2, atol=2e-3)


def test_a_model_is_scored_on_a_task(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(files / "base"), "--task", f"{files / 'vowels.py'}:vowels", "--max-new-tokens", "6"]
    found = []
    for more in ([], ["--batch-size", "2"], ["--temperature", "1"], ["--temperature", "1", "--seed", "1"]):
        status, out, _ = run(capsys, *words, *more, "--json")
        assert status == 0
        found.append(json.loads(out))
    greedy, in_pieces, sampled, other = found
    assert greedy == in_pieces and sampled != other
    assert greedy.keys() == {"folder", "task", "prompts", "temperature", "reward", "length", "ended"}
    assert greedy["prompts"] == 5 and greedy["length"] <= 6
    status, out, _ = run(capsys, *words)
    assert status == 0 and re.search(r"reward +length +ended", out) and "5 held-out prompts" in out
    status, out, _ = run(capsys, "eval", str(files / "base"), "--task", "countdown", "--max-new-tokens", "1", "--json")
    assert status == 0 and json.loads(out)["accuracy"] == 0 and json.loads(out)["prompts"] == 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "BASE", "--task", "none"], "--task: expected countdown, or FILE.py:NAME; found 'none'"),
        (["eval", "BASE", "--task", "countdown", "--data", "x"], "--data: expected nothing with --task; found"),
        (
            ["eval", "BASE", "--task", "countdown", "--temperature", "-1"],
            "--temperature: expected a finite number of at",
        ),
        (["eval", "BASE", "--task", "countdown", "--max-new-tokens", "9999"], "--max-new-tokens: expected at most "),
        (["grpo", "--task", "countdown"], "--init: expected a folder, a run or a Hub name\n"),
        (
            ["grpo", "--init", "BASE", "--seq-length", "64", "--task", "none.py:x"],
            "--task: expected a Python file; found no file none.py\n",
        ),
        (["grpo", "--init", "BASE", "--seq-length", "64"], "--max-new-tokens: expected at most "),
        (
            ["grpo", "--init", "BASE", "--group-size", "3"],
            "--batch-size: expected a multiple of the group size 3 in a step",
        ),
        (["grpo", "--init", "BASE", "--compile"], "--compile: expected no compilation"),
        (["grpo", "--init", "BASE", "--algorithm", "ppo"], "--algorithm: expected one of grpo, rejection; found 'ppo'"),
    ],
)
def test_options_that_are_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [str(files / "base") if word == "BASE" else word for word in words]
    words += ["--out", str(tmp_path / "out")] if words[0] == "grpo" else []
    assert message in fails_in_one_line(capsys, *words)
    assert not (tmp_path / "out").exists()
