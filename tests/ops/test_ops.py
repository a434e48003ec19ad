"""Values and gradients of every operator over the table of cases, judged by the bound."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from moe import ops
from moe.ops import SwiGLU
from moe.ops.activation import swiglu_reference
from moe.ops.grouped_gemm import grouped_mm_reference
from moe.ops.mlp import moe_mlp_reference
from moe.ops.permutation import permute_reference, unpermute_reference
from tests.support.bound import DTYPES, UNIT, against_eager, elementwise_limit, excess, product_limit
from tests.support.cases import BY_NAME, CASES, Case, Inputs
from tests.support.operators import eager_experts, fused, gradients
from tests.support.running_error import beyond, complaints, moe_mlp_errors

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def test_memory_is_poisoned() -> None:
    # What a kernel allocates and does not write shows as NaN in every test here.
    assert torch.empty(1000).isnan().all() and torch.ones(3).new_empty(1000).isnan().all()


@each_dtype
@each_case
def test_moe_mlp(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    grad = torch.randn(case.tokens, case.width, dtype=torch.float64).to(dtype)
    ours = gradients(fused, inputs, grad)
    exact = gradients(eager_experts, inputs.to(torch.float64), grad)
    errors, eager = moe_mlp_errors(inputs, grad), cache(lambda: gradients(eager_experts, inputs, grad))
    assert not complaints(inputs, ours, errors, exact, eager)
    unused = ~torch.isin(torch.arange(case.experts), inputs.expert_ids)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert (ours[name][unused] == 0).all(), name
    assert (ours["weights"][inputs.expert_ids == -1] == 0).all()
    with torch.no_grad():  # the path without a saved pre-activation
        y = {"y": fused(inputs)}
    assert not complaints(inputs, y, errors, exact, eager)
    assert {n: ours[n].dtype for n in ours} == {"y": dtype} | {n: getattr(inputs, n).dtype for n in ours if n != "y"}


@pytest.mark.parametrize(
    "activation", [SwiGLU(0.7), SwiGLU(1.5, alpha=1.702), SwiGLU(1.5, alpha=1.702, beta=1.0)], ids=str
)
@pytest.mark.parametrize("case", [BY_NAME["ragged"], BY_NAME["one_token"]], ids=str)
@each_dtype
def test_moe_mlp_clamped(case: Case, dtype: torch.dtype, activation: SwiGLU) -> None:
    def reference(i: Inputs) -> Tensor:
        return fused(i, tier="reference", activation=activation)

    inputs, grad = case.inputs(dtype), torch.randn(case.tokens, case.width).to(dtype)
    ours = gradients(lambda i: fused(i, activation=activation), inputs, grad)
    exact, errors = gradients(reference, inputs.to(torch.float64), grad), moe_mlp_errors(inputs, grad, activation)
    assert not complaints(inputs, ours, errors, exact, lambda: gradients(reference, inputs, grad))


def strided(tensor: Tensor) -> Tensor:
    """The same values, every third element of a row, with others between them."""
    return torch.stack([tensor, tensor.roll(1, -1), tensor + 1], dim=-1).flatten(-2)[..., ::3]


@pytest.mark.parametrize("case", [BY_NAME["one_token"], BY_NAME["ragged"]], ids=str)
def test_moe_mlp_takes_any_strides(case: Case) -> None:
    inputs, grad = case.inputs(torch.float32), torch.randn(case.tokens, case.width)
    errors = moe_mlp_errors(inputs, grad)
    for name in vars(inputs):
        turned = replace(inputs, **{name: strided(getattr(inputs, name))})
        with torch.no_grad():
            assert not beyond({"y": fused(turned)}, errors), f"with strided {name}"
        assert not beyond(gradients(fused, turned, grad), errors), f"with strided {name}"
    assert not beyond(gradients(fused, inputs, strided(grad)), errors), "with a strided gradient"


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_moe_mlp_does_not_depend_on_its_batches(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, small experts are multiplied in batches: more batches, and experts too large for one."""
    inputs, grad = BY_NAME["ragged"].inputs(torch.float32), torch.randn(61, 24)
    errors = moe_mlp_errors(inputs, grad)
    monkeypatch.setattr("moe.ops.mlp._BATCH_ROWS", rows)
    for most in (2**20, 25 * 24 * 80, 0):
        for few in (0, 4):
            monkeypatch.setattr("moe.ops.mlp._SMALL_PRODUCT", most)
            monkeypatch.setattr("moe.ops.mlp._FEW_ROWS", few)
            assert not beyond(gradients(fused, inputs, grad), errors), (most, few)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moe_mlp_writes_into_memory_that_is_zero(case: Case, dtype: torch.dtype, monkeypatch: Any) -> None:
    """On the CPU, large gradients of which a part remains zero: with few rows, and with an expert without rows."""
    inputs, grad = case.inputs(dtype), torch.randn(case.tokens, case.width).to(dtype)
    for most in (2**20, 0):
        monkeypatch.setattr("moe.ops.mlp._SMALL_PRODUCT", most)
        monkeypatch.setattr("moe.ops.mlp._ZERO_BYTES", 2**25)
        filled = gradients(fused, inputs, grad)
        monkeypatch.setattr("moe.ops.mlp._ZERO_BYTES", 0)
        for name, found in gradients(fused, inputs, grad).items():
            assert found.equal(filled[name]) and found.data_ptr() % 64 == 0, name
            assert found.is_contiguous()
    leaves = inputs.leaves()
    for _ in range(2):  # accumulated in place
        fused(leaves).backward(grad)
    assert leaves.gate_up.grad is not None and leaves.gate_up.grad.equal(2 * filled["gate_up"])


