"""Expert MLP of a Mixture-of-Experts layer, as one operator."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config import SwiGLU
from moe.ops.activation import swiglu_backward_into, swiglu_into, swiglu_reference
from moe.ops.library import Tier, autocast, check_tier, define, define_gradient, has_values
from moe.ops.matmul import (
    can_group,
    group_products_into,
    grouped_product,
    grouped_product_into,
    most_grouped,
    product,
)
from moe.ops.permutation import check_ids, check_weights, combine, count_slots, sort_slots


def moe_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: SwiGLU = SwiGLU(),
    tier: Tier = "auto",
) -> Tensor:
    """Apply its experts to each token and sum their outputs by weight: x [T, D] -> [T, D].

        out[t] = sum over k, in order, of weights[t, k] * expert(expert_ids[t, k], x[t])
        expert(e, x) = swiglu(x @ gate_up[e].T + gate_up_bias[e]) @ down[e].T + down_bias[e]

    gate_up [E, 2F, D] (gate rows first), down [E, D, F], gate_up_bias [E, 2F] and down_bias [E, D] have x's dtype
    (float32, float64, bfloat16 or float16) and any strides. `swiglu` is `moe.ops.swiglu` with `activation`. weights
    [T, K] are float32 or float64 and never cast; expert_ids [T, K] are int64. An id of -1 means that the expert is
    absent: nothing is added, even if its weight is NaN, and the weight gets a zero gradient. The ids of a token may
    repeat.

    Products and the sum over k accumulate in float32 or wider; the sum is rounded once. A token without experts gives
    zero. T = 0 and K = 0 are valid. NaN in a token affects only its own row and the gradients of its experts.
    Identical inputs give bit-identical results, forward and backward; no atomics are used.

    Differentiable once in everything but the ids: a second differentiation raises RuntimeError, except for the
    reference. An expert without tokens gets an exactly zero gradient. The arguments and the pre-activation [R, 2F] are
    saved for the backward pass. Under autocast x and the expert parameters are cast, as for a matrix product, and the
    output has that dtype.

    `tier`: "auto" selects the fastest implementation for the device; on a GPU without kernels, torch's operators, with
    one warning that states the reason. "triton" selects the Triton kernels and raises ValueError if they cannot run
    (CPU tensors require TRITON_INTERPRET=1). "reference" selects the definition, plain differentiable PyTorch.

    Raises ValueError for wrong shapes or an unknown tier, TypeError for wrong dtypes, IndexError for an id that is
    neither -1 nor in [0, E) (on CPU; a device assertion on CUDA).
    """
    x, gate_up, down, gate_up_bias, down_bias = autocast(x, gate_up, down, gate_up_bias, down_bias)  # pyright: ignore
    _check(x, gate_up, down, weights, expert_ids, gate_up_bias, down_bias)
    check_tier(tier)
    if tier == "reference" and x.device.type != "meta":
        return moe_mlp_reference(x, gate_up, down, weights, expert_ids, gate_up_bias, down_bias, activation)
    if tier == "triton" and x.device.type == "cpu" and has_values(expert_ids):
        sort_slots(expert_ids, gate_up.shape[0])  # raises for ids out of range, which the interpreter does not check
    return _MOE_MLP_FORWARD(
        x,
        gate_up,
        down,
        weights,
        expert_ids,
        gate_up_bias,
        down_bias,
        activation.limit,
        activation.alpha,
        activation.beta,
        False,
        tier,
    )[0]


def moe_mlp_reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: SwiGLU = SwiGLU(),
) -> Tensor:
    """Definition of `moe_mlp`."""
    sort_slots(expert_ids, gate_up.shape[0])  # raises for ids out of range
    wide = torch.promote_types(x.dtype, weights.dtype)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for k in range(expert_ids.shape[1]):
        ids = expert_ids[:, k]
        for e in range(gate_up.shape[0]):
            tokens = (ids == e).nonzero().squeeze(1)
            up = x.index_select(0, tokens) @ gate_up[e].t()
            up = up if gate_up_bias is None else up + gate_up_bias[e]
            rows = swiglu_reference(up, activation) @ down[e].t()
            rows = rows if down_bias is None else rows + down_bias[e]
            out = out.index_add(0, tokens, rows * weights[:, k].index_select(0, tokens)[:, None])
    # Adds an empty sum of each argument, so that each has a (zero) gradient even if K or E is 0.
    for tensor in (x, gate_up, down, weights, gate_up_bias, down_bias):
        out = out if tensor is None else out + tensor[:0].sum()
    return out.to(x.dtype)


def _check(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    check_ids(x, expert_ids)
    check_weights(weights, expert_ids)
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16; found {x.dtype}")
    width = x.shape[1]
    if gate_up.dim() != 3 or gate_up.shape[1] % 2 or gate_up.shape[2] != width:
        raise ValueError(f"gate_up: expected [E, 2F, {width}]; found {tuple(gate_up.shape)}")
    experts, twice = gate_up.shape[:2]
    expected = {
        "gate_up": (gate_up, gate_up.shape),
        "down": (down, (experts, width, twice // 2)),
        "gate_up_bias": (gate_up_bias, (experts, twice)),
        "down_bias": (down_bias, (experts, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}; found {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype}, the dtype of x; found {tensor.dtype}")


# Products with fewer multiplications are small: the call takes longer than the multiplication. Small experts are
# batched up to _BATCH_ROWS rows, which fit into the cache. In the forward pass, so are experts with few rows, for which
# the calls take a tenth of the time. Gradients would have to be copied out of the batch.
_SMALL_PRODUCT, _FEW_ROWS, _BATCH_ROWS = 2**20, 4, 1024

# C libraries take as much memory as this from the operating system, as pages of zeros, instead of reusing it.
_ZERO_BYTES, _ALIGNMENT = 2**25, 64


@dataclass(frozen=True)
class _Batch:
    """Rows start:end, of experts first:last, that are multiplied together; `ends` are relative to start."""

    first: int
    last: int
    start: int
    end: int
    ends: Tensor


def _batches(offsets: Tensor, gate_up: Tensor, down: Tensor, few_rows: int) -> list[_Batch]:
    """Split all rows into batches: one per large expert, and one per run of small ones and those with `few_rows`."""
    most = 0
    if len(gate_up) and can_group(gate_up, down):
        small = _SMALL_PRODUCT // max(gate_up[0].numel(), 1)
        most = most_grouped(gate_up.dtype, small, few_rows)
    batches: list[_Batch] = []
    first = start = 0
    ends = offsets.tolist()

    def close(last: int, end: int) -> None:
        nonlocal first, start
        if end > start:
            batches.append(_Batch(first, last, start, end, offsets[first:last] - start))
        first, start = last, end

    for expert, end in enumerate(ends):
        before = ends[expert - 1] if expert else 0
        if end - before > most:
            close(expert, before)
            close(expert + 1, end)
        elif end - start >= _BATCH_ROWS:
            close(expert + 1, end)
    close(len(ends), ends[-1] if ends else 0)
    return batches


def _runs_without_rows(offsets: Tensor) -> Iterator[slice]:
    """Yield the runs of experts without rows, whose gradients are zero. They are in no batch, or in one with others.

    Filling a run takes two thirds of the time of `index_fill_`.
    """
    start, before = None, 0
    for expert, end in enumerate([*offsets.tolist(), -1]):
        if end == before:
            start = expert if start is None else start
        elif start is not None:
            yield slice(start, expert)
            start = None
        before = end


def _zeros_like(weight: Tensor) -> Tensor:
    """Return zeros that cost nothing until they are read or written: NumPy's memory comes from the operating system.

    Backward of one token of OLMoE, whose gradients have 805 MB, spends nine tenths of its time on filling them.
    """
    memory = torch.from_numpy(np.zeros(weight.nbytes + _ALIGNMENT, dtype=np.uint8))
    start = -memory.data_ptr() % _ALIGNMENT
    return memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)


def _rows_of(bias: Tensor, batch: _Batch) -> Tensor:
    """Return the bias of each row of the batch, or one that all rows share, of bias [E, N]."""
    if batch.last - batch.first == 1:
        return bias[batch.first]
    return bias[batch.first : batch.last].repeat_interleave(batch.ends.diff(prepend=batch.ends.new_zeros(1)), dim=0)


def _forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    limit: float | None,
    alpha: float,
    beta: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    if expert_ids.shape[0] == 1 and not save and x.device.type == "cpu":
        experts = Products(
            len(gate_up),
            down.shape[2],
            lambda rows, expert: product(rows, gate_up[expert].t()),
            lambda rows, expert: product(rows, down[expert].t()),
        )
        y = _one_token(x, experts, weights, expert_ids, gate_up_bias, down_bias, limit, alpha, beta)
        return y, x.new_empty(0, gate_up.shape[1])
    order = sort_slots(expert_ids, gate_up.shape[0])
    batches = _batches(order.offsets, gate_up, down, _FEW_ROWS)
    routed = batches[-1].end if batches else 0
    tokens = order.slots // expert_ids.shape[1]
    rows = x.new_empty(order.slots.shape[0], x.shape[1])
    pre = x.new_empty(order.slots.shape[0] if save else 0, gate_up.shape[1])
    pre[routed:].zero_()
    # Both products run per batch, while its rows are in cache; only the result has R rows.
    hidden = x.new_empty(max((batch.end - batch.start for batch in batches), default=0), down.shape[2])
    for batch in batches:
        experts, here = slice(batch.first, batch.last), slice(batch.start, batch.end)
        part = grouped_product(x.index_select(0, tokens[here]), gate_up[experts].mT, batch.ends)
        if gate_up_bias is not None:
            part.add_(_rows_of(gate_up_bias, batch))
        if save:
            pre[here] = part
        act = swiglu_into(hidden[: batch.end - batch.start], part, limit, alpha, beta)
        grouped_product_into(rows[here], act, down[experts].mT, batch.ends)
        if down_bias is not None:
            rows[here].add_(_rows_of(down_bias, batch))
    return combine(rows, order.position, weights), pre


@dataclass(frozen=True)
class Products:
    """Products of `count` experts of width `hidden`, F, with their weights.

    up(rows [R, D], expert) -> [R, 2F] and down(rows [R, F], expert) -> [R, D].
    """

    count: int
    hidden: int
    up: Callable[[Tensor, int], Tensor]
    down: Callable[[Tensor, int], Tensor]


def mlp_by_expert(
    x: Tensor,
    experts: Products,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    limit: float | None,
    alpha: float,
    beta: float,
) -> Tensor:
    """Compute `moe_mlp` of checked arguments, one expert after the other, without gradients."""
    if len(x) == 1:
        return _one_token(x, experts, weights, expert_ids, gate_up_bias, down_bias, limit, alpha, beta)
    order = sort_slots(expert_ids, experts.count)
    tokens = order.slots // expert_ids.shape[1]
    rows = x.new_empty(order.slots.shape[0], x.shape[1])
    start = 0
    for expert, end in enumerate(order.offsets.tolist()):
        if end == start:
            continue
        part = experts.up(x.index_select(0, tokens[start:end]), expert)
        if gate_up_bias is not None:
            part.add_(gate_up_bias[expert])
        hidden = swiglu_into(part.new_empty(end - start, experts.hidden), part, limit, alpha, beta)
        rows[start:end] = experts.down(hidden, expert)
        if down_bias is not None:
            rows[start:end].add_(down_bias[expert])
        start = end
    return combine(rows, order.position, weights)


def _one_token(
    x: Tensor,
    experts: Products,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    limit: float | None,
    alpha: float,
    beta: float,
) -> Tensor:
    """`mlp_by_expert` for T = 1, which needs no sorting or gathering: rows are in order of k."""
    ids = expert_ids[0].tolist()
    here = [k for k, expert in enumerate(ids) if expert != -1]
    for k in here:
        if not 0 <= ids[k] < experts.count:
            raise IndexError(f"expert_ids: {ids[k]} is neither -1 nor in [0, {experts.count})")
    if not here:
        return torch.zeros_like(x)
    pre = torch.cat([experts.up(x, ids[k]) for k in here])
    if gate_up_bias is not None:
        pre += gate_up_bias.index_select(0, expert_ids[0, here])
    hidden = swiglu_into(pre.new_empty(len(here), experts.hidden), pre, limit, alpha, beta)
    rows = torch.cat([experts.down(hidden[i : i + 1], ids[k]) for i, k in enumerate(here)])
    if down_bias is not None:
        rows += down_bias.index_select(0, expert_ids[0, here])
    weight = weights[0] if len(here) == len(ids) else weights[0, here]
    return (rows * weight[:, None]).sum(dim=0, keepdim=True).to(x.dtype)


def _forward_fake(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    save = settings[-2]
    return x.new_empty(x.shape), x.new_empty(expert_ids.shape[0] * expert_ids.shape[1] if save else 0, gate_up.shape[1])


def _forward_flops(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor, *settings: Any
) -> int:
    return 2 * count_slots(expert_ids) * (gate_up.shape[1] * gate_up.shape[2] + down.shape[1] * down.shape[2])


def _backward(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    limit: float | None,
    alpha: float,
    beta: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of (x, gate_up, down, weights, gate_up_bias, down_bias); empty if not needed."""
    order = sort_slots(expert_ids, gate_up.shape[0])
    tokens = order.slots // expert_ids.shape[1]
    batches, unused = _batches(order.offsets, gate_up, down, 0), list(_runs_without_rows(order.offsets))
    # A batch of several experts also writes to those without rows.
    is_zero = bool(unused) and gate_up.nbytes >= _ZERO_BYTES and all(b.last - b.first == 1 for b in batches)

    def gradient(of: Tensor | None, need: bool) -> Tensor:
        if of is None or not need:
            return x.new_empty(0)
        return _zeros_like(of) if is_zero and of.dim() == 3 else of.new_empty(of.shape)

    grad_x, grad_gate_up, grad_down, grad_weights, grad_gate_up_bias, grad_down_bias = map(
        gradient, (x, gate_up, down, weights, gate_up_bias, down_bias), needed
    )
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = needed
    need_pre = need_x or need_gate_up or need_gate_up_bias
    grad_rows = x.new_empty(order.slots.shape[0] if need_x else 0, x.shape[1])
    sorted_weights = weights.reshape(-1, 1).index_select(0, order.slots)
    sorted_dots = torch.zeros_like(sorted_weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    for batch in batches:
        experts, here = slice(batch.first, batch.last), slice(batch.start, batch.end)
        token, weight, part = tokens[here], sorted_weights[here], pre[here]
        grad_y = grad.index_select(0, token)
        hidden = swiglu_into(part.new_empty(len(part), down.shape[2], dtype=wide), part, limit, alpha, beta)
        if need_down:
            group_products_into(grad_down[experts], grad_y, (hidden * weight).to(x.dtype), batch.ends)
        if need_down_bias:
            _sum_rows_into(grad_down_bias[experts], grad_y * weight, batch.ends)
        if not need_pre and not need_weights:
            continue
        grad_hidden = grouped_product(grad_y, down[experts], batch.ends)
        if need_weights:
            # The gradient of a weight is grad_y . (down @ hidden) = grad_hidden . hidden, so outputs need not be saved.
            dots = (grad_hidden * hidden).sum(dim=1, dtype=weights.dtype)
            if down_bias is not None:
                dots += (grad_y.to(wide) * _rows_of(down_bias, batch)).sum(dim=1, dtype=weights.dtype)
            sorted_dots[here, 0] = dots
        if need_pre:
            grad_hidden = (grad_hidden * weight).to(x.dtype)
            grad_pre = swiglu_backward_into(torch.empty_like(part), grad_hidden, part, limit, alpha, beta)
            if need_gate_up:
                group_products_into(grad_gate_up[experts], grad_pre, x.index_select(0, token), batch.ends)
            if need_gate_up_bias:
                _sum_rows_into(grad_gate_up_bias[experts], grad_pre, batch.ends)
            if need_x:
                grouped_product_into(grad_rows[here], grad_pre, gate_up[experts], batch.ends)
    for run in unused:
        for per_expert in (grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias):
            if not (is_zero and per_expert.dim() == 3):
                per_expert[run].zero_()
    if need_x:
        grad_x = combine(grad_rows, order.position, None)
    if need_weights:
        # Absent slots come last, where the dots are zero.
        grad_weights.view(-1, 1).index_copy_(0, order.slots, sorted_dots)
    return grad_x, grad_gate_up, grad_down, grad_weights, grad_gate_up_bias, grad_down_bias


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    limit: float | None,
    alpha: float,
    beta: float,
    needed: list[bool],
    tier: str,
) -> tuple[Tensor, ...]:
    return tuple(
        (t if need and t is not None else x).new_empty(t.shape if need and t is not None else (0,))
        for t, need in zip((x, gate_up, down, weights, gate_up_bias, down_bias), needed, strict=True)
    )


