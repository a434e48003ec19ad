"""Top-k routing, one program per token."""

# Triton's decorator keeps the signature and hides the result; constexprs take plain values, launches also options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton.activation import exp, sigmoid


@triton.jit
def key(value, index, last):
    """Distinct integers whose descending order is: value descending, index ascending, NaN last.

    The upper half is the value as an integer of the same order, the lower half the reversed index. Values are sums that
    start from a score >= +0, so -0 does not occur. The smallest int64 is reserved for "never".
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(value != value, -2147483648, bits)
    return bits.to(tl.int64) * 4294967296 + (last - index + 1)


@triton.jit
def route_kernel(
    logits,
    bias,
    weights,
    expert_ids,
    scores,
    scale,
    norm_min,
    stride_logits,
    num_experts,
    members,
    HAS_BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP2: tl.constexpr,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    never: tl.constexpr = -9223372036854775808
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_E)
    expert = group[:, None] * members + member[None, :]
    real = (group[:, None] < N_GROUP) & (member[None, :] < members)
    value = tl.load(logits + token * stride_logits + expert, mask=real, other=-float("inf"))
    if SOFTMAX:
        top = tl.max(tl.max(value, 1), 0)
        e = exp(value - top)
        e = tl.where(real, e, 0.0)
        score = tl.div_rn(e, tl.sum(tl.sum(e, 1), 0))
    else:
        score = sigmoid(value)
    tl.store(scores + token * num_experts + expert, score, mask=real)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0)

    keys = tl.where(real, key(choice, expert, num_experts - 1), never)
    if N_GROUP > 1:
        number = tl.where(real & (choice == choice), choice, -float("inf"))
        best = tl.max(number, 1)
        if TOP2:
            order = tl.where(real, key(number, expert, num_experts - 1), never)
            first = order == tl.max(order, 1)[:, None]
            second = tl.max(tl.where(first, -float("inf"), number), 1)
            if members > 1:
                best += second
        group_keys = tl.where(group < N_GROUP, key(best, group, N_GROUP - 1), never)
        chosen = tl.zeros((BLOCK_G,), dtype=tl.int1)
        for _ in tl.static_range(TOPK_GROUP):
            taken = group_keys == tl.max(group_keys, 0)
            chosen = chosen | taken
            group_keys = tl.where(taken, never, group_keys)
        keys = tl.where(chosen[:, None], keys, never)

    k_index = tl.arange(0, BLOCK_K)
    weight = tl.zeros((BLOCK_K,), dtype=tl.float32)
    ids = tl.zeros((BLOCK_K,), dtype=tl.int32)
    total = tl.zeros((), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        taken = keys == tl.max(tl.max(keys, 1), 0)
        s = tl.sum(tl.sum(tl.where(taken, score, 0.0), 1), 0)
        i = tl.sum(tl.sum(tl.where(taken, expert, 0), 1), 0)
        weight = tl.where(k_index == k, s, weight)
        ids = tl.where(k_index == k, i, ids)
        total += s
        keys = tl.where(taken, never, keys)
    if NORMALISE:
        total = tl.where(total < norm_min, norm_min, total)  # NaN stays NaN
        weight = tl.div_rn(weight, total + 1e-20)
    weight *= scale
    tl.store(weights + token * TOP_K + k_index, weight, mask=k_index < TOP_K)
    tl.store(expert_ids + token * TOP_K + k_index, ids.to(tl.int64), mask=k_index < TOP_K)


@triton.jit
def route_backward_kernel(
    grad_weights,
    grad_scores,
    scores,
    expert_ids,
    grad_logits,
    scale,
    norm_min,
    num_experts,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    real = expert < num_experts
    score = tl.load(scores + token * num_experts + expert, mask=real, other=0.0)
    grad = tl.zeros((BLOCK_E,), dtype=tl.float32)
    if HAS_SCORES:
        grad = tl.load(grad_scores + token * num_experts + expert, mask=real, other=0.0)
    if HAS_WEIGHTS:
        k = tl.arange(0, BLOCK_K)
        slot = token * TOP_K + k
        ids = tl.load(expert_ids + slot, mask=k < TOP_K, other=0)
        part = tl.load(grad_weights + slot, mask=k < TOP_K, other=0.0) * scale
        if NORMALISE:
            selected = tl.load(scores + token * num_experts + ids, mask=k < TOP_K, other=0.0)
            total = tl.sum(selected, 0)
            raised = total < norm_min
            total = tl.where(raised, norm_min, total) + 1e-20
            through_total = tl.where(raised, 0.0, tl.sum(part * tl.div_rn(selected, total), 0))
            part = tl.div_rn(part - through_total, total)
        # The ids of a row are distinct, so each expert gets at most one part.
        hit = (expert[:, None] == ids[None, :]) & (k[None, :] < TOP_K)
        grad += tl.sum(tl.where(hit, part[None, :], 0.0), 1)
    grad = (grad - tl.sum(grad * score, 0)) * score if SOFTMAX else grad * score * (1.0 - score)
    tl.store(grad_logits + token * num_experts + expert, grad, mask=real)


def route(
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
    tokens, experts = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    scores = torch.empty((tokens, experts), dtype=torch.float32, device=logits.device)
    if tokens:
        block_g, block_e = triton.next_power_of_2(n_group), triton.next_power_of_2(experts // n_group)
        route_kernel[(tokens,)](
            logits,
            logits if correction_bias is None else correction_bias.contiguous(),
            weights,
            expert_ids,
            scores,
            routed_scaling_factor,
            norm_min,
            logits.stride(0),
            experts,
            experts // n_group,
            HAS_BIAS=correction_bias is not None,
            SOFTMAX=scoring_func == "softmax",
            NORMALISE=norm_topk_prob,
            TOP2=group_score == "top2",
            TOP_K=top_k,
            N_GROUP=n_group,
            TOPK_GROUP=topk_group,
            BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK_G=block_g,
            BLOCK_E=block_e,
            num_warps=1 if block_g * block_e <= 512 else 4,
        )
    return weights, expert_ids, scores


def route_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    expert_ids: Tensor,
    scoring_func: str,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    norm_min: float,
) -> Tensor:
    tokens, experts = scores.shape
    grad_logits = torch.empty((tokens, experts), dtype=torch.float32, device=scores.device)
    if tokens:
        block_e, block_k = triton.next_power_of_2(experts), triton.next_power_of_2(expert_ids.shape[1])
        route_backward_kernel[(tokens,)](
            scores if grad_weights is None else grad_weights.contiguous(),
            scores if grad_scores is None else grad_scores.contiguous(),
            scores.contiguous(),
            expert_ids.contiguous(),
            grad_logits,
            routed_scaling_factor,
            norm_min,
            experts,
            HAS_WEIGHTS=grad_weights is not None,
            HAS_SCORES=grad_scores is not None,
            SOFTMAX=scoring_func == "softmax",
            NORMALISE=norm_topk_prob,
            TOP_K=expert_ids.shape[1],
            BLOCK_K=block_k,
            BLOCK_E=block_e,
            num_warps=1 if block_e * block_k <= 512 else 4,
        )
    return grad_logits