@each_case
def test_moe_mlp_reference_is_the_definition(case: Case) -> None:
    i = case.inputs(torch.float64)
    expected = torch.zeros_like(i.x)
    for t in range(case.tokens):
        for k, e in enumerate(i.expert_ids[t].tolist()):
            if e != -1:
                gate, up = (i.gate_up[e] @ i.x[t] + i.gate_up_bias[e]).chunk(2)
                expected[t] += i.weights[t, k] * (i.down[e] @ (gate * gate.sigmoid() * up) + i.down_bias[e])
    assert torch.allclose(fused(i, tier="reference"), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(moe_mlp_reference(*vars(i).values()), fused(i, tier="reference"))


@pytest.mark.parametrize("name", ["absent", "one_token_absent", "one_token_partly_absent"])
def test_a_weight_of_a_slot_that_is_not_here_is_not_read(name: str) -> None:
    inputs = BY_NAME[name].inputs(torch.float32)
    nan = inputs.weights.masked_fill(inputs.expert_ids == -1, torch.nan)
    poisoned = Inputs(**vars(inputs) | {"weights": nan})
    assert torch.equal(fused(poisoned), fused(inputs))
    rows = ops.permute(inputs.x, inputs.expert_ids, BY_NAME[name].experts)
    assert ops.unpermute(rows.rows, rows.position, nan).isfinite().all()
    leaves = poisoned.leaves()
    grads = torch.autograd.grad(fused(leaves).sum(), leaves.differentiable)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("name", ["absent", "nobody", "one_token_absent"])
def test_rows_of_no_expert_are_zero_in_what_is_saved(name: str) -> None:
    i = BY_NAME[name].inputs(torch.float32)
    args = (i.x, i.gate_up, i.down, i.weights, i.expert_ids, None, None, None, 1.0, 0.0, True, "auto")
    _, pre = torch.ops.moesmith.moe_mlp_forward(*args)
    here = int((i.expert_ids >= 0).sum())
    assert (pre[here:] == 0).all() and (pre[:here] != 0).all() and len(pre) == i.expert_ids.numel()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moe_mlp_beside_transformers(family: str, dtype: torch.dtype) -> None:
    case = BY_NAME["many_experts"]
    if family == "mixtral":
        from transformers import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts

        config = Config(hidden_size=case.width, intermediate_size=case.hidden, num_local_experts=case.experts)
    else:
        from transformers import DeepseekV3Config as Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts as Experts

        config = Config(
            hidden_size=case.width, moe_intermediate_size=case.hidden, n_routed_experts=case.experts, n_group=1
        )
    config._experts_implementation = "eager"
    inputs = case.inputs(dtype)
    theirs = Experts(config).to(dtype)

    def transformers_experts(i: Inputs) -> Tensor:
        parameters = {"gate_up_proj": i.gate_up, "down_proj": i.down}
        return torch.func.functional_call(theirs, parameters, (i.x, i.expert_ids, i.weights))

    def ours_without_bias(i: Inputs) -> Tensor:
        return ops.moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids)

    grad = torch.randn(case.tokens, case.width).to(dtype)
    ours = gradients(ours_without_bias, inputs, grad)
    eager = gradients(transformers_experts, inputs, grad)
    exact = gradients(transformers_experts, inputs.to(torch.float64), grad)
    verdicts = {name: against_eager(ours[name], eager[name], exact[name], dtype) for name in ours}
    assert all(v.right for v in verdicts.values()), verdicts


