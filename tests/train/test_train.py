"""Whole runs of a model small enough to train many times: what they leave, interruptions, mistakes."""

import dataclasses
import errno
import io
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

import moe
from moe.cli import main
from moe.presets import PRESETS
from moe.train import launcher
from moe.train.baselines import bigram_nats, unigram_nats
from moe.train.data import Dataset, open_dataset
from moe.train.loop import StepReport, Trainer
from moe.train.metrics import Metrics
from moe.train.report import ProgressDisplay, print_summary
from moe.train.run import train
from moe.train.state import load_latest_state, save_state
from tests.support.training import MICRO, MICRO_SETTINGS, QUIET, State

pytestmark = pytest.mark.usefixtures("micro")


def test_the_summary_scores_all_models_on_the_same_tokens(short_documents: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(MICRO_SETTINGS, data=(short_documents,), steps=1, document_mask=True)
    summary = train(settings, tmp_path / "run", console=QUIET)
    assert summary is not None
    dataset = open_dataset(tmp_path / "run" / "data")
    scored = dataset.validation[:-1] != dataset.end_of_text
    scores = summary["validation"]
    assert scores["tokens"] == scored.sum() and scores["bytes"] == dataset.scored_bytes(document_mask=True)
    for name, each in (("unigram", unigram_nats), ("bigram", bigram_nats)):
        pairs = zip(dataset.validation[:-1], dataset.validation[1:], scored, strict=True)
        vocab_size = dataset.facts["vocab_size"]
        nats = [each(dataset.train, np.array(pair), vocab_size) for *pair, counts in pairs if counts]
        assert scores[name]["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-9)
        assert scores[name]["bits_per_byte"] == pytest.approx(sum(nats) / np.log(2) / scores["bytes"], rel=1e-9)


def test_states_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(step: int) -> State:
        return {"x": torch.full((3,), float(step))}, {"step": step}

    assert load_latest_state(tmp_path) is None
    for step in (1, 2, 10):
        save_state(tmp_path, *state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]

    def raises(error: BaseException) -> Callable[..., Any]:
        return lambda *_: (_ for _ in ()).throw(error)

    for place, error in (
        ("moe.train.state.save_file", SafetensorError("No space left on device")),
        ("moe.train.state.sync_folder", OSError(errno.ENOSPC, "No space left on device")),
    ):
        with monkeypatch.context() as full:
            full.setattr(place, raises(error))
            with pytest.raises(moe.CheckpointError, match=r"step-000011: not saved: .*No space left on device"):
                save_state(tmp_path, *state(11), keep=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", raises(SystemExit("killed")))
        with pytest.raises(SystemExit, match="killed"):
            save_state(tmp_path, *state(11), keep=2)
    assert (tmp_path / "step-000011.partial").exists()
    saved = load_latest_state(tmp_path)
    assert saved is not None and saved[1]["step"] == 10 and saved[0]["x"][0] == 10
    assert not (tmp_path / "step-000011.partial").exists()

    (tmp_path / "step-000010" / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(moe.CheckpointError, match="step-000010"):
        load_latest_state(tmp_path)


def test_states_are_ordered_by_the_number_of_their_step(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_state(tmp_path, {"x": torch.tensor([step])}, {"step": step}, keep=2)
        saved = load_latest_state(tmp_path)
        assert saved is not None and saved[1]["step"] == step and saved[0]["x"] == step
    (tmp_path / "step-of-mine").mkdir()  # nobody's state: neither loaded nor removed
    save_state(tmp_path, {"x": torch.tensor([0])}, {"step": 10_000_000}, keep=2)
    saved = load_latest_state(tmp_path)
    assert saved is not None and saved[1]["step"] == 10_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10000000", "step-1000001", "step-of-mine"]


def test_metrics_forget_what_came_after_the_state(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, until=0)
    for step in range(1, 4):
        metrics.write("train", step, ce=float(step))
    with file.open("a") as torn:
        torn.write('{"kind": "train", "st')
    again = Metrics(file, until=2)
    assert [record["ce"] for record in again.of("train")] == [1.0, 2.0]
    again.write("train", 3, ce=7.0)
    assert [json.loads(line)["ce"] for line in file.read_text().splitlines()] == [1.0, 2.0, 7.0]


def test_a_run_leaves_what_it_promises(text: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(MICRO_SETTINGS, data=(text,), eval_every=2, save_every=3, keep=5)
    summary = train(settings, tmp_path / "run", console=QUIET)
    assert sorted(path.name for path in (tmp_path / "run" / "states").iterdir()) == ["step-000003", "step-000006"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [0, 2, 4, 6]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    again = train(settings, tmp_path / "again", console=QUIET)
    assert again is not None and summary is not None
    assert again["validation"] == summary["validation"] and again["sample"] == summary["sample"]
    states = [(tmp_path / name / "states/step-000006/tensors.safetensors").read_bytes() for name in ("run", "again")]
    assert states[0] == states[1], "one seed, one result"
    other = train(dataclasses.replace(settings, seed=1), tmp_path / "other", console=QUIET)
    assert other is not None
    assert other["validation"]["before"] != summary["validation"]["before"]


def test_without_a_terminal_progress_is_plain_lines() -> None:
    shown = io.StringIO()
    with ProgressDisplay(Console(file=shown, width=120), steps=2, done=0) as display:
        display.update(1, StepReport({"ce": 3.0}, 1.0, torch.tensor([[1, 1]]), 0.1, 100.0).text())
        display.update(2, StepReport({"ce": 2.0}, 1.0, torch.tensor([[3, 1]]), 0.1, 100.0).text())
    assert shown.getvalue() == "step 2/2  loss 2.000  100 tokens/s  highest MaxVio 0.50\n"


def test_without_matplotlib_a_line_says_how_to_get_plots(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    summary = train(dataclasses.replace(MICRO_SETTINGS, data=(text,)), tmp_path / "run", console=QUIET)
    assert summary is not None and summary["plots"] == [] and not list((tmp_path / "run").glob("*.png"))
    shown = io.StringIO()
    print_summary(Console(file=shown, width=120), summary, None)
    assert 'pip install -e ".[plot]"' in shown.getvalue()


def command(text: Path, folder: Path, *more: str) -> list[str]:
    """Options of a quick run of the tiny preset, with short windows."""
    options = ["--steps", "24", "--batch-size", "2", "--seq-length", "32", "--save-every", "8", "--eval-every", "0"]
    return ["train", "--data", str(text), *options, "--out", str(folder), *more]


# The run sends itself a signal after a step: an observer outside the process may notice several steps late.
AND_SIGNAL = """
import os, sys
from moe.cli import main
from moe.train.loop import Trainer

take_step, last, number = Trainer.step, int(sys.argv.pop(1)), int(sys.argv.pop(1))

def step(trainer):
    report = take_step(trainer)
    if trainer.step_number == last:
        os.kill(os.getpid(), number)
    return report

Trainer.step = step
sys.exit(main(sys.argv[1:]))
"""


def start(argv: list[str], *, step: int = 0, number: int = 0) -> subprocess.Popen[str]:
    """Start a run that gets the signal `number` once `step` is done but not recorded. Without `step`, no signal."""
    argv = ["-c", AND_SIGNAL, str(step), str(number), *argv] if step else ["-m", "moe", *argv]
    argv = [sys.executable, "-W", "error", *argv]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_interrupted_killed_and_resumed_equals_unbroken(text: Path, tmp_path: Path) -> None:
    """One run is interrupted by SIGINT between saves, resumed, killed by SIGKILL between saves, and resumed again."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    reference = start(command(text, unbroken, "--json"))
    out, err = reference.communicate(timeout=300)
    assert reference.returncode == 0, err

    process = start(command(text, broken, "--json"), step=10, number=signal.SIGINT)
    stopped_out, stopped_err = process.communicate(timeout=120)
    assert process.returncode == 130, stopped_err
    stopped = json.loads(stopped_out)
    assert stopped["interrupted"] == "SIGINT" and stopped["step"] == 10
    assert "Traceback" not in stopped_err and stopped["resume"] in stopped_err
    assert stopped["resume"].startswith("moesmith train ") and stopped["resume"].endswith(" --resume")
    assert (broken / "states" / f"step-{stopped['step']:06}").is_dir()

    argv = stopped["resume"].split()[1:]
    process = start(argv, step=19, number=signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert '"step": 18' in (broken / "metrics.jsonl").read_text(), "more is recorded than saved"
    assert not (broken / "summary.json").exists()

    process = start([*argv, "--json"])
    resumed_out, resumed_err = process.communicate(timeout=300)
    assert process.returncode == 0, resumed_err
    assert "resuming after step 16 of 24" in resumed_err
    for name in (
        "states/step-000024/tensors.safetensors",
        "states/step-000024/state.json",
        "checkpoint/model.safetensors",
    ):
        assert (broken / name).read_bytes() == (unbroken / name).read_bytes(), name
    timing = ("tokens_per_second", "seconds")
    summaries = [json.loads(each) for each in (out, resumed_out)]
    assert all(summaries[0][key] == summaries[1][key] for key in ("validation", "load", "sample", "steps"))
    records = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (unbroken, broken)
    ]
    for a, b in itertools.zip_longest(*records):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_a_signal_before_the_first_step_saves_and_resumes(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "train",
        "--preset",
        "micro",
        "--data",
        str(text),
        "--steps",
        "2",
        "--seq-length",
        "16",
        "--out",
        str(tmp_path / "r"),
    ]
    evaluate = Trainer.evaluate

    def evaluate_and_stop(self: Trainer) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", evaluate_and_stop)
        assert main(argv) == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "--resume" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("clip", 0.0),
        ("weight_decay", -0.1),
        ("seed", -1),
        ("keep", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(moe.ConfigError, match=re.escape(f"--{field.replace('_', '-')} = {value}")):
        dataclasses.replace(MICRO_SETTINGS, **{field: value})


Arguments = Callable[[Path, Path], list[str]]
MISTAKES: dict[str, tuple[Arguments, str]] = {
    "no such preset": (lambda text, here: ["--preset", "tinny"], "did you mean tiny"),
    "no such file": (lambda text, here: ["--data", f"{here}/none.txt"], "none.txt"),
    "empty text": (lambda text, here: ["--data", f"{here}/empty.txt"], "/empty.txt: expected documents; found none"),
    "not UTF-8": (lambda text, here: ["--data", f"{here}/latin.txt"], "UTF-8"),
    "too little text": (
        lambda text, here: ["--data", *map(str, sorted(text.iterdir())[:2])],
        "--seq-length: expected at most",
    ),
    "too long windows": (lambda text, here: ["--seq-length", "1025"], "at most the model's 1024 positions"),
    "tokenizer not JSON": (lambda text, here: ["--data", str(text), "--tokenizer", f"{here}/empty.txt"], "empty.txt"),
    "resume of nothing": (lambda text, here: ["--resume"], "the folder of a run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    make, expected = MISTAKES[name]
    out = tmp_path / "runs" / "run"
    assert main(["train", *make(text, tmp_path), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and expected in captured.err
    assert not out.parent.exists(), "nothing is left behind, and the next attempt finds the name free"


def test_folders_are_not_overwritten_or_resumed_by_accident(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["train", "--preset", "micro", "--data", str(text), "--steps", "1", "--seq-length", "16", "--out", str(out)]
    assert main(argv) == 0
    capsys.readouterr()
    for more, expected in (
        ([], "--resume to continue, or --overwrite"),
        (["--resume", "--seed", "1", "--lr", "0.5"], "lr 0.02 (now 0.5), seed 0 (now 1)"),
    ):
        assert main([*argv, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and expected in error
    (out / "mark").touch()
    assert main([*argv, "--resume"]) == 0 and (out / "mark").exists()
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    for wrong in (("--data", str(tmp_path / "none")), ("--tokenizer", str(tmp_path / "none.json"))):
        assert main([*argv, *wrong, "--overwrite"]) == 2  # the run that was there is still there
        assert sorted(path.relative_to(out) for path in out.rglob("*")) == before
        assert not list(out.parent.glob(".run.*ritten"))
    assert main([*argv, "--overwrite"]) == 0 and not (out / "mark").exists()
    capsys.readouterr()

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    assert main([*argv[:-1], str(mine), "--overwrite"]) == 2
    assert (mine / "thesis.txt").exists() and "earlier run" in capsys.readouterr().err


def test_a_rate_that_breaks_the_model_ends_in_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--preset", "micro", "--data", str(text), "--steps", "9", "--seq-length", "16", "--lr", "1e30"]
    assert main([*argv, "--warmup", "0", "--out", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"moesmith train: step \d+: the (loss|gradient) is not finite; first in .+", last)


def test_a_users_tokenizer_sets_the_vocabulary(text: Path, tmp_path: Path, dataset: Dataset) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(dataset.carried_files()["tokenizer.json"])
    settings = dataclasses.replace(MICRO_SETTINGS, data=(text,), tokenizer=file, steps=1)
    train(settings, tmp_path / "run", console=QUIET)
    model = moe.load(tmp_path / "run" / "checkpoint")
    assert model.config.vocab_size == dataset.tokenizer.get_vocab_size()
    assert model.config.extra["eos_token_id"] == dataset.end_of_text


def test_transformers_generate_stops_where_the_runs_texts_end(text: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train(dataclasses.replace(MICRO_SETTINGS, data=(text,), steps=1), tmp_path / "run", console=QUIET)
    checkpoint = tmp_path / "run" / "checkpoint"
    model = moe.load(checkpoint)
    end = model.config.extra["eos_token_id"]
    with torch.no_grad():  # equal logits: the first token is the likeliest, and it ends texts
        model.norm.weight.zero_()
    model.save(checkpoint)
    assert end == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_token_id == end
    ids = torch.tensor([[3, 4, 5]])
    assert theirs.generate(ids, max_new_tokens=8).tolist() == [[3, 4, 5, end]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"attention_bias": True}, "attention_bias: vLLM"), ({"rope_interleave": False}, "rope_interleave: vLLM")],
)
def test_a_model_that_cannot_be_saved_is_not_trained(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    problem: str,
) -> None:
    monkeypatch.setitem(PRESETS, "micro", dataclasses.replace(MICRO, **changes))
    monkeypatch.setattr("moe.train.run.prepare", None)  # not even the data is read
    argv = ["train", "--preset", "micro", "--data", str(text), "--seq-length", "16", "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    expected = "model_type: expected a model that its files can express; "
    assert said.count("\n") == 1 and expected + problem in said
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_folder_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(command(text, tmp_path / "run"), step=1, number=signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
    assert main([*command(text, tmp_path / "run"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "another run is using this folder" in said and str(first.pid) in said
    first.kill()
    first.communicate()
    assert main([*command(text, tmp_path / "run"), "--auto-resume"]) == 0
    assert "resuming after step" in capsys.readouterr().err
    assert main([*command(text, tmp_path / "new"), "--auto-resume"]) == 0
    assert "resuming" not in capsys.readouterr().err


MISTAKE = moe.ConfigError("--steps", 0, "1 or more")


@pytest.mark.parametrize(("rank", "local"), [(None, None), (0, 0), (1, 1), (8, 0), (9, 1), (10, 10)])
def test_the_first_process_of_each_node_fails_and_the_others_exit(
    rank: int | None, local: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert launcher.is_first() == (rank in (None, 0))
    with pytest.raises((SystemExit, moe.ConfigError)) as raised, launcher.reported_once(*launcher.MISTAKES):
        raise MISTAKE
    if local:
        assert isinstance(raised.value, SystemExit) and raised.value.code == 0
    else:
        assert raised.value is MISTAKE
    with pytest.raises(ZeroDivisionError), launcher.reported_once(*launcher.MISTAKES):
        raise ZeroDivisionError  # a bug has its traceback on every rank


@pytest.mark.parametrize(
    "error",
    [
        MISTAKE,
        moe.CheckpointError("a", "b", tensor="c"),
        moe.ParallelError("a", rank=1, step=2),
        OSError(28, "full", "f"),
    ],
)
def test_ranks_can_send_each_other_every_mistake(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
