"""Models with weights in oneDNN's layout: the same values, and nothing lost on the way there and back."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe
from moe import ConfigError
from moe.cache import Cache
from moe.layer import Experts
from moe.linear import Linear
from moe.ops.packed import can_pack, pack_weight, packed_linear
from moe.packed import Packed, PackedExperts, PackedLinear
from tests.support.bound import excess, product_limit
from tests.support.cases import CASES, Case
from tests.support.checkpoint_cases import BY_FAMILY, V3_MTP
from tests.support.models import GROUPED, SMALL, distance, noisy
from tests.support.operators import eager_experts, fused
from tests.support.running_error import complaints, moe_mlp_errors

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))

needs_packing = pytest.mark.skipif(not can_pack(), reason="oneDNN packs bfloat16 only with AVX-512 or AVX-NE-CONVERT")


@pytest.fixture(params=[None, 1], ids=["in bfloat16", "in float32"])
def least(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The number of rows from which products are computed in float32, whatever this processor is."""
    for module in ("packed", "matmul"):
        monkeypatch.setattr(f"moe.ops.{module}.least_widened", lambda dtype: request.param)
    return request.param


def same(one: nn.Module, two: nn.Module) -> None:
    assert [(name, type(m), m.training) for name, m in one.named_modules()] == [
        (name, type(m), m.training) for name, m in two.named_modules()
    ]
    expected = two.state_dict(keep_vars=True)
    assert one.state_dict().keys() == expected.keys()
    for name, tensor in one.state_dict(keep_vars=True).items():
        assert tensor.equal(expected[name]) and tensor.dtype == expected[name].dtype, name
        assert tensor.requires_grad == expected[name].requires_grad, name


@needs_packing
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 70, 40), (0, 4, 3), (130, 64, 96)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_linear(with_bias: bool, shape: tuple[int, int, int], least: int | None) -> None:
    torch.manual_seed(0)
    rows, inner, columns = shape
    weight = torch.randn(columns, inner).bfloat16()
    x = torch.stack((torch.randn(rows, inner), torch.ones(rows, inner)), dim=-1).bfloat16()[..., 0]  # not contiguous
    bias = torch.randn(columns).bfloat16() if with_bias else torch.zeros(columns).bfloat16()
    packed = pack_weight(weight)
    assert packed.to_dense().equal(weight) and pack_weight(weight.t()).to_dense().equal(weight.t())
    y = packed_linear(x, packed, bias if with_bias else None)
    exact = x.double() @ weight.double().t() + bias.double()
    magnitude = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert y.dtype == torch.bfloat16 and y.is_contiguous()
    assert excess(y, exact, product_limit(exact, magnitude, inner + 1, torch.bfloat16)) <= 1
    assert packed_linear(x.unsqueeze(0), packed, bias if with_bias else None)[0].equal(y)


@needs_packing
@pytest.mark.parametrize("case", [case for case in CASES if case.experts and case.hidden], ids=str)
def test_experts(case: Case, least: int | None) -> None:
    inputs = case.inputs(torch.bfloat16)
    grad = torch.zeros_like(inputs.x)
    errors = moe_mlp_errors(inputs, grad)
    experts = Experts(case.experts, case.width, case.hidden, bias=True).bfloat16()
    parts = inputs.gate_up, inputs.down, inputs.gate_up_bias, inputs.down_bias
    experts.load_state_dict(dict(zip(experts.state_dict(), parts, strict=True)))
    with torch.no_grad():
        found = {"y": PackedExperts(experts)(inputs.x, inputs.weights, inputs.expert_ids)}
        exact = {"y": eager_experts(inputs.to(torch.float64))}
        assert not complaints(inputs, found, errors, exact, lambda: {"y": eager_experts(inputs)})
    if not found["y"].any():
        assert not fused(inputs).any()


