"""Products on the CPU: in the dtype of their operands, and those of half precision in float32."""

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moe
from moe.linear import Linear, linear
from moe.ops.matmul import is_faster, is_widened, least_widened, most_grouped, prefers_float32, product, product_into
from tests.support.bound import DTYPES, UNIT, excess, product_limit
from tests.support.cases import CASES, Case
from tests.support.operators import eager_experts, fused, gradients
from tests.support.running_error import complaints, moe_mlp_errors

HALF = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (5, 7, 3), (33, 70, 40), (0, 4, 3), (4, 0, 3), (4, 3, 0)]


@pytest.fixture
def least(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The size from which half precision is multiplied in float32, whatever this processor is."""
    monkeypatch.setattr("moe.ops.matmul.least_widened", lambda dtype: request.param if dtype in HALF else None)
    monkeypatch.setattr("moe.ops.matmul._CONVERTED", 7 * 11)  # so that small matrices are converted in several parts
    monkeypatch.setattr("moe.linear._LEAST_ROWS", 1)
    return request.param


either_way = pytest.mark.parametrize("least", [None, 1], ids=["as they are", "in float32"], indirect=True)
in_float32 = pytest.mark.parametrize("least", [1], ids=["in float32"], indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_half = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype)[6:])


def assert_product(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert found.dtype == a.dtype
    assert excess(found, exact, product_limit(exact, magnitude, a.shape[1] + 1, a.dtype)) <= 1


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same matrix as it is, stored by columns, and with other values between its elements."""
    return [tensor, tensor.t().contiguous().t(), torch.stack((tensor, tensor + 1), dim=-1)[..., 0]]


@either_way
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape: tuple[int, int, int], dtype: torch.dtype, least: int | None) -> None:
    torch.manual_seed(0)
    rows, inner, columns = shape
    for a in layouts(torch.randn(rows, inner).to(dtype)):
        for b in layouts(torch.randn(inner, columns).to(dtype)):
            assert_product(product(a, b), a, b)
            for out in layouts(torch.zeros(rows, columns, dtype=dtype)):
                assert_product(product_into(out, a, b), a, b)


@in_float32
@each_half
def test_a_product_in_float32_is_rounded_once(dtype: torch.dtype, least: int) -> None:
    """1 + eps / 2 + eps / 2 is 1 + eps; rounded after each term it would be 1."""
    eps = torch.finfo(dtype).eps
    a = torch.tensor([[1.0, eps, eps]], dtype=dtype)
    b = torch.tensor([[1.0], [0.5], [0.5]], dtype=dtype)
    bias = torch.tensor([-1.0], dtype=dtype)
    assert product(a, b).item() == 1 + eps
    assert linear(a, b.t(), bias).item() == eps


@either_way
@each_dtype
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(with_bias: bool, dtype: torch.dtype, least: int | None) -> None:
    torch.manual_seed(0)
    layer = Linear(70, 40, bias=with_bias).to(dtype)
    x = torch.randn(3, 11, 70).to(dtype).requires_grad_()
    grad = torch.randn(3, 11, 40).to(dtype)
    y = layer(x)
    assert y.shape == (3, 11, 40) and not (least and dtype in HALF and y._is_view())
    flat, rows = x.detach().flatten(0, 1), grad.flatten(0, 1)
    assert_product(y.detach().flatten(0, 1), flat, layer.weight.detach().t(), layer.bias)
    y.backward(grad)
    assert x.grad is not None and layer.weight.grad is not None
    assert_product(x.grad.flatten(0, 1), rows, layer.weight.detach())
    assert_product(layer.weight.grad, rows.t(), flat)
    if with_bias:
        assert layer.bias.grad is not None
        exact = rows.double().sum(0)
        assert excess(layer.bias.grad, exact, product_limit(exact, rows.double().abs().sum(0), 33, dtype)) <= 1


