"""Distillation: the divergence against float64 and torch, weight zero against fine-tuning, traces, dense students."""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moe
from moe.cli import main
from moe.errors import ConfigError
from moe.recipes.distill import DistillTrainer, kl_divergence
from moe.recipes.distill_settings import DistillSettings
from moe.recipes.examples import ExampleData, prepare_examples
from moe.recipes.sft import SftTrainer
from moe.recipes.sft_settings import SftSettings
from moe.train.state import load_latest_state
from tests.support.examples import small_runs, sums, tokenizer_folder, write_examples
from tests.support.training import MICRO, assert_same_state

DENSE = dataclasses.replace(MICRO, first_k_dense_replace=3, num_nextn_predict_layers=0, num_hidden_layers=3)
SIZES: dict[str, Any] = dict(steps=3, batch_size=2, seq_length=32, warmup=1, eval_every=0, save_every=0)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_runs(monkeypatch, micro=MICRO, dense=DENSE):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with its tokenizer, and examples."""
    folder = tokenizer_folder(tmp_path_factory.mktemp("files"))
    write_examples(folder / "sums.jsonl", sums(40))
    data = prepare_examples(folder / "data", [folder / "sums.jsonl"], folder, 32)
    model = moe.Transformer(dataclasses.replace(MICRO, vocab_size=data.facts["vocab_size"]), seed=5)
    model.carried_files = {
        name: (folder / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    model.save(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def data(files: Path, tmp_path_factory: pytest.TempPathFactory) -> ExampleData:
    return prepare_examples(tmp_path_factory.mktemp("data"), [files / "sums.jsonl"], files, 32)


def settings_of(files: Path, **changes: Any) -> DistillSettings:
    source: dict[str, Any] = dict(preset="micro", data=(files / "sums.jsonl",), teacher=files / "teacher")
    return DistillSettings(**{**source, **SIZES, **changes})


def trainer_of(data: ExampleData, files: Path, config: Any = MICRO, **changes: Any) -> DistillTrainer:
    model = moe.Transformer(dataclasses.replace(config, vocab_size=data.facts["vocab_size"]))
    teacher = moe.load(files / "teacher").requires_grad_(False)
    return DistillTrainer(model, data, settings_of(files, **changes), teacher=teacher)


def test_the_divergence_by_hand() -> None:
    """Two predicted positions of three, computed with floats."""
    student, teacher = [[0.0, 1.0], [2.0, -1.0], [5.0, 5.0]], [[1.0, 1.0], [0.0, 3.0], [0.0, 9.0]]
    labels = torch.tensor([[-100, 1, 0]])
    expected = 0.0
    for q_logits, p_logits in zip(student[:2], teacher[:2], strict=True):
        powers = [[math.exp(x / 2) for x in logits] for logits in (p_logits, q_logits)]
        shares = [[x / sum(each) for x in each] for each in powers]
        expected += 4 * sum(a * math.log(a / b) for a, b in zip(*shares, strict=True)) / 2
    q, p = (torch.tensor([rows], dtype=torch.float64) for rows in (student, teacher))
    found = kl_divergence(q, p, labels, None, temperature=2.0, vocab=2)
    assert found.count == 2 and found.value.item() == pytest.approx(expected, rel=1e-14)
    q, p = F.pad(q, (0, 1), value=50.0), F.pad(p, (0, 3), value=50.0)  # logits of no token
    assert kl_divergence(q, p, labels, None, temperature=2.0, vocab=2).value == found.value
    nothing = kl_divergence(q, p, labels * 0 - 100, None, temperature=1.0, vocab=2)
    assert (nothing.value, nothing.count) == (0, 0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_and_its_gradient_are_those_of_torch(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, -100, 2, 3, 4], [-100, -100, 0, 6, -100]])
    documents = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    at = torch.tensor([[0, 1, 0, 1, 0], [0, 1, 1, 0, 0]]).bool()  # the next label is kept, and of the same document
    student.requires_grad_()
    found = kl_divergence(student, teacher, labels, documents, temperature=temperature, vocab=7)
    (grad,) = torch.autograd.grad(found.value, student)
    log_q, log_p = ((each[at] / temperature).log_softmax(-1) for each in (student, teacher))
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    assert found.count == 4 and found.value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, student)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_of_a_step(data: ExampleData, files: Path, weight: float) -> None:
    """Micro-batches together: (1 - weight) * cross entropy + weight * divergence, and the other parts, in float64."""
    trainer = trainer_of(data, files, kl_weight=weight, kl_temperature=2.0, batch_size=1, accumulation=2, clip=1e9)
    trainer.model.double()
    teacher = trainer.teacher
    assert teacher is not None
    teacher.double()
    model = copy.deepcopy(trainer.model)
    batch = trainer._batch(data.train, [trainer.rows[row] for row in copy.deepcopy(trainer.order).take(2)])
    report = trainer.step()
    out = model(**batch)
    with torch.no_grad():
        logits = teacher(**{name: each for name, each in batch.items() if name != "labels"}).logits
    kept = F.pad(batch["labels"][:, 1:] != -100, (0, 1), value=False)
    log_q, log_p = ((each[kept] / 2).log_softmax(-1) for each in (out.logits, logits))
    kl = 4 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    ce = F.cross_entropy(out.logits[kept], batch["labels"].roll(-1, 1)[kept])
    assert report.losses["kl"] == pytest.approx(kl.item(), rel=1e-9)
    assert report.losses["ce"] == pytest.approx(ce.item(), rel=1e-9)
    (out.loss + weight * (kl - ce)).backward()
    for (name, a), (_, b) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-10, msg=name)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weight_zero_is_fine_tuning_bit_for_bit(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--steps 3 --batch-size 2 --seq-length 32 --warmup 1 --eval-every 0 --json --preset micro"
    common = ["--data", str(files / "sums.jsonl"), *few.split()]
    for name, words in (
        ("distill", ["--teacher", str(files / "teacher"), "--kl-weight", "0"]),
        ("sft", ["--tokenizer", str(files / "teacher")]),
    ):
        assert main([name, *common, *words, "--out", str(tmp_path / name)]) == 0
    states = [load_latest_state(tmp_path / name / "states") for name in ("distill", "sft")]
    assert states[0] is not None and states[1] is not None
    assert_same_state(states[0], states[1])
    summaries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert summaries[0]["validation"] == summaries[1]["validation"]


def test_a_dense_student_learns_from_a_teacher_with_experts(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--steps 6 --batch-size 2 --seq-length 32 --warmup 1 --eval-every 0 --save-every 3 --keep 9 --json"
    words = ["--preset", "dense", "--teacher", str(files / "teacher"), "--kl-weight", "1", *few.split()]
    argv = ["distill", "--data", str(files / "sums.jsonl"), *words, "--optimizer", "adamw", "--lr", "0.01"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["load"] == [] and not moe.load(summary["checkpoint"]).config.num_moe_layers
    records = [json.loads(line) for line in Path(summary["metrics"]).read_text().splitlines()]
    kl = [record["kl"] for record in records if record["kind"] == "train"]
    assert kl[-1] < kl[0] and all(record["max_vio"] == [] for record in records if record["kind"] == "train")
    (tmp_path / "run" / "states" / "step-000006" / "state.json").rename(tmp_path / "gone")
    for path in (tmp_path / "run" / "states" / "step-000006").iterdir():
        path.unlink()
    (tmp_path / "run" / "states" / "step-000006").rmdir()
    assert main(["distill", "--resume", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["validation"] == summary["validation"]


TASK = """
class Own:
    train = ["1+1=", "2+2=", "3+3=", "4+4=", "5+5=", "6+6="]
    test = ["7+7="]

    def reward(prompt, completion):
        return len(completion) % 2