@needs_packing
@pytest.mark.parametrize("family", ["mla", "gqa", "gpt_oss", "qwen2_moe", "qwen3"])
def test_logits_are_those_of_the_same_weights(family: str, least: int | None) -> None:
    config = {"mla": SMALL, "gqa": GROUPED}.get(family) or BY_FAMILY[family]
    every: dict[str, Any] = {"num_experts_per_tok": config.n_routed_experts, "topk_group": config.n_group}
    config = dataclasses.replace(config, **every)  # all experts, because its roundings would choose others
    plain: Any = noisy(config).bfloat16()
    packed = copy.deepcopy(plain)
    assert packed.pack() is packed
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(IDS).logits
        cache = Cache(config)
        steps = [packed(ids, cache=cache).logits for ids in (IDS[:, :4], *IDS[:, 4:].split(1, dim=1))]
        for found in (packed(IDS).logits, torch.cat(steps, dim=1)):
            assert found.dtype == torch.bfloat16
            assert distance(found, exact) <= 2 * distance(plain(IDS).logits, exact)


@needs_packing
@pytest.mark.parametrize("config", [V3_MTP, BY_FAMILY["gpt_oss"]], ids=["deepseek_v3", "gpt_oss"])
def test_there_and_back(config: moe.ModelConfig) -> None:
    model: Any = noisy(config).bfloat16()
    model.layers[0].mlp.requires_grad_(False)
    original = copy.deepcopy(model)
    packed = model.pack()
    types = {type(module) for module in packed.modules()}
    assert packed.extra_repr() == original.extra_repr()  # the number of parameters
    assert {PackedLinear, PackedExperts} <= types and not {Linear, Experts} & types
    with torch.no_grad():
        logits = packed(IDS).logits
        for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu").bfloat16().eval()):
            assert copied(IDS).logits.equal(logits)
    same(packed.unpack(), original)
    same(packed.unpack(), original)
    packed.pack().train().unpack()
    same(packed, original.train())


@needs_packing
def test_what_packed_weights_cannot_do_says_how_to_undo_it(tmp_path: Path) -> None:
    model: Any = noisy(SMALL).bfloat16()
    state = model.state_dict()
    model.pack()
    before = list(map(type, model.modules()))
    undo = r"call model\.unpack\(\) first$"
    with pytest.raises(TypeError, match=rf"PackedLinear: packed weights cannot be cast to torch\.float32; {undo}"):
        model.float()
    with pytest.raises(TypeError, match=rf"packed weights cannot be moved to meta; {undo}"):
        model.to("meta")
    with pytest.raises(TypeError, match=rf"PackedExperts: packed weights cannot be cast to torch\.float16; {undo}"):
        model.layers[1].mlp.half()
    assert model.embed_tokens.weight.dtype == torch.bfloat16 and not model.embed_tokens.weight.is_meta
    for call in (lambda: moe.save(model, tmp_path / "model"), model.state_dict, lambda: model.load_state_dict(state)):
        with pytest.raises(ConfigError, match=rf"layers\.0\..*packed.*{undo}"):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=r"no gradients: .* torch\.no_grad\(\) .* model\.unpack\(\)$"):
        model(IDS)
    with pytest.raises(RuntimeError, match="no gradients"):  # of the bias
        PackedLinear(Linear(8, 6).bfloat16())(torch.ones(2, 8).bfloat16())
    with torch.no_grad():
        layer, experts = model.layers[0].self_attn.o_proj, model.layers[1].mlp.experts
        width, ids = experts.packed[0].shape[1], torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"x is torch\.float32: expected torch\.bfloat16"):
            layer(torch.ones(2, layer.packed[0].shape[1]))
        with pytest.raises(ValueError, match=r"x: expected \[\.\.\., \d+\]; found \(2, 3\)"):
            layer(torch.ones(2, 3).bfloat16())
        with pytest.raises(ValueError, match=r"x: expected \[T, \d+\]; found \(2, 3\)"):
            experts(torch.ones(2, 3).bfloat16(), torch.ones(2, 1), ids)
        for rows in (1, 2):
            with pytest.raises(IndexError, match="99"):
                experts(torch.ones(rows, width).bfloat16(), torch.ones(rows, 1), ids[:rows] + 99)
    with pytest.raises(ConfigError, match=r"linear layers or experts to pack; is it packed or quantised\?"):
        model.pack()
    assert list(map(type, model.modules())) == before


