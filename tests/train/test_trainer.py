"""The trainer on a model small enough to step many times: what a step, an evaluation and a state are."""

import copy
import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe
from moe.train.data import Dataset, evaluation_batches, prepare
from moe.train.loop import NonFiniteError, Trainer, deterministic
from moe.train.state import load_latest_state, save_state
from tests.support.training import MICRO, MICRO_SETTINGS, assert_same_state

pytestmark = pytest.mark.usefixtures("micro")


def make_trainer(dataset: Dataset, **changes: Any) -> Trainer:
    config = dataclasses.replace(MICRO, vocab_size=dataset.facts["vocab_size"])
    return Trainer(moe.Transformer(config), dataset, dataclasses.replace(MICRO_SETTINGS, **changes))


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
    for trainer in (masked, plain):
        trainer.model.double()  # experts get other rows, whose bits depend on how many there are
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
    seen, unmasked_seen = (
        before[:, 8:] - after[:, 8:] for before, after in ((logits, other), (unmasked, other_unmasked))
    )
    assert seen.abs().max() < 1e-10, "the second document sees the first"
    assert unmasked_seen.abs().max() > 1e-6


def test_accumulation_under_a_document_mask_is_the_mean_over_tokens(short: Dataset) -> None:
    """Against the sum of cross entropies over all windows, divided by the number of predicted tokens."""
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
    """Against a loop over the documents of each window, with the bytes after their first tokens."""
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


def test_a_trainer_steps_what_no_files_can_express(dataset: Dataset, tmp_path: Path) -> None:
    """`moesmith train`, which saves at the end, refuses it at the beginning."""
    config = dataclasses.replace(MICRO, vocab_size=dataset.facts["vocab_size"], router_bias=True)
    trainer = Trainer(moe.Transformer(config), dataset, MICRO_SETTINGS)
    before = trainer.model.embed_tokens.weight.detach().clone()
    trainer.step()
    assert not torch.equal(trainer.model.embed_tokens.weight, before)
    with pytest.raises(moe.CheckpointError, match="router_bias: deepseek_v3 cannot express it"):
        trainer.model.save(tmp_path / "m")