def grouped(case: Case, form: str, dtype: torch.dtype, tail: int = 5) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands whose ragged dimension has `tail` rows or columns past the last offset."""
    i = case.inputs(torch.float64)
    counts = torch.bincount(i.expert_ids[i.expert_ids >= 0], minlength=case.experts)
    offs = counts.cumsum(0).int()
    rows = int(offs[-1]) + tail
    fixed, wide = torch.randn(rows, case.width), torch.randn(rows, 2 * case.hidden)
    batch = torch.randn(case.experts, 11, case.width)
    a, b, offs = {
        "rows": (fixed, i.gate_up.transpose(1, 2), offs),
        "products": (fixed.t(), wide, offs),
        "batched": (batch, i.gate_up.transpose(1, 2), None),
        "columns": (i.gate_up, fixed.t(), offs),
    }[form]
    return a.to(dtype), b.to(dtype), offs


FORMS = ("rows", "products", "batched", "columns")
each_form = pytest.mark.parametrize("form", FORMS)


def grouped_limit(a: Tensor, b: Tensor, offs: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = a.double(), b.double()
    exact, magnitude = grouped_mm_reference(a, b, offs), grouped_mm_reference(a.abs(), b.abs(), offs)
    return exact, product_limit(exact, magnitude, a.shape[-1], dtype)


@each_dtype
@each_form
@each_case
def test_grouped_mm(case: Case, form: str, dtype: torch.dtype) -> None:
    a, b, offs = grouped(case, form, dtype)
    a, b = a.requires_grad_(), b.requires_grad_()
    result = ops.grouped_mm(a, b, offs)
    assert excess(result, *grouped_limit(a.detach(), b.detach(), offs, dtype)) <= 1
    # The gradient of a sum is an expanded one, with strides of zero: what torch's own refuses.
    grads = torch.autograd.grad(result.sum(), (a, b))
    ones = torch.ones_like(result)
    for name, grad, left, right in (("a", grads[0], ones, b.mT), ("b", grads[1], a.mT, ones)):
        assert excess(grad, *grouped_limit(left.detach(), right.detach(), offs, dtype)) <= 1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_form
def test_grouped_mm_beside_torch(form: str, dtype: torch.dtype) -> None:
    a, b, offs = grouped(Case("aligned", 64, 32, 16, 4, 2, "random"), form, dtype, tail=0)
    if form == "products":  # torch wants strides in multiples of 16 bytes
        a = a.contiguous()
    theirs = torch.nn.functional.grouped_mm(a, b, offs=offs)
    exact, limit = grouped_limit(a, b, offs, dtype)
    assert excess(theirs, exact, limit) <= 1
    assert excess(ops.grouped_mm(a, b, offs), exact, limit) <= 1


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048), (torch.bfloat16, 256)], ids=str)
@each_form
def test_grouped_mm_accumulates_in_float32(form: str, dtype: torch.dtype, large: int) -> None:
    """Small summands after one beside which they vanish in half precision."""
    a, b, offs = grouped(Case("long", 130, 65, 12, 2, 1, "random"), form, dtype, tail=0)
    a, b = torch.ones_like(a), torch.ones_like(b)
    ends = [0] if offs is None or form != "products" else [0, int(offs[0])]
    a[..., ends] = large
    exact = grouped_mm_reference(a.double(), b.double(), offs)
    assert (exact > large + 20).all()
    assert torch.equal(ops.grouped_mm(a, b, offs), exact.to(dtype))


@each_form
def test_grouped_mm_strides_and_zero_sizes(form: str) -> None:
    a, b, offs = grouped(BY_NAME["ragged"], form, torch.float32)
    exact, limit = grouped_limit(a, b, offs, torch.float32)
    apart = torch.stack([b, b], dim=-1)[..., 0]
    far = None if offs is None else torch.stack([offs, offs + 99], dim=1)[:, 0]
    assert excess(ops.grouped_mm(a.mT.contiguous().mT, apart, far), exact, limit) <= 1
    if form != "products":  # an inner size of zero makes sums of nothing
        assert (ops.grouped_mm(a[..., :0], b[..., :0, :], offs) == 0).all()
    else:
        assert ops.grouped_mm(a[:0], b, offs).shape == (len(exact), 0, b.shape[1])
    if offs is not None:
        for function in (ops.grouped_mm, grouped_mm_reference):
            result = function(a if a.dim() == 2 else a[:0], b if b.dim() == 2 else b[:0], offs[:0])
            groups = (0,) if form == "products" else ()
            assert result.shape == (*groups, a.shape[-2], b.shape[-1]) and (result == 0).all()


def unpermute_limits(rows: Tensor, position: Tensor, weights: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The exact values and limits of `unpermute` and of its gradients for rows and weights."""
    leaves = rows.double().requires_grad_(), weights.double().requires_grad_()
    exact = unpermute_reference(leaves[0], position, leaves[1])
    grad_rows, grad_weights = torch.autograd.grad(exact, leaves, grad.double(), materialize_grads=True)
    # Sums over k and, for a weight's gradient, over the width: the bound of a product.
    magnitude = unpermute_reference(rows.double().abs(), position, weights.double().abs())
    of_result = exact.detach(), product_limit(exact.detach(), magnitude, weights.shape[1], rows.dtype)
    here = position.flatten() >= 0
    magnitude = torch.zeros(position.numel(), dtype=torch.float64)
    slots = grad.double().abs().repeat_interleave(weights.shape[1], 0)[here]
    magnitude[here] = (rows.double()[position.flatten()[here]].abs() * slots).sum(1)
    of_weights = product_limit(grad_weights, magnitude.view_as(weights), rows.shape[1], weights.dtype)
    return [of_result, (grad_rows, elementwise_limit(grad_rows, rows.dtype)), (grad_weights, of_weights)]


