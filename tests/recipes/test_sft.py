"""Fine-tuning on packed examples: rows equal separate examples; the trainer; the command."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe
from moe.cli import main
from moe.loss import IGNORED
from moe.recipes.examples import ExampleData, prepare_examples
from moe.recipes.sft import Order, SftTrainer, batch_of, sft
from moe.recipes.sft_settings import SftSettings
from moe.train.state import load_latest_state
from tests.support.examples import small_runs, sums, tokenizer_folder, write_examples
from tests.support.training import MICRO, QUIET, assert_same_state

LENGTH = 32


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_runs(monkeypatch, micro=MICRO):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and examples."""
    folder = tokenizer_folder(tmp_path_factory.mktemp("files"))
    write_examples(folder / "sums.jsonl", sums(40))
    return folder


@pytest.fixture(scope="module")
def data(files: Path, tmp_path_factory: pytest.TempPathFactory) -> ExampleData:
    return prepare_examples(tmp_path_factory.mktemp("data"), [files / "sums.jsonl"], files, LENGTH)


@pytest.fixture
def settings(files: Path) -> SftSettings:
    sizes: dict[str, Any] = dict(steps=4, batch_size=2, seq_length=LENGTH, warmup=1, eval_every=2, save_every=0)
    return SftSettings(preset="micro", tokenizer=files, data=(files / "sums.jsonl",), **sizes)


def trainer_of(data: ExampleData, settings: SftSettings, **changes: Any) -> SftTrainer:
    config = dataclasses.replace(MICRO, vocab_size=data.facts["vocab_size"])
    return SftTrainer(moe.Transformer(config), data, dataclasses.replace(settings, **changes))


def example(data: ExampleData, number: int) -> tuple[Tensor, Tensor]:
    """Ids and labels [1, S] of one example."""
    a, b = data.train.starts[number : number + 2]
    ids = torch.from_numpy(data.train.tokens[a:b].astype("int64"))
    labels = ids.masked_fill(~torch.from_numpy(data.train.trained[a:b]), IGNORED)
    return ids[None], labels[None]


def test_a_batch_by_hand(data: ExampleData) -> None:
    (a, la), (b, lb) = example(data, 0), example(data, 1)
    batch = batch_of(data.train, [[0, 1], []], 16, fill=9)
    rest = 16 - a.shape[1] - b.shape[1]
    assert batch["input_ids"].tolist() == [a[0].tolist() + b[0].tolist() + [9] * rest, [9] * 16]
    assert batch["labels"].tolist() == [la[0].tolist() + lb[0].tolist() + [-100] * rest, [-100] * 16]
    positions = [*range(a.shape[1]), *range(b.shape[1])]
    assert batch["position_ids"].tolist() == [positions + [0] * rest, [0] * 16]
    assert batch["document_ids"][0].tolist() == [0] * a.shape[1] + [1] * b.shape[1] + [-1] * rest
    assert batch["attention_mask"].sum(1).tolist() == [16 - rest, 0]
    prompt = (la == IGNORED).sum().item()
    assert prompt == len("0+0=") and data.tokenizer.decode(a[0, :prompt].tolist()) == "0+0="


@torch.no_grad()
def separate_losses(model: moe.Transformer, data: ExampleData, numbers: list[int]) -> list[Tensor]:
    """Cross entropy of each predicted token of each example, alone in its sequence."""
    found = []
    for number in numbers:
        ids, labels = example(data, number)
        log_p = model(ids).logits.log_softmax(-1)[0, :-1]
        losses = -log_p.gather(1, ids[0, 1:, None]).squeeze(1)
        found.append(losses[labels[0, 1:] != IGNORED])
    return found


