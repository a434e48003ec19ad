"""Top-k routing: selection of each token's experts and their weights."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.ops.library import Tier, check_tier, define, define_gradient

ScoringFunc = Literal["sigmoid", "softmax"]
GroupScore = Literal["top2", "max"]


class Routing(NamedTuple):
    """Routing of T tokens.

    weights [T, K] and scores [T, E] have the logits' dtype; expert_ids [T, K] are int64, best expert first.
    `moe.router.Router` adds the logits [T, E] and its `LoadCounter`. A named tuple, because FSDP and other module
    wrappers look for tensors in tuples.
    """

    weights: Tensor
    expert_ids: Tensor
    scores: Tensor
    logits: Tensor | None = None
    counter: Any = None


def route(
    logits: Tensor,
    correction_bias: Tensor | None = None,
    *,
    top_k: int,
    scoring_func: ScoringFunc = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: GroupScore = "top2",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    norm_min: float = 0.0,
    tier: Tier = "auto",
) -> Routing:
    """Select `top_k` of the E experts for each row of `logits` [T, E] (float32 or float64).

        scores = sigmoid(logits) or softmax(logits)
        choice = scores + correction_bias                     # [E] float32; selection only
        if n_group > 1: each run of E / n_group experts is a group; its score is the sum of its two best choices
            ("top2"; or its only one) or the best ("max"), with NaN counted as -inf; only the experts of the best
            topk_group groups can be selected
        expert_ids = the first top_k in the order below
        weights = scores[expert_ids]                          # unbiased
        if norm_topk_prob: weights /= max(sum(weights), norm_min) + 1e-20
        weights *= routed_scaling_factor

    Experts and groups are sorted by value descending, then index ascending, with NaN last (after -inf), on every
    backend. So the ids of a row are distinct, in [0, E) and in the selected groups for any logits. A NaN logit affects
    only its own row: with softmax, the whole row; with sigmoid, its weight and, through the normalisation, the other
    weights of the row, if it is selected. A sum that is NaN stays NaN.

    Differentiable once from `weights` and `scores` to `logits` (a second differentiation raises RuntimeError, except
    with tier="reference"); `correction_bias` gets no gradient. T = 0 gives empty outputs. `tier` is as for `moe_mlp`.

    Raises TypeError for other dtypes. Raises ValueError if top_k > topk_group * (E / n_group), if E is not divisible by
    n_group, if topk_group > n_group, or if norm_min is negative.

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2; V2 (softmax, max): arXiv 2405.04434;
    norm_min: ERNIE 4.5's moe_norm_min.
    """
    _check(logits, correction_bias, top_k, scoring_func, n_group, topk_group, group_score, norm_min)
    check_tier(tier)
    settings: dict[str, Any] = {
        "top_k": top_k,
        "scoring_func": scoring_func,
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": group_score,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": routed_scaling_factor,
        "norm_min": norm_min,
    }
    if tier == "reference":
        return route_reference(logits, correction_bias, **settings)
    return Routing(*_ROUTE(logits, correction_bias, *settings.values(), tier))


def route_reference(
    logits: Tensor,
    correction_bias: Tensor | None = None,
    *,
    top_k: int,
    scoring_func: ScoringFunc = "sigmoid",
    n_group: int = 1,
    topk_group: int = 1,
    group_score: GroupScore = "top2",
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    norm_min: float = 0.0,
) -> Routing:
    """Definition of `route`."""
    _check(logits, correction_bias, top_k, scoring_func, n_group, topk_group, group_score, norm_min)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=-1)
    with torch.no_grad():
        choice = scores if correction_bias is None else scores + correction_bias
        expert_ids = _select(first_by_sorting, choice, top_k, n_group, topk_group, group_score)
    weights = scores.gather(1, expert_ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True).clamp_min(norm_min) + 1e-20)
    return Routing(weights * routed_scaling_factor, expert_ids, scores.clone())


def _check(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm_min: float,
) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [T, E]; found {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits: expected float32 or float64; found {logits.dtype}; do not route in half precision")
    experts = logits.shape[1]
    if correction_bias is not None:
        if correction_bias.dtype != torch.float32:
            raise TypeError(f"correction_bias: expected float32; found {correction_bias.dtype}")
        if correction_bias.shape != (experts,):
            raise ValueError(f"correction_bias: expected [{experts}]; found {tuple(correction_bias.shape)}")
    if scoring_func not in ("sigmoid", "softmax"):
        raise ValueError(f"scoring_func = {scoring_func!r}: expected 'sigmoid' or 'softmax'")
    if group_score not in ("top2", "max"):
        raise ValueError(f"group_score = {group_score!r}: expected 'top2' or 'max'")
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group = {n_group}: expected a divisor of the {experts} experts")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group = {topk_group}: expected 1 to n_group = {n_group}")
    candidates = topk_group * (experts // n_group)
    if not 1 <= top_k <= candidates:
        raise ValueError(
            f"top_k = {top_k}: expected 1 to {candidates}, the experts of {topk_group} in {n_group} groups"
        )
    if not norm_min >= 0:
        raise ValueError(f"norm_min = {norm_min}: expected a number of at least 0")


def group_scores(choice: Tensor, n_group: int, group_score: str) -> Tensor:
    """Compute group scores [T, n_group] of choice [T, E]."""
    members = choice.view(choice.shape[0], n_group, choice.shape[1] // n_group)
    members = members.masked_fill(members.isnan(), -torch.inf)
    if group_score == "max":
        return members.amax(dim=-1)
    return members.topk(min(2, members.shape[-1]), dim=-1).values.sum(dim=-1)


def members_of(groups: Tensor, n_group: int, experts: int) -> Tensor:
    """Return the mask [T, E] of the experts in groups [T, topk_group]."""
    mask = torch.zeros(groups.shape[0], n_group, dtype=torch.bool, device=groups.device).scatter_(1, groups, True)
    return mask.repeat_interleave(experts // n_group, dim=1)


def first_by_sorting(values: Tensor, excluded: Tensor | None, k: int) -> Tensor:
    """Return the indices [T, k] of the first k columns in the order of `route`; `excluded` columns come after NaN."""
    last = values.isnan().to(torch.int8)
    order = values.masked_fill(last.bool(), -torch.inf).sort(dim=1, descending=True, stable=True).indices
    if excluded is not None:
        last = last + 2 * excluded.to(torch.int8)
    return order.gather(1, last.gather(1, order).sort(dim=1, stable=True).indices)[:, :k].contiguous()


def _first_by_key(values: Tensor, excluded: Tensor | None, k: int) -> Tensor:
    """Compute `first_by_sorting` for float32 by one top-k over distinct integers instead of two full sorts.

    The upper half of a key is the value, as the integer with the same order; the lower half is the reversed index.
    Values are sums with a score >= +0, so -0 does not occur and equal floats have equal bits. The reversed index is at
    least 1, so the smallest integer, for excluded columns, is below that of a NaN in the last column.
    """
    bits = values.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits.masked_fill_(values.isnan(), -(2**31))
    index = torch.arange(values.shape[1], 0, -1, device=values.device)
    keys = bits.to(torch.int64).mul_(2**32).add_(index)
    if excluded is not None:
        keys.masked_fill_(excluded, -(2**63))
    return keys.topk(k, dim=1).indices


def _select(first: Any, choice: Tensor, top_k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Select expert ids [T, top_k] with `first`: `first_by_sorting` or, for float32, `_first_by_key`."""
    excluded = None
    if n_group > 1:
        groups = first(group_scores(choice, n_group, group_score), None, topk_group)
        excluded = ~members_of(groups, n_group, choice.shape[1])
    return first(choice, excluded, top_k)


