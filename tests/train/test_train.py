"""The training loop on a model small enough to run many times: steps, states, interruptions, mistakes."""

import copy
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

import moe
from moe.cli import main
from moe.config import ModelConfig
from moe.presets import PRESETS
from moe.train import launcher
from moe.train.baselines import bigram_nats, unigram_nats
from moe.train.data import Dataset, evaluation_batches, open_dataset, prepare
from moe.train.loop import NonFiniteError, Trainer, deterministic
from moe.train.metrics import Metrics
from moe.train.report import ProgressDisplay, print_summary
from moe.train.run import train
from moe.train.settings import Settings
from moe.train.state import load_latest_state, save_state

MICRO = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_interleave=True,
    max_position_embeddings=64,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
    aux_loss_alpha=1e-3,
)
MICRO_SETTINGS = Settings(
    preset="micro", steps=6, batch_size=2, seq_length=16, lr=1e-2, warmup=2, eval_every=0, save_every=0
)
QUIET = Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The preset, on one thread: models this small spend their time waiting for a second one."""
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files that differ."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ("the", "a", "model", "layer", "expert", "token", "router", "gate", "loss", "step", "of", "in", "to", "is")
    for i in range(24):
        (folder / f"{i:02}.txt").write_text("\n\n".join(" ".join(rng.choice(words, 40)) + "." for _ in range(4)))
    return folder


@pytest.fixture(scope="session")
def dataset(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(tmp_path_factory.mktemp("data"), [text], None, MICRO.vocab_size)


def make_trainer(dataset: Dataset, **changes: Any) -> Trainer:
    config = dataclasses.replace(MICRO, vocab_size=dataset.facts["vocab_size"])
    return Trainer(moe.Transformer(config), dataset, dataclasses.replace(MICRO_SETTINGS, **changes))


State = tuple[dict[str, Tensor], dict[str, Any]]


def assert_same_state(a: State, b: State) -> None:
    (tensors_a, values_a), (tensors_b, values_b) = a, b
    assert values_a == values_b and tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loaded_state_continues_bit_for_bit(dataset: Dataset, optimizer: str, tmp_path: Path) -> None:
    whole = make_trainer(dataset, optimizer=optimizer)
    for step in range(1, 7):
        whole.step()
        if step in (1, 4):
            save_state(tmp_path, *whole.state(), keep=1)
    tensors, values = whole.state()
    resumed = make_trainer(dataset, optimizer=optimizer)
    torch.manual_seed(99)
    saved = load_latest_state(tmp_path)
    assert saved is not None
    resumed.load_state(*saved)
    assert resumed.step_number == 4
    for _ in range(2):
        resumed.step()
    assert_same_state((tensors, values), resumed.state())
    biases = [tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(bias.any() for bias in biases), "the correction biases moved, MTP's too"


def test_two_accumulated_batches_are_one_of_twice_the_size(dataset: Dataset) -> None:
    one, two = make_trainer(dataset, batch_size=4), make_trainer(dataset, batch_size=2, accumulation=2)
    whole, halves = one.step(), two.step()
    assert halves.losses == pytest.approx(whole.losses, rel=1e-5)
    assert halves.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert torch.equal(whole.load, halves.load)
    for (name, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, a), (_, b) in zip(one.model.named_buffers(), two.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_activation_checkpointing_changes_no_bit(dataset: Dataset) -> None:
    plain, recomputed = make_trainer(dataset), make_trainer(dataset, activation_checkpointing=True)
    for _ in range(3):
        plain.step()
        recomputed.step()
    assert recomputed.model.activation_checkpointing
    assert_same_state(plain.state(), recomputed.state())


@pytest.mark.parametrize(("given", "used"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_runs_set_what_torch_asks_for_on_a_gpu(
    given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if given is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    with deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == used


def test_bf16_products_with_fp32_parameters(dataset: Dataset) -> None:
    wide, narrow = make_trainer(dataset), make_trainer(dataset, dtype="bf16")
    losses = [(wide.step().losses["ce"], narrow.step().losses["ce"]) for _ in range(4)]
    assert all(a != b and abs(a - b) < 0.05 for a, b in losses)
    tensors = narrow.state()[0]
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith(("model/", "optimizer/"))} == {
        torch.float32
    }


def test_document_mask_separates_documents(dataset: Dataset) -> None:
    masked, plain = make_trainer(dataset, document_mask=True), make_trainer(dataset)
    batch = torch.full((1, 16), 5)
    assert dataset.end_of_text == 0
    with torch.no_grad():
        same = [trainer._forward(batch).logits for trainer in (masked, plain)]
        batch[0, 7] = 0
        logits, unmasked = (trainer._forward(batch).logits for trainer in (masked, plain))
    torch.testing.assert_close(same[0], same[1])
    torch.testing.assert_close(logits[:, :8], unmasked[:, :8])
    batch[0, :7] = 6
    with torch.no_grad():
        other, other_unmasked = (trainer._forward(batch).logits for trainer in (masked, plain))
    assert torch.equal(logits[:, 8:], other[:, 8:]), "the second document does not see the first"
    assert not torch.equal(unmasked[:, 8:], other_unmasked[:, 8:])


def short_documents(folder: Path, documents: int = 60) -> Path:
    """Documents of one word that take turns with long ones: windows predict unequal numbers of tokens."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(documents):
        text = " ".join(rng.choice(["ein", "zwei", "drei", "vier", "fünf", "日本語"], 1 if i % 3 else 60))
        (folder / f"{i:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("short")
    return prepare(folder / "data", [short_documents(folder / "text")], None, MICRO.vocab_size)


def test_accumulation_under_a_document_mask_is_the_mean_over_tokens(short: Dataset) -> None:
    """Against cross entropies summed over all windows, divided by how many tokens they predict."""
    trainer = make_trainer(short, batch_size=1, accumulation=8, document_mask=True, clip=1e9)
    model = copy.deepcopy(trainer.model)
    windows = torch.cat([trainer.sampler.next_batch() for _ in range(8)])
    trainer.sampler.load_state_dict({"epoch": 0, "position": 0})
    report = trainer.step()

    ends = (windows == short.end_of_text).long()
    documents = ends.cumsum(1) - ends
    out = model(windows, labels=windows, document_ids=documents)
    target = windows[:, 1:].masked_fill(ends[:, :-1].bool(), -100)
    counts = (target != -100).sum(1)
    assert counts.unique().numel() > 2
    each = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), target.flatten(), reduction="sum")
    assert report.losses["ce"] == pytest.approx(each.item() / counts.sum().item(), rel=1e-5)
    # "mtp" and "balance" have counts of their own; one batch of all windows is what they are compared with.
    assert report.losses == pytest.approx({name: value.item() for name, value in out.losses.items()}, rel=1e-5)
    out.loss.backward()
    for (name, found), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert torch.equal(report.load, out.load)