def test_a_packed_row_equals_its_examples_in_separate_sequences(data: ExampleData) -> None:
    """Losses, MTP's too, and all gradients, in float64; only balance losses are means over rows."""
    numbers = [0, 5, 9, 30]
    config = dataclasses.replace(MICRO, vocab_size=data.facts["vocab_size"], aux_loss_alpha=0.0, mtp_loss_weight=0.7)
    packed = moe.Transformer(config).double()
    alone = copy.deepcopy(packed)
    batch = batch_of(data.train, [numbers[:3], numbers[3:]], LENGTH, fill=0)
    out = packed(**batch)
    out.loss.backward()

    batches = [dict(zip(("input_ids", "labels"), example(data, number), strict=True)) for number in numbers]
    parts = {"ce": 0.0, "mtp": 0.0}
    load = torch.zeros_like(out.load)
    with alone.global_batch.step([alone.loss_counts(**each) for each in batches]):
        for each in batches:
            one = alone(**each)
            one.loss.backward()
            parts = {name: value + one.losses[name].item() for name, value in parts.items()}
            load += one.load
    assert parts == pytest.approx({name: value.item() for name, value in out.losses.items()}, rel=1e-12)
    assert torch.equal(load, out.load), "padding reaches no expert"
    for (name, a), (_, b) in zip(packed.named_parameters(), alone.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13, msg=name)
    expected = torch.cat(separate_losses(alone.eval(), data, numbers))
    assert out.losses["ce"].item() == pytest.approx(expected.mean().item(), rel=1e-12)


def test_what_is_masked_contributes_nothing(data: ExampleData) -> None:
    model = moe.Transformer(dataclasses.replace(MICRO, vocab_size=data.facts["vocab_size"])).double()
    batch = batch_of(data.train, [[0, 5, 9]], LENGTH, fill=0)
    out = model(**batch)
    out.logits.retain_grad()
    out.loss.backward()
    assert out.logits.grad is not None
    predicted = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1), value=False)
    moved = out.logits.grad.abs().amax(-1) > 0
    assert torch.equal(moved, predicted) and 0 < predicted.sum() < batch["attention_mask"].sum()

    filled = model(**batch_of(data.train, [[0, 5, 9]], LENGTH, fill=7))
    assert torch.equal(filled.loss, out.loss) and torch.equal(filled.load, out.load)
    a = example(data, 0)[0].shape[1]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :a] += 1  # of another example in the row
    with torch.no_grad():
        before, after = model(**batch).logits[0], model(**other).logits[0]
    torch.testing.assert_close(before[a:], after[a:], rtol=0, atol=1e-12)
    assert (before[:a] - after[:a]).abs().max() > 1e-6