def test_what_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = noisy(SMALL).bfloat16()
    model.layers[1].float()
    with monkeypatch.context() as patched:
        patched.setattr("moe.packed.can_pack", lambda: True)
        with pytest.raises(ConfigError, match=r"^layers\.1\..*torch\.float32 on cpu.*torch\.bfloat16 on a CPU"):
            model.pack()
    monkeypatch.setattr("moe.packed.can_pack", lambda: False)
    with pytest.raises(ConfigError, match=r"^CPU = .*: expected AVX-512 or AVX-NE-CONVERT"):
        model.pack()
    assert not any(isinstance(module, Packed) for module in model.modules())


@needs_packing
def test_modules_of_other_libraries_stay() -> None:
    model: Any = noisy(SMALL).bfloat16()
    seen: list[nn.Module] = []
    hooked = model.layers[0].self_attn.o_proj
    hooked.register_forward_hook(lambda module, *_: seen.append(module))
    offloaded = model.layers[1].self_attn.o_proj
    offloaded.forward = offloaded.forward  # an attribute of the module, as offloading sets it
    nn.utils.parametrizations.weight_norm(model.layers[1].self_attn.q_a_proj)
    replaced = [model.layers[1].self_attn.o_proj, model.layers[1].self_attn.q_a_proj]
    model.pack()
    with torch.no_grad():
        model(IDS)
    assert seen == [hooked] and isinstance(model.layers[0].self_attn.q_a_proj, PackedLinear)
    assert [model.layers[1].self_attn.o_proj, model.layers[1].self_attn.q_a_proj] == replaced


@needs_packing
def test_no_hook_and_no_sharing_is_lost() -> None:
    model: Any = noisy(SMALL).bfloat16()
    first, second = (layer.self_attn for layer in model.layers[:2])
    first.q_a_proj.register_full_backward_hook(lambda *_: None)
    first.q_b_proj.register_state_dict_post_hook(lambda *_: None)
    second.q_a_proj.weight = first.q_a_proj.weight
    second.o_proj = first.o_proj
    before = dict(model.named_modules(remove_duplicate=False))
    model.pack()
    for name in ("q_a_proj", "q_b_proj", "o_proj"):
        assert getattr(first, name) is before[f"layers.0.self_attn.{name}"]
    assert second.q_a_proj.weight is first.q_a_proj.weight and second.o_proj is first.o_proj
    assert isinstance(second.q_b_proj, PackedLinear)
    with pytest.raises(ConfigError, match=r"expected no packed weights; call model\.unpack\(\) first$"):
        moe.quantize(model, "int8")


@needs_packing
def test_weights_that_were_packed_train_as_before() -> None:
    """Also if inference mode, whose tensors never have gradients, was on."""
    model: Any = noisy(SMALL).bfloat16()
    experts = model.layers[1].mlp.experts
    experts.down_proj.requires_grad_(False)
    with torch.inference_mode():
        model.pack().unpack()
    found = model.layers[1].mlp.experts
    assert found is not experts and not found.down_proj.requires_grad
    model(IDS, labels=IDS).loss.backward()
    assert found.gate_up_proj.grad.any() and found.down_proj.grad is None
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not found.gate_up_proj.equal(experts.gate_up_proj) and found.down_proj.equal(experts.down_proj)


@needs_packing
def test_weights_of_other_libraries_are_refused() -> None:
    class Wrapped(Tensor):
        pass

    model: Any = noisy(SMALL).bfloat16()
    layer = model.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped))
    with pytest.raises(ConfigError, match=r"^layers\.1\.self_attn\.o_proj = 'Wrapped': expected torch\.bfloat16"):
        model.pack()
    assert not any(isinstance(module, Packed) for module in model.modules())