@pytest.mark.parametrize(
    ("on_intel", "shape"), [(True, (16, 1024, 1024)), (True, (63, 1025, 1030)), (False, (16, 300, 256))], ids=str
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_by_another_library(
    with_bias: bool, shape: tuple[int, int, int], on_intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 by oneDNN on AMD processors, and on Intel's with a few rows as (W x^T)^T."""
    monkeypatch.setattr("moe.ops.matmul._on_intel", on_intel)
    torch.manual_seed(0)
    rows, inner, columns = shape
    layer = Linear(inner, columns, bias=with_bias)
    x, grad = torch.randn(rows, inner, requires_grad=True), torch.randn(rows, columns)
    assert is_faster(x, layer.weight.t())
    y = layer(x.unsqueeze(0))
    assert y.is_contiguous() and y.grad_fn is not None and "_Linear" in y.grad_fn.name()
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert counted.get_total_flops() == 2 * rows * inner * columns
    assert_product(y[0].detach(), x.detach(), layer.weight.detach().t(), layer.bias)
    y.mul_(1)  # may be modified in place
    y[0].backward(grad)
    assert x.grad is not None and layer.weight.grad is not None
    assert_product(x.grad, grad, layer.weight.detach())
    assert_product(layer.weight.grad, grad.t(), x.detach())


@pytest.mark.parametrize("on_intel", [True, False])
def test_linear_keeps_for_backward_what_torch_keeps(on_intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as no input of a frozen layer, whose memory adapters save."""
    monkeypatch.setattr("moe.ops.matmul._on_intel", on_intel)
    torch.manual_seed(0)
    for needs in itertools.product([False, True], repeat=3):
        shapes = (8, 1024), (1024, 1024), (1024,)
        given = [torch.randn(shape, requires_grad=need) for shape, need in zip(shapes, needs, strict=True)]
        kept: dict[Callable[..., Tensor], list[torch.Size]] = {linear: [], F.linear: []}
        for multiply, sizes in kept.items():
            with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: (to.append(t.shape), t)[1], lambda t: t):
                y = multiply(*given)
            assert y.requires_grad == any(needs)
        assert sorted(kept[linear]) == sorted(kept[F.linear])
        if any(needs):
            asked = [tensor for tensor in given if tensor.requires_grad]
            exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]
            wanted = [tensor for tensor in exact if tensor.requires_grad]
            found = torch.autograd.grad(linear(*given).square().sum(), asked)
            expected = torch.autograd.grad(F.linear(*exact).square().sum(), wanted)
            for one, other in zip(found, expected, strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm()


def test_which_products_in_float32_are_faster_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(1024, 1024).t()
    for on_intel, rows in ((True, range(8, 64)), (False, range(1, 66))):
        monkeypatch.setattr("moe.ops.matmul._on_intel", on_intel)
        assert [n for n in range(66) if is_faster(torch.ones(n, 1024), weight)] == list(rows)
        assert not is_faster(torch.ones(16, 1024).double(), weight.double())
        assert not is_faster(torch.ones(16, 1024, device="meta"), weight.to("meta"))
        assert not is_faster(torch.ones(16, 32), weight[:32, :32])


@in_float32
def test_linear_is_differentiable_twice(least: int) -> None:
    x, w = (torch.randn(4, 4).bfloat16().requires_grad_() for _ in range(2))

    def second(multiply: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(multiply(x, w).float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), (x, w))

    for found, expected in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@in_float32
def test_who_else_decides_how_a_linear_layer_multiplies(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def widened(*_: Any) -> Any:
        raise AssertionError("multiplied in float32")

    class Wrapped(Tensor):
        pass

    layer, x = Linear(8, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    expected = F.linear(x, layer.weight, layer.bias)
    monkeypatch.setattr("moe.linear.widened_parts", widened)
    with pytest.raises(AssertionError, match="multiplied in float32"):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).equal(expected)
    assert torch.compile(layer, backend="eager", fullgraph=True)(x).equal(expected)
    assert torch.fx.symbolic_trace(layer)(x).equal(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        traced: Any = torch.jit.trace(layer, (x,), check_trace=False)
    assert traced(x).equal(expected)
    wrapped: dict[str, Tensor] = {"weight": layer.weight.detach().as_subclass(Wrapped)}
    assert torch.func.functional_call(layer, wrapped, (x,)).equal(expected)
    per_row = torch.vmap(lambda row: linear(row, layer.weight, layer.bias))(x.unsqueeze(1))
    torch.testing.assert_close(per_row.squeeze(1), expected)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())
    shared: dict[str, Tensor] = {"bias": layer.bias.detach().as_subclass(Wrapped)}
    assert torch.func.functional_call(layer, shared, (x,)).equal(expected)
    assert layer.to("meta")(x.to("meta")).shape == (4, 8)
    assert copy.deepcopy(layer).weight.is_meta


@either_way
@each_half
def test_linear_accepts_and_refuses_the_operands_of_torch(dtype: torch.dtype, least: int | None) -> None:
    def both(*operands: Tensor) -> list[Tensor | str]:
        found: list[Tensor | str] = []
        for multiply in (linear, F.linear):
            try:
                found.append(multiply(*operands))
            except RuntimeError as error:
                found.append(str(error))
        return found

    x, weight = torch.randn(3, 8).to(dtype), torch.randn(6, 8).to(dtype)
    for bias in (torch.zeros(9), torch.zeros(5), torch.zeros(6, 1)):
        found, expected = both(x, weight, bias.to(dtype))
        assert isinstance(found, str) and found == expected
    for bias in (torch.ones(()), torch.ones(1)):
        torch.testing.assert_close(*both(x, weight, bias.to(dtype)))
    found, expected = both(x, weight, torch.zeros(6))
    assert isinstance(found, str) and found == expected
    for shape in ((0, 8), (2, 0, 8), (3, 0), (0, 3, 0)):  # no rows, and no columns
        torch.testing.assert_close(*both(torch.ones(shape, dtype=dtype), torch.ones(6, shape[-1], dtype=dtype)))


@in_float32
def test_linear_under_batched_gradients(least: int) -> None:
    """`is_grads_batched` uses tensors that neither their type nor functorch's state distinguishes from others."""
    layer, x = Linear(8, 6).bfloat16(), torch.randn(3, 8).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(layer(x), x, torch.eye(18).bfloat16().view(18, 3, 6), is_grads_batched=True)
    for i in range(3):
        for j in range(6):
            assert found[6 * i + j, i].equal(layer.weight[j].detach())


@in_float32
@each_half
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moe_mlp(case: Case, dtype: torch.dtype, least: int) -> None:
    torch.manual_seed(0)
    inputs, grad = case.inputs(dtype), torch.randn(case.tokens, case.width).to(dtype)
    errors = moe_mlp_errors(inputs, grad)
    exact = gradients(eager_experts, inputs.to(torch.float64), grad)
    found = gradients(fused, inputs, grad)
    assert not complaints(inputs, found, errors, exact, lambda: gradients(eager_experts, inputs, grad))


@pytest.mark.parametrize(
    ("known", "on_intel", "expected"),
    [
        ({}, True, (None, None)),
        ({"architecture": "arm64"}, False, (None, None)),
        ({"avx2": False}, True, (None, None)),
        ({"avx2": True}, False, (16, 16)),
        ({"avx2": True, "avx512_bf16": True}, False, (None, 16)),
        ({"avx2": True, "avx512_bf16": True}, True, (128, 16)),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": True}, True, (None, 16)),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": True, "amx_fp16": True}, True, (None, None)),
    ],
)
def test_which_processors(
    known: dict[str, Any], on_intel: bool, expected: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"architecture": "x86_64"} | known if known else {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr("moe.ops.matmul._on_intel", on_intel)
    assert tuple(least_widened.__wrapped__(dtype) for dtype in HALF) == expected
    assert least_widened.__wrapped__(torch.float32) is None


@pytest.mark.parametrize("least", [4], indirect=True)
def test_small_and_wide_products_stay_as_they_are(least: int) -> None:
    def halves(rows: int, inner: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return is_widened(torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype))

    assert halves(4, 4, 4) and halves(4, 4, 4, torch.float16)
    assert not halves(3, 4, 4) and not halves(4, 3, 4) and not halves(4, 4, 3)
    assert not halves(4, 4, 4, torch.float32) and not halves(4, 4, 4, torch.float64)


@pytest.mark.parametrize("least", [None, 16], indirect=True)
@pytest.mark.parametrize("on_intel", [False, True])
def test_groups_that_are_multiplied_in_one_call(on_intel: bool, least: int | None, monkeypatch: Any) -> None:
    monkeypatch.setattr("moe.ops.matmul._on_intel", on_intel)
    assert most_grouped(torch.float32, 1, 4) == (4 if on_intel else 1)
    assert most_grouped(torch.bfloat16, 1, 4) == 4
    assert most_grouped(torch.bfloat16, 256, 4) == (least or 257) - 1  # 256, or less than what is widened


@in_float32
def test_a_model_in_bfloat16_is_near_itself_in_float64(least: int) -> None:
    model = moe.Transformer(moe.preset("tiny"), seed=1).bfloat16().eval()
    ids = torch.randint(model.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits.double()
        exact = copy.deepcopy(model).double()(ids).logits
    error = ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median()
    assert prefers_float32(torch.zeros(1, dtype=torch.bfloat16))
    assert 0 < float(error) < 8 * UNIT[torch.bfloat16]
