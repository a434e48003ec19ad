"""Modules with quantised weights against the plain ones with the same numbers: every bit, forward and backward.

Int8 on a CPU is not bit-identical without gradients, where it reads the codes: see tests/ops/test_int8.py.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import ops
from moe.layer import MoELayer
from moe.linear import Linear
from moe.quantized import (
    FP8Experts,
    FP8Linear,
    Int8Experts,
    Int8Linear,
    MXFP4Experts,
    Quantized,
    QuantizedExperts,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXPERTS, WIDTH, HIDDEN, BLOCK = 6, 64, 32, (24, 40)  # blocks that divide nothing
GPT_OSS: dict[str, Any] = {"activation": ops.SwiGLU(limit=1.0, alpha=1.702, beta=1.0)}


def linear(bias: bool, out: int = 9, width: int = 20) -> FP8Linear:
    codes, scale = ops.quantize_blocks(torch.randn(out, width), (4, 8))
    return FP8Linear.from_parts(codes, scale, torch.randn(out) if bias else None, block_size=(4, 8))


def int8_linear(bias: bool, out: int = 9, width: int = 20) -> Int8Linear:
    return Int8Linear.from_weights(torch.randn(out, width), torch.randn(out) if bias else None)


def plain_linear(module: FP8Linear | Int8Linear, dtype: torch.dtype) -> Linear:
    plain = Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
    if isinstance(module, Int8Linear):
        weight = ops.dequantize_int8(module.weight, module.weight_scale, dtype)
    else:
        weight = ops.dequantize_blocks(module.weight, module.weight_scale_inv, module.block_size, dtype)
    plain.weight = nn.Parameter(weight)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype))
    return plain


def experts(kind: str, settings: dict[str, Any]) -> QuantizedExperts:
    gate_up, down = torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / 8, torch.randn(EXPERTS, WIDTH, HIDDEN) / 6
    biases = {}
    if settings:
        biases = {"gate_up_bias": torch.randn(EXPERTS, 2 * HIDDEN), "down_bias": torch.randn(EXPERTS, WIDTH)}
    if kind == "fp8":
        parts = (*ops.quantize_blocks(gate_up, BLOCK, halves=2), *ops.quantize_blocks(down, BLOCK))
        return FP8Experts.from_parts(*parts, block_size=BLOCK, **biases, **settings)
    if kind == "int8":
        return Int8Experts.from_weights(gate_up, down, **biases, **settings)
    return MXFP4Experts.from_parts(*ops.quantize_mxfp4(gate_up), *ops.quantize_mxfp4(down), **biases, **settings)


def numbers(module: QuantizedExperts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(module, FP8Experts):
        gate_up = ops.dequantize_blocks(module.gate_up_proj, module.gate_up_proj_scale_inv, BLOCK, dtype, halves=2)
        return gate_up, ops.dequantize_blocks(module.down_proj, module.down_proj_scale_inv, BLOCK, dtype)
    if isinstance(module, Int8Experts):
        gate_up = ops.dequantize_int8(module.gate_up_proj, module.gate_up_proj_scale, dtype)
        return gate_up, ops.dequantize_int8(module.down_proj, module.down_proj_scale, dtype)
    assert isinstance(module, MXFP4Experts)
    gate_up = ops.dequantize_mxfp4(module.gate_up_proj_blocks, module.gate_up_proj_scales, dtype)
    return gate_up, ops.dequantize_mxfp4(module.down_proj_blocks, module.down_proj_scales, dtype)


def routing(tokens: int, spread: str = "random") -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, EXPERTS).topk(2, dim=1).indices
    if spread == "few":  # the first, a middle and the last expert are unused
        ids = torch.tensor([1, 4])[ids % 2]
    if spread == "absent":
        ids[::2, 0] = -1
        ids[:1] = -1
    if spread == "nobody":
        ids.fill_(-1)
    return torch.rand(tokens, 2), ids


def bits(result: Tensor | None, expected: Tensor | None) -> bool:
    if result is None or expected is None:
        return result is expected
    return result.dtype == expected.dtype and torch.equal(result, expected)


def close(result: Tensor, expected: Tensor) -> bool:
    """Whether they differ by a few roundings of the largest values."""
    eps = 8 * torch.finfo(result.dtype).eps
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return result.dtype == expected.dtype and torch.allclose(result, expected, rtol=eps, atol=eps * largest)


@pytest.mark.parametrize("make", [linear, int8_linear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20,), (1, 20), (7, 20), (2, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_linear_is_the_plain_one(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, make: Callable[[bool], FP8Linear | Int8Linear]
) -> None:
    module = make(bias)
    plain = plain_linear(module, dtype)
    x = torch.randn(shape, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(a), plain(b)
    assert bits(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert bits(a.grad, b.grad)
    assert module.weight.grad is None and not module.weight.requires_grad
    if bias:
        assert module.bias is not None and module.bias.grad is not None and plain.bias.grad is not None
        assert torch.equal(module.bias.grad, plain.bias.grad.float())
    with torch.no_grad():
        found = module(x)
        assert bits(found, expected) if make is linear else close(found, expected)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int8"])
@pytest.mark.parametrize("settings", [{}, GPT_OSS], ids=["silu", "gpt_oss"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "spread"),
    [(40, "random"), (9, "few"), (9, "absent"), (5, "nobody"), (1, "random"), (1, "absent"), (0, "random")],
)
def test_experts_are_the_plain_ones(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, tokens: int, spread: str
) -> None:
    module = experts(kind, settings)
    weights, ids = routing(tokens, spread)
    x = torch.randn(tokens, WIDTH, dtype=dtype)
    biases = [None if b is None else b.detach().to(dtype).requires_grad_() for b in biases_of(module)]
    plain = (x.clone().requires_grad_(), *numbers(module, dtype), weights.clone().requires_grad_())
    own = x.clone().requires_grad_(), weights.clone().requires_grad_()
    named = dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))

    with torch.no_grad():
        found, expected = module(x, weights, ids), ops.moe_mlp(*plain, ids, **named, **settings)
        assert close(found, expected) if kind == "int8" else bits(found, expected)
    y, expected = module(*own, ids), ops.moe_mlp(*plain, ids, **named, **settings)
    assert bits(y, expected)
    assert tokens < 2 or spread == "nobody" or y.double().abs().mean() > 0.01
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert bits(own[0].grad, plain[0].grad) and bits(own[1].grad, plain[3].grad)
    for bias, reference in zip(biases_of(module), biases, strict=True):
        if bias is not None and reference is not None:
            assert bias.grad is not None and reference.grad is not None
            assert torch.equal(bias.grad, reference.grad.float())
    assert all(getattr(module, name).grad is None for name in module.quantized)


def biases_of(module: QuantizedExperts) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    return module.gate_up_proj_bias, module.down_proj_bias


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int8"])
def test_one_gradient_without_the_others(kind: str) -> None:
    module = experts(kind, GPT_OSS).requires_grad_(False)
    weights, ids = routing(9)
    x = torch.randn(9, WIDTH)
    full = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(*full, ids)
    y.sum().backward()
    only_x = x.clone().requires_grad_()
    module(only_x, weights, ids).sum().backward()
    assert bits(only_x.grad, full[0].grad)
    only_weights = weights.clone().requires_grad_()
    module(x, only_weights, ids).sum().backward()
    assert bits(only_weights.grad, full[1].grad)
    assert not module(x, weights, ids).requires_grad
    bias = module.down_proj_bias
    assert bias is not None
    bias.requires_grad_()
    module(x, weights, ids).sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "int8"])
def test_experts_without_tokens_are_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts(kind, {})
    weights, ids = routing(9, "few")
    read: list[int] = []
    name = {"fp8": "dequantize_blocks", "mxfp4": "dequantize_mxfp4", "int8": "dequantize_int8"}[kind]
    dequantize = getattr(ops, name)

    def counted(codes: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read.append(codes.numel())
        return dequantize(codes, *args, **kwargs)

    monkeypatch.setattr(ops, name, counted)
    x = torch.randn(9, WIDTH, requires_grad=True)
    module(x, weights, ids).sum().backward()
    assert sum(read) == sum(getattr(module, n)[0].numel() for n in module.quantized[::2]) * 2 * 2  # twice two experts


def kept(run: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that the graph of run() keeps."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.parametrize("kind", ["linear", "int8 linear", "fp8", "mxfp4", "int8"])
def test_no_graph_keeps_dequantised_weights(kind: str) -> None:
    tokens = 3
    if "linear" in kind:
        module = (linear if kind == "linear" else int8_linear)(bias=True, out=90, width=200)
        x, args = torch.randn(tokens, 200, requires_grad=True), ()
        expected = 0
    else:
        module = experts(kind, GPT_OSS)
        x, args = torch.randn(tokens, WIDTH, requires_grad=True), routing(tokens)
        slots = 2 * tokens
        # x, weights, ids and the pre-activation; the biases of the experts that are used, and which these are.
        expected = x.nbytes + slots * 4 + slots * 8 + slots * 2 * HIDDEN * 4 + 2 * EXPERTS * (2 * HIDDEN + WIDTH) * 4
        expected += 2 * EXPERTS * 8
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved = kept(lambda: module(x, *args))
    assert saved
    others = sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() not in own)
    assert others <= expected < sum(getattr(module, n).numel() for n in module.quantized) * 4
    if "linear" in kind:  # whereas the plain one keeps them
        plain = plain_linear(module, torch.float32)  # pyright: ignore[reportArgumentType]
        assert any(t.numel() == plain.weight.numel() for t in kept(lambda: plain(x)))


def modules() -> list[tuple[Quantized, tuple[Tensor, ...]]]:
    x, routed = torch.randn(5, WIDTH), routing(5)
    return [
        (linear(bias=True, width=WIDTH), (x,)),
        (linear(bias=False, width=WIDTH), (x,)),
        (experts("fp8", {}), (x, *routed)),
        (experts("fp8", GPT_OSS), (x, *routed)),
        (experts("mxfp4", {}), (x, *routed)),
        (experts("mxfp4", GPT_OSS), (x, *routed)),
        (int8_linear(bias=True, width=WIDTH), (x,)),
        (int8_linear(bias=False, width=WIDTH), (x,)),
        (experts("int8", {}), (x, *routed)),
        (experts("int8", GPT_OSS), (x, *routed)),
    ]


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.bfloat16),
    "to with a device": lambda m: m.to("meta", torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_are_refused_and_change_nothing(cast: str) -> None:
    for module, args in modules():
        expected, before = module(*args), {k: v.dtype for k, v in module.state_dict().items()}
        inside = nn.Sequential(module)
        keeps = cast == "to" if isinstance(module, Int8Linear | Int8Experts) else cast != "type"
        if isinstance(module, MXFP4Experts | Int8Linear | Int8Experts) and keeps:
            # torch leaves integers alone, and int8 has scales in bfloat16: only the biases change, and the results are
            # those of the rounded biases.
            CASTS[cast](module)
            after = {k: v.dtype for k, v in module.state_dict().items()}
            assert {k: after[k] for k in module.quantized} == {k: before[k] for k in module.quantized}
            continue
        message = (
            rf"^{type(module).__name__}\.\w+: a cast from torch\.\w+ to torch\.\w+ would destroy the quantised weights"
        )
        for whole in (module, inside):
            with pytest.raises(TypeError, match=message + "; pass x in the compute dtype, or load"):
                CASTS[cast](whole)
        assert {k: v.dtype for k, v in module.state_dict().items()} == before
        assert torch.equal(module(*args), expected)


def test_moves_copies_and_pickles_keep_dtypes_and_results() -> None:
    for module, args in modules():
        expected, state = module(*args), module.state_dict()
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        fresh = copy.deepcopy(module).to_empty(device="cpu")
        assert fresh.load_state_dict(state, strict=True)
        assigned = copy.deepcopy(module).to("meta")
        assert all(t.is_meta for t in assigned.state_dict().values())
        assert {k: v.dtype for k, v in assigned.state_dict().items()} == {k: v.dtype for k, v in state.items()}
        assigned.load_state_dict(state, strict=True, assign=True)
        others = {
            "deepcopy": copy.deepcopy(module),
            "pickle": pickle.loads(pickle.dumps(module)),
            "save": torch.load(saved, weights_only=False),
            "state_dict": fresh,
            "assigned": assigned,
            "cpu": copy.deepcopy(module).to("cpu"),
        }
        for way, other in others.items():
            assert type(other) is type(module)
            found = other.state_dict()
            assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in state.items()}, way
            assert {k: p.requires_grad for k, p in other.named_parameters()} == {
                k: p.requires_grad for k, p in module.named_parameters()
            }, way
            assert torch.equal(other(*args), expected), way
        twin = others["deepcopy"]
        for name in module.quantized:
            assert getattr(twin, name).data_ptr() != getattr(module, name).data_ptr()
        assert {type(v) for v in pickle.loads(pickle.dumps(module)).parameters()} == {nn.Parameter}


def test_scales_that_are_powers_of_two_may_stay_one_byte() -> None:
    codes, scale = ops.quantize_blocks(torch.randn(9, WIDTH), (4, 8), scale_fmt="ue8m0")
    wide = FP8Linear.from_parts(codes, scale, block_size=(4, 8))
    small = FP8Linear.from_parts(codes, scale.to(torch.float8_e8m0fnu), block_size=(4, 8))
    x = torch.randn(3, WIDTH)
    for module in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert module.weight_scale_inv.dtype == torch.float8_e8m0fnu
        assert torch.equal(module(x), wide(x))
    with pytest.raises(TypeError, match=r"a cast from torch\.float8_e4m3fn to torch\.float32"):
        small.float()


def test_inference_mode_and_second_derivatives() -> None:
    for module, (x, *routed) in modules():
        with torch.no_grad():
            expected = module(x, *routed)
        with torch.inference_mode():
            assert torch.equal(module(x, *routed), expected)
        a = x.clone().requires_grad_()
        for way, run in {"plain": module, "checkpoint": partial(checkpoint, module, use_reentrant=False)}.items():
            for squared in (False, True):
                y = run(a, *routed)
                loss = (y.square() if squared else y).sum()
                (plain,) = torch.autograd.grad(loss, a, retain_graph=True)
                (grad,) = torch.autograd.grad(loss, a, create_graph=True)
                assert torch.equal(grad, plain) and not plain.requires_grad, way
                if isinstance(module, FP8Linear | Int8Linear) and not squared:  # linear: its gradient is a constant
                    assert not grad.requires_grad
                    continue
                for inputs in ([a], None):
                    with pytest.raises(RuntimeError, match="differentiable once; this is a second differentiation"):
                        grad.sum().backward(retain_graph=True, inputs=inputs)
        assert a.grad is None


def test_parameters_refuse_second_derivatives() -> None:
    """A penalty on the gradient of x."""
    for module, (x, *routed) in modules():
        if not isinstance(module, FP8Linear | Int8Linear):
            x, (weights, ids) = x.clone().requires_grad_(), routed
            weights = weights.clone().requires_grad_()
            (grad,) = torch.autograd.grad(module(x, weights, ids).sum(), x, create_graph=True)
            for wanted in (weights, *(p for p in module.parameters() if p.requires_grad)):
                with pytest.raises(RuntimeError, match="QuantizedExperts: differentiable once"):
                    torch.autograd.grad(grad.square().sum(), wanted, retain_graph=True)


def test_constructed_as_from_parts() -> None:
    """The empty modules have the names, shapes and dtypes that a checkpoint fills."""
    torch.manual_seed(0)
    made = [
        FP8Linear(WIDTH, 9, True, block_size=(4, 8)),
        FP8Linear(WIDTH, 9, block_size=(4, 8)),
        FP8Experts(EXPERTS, WIDTH, HIDDEN, block_size=BLOCK),
        FP8Experts(EXPERTS, WIDTH, HIDDEN, block_size=BLOCK, bias=True, **GPT_OSS),
        MXFP4Experts(EXPERTS, WIDTH, HIDDEN),
        MXFP4Experts(EXPERTS, WIDTH, HIDDEN, bias=True, **GPT_OSS),
        Int8Linear(WIDTH, 9, True),
        Int8Linear(WIDTH, 9),
        Int8Experts(EXPERTS, WIDTH, HIDDEN),
        Int8Experts(EXPERTS, WIDTH, HIDDEN, bias=True, **GPT_OSS),
    ]
    for empty, (module, args) in zip(made, modules(), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in module.state_dict().items()
        }
        empty.load_state_dict(module.state_dict())
        assert torch.equal(empty(*args), module(*args))
        assert repr(empty) == repr(module)
    assert FP8Linear(7168, 576).weight_scale_inv.shape == (5, 56)


def test_loading_other_dtypes_is_refused() -> None:
    """torch would round numbers to codes, and the scale would be of something else."""
    module = linear(bias=False)
    wrong = {"0.weight": torch.randn(9, 20), "0.weight_scale_inv": torch.ones(3, 3, dtype=torch.float64)}
    for assign in (False, True):
        with pytest.raises(
            RuntimeError, match=r"dtype of 0\.weight: expected torch\.float8_e4m3fn, found torch\.float32"
        ):
            nn.Sequential(module).load_state_dict(wrong, assign=assign)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale_inv"):
        module.load_state_dict({"weight": module.weight})
    assert module.weight.dtype == torch.float8_e4m3fn


def test_autocast_as_the_plain_modules() -> None:
    x, (weights, ids) = torch.randn(5, WIDTH), routing(5)
    for module, dtype in itertools.product(
        (linear(bias=True, width=WIDTH), int8_linear(bias=True, width=WIDTH)),
        (torch.float32, torch.bfloat16, torch.float64),
    ):
        plain = plain_linear(module, torch.float32)
        a, b = (x.to(dtype).clone().requires_grad_() for _ in range(2))
        reference = plain if dtype != torch.float64 else plain_linear(module, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = module(a), reference(b)
        assert bits(y, expected)
        y.backward(torch.ones_like(y))
        expected.backward(torch.ones_like(y))
        assert bits(a.grad, b.grad)
    for kind in ("fp8", "mxfp4", "int8"):
        layer = experts(kind, GPT_OSS)
        named = {"gate_up_bias": layer.gate_up_proj_bias, "down_bias": layer.down_proj_bias}
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(a, weights, ids)
            expected = ops.moe_mlp(b, *numbers(layer, torch.float32), weights, ids, **named, **GPT_OSS)
        assert y.dtype == torch.bfloat16 and bits(y, expected)
        (ours,), (theirs,) = (torch.autograd.grad(t.sum(), leaf) for t, leaf in ((y, a), (expected, b)))
        assert bits(ours, theirs)


def test_checkpointed_and_compiled() -> None:
    torch._dynamo.reset()
    for module, (x, *routed) in modules():
        a = x.clone().requires_grad_()
        y = module(a, *routed)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in module.named_parameters()}
        ways = {
            "checkpoint": lambda t: checkpoint(module, t, *routed, use_reentrant=False),  # noqa: B023
            "compile": torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager"),
        }
        for way, run in ways.items():
            module.zero_grad()
            b = x.clone().requires_grad_()
            again = run(b) if way == "checkpoint" else run(b, *routed)
            again.square().sum().backward()
            if way == "checkpoint":
                assert bits(again, y) and bits(b.grad, a.grad)
            torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
            for name, p in module.named_parameters():
                torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-5)


def test_compiled_for_other_batches_and_without_gradients() -> None:
    torch._dynamo.reset()
    for kind in ("fp8", "mxfp4", "int8"):
        module = experts(kind, {})
        run = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (7, 4, 12):
            x, (weights, ids) = torch.randn(tokens, WIDTH), routing(tokens, "absent")
            with torch.no_grad():
                torch.testing.assert_close(run(x, weights, ids), module(x, weights, ids), rtol=1e-5, atol=1e-6)


def test_experts_in_a_layer() -> None:
    """They replace moe.layer.Experts and are called by its dispatcher."""
    layer = MoELayer(WIDTH, HIDDEN, EXPERTS, 2, n_shared_experts=1, initializer_range=0.3, seed=0)
    module = experts("fp8", {})
    layer.experts.gate_up_proj.data, layer.experts.down_proj.data = numbers(module, torch.float32)
    x = torch.randn(2, 5, WIDTH)
    expected = layer(x)
    expected.sum().backward()
    assert layer.gate.weight.grad is not None
    grad = layer.gate.weight.grad.clone()
    layer.experts = module  # pyright: ignore[reportAttributeAccessIssue]
    layer.zero_grad()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected) and torch.equal(layer.gate.weight.grad, grad)
    with pytest.raises(TypeError, match=r"FP8Experts\.gate_up_proj: a cast"):
        layer.to(torch.bfloat16)


def test_refusals() -> None:
    module, (weights, ids) = experts("fp8", {}), routing(3)
    assert isinstance(module, FP8Experts)
    x = torch.randn(3, WIDTH)
    with pytest.raises(IndexError, match=r"expert_ids: 6 is neither -1 nor in \[0, 6\)"):
        module(x, weights, ids.fill_(6))
    with pytest.raises(IndexError, match=r"expert_ids: -2 is neither -1 nor in \[0, 6\)"):
        module(x, weights, ids.fill_(-2))
    with pytest.raises(ValueError, match=r"x: expected \[T, 64\]; found \(3, 63\)"):
        module(x[:, 1:], weights, ids)
    with pytest.raises(TypeError, match=r"weights: expected float32 or float64; found torch\.bfloat16"):
        module(x, weights.bfloat16(), ids)
    parts = module.gate_up_proj, module.gate_up_proj_scale_inv, module.down_proj, module.down_proj_scale_inv
    with pytest.raises(ValueError, match=r"scale_inv: expected \[6, 2, 1\] .* blocks of 128 x 128 in 2 parts"):
        FP8Experts.from_parts(*parts, block_size=(128, 128))
    with pytest.raises(ValueError, match=r"down: expected \[6, 64, 32\]; found \(5, 64, 32\)"):
        FP8Experts.from_parts(*parts[:2], parts[2][:5], parts[3][:5], block_size=BLOCK)
    with pytest.raises(ValueError, match=r"gate_up_bias: expected \[6, 64\]; found \(64, 6\)"):
        FP8Experts.from_parts(*parts, block_size=BLOCK, gate_up_bias=torch.ones(64, 6))
    with pytest.raises(ValueError, match=r"scale_inv: expected \[3, 3\] .* found \[3, 2\]"):
        FP8Linear.from_parts(linear(False).weight, torch.ones(3, 2), block_size=(4, 8))
    with pytest.raises(ValueError, match=r"bias: expected \[9\]; found \(20,\)"):
        FP8Linear.from_parts(linear(False).weight, torch.ones(3, 3), torch.ones(20), block_size=(4, 8))
    with pytest.raises(ValueError, match="hidden = 40: expected a multiple of 32"):
        MXFP4Experts(2, 64, 40)
    with pytest.raises(TypeError, match=r"blocks: expected uint8"):
        MXFP4Experts.from_parts(*parts)
