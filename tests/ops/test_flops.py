"""What torch's FlopCounterMode counts, against the same experts as ordinary modules and against arithmetic."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

import moe
from moe import ops
from moe.counts import count_parameters
from moe.quantized import FP8Experts, Int8Experts, Int8Linear

T, D, F, E, K = 12, 8, 6, 4, 2


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class OneByOne(nn.Module):
    """Experts of nn.Linear, each given the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.ModuleList(nn.Linear(D, 2 * F, bias=False) for _ in range(E))
        self.down = nn.ModuleList(nn.Linear(F, D, bias=False) for _ in range(E))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, k = (ids == e).nonzero(as_tuple=True)
            gate, up = self.gate_up[e](x[token]).chunk(2, dim=-1)
            out = out.index_add(0, token, self.down[e](silu(gate) * up) * weights[token, k, None])
        return out


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("frozen", [(), ("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_experts_cost_what_ordinary_modules_cost(needs_x: bool, frozen: tuple[str, ...]) -> None:
    ours, theirs = moe.MoELayer(D, F, E, K).experts, OneByOne()
    for name in frozen:
        getattr(ours, name).requires_grad_(False)
        theirs.get_submodule(name.removesuffix("_proj")).requires_grad_(False)
    ids = torch.randint(-1, E, (T, K))
    x, weights = torch.randn(T, D, requires_grad=needs_x), torch.rand(T, K)
    for module in (ours, theirs):
        rows = int((ids >= 0).sum())
        with torch.no_grad():
            assert flops(lambda m=module: m(x, weights, ids)) == 6 * rows * D * F
    if needs_x or len(frozen) < 2:
        ours_flops, theirs_flops = (flops(lambda m=m: m(x, weights, ids).sum().backward()) for m in (ours, theirs))
        assert ours_flops == theirs_flops


def test_a_gradient_of_the_routing_weights_alone_costs_one_product() -> None:
    experts = moe.MoELayer(D, F, E, K).experts.requires_grad_(False)
    weights, ids = torch.rand(T, K, requires_grad=True), torch.randint(0, E, (T, K))
    assert flops(lambda: experts(torch.randn(T, D), weights, ids).sum().backward()) == 8 * T * K * D * F


def test_a_layer_and_its_parts() -> None:
    layer, x = moe.MoELayer(D, F, E, K, n_shared_experts=1), torch.randn(2, T // 2, D)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    parts = {name.rpartition(".")[2]: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    assert parts["gate"] == 2 * T * D * E
    assert parts["experts"] == 6 * T * K * D * F
    assert parts["shared_experts"] == 6 * T * D * F
    assert counter.get_total_flops() == sum(parts[name] for name in ("gate", "experts", "shared_experts"))


def test_a_model_multiplies_by_the_activated_parameters() -> None:
    """A backward pass costs twice a forward pass, but for products of attention, which have no parameters."""
    config = moe.ModelConfig(
        vocab_size=50, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=10,
        moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=K, topk_method="greedy",
    )  # fmt: skip
    model, ids = moe.Transformer(config), torch.zeros(2, 5, dtype=torch.int64)
    counts = count_parameters(config)
    matrices = counts.activated_without_embedding - counts.norms
    attention = 2 * sum(2 * 2 * 5 * 5 * D * 2 for _ in range(config.num_hidden_layers))
    with torch.device("meta"):
        away, far = moe.Transformer(config), torch.zeros(2, 5, dtype=torch.int64)
    for each, tokens in ((model, ids), (away, far)):
        forward = flops(lambda m=each, t=tokens: m(t))
        assert forward == 2 * 10 * matrices + attention // 2
        assert flops(lambda m=each, t=tokens: m(t).logits.sum().backward()) == 3 * forward


def test_grouped_products() -> None:
    offs = torch.tensor([2, 2, 7, 10], dtype=torch.int32)  # two rows are past the last
    a, b = torch.randn(T, D, requires_grad=True), torch.randn(E, D, F, requires_grad=True)
    assert flops(lambda: ops.grouped_mm(a, b, offs)) == 2 * 10 * D * F
    assert flops(lambda: ops.grouped_mm(a, b, offs).sum().backward()) == 3 * 2 * 10 * D * F
    assert flops(lambda: ops.grouped_mm(a.t(), torch.randn(T, F), offs)) == 2 * 10 * D * F
    assert flops(lambda: ops.grouped_mm(b.mT, torch.randn(D, T), offs)) == 2 * 10 * D * F
    assert flops(lambda: ops.grouped_mm(b.mT, b)) == 2 * E * D * F * F
    with torch.device("meta"):
        assert flops(lambda: ops.grouped_mm(torch.empty(T, D), torch.empty(E, D, F), torch.empty(E).int())) == (
            2 * T * D * F
        )


def test_other_operators_have_no_products() -> None:
    x, ids = torch.randn(T, D, requires_grad=True), torch.zeros(T, K, dtype=torch.int64)

    def run() -> None:
        permuted = ops.permute(x, ids, E)
        ops.unpermute(ops.swiglu(permuted.rows), permuted.position, ops.route(x, top_k=K).weights).sum().backward()

    assert flops(run) == 0


def test_without_values_and_quantised() -> None:
    x, weights, ids = torch.randn(T, D), torch.rand(T, K), torch.full((T, K), -1)
    layer = moe.MoELayer(D, F, E, K)
    assert flops(lambda: layer.experts(x, weights, ids)) == 0
    with FakeTensorMode():  # ids are not known: all of them are counted
        experts = moe.MoELayer(D, F, E, K).experts
        assert (
            flops(lambda: experts(torch.empty(T, D), torch.empty(T, K), torch.empty(T, K).long())) == 6 * T * K * D * F
        )
    codes, scales = ops.quantize_blocks(layer.experts.gate_up_proj, halves=2)
    quantised = FP8Experts.from_parts(
        codes, scales, *ops.quantize_blocks(layer.experts.down_proj), block_size=(128, 128)
    )
    ids = torch.randint(0, E, (T, K))
    assert flops(lambda: quantised(x, weights, ids)) == 6 * T * K * D * F
    assert flops(lambda: quantised(x.clone().requires_grad_(), weights, ids).sum().backward()) == 12 * T * K * D * F
    for dtype in (torch.float32, torch.bfloat16):
        int8 = Int8Experts.from_weights(layer.experts.gate_up_proj, layer.experts.down_proj)
        assert flops(lambda: int8(x.to(dtype), weights, ids)) == 6 * T * K * D * F  # noqa: B023
        linear = Int8Linear.from_weights(torch.randn(F, D))
        assert flops(lambda: linear(x.to(dtype))) == 2 * T * D * F  # noqa: B023


def test_the_counter_gets_the_formulas_when_it_is_imported() -> None:
    """Not before: it imports Triton."""
    program = """
import sys
import moe.ops
print("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import flop_registry
print(*sorted(str(op) for op in flop_registry if "moesmith" in str(op)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = ("grouped_mm", "int8_linear", "int8_mlp", "moe_mlp_backward", "moe_mlp_forward")
    expected = " ".join(f"moesmith.{name}" for name in names)
    assert done.stdout.splitlines() == ["False", expected]
