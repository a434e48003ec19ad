"""Int8 weights: quantisation by its definition, and products against float64 of the dequantised weights."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe import ops
from moe.ops import SwiGLU, int8
from moe.ops.int8 import int8_linear, int8_mlp
from tests.support.bound import DTYPES, UNIT, against_eager, excess, product_limit
from tests.support.cases import BY_NAME, CASES, Case, Inputs
from tests.support.operators import digest, eager_experts
from tests.support.running_error import MANY, moe_mlp_errors

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def rows_of_every_kind(dtype: torch.dtype) -> Tensor:
    """[9, 21]: zeros, subnormals, the largest values, one outlier, ties between two codes, and random values."""
    weight = torch.randn(9, 21, dtype=torch.float64)
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 3e38
    weight[0] = 0
    weight[1] *= torch.finfo(dtype).smallest_normal / 4
    weight[2] = largest * (weight[2] / weight[2].abs().max())
    weight[3, 7] = 1e4
    weight[4] = torch.arange(-10, 11) + 0.5
    weight[4, 0] = 127
    weight[5, 3:] = 0
    return weight.to(dtype)


@each_dtype
def test_quantised_by_its_definition(dtype: torch.dtype) -> None:
    weight = rows_of_every_kind(dtype)
    codes, scale = ops.quantize_int8(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (9,))
    for row, code, factor in zip(weight.double().tolist(), codes.tolist(), scale.tolist(), strict=True):
        amax = max(abs(Fraction(value)) for value in row)
        exact = max(amax / 127, Fraction(2) ** -126) if amax else Fraction(1)
        assert abs(Fraction(factor) - exact) <= exact / 2**8
        # In float32 the quotient has one rounding.
        slack = Fraction(127, 2**24)
        assert all(
            abs(Fraction(v) / Fraction(factor) - c) <= Fraction(1, 2) + slack for v, c in zip(row, code, strict=True)
        )
        assert max(map(abs, code)) in (0, 1) or max(map(abs, code)) >= 126 or exact == Fraction(2) ** -126
    assert not codes[0].any() and scale[0] == 1
    assert (ops.dequantize_int8(codes, scale, torch.float64)[0] == 0).all()
    assert codes[4].tolist() == [127, -8, -8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]


@each_dtype
def test_integers_times_a_scale_are_restored_exactly(dtype: torch.dtype) -> None:
    exact = torch.randint(-127, 128, (3, 5, 17)).double()
    exact[..., 2] = -127
    scale = torch.tensor([1.0, 2**-5, 2**3, 2**-10, 1.0]).double()
    if dtype in (torch.float32, torch.float64):
        scale *= torch.tensor([1.0, 1.0078125, 1.5, 1.9921875, 129 / 256])  # each a bfloat16
    weight = (exact * scale[:, None]).to(dtype)
    assert torch.equal(weight.double(), exact * scale[:, None])
    codes, found = ops.quantize_int8(weight)
    assert torch.equal(codes.double(), exact) and torch.equal(found.double(), scale.expand(3, 5))
    assert torch.equal(ops.dequantize_int8(codes, found, dtype), weight)


@each_dtype
def test_every_code_times_scales_of_every_kind(dtype: torch.dtype) -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8).expand(5, 255)
    scale = torch.tensor([1.0, 1 / 3, 2.0**-126, 2.6e36, 1e-6]).bfloat16()
    exact = codes.double() * scale.double()[:, None]
    expected = exact.to(torch.float32).to(dtype)  # 15 bits: exact in float32
    assert torch.equal(ops.dequantize_int8(codes, scale, dtype), expected)
    out = torch.empty(255, 5, dtype=dtype).t()
    assert ops.dequantize_int8(codes, scale, out=out) is out and torch.equal(out, expected)


def test_long_matrices_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(2, 37, 24), torch.randn(30, 24)
    codes, scale = ops.quantize_int8(weight)
    y = int8_linear(x, codes[0], scale[0])
    monkeypatch.setattr(int8, "_CHUNK", 100)
    again = ops.quantize_int8(weight)
    assert torch.equal(codes, again[0]) and torch.equal(scale, again[1])
    exact, magnitude = (
        part(x.double()) @ part(codes[0].double() * scale[0].double()[:, None]).T
        for part in (torch.Tensor.clone, torch.abs)
    )
    limit = product_limit(exact, magnitude, 24, torch.float32) + UNIT[torch.float32] * exact.abs()
    for found in (y, int8_linear(x, codes[0], scale[0])):
        assert excess(found, exact, limit) <= 1
    assert torch.equal(ops.quantize_int8(weight.mT.contiguous().mT)[0], codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@each_dtype
def test_what_is_not_finite_is_refused(dtype: torch.dtype, value: float) -> None:
    weight = torch.randn(2, 4, 6, dtype=torch.float64).to(dtype)
    weight[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"^weight\[1, 2\]: NaN, infinity or too large; 1 such rows$"):
        ops.quantize_int8(weight)
    with pytest.raises(ValueError, match=r"^weight\[0\]: NaN, infinity or too large"):
        ops.quantize_int8(torch.full((2, 3), 1e300, dtype=torch.float64))


def test_refusals_and_empty_sizes() -> None:
    codes, scale = torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, dtype=torch.bfloat16)
    x, ids = torch.randn(3, 6), torch.zeros(3, 1, dtype=torch.int64)
    for error, message, call in (
        (TypeError, "weight: expected float32, float64", lambda: ops.quantize_int8(codes)),
        (ValueError, r"weight: expected \[..., N, K\]; found \(6,\)", lambda: ops.quantize_int8(x[0])),
        (TypeError, "codes: expected int8; found torch.float32", lambda: ops.dequantize_int8(x, scale)),
        (TypeError, "scale: expected bfloat16; found torch.float32", lambda: int8_linear(x, codes, scale.float())),
        (ValueError, r"scale: expected \[..., N\] .*\[4, 6\]; found \(3,\)", lambda: int8_linear(x, codes, scale[1:])),
        (TypeError, "dtype: expected float32", lambda: ops.dequantize_int8(codes, scale, torch.int32)),
        (TypeError, "x: expected float32, float64, .* found torch.int64", lambda: int8_linear(ids, codes, scale)),
        (ValueError, r"x: expected .* \[4, 6\]; found \(3, 5\)", lambda: int8_linear(x[:, 1:], codes, scale)),
        (ValueError, r"x: expected \[..., K\]", lambda: int8_linear(x[0, 0], codes, scale)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    for shape in ((0, 5), (3, 0), (2, 0, 4)):
        empty, ones = ops.quantize_int8(torch.randn(shape))
        assert empty.shape == shape and torch.equal(ones, torch.ones(shape[:-1], dtype=torch.bfloat16))
    meta = ops.quantize_int8(torch.empty(2, 3, 4, device="meta"))
    assert [(t.shape, t.dtype, t.is_meta) for t in meta] == [
        ((2, 3, 4), torch.int8, True),
        ((2, 3), torch.bfloat16, True),
    ]


SHAPES = [(32, 64), (9, 20), (16, 33), (30, 48), (4, 7), (1, 16), (0, 16), (5, 0), (4, 0)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 16, 17, 40])
def test_linear(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scale = ops.quantize_int8(torch.randn(shape))
    x = torch.randn(tokens, shape[1], dtype=torch.float64).to(dtype)
    weight = ops.dequantize_int8(codes, scale, torch.float64)
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    # A second rounding, of the unscaled sum; float64 is as inexact as its reference.
    limit = product_limit(exact, magnitude, max(shape[1], 1), dtype) + UNIT[dtype] * exact.abs()
    y = int8_linear(x, codes, scale)
    assert y.dtype == dtype and excess(y, exact, 2 * limit if dtype == torch.float64 else limit) <= 1
    several = int8_linear(x.expand(2, 3, *x.shape), codes, scale)
    assert several.shape == (2, 3, tokens, shape[0])
    assert excess(several[1, 2], exact, 2 * limit if dtype == torch.float64 else limit) <= 1
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert excess(int8_linear(strided, codes, scale), exact, 2 * limit if dtype == torch.float64 else limit) <= 1


def test_large_values_do_not_overflow_in_float16() -> None:
    codes, scale = ops.quantize_int8(torch.full((4, 512), 1e-3))
    x = torch.full((20, 512), 300.0, dtype=torch.float16)
    torch.testing.assert_close(int8_linear(x, codes, scale).float(), torch.full((20, 4), 153.6), rtol=4e-3, atol=0)


class Called(TorchDispatchMode):
    """Names of the operators of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def aligned(shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> Tensor:
    """Random values at an address that is `shift` bytes above a multiple of 64."""
    size = torch.Size(shape).numel() * dtype.itemsize
    storage = torch.zeros(size + 128, dtype=torch.uint8)
    start = -storage.data_ptr() % 64 + shift
    out = storage[start : start + size].view(dtype).view(shape)
    return out.copy_(torch.randint(-9, 9, shape))


@pytest.mark.parametrize(
    ("why", "x", "codes"),
    [
        ("", ((3, 32), 0), ((8, 32), 0)),
        ("", ((16, 32), 32), ((8, 32), 16)),
        ("", ((1, 16), 0), ((4, 16), 0)),
        ("too many rows", ((17, 32), 0), ((8, 32), 0)),
        ("no rows", ((0, 32), 0), ((8, 32), 0)),
        ("a width that is no multiple of 16", ((3, 40), 0), ((8, 40), 0)),
        ("outputs that are no multiple of 4", ((3, 32), 0), ((6, 32), 0)),
        ("x not aligned", ((3, 32), 16), ((8, 32), 0)),
        ("codes not aligned", ((3, 32), 0), ((8, 32), 8)),
    ],
)
def test_torchs_operator_runs_where_it_is_safe(why: str, x: tuple[Any, int], codes: tuple[Any, int]) -> None:
    """It crashes, or reads beyond rows, for other operands in bfloat16."""
    a, b = aligned(x[0], torch.bfloat16, x[1]), aligned(codes[0], torch.int8, codes[1])
    assert int8._can_pack(a, b) == (not why)
    assert not int8._can_pack(a.float(), b) and not int8._can_pack(a.half(), b)
    scale = torch.ones(codes[0][0], dtype=torch.bfloat16)
    assert torch.equal(int8_linear(a, b, scale).double(), (a.double() @ b.double().T).bfloat16().double())
    transposed = b.t().contiguous().t()
    assert not int8._can_pack(a, transposed)
    assert torch.equal(int8_linear(a, transposed, scale), int8_linear(a, b, scale))
    assert not int8._can_pack(a.t().contiguous().t(), b) or min(a.shape) == 1
    with Called() as called:
        int8._product(a, b, scale)
    assert ("_weight_int8pack_mm" in called.names) == (not why)


def test_torchs_operator_has_offsets_of_32_bits() -> None:
    with torch.device("meta"):
        x = torch.empty(1, 2**16, dtype=torch.bfloat16)
        assert int8._can_pack(x, torch.empty(2**15 - 4, 2**16, dtype=torch.int8))
        assert not int8._can_pack(x, torch.empty(2**15, 2**16, dtype=torch.int8))


def quantised(i: Inputs) -> tuple[tuple[Tensor, ...], Inputs]:
    """(codes and scales of gate_up and down, inputs with the dequantised weights in float64)"""
    parts = (*ops.quantize_int8(i.gate_up), *ops.quantize_int8(i.down))
    gate_up, down = (ops.dequantize_int8(*pair, torch.float64) for pair in (parts[:2], parts[2:]))
    return parts, replace(i, gate_up=gate_up, down=down)


def run(i: Inputs, parts: tuple[Tensor, ...], bias: bool = True, activation: SwiGLU = SwiGLU()) -> Tensor:
    gate_up, gate_up_scale, down, down_scale = parts
    biases = (i.gate_up_bias, i.down_bias) if bias else (None, None)
    return int8_mlp(i.x, gate_up, gate_up_scale, down, down_scale, i.weights, i.expert_ids, *biases, activation)


# Sizes for which torch's operator runs, with one token, few per expert and many.
PACKED = (
    Case("packed_one", 1, 32, 16, 6, 3),
    Case("packed_few", 9, 32, 16, 6, 2, "absent"),
    Case("packed_many", 90, 64, 32, 4, 2, "skew"),
)


@each_dtype
@pytest.mark.parametrize("case", (*CASES, *PACKED), ids=str)
def test_mlp(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    parts, wide = quantised(inputs)
    y = run(inputs, parts)
    assert y.dtype == dtype and y.shape == inputs.x.shape
    computed = moe_mlp_errors(replace(wide, x=inputs.x), torch.zeros_like(inputs.x))["y"]
    exact = eager_experts(wide.to(torch.float64))
    # Twice, because each product may be rounded a second time, before it is scaled.
    assert excess(y, exact, 2 * computed.error) <= 1
    if min(inputs.expert_ids.numel(), exact.numel()) >= MANY:
        assert against_eager(y, eager_experts(wide.to(dtype)), exact, dtype).right
    assert torch.equal(run(inputs, parts), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [SwiGLU(), SwiGLU(limit=0.7, alpha=1.702, beta=1.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["packed_few", "packed_many", "absent"])
def test_mlp_with_every_setting(name: str, bias: bool, activation: SwiGLU, dtype: torch.dtype) -> None:
    case = next((case for case in PACKED if case.name == name), None) or BY_NAME[name]
    inputs = case.inputs(dtype)
    if not bias:
        inputs = replace(inputs, gate_up_bias=inputs.gate_up_bias * 0, down_bias=inputs.down_bias * 0)
    parts, wide = quantised(inputs)
    computed = moe_mlp_errors(replace(wide, x=inputs.x), torch.zeros_like(inputs.x), activation)["y"]
    y = run(inputs, parts, bias, activation)
    assert excess(y, computed.exact, 2 * computed.error) <= 1
    absent = (inputs.expert_ids == -1).all(dim=1)
    assert (y[absent] == 0).all() and not (y[~absent] == 0).all(dim=1).any()


def test_no_routing_slots_and_ids_out_of_range() -> None:
    inputs = PACKED[1].inputs(torch.bfloat16)
    parts, _ = quantised(inputs)
    none = replace(inputs, weights=inputs.weights[:, :0], expert_ids=inputs.expert_ids[:, :0])
    assert torch.equal(run(none, parts), torch.zeros_like(inputs.x))
    for bad in (6, -2):
        wrong = replace(inputs, expert_ids=inputs.expert_ids.index_fill(0, torch.tensor(2), bad))
        with pytest.raises(IndexError, match=rf"expert_ids: {bad} is neither -1 nor in \[0, 6\)"):
            run(wrong, parts)
    with pytest.raises(TypeError, match=r"x: expected float32, float64, .* found torch\.int64"):
        run(replace(inputs, x=inputs.x.long()), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_reaches_no_other_row_and_bits_repeat(dtype: torch.dtype) -> None:
    inputs = PACKED[2].inputs(dtype)
    parts, _ = quantised(inputs)
    y = run(inputs, parts)
    assert {digest(run(inputs, parts)) for _ in range(20)} == {digest(y)}
    x = inputs.x.clone()
    x[7] = torch.nan
    spoiled = run(replace(inputs, x=x), parts)
    assert spoiled[7].isnan().all()
    others = torch.arange(len(y)) != 7
    assert torch.equal(spoiled[others], y[others])


BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "a zeroed row": lambda t: t.index_fill(0, torch.tensor(1), 0),
    "a sign": lambda t: torch.cat((-t[:, :1], t[:, 1:]), dim=1),
    "a scale that is off by a hundredth": lambda t: t * 1.01,
    "scales of the next row": lambda t: t.roll(1, dims=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_the_bounds_see(bug: str, dtype: torch.dtype) -> None:
    codes, scale = ops.quantize_int8(torch.randn(16, 64))
    x = torch.randn(8, 64).to(dtype)
    weight = ops.dequantize_int8(codes, scale, torch.float64)
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
    limit = product_limit(exact, magnitude, 64, dtype) + UNIT[dtype] * exact.abs()
    assert excess(BUGS[bug](int8_linear(x, codes, scale)), exact, limit) > 1
