"""What holds for every operator: opcheck, compilation, exact gradients, equal bits, isolation, refusals."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from moe import ops
from moe.ops import library
from moe.ops.grouped_gemm import grouped_mm_reference
from moe.ops.library import LIBRARY
from moe.ops.routing import route_reference
from tests.support.cases import BY_NAME, ROUTING_CASES, Case, Inputs, RoutingCase
from tests.support.operators import digest, fused, whole_layer

SMALL = Case("small", 5, 4, 3, 4, 2, "absent")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def samples(case: Case, dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every operator of the namespace, with inputs that require gradients where it has one."""
    plain, leaves = case.inputs(dtype), case.inputs(dtype).leaves()
    permuted = ops.permute(plain.x, plain.expert_ids, case.experts)
    rows, position, offsets = permuted.rows, permuted.position, permuted.offsets
    logits = torch.randn(case.tokens, 8, requires_grad=True)
    bias, grouped = torch.randn(8), (3, "sigmoid", 4, 2, "top2", True, 2.5, 0.5, "auto")
    plain_softmax = (3, "softmax", 1, 1, "max", False, 1.0, 0.0, "auto")
    routing = ops.route(logits.detach(), bias, top_k=3)
    weight = leaves.gate_up.detach().mT.requires_grad_()
    experts = (plain.gate_up, plain.down)
    biases = (plain.gate_up_bias, plain.down_bias)
    pre = torch.randn(len(rows), 2 * case.hidden).to(dtype)
    mlp_leaves = (leaves.x, leaves.gate_up, leaves.down, leaves.weights, leaves.expert_ids)
    mlp_plain = (plain.x, *experts, plain.weights, plain.expert_ids)
    codes, scale_inv = ops.quantize_blocks(plain.gate_up, (2, 3), halves=2)
    packed = ops.quantize_mxfp4(plain.x.repeat(1, 8))
    int8 = (*ops.quantize_int8(plain.gate_up), *ops.quantize_int8(plain.down))
    return {
        "swiglu": [(leaves.gate_up, None, 1.0, 0.0), (leaves.gate_up, 0.5, 1.702, 1.0)],
        "swiglu_backward": [(plain.gate_up[..., : case.hidden, :].mT, plain.gate_up.mT, 0.5, 1.0, 0.5)],
        "route": [(logits, bias, *grouped), (logits, None, *plain_softmax)],
        "route_backward": [
            (routing.weights, None, routing.scores, routing.expert_ids, "sigmoid", True, 2.5, 1.5, "auto"),
            (routing.weights, routing.scores, routing.scores, routing.expert_ids, "softmax", False, 1.0, 0.0, "auto"),
            (None, routing.scores, routing.scores, routing.expert_ids, "sigmoid", True, 1.0, 0.0, "auto"),
        ],
        "permute": [
            (leaves.x, leaves.expert_ids, case.experts),
            (leaves.x, leaves.expert_ids[:, :1], case.experts),
            (leaves.x, leaves.expert_ids.t().contiguous().t(), case.experts),
        ],
        "unpermute": [
            (rows.clone().requires_grad_(), position, leaves.weights),
            (rows.clone().requires_grad_(), position[:, :1], None),
        ],
        "unpermute_backward": [
            (plain.x, rows, position, plain.weights, [True, True]),
            (plain.x, rows, position, None, [True, False]),
        ],
        "grouped_mm": [
            (rows.clone().requires_grad_(), weight, offsets, "auto"),
            (rows.clone().t().requires_grad_(), pre.clone().requires_grad_(), offsets, "auto"),
            (leaves.gate_up, rows.clone().t().requires_grad_(), offsets, "auto"),
            (leaves.down, leaves.gate_up[:, : case.hidden].detach().requires_grad_(), None, "auto"),
        ],
        "moe_mlp_forward": [
            (*mlp_leaves, None, None, None, 1.0, 0.0, True, "auto"),
            (*mlp_leaves, leaves.gate_up_bias, leaves.down_bias, 0.5, 1.702, 1.0, True, "auto"),
            (*mlp_plain, *biases, None, 1.0, 0.0, False, "auto"),
        ],
        "moe_mlp_backward": [
            (plain.x, *mlp_plain, *biases, pre, None, 1.0, 0.0, [True] * 6, "auto"),
            (plain.x, *mlp_plain, None, None, pre, 0.5, 1.0, 0.5, [False, True, False, True, False, False], "auto"),
        ],
        "dequantize_blocks": [(codes.view(torch.uint8), scale_inv, [2, 3], 2, torch.bfloat16)],
        "dequantize_mxfp4": [(*packed, dtype)],
        "int8_linear": [(plain.x, int8[0][0], int8[1][0]), (plain.x[:, None], int8[0][0], int8[1][0])],
        "int8_mlp": [
            (plain.x, *int8, plain.weights, plain.expert_ids, None, None, None, 1.0, 0.0),
            (plain.x, *int8, plain.weights, plain.expert_ids, *biases, 0.5, 1.702, 1.0),
        ],
    }


