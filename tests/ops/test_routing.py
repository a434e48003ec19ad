"""Routing against an oracle in plain Python, and its gradient."""

import math

import pytest
import torch
from torch import Tensor

from moe import ops
from moe.ops.routing import _select, _select_for_one, first_by_sorting, route_reference
from tests.support.bound import excess
from tests.support.cases import ROUTING_CASES, RoutingCase

each_case = pytest.mark.parametrize("case", ROUTING_CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def ordered(values: list[float]) -> list[int]:
    """Indices by value descending, index ascending, NaN last."""
    return sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i] if values[i] == values[i] else 0, i)
    )


def expected_ids(case: RoutingCase, choice: Tensor) -> list[list[int]]:
    """The selection for the given biased scores [T, E], by sorting lists."""
    size = case.experts // case.n_group
    rows = []
    for row in choice.tolist():
        candidates = list(range(case.experts))
        if case.n_group > 1:
            scores = []
            for g in range(case.n_group):
                best = sorted((-math.inf if v != v else v for v in row[g * size : (g + 1) * size]), reverse=True)
                pair = torch.tensor(best[:2], dtype=choice.dtype)  # the sum of two in the scores' own precision
                scores.append(best[0] if case.group_score == "max" else pair.sum().item())
            kept = set(ordered(scores)[: case.topk_group])
            candidates = [e for e in candidates if e // size in kept]
        rows.append([candidates[i] for i in ordered([row[e] for e in candidates])[: case.top_k]])
    return rows


@each_dtype
@each_case
def test_route(case: RoutingCase, dtype: torch.dtype) -> None:
    logits, bias = case.inputs(dtype)
    routing = ops.route(logits, bias, **case.settings)
    assert (routing.weights.dtype, routing.expert_ids.dtype, routing.scores.dtype) == (dtype, torch.int64, dtype)
    assert routing.expert_ids.tolist() == expected_ids(case, routing.scores if bias is None else routing.scores + bias)
    for row in routing.expert_ids.tolist():
        assert len(set(row)) == case.top_k and all(0 <= e < case.experts for e in row)

    exact = logits.double()
    exact = exact.sigmoid() if case.scoring_func == "sigmoid" else exact.softmax(dim=-1)
    assert torch.allclose(routing.scores.double(), exact, rtol=2**-20, atol=1e-37, equal_nan=True)
    weights = exact.gather(1, routing.expert_ids)
    if case.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True).clamp_min(case.norm_min) + 1e-20)
    weights = weights * case.routed_scaling_factor
    assert torch.allclose(routing.weights.double(), weights, rtol=2**-20, atol=1e-30, equal_nan=True)

    turned = ops.route(logits.t().contiguous().t(), bias, **case.settings)
    assert torch.equal(turned.expert_ids, routing.expert_ids)
    assert torch.allclose(turned.weights, routing.weights, rtol=2**-20, atol=0, equal_nan=True)

    reference = route_reference(logits, bias, **case.settings)
    assert torch.equal(reference.expert_ids, routing.expert_ids)
    assert torch.allclose(reference.weights, routing.weights, rtol=2**-20, atol=0, equal_nan=True)


@each_dtype
@each_case
def test_route_of_one_token(case: RoutingCase, dtype: torch.dtype) -> None:
    logits, bias = case.inputs(dtype)
    for token in logits.split(1):
        routing = ops.route(token, bias, **case.settings)
        choice = routing.scores if bias is None else routing.scores + bias
        assert routing.expert_ids.dtype == torch.int64 and routing.expert_ids.is_contiguous()
        assert routing.expert_ids.tolist() == expected_ids(case, choice)
        reference = route_reference(token, bias, **case.settings)
        assert torch.equal(routing.expert_ids, reference.expert_ids)
        assert torch.allclose(routing.scores, reference.scores, rtol=2**-20, atol=1e-37, equal_nan=True)
        assert torch.allclose(routing.weights, reference.weights, rtol=2**-20, atol=0, equal_nan=True)


