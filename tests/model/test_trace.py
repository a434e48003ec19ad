"""The recorded routing, its statistics and the margins of ties, beside definitions that are written as loops."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe
from moe.balance import routers
from moe.errors import ConfigError
from moe.planning.expert_cache import POLICIES, simulate
from moe.router import Router
from moe.trace import Trace, co_activation, margins, predicted_pairs, record
from tests.support.training import MICRO

E, K = 8, 2


def model(seed: int = 0, **changes: Any) -> moe.Transformer:
    torch.manual_seed(seed)
    return moe.Transformer(dataclasses.replace(MICRO, **changes))


def text(windows: int = 6, length: int = 32) -> Tensor:
    return torch.randint(MICRO.vocab_size, (windows, length), generator=torch.Generator().manual_seed(1))


def forced(net: moe.Transformer, *experts: int) -> moe.Transformer:
    """The same model, whose correction biases send every token to these experts."""
    for _, router in routers(net):
        router.move_bias(torch.tensor([5.0 if e in experts else 0.0 for e in range(E)]))
    return net


def router_of(
    experts: int, width: int, *, seed: int = 0, scale: float = 1.0, bias: bool = True, **settings: Any
) -> Router:
    config = dataclasses.replace(MICRO, n_routed_experts=experts, **settings)
    router, rng = Router(width, config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(scale * torch.randn(experts, width, generator=rng) / width**0.5)
        if router.e_score_correction_bias is not None and bias:
            router.move_bias(0.05 * torch.randn(experts, generator=rng))
    return router


def test_every_real_token_is_recorded_once_and_in_order() -> None:
    net, ids = model().train(), text()
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    batches = [{"input_ids": ids[:4], "attention_mask": mask[:4]}, {"input_ids": ids[4:5]}, {"input_ids": ids[5:, :7]}]
    found = record(net, batches)
    assert net.training and not any(router._forward_hooks for _, router in routers(net))
    assert found.layers.tolist() == ["layers.1.mlp", "layers.2.mlp"]  # the MTP module does not run in eval mode
    assert found.starts.tolist() == [0, 32, 52, 84, 116, 148] and found.tokens == 155
    assert (found.expert_ids.dtype, found.weights.dtype, found.margins.dtype) == (np.uint8, np.float16, np.float16)
    assert found.expert_bytes == 3 * MICRO.hidden_size * MICRO.moe_intermediate_size * 4

    net.eval()
    rows = [(ids[i], mask[i]) for i in range(5)] + [(ids[5, :7], mask[5, :7])]
    chosen: dict[str, list[Tensor]] = {name: [] for name, _ in routers(net)}
    weights: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for name, router in routers(net):

        def look(_: Any, __: Any, routing: moe.Routing, name: str = name) -> None:
            chosen[name].append(routing.expert_ids)
            weights[name].append(routing.weights)

        router.register_forward_hook(look)
    for row, real in rows:
        with torch.no_grad():
            net(row[: int(real.sum())][None])
    for layer, name in enumerate(("layers.1.mlp.gate", "layers.2.mlp.gate")):
        assert found.expert_ids[layer].tolist() == torch.cat(chosen[name]).tolist()
        expected = torch.cat(weights[name])
        torch.testing.assert_close(torch.from_numpy(found.weights[layer]), expected.half(), rtol=2e-3, atol=1e-5)


def test_statistics_are_counts() -> None:
    found = record(model(), [{"input_ids": text()}])
    load = [[int((ids == e).sum()) for e in range(E)] for ids in found.expert_ids]
    assert found.load.load.tolist() == load and found.load.layers == found.layers.tolist()
    assert found.load.max_vio == pytest.approx([max(row) / (sum(row) / E) - 1 for row in load])
    pairs = [[[0] * E for _ in range(E)] for _ in load]
    for layer, ids in enumerate(found.expert_ids.tolist()):
        for token in ids:
            for a in token:
                for b in token:
                    pairs[layer][a][b] += 1
    assert found.co_activation.tolist() == pairs
    assert found.near_ties == [sum(m < 1 for m in row) / found.tokens for row in found.margins.tolist()]


def test_pairs_are_predicted_from_the_loads() -> None:
    """Exactly for random choices; two experts that are always together occur together more often than predicted."""
    load = np.full(6, 100)  # of 200 tokens that choose 3 of 6: each of the 15 pairs occurs 3 * 200 / 15 times
    assert predicted_pairs(load, 3) == pytest.approx(40 * (1 - np.eye(6)))
    ids = np.random.default_rng(0).random((60_000, 6)).argsort(axis=1)[:, :3]
    pairs = co_activation(ids, 6)
    assert pairs == pytest.approx(predicted_pairs(pairs.diagonal(), 3) + np.diag(pairs.diagonal()), rel=0.02)

    pairs = co_activation(np.array([[0, 1]] * 30 + [[2, 3]] * 10), 5)
    found = predicted_pairs(pairs.diagonal(), 2)
    assert pairs[0, 1] == 30 and found[0, 1] == pytest.approx(40 * (30 / 40) ** 2 * 5 / 8)
    assert pairs[0, 2] == 0 and found[0, 2] == pytest.approx(40 * 30 / 40 * 10 / 40 * 5 / 8)
    assert not found[4].any() and not found.diagonal().any()
    assert predicted_pairs(np.array([3]), 1).tolist() == [[0]] and not predicted_pairs(np.array([0, 0]), 2).any()


def reference_margin(router: Router, x: Tensor) -> float:
    """For one token, with a derivative by central differences, in float64."""
    k, groups = router.selection["top_k"], router.selection["n_group"]
    bias = router.e_score_correction_bias
    weight = router.weight.detach().double()

    def choice(x: Tensor) -> Tensor:
        logits = weight @ x
        scores = logits.sigmoid() if router.selection["scoring_func"] == "sigmoid" else logits.softmax(0)
        return scores if bias is None else scores + bias.double()

    x = x.double()
    values = choice(x)
    members = values.view(groups, -1)
    best = sorted(range(groups), key=lambda g: -members[g].sort(descending=True).values[:2].sum())
    size = members.shape[1]
    allowed = [g * size + i for g in best[: router.selection["topk_group"]] for i in range(size)]
    order = sorted(allowed, key=lambda e: -values[e])
    last, following = order[k - 1], order[k]
    noise = 0.0
    for d in range(len(x)):
        step = torch.zeros_like(x)
        step[d] = 1e-5
        up, down = choice(x + step), choice(x - step)
        slope = ((up[last] - up[following]) - (down[last] - down[following])) / 2e-5
        ulp = 2.0 ** (math.floor(math.log2(abs(x[d]))) - 7)
        noise += (slope * ulp).item() ** 2 / 12
    return (values[last] - values[following]).item() / math.sqrt(noise)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_group": 1},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 1, "scoring_func": "softmax"},
        {"n_group": 1, "scoring_func": "softmax", "topk_method": "greedy"},
    ],
    ids=["sigmoid", "groups", "softmax", "no bias"],
)
def test_margins_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    router = router_of(12, 16, **settings)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    found = margins(router, x)
    assert found.tolist() == pytest.approx([reference_margin(router, row) for row in x], rel=1e-3)
    assert margins(router, x.bfloat16()).tolist() == pytest.approx(
        [reference_margin(router, row) for row in x.bfloat16().float()], rel=1e-3
    )


def test_ties_and_what_has_no_next_expert() -> None:
    router = router_of(8, 16, n_group=1, bias=False)
    assert margins(router, torch.zeros(3, 16)).tolist() == [0, 0, 0]  # all scores are equal
    assert margins(router, torch.zeros(0, 16)).shape == (0,)
    everything = router_of(4, 16, n_group=2, topk_group=1)
    assert margins(everything, torch.randn(3, 16)).tolist() == [math.inf] * 3


@pytest.mark.parametrize("groups", [{"n_group": 1}, {"n_group": 8, "topk_group": 4}], ids=["one group", "groups"])
def test_rounding_to_bf16_flips_as_many_selections_as_the_margins_say(groups: dict[str, Any]) -> None:
    """Rounds float32 activations for real, and compares the selected experts."""
    router = router_of(64, 256, num_experts_per_tok=6, **groups)
    x = torch.randn(20_000, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact, rounded = router(x), router(x.bfloat16().float())
    margin = margins(router, x).double()
    flipped = (exact.expert_ids.sort(1).values != rounded.expert_ids.sort(1).values).any(1)
    if groups["n_group"] > 1:  # those of a change of groups are not considered
        bias = router.e_score_correction_bias
        assert bias is not None
        best = [(r.scores + bias).view(-1, 8, 8).topk(2).values.sum(2).topk(4).indices for r in (exact, rounded)]
        same = (best[0].sort(1).values == best[1].sort(1).values).all(1)
        margin, flipped = margin[same], flipped[same]
    assert 0.01 < (margin < 1).double().mean() < 0.2
    expected = torch.special.ndtr(-margin)
    # Other pairs, such as the (K - 1)-th and the (K + 1)-th, flip now and then, too, so a few more are found.
    assert flipped.sum().item() == pytest.approx(expected.sum().item(), rel=0.1)
    for low, high in ((0.0, 0.25), (0.25, 1.0), (1.0, 2.0)):
        part = (margin >= low) & (margin < high)
        share = flipped[part].double().mean().item()
        assert share == pytest.approx(expected[part].mean().item(), abs=4 * (0.25 / part.sum().item()) ** 0.5)
    assert not flipped[margin > 5].any()
    assert flipped[margin < 1].sum() > 0.75 * flipped.sum()


def test_a_forced_imbalance_shows_in_every_statistic() -> None:
    batches = [{"input_ids": text(16)}]
    even, uneven = (record(net, batches) for net in (model(n_group=1), forced(model(n_group=1), 1, 2)))
    assert max(even.load.dead_experts) == 0 and uneven.load.dead_experts == [6, 6]
    assert uneven.load.max_vio == [E / K - 1] * 2 and max(even.load.max_vio) < 1.5
    assert (uneven.co_activation[:, 1, 2] == uneven.tokens).all() and (even.co_activation < even.tokens / 2).all()
    assert max(uneven.near_ties) == 0 < min(even.near_ties)

    def ratios(trace: Trace, gpus: int, replicas: int) -> tuple[float, float]:
        report = trace.placed(gpus, replicas)
        assert report.before is not None
        return report.overall(report.before), report.overall(report.after)

    # In order, experts 1 and 2 are on one of two GPUs, and on two of four.
    assert ratios(uneven, 2, 0) == (2, 1) and ratios(uneven, 4, 0) == (2, 2)
    # Three replicas of each; two of the four GPUs hold two of them.
    assert ratios(uneven, 4, 1) == (2, pytest.approx(4 / 3))
    assert all(max(ratios(even, gpus, 0)) < 1.5 for gpus in (2, 4))
    hits = [simulate(*trace.halves, E, (2,))[0].hits for trace in (even, uneven)]
    assert all((hits[1][policy] == uneven.tokens).all() for policy in POLICIES)
    assert all((hits[0][policy] < even.tokens * 0.8).all() for policy in POLICIES)


def test_placement_is_judged_on_the_second_half() -> None:
    ids = np.array([[[0], [0], [0], [1], [2], [2], [2], [2]]], np.uint8)
    trace = Trace(
        np.array(["a"]), 4, 0, ids, np.ones(ids.shape, np.float16), np.ones((1, 8), np.float16), np.array([0])
    )
    report = trace.placed(2, 0)
    # For 3, 1, 0 and 0 tokens the GPUs get experts 0 and 3, and 1 and 2. Then there are 0, 0, 4 and 0 tokens.
    assert (report.mean, report.before, report.after) == ([2], [4], [4])
    assert report.layers == ["a"] and (report.experts, report.physical_experts, report.gpus) == (4, 4, 2)
    assert trace.placed(3, 0).physical_experts == 6 and trace.placed(2, 1).physical_experts == 6


def test_a_saved_trace_is_read_again(tmp_path: Path) -> None:
    trace = record(model(), [{"input_ids": text()}])
    trace.save(tmp_path / "trace.npz")
    again = Trace.read(tmp_path / "trace.npz")
    for field in dataclasses.fields(Trace):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(trace, field.name))
    with np.load(tmp_path / "trace.npz") as arrays:
        np.testing.assert_array_equal(arrays["load"], trace.load.load)
        np.testing.assert_array_equal(arrays["co_activation"], trace.co_activation)
    twice = trace.expert_ids.copy()
    twice[0, 0, 1] = twice[0, 0, 0]
    refused: dict[str, dict[str, Any]] = {
        "other": {},
        "short": {"margins": np.ones((1, 3), np.float16)},
        "few": {"experts": 3},
        "many": {"experts": 2**40},
        "signed": {"expert_ids": trace.expert_ids.astype(np.int64) - 1},
        "twice": {"expert_ids": twice},
        "words": {"margins": trace.margins.astype(str)},
        "numbers": {"layers": np.arange(len(trace.layers))},
        "starts": {"starts": np.array(0)},
        "bytes": {"expert_bytes": -1},
        "objects": {"layers": trace.layers.astype(object)},
    }
    for name, values in refused.items():
        parts: dict[str, Any] = {field.name: getattr(trace, field.name) for field in dataclasses.fields(Trace)}
        given: dict[str, Any] = parts | values if values else {"x": np.ones(3)}
        np.savez(tmp_path / f"{name}.npz", **given)
        with pytest.raises(ConfigError, match=rf"{name}.npz = .*expected a file that moesmith trace wrote"):
            Trace.read(tmp_path / f"{name}.npz")


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(ConfigError, match="layers with experts"):
        record(torch.nn.Linear(2, 2), [])
    net = model()
    with torch.no_grad():
        net.embed_tokens.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"the scores of layers.1.mlp.gate are not finite"):
        record(net, [{"input_ids": torch.tensor([[1, 5]])}])
    assert not any(router._forward_hooks for _, router in routers(net))
