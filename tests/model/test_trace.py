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
    assert found.layers.tolist() == [name.removesuffix(".gate") for name in net.load_report().layers]
    assert found.layers.tolist() == ["layers.1.mlp", "layers.2.mlp", "mtp.0.block.mlp"]
    assert found.routed[:2].all()
    ends = [31, 51, 83, 115, 147, 154]  # the last token of each window has no next one
    assert np.flatnonzero(~found.routed[2]).tolist() == ends
    assert not found.expert_ids[2, ends].any() and not found.weights[2, ends].any()
    assert (found.margins[2, ends] == np.inf).all()
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


@pytest.mark.parametrize("masked", ["", "documents", "padding"])
def test_mtp_modules_see_what_they_see_in_training(masked: str) -> None:
    """The routing, inputs included, is that of the forward pass that computes the loss of the modules."""
    net, ids = model(num_nextn_predict_layers=2), text(3, 12)
    batch: dict[str, Tensor] = {"input_ids": ids}
    if masked == "documents":
        batch["document_ids"] = torch.arange(12).expand(3, -1) // 5
    if masked == "padding":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :3] = batch["attention_mask"][1, 9:] = 0
    seen: dict[str, Tensor] = {}
    chosen: dict[str, Tensor] = {}
    handles: list[Any] = []
    for name, router in routers(net):

        def look(_: Any, args: tuple[Tensor], routing: moe.Routing, name: str = name) -> None:
            seen[name], chosen[name] = args[0], routing.expert_ids

        handles.append(router.register_forward_hook(look))
    with torch.no_grad():
        net.train()(**batch, labels=ids)
        expected, routing = dict(seen), dict(chosen)
        out = net.eval()(**batch)
        assert [h.shape for h in net.run_mtp(out.hidden, **batch)] == [(3, 11, 32), (3, 10, 32)]
    for handle in handles:
        handle.remove()
    names = ["mtp.0.block.mlp.gate", "mtp.1.block.mlp.gate"]
    for name in names:
        torch.testing.assert_close(seen[name], expected[name], rtol=0, atol=0)

    # Real tokens, in order; those whose next tokens are real and of the same document are routed.
    found = record(net, [batch])
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    documents = batch.get("document_ids", torch.zeros_like(ids))
    for k, name in enumerate(names):
        layer, ids_of = found.layers.tolist().index(name.removesuffix(".gate")), routing[name].view(3, 11 - k, 2)
        token = 0
        for b, i in real.nonzero().tolist():
            following = range(i, i + k + 2)
            valid = i + k + 1 < 12 and all(real[b, j] and documents[b, j] == documents[b, i] for j in following)
            assert found.routed[layer, token] == valid
            if valid:
                assert found.expert_ids[layer, token].tolist() == ids_of[b, i].tolist()
            token += 1
        assert token == found.tokens and 0 < found.routed[layer].sum() < token
        assert len(found.chosen(layer)) == found.routed[layer].sum()


def test_mtp_modules_without_a_next_token_are_left_out() -> None:
    """Windows of one token; and caches count the layers that run while tokens are decoded."""
    net = model()
    found = record(net, [{"input_ids": text(4, 1)}])
    assert found.layers.tolist() == ["layers.1.mlp", "layers.2.mlp"] and found.routed.all()
    found = record(net, [{"input_ids": text(4, 1)}, {"input_ids": text(2, 6)}])
    assert len(found.layers) == 3 and found.routed[2].tolist() == [False] * 4 + ([True] * 5 + [False]) * 2
    assert [half.shape for half in found.halves] == [(2, 8, K)] * 2
    assert found.placed(2, 0).layers == found.layers.tolist()
    assert found.placed(2, 0).mean == [8.0, 8.0, 6.0]  # two of the last 8 tokens end a window


