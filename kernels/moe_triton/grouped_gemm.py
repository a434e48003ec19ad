"""Grouped products: row tiles times their group's matrix, and products of a group's rows with each other.

Programs of one group are consecutive, and within it those that share a block of the group's matrix, so that this block
is read from memory once.
"""

# Triton's decorator keeps the signature and hides the result; constexprs take plain values, launches also options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton import tiling
from moe_triton.permutation import Tiles, layout


@triton.jit
def locate(program, tile_group, tile_start, starts, blocks_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(group or -1, first row, row after the last, block along n) of a program."""
    group = tl.load(tile_group + program // blocks_n)
    row, end, block_n = 0, 0, 0
    if group >= 0:
        first = tl.load(tile_start + group)
        tiles = tl.load(tile_start + group + 1) - first
        local = program - first * blocks_n
        pass_m = (local // (GROUP_M * blocks_n)) * GROUP_M
        within = local % (GROUP_M * blocks_n)
        height = tl.minimum(tiles - pass_m, GROUP_M)
        row = tl.load(starts + group) + (pass_m + within % height) * BLOCK_M
        end = tl.load(starts + group + 1)
        block_n = within // height
    return group, row, end, block_n


@triton.jit
def multiply(
    a_at, b_at, inner, stride_bk, column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_M, inner] @ B [inner, BLOCK_N] in float32, from pointers to the rows of A and the columns of B."""
    k = tl.arange(0, BLOCK_K)
    a_at = a_at + k[None, :]
    b_at = b_at + k[:, None].to(tl.int64) * stride_bk
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, inner, BLOCK_K):
        a = tl.load(a_at) if EVEN_K else tl.load(a_at, mask=(first + k)[None, :] < inner, other=0)
        if EVEN_K and EVEN_N:
            b = tl.load(b_at)
        else:
            b = tl.load(b_at, mask=((first + k)[:, None] < inner) & (column[None, :] < width), other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_at += BLOCK_K
        b_at += tl.full((), BLOCK_K, tl.int64) * stride_bk
    return total


@triton.jit(do_not_specialize=["num_groups", "blocks_n"])
def rows_kernel(
    a, b, bias, out, tile_group, tile_start, starts, num_groups, inner, width, stride_am, stride_bg,
    stride_bk, stride_bn, stride_om, stride_on, blocks_n, HAS_BIAS: tl.constexpr, TAIL: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[rows of g] = a[rows of g] @ b[g] + bias[g].

    Group num_groups has no matrix: with TAIL its rows are set to zero, otherwise they are not written.
    """
    group, first, end, block_n = locate(tl.program_id(0), tile_group, tile_start, starts, blocks_n, BLOCK_M, GROUP_M)
    if (group < 0) | ((group == num_groups) & (not TAIL)):
        return
    row = first + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read the last row and are not written.
    a_at = a + tl.minimum(row, end - 1)[:, None].to(tl.int64) * stride_am
    b_at = b + group.to(tl.int64) * stride_bg + column[None, :].to(tl.int64) * stride_bn
    steps = tl.where(group < num_groups, inner, 0)
    total = multiply(a_at, b_at, steps, stride_bk, column, width, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N)
    if HAS_BIAS:
        mask = column < tl.where(group < num_groups, width, 0)
        total += tl.load(bias + group.to(tl.int64) * width + column, mask=mask, other=0).to(tl.float32)[None, :]
    at = out + row[:, None].to(tl.int64) * stride_om + column[None, :].to(tl.int64) * stride_on
    tl.store(at, total, mask=(row < end)[:, None] & (column < width)[None, :])


@triton.jit
def operand(at, here, inside, FULL: tl.constexpr, EVEN: tl.constexpr):
    """A tile of rows and columns. Rows not `here` belong to another group and must be zero (NaN times zero is NaN)."""
    if FULL and EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside if FULL else here if EVEN else here & inside, other=0)
    return tile


@triton.jit
def add_product(
    total, a_at, b_at, tokens_at, here, in_m, in_n, stride_ar, stride_br, FULL: tl.constexpr, GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """total + a.T @ b over one block of rows; all rows are `here` if it is FULL."""
    if GATHER_A or GATHER_B:
        token = (tl.load(tokens_at) if FULL else tl.load(tokens_at, mask=here, other=0)).to(tl.int64)
        if GATHER_A:
            a_at += token[None, :] * stride_ar
        if GATHER_B:
            b_at += token[:, None] * stride_br
    tile_b = operand(b_at, here[:, None], in_n, FULL, EVEN_N)
    # a is loaded in the layout of the product: sm_80 does not copy asynchronously what is transposed after loading.
    tile_a = operand(a_at, here[None, :], in_m, FULL, EVEN_M)
    return tl.dot(tile_a, tile_b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["blocks_m", "blocks_n"])
def products_kernel(
    a, b, tokens, starts, out, height, width, stride_ar, stride_br, blocks_m, blocks_n,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[g] = a[rows of g].T @ b[rows of g]. A gathered operand has a row per token instead of per slot.

    Full blocks of rows need neither masks nor row numbers; the rest of a group is one more block. A group without rows
    gets zeros.
    """
    program = tl.program_id(0)
    group = program // (blocks_m * blocks_n)
    local = program % (blocks_m * blocks_n)
    pass_m = (local // (GROUP_M * blocks_n)) * GROUP_M
    within = local % (GROUP_M * blocks_n)
    rows_of_blocks = tl.minimum(blocks_m - pass_m, GROUP_M)
    m = (pass_m + within % rows_of_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // rows_of_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = (m < height)[:, None], (n < width)[None, :]
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    size = end - start
    full = size // BLOCK_K * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    a_at, b_at, tokens_at = a + m[:, None], b + n[None, :], tokens + start + k
    if not GATHER_A:
        a_at += (start + k).to(tl.int64)[None, :] * stride_ar
    if not GATHER_B:
        b_at += (start + k).to(tl.int64)[:, None] * stride_br
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, full, BLOCK_K):
        total = add_product(
            total, a_at, b_at, tokens_at, k < size, in_m, in_n, stride_ar, stride_br, True, GATHER_A, GATHER_B,
            EVEN_M, EVEN_N,
        )  # fmt: skip
        tokens_at += BLOCK_K
        if not GATHER_A:
            a_at += tl.full((), BLOCK_K, tl.int64) * stride_ar
        if not GATHER_B:
            b_at += tl.full((), BLOCK_K, tl.int64) * stride_br
    if full < size:
        total = add_product(
            total, a_at, b_at, tokens_at, k < size - full, in_m, in_n, stride_ar, stride_br, False, GATHER_A, GATHER_B,
            EVEN_M, EVEN_N,
        )  # fmt: skip
    at = out + group.to(tl.int64) * height * width + m[:, None].to(tl.int64) * width + n[None, :]
    tl.store(at, total, mask=in_m & in_n)


def rows(
    a: Tensor, b: Tensor, starts: Tensor, tiles: Tiles, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """a [R, K], b [G, K, N], bias [G, N] -> [R, N]: each row times the matrix of its group.

    Strides are arbitrary, but a is copied if its rows are not contiguous. Rows without a group are set to zero if `out`
    is given, and are not written otherwise.
    """
    tail, a = out is not None, tiling.last_stride_one(a)
    num_groups, inner, width = b.shape
    if out is None:
        out = torch.empty((a.shape[0], width), dtype=a.dtype, device=a.device)
    if out.numel():
        tile = tiling.rows_tile(a.dtype, tiles.block_m, tiling.shared_memory(a.device))
        if out.stride(1) != 1:
            tile = tiling.narrowed(tile, 64)  # transposing the result needs registers
        blocks_n = triton.cdiv(width, tile.block_n)
        rows_kernel[(tiles.count * blocks_n,)](
            a,
            b,
            a if bias is None else bias.contiguous(),
            out,
            tiles.group,
            tiles.start,
            starts,
            num_groups,
            inner,
            width,
            a.stride(0),
            *b.stride(),
            *out.stride(),
            blocks_n,
            HAS_BIAS=bias is not None,
            TAIL=tail,
            EVEN_K=inner % tile.block_k == 0,
            EVEN_N=tiling.even(width, tile.block_n),
            GROUP_M=tile.group_m,
            **tile.options,
        )
    return out


def products(
    a: Tensor, b: Tensor, starts: Tensor, num_groups: int, *, tokens: Tensor | None = None, gather_a: bool = False,
    gather_b: bool = False,
) -> Tensor:  # fmt: skip
    """a [R, M], b [R, N] -> [G, M, N]: the sum over each group's rows. Gathered operands are [T, ...].

    Strides are arbitrary, but an operand is copied if its rows are not contiguous.
    """
    height, width = a.shape[1], b.shape[1]
    a, b = tiling.last_stride_one(a), tiling.last_stride_one(b)
    out = torch.empty((num_groups, height, width), dtype=a.dtype, device=a.device)
    if out.numel():
        tile = tiling.products_tile(a.dtype, height, width, tiling.shared_memory(a.device))
        if gather_a or gather_b:
            tile = tiling.gathering(tile)
        blocks_m, blocks_n = triton.cdiv(height, tile.block_m), triton.cdiv(width, tile.block_n)
        products_kernel[(num_groups * blocks_m * blocks_n,)](
            a,
            b,
            starts if tokens is None else tokens,
            starts,
            out,
            height,
            width,
            a.stride(0),
            b.stride(0),
            blocks_m,
            blocks_n,
            GATHER_A=gather_a,
            GATHER_B=gather_b,
            EVEN_M=tiling.even(height, tile.block_m),
            EVEN_N=tiling.even(width, tile.block_n),
            GROUP_M=tile.group_m,
            **tile.options,
        )
    return out


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    if offs is None:
        groups, height = a.shape[:2]
        out = torch.empty((groups, height, b.shape[2]), dtype=a.dtype, device=a.device)
        ends = torch.arange(1, groups + 1, dtype=torch.int32, device=a.device) * height
        _rows_form(a.reshape(groups * height, a.shape[2]), b, ends, out.view(groups * height, b.shape[2]))
        return out
    if a.dim() == b.dim():
        starts, _ = layout(offs, a.shape[1], offs.shape[0], from_ends=True, block_m=None)
        return products(a.t(), b, starts, offs.shape[0])
    if a.dim() == 2:
        return _rows_form(a, b, offs, torch.empty((a.shape[0], b.shape[2]), dtype=a.dtype, device=a.device))
    # Columns: the transpose of the product of rows.
    out = torch.empty((a.shape[1], b.shape[1]), dtype=a.dtype, device=a.device)
    _rows_form(b.t(), a.transpose(1, 2), offs, out.t())
    return out


def _rows_form(a: Tensor, b: Tensor, ends: Tensor, out: Tensor) -> Tensor:
    block_m = tiling.row_block(a.dtype, a.shape[0], b.shape[0], *b.shape[1:])
    starts, tiles = layout(ends, a.shape[0], b.shape[0], from_ends=True, block_m=block_m)
    assert tiles is not None
    return rows(a, b, starts, tiles, out=out)
