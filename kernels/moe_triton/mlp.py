"""The expert MLP, forward and backward.

Forward takes three kernels: gather, both halves of the up projection and SwiGLU; the down projection; the sum over k.
They pass on the hidden rows [R, F] and the expert outputs [R, D]. The pre-activation [R, 2F] is kept for the backward
pass. Backward: one kernel multiplies the gathered gradient with the down projection, and its epilogue computes
everything that needs the pre-activation. The weight gradients are sums over ragged rows and gather operands that have
a row per token. The input's gradient is a row product and the same sum over k.

Without gradients, up to SMALL tokens take a path without a sort: each program finds its expert's slots itself, and rows
are in the order of slots.
"""

# Triton's decorator keeps the signature and hides the result; constexprs take plain values, launches also options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton import tiling
from moe_triton.activation import SwiGLU, swiglu_backward_tile, swiglu_tile
from moe_triton.grouped_gemm import locate, multiply, products, rows
from moe_triton.permutation import Order, combine, sort

SMALL = 64


@triton.jit
def up_tile(
    x_at, gate_at, up_at, inner, width, stride_wk, column, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(gate, up) in float32 from pointers to rows of x and to rows of the two halves of a weight."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_at + k[None, :]
    step = k[:, None].to(tl.int64) * stride_wk
    gate_at, up_at = gate_at + step, up_at + step
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, inner, BLOCK_K):
        x = tl.load(x_at) if EVEN_K else tl.load(x_at, mask=(first + k)[None, :] < inner, other=0)
        if EVEN_K and EVEN_N:
            gate_w = tl.load(gate_at)
            up_w = tl.load(up_at)
        else:
            mask = ((first + k)[:, None] < inner) & (column[None, :] < width)
            gate_w = tl.load(gate_at, mask=mask, other=0)
            up_w = tl.load(up_at, mask=mask, other=0)
        gate = tl.dot(x, gate_w, gate, input_precision="ieee")
        up = tl.dot(x, up_w, up, input_precision="ieee")
        x_at += BLOCK_K
        gate_at += tl.full((), BLOCK_K, tl.int64) * stride_wk
        up_at += tl.full((), BLOCK_K, tl.int64) * stride_wk
    return gate, up


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns.

    Epilogues halve a tile into PARTS and process these one by one, because their operands for a whole tile do not fit
    into registers beside the accumulator.
    """
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def up_epilogue(
    gate, up, bias, pre, hidden, row, here, start_n, expert, width, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Bias, activation and stores of the up projection."""
    if PARTS > 1:
        half: tl.constexpr = BLOCK_N // 2
        gate_left, gate_right = halves(gate, BLOCK_M, BLOCK_N)
        up_left, up_right = halves(up, BLOCK_M, BLOCK_N)
        up_epilogue(
            gate_left, up_left, bias, pre, hidden, row, here, start_n, expert, width, ACTIVATION, HAS_BIAS, SAVE,
            BLOCK_M, half, PARTS // 2,
        )  # fmt: skip
        up_epilogue(
            gate_right, up_right, bias, pre, hidden, row, here, start_n + half, expert, width, ACTIVATION, HAS_BIAS,
            SAVE, BLOCK_M, half, PARTS // 2,
        )  # fmt: skip
    else:
        column = start_n + tl.arange(0, BLOCK_N)
        mask = here[:, None] & (column < width)[None, :]
        if HAS_BIAS:
            bias_at = bias + expert.to(tl.int64) * (2 * width) + column
            gate += tl.load(bias_at, mask=column < width, other=0).to(tl.float32)[None, :]
            up += tl.load(bias_at + width, mask=column < width, other=0).to(tl.float32)[None, :]
        if SAVE:
            at = pre + row[:, None].to(tl.int64) * (2 * width) + column[None, :]
            tl.store(at, gate, mask=mask)
            tl.store(at + width, up, mask=mask)
        at = hidden + row[:, None].to(tl.int64) * width + column[None, :]
        tl.store(at, swiglu_tile(gate, up, ACTIVATION, hidden.dtype.element_ty == tl.float32), mask=mask)