def _select_for_one(choice: Tensor, top_k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """Compute `_select` for T = 1 on the CPU with NumPy, whose calls take less time than torch's.

    In a stable ascending sort of the negated values, NaN comes last.
    """
    values = -choice.numpy()[0]
    if n_group == 1:
        return torch.from_numpy(values.argsort(kind="stable")[None, :top_k])
    members = values.reshape(n_group, -1)
    size = members.shape[1]
    ranked = np.fmin(members, np.inf)  # without NaN
    ranked.sort(axis=1)
    with np.errstate(all="ignore"):  # the sum may overflow, or be inf - inf
        scores = ranked[:, : 1 if group_score == "max" else 2].sum(axis=1)
    groups = scores.argsort(kind="stable")[:topk_group]
    groups.sort()
    first = members.take(groups, axis=0).reshape(-1).argsort(kind="stable")[None, :top_k]
    return torch.from_numpy(groups.take(first // size) * size + first % size)


def _forward(
    logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    norm_min: float,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if correction_bias is None else scores + correction_bias
    selection = choice, top_k, n_group, topk_group, group_score
    if len(choice) == 1 and choice.device.type == "cpu":
        expert_ids = _select_for_one(*selection)
    else:
        expert_ids = _select(_first_by_key if choice.dtype == torch.float32 else first_by_sorting, *selection)
    weights = scores.gather(1, expert_ids)
    if norm_topk_prob:
        total = weights.sum(dim=-1, keepdim=True)  # never negative
        weights /= (total.clamp_min_(norm_min) if norm_min > 0 else total).add_(1e-20)
    if routed_scaling_factor != 1.0:
        weights *= routed_scaling_factor
    return weights, expert_ids, scores


def _forward_fake(logits: Tensor, correction_bias: Tensor | None, top_k: int, *settings: Any) -> tuple[Tensor, ...]:
    tokens = logits.shape[0]
    weights = logits.new_empty(tokens, top_k)
    return weights, logits.new_empty(tokens, top_k, dtype=torch.int64), logits.new_empty(logits.shape)


def _backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    expert_ids: Tensor,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    norm_min: float,
) -> Tensor:
    grad = scores.new_zeros(scores.shape) if grad_scores is None else grad_scores.clone()
    if grad_weights is not None:
        part = grad_weights * routed_scaling_factor
        if norm_topk_prob:
            selected = scores.gather(1, expert_ids)
            total = selected.sum(dim=-1, keepdim=True)
            raised, total = total < norm_min, total.clamp_min(norm_min) + 1e-20
            through_total = (part * (selected / total)).sum(dim=-1, keepdim=True)
            part = (part - through_total.masked_fill(raised, 0)) / total
        grad.scatter_add_(1, expert_ids, part)  # deterministic, because the ids of a row are distinct
    if scoring_func == "sigmoid":
        return grad.mul_(scores).mul_(1 - scores)
    return grad.sub_((grad * scores).sum(dim=-1, keepdim=True)).mul_(scores)


def _backward_fake(grad_weights: Tensor | None, grad_scores: Tensor | None, scores: Tensor, *settings: Any) -> Tensor:
    return scores.new_empty(scores.shape)


_ROUTE = define(
    "route(Tensor logits, Tensor? correction_bias, int top_k, str scoring_func, int n_group, int topk_group, "
    "str group_score, bool norm_topk_prob, float routed_scaling_factor, float norm_min, str tier) "
    "-> (Tensor, Tensor, Tensor)",
    kernel_module="routing",
    cpu=_forward,
    fake=_forward_fake,
    tiered=True,
)
_ROUTE_BACKWARD = define(
    "route_backward(Tensor? grad_weights, Tensor? grad_scores, Tensor scores, Tensor expert_ids, str scoring_func, "
    "bool norm_topk_prob, float routed_scaling_factor, float norm_min, str tier) -> Tensor",
    kernel_module="routing",
    cpu=_backward,
    fake=_backward_fake,
    tiered=True,
)


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> None:
    _, expert_ids, scores = result
    ctx.save_for_backward(scores, expert_ids)
    ctx.settings = args[3], *args[7:]
    ctx.mark_non_differentiable(expert_ids)
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, saved: tuple[Any, ...], grad_weights: Tensor | None, _: None, grad_scores: Tensor | None
) -> tuple[Any, ...]:
    grad = None
    if ctx.needs_input_grad[0] and (grad_weights is not None or grad_scores is not None):
        grad = _ROUTE_BACKWARD(grad_weights, grad_scores, *saved, *ctx.settings)
    return grad, *(None,) * 10


define_gradient(_ROUTE, _save, _gradient)