def test_every_operator_has_samples() -> None:
    defined = {name.partition("::")[2] for name in LIBRARY._op_defs}
    assert defined == set(samples(SMALL, torch.float32))


@pytest.mark.parametrize("case", [SMALL, Case("empty", 0, 4, 3, 4, 2), Case("single", 1, 4, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("op", samples(SMALL, torch.float32))
def test_opcheck(op: str, case: Case) -> None:
    for args in samples(case, torch.float32)[op]:
        torch.library.opcheck(getattr(torch.ops.moesmith, op).default, args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(whole_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    routing = RoutingCase("compiled", experts=8, top_k=3, n_group=4, topk_group=2)
    for tokens in (37, 2, 1, 0) if dtype == torch.float32 else (37,):
        inputs = Case("compiled", tokens, 24, 40, 8, 3).inputs(dtype).leaves()
        logits = torch.randn(tokens, 8, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        bias, grad = torch.randn(8), torch.randn_like(inputs.x)
        leaves = (logits, inputs.x, inputs.gate_up, inputs.down, inputs.gate_up_bias, inputs.down_bias)
        results = []
        for function in (whole_layer, compiled):
            y = function(logits, bias, inputs, routing)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(logits, bias, inputs, routing), whole_layer(logits, bias, inputs, routing))


def test_compiled_once_for_every_token_count() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda i: fused(i), fullgraph=True, dynamic=True, backend=backend)
    for tokens in range(2, 40):
        compiled(Case("compiled", tokens, 24, 40, 8, 3).inputs(torch.float32))
    assert len(graphs) == 1


def test_compiled_with_an_activation_from_anywhere() -> None:
    """The activation is an argument, an attribute of a module, or made in the graph; a graph has one activation."""
    torch._dynamo.reset()
    i = SMALL.inputs(torch.float32)

    class Module(torch.nn.Module):
        def __init__(self, activation: ops.SwiGLU) -> None:
            super().__init__()
            self.activation = activation

        def forward(self, i: Inputs) -> Tensor:
            return fused(i, activation=self.activation) + ops.swiglu(i.gate_up.mT, self.activation).sum()

    def made_inside(i: Inputs) -> Tensor:
        return fused(i, activation=ops.SwiGLU(limit=0.5, alpha=1.702, beta=1.0))

    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for activation in (ops.SwiGLU(), ops.SwiGLU(0.5), ops.SwiGLU(0.25), ops.SwiGLU(None, 1.702, 1.0)):
        assert torch.equal(compiled(i, activation=activation), fused(i, activation=activation))
        module = Module(activation)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(i), module(i))
    assert torch.equal(torch.compile(made_inside, fullgraph=True, backend="aot_eager")(i), made_inside(i))


def test_gradients_in_float64() -> None:
    i = SMALL.inputs(torch.float64).leaves()
    permuted = ops.permute(i.x.detach(), i.expert_ids, SMALL.experts)
    offs = permuted.offsets
    for activation in (ops.SwiGLU(), ops.SwiGLU(limit=0.8, alpha=1.702, beta=1.0)):

        def f(*tensors: Tensor, activation: ops.SwiGLU = activation) -> Tensor:
            x, gate_up, down, weights, gate_up_bias, down_bias = tensors
            return fused(
                Inputs(x, gate_up, down, weights, i.expert_ids, gate_up_bias, down_bias), activation=activation
            )

        assert gradcheck(f, i.differentiable)
        assert gradcheck(lambda t, a=activation: ops.swiglu(t, a), i.gate_up)
    rows = torch.randn_like(permuted.rows).requires_grad_()
    assert gradcheck(lambda x: ops.permute(x, i.expert_ids, SMALL.experts).rows, i.x)
    assert gradcheck(lambda r, w: ops.unpermute(r, permuted.position, w), (rows, i.weights))
    pairs = (
        (rows, i.gate_up.detach().mT.requires_grad_(), offs),
        (rows.detach().t().requires_grad_(), torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True), offs),
        (i.gate_up, rows.detach().t().requires_grad_(), offs),
        (i.down, torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True), None),
    )
    for a, b, o in pairs:
        assert gradcheck(lambda a, b, o=o: ops.grouped_mm(a, b, o), (a, b))
        assert gradgradcheck(lambda a, b, o=o: ops.grouped_mm(a, b, o), (a, b))


@pytest.mark.parametrize("case", [c for c in ROUTING_CASES if c.tokens and c.experts <= 16][::3], ids=str)
def test_routing_gradient_in_float64(case: RoutingCase) -> None:
    logits, bias = case.inputs(torch.float64)
    logits = torch.randn_like(logits[:3]).requires_grad_()  # gaps between scores, so that no selection flips

    def f(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = ops.route(logits, bias, **case.settings)
        return routing.weights, routing.scores

    assert gradcheck(f, logits)


def differentiable_once() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    i = SMALL.inputs(torch.float64).leaves()
    permuted = ops.permute(i.x.detach(), i.expert_ids, SMALL.experts)
    rows, logits = permuted.rows.clone().requires_grad_(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    return {
        "moe_mlp": (lambda *_: fused(i), i.differentiable),
        "swiglu": (ops.swiglu, (i.gate_up,)),
        "route": (lambda x: ops.route(x, top_k=3).weights, (logits,)),
        "scores": (lambda x: ops.route(x, top_k=3).scores[:, :2], (logits,)),
        "unpermute": (lambda r, w: ops.unpermute(r, permuted.position, w), (rows, i.weights)),
        "permute": (lambda x: ops.permute(x, i.expert_ids, SMALL.experts).rows, (i.x,)),
    }


@pytest.mark.parametrize("name", differentiable_once())
@pytest.mark.parametrize("squared", [False, True], ids=["sum", "squares"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_second_derivatives_are_refused(name: str, squared: bool, checkpointed: bool) -> None:
    """Also if the outgoing gradient has no graph of its own, like that of a sum."""
    function, leaves = differentiable_once()[name]
    y = checkpoint(function, *leaves, use_reentrant=False) if checkpointed else function(*leaves)
    loss = (y.square() if squared else y).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
    assert not any(grad.requires_grad for grad in plain)
    if name == "permute" and not squared:  # linear: its gradient is a constant
        assert not grads[0].requires_grad
        return
    for grad in grads:
        with pytest.raises(RuntimeError, match="differentiable once; this is a second differentiation"):
            torch.autograd.grad(grad.sum(), leaves, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # torch's own, in entering forward mode
def test_forward_mode_is_refused() -> None:
    x = torch.randn(2, 4)
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode gradients are not supported"):
            ops.swiglu(forward_ad.make_dual(x, x))
        assert torch.equal(ops.swiglu(x), ops.swiglu(x.clone()))  # what has no tangent


@each_dtype
@pytest.mark.parametrize("name", ["many_experts", "skew", "one_token"])
def test_equal_input_equal_bits(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    routing = RoutingCase("repeat", experts=case.experts, top_k=case.top_k)
    inputs, grad = case.inputs(dtype).leaves(), torch.randn(case.tokens, case.width)
    logits = torch.randn(case.tokens, case.experts, requires_grad=True)
    leaves = (logits, inputs.x, inputs.gate_up, inputs.down, inputs.gate_up_bias, inputs.down_bias)
    seen = set()
    for _ in range(20):
        y = whole_layer(logits, None, inputs, routing)
        seen.add(digest(y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))))
    assert len(seen) == 1


@pytest.mark.parametrize("wanted", range(6))
def test_gradients_do_not_depend_on_which_are_wanted(wanted: int) -> None:
    inputs = BY_NAME["absent"].inputs(torch.float32).leaves()
    every = torch.autograd.grad(fused(inputs).square().sum(), inputs.differentiable)
    for i, tensor in enumerate(inputs.differentiable):
        tensor.requires_grad_(i == wanted)
    (alone,) = torch.autograd.grad(fused(inputs).square().sum(), inputs.differentiable[wanted])
    assert torch.equal(alone, every[wanted])


@each_dtype
def test_a_nan_reaches_no_other_row(dtype: torch.dtype) -> None:
    case = BY_NAME["many_experts"]
    clean, dirty = case.inputs(dtype).leaves(), case.inputs(dtype).leaves()
    token = 41
    others = torch.arange(case.tokens) != token
    with torch.no_grad():
        dirty.x[token] = torch.nan
    y, z = fused(clean), fused(dirty)
    assert torch.equal(y[others], z[others]) and z[token].isnan().all()
    grad = torch.randn_like(y)
    grads, hit = (torch.autograd.grad(out, i.differentiable, grad) for out, i in ((y, clean), (z, dirty)))
    assert torch.equal(grads[0][others], hit[0][others]) and torch.equal(grads[3][others], hit[3][others])
    used = set(dirty.expert_ids[token].tolist())
    unused = [e for e in range(case.experts) if e not in used]
    for parameter in (1, 2, 4, 5):
        assert torch.equal(grads[parameter][unused], hit[parameter][unused])


def test_weights_of_any_strides() -> None:
    inputs = BY_NAME["ragged"].inputs(torch.float64).leaves()
    turned = Inputs(**vars(inputs) | {n: getattr(inputs, n).detach().mT.contiguous().mT for n in ("gate_up", "down")})
    turned = Inputs(**{n: t.requires_grad_(t.is_floating_point()) for n, t in vars(turned).items()})
    y, z = fused(inputs), fused(turned)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    # An expanded gradient, as that of a sum, and one in another layout.
    for grad in (torch.ones(()).double().expand_as(y), torch.randn(y.shape[::-1], dtype=y.dtype).t()):
        grads = [
            torch.autograd.grad(out, i.differentiable, grad, retain_graph=True) for out, i in ((y, inputs), (z, turned))
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_autocast_casts_the_experts_and_not_the_routing_weights() -> None:
    inputs = BY_NAME["ragged"].inputs(torch.float32).leaves()
    low = Inputs(**vars(inputs.to(torch.bfloat16)) | {"weights": inputs.weights})
    expected = fused(low)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(inputs)
        product = ops.grouped_mm(inputs.gate_up, inputs.down)
        assert ops.swiglu(inputs.x).dtype == torch.float32
        grads = torch.autograd.grad(y.float().square().sum(), inputs.differentiable)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert product.dtype == torch.bfloat16
    assert torch.equal(product, ops.grouped_mm(inputs.gate_up.bfloat16(), inputs.down.bfloat16()))
    assert all(g.dtype == torch.float32 for g in grads)
    outside = torch.autograd.grad(fused(low).float().square().sum(), low.weights)[0]
    assert torch.equal(grads[3], outside)
    with torch.autocast("cpu", torch.bfloat16):  # float64 stays, as in every operation under autocast
        assert fused(BY_NAME["ragged"].inputs(torch.float64)).dtype == torch.float64


GOOD = BY_NAME["ragged"].inputs(torch.float32)


def changed(**fields: Any) -> Callable[[], Tensor]:
    return lambda: fused(Inputs(**vars(GOOD) | fields))


def with_id(value: int, name: str = "ragged") -> Tensor:
    ids = BY_NAME[name].expert_ids()
    ids[-1, -1] = value
    return ids


ROWS, OFFS = torch.zeros(6, 4), torch.tensor([2, 6], dtype=torch.int32)
STACK = torch.zeros(2, 4, 3)
FAST: Any = "fast"
NO_TIER = "tier = 'fast': expected 'auto', 'triton' or 'reference'"
NO_KERNELS = "tier = 'triton': tensors are on the CPU, where kernels run only in Triton's interpreter"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "id above": (changed(expert_ids=with_id(8)), IndexError, r"8 is neither -1 nor in \[0, 8\)"),
    "id below": (changed(expert_ids=with_id(-2)), IndexError, "-2 is neither"),
    "id of one token": (
        lambda: ops.moe_mlp(GOOD.x[:1], GOOD.gate_up, GOOD.down, GOOD.weights[:1], with_id(9, "one_token")),
        IndexError,
        "9 is neither",
    ),
    "id in reference": (
        lambda: fused(Inputs(**vars(GOOD) | {"expert_ids": with_id(8)}), tier="reference"),
        IndexError,
        "8",
    ),
    "negative experts": (lambda: ops.permute(GOOD.x, GOOD.expert_ids, -1), ValueError, "num_experts = -1: expected 0"),
    "id in permute": (lambda: ops.permute(GOOD.x, with_id(77), 8), IndexError, "77 is neither"),
    "int32 ids": (
        changed(expert_ids=GOOD.expert_ids.int()),
        TypeError,
        "expert_ids: expected int64; found torch.int32",
    ),
    "ids of other tokens": (changed(expert_ids=GOOD.expert_ids[1:]), ValueError, r"expert_ids: expected \[61, K\]"),
    "half weights": (changed(weights=GOOD.weights.half()), TypeError, "do not cast routing weights"),
    "weights of other shape": (changed(weights=GOOD.weights[:, :1]), ValueError, r"weights: expected \(61, 3\)"),
    "three dimensions": (changed(x=GOOD.x[None]), ValueError, r"x: expected \[T, D\]"),
    "gate_up transposed": (changed(gate_up=GOOD.gate_up.mT), ValueError, r"gate_up: expected \[E, 2F, 24\]"),
    "down transposed": (changed(down=GOOD.down.mT), ValueError, r"down: expected \[8, 24, 40\]"),
    "mixed dtypes": (changed(down=GOOD.down.double()), TypeError, "down: expected torch.float32, the dtype of x"),
    "integers": (changed(x=GOOD.x.long()), TypeError, "x: expected float32, float64, bfloat16 or float16"),
    "bias of other shape": (changed(down_bias=GOOD.gate_up_bias), ValueError, r"down_bias: expected \[8, 24\]"),
    "unknown tier": (lambda: fused(GOOD, tier="fast"), ValueError, NO_TIER),
    "unknown tier of a product": (lambda: ops.grouped_mm(ROWS, STACK, OFFS, tier=FAST), ValueError, NO_TIER),
    "unknown tier of a routing": (lambda: ops.route(ROWS, top_k=1, tier=FAST), ValueError, NO_TIER),
    "kernels on the CPU": (lambda: fused(GOOD, tier="triton"), ValueError, NO_KERNELS),
    "kernels of a product on the CPU": (
        lambda: ops.grouped_mm(ROWS, STACK, OFFS, tier="triton"),
        ValueError,
        NO_KERNELS,
    ),
    "kernels of a routing on the CPU": (lambda: ops.route(ROWS, top_k=1, tier="triton"), ValueError, NO_KERNELS),
    "negative limit": (lambda: ops.SwiGLU(-1.0), ValueError, "limit = -1.0: expected a positive number"),
    "NaN limit": (lambda: ops.SwiGLU(float("nan")), ValueError, "limit = nan"),
    "odd halves": (lambda: ops.swiglu(torch.zeros(2, 3)), ValueError, "gate_up: expected an even last dimension"),
    "weights of unpermute": (
        lambda: ops.unpermute(ROWS, torch.zeros(3, 2).long(), torch.zeros(3, 2).bfloat16()),
        TypeError,
        "weights: expected float32 or float64",
    ),
    "no offs": (lambda: ops.grouped_mm(ROWS, STACK), ValueError, r"offs: expected \[G\] int32"),
    "offs for a batch": (lambda: ops.grouped_mm(STACK.mT, STACK, OFFS), ValueError, "offs: expected None"),
    "long offs": (lambda: ops.grouped_mm(ROWS, STACK, OFFS.long()), TypeError, "offs: expected int32"),
    "offs of other groups": (lambda: ops.grouped_mm(ROWS, STACK, OFFS[:1]), ValueError, r"offs: expected \[2\]"),
    "falling offs": (lambda: ops.grouped_mm(ROWS, STACK, OFFS.flip(0)), ValueError, r"found \[6, 2\]"),
    "offs past the end": (lambda: ops.grouped_mm(ROWS, STACK, OFFS + 1), ValueError, r"up to 6; found \[3, 7\]"),
    "inner sizes": (lambda: ops.grouped_mm(ROWS, STACK.mT, OFFS), ValueError, "expected equal inner sizes"),
    "groups of a batch": (
        lambda: ops.grouped_mm(STACK.mT, STACK[:1]),
        ValueError,
        "equal numbers of groups; found 2 and 1",
    ),
    "a vector": (lambda: ops.grouped_mm(ROWS[0], STACK, OFFS), ValueError, "two or three dimensions"),
    "two dtypes": (lambda: ops.grouped_mm(ROWS, STACK.double(), OFFS), TypeError, "one floating dtype for both"),
    "bias": (lambda: ops.grouped_mm(ROWS, STACK, OFFS, bias=ROWS), ValueError, "bias: not supported"),
    "out_dtype": (lambda: ops.grouped_mm(ROWS, STACK, OFFS, out_dtype=torch.float64), ValueError, "out_dtype = "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


class OnGpu(NamedTuple):
    """Stand-in for a CUDA tensor in `kernels_for`."""

    device: torch.device = torch.device("cuda", 0)
    dtype: torch.dtype = torch.bfloat16


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without moe_triton, in a process that has not warned yet."""
    monkeypatch.setitem(sys.modules, "moe_triton", None)
    for remembered in (library.why_no_kernels, library._warn_once):
        remembered.cache_clear()
    yield
    for remembered in (library.why_no_kernels, library._warn_once):
        remembered.cache_clear()


def kernels_of(*dtypes: torch.dtype, tier: str = "auto", device: str = "cuda:0") -> Any:
    tensors: list[Any] = [OnGpu(torch.device(device), dtype) for dtype in dtypes]
    return library.kernels_for("mlp", tensors, tier)


def test_cuda_without_kernels_warns_once(no_kernels: None) -> None:
    message = r"on cuda instead of moesmith's Triton kernels: cannot import moe_triton \(.*\); install moesmith, or"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        for device in ("cuda:0", "cuda:0", "cuda:1"):
            assert kernels_of(torch.bfloat16, torch.float32, device=device) is None
    assert len(warned) == 1
    with pytest.raises(ValueError, match="tier = 'triton': cannot import moe_triton"):
        kernels_of(torch.bfloat16, tier="triton")


def test_cuda_with_an_old_gpu_says_so(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "moe_triton", sys)  # anything that can be imported
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing")
    with pytest.warns(RuntimeWarning, match="kernels: Turing has a compute capability below 8.0"):
        assert kernels_of(torch.float16) is None


def test_float64_on_cuda_is_torchs_without_a_warning(no_kernels: None) -> None:
    """By design, with kernels and without them; tier="triton" raises."""
    assert kernels_of(torch.float64, torch.int64) is None
    with pytest.raises(ValueError, match="tier = 'triton': cannot import moe_triton"):
        kernels_of(torch.float64, tier="triton")


def test_the_warning_does_not_break_a_compiled_graph(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of tensors on the CPU, chosen as if they were on a GPU."""
    chosen, tensors = library.kernels_for, [cast(Tensor, OnGpu())]
    monkeypatch.setattr(library, "kernels_for", lambda name, _, tier: chosen(name, tensors, tier))
    torch._dynamo.reset()
    compiled = torch.compile(whole_layer, fullgraph=True, backend="aot_eager")
    arguments = (torch.randn(37, 8), None, Case("compiled", 37, 24, 40, 8, 3).inputs(torch.float32))
    with pytest.warns(RuntimeWarning, match="cannot import moe_triton") as warned:
        y = compiled(*arguments, RoutingCase("compiled", experts=8, top_k=3))
    assert len(warned) == 1
    assert torch.equal(y, whole_layer(*arguments, RoutingCase("compiled", experts=8, top_k=3)))


def test_tier_reference_is_the_definition() -> None:
    logits = torch.randn(9, 8, requires_grad=True)
    routing, exact = ops.route(logits, top_k=3, tier="reference"), route_reference(logits, top_k=3)
    assert all(map(torch.equal, routing[:3], exact[:3]))
    (grad,) = torch.autograd.grad(routing.weights.square().sum(), logits, create_graph=True)
    torch.autograd.grad(grad.sum(), logits)  # which the operator refuses
    a, b = torch.randn(6, 4), torch.randn(2, 4, 3)
    assert torch.equal(ops.grouped_mm(a, b, OFFS, tier="reference"), grouped_mm_reference(a, b, OFFS))


def test_results_do_not_alias_arguments() -> None:
    inputs = Case("alias", 3, 8, 4, 2, 1, "random").inputs(torch.float32)
    ones = torch.ones_like(inputs.weights)
    permuted = ops.permute(inputs.x, inputs.expert_ids, 2)
    logits = torch.randn(3, 2)
    groups = {
        "permute": (vars(permuted).values(), (inputs.x, inputs.expert_ids)),
        "unpermute": ([ops.unpermute(permuted.rows, permuted.position, ones)], (permuted.rows,)),
        "plain unpermute": ([ops.unpermute(permuted.rows, permuted.position)], (permuted.rows,)),
        "route": (ops.route(logits, top_k=1, norm_topk_prob=False)[:3], (logits,)),
        "moe_mlp": ([fused(inputs)], vars(inputs).values()),
    }
    for name, (results, arguments) in groups.items():
        addresses = {t.untyped_storage().data_ptr() for t in arguments}
        assert all(t.untyped_storage().data_ptr() not in addresses for t in results), name
        own = [t.untyped_storage().data_ptr() for t in results]
        assert len(set(own)) == len(own), name