def _backward_flops(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor, *settings: Any
) -> int:
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, _ = settings[-2]
    through_down = need_x or need_gate_up or need_gate_up_bias or need_weights
    up, back = gate_up.shape[1] * gate_up.shape[2], down.shape[1] * down.shape[2]
    return 2 * count_slots(expert_ids) * (up * (need_x + need_gate_up) + back * (through_down + need_down))


def _sum_rows_into(out: Tensor, rows: Tensor, ends: Tensor) -> None:
    """Write the sum of each group's rows, in order, to out [G, N]."""
    start = 0
    for total, end in zip(out, ends.tolist(), strict=True):
        total.copy_(rows[start:end].sum(dim=0))
        start = end


_MOE_MLP_FORWARD = define(
    "moe_mlp_forward(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor expert_ids, Tensor? gate_up_bias, "
    "Tensor? down_bias, float? limit, float alpha, float beta, bool save, str tier) -> (Tensor, Tensor)",
    kernel_module="mlp",
    cpu=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
    tiered=True,
)
_MOE_MLP_BACKWARD = define(
    "moe_mlp_backward(Tensor grad, Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor expert_ids, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor pre, float? limit, float alpha, float beta, bool[] needed, "
    "str tier) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel_module="mlp",
    cpu=_backward,
    fake=_backward_fake,
    flops=_backward_flops,
    tiered=True,
)


def _forward_for_gradient(*args: Any) -> tuple[Tensor, Tensor]:
    *rest, _, tier = args
    return _MOE_MLP_FORWARD(*rest, True, tier)


def _save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.limit, ctx.alpha, ctx.beta, _, ctx.tier = args
    ctx.save_for_backward(*tensors, result[1])
    ctx.mark_non_differentiable(result[1])


def _gradient(ctx: Any, saved: tuple[Any, ...], grad: Tensor, _: Any) -> tuple[Any, ...]:
    # The ids (argument 4) and the last five arguments have no gradient.
    needed = [need for i, need in enumerate(ctx.needs_input_grad[:7]) if i != 4]
    results = _MOE_MLP_BACKWARD(grad, *saved, ctx.limit, ctx.alpha, ctx.beta, needed, ctx.tier)
    grads = [result if need else None for result, need in zip(results, needed, strict=True)]
    return *grads[:4], None, *grads[4:], None, None, None, None, None


define_gradient(_MOE_MLP_FORWARD, _save, _gradient, forward=_forward_for_gradient)
