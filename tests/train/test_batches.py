"""`moe.train.batches`: custom batches, optimizers and losses."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import moe
from moe.train.batches import BatchTrainer
from moe.train.loop import NonFiniteError
from tests.support.training import MICRO

IDS = torch.randint(MICRO.vocab_size, (6, 12), generator=torch.Generator().manual_seed(0))


def make_model(**changes: Any) -> moe.Transformer:
    return moe.Transformer(dataclasses.replace(MICRO, **changes)).double()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    for (name, one), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_unequal_micro_batches_are_one_batch() -> None:
    labels = IDS.clone()
    labels[0, 3:] = -100
    whole, parts = make_model(aux_loss_alpha=0.01), make_model(aux_loss_alpha=0.01)
    batches = [{"input_ids": IDS[a:b], "labels": labels[a:b]} for a, b in ((0, 1), (1, 4), (4, 6))]
    one = BatchTrainer(whole, [{"input_ids": IDS, "labels": labels}], sgd(whole), clip=0.5).step()
    three = BatchTrainer(parts, batches, sgd(parts), clip=0.5, accumulation=3).step()
    assert one is not None and three is not None
    assert three.loss == pytest.approx(one.loss, rel=1e-9) and three.grad_norm == pytest.approx(one.grad_norm, rel=1e-9)
    assert one.grad_norm > 0.5
    assert_same_parameters(whole, parts)
    bias = whole.get_buffer("layers.1.mlp.gate.e_score_correction_bias")
    assert bias.abs().max() == pytest.approx(0.001), "updated once"


def test_any_model_and_loss_with_several_optimizers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 16)
            self.layer = moe.MoELayer(16, 8, n_routed_experts=4, num_experts_per_tok=2, aux_loss_alpha=0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.project(x))

    torch.manual_seed(0)
    pairs = [(torch.randn(2, 5, 8), torch.randn(2, 5, 16)) for _ in range(5)]
    mine, theirs = Model(), Model()
    theirs.load_state_dict(mine.state_dict())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1])

    optimizers = [sgd(mine.project, 0.1), sgd(mine.layer, 0.2)]
    trainer = BatchTrainer(
        mine, pairs, optimizers, loss=loss, accumulation=2, clip=None, schedule=lambda step: 1 / step
    )
    reports = list(trainer)
    assert [report.step for report in reports] == [1, 2, 3], "the last step has the batch that is left"

    by_hand = [sgd(theirs.project, 0.1), sgd(theirs.layer, 0.2)]
    moe.balance.attach(theirs, by_hand[1])
    for step, group in enumerate((pairs[:2], pairs[2:4], pairs[4:]), 1):
        moe.balance.set_loss_scale(theirs, 1 / len(group))
        for optimizer, rate in zip(by_hand, (0.1, 0.2), strict=True):
            optimizer.param_groups[0]["lr"] = rate / step
            optimizer.zero_grad()
        losses = [loss(theirs, batch) / len(group) for batch in group]
        for each in losses:
            each.backward()
        for optimizer in by_hand:
            optimizer.step()
        assert reports[step - 1].loss == pytest.approx(sum(each.item() for each in losses))
    for (name, a), (_, b) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_tensors_are_ids_and_labels_and_an_attached_model_stays_attached() -> None:
    model, other = make_model(), make_model()
    optimizer = sgd(model)
    moe.balance.attach(model, optimizer, bias_update_speed=0.5)
    BatchTrainer(model, [IDS], optimizer).step()
    assert model.get_buffer("layers.1.mlp.gate.e_score_correction_bias").abs().max() == 0.5
    trainer = BatchTrainer(other, [{"input_ids": IDS, "labels": IDS}], sgd(other), bias_update_speed=0.5)
    assert trainer.step() is not None and trainer.step() is None
    assert_same_parameters(model, other)


def test_what_cannot_be_trained_is_refused_and_changes_nothing() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nan = BatchTrainer(model, [IDS], sgd(model), loss=lambda model, ids: model(ids).logits.sum() * float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: the loss is not finite"):
        nan.step()
    with pytest.raises(ValueError, match=r"batch: expected a dict .* found list"):
        BatchTrainer(model, [[1, 2]], sgd(model)).step()
    with pytest.raises(ValueError, match="accumulation = 0"):
        BatchTrainer(model, [IDS], sgd(model), accumulation=0)
    for clip in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"clip = {clip}: expected a finite number above 0"):
            BatchTrainer(model, [IDS], sgd(model), clip=clip)
    wrong = "loss: expected a scalar tensor; found"
    for batch, expected in (
        ({"input_ids": IDS}, f"{wrong} NoneType; a batch needs labels"),
        (IDS[0], r"input_ids has shape \(12,\): expected \[B, S\]"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels has shape \(6, 11\): expected \(6, 12\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            BatchTrainer(model, [batch], sgd(model)).step()
    losses: Any = ((lambda model, ids: model(ids).logits, r"\(6, 12, 300\)$"), (lambda *_: 1.0, "float$"))
    for loss, found in losses:
        with pytest.raises(ValueError, match=f"{wrong} {found}"):
            BatchTrainer(model, [IDS], sgd(model), loss=loss).step()
    with pytest.raises(ValueError, match="optimizers"):
        BatchTrainer(model, [IDS], [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