@each_dtype
@each_case
def test_permute_and_unpermute(case: Case, dtype: torch.dtype) -> None:
    i = case.inputs(dtype)
    x, weights = i.x.requires_grad_(), i.weights.requires_grad_()
    permuted = ops.permute(x, i.expert_ids, case.experts)
    slots = sorted((e if e >= 0 else case.experts, slot) for slot, e in enumerate(i.expert_ids.flatten().tolist()))
    here = sum(e < case.experts for e, _ in slots)
    for row, (_, slot) in enumerate(slots):
        t, k = divmod(slot, case.top_k)
        assert torch.equal(permuted.rows[row], x[t] if row < here else torch.zeros_like(x[t]))
        assert permuted.position[t, k] == (row if row < here else -1)
    assert permuted.offsets.tolist() == [sum(s <= e for s, _ in slots) for e in range(case.experts)]
    assert permuted.offsets.dtype == torch.int32

    expected = permute_reference(x, i.expert_ids, case.experts)
    assert all(torch.equal(a, b) for a, b in zip(vars(permuted).values(), vars(expected).values(), strict=True))
    rows = torch.randn_like(permuted.rows).requires_grad_()
    grad_rows, grad_y = torch.randn_like(rows), torch.randn_like(x)
    result = ops.unpermute(rows, permuted.position, weights)
    grads = (*torch.autograd.grad(permuted.rows, x, grad_rows), *torch.autograd.grad(result, (rows, weights), grad_y))

    x64 = x.detach().double().requires_grad_()
    exact_rows = permute_reference(x64, i.expert_ids, case.experts).rows
    (exact,) = torch.autograd.grad(exact_rows, x64, grad_rows.double())
    magnitude = unpermute_reference(grad_rows.double().abs(), permuted.position)
    assert excess(grads[0], exact, product_limit(exact, magnitude, case.top_k, dtype)) <= 1
    limits = unpermute_limits(rows.detach(), permuted.position, weights.detach(), grad_y)
    for name, found, limit in zip(("y", "rows", "weights"), (result, *grads[1:]), limits, strict=True):
        assert excess(found, *limit) <= 1, name
    # The last rows belong to no slot, and may be left out.
    few = rows.detach()[:here].requires_grad_()
    short = ops.unpermute(few, permuted.position, weights)
    assert torch.equal(short, result)
    found = torch.autograd.grad(short, (few, weights), grad_y)
    assert torch.equal(found[0], grads[1][:here]) and torch.equal(found[1], grads[2])

    # Without weights, a plain sum.
    plain = ops.unpermute(rows.detach(), permuted.position)
    ones = ops.unpermute(rows.detach(), permuted.position, torch.ones_like(i.weights).detach())
    assert torch.equal(plain, ones)


