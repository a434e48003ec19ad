"""Recorded routing and its replay, in float64, where no tie is near."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe
from moe.balance import routers
from moe.replay import Replay, Routes, observing, recording
from tests.support.models import GROUPED, SMALL, noisy

CONFIGS = {"mla, groups, sigmoid": SMALL, "gqa": GROUPED}
IDS = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=CONFIGS)
def model(request: Any) -> moe.Transformer:
    return noisy(CONFIGS[request.param]).double().train()


def routes_of(model: nn.Module, shape: tuple[int, int], **inputs: Tensor) -> Routes:
    with recording(model) as found, torch.no_grad():
        model(**inputs)
    ids = torch.stack([routing.expert_ids for routing in found.values()]).unflatten(1, shape)
    weights = torch.stack([routing.weights for routing in found.values()]).unflatten(1, shape)
    return Routes(tuple(found), ids, weights)


def other_routes(model: nn.Module, shape: tuple[int, int], seed: int = 0) -> Routes:
    """Random distinct experts for every token."""
    names = [name for name, _ in routers(model) if "mtp" not in name]
    scores = torch.rand(len(names), *shape, 8, generator=torch.Generator().manual_seed(seed))
    ids = scores.argsort(-1)[..., :3]
    return Routes(tuple(names), ids, torch.zeros(ids.shape, dtype=torch.float64))


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(9))
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_replaying_a_models_own_routing_changes_nothing(model: moe.Transformer) -> None:
    routes = routes_of(model, (3, 7), input_ids=IDS)
    assert routes.layers == ("layers.1.mlp.gate", "layers.2.mlp.gate")
    expected = gradients(model, model(IDS).logits)
    with Replay(model) as replay:
        replay.use(routes)
        found = gradients(model, model(IDS).logits)
    assert_same(found, expected)
    for name in ("layers.1.mlp.gate.weight", "layers.2.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"):
        assert (found[name] != 0).any(), name
    assert (replay.slots, replay.same) == (2 * 3 * 7 * 3, 2 * 3 * 7 * 3)
    assert replay.weight_difference < 1e-12


def test_other_experts_are_used_with_the_weights_of_the_current_scores(model: moe.Transformer) -> None:
    routes, seen = other_routes(model, (3, 7)), {}
    with (
        Replay(model) as replay,
        observing(model, lambda name, router, x, used: seen.update({name: (router, x, used)})),
    ):
        replay.use(routes)
        logits = model(IDS).logits
    for layer, name in enumerate(routes.layers):
        router, x, used = seen[name]
        ids = routes.expert_ids[layer].flatten(0, 1)
        assert torch.equal(used.expert_ids, ids)
        scores = (x @ router.weight.T).sigmoid()
        picked = torch.stack([scores[row, ids[row]] for row in range(len(ids))])
        torch.testing.assert_close(used.weights, 2.5 * picked / picked.sum(1, keepdim=True))
        assert used.weights.requires_grad
    grads = gradients(model, logits)
    assert all((grads[f"{name}.weight"] != 0).any() for name in routes.layers)
    assert replay.slots == 2 * 21 * 3 and replay.same < replay.slots
    # An expert that no token was given has no gradient.
    only = Routes(routes.layers, torch.tensor([0, 1, 2]).expand(2, 3, 7, 3).contiguous(), routes.weights)
    with Replay(model) as replay:
        replay.use(only)
        grads = gradients(model, model(IDS).logits)
    expert = grads["layers.1.mlp.experts.down_proj"]
    assert (expert[:3] != 0).flatten(1).any(1).all() and (expert[3:] == 0).all()


def test_recomputed_layers_are_replayed_too(model: moe.Transformer) -> None:
    found = []
    for checkpointing in (False, True):
        model.set_activation_checkpointing(checkpointing)
        with Replay(model) as replay:
            replay.use(other_routes(model, (3, 7)))
            found.append(gradients(model, model(IDS).logits))
            replay.use(other_routes(model, (3, 7), seed=1))  # the routes of a later batch
            model(IDS)
    assert_same(found[1], found[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_experts(model: moe.Transformer, side: str) -> None:
    routes = other_routes(model, (3, 7))
    pad = (2, 0) if side == "left" else (0, 2)
    ids = nn.functional.pad(IDS, pad, value=5)
    mask = nn.functional.pad(torch.ones_like(IDS), pad)
    absent = (0, 0, *pad)
    padded = Routes(
        routes.layers,
        nn.functional.pad(routes.expert_ids, absent, value=-1),
        nn.functional.pad(routes.weights, absent),
    )
    real = slice(2, None) if side == "left" else slice(7)
    with Replay(model) as replay:
        replay.use(routes)
        expected = model(IDS).logits
        grads = gradients(model, expected)
    with Replay(model) as replay:
        replay.use(padded)
        found = model(ids, attention_mask=mask).logits[:, real]
        padded_grads = gradients(model, found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert_same(padded_grads, grads)
    assert replay.slots == 2 * 21 * 3


def test_nothing_is_left_on_the_modules(model: moe.Transformer) -> None:
    modules = [module for _, module in model.named_modules()]
    before = [sorted(vars(module)) for module in modules]
    with pytest.raises(ValueError, match=r"^routes: expected a call of `use`"), Replay(model), recording(model):
        model(IDS)
    assert [sorted(vars(module)) for module in modules] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_comparison_leaves_the_routing_and_counts(model: moe.Transformer) -> None:
    routes = routes_of(model, (3, 7), input_ids=IDS)
    own = {name: ids.flatten(0, 1) for name, ids in zip(routes.layers, routes.expert_ids, strict=True)}
    changed = routes.expert_ids.flip(-1).clone()  # their order does not matter
    absent = (own["layers.1.mlp.gate"][0, :, None] == torch.arange(8)).any(0).logical_not().nonzero()[0, 0]
    changed[0, 0, 0, 1] = absent
    changed[1, 2, 3] = -1
    weights = routes.weights.flip(-1).clone()
    weights[1, 0, 0, 2] += 0.25
    with Replay(model, compare_only=True) as replay, recording(model) as used:
        replay.use(Routes(routes.layers, changed, weights))
        model(IDS)
    assert all(torch.equal(used[name].expert_ids, ids) for name, ids in own.items())
    assert (replay.slots, replay.same) == (2 * 21 * 3 - 3, 2 * 21 * 3 - 4)
    assert replay.weight_difference == pytest.approx(0.25)


def test_modules_for_multi_token_prediction_route_on_their_own() -> None:
    model = noisy(moe.ModelConfig.from_dict(SMALL.to_dict() | {"num_nextn_predict_layers": 1})).double().train()
    routes = routes_of(model, (3, 7), input_ids=IDS)
    assert routes.layers == ("layers.1.mlp.gate", "layers.2.mlp.gate")
    expected = model(IDS, labels=IDS).losses
    with Replay(model) as replay:
        replay.use(routes)
        found = model(IDS, labels=IDS).losses
    assert found["mtp"].item() == pytest.approx(expected["mtp"].item(), rel=1e-12)
    assert replay.slots == 2 * 21 * 3


def test_wrong_routes_are_named(model: moe.Transformer) -> None:
    routes = routes_of(model, (3, 7), input_ids=IDS)
    replay = Replay(model)
    with pytest.raises(
        ValueError, match=r"^routes: expected routers of the model \(layers.1.mlp.gate, .*; found gate$"
    ):
        replay.use(Routes(("gate", "gate"), routes.expert_ids, routes.weights))
    with replay:
        replay.use(routes)
        with pytest.raises(ValueError, match=r"^routes: layers.1.mlp.gate was recorded for 21 tokens; found 14$"):
            model(IDS[:2])
        replay.use(Routes(routes.layers, routes.expert_ids + 8, routes.weights))
        with pytest.raises(IndexError, match="expert_ids"):
            model(IDS)


def test_selected_sequences_and_positions(model: moe.Transformer) -> None:
    routes = routes_of(model, (3, 7), input_ids=IDS)
    part = routes.select(torch.tensor([2, 0]), slice(1, 4))
    assert torch.equal(part.expert_ids, routes.expert_ids[:, [2, 0], 1:4])
    assert torch.equal(part.weights, routes.weights[:, [2, 0], 1:4])