def test_statistics_are_counts() -> None:
    found = record(model(), [{"input_ids": text()}])
    load = [[int((found.chosen(layer) == e).sum()) for e in range(E)] for layer in range(3)]
    assert [sum(row) for row in load] == [192 * K, 192 * K, 186 * K]
    assert found.load.load.tolist() == load and found.load.layers == found.layers.tolist()
    assert found.load.max_vio == pytest.approx([max(row) / (sum(row) / E) - 1 for row in load])
    pairs = [[[0] * E for _ in range(E)] for _ in load]
    for layer in range(3):
        for token in found.chosen(layer).tolist():
            for a in token:
                for b in token:
                    pairs[layer][a][b] += 1
    assert found.co_activation.tolist() == pairs
    near = [sum(m < 1 for m in row) for row in found.margins.tolist()]
    assert found.near_ties == [n / sum(row) * K for n, row in zip(near, load, strict=True)]


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
    k, groups, kept = (router.selection[name] for name in ("top_k", "n_group", "topk_group"))
    best_of = 1 if router.selection["group_score"] == "max" else 2
    bias = router.e_score_correction_bias
    weight = router.weight.detach().double()

    def choice(x: Tensor) -> Tensor:
        logits = weight @ x
        scores = logits.sigmoid() if router.selection["scoring_func"] == "sigmoid" else logits.softmax(0)
        return scores if bias is None else scores + bias.double()

    def score(values: Tensor, group: int) -> Tensor:
        return values.view(groups, -1)[group].sort(descending=True).values[:best_of].sum()

    def order_of(allowed: list[int]) -> list[int]:
        size = len(values) // groups
        return sorted((g * size + i for g in allowed for i in range(size)), key=lambda e: -values[e])

    x = x.double()
    values = choice(x)
    best = sorted(range(groups), key=lambda g: -score(values, g))
    order = order_of(best[:kept])
    gaps = []
    if len(order) > k:
        gaps.append(lambda values: values[order[k - 1]] - values[order[k]])
    if kept < groups and set(order_of([*best[: kept - 1], best[kept]])[:k]) != set(order[:k]):
        gaps.append(lambda values: score(values, best[kept - 1]) - score(values, best[kept]))
    found = math.inf
    for gap in gaps:
        noise = 0.0
        for d in range(len(x)):
            step = torch.zeros_like(x)
            step[d] = 1e-5
            slope = (gap(choice(x + step)) - gap(choice(x - step))) / 2e-5
            ulp = 2.0 ** (math.floor(math.log2(abs(x[d]))) - 7)
            noise += (slope * ulp).item() ** 2 / 12
        found = min(found, gap(values).item() / math.sqrt(noise))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"n_group": 1},
        {"n_group": 4, "topk_group": 2},
        {"n_group": 4, "topk_group": 2, "scoring_func": "softmax", "topk_method": "group_limited_greedy"},
        {"n_group": 6, "topk_group": 1},
        {"n_group": 12, "topk_group": 3},
        {"n_group": 4, "topk_group": 4},
        {"n_group": 1, "scoring_func": "softmax"},
        {"n_group": 1, "scoring_func": "softmax", "topk_method": "greedy"},
    ],
    ids=["sigmoid", "groups", "best of a group", "whole groups", "single experts", "all groups", "softmax", "no bias"],
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
    for groups in (1, 2):
        everything = router_of(4, 16, n_group=groups, topk_group=groups, num_experts_per_tok=4)
        assert margins(everything, torch.randn(3, 16)).tolist() == [math.inf] * 3
    one = router_of(1, 16, n_group=1, num_experts_per_tok=1)
    assert margins(one, torch.randn(3, 16)).tolist() == [math.inf] * 3
    # All experts of the only selected group are selected, so another group selects others.
    whole = router_of(4, 16, n_group=2, topk_group=1, bias=False)
    assert margins(whole, torch.zeros(3, 16)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy"])
@pytest.mark.parametrize("shape", [(8, 2, 1, 2), (8, 4, 2, 2), (12, 4, 2, 3), (12, 4, 3, 4), (6, 6, 2, 2)])
def test_groups_that_are_almost_tied(method: str, shape: tuple[int, int, int, int]) -> None:
    """By brute force: a token is near a tie exactly if tiny changes of its logits change the selected experts.

    The scores of the two groups that could be exchanged are made almost equal, and no two experts are.
    """
    experts, groups, kept, k = shape
    settings = {"n_group": groups, "topk_group": kept, "num_experts_per_tok": k, "topk_method": method}
    router = router_of(experts, experts, bias=False, **settings)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))  # x are the logits
    rng = torch.Generator().manual_seed(4)

    def scores(logits: Tensor) -> Tensor:
        members = router.route(logits).scores.view(-1, groups, experts // groups)
        best = 1 if router.selection["group_score"] == "max" else min(2, experts // groups)
        return members.topk(best, dim=-1).values.sum(-1)

    near = 0
    for _ in range(12):
        logits = torch.randn(1, experts, generator=rng, dtype=torch.float64)
        first, second = scores(logits)[0].argsort(descending=True)[kept - 1 : kept + 1].tolist()
        size = experts // groups
        low, high = 0.0, 10.0  # added to the logits of the second group, until it is almost the first
        for _ in range(40):
            middle = (low + high) / 2
            moved = logits.clone()
            moved[0, second * size : (second + 1) * size] += middle
            found = scores(moved)[0]
            low, high = (middle, high) if found[second] < found[first] else (low, middle)
        moved = logits.clone()
        moved[0, second * size : (second + 1) * size] += low - 1e-9
        if scores(moved)[0].argsort(descending=True)[kept - 1 : kept + 1].tolist() != [first, second]:
            continue
        before = router.route(moved).expert_ids.sort(1).values
        changed = moved + 1e-6 * torch.randn(300, experts, generator=rng, dtype=torch.float64)
        flips = bool((router.route(changed).expert_ids.sort(1).values != before).any())
        assert (margins(router, moved).item() < 0.1) == flips
        near += flips
    assert near > 1


def test_an_exchange_of_groups_may_select_the_same_experts() -> None:
    """Groups 0 and 1 are the best; 1 and 2 are tied, but all selected experts are in group 0."""
    router = router_of(6, 6, bias=False, n_group=3, topk_group=2, num_experts_per_tok=2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(6))
    x = torch.tensor([[3.0, 2.0, 0.5, 0.5, 0.5, 0.5]])
    assert margins(router, x).item() > 10
    x[0, 1] = -3.0  # now one is in group 1
    assert margins(router, x).item() == 0


@pytest.mark.parametrize("groups", [{"n_group": 1}, {"n_group": 8, "topk_group": 4}], ids=["one group", "groups"])
def test_rounding_to_bf16_flips_as_many_selections_as_the_margins_say(groups: dict[str, Any]) -> None:
    """Rounds float32 activations for real, and compares the selected experts."""
    router = router_of(64, 256, num_experts_per_tok=6, **groups)
    x = torch.randn(20_000, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact, rounded = router(x), router(x.bfloat16().float())
    margin = margins(router, x).double()
    flipped = (exact.expert_ids.sort(1).values != rounded.expert_ids.sort(1).values).any(1)
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
    assert max(even.load.dead_experts) == 0 and uneven.load.dead_experts == [6] * 3
    assert uneven.load.max_vio == [E / K - 1] * 3 and max(even.load.max_vio) < 1.5
    assert uneven.co_activation[:, 1, 2].tolist() == [512, 512, 496] and (even.co_activation < even.tokens / 2).all()
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
        layers=np.array(["a"]),
        experts=4,
        expert_bytes=0,
        expert_ids=ids,
        weights=np.ones(ids.shape, np.float16),
        margins=np.ones((1, 8), np.float16),
        starts=np.array([0]),
        routed=np.ones((1, 8), bool),
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
        "unrouted": {"routed": trace.routed & (np.arange(3) < 2)[:, None]},
        "mask": {"routed": trace.routed.astype(np.uint8)},
        "objects": {"layers": trace.layers.astype(object)},
    }
    for name, values in refused.items():
        parts: dict[str, Any] = {field.name: getattr(trace, field.name) for field in dataclasses.fields(Trace)}
        given: dict[str, Any] = parts | values if values else {"x": np.ones(3)}
        np.savez(tmp_path / f"{name}.npz", **given)
        with pytest.raises(ConfigError, match=rf"{name}.npz = .*expected a file that moesmith trace wrote"):
            Trace.read(tmp_path / f"{name}.npz")


class Routers(torch.nn.Module):
    """A model of others: layers with experts, one after the other."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layers(torch.nn.functional.one_hot(input_ids % 32, 32).float())


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(ConfigError, match="layers with experts"):
        record(torch.nn.Linear(2, 2), [])
    net = model()
    with torch.no_grad():
        net.embed_tokens.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"the scores of layers.1.mlp.gate are not finite"):
        record(net, [{"input_ids": torch.tensor([[1, 5]])}])
    biased = model()
    dict(routers(biased))["layers.2.mlp.gate"].move_bias(torch.full((E,), math.nan))
    with pytest.raises(FloatingPointError, match=r"the correction bias of layers.2.mlp.gate is not finite"):
        record(biased, [{"input_ids": text()}])
    mixed: list[Any] = [moe.MoELayer.from_config(MICRO) for _ in range(2)]
    mixed[1].gate.selection["top_k"] = 1
    with pytest.raises(ConfigError, match=r"\[\(8, 1\), \(8, 2\)\]: expected layers with experts, all with the same"):
        record(Routers(*mixed), [{"input_ids": text()}])
    with pytest.raises(
        ConfigError, match=r"1.gate: 192 rows, again': expected a model whose layers route each of the 192"
    ):
        record(Routers(mixed[0], mixed[1], mixed[1]), [{"input_ids": text()}])
    assert not any(router._forward_hooks for _, router in routers(net))