def test_permute_and_unpermute_take_any_strides() -> None:
    case = BY_NAME["absent"]
    i = case.inputs(torch.float32)
    permuted = ops.permute(i.x, i.expert_ids, case.experts)
    for x, ids in ((strided(i.x), i.expert_ids), (i.x, strided(i.expert_ids)), (i.x[::2], i.expert_ids[::2])):
        found, expected = ops.permute(x, ids, case.experts), ops.permute(x.clone(), ids.clone(), case.experts)
        assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(expected).values(), strict=True))

    tensors = {"rows": torch.randn_like(permuted.rows), "position": permuted.position, "weights": i.weights}
    grad = torch.randn_like(i.x)

    def results(grad: Tensor, **changed: Tensor) -> tuple[Tensor, ...]:
        leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in (tensors | changed).items()}
        y = ops.unpermute(**leaves)
        return y.detach(), *torch.autograd.grad(y, (leaves["rows"], leaves["weights"]), grad)

    limits = unpermute_limits(**tensors, grad=grad)
    for name, tensor in tensors.items():
        for result, limit in zip(results(grad, **{name: strided(tensor)}), limits, strict=True):
            assert excess(result, *limit) <= 1, f"with strided {name}"
    for result, limit in zip(results(strided(grad)), limits, strict=True):
        assert excess(result, *limit) <= 1, "with a strided gradient"
    (found,), (exact,) = (
        torch.autograd.grad(ops.permute(x, i.expert_ids, case.experts).rows, x, g)
        for x, g in (
            (i.x.clone().requires_grad_(), strided(tensors["rows"])),
            (i.x.clone().requires_grad_(), tensors["rows"]),
        )
    )
    assert torch.equal(found, exact)


@pytest.mark.parametrize("tokens", [512, 600])
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_that_are_summed_in_parts(tokens: int, weighted: bool) -> None:
    """More half-precision numbers than are widened at once."""
    ids = torch.randint(-1, 6, (tokens, 4))
    position = ops.permute(torch.zeros(tokens, 0), ids, 6).position
    rows = torch.randn(4 * tokens, 1024).half()
    weights = torch.rand(tokens, 4) if weighted else None
    exact = unpermute_reference(rows.double(), position, None if weights is None else weights.double())
    magnitude = unpermute_reference(rows.double().abs(), position, None if weights is None else weights.double())
    result = ops.unpermute(rows, position, weights)
    assert excess(result, exact, product_limit(exact, magnitude, 4, torch.float16)) <= 1