"""


def test_traces_are_sampled_selected_and_kept(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(TASK)
    few = "--steps 2 --batch-size 2 --seq-length 64 --warmup 1 --eval-every 0 --samples 40 --max-new-tokens 24"
    words = ["--by", "traces", "--teacher", str(files / "teacher"), "--preset", "dense", *few.split()]
    for name in ("one", "two"):
        out = ["--out", str(tmp_path / name), "--json"]
        assert main(["distill", *words, "--task", f"{tmp_path / 'own.py'}:Own", *out]) == 0
    shown = capsys.readouterr()
    traces = [json.loads(line) for line in (tmp_path / "one" / "traces.jsonl").read_text().splitlines()]
    facts = json.loads((tmp_path / "one" / "traces.json").read_text())
    assert facts["kept"] == len(traces) > 0 and facts["unfinished"] > 0 and facts["rejected"] > 0
    assert facts["sampled"] == 6 * 40 == facts["kept"] + facts["unfinished"] + facts["rejected"]
    assert all(len(each["completion"]) % 2 == 1 and each["prompt"][0] == each["prompt"][2] for each in traces)
    assert f"traces: {facts['kept']} of 240 completions kept" in shown.err
    assert (tmp_path / "one" / "traces.jsonl").read_text() == (tmp_path / "two" / "traces.jsonl").read_text()
    counts = [json.loads(line)["validation"] for line in shown.out.splitlines()]
    assert counts[0] == counts[1]

    prompts = [{"messages": [], "prompt": [{"role": "user", "content": f"{i}"}]} for i in range(30)]
    file = write_examples(tmp_path / "prompts.jsonl", prompts)
    limits = ["--prompts", "20", "--data", str(file), "--out", str(tmp_path / "three")]
    assert main(["distill", *words, *limits]) == 0
    traces = [json.loads(line) for line in (tmp_path / "three" / "traces.jsonl").read_text().splitlines()]
    assert all(each["completion"][0]["role"] == "assistant" for each in traces)
    assert all(int(each["prompt"][0]["content"]) < 20 for each in traces)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--teacher: expected a folder, a run or a Hub name"),
        (["--teacher", "T", "--kl-weight", "1.5"], "--kl-weight: expected a number from 0 to 1; found 1.5"),
        (["--teacher", "T", "--kl-temperature", "0"], "--kl-temperature: expected a finite number above 0"),
        (["--teacher", "T", "--samples", "2"], "--samples: expected this option only with --by traces"),
        (["--teacher", "T", "--by", "traces", "--kl-weight", "1"], "--kl-weight: expected this option only with --by"),
        (["--teacher", "T", "--by", "traces", "--task", "x"], "--data: expected no files together with --task"),
        (
            ["--teacher", "T", "--by", "traces", "--max-new-tokens", "9999"],
            "--max-new-tokens: expected less than the teacher's 64 positions; found 9999",
        ),
        (["--teacher", "nowhere"], "nowhere: no such folder"),
        (["--teacher", "T", "--tokenizer", "O"], "--teacher: expected the student's tokenizer; found another: token"),
    ],
)
def test_options_that_are_refused(
    words: list[str], expected: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads((files / "tokenizer.json").read_text())
    other["model"]["vocab"] = {
        f"{token}." if token == "a" else token: i for token, i in other["model"]["vocab"].items()
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    (tmp_path / "other" / "tokenizer_config.json").write_text((files / "tokenizer_config.json").read_text())
    places = {"T": str(files / "teacher"), "O": str(tmp_path / "other")}
    common = ["--preset", "micro", "--data", str(files / "sums.jsonl"), "--seq-length", "32"]
    assert main(["distill", *common, *(places.get(word, word) for word in words), "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and expected in shown.err and not shown.out
    assert not (tmp_path / "run").exists()


def test_traces_need_prompts() -> None:
    with pytest.raises(ConfigError, match="--data = None: expected files of prompts, or --task"):
        DistillSettings(teacher=Path("T"), by="traces")


def test_without_a_kept_completion_nothing_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(TASK.replace("len(completion) % 2", "0"))
    words = ["--by", "traces", "--teacher", str(files / "teacher"), "--task", f"{tmp_path / 'own.py'}:Own"]
    words += ["--preset", "micro", "--seq-length", "32", "--max-new-tokens", "8", "--out", str(tmp_path / "run")]
    assert main(["distill", *words]) == 2
    assert "expected completions that are kept; found " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_trainer_without_a_teacher_is_that_of_fine_tuning(data: ExampleData, files: Path) -> None:
    settings = settings_of(files, kl_weight=0.0)
    config = dataclasses.replace(MICRO, vocab_size=data.facts["vocab_size"])
    ours = DistillTrainer(moe.Transformer(config), data, settings, teacher=None)
    plain = SftSettings(preset="micro", tokenizer=files, data=settings.data, **SIZES)
    theirs = SftTrainer(moe.Transformer(config), data, plain)
    assert ours.step().losses == theirs.step().losses
    assert_same_state(ours.state(), theirs.state())
