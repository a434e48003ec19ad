"""FP8 blocks and MXFP4 against Python's own arithmetic, and against transformers' reading of gpt-oss."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from moe import ops
from moe.ops import quantization

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAN_CODES = (0x7F, 0xFF)


def e4m3(code: int) -> float:
    """float8_e4m3fn by its definition: a sign, four bits of exponent with bias 7, three of mantissa, no infinities."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code in NAN_CODES:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(nibble: int) -> float:
    return math.copysign(E2M1[nibble & 7], -1.0 if nibble & 8 else 1.0)


def fp8(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantises one matrix. A product of 4 by 24 bits is exact in float64; float32 and `dtype` each round it once."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    codes = weight.view(torch.uint8).tolist()
    for i, row in enumerate(codes):
        for j, code in enumerate(row):
            exact = e4m3(code) * scale[i // block[0], j // block[1]].item()
            with np.errstate(over="ignore"):
                out[i, j] = float(np.float32(exact))
    return out.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, signs of zero included; all NaNs are alike."""
    assert a.dtype == b.dtype and a.shape == b.shape
    number = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())
    return number and torch.equal(a.nan_to_num(0.0, math.inf, -math.inf), b.nan_to_num(0.0, math.inf, -math.inf))


def random_codes(*shape: int) -> Tensor:
    codes = torch.randint(0, 256, shape)
    return fp8(torch.where((codes & 127) == 127, codes - 1, codes))


SCALES = (1.0, 1 / 3, 2.0**-126, 1e-45, 3.4e38, 7.25e35, -0.1, 0.0, math.nan, math.inf)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_times_scales_of_every_kind(dtype: torch.dtype) -> None:
    weight = fp8(torch.arange(256)).expand(len(SCALES), 256)
    scale = torch.tensor(SCALES)[:, None]
    result = ops.dequantize_blocks(weight, scale, (1, 256), dtype)
    assert same(result, by_hand(weight.contiguous(), scale, (1, 256), dtype))
    assert result[0].double().nan_to_num().tolist() == [0.0 if math.isnan(e4m3(c)) else e4m3(c) for c in range(256)]


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((9, 20), (4, 8)),  # 576 x 7168 in small: a short last row of blocks
        ((8, 21), (4, 8)),
        ((3, 5), (4, 8)),
        ((1, 1), (1, 1)),
        ((7, 6), (1, 4)),
        ((6, 7), (4, 1)),
        ((16, 24), (8, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_by_hand(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_codes(*shape)
    scale = torch.rand(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])) + 0.01
    expected = by_hand(weight, scale, block, dtype)
    assert same(ops.dequantize_blocks(weight, scale, block, dtype), expected)
    # Any strides, in and out.
    strided = torch.full((shape[1], 2 * shape[0]), torch.nan, dtype=dtype).t()[::2]
    given = weight.t().contiguous().t()
    assert ops.dequantize_blocks(given, scale.t().contiguous().t(), block, out=strided) is strided
    assert same(strided.contiguous(), expected)


def test_defaults_are_blocks_of_128_and_bfloat16() -> None:
    weight = torch.randn(2, 260, 300).cumsum(-1)
    codes, scales = ops.quantize_blocks(weight)
    for found, told in zip(
        (codes, scales), ops.quantize_blocks(weight, (128, 128), scale_fmt=None, halves=1), strict=True
    ):
        assert torch.equal(found.view(torch.uint8), told.view(torch.uint8))
    read = ops.dequantize_blocks(codes, scales)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, ops.dequantize_blocks(codes, scales, (128, 128), halves=1, dtype=torch.bfloat16))
    rows, told = quantization.quantize_rows(weight[0]), quantization.quantize_rows(weight[0], 128)
    assert torch.equal(rows[0].view(torch.uint8), told[0].view(torch.uint8)) and torch.equal(rows[1], told[1])


def test_long_matrices_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = random_codes(2, 37, 20), torch.rand(2, 10, 3)
    whole = ops.dequantize_blocks(weight, scale, (4, 8), torch.float32)
    numbers = torch.randn(2, 37, 20)
    quantised = ops.quantize_blocks(numbers, (4, 8))
    mx = torch.randn(11, 64)
    packed = ops.quantize_mxfp4(mx)
    for most in (1, 200, 10**9):  # a row of blocks, two of them, everything
        monkeypatch.setattr(quantization, "_CHUNK_CPU", most)
        assert torch.equal(ops.dequantize_blocks(weight, scale, (4, 8), torch.float32), whole)
        for a, b in zip(ops.quantize_blocks(numbers, (4, 8)), quantised, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert all(map(torch.equal, ops.quantize_mxfp4(mx), packed))
        assert same(ops.dequantize_mxfp4(*packed), ops.dequantize_mxfp4(*packed))


@pytest.mark.parametrize("hidden", [8, 10])
def test_stacked_experts_have_two_halves(hidden: int) -> None:
    """F = 10 in blocks of 4: three rows of blocks each, and the up half begins with a new one."""
    weight, rows = random_codes(3, 2 * hidden, 20), math.ceil(hidden / 4)
    scale = torch.rand(3, 2 * rows, 3) + 0.1
    result = ops.dequantize_blocks(weight, scale, (4, 8), torch.float32, halves=2)
    for expert in range(3):
        for half in range(2):
            here, blocks = slice(half * hidden, half * hidden + hidden), slice(half * rows, half * rows + rows)
            expected = by_hand(weight[expert, here], scale[expert, blocks], (4, 8), torch.float32)
            assert same(result[expert, here], expected)
    numbers = torch.randn(3, 2 * hidden, 20)
    codes, scale_inv = ops.quantize_blocks(numbers, (4, 8), halves=2)
    for expert in range(3):
        gate, up = (ops.quantize_blocks(half, (4, 8)) for half in numbers[expert].chunk(2))
        assert torch.equal(codes[expert].view(torch.uint8), torch.cat([gate[0], up[0]]).view(torch.uint8))
        assert torch.equal(scale_inv[expert], torch.cat([gate[1], up[1]]))


def test_powers_of_two_as_float8_and_as_float32() -> None:
    weight = random_codes(8, 8)
    exponents = torch.tensor([[0, 1], [126, 130]], dtype=torch.uint8)
    wide = torch.tensor([[2.0**-127, 2.0**-126], [0.5, 8.0]])
    for dtype in FLOATS:
        result = ops.dequantize_blocks(weight, exponents.view(torch.float8_e8m0fnu), (4, 4), dtype)
        assert same(result, ops.dequantize_blocks(weight, wide, (4, 4), dtype))
        assert same(result, by_hand(weight, wide, (4, 4), dtype))
    unknown = torch.full((2, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert ops.dequantize_blocks(weight, unknown, (4, 4)).isnan().all()


def test_refusals_name_what_was_expected_and_found() -> None:
    weight, scale = random_codes(9, 20), torch.ones(3, 3)
    with pytest.raises(
        ValueError, match=r"expected \[3, 2\] for a weight of \[9, 20\] in blocks of 4 x 16, got \[3, 3"
    ):
        ops.dequantize_blocks(weight, scale, (4, 16))
    with pytest.raises(ValueError, match=r"scale_inv: expected \[3, 2\] .* got \[2, 3\]"):  # transposed
        ops.dequantize_blocks(weight, torch.ones(2, 3), (4, 16))
    with pytest.raises(ValueError, match=r"scale_inv: expected \[1, 1\] .* blocks of 128 x 128, got \[3, 3\]"):
        ops.dequantize_blocks(weight, scale)
    with pytest.raises(ValueError, match=r"expected \[6, 3\] .* in blocks of 4 x 8 in 2 parts, got \[5, 3\]"):
        ops.dequantize_blocks(random_codes(18, 20), torch.ones(5, 3), (4, 8), halves=2)
    with pytest.raises(ValueError, match=r"weight: expected \[..., N, K\], N a multiple of halves = 2, got \(9, 20\)"):
        ops.dequantize_blocks(weight, scale, (4, 8), halves=2)
    with pytest.raises(ValueError, match="halves = 0: expected a positive number"):
        ops.dequantize_blocks(weight, scale, (4, 8), halves=0)
    with pytest.raises(ValueError, match=r"block_size = \(0, 8\): expected two positive numbers"):
        ops.dequantize_blocks(weight, scale, (0, 8))
    with pytest.raises(ValueError, match=r"weight: expected \[..., N, K\], N, got \(9,\)"):
        ops.dequantize_blocks(weight[:, 0], scale, (4, 8))
    with pytest.raises(TypeError, match=r"weight: expected float8_e4m3fn, got torch\.float8_e5m2"):
        ops.dequantize_blocks(weight.view(torch.float8_e5m2), scale, (4, 8))
    with pytest.raises(TypeError, match=r"scale_inv: expected float32 or float8_e8m0fnu, got torch\.bfloat16"):
        ops.dequantize_blocks(weight, scale.bfloat16(), (4, 8))
    with pytest.raises(TypeError, match=r"dtype: expected float32, .* got torch\.int8"):
        ops.dequantize_blocks(weight, scale, (4, 8), torch.int8)
    with pytest.raises(TypeError, match=r"dtype: expected float32, .* got torch\.float8_e4m3fn"):
        ops.dequantize_blocks(weight, scale, (4, 8), out=weight)
    with pytest.raises(ValueError, match=r"out: expected \[9, 20\] on cpu, got \[20, 9\] on cpu"):
        ops.dequantize_blocks(weight, scale, (4, 8), out=torch.empty(20, 9))
    with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16 or float16, got torch\.float64"):
        ops.quantize_blocks(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="scale_fmt = 'e8m0': expected None or 'ue8m0'"):
        ops.quantize_blocks(torch.ones(2, 2), scale_fmt="e8m0")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", FLOATS[:1] + FLOATS[2:], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_nan_and_infinity_are_refused(dtype: torch.dtype, value: float, scale_fmt: None) -> None:
    weight = torch.randn(2, 9, 20).to(dtype)
    weight[1, 8, 13] = weight[1, 8, 19] = value
    with pytest.raises(ValueError, match=r"weight\[1\]: NaN or infinity in block \(2, 1\); 2 such blocks in all"):
        ops.quantize_blocks(weight, (4, 8), scale_fmt=scale_fmt)
    with pytest.raises(ValueError, match=r"weight: NaN or infinity in block \(0, 0\); 1 such blocks"):
        ops.quantize_blocks(weight[1, 8:], (128, 128), scale_fmt=scale_fmt)
    weight = torch.randn(2, 3, 64).to(dtype)
    weight[1, 2, 33] = value
    with pytest.raises(ValueError, match=r"weight\[1\]: NaN or infinity in block \(2, 1\); 1 such blocks in all"):
        ops.quantize_mxfp4(weight)


POSITIVE = [(code, Fraction(e4m3(code))) for code in range(0x7F)]


def nearest_fp8(value: float) -> int:
    """The code of the float8_e4m3fn nearest to `value`, ties to the even code, by looking at all of them."""
    magnitude = Fraction(abs(value))
    best = min(abs(magnitude - number) for _, number in POSITIVE)
    codes = [code for code, number in POSITIVE if abs(magnitude - number) == best]
    code = codes[0] if len(codes) == 1 else next(c for c in codes if c % 2 == 0)
    return code | (128 if math.copysign(1, value) < 0 else 0)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("dtype", FLOATS[:1] + FLOATS[2:], ids=str)
def test_quantised_by_hand(dtype: torch.dtype, scale_fmt: None) -> None:
    weight = (torch.randn(9, 20) * torch.logspace(-4, 4, 20)).to(dtype)
    weight[:4, :8] = 0
    weight[0, 0] = -0.0
    weight[:4, 8:16] = weight[:4, 8:16].sign() * torch.finfo(dtype).smallest_normal * 2.0**-6  # subnormal
    weight[4:8, :8] = (torch.rand(4, 8, dtype=torch.float64) - 0.5) * torch.finfo(dtype).max
    weight[4, 0] = torch.finfo(dtype).max
    original = weight.clone()
    codes, scale_inv = ops.quantize_blocks(weight, (4, 8), scale_fmt=scale_fmt)
    assert torch.equal(weight, original)
    assert codes.dtype == torch.float8_e4m3fn and scale_inv.dtype == torch.float32 and scale_inv.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            here = slice(4 * i, 4 * i + 4), slice(8 * j, 8 * j + 8)
            block = weight[here].float()
            amax = np.float32(block.abs().max().item())
            scale = max(amax / np.float32(448), np.float32(2.0**-126)) if amax else np.float32(1)
            if scale_fmt:
                scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
            assert scale_inv[i, j].item() == scale
            expected = [[nearest_fp8(float(np.float32(v) / scale)) for v in row] for row in block.tolist()]
            assert codes[here].view(torch.uint8).tolist() == expected
    assert scale_inv[0, 0] == 1 and codes.view(torch.uint8)[0, 0] == 128
    back = ops.dequantize_blocks(codes, scale_inv, (4, 8), torch.float32)
    # Half a step: 2^-4 of the value, or of the smallest normal code for what lies below it.
    wide, unit = original.float(), scale_inv.repeat_interleave(4, 0)[:9].repeat_interleave(8, 1)[:, :20]
    limit = torch.maximum(wide.abs() * (1 / 16 + 2.0**-20), unit * 2.0**-10)
    too_large = (wide.abs() > 248 * 2.0**120) & (scale_fmt is not None)
    assert ((back - wide).abs() <= limit)[~too_large].all() and back[too_large].isinf().all()


def test_powers_of_two_are_rounded_up_and_kept() -> None:
    for exponent in (-126, -10, 0, 9, 118):
        for amax, expected in ((448.0, 0), (448.0001, 1), (224.0, -1), (300.0, 0)):
            value = torch.tensor([[amax * 2.0**exponent]])
            scale = ops.quantize_blocks(value, scale_fmt="ue8m0")[1].item()
            assert scale == max(2.0 ** (exponent + expected), 2.0**-126)
    largest = torch.full((1, 1), torch.finfo(torch.float32).max)
    assert ops.quantize_blocks(largest, scale_fmt="ue8m0")[1].item() == 2.0**120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("powers", [True, False])
def test_what_a_second_round_keeps(dtype: torch.dtype, powers: bool) -> None:
    codes = random_codes(40, 60, 8)
    codes.view(torch.uint8)[:, 3, 3] = 0x7E  # 448
    codes.view(torch.uint8)[:, 59, 7] = 0xFE
    scale = torch.rand(40, 2, 1) * 2.0 ** torch.randint(-20, 20, (40, 2, 1)) + 1e-6
    if powers:
        scale = 2.0 ** scale.log2().round()
    weight = ops.dequantize_blocks(codes, scale, (30, 8), dtype)
    for scale_fmt in (None, "ue8m0") if powers else (None,):
        again, scale_again = ops.quantize_blocks(weight, (30, 8), scale_fmt=scale_fmt)
        assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
        if powers:
            assert torch.equal(scale_again, scale)
            assert same(ops.dequantize_blocks(again, scale_again, (30, 8), dtype), weight)
    if not powers and dtype == torch.float32:
        steps = (scale_again.view(torch.int32) - scale.view(torch.int32)).abs()  # pyright: ignore
        assert steps.max() == 1  # not always the same scale: 448 * scale was rounded
    elif not powers:
        assert ((scale_again - scale).abs() <= 2.0**-8 * scale).all()  # pyright: ignore


def test_empty_matrices() -> None:
    for shape, scales in (((0, 5), (0, 1)), ((5, 0), (2, 0)), ((0, 4, 4), (0, 1, 1)), ((2, 0, 4), (2, 0, 1))):
        codes, scale = ops.quantize_blocks(torch.empty(shape), (4, 8), halves=2 if shape[-2] == 0 else 1)
        assert codes.shape == shape and scale.shape == scales
        halves = 2 if shape[-2] == 0 else 1
        assert ops.dequantize_blocks(codes, scale, (4, 8), halves=halves).shape == shape
    for shape in ((0, 32), (4, 0), (0, 4, 32), (2, 0, 32)):
        blocks, scales = ops.quantize_mxfp4(torch.empty(shape))
        assert blocks.shape == (*shape[:-1], shape[-1] // 32, 16) and scales.shape == blocks.shape[:-1]
        assert ops.dequantize_mxfp4(blocks, scales).shape == shape


def every_byte(scales: list[int]) -> tuple[Tensor, Tensor]:
    """[S, 1, 16, 16] with all 256 bytes for each scale."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(len(scales), -1, -1, -1)
    return blocks.contiguous(), torch.tensor(scales, dtype=torch.uint8)[:, None, None].repeat(1, 1, 16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mxfp4_by_hand_for_every_byte_and_scale(dtype: torch.dtype) -> None:
    blocks, scales = every_byte(list(range(256)))
    expected = np.empty((256, 1, 512), dtype=np.float32)
    for scale in range(256):
        factor = math.nan if scale == 255 else 2.0 ** (scale - 127)
        values = [e2m1(nibble) * factor for byte in range(256) for nibble in (byte & 15, byte >> 4)]
        with np.errstate(over="ignore"):
            expected[scale, 0] = np.array(values, dtype=np.float64).astype(np.float32)
    assert same(ops.dequantize_mxfp4(blocks, scales, dtype), torch.from_numpy(expected).to(dtype))
    if dtype == torch.bfloat16:  # exact wherever it is finite
        wide = torch.from_numpy(expected)
        assert same(ops.dequantize_mxfp4(blocks, scales).float(), wide)
        assert wide[252:255].isinf().sum(dim=(1, 2)).tolist() == [0, 128, 256]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mxfp4_as_transformers_reads_it(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = every_byte([1, 64, 100, 120, 126, 127, 128, 140, 200, 252])
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert same(ops.dequantize_mxfp4(blocks, scales, dtype), theirs.transpose(1, 2))
    blocks, scales = torch.randint(0, 256, (3, 6, 2, 16)).byte(), torch.randint(110, 130, (3, 6, 2)).byte()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert theirs.shape == (3, 64, 6)
    assert same(ops.dequantize_mxfp4(blocks, scales, dtype), theirs.transpose(1, 2))
    strided = torch.full((3, 64, 6), torch.nan, dtype=dtype)
    given = blocks.transpose(0, 1).contiguous().transpose(0, 1)
    assert ops.dequantize_mxfp4(given, scales.mT.contiguous().mT, out=strided.mT).shape == (3, 6, 64)
    assert same(strided, theirs)


def nearest_e2m1(value: float) -> int:
    magnitude = min(Fraction(abs(value)), Fraction(6))
    best = min(abs(magnitude - Fraction(number)) for number in E2M1)
    codes = [code for code, number in enumerate(E2M1) if abs(magnitude - Fraction(number)) == best]
    code = codes[0] if len(codes) == 1 else next(c for c in codes if c % 2 == 0)
    return code | (8 if math.copysign(1, value) < 0 else 0)


@pytest.mark.parametrize("dtype", FLOATS[:1] + FLOATS[2:], ids=str)
def test_mxfp4_quantised_by_hand(dtype: torch.dtype) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 7.9, 0.0, -0.0]
    around = [float(np.nextafter(np.float32(t), np.float32(side))) for t in ties for side in (-9, 9)]
    values = [v for t in (*ties, *around) for v in (t, -t)]
    values += [0.0] * (-len(values) % 31)
    rows = torch.tensor(values).view(-1, 31)
    weight = torch.cat([torch.full((len(rows), 1), 4.0), rows], dim=1)
    scaled = [weight * 2.0**e for e in (0, 3, -9)]
    extreme = torch.randn(6, 32)
    extreme[0] = 0
    extreme[1] = -0.0
    extreme[2] *= torch.finfo(dtype).smallest_normal * 2.0**-4
    extreme[3] *= torch.finfo(dtype).max / 8
    weight = torch.cat([*scaled, extreme]).to(dtype)
    original = weight.clone()
    blocks, scales = ops.quantize_mxfp4(weight)
    assert torch.equal(weight, original) and blocks.dtype == scales.dtype == torch.uint8
    for row, block, scale in zip(weight.float().tolist(), blocks[:, 0].tolist(), scales[:, 0].tolist(), strict=True):
        amax = max(map(abs, row))
        expected = max(0, 127 + math.frexp(amax)[1] - 1 - 2) if amax else 127
        assert scale == expected
        codes = [nearest_e2m1(v / 2.0 ** (scale - 127)) for v in row]
        assert block == [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]


def test_mxfp4_keeps_its_own_numbers() -> None:
    blocks, scales = torch.randint(0, 256, (4, 50, 2, 16)).byte(), torch.randint(0, 253, (4, 50, 2)).byte()
    blocks[..., 5] = blocks[..., 5] & 0xF0 | 0x7  # a 6 in each, so that the scale can be seen
    blocks[0, 0], scales[0, 0] = 0x80, 127
    weight = ops.dequantize_mxfp4(blocks, scales)
    for again, first in zip(ops.quantize_mxfp4(weight), (blocks, scales), strict=True):
        assert torch.equal(again, first)


def test_mxfp4_refusals() -> None:
    blocks, scales = torch.zeros(3, 2, 16, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scales: expected \[3, 2\], got \(2, 3\)"):
        ops.dequantize_mxfp4(blocks, scales.t())
    with pytest.raises(ValueError, match=r"blocks: expected \[..., N, K/32, 16\], got \(3, 32\)"):
        ops.dequantize_mxfp4(blocks.flatten(1), scales)
    with pytest.raises(TypeError, match=r"blocks: expected uint8, got torch\.int8"):
        ops.dequantize_mxfp4(blocks.view(torch.int8), scales)
    with pytest.raises(TypeError, match=r"scales: expected uint8, got torch\.float32"):
        ops.dequantize_mxfp4(blocks, scales.float())
    with pytest.raises(ValueError, match=r"out: expected \[3, 64\] on cpu, got \[64, 3\] on cpu"):
        ops.dequantize_mxfp4(blocks, scales, out=torch.empty(64, 3))
    with pytest.raises(ValueError, match=r"weight: expected \[..., N, K\] with K a multiple of 32, got \(3, 33\)"):
        ops.quantize_mxfp4(torch.ones(3, 33))
    with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16 or float16, got torch\.float64"):
        ops.quantize_mxfp4(torch.ones(3, 32, dtype=torch.float64))


def test_on_meta_only_the_shapes() -> None:
    weight, scale = random_codes(2, 10, 20).to("meta"), torch.rand(2, 4, 3, device="meta")
    result = ops.dequantize_blocks(weight, scale, (4, 8), torch.float16, halves=2)
    assert result.is_meta and result.shape == weight.shape and result.dtype == torch.float16
    blocks, scales = (torch.zeros(shape, dtype=torch.uint8, device="meta") for shape in ((3, 2, 16), (3, 2)))
    assert ops.dequantize_mxfp4(blocks, scales).shape == (3, 64)


def test_no_gradient_and_nothing_written_to_the_inputs() -> None:
    weight, scale = random_codes(9, 20), torch.rand(3, 3)
    codes, factors = weight.view(torch.uint8).clone(), scale.clone()
    assert not ops.dequantize_blocks(weight.requires_grad_(), scale.requires_grad_(), (4, 8)).requires_grad
    assert torch.equal(weight.view(torch.uint8), codes) and torch.equal(scale, factors)
    numbers = torch.randn(9, 64, requires_grad=True)
    before = numbers.detach().clone()
    assert not any(t.requires_grad for t in (*ops.quantize_blocks(numbers, (4, 8)), *ops.quantize_mxfp4(numbers)))
    assert torch.equal(numbers, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (5, 128), (7, 200), (2, 385)])
def test_rows_for_a_dispatch_by_their_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.logspace(-6, 5, shape[0])[:, None]).to(dtype)
    codes, scale_inv = quantization.quantize_rows(x)
    assert codes.shape == x.shape and codes.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == (shape[0], -(-shape[1] // 128)) and scale_inv.dtype == torch.float32
    for t in range(shape[0]):
        for first in range(0, shape[1], 128):
            block = x[t, first : first + 128].float()
            scale = max(block.abs().max().item(), 1e-4) / 448
            assert scale_inv[t, first // 128].item() == pytest.approx(scale, rel=2.0**-23)
            # One rounding to three bits behind the point; below 2^-6 of the scale, to its 2^-9.
            back = codes[t, first : first + 128].float() * scale
            assert (
                (back - block).abs() <= torch.maximum(block.abs() * 2.0**-4, torch.tensor(scale * 2.0**-10)) * 1.0001
            ).all()
    assert torch.equal(
        quantization.dequantize_blocks(codes, scale_inv, (1, 128), torch.float32), _scaled(codes, scale_inv)
    )


def _scaled(codes: Tensor, scale_inv: Tensor) -> Tensor:
    return codes.float() * scale_inv.repeat_interleave(128, dim=1)[:, : codes.shape[1]]


def test_rows_that_are_not_finite_spoil_their_block_only() -> None:
    x = torch.ones(3, 256)
    x[0, 5], x[1, 200] = torch.nan, torch.inf
    back = quantization.dequantize_blocks(*quantization.quantize_rows(x), (1, 128), torch.float32)
    finite = back.isfinite()
    assert not finite[0, 5] and not finite[1, 200]
    assert finite[0, 128:].all() and finite[1, :128].all() and finite[2].all()
    with pytest.raises(ValueError, match="floating point"):
        quantization.quantize_rows(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[T, D\]"):
        quantization.quantize_rows(torch.ones(2))