@pytest.mark.parametrize(("experts", "top_k"), [(3, 0), (0, 2), (0, 0)])
def test_the_reference_has_gradients_without_slots(experts: int, top_k: int) -> None:
    ids, shapes = torch.full((4, top_k), -1), ((4, 8), (experts, 12, 8), (experts, 8, 6), (4, top_k))
    for tier in ("auto", "reference"):
        leaves = [torch.randn(shape, requires_grad=True) for shape in (*shapes, (experts, 12), (experts, 8))]
        x, gate_up, down, w, gate_up_bias, down_bias = leaves
        y = ops.moe_mlp(x, gate_up, down, w, ids, gate_up_bias=gate_up_bias, down_bias=down_bias, tier=tier)
        assert torch.equal(y, torch.zeros(4, 8))
        grads = torch.autograd.grad(y.sum(), leaves)
        assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


def test_permute_without_experts() -> None:
    x, ids = torch.randn(5, 4), torch.full((5, 2), -1)
    for permuted in (ops.permute(x, ids, 0), permute_reference(x, ids, 0)):
        assert torch.equal(permuted.rows, torch.zeros(10, 4)) and permuted.offsets.shape == (0,)
        assert torch.equal(permuted.position, ids)


@each_dtype
@pytest.mark.parametrize(
    "activation",
    [
        SwiGLU(),
        SwiGLU(1.5),
        SwiGLU(7.0, 1.702),
        SwiGLU(None, 0.5),
        SwiGLU(7.0, 1.702, 1.0),
        SwiGLU(beta=-0.5),
        SwiGLU(beta=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(37, 80), (2, 3, 6), (0, 8), (5, 0), (2,)], ids=str)
def test_swiglu(shape: tuple[int, ...], activation: SwiGLU, dtype: torch.dtype) -> None:
    alpha, beta = activation.alpha, activation.beta
    gate_up = (6 * torch.randn(shape)).to(dtype).requires_grad_()
    result = ops.swiglu(gate_up, activation)
    grad = torch.randn(result.shape).to(dtype)
    (grad_in,) = torch.autograd.grad(result, gate_up, grad)
    exact_in = gate_up.detach().double().requires_grad_()
    exact = swiglu_reference(exact_in, activation)
    (exact_grad,) = torch.autograd.grad(exact, exact_in, grad.double())
    # exp(-alpha * gate) turns the rounding of its argument, in the dtype it is computed in, into a relative error.
    gate, up = (half.double() for half in gate_up.detach().chunk(2, dim=-1))
    argument = 0 if alpha == 1 else 2 * (alpha * gate).abs() * UNIT[torch.promote_types(dtype, torch.float32)]
    assert excess(result, exact, elementwise_limit(exact, dtype) + argument * exact.abs()) <= 1
    # silu'(gate) crosses zero near -1.28, where only an absolute error can be promised: its two terms cancel.
    cancelling = grad.double().abs() * (up + beta).abs() * (alpha * gate).abs().clamp(min=1) * (alpha * gate).sigmoid()
    scale = torch.cat([cancelling, exact_grad.chunk(2, dim=-1)[1].abs()], dim=-1)
    extra = torch.cat([argument * cancelling * (1 + (alpha * gate).abs())] * 2, dim=-1) if alpha != 1 else 0
    limits = 4 * UNIT[dtype] * torch.maximum(scale, exact_grad.abs()) + extra
    assert excess(grad_in, exact_grad, limits) <= 1
    if shape == (37, 80):
        turned = ops.swiglu(gate_up.detach().t().contiguous().t(), activation)
        assert excess(turned, exact, elementwise_limit(exact, dtype) + argument * exact.abs()) <= 1
        (turned,) = torch.autograd.grad(ops.swiglu(gate_up, activation), gate_up, grad.t().contiguous().t())
        assert excess(turned, exact_grad, limits) <= 1


@each_dtype
@pytest.mark.parametrize("activation", [SwiGLU(), SwiGLU(None, 1.702, 1.0), SwiGLU(70.0)], ids=str)
def test_swiglu_of_large_gates(activation: SwiGLU, dtype: torch.dtype) -> None:
    """Over the whole range of the exponential, which float32 holds down to a gate of -88.7."""
    alpha, beta = activation.alpha, activation.beta
    gate = torch.linspace(-110, 110, 1761).repeat(2)
    gate_up = torch.cat([gate, torch.where(torch.arange(len(gate)) < 1761, -1.5, 0.75)]).to(dtype).requires_grad_()
    result = ops.swiglu(gate_up, activation)
    grad = torch.linspace(0.5, 1.5, len(gate)).to(dtype)
    (grad_in,) = torch.autograd.grad(result, gate_up, grad)
    exact_in = gate_up.detach().double().requires_grad_()
    exact = swiglu_reference(exact_in, activation)
    (exact_grad,) = torch.autograd.grad(exact, exact_in, grad.double())

    wide = torch.promote_types(dtype, torch.float32)
    gate, up = exact_in.detach().chunk(2)
    argument, largest = alpha * gate, math.log(torch.finfo(wide).max)
    roundings = 4 * UNIT[dtype] + (0.0 if alpha == 1 else 2.0) * UNIT[wide] * argument.abs()
    # 0 is right where the exponential is infinite. The sigmoid, of the gradient, loses digits before that.
    limits = torch.where(argument < 0.01 - largest, 1, roundings) * exact.abs()
    assert excess(result, exact, limits) <= 1
    limits = torch.where(argument < 2 - largest, 1, roundings) * argument.sigmoid() * grad.double()
    factors = torch.cat([(1 + argument.abs()) * (up + beta).abs(), gate.abs()])
    assert excess(grad_in, exact_grad, limits.repeat(2) * factors) <= 1


@each_dtype
def test_swiglu_at_its_limits(dtype: torch.dtype) -> None:
    """At a limit the gradient passes, as for torch's clamp; beyond it the gradient is zero."""
    gate, up = [1.5, 1.5, -1.5, 2.0, 1.0, 1.0], [1.5, -1.5, 1.5, 1.0, 2.0, -2.0]
    gate_up = torch.tensor([gate + up], dtype=dtype, requires_grad=True)
    (found,) = torch.autograd.grad(ops.swiglu(gate_up, SwiGLU(1.5)).sum(), gate_up)
    double = gate_up.detach().double().requires_grad_()
    exact_gate, exact_up = double.chunk(2, dim=-1)
    y = silu(exact_gate.clamp(max=1.5)) * exact_up.clamp(-1.5, 1.5)
    (exact,) = torch.autograd.grad(y.sum(), double)
    assert exact[0].eq(0).tolist() == [False] * 3 + [True] + [False] * 6 + [True] * 2
    assert excess(found, exact, 4 * UNIT[dtype] * exact.abs()) <= 1


@pytest.mark.parametrize("swiglu", [ops.swiglu, swiglu_reference])
def test_swiglu_by_hand(swiglu: Callable[..., Tensor]) -> None:
    def by_hand(*gate_up: float, **settings: float) -> float:
        return swiglu(torch.tensor(gate_up, dtype=torch.float64), SwiGLU(**settings)).item()

    assert by_hand(2, 3) == pytest.approx(2 / (1 + math.exp(-2)) * 3)
    assert by_hand(9, -9, limit=2) == pytest.approx(2 / (1 + math.exp(-2)) * -2)
    assert by_hand(9, 9, limit=2, beta=1) == pytest.approx(2 / (1 + math.exp(-2)) * 3)  # added to the clamped half
    assert by_hand(-9, 1, limit=2) == pytest.approx(-9 / (1 + math.exp(9)))


BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row is zero": lambda y: y.index_fill(0, torch.tensor([7]), 0),
    "one row is another's": lambda y: y.index_copy(0, torch.tensor([7]), y[8:9]),
    "one sign is flipped": lambda y: y * torch.where(torch.arange(y.numel()).view(y.shape) == y.abs().argmax(), -1, 1),
    "all signs are flipped": lambda y: -y,
    "scaled by 1.02": lambda y: (y.double() * 1.02).to(y.dtype),
    "a NaN": lambda y: y.index_fill(0, torch.tensor([3]), torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bug", BUGS)
def test_the_bounds_see(bug: str, dtype: torch.dtype) -> None:
    a, b, offs = grouped(BY_NAME["ragged"], "rows", dtype)
    assert excess(BUGS[bug](ops.grouped_mm(a, b, offs)), *grouped_limit(a, b, offs, dtype)) > 1
    inputs = BY_NAME["ragged"].inputs(dtype)
    exact, eager = eager_experts(inputs.to(torch.float64)), eager_experts(inputs)
    assert against_eager(fused(inputs), eager, exact, dtype).right
    assert not against_eager(BUGS[bug](fused(inputs)), eager, exact, dtype).right


FEW = ("one_token", "one_slot", "two_tokens", "few_slots_absent")


@pytest.mark.parametrize("activation", [SwiGLU(), SwiGLU(limit=0.7, alpha=1.702, beta=1.0)], ids=str)
@pytest.mark.parametrize("name", [*FEW, "absent", "repeated", "no_tokens"])
def test_the_running_error_sees_the_exact_values(name: str, activation: SwiGLU) -> None:
    inputs = BY_NAME[name].inputs(torch.float64)
    grad = torch.randn_like(inputs.x)
    errors = moe_mlp_errors(inputs, grad, activation)
    for key, exact in gradients(lambda i: fused(i, tier="reference", activation=activation), inputs, grad).items():
        torch.testing.assert_close(errors[key].exact, exact, rtol=1e-12, atol=1e-14, msg=key)


def without(inputs: Inputs, name: str, index: Any) -> Inputs:
    return replace(inputs, **{name: getattr(inputs, name).index_fill(-1, torch.tensor(index), 0)})


DROPPED: dict[str, Callable[[Inputs], Inputs]] = {
    "an element of the width": lambda i: without(i, "x", 1),
    "an element of the hidden width": lambda i: without(i, "down", 1),
    "the up bias": lambda i: replace(i, gate_up_bias=i.gate_up_bias * 0),
    "the down bias": lambda i: replace(i, down_bias=i.down_bias * 0),
    "a slot": lambda i: replace(i, expert_ids=i.expert_ids.index_fill(1, torch.tensor(i.expert_ids.shape[1] - 1), -1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_the_running_error_sees(name: str, dtype: torch.dtype) -> None:
    """It detects each result that is zero, scaled, negated or computed without something, even of few numbers."""
    inputs = BY_NAME[name].inputs(dtype)
    grad = torch.randn(inputs.x.shape).to(dtype)
    ours, errors = gradients(fused, inputs, grad), moe_mlp_errors(inputs, grad)
    scale = {torch.float32: 1.004, torch.float16: 1.1, torch.bfloat16: 1.5}[dtype]
    for key, result in ours.items():
        largest = result.abs() == result.abs().max()
        for wrong in (
            result * 0,
            result * scale,
            torch.where(largest, 0, result),
            torch.where(largest, -result, result),
        ):
            assert excess(wrong, errors[key].exact, errors[key].error) > 1, key
    for what, drop in DROPPED.items():
        broken = beyond(gradients(fused, drop(inputs), grad), errors)
        assert broken if dtype == torch.bfloat16 else "y" in broken, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_bound_sees_a_dropped_column_of_the_inner_dimension(dtype: torch.dtype) -> None:
    a, b, offs = grouped(BY_NAME["ragged"], "rows", dtype)
    exact, limit = grouped_limit(a, b, offs, dtype)
    dropped = a.clone()
    dropped[:, 5] = 0
    assert excess(ops.grouped_mm(dropped, b, offs), exact, limit) > 1
    # A partial sum that is rounded to bfloat16 on the way.
    half = a.shape[1] // 2
    split = [ops.grouped_mm(a[:, s], b[:, s], offs).bfloat16().to(dtype) for s in (slice(half), slice(half, None))]
    assert excess(split[0] + split[1], exact, limit) > 1