def test_a_micro_batch_that_predicts_nothing_takes_no_part(short: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(short, batch_size=1, accumulation=2, document_mask=True)
    plain = make_trainer(short, batch_size=1, document_mask=True)
    window, ends = trainer.sampler.next_batch(), torch.full((1, 16), short.end_of_text)
    for each, windows in ((trainer, [window, ends]), (plain, [window])):
        monkeypatch.setattr(each.sampler, "next_batch", iter(windows).__next__)
    found, expected = trainer.step(), plain.step()
    assert found.losses["ce"] == pytest.approx(expected.losses["ce"], rel=1e-6)
    assert found.losses["mtp"] == pytest.approx(expected.losses["mtp"], rel=1e-6)
    monkeypatch.setattr(trainer.sampler, "next_batch", iter([ends, ends]).__next__)
    assert trainer.step().losses["ce"] == 0


def test_evaluation_under_a_document_mask_scores_what_training_predicts(short: Dataset) -> None:
    """By a loop over documents of each window, with the bytes of the text behind their first tokens."""
    trainer = make_trainer(short, document_mask=True)
    trainer.step()
    evaluation = trainer.evaluate()
    nats, tokens, end = 0.0, 0, short.end_of_text
    model = trainer.model.eval()
    for window in evaluation_batches(short.validation, 16, 1):
        cuts = [0, *(np.flatnonzero(window[0] == end) + 1), window.shape[1]]
        for a, b in itertools.pairwise(cuts):
            if b - a > 1:
                log_p = model(window[:, a:b]).logits.double().log_softmax(-1)[0, :-1]
                nats -= log_p.gather(1, window[0, a + 1 : b, None]).sum().item()
                tokens += b - a - 1
    assert evaluation.tokens == tokens < len(short.validation) - 1
    assert evaluation.nats == pytest.approx(nats, rel=1e-5)

    first = short.validation[1:][short.validation[:-1] == end]
    assert len(first) == short.facts["validation"]["documents"]
    spelled = 0
    for a, b in itertools.pairwise(np.flatnonzero(short.validation == end)):
        rest = map(short.tokenizer.id_to_token, short.validation[a + 2 : b].tolist())
        spelled += sum(len(text or "") for text in rest)  # byte-level: a character for each byte
    assert evaluation.text_bytes == spelled < short.validation_bytes
    assert evaluation.bits_per_byte == pytest.approx(nats / np.log(2) / spelled, rel=1e-5)
    assert make_trainer(short).evaluate().text_bytes == short.validation_bytes


def test_the_summary_scores_all_models_on_the_same_tokens(tmp_path: Path) -> None:
    data = short_documents(tmp_path / "text")
    settings = dataclasses.replace(MICRO_SETTINGS, data=(data,), steps=1, document_mask=True)
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


def test_documents_of_one_token_cannot_be_scored_alone(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("ab")
    dataset = prepare(tmp_path / "data", [tmp_path], None, MICRO.vocab_size)
    facts = dataset.facts | {"validation_bytes": 1}
    dataset = dataclasses.replace(dataset, validation=np.array([0, 5, 0], dtype=np.uint16), facts=facts)
    with pytest.raises(moe.ConfigError, match=r"--document-mask = True: expected a held-out document of more than one"):
        make_trainer(dataset, document_mask=True)


def test_tokens_that_the_model_does_not_have_are_refused(dataset: Dataset) -> None:
    with pytest.raises(moe.ConfigError, match=rf"vocab_size = 200: expected at least {dataset.facts['vocab_size']}"):
        Trainer(moe.Transformer(dataclasses.replace(MICRO, vocab_size=200)), dataset, MICRO_SETTINGS)


def test_a_step_that_was_refused_steers_no_bias(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, accumulation=2)
    weight = trainer.model.get_parameter("layers.1.self_attn.o_proj.weight")
    broken = weight.register_hook(lambda grad: grad / 0)
    for _ in range(3):
        with pytest.raises(NonFiniteError):
            trainer.step()
    broken.remove()
    load = trainer.step().load
    biases = torch.stack([router.e_score_correction_bias for _, router in moe.balance.routers(trainer.model)])
    speed = trainer.settings.bias_update_speed
    torch.testing.assert_close(biases, speed * torch.sign(load.double().mean(-1, keepdim=True) - load).float())


def test_the_step_reports_what_it_did(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, clip=0.1)
    report = trainer.step()
    assert report.losses.keys() == {"ce", "mtp", "balance"}
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm().item()
    assert report.grad_norm > 0.1 and norm == pytest.approx(0.1, rel=1e-3)
    assert report.load.shape == (3, 8) and report.load[0].sum() == 2 * 16 * MICRO.num_experts_per_tok
    assert report.lr == pytest.approx(0.01 / 2)


def test_evaluation_is_the_mean_over_all_tokens_and_changes_nothing(dataset: Dataset) -> None:
    trainer = make_trainer(dataset)
    trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    evaluation = trainer.evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state()[0].items())
    expected, tokens = 0.0, 0
    trainer.model.eval()
    for ids in evaluation_batches(dataset.validation, 16, 1):
        log_p = trainer.model(ids).logits.double().log_softmax(-1)[0, :-1]
        expected -= log_p.gather(1, ids[0, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
    assert evaluation.tokens == tokens == len(dataset.validation) - 1
    assert evaluation.nats == pytest.approx(expected, rel=1e-5)
    assert evaluation.bits_per_byte == pytest.approx(expected / np.log(2) / dataset.validation_bytes, rel=1e-5)
    assert evaluation.load.shape == (3, 8)


@pytest.mark.parametrize("module", ["embed_tokens", "layers.1.mlp.experts", "mtp.0.block.self_attn"])
def test_a_loss_that_is_not_finite_names_step_and_module(dataset: Dataset, module: str) -> None:
    trainer = make_trainer(dataset)
    trainer.step()

    trainer.model.get_submodule(module).register_forward_hook(lambda *args: args[-1] / 0)
    with pytest.raises(NonFiniteError, match=rf"step 2: the loss is not finite; first in the output of {module}$"):
        trainer.step()
    assert trainer.step_number == 1


def test_a_parameter_that_is_not_finite_is_named(dataset: Dataset) -> None:
    trainer = make_trainer(dataset)
    trainer.model.get_parameter("layers.2.mlp.gate.weight").data[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 1: .* first in the parameter layers\.2\.mlp\.gate\.weight$"):
        trainer.step()


def test_a_gradient_that_is_not_finite_names_the_parameter_and_changes_none(dataset: Dataset) -> None:
    trainer = make_trainer(dataset)
    weight = trainer.model.get_parameter("layers.1.self_attn.o_proj.weight")
    weight.register_hook(lambda grad: grad / 0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient .* layers\.1\.self_attn\.o_proj\.weight"):
        trainer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


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
        ("moe.train.state.settle", OSError(errno.ENOSPC, "No space left on device")),
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


def test_elsewhere_than_on_a_terminal_progress_is_its_lines_alone() -> None:
    shown = io.StringIO()
    with ProgressDisplay(Console(file=shown, width=120), steps=2, done=0) as display:
        display.update(1, 3.0, 100.0, 0.5)
        display.update(2, 2.0, 100.0, 0.5)
    assert shown.getvalue() == "step 2/2  loss 2.000  100 tokens/s  worst MaxVio 0.50\n"


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
    """Options of a run of the tiny preset that is quick, because its windows are short."""
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
    """A run that gets the signal `number` when `step` is done but not recorded; without a step, none."""
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
    "empty text": (lambda text, here: ["--data", f"{here}/empty.txt"], "empty.txt': expected documents"),
    "not UTF-8": (lambda text, here: ["--data", f"{here}/latin.txt"], "UTF-8"),
    "too little text": (lambda text, here: ["--data", *map(str, sorted(text.iterdir())[:2])], "--seq-length = 256"),
    "too long windows": (lambda text, here: ["--seq-length", "1025"], "at most 1024"),
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
        ([], "--resume to go on, or --overwrite"),
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
    assert re.fullmatch(r"moesmith: step \d+: the (loss|gradient) is not finite; first in .+", last)


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
    expected = "model_type = 'deepseek_v3': expected a model that its files can express; "
    assert said.count("\n") == 1 and expected + problem in said
    assert not (tmp_path / "run").exists()


def test_a_trainer_steps_what_no_files_can_express(dataset: Dataset, tmp_path: Path) -> None:
    """`moesmith train`, which saves at the end, refuses it at the beginning."""
    config = dataclasses.replace(MICRO, vocab_size=dataset.facts["vocab_size"], router_bias=True)
    trainer = Trainer(moe.Transformer(config), dataset, MICRO_SETTINGS)
    before = trainer.model.embed_tokens.weight.detach().clone()
    trainer.step()
    assert not torch.equal(trainer.model.embed_tokens.weight, before)
    with pytest.raises(moe.CheckpointError, match="router_bias: deepseek_v3 cannot express it"):
        trainer.model.save(tmp_path / "m")


def test_two_runs_in_one_folder_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(command(text, tmp_path / "run"), step=1, number=signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
    assert main([*command(text, tmp_path / "run"), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "another run is at work in this folder" in said and str(first.pid) in said
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
    with pytest.raises((SystemExit, moe.ConfigError)) as raised, launcher.said_once(*launcher.MISTAKES):
        raise MISTAKE
    if local:
        assert isinstance(raised.value, SystemExit) and raised.value.code == 0
    else:
        assert raised.value is MISTAKE
    with pytest.raises(ZeroDivisionError), launcher.said_once(*launcher.MISTAKES):
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