@each_dtype
def test_selection_for_one_token(dtype: torch.dtype) -> None:
    """Ties, NaN, infinities, zeros of both signs and sums that overflow, in all sizes of groups."""
    g = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, largest, -largest], dtype=dtype)
    for n_group in (1, 2, 3, 8):
        for size in (1, 2, 3, 16):
            for topk_group in {1, (n_group + 1) // 2, n_group}:
                for top_k in {1, topk_group * size // 2 or 1, topk_group * size}:
                    for group_score in ("top2", "max"):
                        choice = torch.randn(1, n_group * size, dtype=dtype, generator=g)
                        at = torch.rand(choice.shape, generator=g) < torch.rand((), generator=g)
                        choice[at] = special[torch.randint(len(special), (int(at.sum()),), generator=g)]
                        settings = top_k, n_group, topk_group, group_score
                        expected = _select(first_by_sorting, choice, *settings)
                        assert torch.equal(_select_for_one(choice, *settings), expected), (choice, settings)


@each_case
def test_route_gradient(case: RoutingCase) -> None:
    logits, bias = case.inputs(torch.float64)
    logits = logits.nan_to_num(0.5, neginf=-3.0).clamp(-60, 20).requires_grad_()
    for which in ("weights", "scores", "both"):
        grads = []
        for function in (ops.route, route_reference):
            routing = function(logits, bias, **case.settings)
            torch.manual_seed(1)
            outputs = {"weights": [routing.weights], "scores": [routing.scores]}.get(
                which, [routing.weights, routing.scores]
            )
            grads += torch.autograd.grad(outputs, logits, [torch.randn_like(out) for out in outputs])
        assert torch.allclose(*grads, rtol=1e-10, atol=1e-14), which


@each_case
def test_route_gradient_in_float32(case: RoutingCase) -> None:
    logits, bias = case.inputs(torch.float32)
    logits = logits[:8].nan_to_num(0.5, neginf=-3.0).clamp(-60, 20).requires_grad_()
    exact_logits = logits.detach().double().requires_grad_()
    routing = ops.route(logits, bias, **case.settings)
    scores = exact_logits.sigmoid() if case.scoring_func == "sigmoid" else exact_logits.softmax(dim=-1)
    weights = scores.gather(1, routing.expert_ids)
    if case.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True).clamp_min(case.norm_min) + 1e-20)
    weights = weights * case.routed_scaling_factor
    outputs, exact_outputs = (routing.weights, routing.scores), (weights, scores)
    grads = [torch.randn_like(output) for output in outputs]
    for which in (slice(0, 1), slice(1, 2), slice(0, 2)):
        turned = [grad.t().contiguous().t() for grad in grads[which]]
        found = [torch.autograd.grad(outputs[which], logits, g, retain_graph=True)[0] for g in (grads[which], turned)]
        doubles = [grad.double() for grad in grads[which]]
        (exact,) = torch.autograd.grad(exact_outputs[which], exact_logits, doubles, retain_graph=True)
        # The terms cancel, and none is larger than this.
        scale = case.routed_scaling_factor * torch.cat(doubles, dim=1).abs().sum(dim=1, keepdim=True)
        for ours in found:
            assert excess(ours, exact, (2**-20 * scale).expand_as(exact)) <= 1, which


def test_the_bias_only_selects() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    plain, biased = (ops.route(logits, b, top_k=2, norm_topk_prob=False) for b in (None, torch.tensor([9.0, 0, 0, 0])))
    assert plain.expert_ids.tolist() == [[3, 2]] and biased.expert_ids.tolist() == [[0, 3]]
    assert torch.equal(biased.weights, logits.sigmoid()[:, [0, 3]])
    assert torch.equal(biased.scores, plain.scores)


def test_a_nan_reaches_only_its_own_row() -> None:
    logits = torch.randn(5, 16)
    clean = ops.route(logits, top_k=3, n_group=4, topk_group=2)
    logits[2, 7] = torch.nan
    dirty = ops.route(logits, top_k=3, n_group=4, topk_group=2)
    others = [0, 1, 3, 4]
    for one, other in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(one[others], other[others])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(half: torch.dtype) -> None:
    logits, bias = torch.randn(30, 16), torch.rand(16)
    plain = ops.route(logits, bias, top_k=3)
    with torch.autocast("cpu", half):
        under = ops.route(logits, bias, top_k=3)
    assert all(map(torch.equal, plain[:3], under[:3]))


