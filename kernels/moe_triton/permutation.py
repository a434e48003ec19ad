"""Sort routing slots by expert without waiting for the device, and copy rows in that order.

A counting sort in four launches: each block of slots counts its experts; a scan over the blocks of each expert finds
the start of each block's slots; a scan over experts finds the start of each expert; each block places its slots. No sum
is atomic, so the order is stable and the bits repeat.

Slots that are "not here" (id -1) form one more group, number E, after all others.
"""

# Triton's decorator keeps the signature and hides the result; constexprs take plain values, launches also options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton import tiling

SLOTS = 128  # slots in one program of the sort, which compares every pair of them
COLUMNS = 1024


@triton.jit
def group_of(expert_ids, slot, num_slots, num_experts):
    """Group of each slot: its expert, E if it has none, E + 1 past the last slot.

    Without assertions an invalid id counts as "not here", so that nothing is accessed outside a buffer.
    """
    ids = tl.load(expert_ids + slot, mask=slot < num_slots, other=-1)
    tl.device_assert((ids >= -1) & (ids < num_experts), "expert_ids: an id is neither -1 nor in [0, E)")
    group = tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)
    return tl.where(slot < num_slots, group, num_experts + 1)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_experts"])
def count_kernel(expert_ids, counts, num_slots, num_blocks, num_experts, GROUPS: tl.constexpr, SLOTS: tl.constexpr):
    """counts [E + 1, blocks]"""
    block = tl.program_id(0)
    group = group_of(expert_ids, block * SLOTS + tl.arange(0, SLOTS), num_slots, num_experts)
    here = tl.histogram(group, GROUPS)
    groups = tl.arange(0, GROUPS)
    tl.store(counts + groups.to(tl.int64) * num_blocks + block, here, mask=groups <= num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(counts, totals, num_blocks, BLOCK: tl.constexpr):
    """Replace counts of one group by the counts of all earlier blocks; their sum goes to totals [E + 1]."""
    group = tl.program_id(0)
    row = counts + group.to(tl.int64) * num_blocks
    before = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_blocks, BLOCK):
        i = first + tl.arange(0, BLOCK)
        count = tl.load(row + i, mask=i < num_blocks, other=0)
        tl.store(row + i, before + tl.cumsum(count, 0) - count, mask=i < num_blocks)
        before += tl.sum(count, 0)
    tl.store(totals + group, before)