def test_the_order_is_that_of_seed_and_epoch() -> None:
    order, again = Order(5, 3), Order(5, 3)
    taken = order.take(5) + order.take(7) + order.take(3)
    assert [sorted(taken[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert taken[:5] != taken[5:10]
    again.take(6)
    state = again.state_dict()
    assert state == {"epoch": 1, "position": 1}
    resumed = Order(5, 3)
    resumed.load_state_dict(state)
    assert resumed.take(9) == taken[6:]


def test_a_step_is_the_mean_over_completion_tokens(data: ExampleData, settings: SftSettings) -> None:
    """Of all micro-batches, whose numbers of completion tokens differ."""
    trainer = trainer_of(data, settings, batch_size=1, accumulation=3)
    model = copy.deepcopy(trainer.model).eval()
    rows = [trainer.rows[row] for row in Order(len(trainer.rows), 0).take(3)]
    expected = torch.cat(separate_losses(model, data, [number for row in rows for number in row]))
    report = trainer.step()
    assert report.losses["ce"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert report.losses.keys() == {"ce", "mtp", "balance"} and trainer.step_number == 1
    biases = [router.e_score_correction_bias for _, router in moe.balance.routers(trainer.model)]
    assert all(bias.any() for bias in biases)
    assert report.values()["max_vio"] == report.max_vio and "loss" in report.text()


def test_evaluation_is_nats_per_completion_token(data: ExampleData, settings: SftSettings) -> None:
    trainer = trainer_of(data, settings)
    held_out = dataclasses.replace(data, train=data.validation)
    expected = torch.cat(
        separate_losses(trainer.model.eval(), held_out, list(range(data.facts["validation"]["examples"])))
    )
    found = trainer.evaluate()
    assert found.tokens == len(expected) == data.facts["validation"]["trained"]
    assert found.nats_per_token == pytest.approx(expected.mean().item(), rel=1e-5)


def test_epochs_instead_of_steps(data: ExampleData, settings: SftSettings, files: Path) -> None:
    settings = dataclasses.replace(settings, steps=SftSettings.steps, epochs=3)
    trainer = trainer_of(data, settings)
    assert trainer.settings.steps == -(-3 * len(trainer.rows) // 2) and len(trainer.rows) > 2
    with pytest.raises(moe.ConfigError, match="no --steps as well; found --steps 4"):
        dataclasses.replace(settings, steps=4)


# The command.


def command(files: Path, out: Path, *more: str) -> list[str]:
    few = "--preset micro --steps 4 --batch-size 2 --seq-length 32 --warmup 1 --save-every 2 --eval-every 2 --keep 9"
    return [
        "sft",
        "--data",
        str(files / "sums.jsonl"),
        "--tokenizer",
        str(files),
        *few.split(),
        "--out",
        str(out),
        *more,
    ]


def test_a_run_and_its_continuation(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*command(files, whole, "--json"), "--optimizer", "adamw"]) == 0
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert "data: " in shown.err and "examples (" in shown.err and "nats per completion token" in shown.err
    scores = summary["validation"]
    assert scores["after"]["nats_per_token"] < scores["before"]["nats_per_token"]
    assert summary["sample"].keys() == {"prompt", "completion", "text"} and summary["steps"] == 4
    shutil.copytree(whole, again)
    shutil.rmtree(again / "states" / "step-000004")
    shutil.move(files / "sums.jsonl", files / "moved.jsonl")  # encoded examples are in the folder of the run
    try:
        assert main(["sft", "--resume", str(again), "--keep", "9"]) == 0
    finally:
        shutil.move(files / "moved.jsonl", files / "sums.jsonl")
    assert "resuming after step 2 of 4" in capsys.readouterr().err
    states = [load_latest_state(folder / "states") for folder in (whole, again)]
    assert states[0] is not None and states[1] is not None and states[0][1]["step"] == 4
    assert_same_state(states[0], states[1])

    assert main(["train", "--resume", str(whole)]) == 2
    refused = "moesmith train: --resume: expected a run of moesmith train; found a run of moesmith sft\n"
    assert capsys.readouterr().err == refused
    assert main(["train", "--resume", "--seq-length", "32", "--out", str(whole)]) == 2
    assert capsys.readouterr().err == refused
    assert main(["eval", str(whole)]) == 2
    assert "is not the folder of a training run" in capsys.readouterr().err

    # From the weights, the tokenizer and the template of the run.
    few = ["--steps", "1", "--seq-length", "32", "--lr", "1e-9"]
    argv = ["sft", "--data", str(files / "sums.jsonl"), "--init", str(whole), *few, "--out", str(tmp_path / "more")]
    assert main(argv) == 0
    capsys.readouterr()
    names = {path.name for path in (whole / "checkpoint").iterdir()}
    assert names == {path.name for path in (tmp_path / "more" / "checkpoint").iterdir()}
    assert {"chat_template.jinja", "tokenizer.json"} <= names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--data: expected files or folders of examples"),
        (["--data", "x.jsonl"], "--init: expected a checkpoint to fine-tune, or --tokenizer for a new model"),
        (["--data", "x.jsonl", "--init", "x", "--epochs", "-1"], "--epochs: expected 0 or more; found -1"),
        (["--data", "x.jsonl", "--init", "x", "--epochs", "1", "--steps", "2"], "--epochs: expected no --steps"),
        (
            ["--data", "x.jsonl", "--preset", "micro", "--tokenizer", "x", "--seq-length", "32"],
            "--tokenizer: expected a readable tokenizer.json",
        ),
    ],
)
def test_options_that_are_refused(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sft", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and expected in shown.err and not shown.out
    assert not list(tmp_path.iterdir())


def test_a_wrong_line_is_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_examples(tmp_path / "x.jsonl", [*sums(2), {"prompt": "a"}])
    argv = command(files, tmp_path / "run")
    argv[2] = str(file)
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and f"--data: {file}, line 3: expected " in shown and "found prompt" in shown
    assert not (tmp_path / "run").exists()


def test_examples_that_are_too_long_are_counted(
    files: Path, settings: SftSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_examples(tmp_path / "x.jsonl", [*sums(20), {"prompt": "long", "completion": "x" * 90}])
    argv = command(files, tmp_path / "run")
    argv[2] = str(file)
    assert main(argv) == 0
    assert "data: 1 examples of more than 32 tokens left out, the longest has 95\n" in capsys.readouterr().err


def test_the_function_is_the_command(settings: SftSettings, tmp_path: Path) -> None:
    summary = sft(settings, tmp_path / "run", console=QUIET)
    assert summary is not None and Path(summary["checkpoint"]).is_dir()
    values = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert values["kind"] == "sft" and SftSettings.from_deciding(values) == dataclasses.replace(
        settings, lr=0.002, eval_every=80, save_every=80
    )
