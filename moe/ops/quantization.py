"""Quantised weights: FP8 in scaled blocks, as in DeepSeek-V3, and MXFP4, as in gpt-oss.

Dequantisation is an operator, so a compiled graph has one node for any number of experts. Quantisation is a plain
function, because it runs once, outside models. Neither has a gradient.
"""

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from moe.ops.library import define, has_values

FP8_MAX = 448.0  # largest float8_e4m3fn
MX_BLOCK = 32

# Elements that are float32 at one time: few enough for the cache on CPU, many per kernel launch elsewhere.
_CHUNK_CPU, _CHUNK = 2**18, 2**24

_SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dequantize_blocks(
    weight: Tensor,
    scale_inv: Tensor,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    *,
    halves: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply FP8 weights by the scales of their blocks: [..., N, K] -> [..., N, K].

        out[..., i, j] = weight[..., i, j] * scale_inv[..., i // bn, j // bk]        block_size = (bn, bk)

    weight is float8_e4m3fn, scale_inv [..., ceil(N / bn), ceil(K / bk)] is float32 or float8_e8m0fnu. The last block of
    a row or column may be shorter. The product is computed in float32 and rounded once to `dtype` (float32, bfloat16,
    float16, or float64, which represents the float32 product). It becomes infinite if it is too large for `dtype`. NaN
    in a code or scale stays NaN, and the sign of zero is kept.

    With `halves` = h, the N rows are h stacked matrices of N / h rows. Each is divided into blocks separately and has
    ceil(N / h / bn) rows of scales. Stacked experts [E, 2F, D] have two halves, gate and up, so F need not be a
    multiple of the block size.

    If given, `out` is filled and returned, and `dtype` is ignored; it has weight's shape, any strides, and one of the
    dtypes above. Besides the result, at most 64 MiB (CPU: 1 MiB) or one row of blocks is in memory as float32. Empty
    sizes give empty results. No host synchronisation, no gradient. Identical inputs give bit-identical results.

    Raises TypeError for other dtypes, and ValueError for incompatible shapes. The block size is never inferred from
    them.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3, and `weight_dequant` of its inference code.
    """
    _check_blocks(weight, scale_inv, block_size, halves)
    _check_out(weight.shape, weight.device, dtype, out)
    weight, scale_inv = weight.detach(), scale_inv.detach()
    if out is None:
        # As bytes, because torch's operator checks use arithmetic that FP8 does not support.
        codes, scale_inv = weight.view(torch.uint8), scale_inv.to(torch.float32)
        return _DEQUANTIZE_BLOCKS(codes, scale_inv, list(block_size), halves, dtype)
    return _dequantize_blocks_into(out, weight, scale_inv, block_size, halves)


def quantize_blocks(
    weight: Tensor,
    block_size: tuple[int, int] = (128, 128),
    *,
    scale_fmt: Literal["ue8m0"] | None = None,
    halves: int = 1,
) -> tuple[Tensor, Tensor]:
    """Quantise weights [..., N, K] to (float8_e4m3fn codes, float32 scale_inv), for `dequantize_blocks`.

        scale_inv = amax(|block|) / 448, at least 2^-126; 1 for a block of zeros
        code      = weight / scale_inv, in float32, to the nearest float8_e4m3fn, ties to even

    weight is float32, bfloat16 or float16; blocks and `halves` are as in `dequantize_blocks`. With `scale_fmt` "ue8m0"
    (DeepSeek-V3.1) each scale is rounded up to a power of two. The lower limit is the smallest normal float32: blocks
    of smaller values lose precision, and none becomes 0/0. No code is NaN. With "ue8m0", magnitudes from 248 * 2^120,
    the last 4 percent of float32, dequantise to infinity. Identical inputs give bit-identical results.

    If a block of dequantised weights (float32 or bfloat16) contains the code 448, quantising it again gives the same
    codes. The scale is exact if it is a power of two; otherwise it differs by at most one unit in the last place from
    float32, because 448 * scale was rounded, and relatively by at most 2^-8 from bfloat16. To keep weights unchanged,
    copy codes and scales.

    Besides the result, two float32 copies of at most 64 MiB (CPU: 1 MiB) or one row of blocks are in memory. The scales
    are read on the host once.

    Raises TypeError for other dtypes. Raises ValueError for an invalid shape or setting, and for NaN or infinity, with
    the block.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected float32, bfloat16 or float16; found {weight.dtype}")
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt = {scale_fmt!r}: expected None or 'ue8m0'")
    shape = scale_shape(weight.shape, block_size, halves)
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale_inv = torch.empty(shape, dtype=torch.float32, device=weight.device)
    for part, code, scale in _matrices(halves, weight, codes, scale_inv):
        for rows, blocks, height in _chunks(part, block_size):
            wide = part[rows].unflatten(0, (-1, height)).to(torch.float32, copy=True)
            scale[blocks] = _block_scale(_amax(wide, block_size[1]), scale_fmt)
            divisor = scale[blocks].repeat_interleave(block_size[1], dim=1)[:, : part.shape[1]]
            code[rows].unflatten(0, (-1, height)).copy_(wide.div_(divisor[:, None]))
    _refuse_nonfinite(scale_inv, "weight")
    return codes, scale_inv


def quantize_rows(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Quantise activations [T, D] to (float8_e4m3fn codes [T, D], float32 scale_inv [T, ceil(D / block)]).

        scale_inv = max(amax(|block|), 1e-4) / 448        code = x / scale_inv, to the nearest, ties to even

    `dequantize_blocks(codes, scale_inv, (1, block))` is the inverse. x has any floating dtype; the arithmetic is
    float32. NaN or infinity makes only its own block non-finite. Empty sizes give empty results. No host
    synchronisation, no gradient. Identical inputs give bit-identical results.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3, and `act_quant` of its inference code.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating point [T, D]; found {x.dtype} {tuple(x.shape)}")
    tokens, width = x.shape
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(x.detach().float(), (0, blocks * block - width)).view(tokens, blocks, block)
    scale_inv = padded.abs().amax(-1).clamp_min(1e-4) / FP8_MAX if width else padded.new_empty(tokens, 0)
    codes = (padded / scale_inv.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return codes.view(tokens, blocks * block)[:, :width].contiguous(), scale_inv


def dequantize_mxfp4(
    blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None
) -> Tensor:
    """Dequantise MXFP4: blocks uint8 [..., N, K/32, 16] and scales uint8 [..., N, K/32] -> [..., N, K].

        out[..., i, 32 g + 2 b]     = e2m1(blocks[..., i, g, b] & 15) * 2^(scales[..., i, g] - 127)
        out[..., i, 32 g + 2 b + 1] = e2m1(blocks[..., i, g, b] >> 4) * 2^(scales[..., i, g] - 127)

    e2m1 of 0 to 7 is 0, 0.5, 1, 1.5, 2, 3, 4, 6; adding 8 negates the value. A scale of 255 is NaN, and so is every
    value of its block, zeros included. The product is computed in float32, where 4 and 6 times 2^126 and 2 to 6 times
    2^127 become infinite. It is rounded once to `dtype` (float32, bfloat16, float16, or float64, which represents the
    float32 product); bfloat16 represents every finite product exactly.

    If given, `out` [..., N, K], any strides, is filled and returned, and `dtype` is ignored. Besides the result, at
    most three times 64 MiB (CPU: 1 MiB) or one row is in memory. Empty sizes give empty results. No host
    synchronisation, no gradient.

    Raises TypeError for wrong dtypes, ValueError for wrong shapes.

    Source: OCP Microscaling Formats (MX) 1.0, and openai/gpt-oss, whose checkpoints have this layout.
    """
    _check_mxfp4(blocks, scales)
    shape = (*scales.shape[:-1], scales.shape[-1] * MX_BLOCK)
    _check_out(shape, blocks.device, dtype, out)
    if out is None:
        return _DEQUANTIZE_MXFP4(blocks, scales, dtype)
    return _dequantize_mxfp4_into(out, blocks, scales)


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weight [..., N, K] to MXFP4 (blocks, scales) for `dequantize_mxfp4`, one scale per 32 columns.

        scales = 127 + floor(log2(amax(|block|))) - 2, at least 0; 127 for a block of zeros
        values = weight / 2^(scales - 127), to the nearest e2m1, ties to the even code, at most 6 in magnitude

    weight is float32, bfloat16 or float16. The scale follows the MX specification: an amax between 6 and 8 times the
    scale is clamped to 6. Dequantised weights whose blocks contain 4 or 6, or 2 or 3 times 2^-127, or zeros only, are
    restored exactly. Besides the result, float32 copies of at most 64 MiB (CPU: 1 MiB) or one row are in memory. The
    weights are read on the host once.

    Raises TypeError for other dtypes. Raises ValueError if K is not a multiple of 32, and for NaN or infinity, with the
    block.

    Source: OCP Microscaling Formats (MX) 1.0, section 6.3.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight: expected float32, bfloat16 or float16; found {weight.dtype}")
    if weight.dim() < 2 or weight.shape[-1] % MX_BLOCK:
        raise ValueError(f"weight: expected [..., N, K] with K a multiple of {MX_BLOCK}; found {tuple(weight.shape)}")
    weight = weight.detach()
    groups = (*weight.shape[:-1], weight.shape[-1] // MX_BLOCK)
    blocks = torch.empty(*groups, MX_BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(groups, dtype=torch.uint8, device=weight.device)
    finite = torch.ones(groups, dtype=torch.float32, device=weight.device)
    # Midpoints between codes. Every second one rounds up, to the even code, so it is lowered by one ulp.
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=weight.device)
    halfway[1::2] = torch.nextafter(halfway[1::2], torch.zeros_like(halfway[1::2]))
    for part, block, scale, check in _matrices(1, weight, blocks, scales, finite):
        for rows, _, _ in _chunks(part, (1, MX_BLOCK)):
            wide = part[rows].unflatten(1, (-1, MX_BLOCK)).to(torch.float32, copy=True)
            amax = wide.abs().amax(dim=2)
            check[rows] = amax
            # amax = m * 2^e with m in [0.5, 1)
            exponent = torch.frexp(amax).exponent - 1 - 2
            scale[rows] = torch.where(amax == 0, 127, (exponent + 127).clamp(0, 254)).to(torch.uint8)
            wide.div_(_power_of_two(scale[rows])[..., None])
            code = torch.bucketize(wide.abs(), halfway, out_int32=True).to(torch.uint8)
            code |= torch.signbit(wide).to(torch.uint8) << 3
            block[rows] = code[..., 0::2] | (code[..., 1::2] << 4)
    _refuse_nonfinite(finite, "weight")
    return blocks, scales


def scale_shape(shape: tuple[int, ...], block_size: tuple[int, int], halves: int = 1) -> tuple[int, ...]:
    """Return the shape of scale_inv for a weight [..., N, K] in `halves` parts; ValueError for invalid sizes."""
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"block_size = {tuple(block_size)}: expected two positive numbers, of rows and of columns")
    if halves < 1:
        raise ValueError(f"halves = {halves}: expected a positive number")
    if len(shape) < 2 or shape[-2] % halves:
        rows = "N" if halves == 1 else f"N a multiple of halves = {halves}"
        raise ValueError(f"weight: expected [..., N, K], {rows}; found {tuple(shape)}")
    return *shape[:-2], halves * -(-shape[-2] // halves // block_size[0]), -(-shape[-1] // block_size[1])


def _check_blocks(weight: Tensor, scale_inv: Tensor, block_size: tuple[int, int], halves: int) -> None:
    if weight.dtype != torch.float8_e4m3fn:
        raise TypeError(f"weight: expected float8_e4m3fn; found {weight.dtype}")
    if scale_inv.dtype not in _SCALE_DTYPES:
        raise TypeError(f"scale_inv: expected float32 or float8_e8m0fnu; found {scale_inv.dtype}")
    expected = scale_shape(weight.shape, block_size, halves)
    if scale_inv.shape != expected:
        blocks = f"blocks of {block_size[0]} x {block_size[1]}" + (f" in {halves} parts" if halves > 1 else "")
        raise ValueError(
            f"scale_inv: expected {list(expected)} for a weight of {list(weight.shape)} in {blocks}; "
            f"found {list(scale_inv.shape)}"
        )


def _check_mxfp4(blocks: Tensor, scales: Tensor) -> None:
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name}: expected uint8; found {tensor.dtype}")
    if blocks.dim() < 3 or blocks.shape[-1] != MX_BLOCK // 2:
        raise ValueError(f"blocks: expected [..., N, K/{MX_BLOCK}, {MX_BLOCK // 2}]; found {tuple(blocks.shape)}")
    if scales.shape != blocks.shape[:-1]:
        raise ValueError(f"scales: expected {list(blocks.shape[:-1])}; found {tuple(scales.shape)}")


def _check_out(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, out: Tensor | None) -> None:
    if out is not None and (out.shape != shape or out.device != device):
        raise ValueError(f"out: expected {list(shape)} on {device}; found {list(out.shape)} on {out.device}")
    found = dtype if out is None else out.dtype
    if found not in _DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16; found {found}")


def _matrices(halves: int, *stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching matrices of stacks [..., N, K...] with equal leading dimensions, each split into its halves."""
    lead = stacks[0].shape[: stacks[0].dim() - 2]
    for index in itertools.product(*map(range, lead)):
        yield from zip(*(stack[index].chunk(halves) if halves > 1 else [stack[index]] for stack in stacks), strict=True)


def _chunks(matrix: Tensor, block_size: tuple[int, int]) -> Iterator[tuple[slice, slice, int]]:
    """Yield (rows, their rows of blocks, rows per block): full blocks first, then the shorter last one."""
    height, most = block_size[0], _CHUNK_CPU if matrix.device.type == "cpu" else _CHUNK
    whole = matrix.shape[0] // height
    step = max(1, most // max(height * matrix.shape[1], 1))
    for first in range(0, whole, step):
        last = min(first + step, whole)
        yield slice(first * height, last * height), slice(first, last), height
    if rest := matrix.shape[0] - whole * height:
        yield slice(whole * height, matrix.shape[0]), slice(whole, whole + 1), rest


def _dequantize_blocks(
    codes: Tensor, scale_inv: Tensor, block_size: list[int], halves: int, dtype: torch.dtype
) -> Tensor:
    out, weight = _dequantize_blocks_fake(codes, scale_inv, block_size, halves, dtype), codes.view(torch.float8_e4m3fn)
    return _dequantize_blocks_into(out, weight, scale_inv, (block_size[0], block_size[1]), halves)


def _dequantize_blocks_into(
    out: Tensor, weight: Tensor, scale_inv: Tensor, block_size: tuple[int, int], halves: int
) -> Tensor:
    for part, scale, result in _matrices(halves, weight, scale_inv.to(torch.float32), out):
        for rows, blocks, height in _chunks(part, block_size):
            factor = scale[blocks].repeat_interleave(block_size[1], dim=1)[:, : part.shape[1]]
            wide = _to_float32(part[rows]).unflatten(0, (-1, height))
            result[rows].unflatten(0, (-1, height)).copy_(wide.mul_(factor[:, None]))
    return out


def _dequantize_blocks_fake(
    codes: Tensor, scale_inv: Tensor, block_size: list[int], halves: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return _dequantize_mxfp4_into(_dequantize_mxfp4_fake(blocks, scales, dtype), blocks, scales)


def _dequantize_mxfp4_into(out: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
    # `blocks` has one more dimension, at the end; the leading dimensions are equal.
    for result, scale, packed in _matrices(1, out, scales, blocks):
        for rows, _, _ in _chunks(result, (1, MX_BLOCK)):
            byte = packed[rows].to(torch.int16)
            # The exponent and mantissa of e2m1, shifted to those of e4m3, whose bias is larger by 6, are value / 64,
            # subnormals included. The upper nibble is second in memory, as in a little-endian pair.
            pair = (byte & 8).bitwise_left_shift_(4)
            pair |= (byte & 7).bitwise_left_shift_(2)
            pair |= (byte & 128).bitwise_left_shift_(8)
            pair |= (byte & 112).bitwise_left_shift_(6)
            wide = _to_float32(pair.view(torch.float8_e4m3fn)).mul_(64)
            result[rows].unflatten(1, (-1, MX_BLOCK)).copy_(wide.mul_(_power_of_two(scale[rows])[..., None]))
    return out


def _dequantize_mxfp4_fake(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(*scales.shape[:-1], scales.shape[-1] * MX_BLOCK, dtype=dtype, device=blocks.device)


def _to_float32(codes: Tensor) -> Tensor:
    """Convert float8_e4m3fn codes to float32, exactly."""
    if codes.device.type != "cpu" or not has_values(codes):
        return codes.to(torch.float32)
    # Several times faster than torch's scalar conversion. Sign, exponent and mantissa, shifted to those of float16,
    # whose bias is larger by 8, are value / 256, subnormals included; only NaN would become 480.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    wide = bits.view(torch.float16).mul_(256).to(torch.float32)
    nan = (codes.view(torch.uint8) & 127) == 127
    return wide.masked_fill_(nan, torch.nan) if nan.any() else wide


def _power_of_two(exponents: Tensor) -> Tensor:
    """Compute 2^(exponents - 127) as float32; NaN for 255."""
    return exponents.contiguous().view(torch.float8_e8m0fnu).to(torch.float32)


def _amax(wide: Tensor, width: int) -> Tensor:
    """Return each block's largest magnitude, [blocks, ceil(K / width)], of wide [blocks, height, K]; propagates NaN."""
    columns = wide.abs().amax(dim=1)
    columns = torch.nn.functional.pad(columns, (0, -columns.shape[1] % width))
    return columns.unflatten(1, (-1, width)).amax(dim=2)


def _block_scale(amax: Tensor, scale_fmt: str | None) -> Tensor:
    scale = (amax / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        up = _power_of_two((exponent + 127 - (mantissa == 0.5).int()).clamp(0, 254).to(torch.uint8))
        scale = torch.where(amax.isfinite(), up, amax)
    return torch.where(amax == 0, 1.0, scale)


def _refuse_nonfinite(per_block: Tensor, name: str) -> None:
    bad = per_block.isfinite().logical_not_()
    if has_values(bad) and bad.any():
        *lead, row, column = bad.nonzero()[0].tolist()
        where = f"{name}{lead}" if lead else name
        raise ValueError(f"{where}: NaN or infinity in block ({row}, {column}); {int(bad.sum())} such blocks in all")


_DEQUANTIZE_BLOCKS = define(
    "dequantize_blocks(Tensor codes, Tensor scale_inv, int[] block_size, int halves, ScalarType dtype) -> Tensor",
    kernel_module=None,
    cpu=_dequantize_blocks,
    fake=_dequantize_blocks_fake,
)
_DEQUANTIZE_MXFP4 = define(
    "dequantize_mxfp4(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor",
    kernel_module=None,
    cpu=_dequantize_mxfp4,
    fake=_dequantize_mxfp4_fake,
)