E32 = torch.zeros(3, 8)
REFUSED = {
    "half logits": ((E32.bfloat16(),), {"top_k": 2}, TypeError, "do not route in half precision"),
    "three dimensions": ((E32[None],), {"top_k": 2}, ValueError, r"expected \[T, E\]"),
    "half bias": ((E32, torch.zeros(8).half()), {"top_k": 2}, TypeError, "expected float32; found torch.float16"),
    "short bias": ((E32, torch.zeros(7)), {"top_k": 2}, ValueError, r"expected \[8\]; found \(7,\)"),
    "no experts": ((E32,), {"top_k": 0}, ValueError, "top_k = 0: expected 1 to 8"),
    "too many experts": ((E32,), {"top_k": 5, "n_group": 4, "topk_group": 2}, ValueError, "top_k = 5: expected 1 to 4"),
    "uneven groups": ((E32,), {"top_k": 1, "n_group": 3}, ValueError, "n_group = 3"),
    "too many groups": ((E32,), {"top_k": 1, "n_group": 2, "topk_group": 3}, ValueError, "topk_group = 3"),
    "unknown scores": ((E32,), {"top_k": 1, "scoring_func": "relu"}, ValueError, "scoring_func = 'relu'"),
    "negative least sum": ((E32,), {"top_k": 1, "norm_min": -1.0}, ValueError, "norm_min = -1.0: expected a number"),
    "unknown group score": ((E32,), {"top_k": 1, "group_score": "sum"}, ValueError, "group_score = 'sum'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    args, settings, error, message = REFUSED[name]
    for function in (ops.route, route_reference):
        with pytest.raises(error, match=message):
            function(*args, **settings)


def test_deepseek_v3_of_transformers_agrees() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(hidden_size=32, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4)
    theirs = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.uniform_(theirs.e_score_correction_bias, 0.0, 2.0)  # positive: theirs has no other trap here
    logits, weights, ids = theirs(torch.randn(200, 32))
    routing = ops.route(
        logits,
        theirs.e_score_correction_bias,
        top_k=6,
        n_group=8,
        topk_group=4,
        norm_topk_prob=bool(config.norm_topk_prob),
        routed_scaling_factor=config.routed_scaling_factor,
    )
    order, our_order = ids.sort(dim=1), routing.expert_ids.sort(dim=1)
    assert torch.equal(order.values, our_order.values)
    ours = routing.weights.gather(1, our_order.indices)
    assert torch.allclose(weights.gather(1, order.indices), ours, rtol=2**-20, atol=0)


def test_ernie4_5_of_transformers_agrees() -> None:
    """Scores by softmax, chosen with the bias, divided by their sum or by the minimum; both occur."""
    from transformers import Ernie4_5_MoeConfig
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter

    config = Ernie4_5_MoeConfig(hidden_size=32, moe_num_experts=64, moe_k=6, moe_norm_min=0.3)
    theirs = Ernie4_5_MoeTopKRouter(config)
    torch.nn.init.normal_(theirs.weight, std=0.3)
    torch.nn.init.uniform_(theirs.moe_statics.e_score_correction_bias, -0.1, 0.1)
    logits, weights, ids = theirs(torch.randn(200, 32))
    bias = theirs.moe_statics.e_score_correction_bias[0]
    settings = {"top_k": 6, "scoring_func": "softmax"}
    routing = ops.route(logits, bias, **settings, norm_min=0.3)
    assert torch.equal(ids, routing.expert_ids)
    assert torch.allclose(weights, routing.weights, rtol=2**-20, atol=0)
    sums = routing.weights.sum(dim=1)
    assert (sums < 0.99).sum() > 20 and (sums > 0.999).sum() > 20
    assert not torch.equal(ids, ops.route(logits, **settings).expert_ids)


def wrong_route(bug: str, case: RoutingCase, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, unnormalised weights) of a router with a bug of a released implementation."""
    scores = logits.sigmoid()
    choice = scores + (bias.bfloat16() if bug == "bfloat16 bias" else bias)
    if bug == "bfloat16 bias":
        choice = choice.bfloat16().float()
    members = choice.view(len(choice), case.n_group, -1)
    best = members.amax(-1) if bug == "group by its maximum" else members.topk(2, dim=-1).values.sum(-1)
    groups = best.topk(case.topk_group, dim=1).indices
    mask = torch.ones_like(best).scatter(1, groups, 0).bool().repeat_interleave(members.shape[-1], 1)
    ids = choice.masked_fill(mask, 0.0 if bug == "masked with 0" else -torch.inf).topk(case.top_k, dim=1).indices
    return ids, (choice if bug == "weights from biased scores" else scores).gather(1, ids)


BUGS = ("masked with 0", "weights from biased scores", "bfloat16 bias", "group by its maximum")


@pytest.mark.parametrize("bug", [*BUGS, "none"])
def test_the_cases_see(bug: str) -> None:
    seen = []
    for case in ROUTING_CASES:
        logits, bias = case.inputs(torch.float32)
        if bias is None or case.n_group == 1 or case.group_score == "max" or case.experts == case.n_group:
            continue
        if logits.isnan().any() or not len(logits) or case.logits != "normal":
            continue
        ids, weights = wrong_route(bug, case, logits, bias)
        right = ops.route(logits, bias, **case.settings | {"norm_topk_prob": False, "routed_scaling_factor": 1.0})
        seen.append(not torch.equal(ids, right.expert_ids) or not torch.allclose(weights, right.weights, rtol=2**-20))
    assert any(seen) == (bug != "none") and len(seen) >= 3