@triton.jit(do_not_specialize=["num_experts", "blocks_n"])
def up_kernel(
    x, gate_up, bias, pre, hidden, tokens, tile_group, tile_start, starts, num_experts, inner, width, stride_xm,
    stride_we, stride_wn, stride_wk, blocks_n, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [R, F] and, with SAVE, pre [R, 2F]; rows without an expert are zero in pre."""
    expert, first, end, block_n = locate(tl.program_id(0), tile_group, tile_start, starts, blocks_n, BLOCK_M, GROUP_M)
    if expert < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert == num_experts:
        if SAVE:
            mask = (row < end)[:, None] & (column < width)[None, :]
            pre_at = pre + row[:, None].to(tl.int64) * (2 * width) + column[None, :]
            nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=pre.dtype.element_ty)
            tl.store(pre_at, nothing, mask=mask)
            tl.store(pre_at + width, nothing, mask=mask)
        return
    # Rows past the end read the last row and are not written.
    token = tl.load(tokens + tl.minimum(row, end - 1))
    weight_at = gate_up + expert.to(tl.int64) * stride_we + column[None, :].to(tl.int64) * stride_wn
    gate, up = up_tile(
        x + token[:, None].to(tl.int64) * stride_xm, weight_at, weight_at + tl.cast(width, tl.int64) * stride_wn, inner,
        width, stride_wk, column, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    up_epilogue(
        gate, up, bias, pre, hidden, row, row < end, block_n * BLOCK_N, expert, width, ACTIVATION, HAS_BIAS, SAVE,
        BLOCK_M, BLOCK_N, 2,
    )  # fmt: skip


@triton.jit
def group_of_slots(expert_ids, group, num_slots, num_experts, SLOTS: tl.constexpr):
    """(expert, number of its slots in a short list) of a group of programs.

    If there are fewer slots than experts, each slot has a group and the first of an expert does the work; most groups
    of experts would have no slot. An invalid id reads no weight.
    """
    slot = tl.arange(0, SLOTS)
    ids = tl.load(expert_ids + slot, mask=slot < num_slots, other=-1)
    by_slot = num_slots < num_experts
    expert = tl.where(by_slot, tl.load(expert_ids + group, mask=by_slot, other=0), group)
    own = (ids == expert) & (expert >= 0) & (expert < num_experts)
    earlier = tl.sum((own & (slot < group) & by_slot).to(tl.int32), 0)
    return expert.to(tl.int32), tl.where(earlier == 0, tl.sum(own.to(tl.int32), 0), 0)


@triton.jit
def pick_slots(expert_ids, expert, wanted, num_slots, SLOTS: tl.constexpr):
    """Slots of this expert by their position among its slots; 0 if there is none."""
    picked = tl.zeros_like(wanted)
    before = 0
    part: tl.constexpr = 128 if SLOTS > 128 else SLOTS
    for first in range(0, num_slots, part):
        slot = first + tl.arange(0, part)
        match = (tl.load(expert_ids + slot, mask=slot < num_slots, other=-1) == expert).to(tl.int32)
        rank = tl.where(match > 0, before + tl.cumsum(match, 0) - 1, -1)
        picked += tl.sum(tl.where(rank[None, :] == wanted[:, None], slot[None, :], 0), 1)
        before += tl.sum(match, 0)
    return picked


@triton.jit(do_not_specialize=["num_slots", "num_experts", "top_k", "blocks_n"])
def small_up_kernel(
    x, gate_up, bias, hidden, expert_ids, num_slots, num_experts, top_k, inner, width, stride_xm, stride_we,
    stride_wn, stride_wk, blocks_n, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [T * K, F] in the order of slots."""
    expert, count = group_of_slots(expert_ids, tl.program_id(0) // blocks_n, num_slots, num_experts, SLOTS)
    start_n = (tl.program_id(0) % blocks_n) * BLOCK_N
    column = start_n + tl.arange(0, BLOCK_N)
    weight_at = gate_up + expert.to(tl.int64) * stride_we + column[None, :].to(tl.int64) * stride_wn
    for first in range(0, count, BLOCK_M):
        wanted = first + tl.arange(0, BLOCK_M)
        slot = pick_slots(expert_ids, expert, wanted, num_slots, SLOTS)
        gate, up = up_tile(
            x + (slot // top_k)[:, None].to(tl.int64) * stride_xm, weight_at,
            weight_at + tl.cast(width, tl.int64) * stride_wn, inner, width, stride_wk, column, EVEN_K,
            EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        up_epilogue(
            gate, up, bias, hidden, hidden, slot, wanted < count, start_n, expert, width, ACTIVATION, HAS_BIAS, False,
            BLOCK_M, BLOCK_N, 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots", "num_experts", "blocks_n"])
def small_down_kernel(
    hidden, down, bias, out, expert_ids, num_slots, num_experts, inner, width, stride_we, stride_wk, stride_wn,
    blocks_n, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T * K, D] in the order of slots."""
    expert, count = group_of_slots(expert_ids, tl.program_id(0) // blocks_n, num_slots, num_experts, SLOTS)
    column = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_at = down + expert.to(tl.int64) * stride_we + column[None, :].to(tl.int64) * stride_wn
    for first in range(0, count, BLOCK_M):
        wanted = first + tl.arange(0, BLOCK_M)
        slot = pick_slots(expert_ids, expert, wanted, num_slots, SLOTS)[:, None].to(tl.int64)
        total = multiply(
            hidden + slot * inner, weight_at, inner, stride_wk, column, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            EVEN_N,
        )  # fmt: skip
        if HAS_BIAS:
            at = bias + expert.to(tl.int64) * width + column
            total += tl.load(at, mask=column < width, other=0).to(tl.float32)[None, :]
        mask = (wanted < count)[:, None] & (column < width)[None, :]
        tl.store(out + slot * width + column[None, :], total, mask=mask)


@triton.jit
def backward_epilogue(
    grad_hidden, pre, grad_pre, scaled, weight, row, end, start_n, width, ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Store the results of `hidden_backward_kernel` for a tile and return the tile's part of dots."""
    if PARTS > 1:
        half: tl.constexpr = BLOCK_N // 2
        left, right = halves(grad_hidden, BLOCK_M, BLOCK_N)
        dot = backward_epilogue(
            left, pre, grad_pre, scaled, weight, row, end, start_n, width, ACTIVATION, EVEN_N, BLOCK_M, half, PARTS // 2
        )
        dot += backward_epilogue(
            right, pre, grad_pre, scaled, weight, row, end, start_n + half, width, ACTIVATION, EVEN_N, BLOCK_M, half,
            PARTS // 2,
        )  # fmt: skip
    else:
        column = start_n + tl.arange(0, BLOCK_N)
        mask = (row < end)[:, None] if EVEN_N else (row < end)[:, None] & (column < width)[None, :]
        at = row[:, None].to(tl.int64) * (2 * width) + column[None, :]
        gate = tl.load(pre + at, mask=mask, other=0).to(tl.float32)
        up = tl.load(pre + at + width, mask=mask, other=0).to(tl.float32)
        hidden, grad_gate, grad_up = swiglu_backward_tile(
            grad_hidden, gate, up, ACTIVATION, scaled.dtype.element_ty == tl.float32
        )
        tl.store(grad_pre + at, grad_gate * weight[:, None], mask=mask)
        tl.store(grad_pre + at + width, grad_up * weight[:, None], mask=mask)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        tl.store(scaled + at, hidden * weight[:, None], mask=mask)
        dot = tl.sum(grad_hidden * hidden, 1)
    return dot


@triton.jit(do_not_specialize=["num_experts", "blocks_n"])
def hidden_backward_kernel(
    grad, down, pre, weights, grad_pre, scaled, dots, slots, tokens, tile_group, tile_start, starts, num_experts,
    inner, width, stride_gm, stride_we, stride_wk, stride_wn, blocks_n, ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All results that follow from grad[token] @ down[expert], the gradient of the hidden activation.

    These are grad_pre [R, 2F], the hidden activation times its routing weight [R, F], and dots [R, blocks_n], the part
    of the routing weight's gradient from each block of columns.

    The gradient of a routing weight is grad . expert output = (grad @ down) . hidden: no output row is needed.
    """
    expert, first, end, block_n = locate(tl.program_id(0), tile_group, tile_start, starts, blocks_n, BLOCK_M, GROUP_M)
    if (expert < 0) | (expert == num_experts):
        return
    row = first + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.minimum(row, end - 1)
    grad_at = grad + tl.load(tokens + last)[:, None].to(tl.int64) * stride_gm
    weight_at = down + expert.to(tl.int64) * stride_we + column[None, :].to(tl.int64) * stride_wn
    grad_hidden = multiply(
        grad_at, weight_at, inner, stride_wk, column, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N
    )
    weight = tl.load(weights + tl.load(slots + last))
    dot = backward_epilogue(
        grad_hidden, pre, grad_pre, scaled, weight, row, end, block_n * BLOCK_N, width, ACTIVATION, EVEN_N, BLOCK_M,
        BLOCK_N, PARTS,
    )  # fmt: skip
    tl.store(dots + block_n + row.to(tl.int64) * blocks_n, dot, mask=row < end)


@triton.jit(do_not_specialize=["num_slots", "top_k", "blocks_n"])
def sum_dots_kernel(
    dots, position, grad, down_bias, expert_ids, grad_weights, num_slots, top_k, inner, stride_gm, blocks_n,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of each routing weight, to which a bias of the down projection adds grad . bias."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + slot, mask=slot < num_slots, other=-1).to(tl.int64)
    here = row >= 0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for n in range(blocks_n):
        total += tl.load(dots + row * blocks_n + n, mask=here, other=0)
    if HAS_BIAS:
        grad_at = grad + (slot // top_k)[:, None].to(tl.int64) * stride_gm
        bias_at = down_bias + tl.load(expert_ids + slot, mask=here, other=0)[:, None] * inner
        for first in range(0, inner, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)[None, :]
            mask = here[:, None] & (k < inner)
            g = tl.load(grad_at + k, mask=mask, other=0).to(tl.float32)
            total += tl.sum(g * tl.load(bias_at + k, mask=mask, other=0).to(tl.float32), 1)
    tl.store(grad_weights + slot, total, mask=slot < num_slots)


@triton.jit
def column_sums_kernel(
    rows, slots, tokens, weights, starts, out, width, stride_rows, GATHER: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of rows[r] over the rows of e, or (GATHER) of weights[slot] * rows[token]."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        here = row < end
        mask = here[:, None] & (column < width)[None, :]
        if GATHER:
            token = tl.load(tokens + row, mask=here, other=0)
            weight = tl.load(weights + tl.load(slots + row, mask=here, other=0), mask=here, other=0)
            at = rows + token[:, None].to(tl.int64) * stride_rows + column[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0).to(tl.float32) * weight[:, None], 0)
        else:
            at = rows + row[:, None].to(tl.int64) * stride_rows + column[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0).to(tl.float32), 0)
    tl.store(out + expert.to(tl.int64) * width + column, total, mask=column < width)


def moe_mlp_forward(
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
    experts, twice, inner = gate_up.shape
    x, weights, expert_ids = tiling.last_stride_one(x), weights.contiguous(), expert_ids.contiguous()
    pre = torch.empty((expert_ids.numel() if save else 0, twice), dtype=x.dtype, device=x.device)
    if expert_ids.numel() == 0 or inner == 0:
        pre.zero_()
        return torch.zeros_like(x, memory_format=torch.contiguous_format), pre
    up = (x, gate_up, gate_up_bias, SwiGLU(limit, alpha, beta))
    if x.shape[0] <= SMALL and not save:
        out = _small(*up, down, down_bias, expert_ids)
        return combine(out, expert_ids, weights, num_experts=experts, by_slot=True), pre
    order = _sort(x, expert_ids, experts, twice // 2)
    assert order.tiles is not None
    hidden = _up(*up, pre, order)
    out = rows(hidden, down.transpose(1, 2), order.starts, order.tiles, bias=down_bias)
    return combine(out, order.position, weights), pre


def _sort(x: Tensor, expert_ids: Tensor, experts: int, width: int) -> Order:
    block_m = tiling.row_block(x.dtype, expert_ids.numel(), experts, x.shape[1], width)
    return sort(expert_ids, experts, block_m=block_m, position_dtype=torch.int32)


def _up(x: Tensor, gate_up: Tensor, bias: Tensor | None, activation: SwiGLU, pre: Tensor, order: Order) -> Tensor:
    experts, twice, inner = gate_up.shape
    tiles, width = order.tiles, twice // 2
    assert tiles is not None
    hidden = torch.empty((order.slots.shape[0], width), dtype=x.dtype, device=x.device)
    if hidden.numel():
        tile = tiling.rows_tile(x.dtype, tiles.block_m, tiling.shared_memory(x.device))
        block_n = tile.block_n // 2
        blocks_n = triton.cdiv(width, block_n)
        up_kernel[(tiles.count * blocks_n,)](
            x,
            gate_up,
            x if bias is None else bias.contiguous(),
            pre,
            hidden,
            order.tokens,
            tiles.group,
            tiles.start,
            order.starts,
            experts,
            inner,
            width,
            x.stride(0),
            *gate_up.stride(),
            blocks_n,
            ACTIVATION=activation,
            HAS_BIAS=bias is not None,
            SAVE=pre.shape[0] > 0,
            EVEN_K=inner % tile.block_k == 0,
            EVEN_N=tiling.even(width, block_n),
            GROUP_M=tile.group_m,
            **tile.options | {"BLOCK_N": block_n},
        )
    return hidden


def _small(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    activation: SwiGLU,
    down: Tensor,
    down_bias: Tensor | None,
    expert_ids: Tensor,
) -> Tensor:
    experts, twice, inner = gate_up.shape
    width, num_slots = twice // 2, expert_ids.numel()
    # Taller tiles for more tokens per expert, so that weights are read once, if there are enough registers.
    if x.dtype == torch.float32:
        block_m = 16
    else:
        block_m = 32 if inner % 16 or width % 16 else 16 if num_slots <= 8 * experts else 64
    tile = tiling.rows_tile(x.dtype, block_m, tiling.shared_memory(x.device))
    block_n = tile.block_n // 2
    # A program reads the whole list, in one of three lengths: short for one or two tokens, but not one per T.
    longest = SMALL * triton.next_power_of_2(expert_ids.shape[1])
    slots = next(length for length in (16, 128, longest) if num_slots <= length)
    groups = min(num_slots, experts)
    hidden = torch.empty((num_slots, width), dtype=x.dtype, device=x.device)
    out = torch.empty((num_slots, inner), dtype=x.dtype, device=x.device)
    if width:
        blocks_n = triton.cdiv(width, block_n)
        small_up_kernel[(groups * blocks_n,)](
            x,
            gate_up,
            x if gate_up_bias is None else gate_up_bias.contiguous(),
            hidden,
            expert_ids,
            num_slots,
            experts,
            expert_ids.shape[1],
            inner,
            width,
            x.stride(0),
            *gate_up.stride(),
            blocks_n,
            ACTIVATION=activation,
            HAS_BIAS=gate_up_bias is not None,
            EVEN_K=inner % tile.block_k == 0,
            EVEN_N=tiling.even(width, block_n),
            SLOTS=slots,
            **tile.options | {"BLOCK_N": block_n},
        )
    blocks_n = triton.cdiv(inner, tile.block_n)
    small_down_kernel[(groups * blocks_n,)](
        hidden,
        down,
        x if down_bias is None else down_bias.contiguous(),
        out,
        expert_ids,
        num_slots,
        experts,
        width,
        inner,
        down.stride(0),
        down.stride(2),
        down.stride(1),
        blocks_n,
        HAS_BIAS=down_bias is not None,
        EVEN_K=width % tile.block_k == 0,
        EVEN_N=tiling.even(inner, tile.block_n),
        SLOTS=slots,
        **tile.options,
    )
    return out


def moe_mlp_backward(
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
    experts, width = gate_up.shape[0], gate_up.shape[1] // 2
    x, grad, weights, expert_ids = (
        tiling.last_stride_one(x), tiling.last_stride_one(grad), weights.contiguous(), expert_ids.contiguous()
    )  # fmt: skip
    order = _sort(x, expert_ids, experts, width)
    assert order.tiles is not None
    arguments = (x, gate_up, down, weights, gate_up_bias, down_bias)
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = (
        need and t is not None for need, t in zip(needed, arguments, strict=True)
    )
    grads = [torch.empty(0, dtype=x.dtype, device=x.device) for _ in arguments]
    if need_x or need_gate_up or need_down or need_weights or need_gate_up_bias:
        grad_pre, scaled, dots = _hidden_backward(grad, down, pre, weights, SwiGLU(limit, alpha, beta), order, width)
        # Each intermediate is freed after its last use.
        if need_weights:
            grads[3] = _sum_dots(dots, order.position, grad, down_bias, expert_ids)
        if need_down:
            grads[2] = products(grad, scaled, order.starts, experts, tokens=order.tokens, gather_a=True)
        del dots, scaled
        if need_gate_up:
            grads[1] = products(grad_pre, x, order.starts, experts, tokens=order.tokens, gather_b=True)
        if need_x:
            grads[0] = combine(rows(grad_pre, gate_up, order.starts, order.tiles), order.position, None)
        if need_gate_up_bias:
            grads[4] = _column_sums(grad_pre, order, experts, None)
    if need_down_bias:
        grads[5] = _column_sums(grad, order, experts, weights)
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]


def _hidden_backward(
    grad: Tensor,
    down: Tensor,
    pre: Tensor,
    weights: Tensor,
    activation: SwiGLU,
    order: Order,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_pre [R, 2F], hidden times weight [R, F], dots [R, blocks])"""
    tiles, num_rows, inner = order.tiles, order.slots.shape[0], grad.shape[1]
    assert tiles is not None
    clamped, shared = activation.limit is not None, tiling.shared_memory(grad.device)
    tile = tiling.hidden_backward_tile(grad.dtype, tiles.block_m, shared, clamped)
    blocks_n = max(triton.cdiv(width, tile.block_n), 1)
    grad_pre = torch.empty((num_rows, 2 * width), dtype=grad.dtype, device=grad.device)
    scaled = torch.empty((num_rows, width), dtype=grad.dtype, device=grad.device)
    dots = torch.empty((num_rows, blocks_n), dtype=torch.float32, device=grad.device)
    if num_rows:
        hidden_backward_kernel[(tiles.count * blocks_n,)](
            grad,
            down,
            pre,
            weights,
            grad_pre,
            scaled,
            dots,
            order.slots,
            order.tokens,
            tiles.group,
            tiles.start,
            order.starts,
            down.shape[0],
            inner,
            width,
            grad.stride(0),
            *down.stride(),
            blocks_n,
            ACTIVATION=activation,
            EVEN_K=inner % tile.block_k == 0,
            EVEN_N=tiling.even(width, tile.block_n),
            GROUP_M=tile.group_m,
            PARTS=max(4, tile.block_m * tile.block_n // (512 * tile.num_warps)),  # 16 elements per thread
            **tile.options,
        )
    return grad_pre, scaled, dots


def _sum_dots(dots: Tensor, position: Tensor, grad: Tensor, down_bias: Tensor | None, expert_ids: Tensor) -> Tensor:
    grad_weights = torch.empty(position.shape, dtype=torch.float32, device=dots.device)
    if grad_weights.numel():
        block = 128 if down_bias is None else 16
        sum_dots_kernel[(triton.cdiv(position.numel(), block),)](
            dots,
            position,
            grad,
            grad if down_bias is None else down_bias.contiguous(),
            expert_ids,
            grad_weights,
            position.numel(),
            position.shape[1],
            grad.shape[1],
            grad.stride(0),
            dots.shape[1],
            HAS_BIAS=down_bias is not None,
            BLOCK=block,
            BLOCK_K=128,
        )
    return grad_weights


def _column_sums(source: Tensor, order: Order, experts: int, weights: Tensor | None) -> Tensor:
    out = torch.empty((experts, source.shape[1]), dtype=source.dtype, device=source.device)
    if out.numel():
        column_sums_kernel[(experts, triton.cdiv(source.shape[1], 128))](
            source,
            order.slots,
            order.tokens,
            order.starts if weights is None else weights,
            order.starts,
            out,
            source.shape[1],
            source.stride(0),
            GATHER=weights is not None,
            BLOCK_R=32,
            BLOCK_N=128,
        )
    return out