@triton.jit(do_not_specialize=["num_rows", "max_tiles", "num_experts", "block_m"])
def layout_kernel(
    source,
    starts,
    tile_group,
    tile_start,
    num_rows,
    max_tiles,
    num_experts,
    block_m,
    FROM_ENDS: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write the start of each group and the list of row tiles; program g writes the part of group g.

    source contains the groups' sizes [E + 1], or with FROM_ENDS their ends [E] as in `grouped_mm`, where the rest is
    group E. starts [E + 2] ends with num_rows. tile_group [max_tiles] is the group of each tile, -1 past the last tile;
    tile_start [E + 2] is the first tile of each group.
    """
    me = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    if FROM_ENDS:
        end = tl.load(source + groups, mask=groups < num_experts, other=num_rows)
        start = tl.load(source + groups - 1, mask=(groups > 0) & (groups <= num_experts), other=0)
        start = tl.where(groups > num_experts, num_rows, start)
        # Invalid ends (decreasing or beyond the tensor) are the caller's error, but must not read outside it.
        start = tl.minimum(tl.maximum(start, 0), num_rows)
        size = tl.maximum(tl.minimum(end, num_rows) - start, 0)
    else:
        size = tl.load(source + groups, mask=groups <= num_experts, other=0)
        start = tl.cumsum(size, 0) - size
    tl.store(starts + me, tl.sum(tl.where(groups == me, start, 0), 0))
    if TILES:
        tiles = (size + block_m - 1) // block_m
        first = tl.sum(tl.where(groups == me, tl.cumsum(tiles, 0) - tiles, 0), 0)
        count = tl.sum(tl.where(groups == me, tiles, 0), 0)
        if me > num_experts:
            count = max_tiles - first
        tl.store(tile_start + me, first)
        value = tl.where(me > num_experts, -1, me)
        for i in range(0, count, GROUPS):
            tile = first + i + groups
            tl.store(tile_group + tile, value + tl.zeros_like(groups), mask=tile < tl.minimum(first + count, max_tiles))


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_experts", "top_k"])
def place_kernel(
    expert_ids, counts, starts, slots, tokens, position, num_slots, num_blocks, num_experts, top_k, SLOTS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    i = tl.arange(0, SLOTS)
    slot = block * SLOTS + i
    group = group_of(expert_ids, slot, num_slots, num_experts)
    earlier = (group[:, None] == group[None, :]) & (i[None, :] < i[:, None])
    real = slot < num_slots
    row = tl.load(starts + group, mask=real, other=0) + tl.sum(earlier.to(tl.int32), 1)
    row += tl.load(counts + group.to(tl.int64) * num_blocks + block, mask=real, other=0)
    tl.store(slots + row, slot, mask=real)
    tl.store(tokens + row, slot // top_k, mask=real)
    tl.store(position + slot, tl.where(group < num_experts, row, -1), mask=real)


@dataclass(frozen=True)
class Tiles:
    """Row tiles of a grouped product. Every group begins a new tile, and its last tile may be short."""

    group: Tensor
    start: Tensor
    block_m: int

    @property
    def count(self) -> int:
        """Upper bound of the number of tiles, from shapes alone."""
        return self.group.shape[0]


@dataclass(frozen=True)
class Order:
    """The sort's result.

    Attributes:
        slots: int32 [R], t * K + k in expert order.
        tokens: int32 [R], t of each slot.
        position: [T, K], row of each slot, or -1.
        starts: int32 [E + 2], first row of each group.
    """

    slots: Tensor
    tokens: Tensor
    position: Tensor
    starts: Tensor
    tiles: Tiles | None


def layout(
    source: Tensor, num_rows: int, num_experts: int, *, from_ends: bool, block_m: int | None
) -> tuple[Tensor, Tiles | None]:
    """(starts, tiles or None without block_m) from the groups' sizes or ends."""
    source = source.contiguous()
    starts = torch.empty(num_experts + 2, dtype=torch.int32, device=source.device)
    tile_start = torch.empty_like(starts)
    bound = 0 if block_m is None else num_rows // block_m + min(num_experts + 1, num_rows)
    tile_group = torch.empty(bound, dtype=torch.int32, device=source.device)
    layout_kernel[(num_experts + 2,)](
        source,
        starts,
        tile_group,
        tile_start,
        num_rows,
        bound,
        num_experts,
        block_m or 1,
        FROM_ENDS=from_ends,
        TILES=block_m is not None,
        GROUPS=max(triton.next_power_of_2(num_experts + 2), 128),
    )
    return starts, None if block_m is None else Tiles(tile_group, tile_start, block_m)


def sort(expert_ids: Tensor, num_experts: int, *, block_m: int | None, position_dtype: torch.dtype) -> Order:
    expert_ids = expert_ids.contiguous()
    num_slots, device = expert_ids.numel(), expert_ids.device
    most = tiling.shared_memory(device) // 4
    if triton.next_power_of_2(num_experts + 2) > most:
        # The histogram of a block of slots has a power of two of 32-bit counts.
        most = 2 ** (most.bit_length() - 1) - 2
        expected = f"expected at most {most}; found {num_experts}"
        raise ValueError(f"num_experts: more than the shared memory of {device} can count; {expected}")
    if num_slots >= 2**31:
        raise ValueError(f"expert_ids: too many slots; expected fewer than 2^31; found {num_slots}")
    blocks = triton.cdiv(num_slots, SLOTS)
    counts = torch.empty((num_experts + 1, blocks), dtype=torch.int32, device=device)
    totals = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    slots = torch.empty(num_slots, dtype=torch.int32, device=device)
    tokens = torch.empty_like(slots)
    position = torch.empty(expert_ids.shape, dtype=position_dtype, device=device)
    # debug enables the assertion on ids; the overflow checks that it also enables are switched off.
    asserted = {"debug": True, "sanitize_overflow": False}
    if num_slots:
        groups = triton.next_power_of_2(num_experts + 2)
        count_kernel[(blocks,)](
            expert_ids, counts, num_slots, blocks, num_experts, GROUPS=groups, SLOTS=SLOTS, **asserted
        )
    scan_kernel[(num_experts + 1,)](counts, totals, blocks, BLOCK=256)
    starts, tiles = layout(totals, num_slots, num_experts, from_ends=False, block_m=block_m)
    if num_slots:
        place_kernel[(blocks,)](
            expert_ids,
            counts,
            starts,
            slots,
            tokens,
            position,
            num_slots,
            blocks,
            num_experts,
            expert_ids.shape[1],
            SLOTS=SLOTS,
        )
    return Order(slots, tokens, position, starts, tiles)


@triton.jit(do_not_specialize=["num_experts"])
def permute_kernel(x, tokens, starts, rows, width, num_experts, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = row < tl.load(starts + num_experts)
    token = tl.load(tokens + row)
    value = tl.load(x + token.to(tl.int64) * stride_x + column, mask=column < tl.where(here, width, 0), other=0)
    tl.store(rows + row.to(tl.int64) * width + column, value, mask=column < width)


def permute(x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = sort(expert_ids, num_experts, block_m=None, position_dtype=torch.int64)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = torch.empty((expert_ids.numel(), x.shape[1]), dtype=x.dtype, device=x.device)
    if rows.numel():
        block = min(COLUMNS, triton.next_power_of_2(x.shape[1]))
        grid = (rows.shape[0], triton.cdiv(x.shape[1], block))
        permute_kernel[grid](x, order.tokens, order.starts, rows, x.shape[1], num_experts, x.stride(0), BLOCK=block)
    return rows, order.position, order.starts[1:-1].clone()


@triton.jit(do_not_specialize=["num_experts"])
def combine_kernel(
    rows,
    position,
    weights,
    out,
    width,
    num_experts,
    WEIGHTED: tl.constexpr,
    BY_SLOT: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over k of weights[t, k] * rows[position[t, k]]; BY_SLOT: position is expert_ids, row t * K + k."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if BY_SLOT:  # once, before the sum, because an assertion may spill registers
        k = tl.arange(0, BLOCK_K)
        ids = tl.load(position + token * TOP_K + k, mask=k < TOP_K, other=-1)
        tl.device_assert((ids >= -1) & (ids < num_experts), "expert_ids: an id is neither -1 nor in [0, E)")
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        place = tl.load(position + slot).to(tl.int64)
        here = place >= 0
        row = slot if BY_SLOT else place
        readable = tl.where(here, width, 0)
        value = tl.load(rows + row * width + column, mask=column < readable, other=0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + slot, mask=here, other=0)
        total += value
    tl.store(out + token * width + column, total, mask=column < width)


def combine(
    rows: Tensor, position: Tensor, weights: Tensor | None, *, num_experts: int = 0, by_slot: bool = False
) -> Tensor:
    tokens, top_k = position.shape
    width = rows.shape[1]
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    if out.numel():
        block = min(COLUMNS, triton.next_power_of_2(width))
        grid = (tokens, triton.cdiv(width, block))
        combine_kernel[grid](
            rows,
            position,
            rows if weights is None else weights,
            out,
            width,
            num_experts,
            WEIGHTED=weights is not None,
            BY_SLOT=by_slot,
            TOP_K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK=block,
            debug=by_slot,
            sanitize_overflow=False,
        )
    return out


def unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    return combine(rows.contiguous(), position.contiguous(), None if weights is None else weights.contiguous())


@triton.jit
def unpermute_backward_kernel(
    grad,
    rows,
    position,
    weights,
    grad_rows,
    grad_weights,
    width,
    stride_grad,
    WEIGHTED: tl.constexpr,
    NEED_ROWS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(position + slot).to(tl.int64)
    here = row >= 0
    weight = tl.load(weights + slot, mask=here, other=0) if WEIGHTED else 1.0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < tl.where(here, width, 0)
        g = tl.load(grad + (slot // TOP_K) * stride_grad + column, mask=mask, other=0).to(tl.float32)
        if NEED_ROWS:
            tl.store(grad_rows + row * width + column, g * weight, mask=mask)
        if NEED_WEIGHTS:
            total += g * tl.load(rows + row * width + column, mask=mask, other=0).to(tl.float32)
    if NEED_WEIGHTS:
        tl.store(grad_weights + slot, tl.sum(total, 0))


def unpermute_backward(
    grad: Tensor, rows: Tensor, position: Tensor, weights: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    need_weights = needed[1] and weights is not None
    grad_rows = torch.zeros(rows.shape if needed[0] else 0, dtype=rows.dtype, device=rows.device)
    grad_weights = torch.empty(position.shape if need_weights else 0, dtype=torch.float32, device=rows.device)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    if position.numel():
        unpermute_backward_kernel[(position.numel(),)](
            grad,
            rows.contiguous(),
            position.contiguous(),
            rows if weights is None else weights.contiguous(),
            grad_rows,
            grad_weights,
            rows.shape[1],
            grad.stride(0),
            WEIGHTED=weights is not None,
            NEED_ROWS=needed[0],
            NEED_WEIGHTS=need_weights,
            TOP_K=position.shape[1],
            BLOCK=min(COLUMNS, triton.next_power_of_2(max(rows.shape[1], 1))),
        )
    return grad_rows, grad_weights
