"""Muon on stacked matrices against torch's, which optimizer steps which parameter, and the learning-rate schedule."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moe
from moe.attention import GQA
from moe.counts import parameter_shapes
from moe.layer import MLP, Experts, MoELayer
from moe.model import MTP
from moe.presets import PRESETS
from moe.quantized import FP8Experts, FP8Linear, Int8Experts, Int8Linear, MXFP4Experts
from moe.roles import role_of
from moe.router import Router
from moe.train.optimizer import BatchedMuon, build_optimizers, orthogonalize
from moe.train.schedule import learning_rate_factor
from tests.support.checkpoint_cases import BY_FAMILY, V3_MTP

SHAPES = [(4, 48, 32), (3, 20, 64), (2, 5, 7), (1, 16, 16), (5, 1, 9)]


def muon_pair(shape: tuple[int, ...], steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(before, ours, torch's) of a stack after each of several steps on the same gradients; expert 0 gets zeros."""
    torch.manual_seed(0)
    ours = nn.Parameter(0.02 * torch.randn(shape))
    theirs = [nn.Parameter(part.clone()) for part in ours.detach()]
    stacked = BatchedMuon([ours], 0.01, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, 0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(steps):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape) * 10.0**-step
        ours.grad[0] = 0
        for parameter, grad in zip(theirs, ours.grad, strict=True):
            parameter.grad = grad.clone()
        stacked.step()
        reference.step()
        yield before, ours.detach(), torch.stack([parameter.detach() for parameter in theirs])


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batched_muon_is_torchs_slice_by_slice(
    shape: tuple[int, ...], capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through fp32 or in bf16. Another order of sums moves some products by one unit of bf16, 2^-8, and five iterations
    pass that on.

    Measured: 0.011 of the update. A wrong coefficient, momentum or scale is a tenth or more.
    """
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for before, ours, theirs in muon_pair(shape, 4):
        for slice_before, slice_ours, slice_theirs in zip(before, ours, theirs, strict=True):
            moved = (slice_theirs - slice_before).norm()
            assert (slice_ours - slice_theirs).norm() <= 0.03 * moved


def test_orthogonalize_gives_singular_values_near_one_and_keeps_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 8)
    x[0, 1] = 0
    y = orthogonalize(x)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    values = torch.linalg.svdvals(y.double())
    assert values[0, 1].max() == 0
    values[0, 1] = 1
    assert values.min() > 0.6 and values.max() < 1.3


def test_batched_muon_refuses_a_vector_and_takes_closures() -> None:
    with pytest.raises(ValueError, match="matrices"):
        BatchedMuon([nn.Parameter(torch.zeros(3))], 0.1)
    parameter = nn.Parameter(torch.ones(1, 2, 2))
    idle = nn.Parameter(torch.ones(1, 2, 2))
    optimizer = BatchedMuon([parameter, idle], 0.1)

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert not torch.equal(parameter, idle) and torch.equal(idle, torch.ones(1, 2, 2))


def test_batched_muon_resumes_from_its_state_dict() -> None:
    torch.manual_seed(0)
    grads = torch.randn(4, 3, 6, 5)
    whole, halves = nn.Parameter(torch.ones(3, 6, 5)), nn.Parameter(torch.ones(3, 6, 5))
    optimizer = BatchedMuon([whole], 0.1)
    first = BatchedMuon([halves], 0.1)
    for i, grad in enumerate(grads):
        if i == 2:
            second = BatchedMuon([halves], 0.7)
            second.load_state_dict(first.state_dict())
            first = second
        whole.grad, halves.grad = grad.clone(), grad.clone()
        optimizer.step()
        first.step()
    assert torch.equal(whole, halves)


# What may be done with a kind of parameter, in the words of this test: by the module that has it, not by its name.
DECAYED, PLAIN = {"embedding", "head", "matrix", "experts", "router", "gate"}, {"norm", "bias", "sink"}
MATRICES = {"matrix", "experts"}


def kinds(model: nn.Module) -> dict[str, str]:
    """Name -> kind of each parameter."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        kind: dict[str, str] = {}
        match module:
            case moe.Transformer():
                kind["embed_tokens.weight"] = "embedding"
                kind |= {"lm_head.weight": "head"} if module.lm_head is not None else {}
            case nn.RMSNorm():
                kind["weight"] = "norm"
            case Router():
                kind = {"weight": "router", "bias": "bias"}
            case Experts():
                kind = dict.fromkeys(("gate_up_proj", "down_proj"), "experts")
                kind |= dict.fromkeys(("gate_up_proj_bias", "down_proj_bias"), "bias")
            case MoELayer():
                kind["shared_expert_gate.weight"] = "gate"
            case MLP():
                kind = {f"{name}_proj.weight": "matrix" for name in ("gate", "up", "down")}
            case MTP():
                kind["eh_proj.weight"] = "matrix"
            case GQA():
                kind["sinks"] = "sink"
        if prefix.endswith("self_attn"):
            linear = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
            kind |= {f"{name}.weight": "matrix" for name in linear} | {f"{name}.bias": "bias" for name in linear}
        found |= {f"{prefix}.{name}".lstrip("."): each for name, each in kind.items()}
    return {name: found[name] for name, _ in model.named_parameters()}


def on_meta(config: moe.ModelConfig) -> moe.Transformer:
    with torch.device("meta"):
        return moe.Transformer(config)


def short(config: moe.ModelConfig) -> moe.ModelConfig:
    """A released model with few layers, of each kind at least one."""
    layers = min(config.num_hidden_layers, config.first_k_dense_replace + 2)
    types = config.layer_types and config.layer_types[:layers]
    return dataclasses.replace(config, num_hidden_layers=layers, layer_types=types)


# Parameters of each family's small model: decayed, of these orthogonalised, and not decayed.
COUNTS = {
    "deepseek_v3": (56, 50, 27),
    "kimi_k2": (32, 28, 13),
    "deepseek_v2": (32, 28, 13),
    "mixtral": (23, 18, 7),
    "qwen2_moe": (35, 27, 16),
    "qwen3_moe": (23, 18, 13),
    "glm4_moe": (40, 35, 20),
    "gpt_oss": (23, 18, 31),
    "olmoe": (23, 18, 13),
    "minimax_m2": (23, 18, 13),
    "dots1": (29, 25, 13),
    "glm4_moe_lite": (44, 39, 20),
    "ernie4_5_moe": (28, 25, 7),
    "kimi_k25": (32, 28, 13),
    "qwen3": (23, 21, 13),
}


def test_roles_of_every_parameter_of_every_family() -> None:
    models = {**BY_FAMILY, **{f"preset {name}": short(config) for name, config in PRESETS.items()}}
    for name, config in models.items():
        model = on_meta(config)
        said = {parameter: role_of(parameter) for parameter, _ in model.named_parameters()}
        expected = kinds(model)
        assert {n for n, role in said.items() if role.decays} == {n for n, k in expected.items() if k in DECAYED}, name
        assert {n for n, r in said.items() if r.orthogonalised} == {n for n, k in expected.items() if k in MATRICES}
        assert {n for n, r in said.items() if r.initial == "ones"} == {n for n, k in expected.items() if k == "norm"}
        assert {n for n, r in said.items() if r.initial == "zeros"} == {n for n, k in expected.items() if k == "bias"}
        assert all(role.ndim == p.ndim for role, p in zip(said.values(), model.parameters(), strict=True))
        if name in COUNTS:
            roles = Counter((role.decays, role.orthogonalised) for role in said.values())
            decayed = roles[True, True] + roles[True, False]
            assert (decayed, roles[True, True], roles[False, False]) == COUNTS[name], name
        for parameter in parameter_shapes(config).keys() - said.keys():
            assert role_of(parameter).name == "correction bias"


EVERYTHING: list[dict[str, Any]] = [  # every kind of parameter there is, with MLA and with grouped-query attention
    dict(kv_lora_rank=6, q_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5),
    dict(kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5, tie_word_embeddings=True),
    dict(num_key_value_heads=1, head_dim=6, qk_norm="head", attention_sinks=True),
]
for settings in EVERYTHING:
    settings |= dict(hidden_size=8, moe_intermediate_size=6, n_routed_experts=4, num_experts_per_tok=2, vocab_size=20)
    settings |= dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=7, first_k_dense_replace=1)
    settings |= dict(n_shared_experts=1, shared_expert_gate=True, expert_bias=True, router_bias=True)
    settings |= dict(attention_bias=True, num_nextn_predict_layers=1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("settings", EVERYTHING)
def test_a_step_without_gradients_decays_what_is_decayed_and_nothing_else(settings: Any, name: Any) -> None:
    model = moe.Transformer(moe.ModelConfig(**settings))
    expected = kinds(model)
    before = {n: p.detach().fill_(0.5).clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in build_optimizers(model, name, 0.1, 0.3):
        optimizer.step()
    for parameter_name, parameter in model.named_parameters():
        kind = expected[parameter_name]
        share = 1.0 if name == "adamw" or kind in MATRICES else 0.3
        factor = 1 - 0.1 * share * 0.3 if kind in DECAYED else 1.0
        torch.testing.assert_close(parameter.detach(), before[parameter_name] * factor, rtol=1e-6, atol=0)
        assert kind in DECAYED or torch.equal(parameter.detach(), before[parameter_name])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("settings", [*EVERYTHING, moe.preset("tiny").to_dict()], ids=["mla", "tied", "gqa", "tiny"])
def test_every_parameter_has_one_optimizer(settings: Any, name: Any) -> None:
    model = on_meta(moe.ModelConfig.from_dict(settings))
    names = {parameter: parameter_name for parameter_name, parameter in model.named_parameters()}
    expected = kinds(model)
    seen = []
    optimizers = build_optimizers(model, name, 0.01, 0.1)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kind = expected[names[parameter]]
                seen.append(names[parameter])
                assert group["weight_decay"] == (0.1 if kind in DECAYED else 0.0), names[parameter]
                muon = {"matrix": "Muon", "experts": "BatchedMuon"}.get(kind, "AdamW") if name == "muon" else "AdamW"
                assert type(optimizer).__name__ == muon, names[parameter]
    assert sorted(seen) == sorted(names.values())
    assert [type(o).__name__ for o in optimizers] == (
        ["AdamW"] if name == "adamw" else ["Muon", "BatchedMuon", "AdamW"]
    )


class Around(nn.Module):
    """A wrapper that has the module under a name of its own."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        for part in name.split(".")[:0:-1]:
            module = nn.ModuleDict({part: module})
        self.add_module(name.split(".")[0], module)


WRAPPERS = ["_orig_mod", "base_layer", "_checkpoint_wrapped_module", "module", "inner", "modules_to_save.mine"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("settings", EVERYTHING)
def test_wrappers_do_not_change_roles(settings: Any, wrapper: str) -> None:
    """Around the model, around each leaf, and around each block, layer and MLP."""
    model = on_meta(moe.ModelConfig(**settings))
    roles = {id(parameter): role_of(name) for name, parameter in model.named_parameters()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not name.isdigit() and not isinstance(child, nn.ModuleList):
                parent.register_module(name, Around(wrapper, child))
    whole = Around(wrapper, model)
    assert all(wrapper in name for name, _ in whole.named_parameters())
    assert {id(parameter): role_of(name) for name, parameter in whole.named_parameters()} == roles
    stepped = [p for o in build_optimizers(whole, "muon", 0.1, 0.1) for g in o.param_groups for p in g["params"]]
    assert {id(parameter) for parameter in stepped} == roles.keys()


def test_a_parametrization_does_not_change_the_role() -> None:
    layer = MoELayer(8, 6, 4, 2, n_shared_experts=1)
    assert layer.shared_experts is not None
    torch.nn.utils.parametrize.register_parametrization(layer.shared_experts.up_proj, "weight", nn.Identity())
    names = [name for name, _ in layer.named_parameters()]
    assert role_of(next(name for name in names if "original" in name)).name == "projection"


def test_adapters_are_decayed_by_adamw() -> None:
    """LoRA's factors of stacked experts are matrices of all experts together: nothing to orthogonalise."""
    layer = MoELayer(8, 6, 4, 2)
    layer.experts.requires_grad_(False)
    for side in "AB":
        layer.experts.add_module(f"lora_{side}", nn.ModuleDict({"default": nn.Linear(3, 5, bias=False)}))
    assert role_of("embed_tokens.lora_embedding_A.default").name == "adapter"
    *_, adamw = optimizers = build_optimizers(layer, "muon", 0.1, 0.2)
    assert len(optimizers) == 1
    decayed, undecayed = adamw.param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 8), (5, 3), (5, 3)] and not undecayed["params"]


def test_a_parameter_without_a_role_is_named() -> None:
    for add, name in (
        (lambda model: model.layers[0].register_parameter("scale", nn.Parameter(torch.ones(2, 2))), "layers.0.scale"),
        (lambda model: model.layers[0].add_module("more", nn.Linear(2, 2)), "layers.0.more.weight"),
        (lambda model: model.norm.register_parameter("bias", nn.Parameter(torch.ones(2))), "norm.bias"),
    ):
        model = on_meta(V3_MTP)
        add(model)
        with pytest.raises(moe.ConfigError, match=f"parameter = '{name}': expected a name that has a role"):
            build_optimizers(model, "adamw", 0.1, 0.1)
    model = on_meta(V3_MTP)
    model.norm.weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(moe.ConfigError, match=r"parameter norm.weight, a norm = \(2, 3\): expected 1 dimensions"):
        build_optimizers(model, "muon", 0.1, 0.1)


@pytest.mark.parametrize(
    ("kind", "linear"), [(FP8Experts, FP8Linear), (MXFP4Experts, FP8Linear), (Int8Experts, Int8Linear)]
)
def test_quantised_weights_are_frozen_and_left_out(kind: Any, linear: Any) -> None:
    layer = MoELayer(32, 32, 4, 2, n_shared_experts=1, expert_bias=True)
    layer.experts = kind(4, 32, 32, bias=True)
    assert layer.shared_experts is not None
    layer.shared_experts.up_proj = linear(32, 32)
    names = {parameter: name for name, parameter in layer.named_parameters()}
    assert all(role_of(name) for name, _ in layer.named_buffers())
    groups = {type(o).__name__: o.param_groups for o in build_optimizers(layer, "muon", 0.1, 0.1)}
    found = {kind: [[names[p] for p in group["params"]] for group in each] for kind, each in groups.items()}
    biases = ["experts.gate_up_proj_bias", "experts.down_proj_bias"]
    shared = ["shared_experts.gate_proj.weight", "shared_experts.down_proj.weight"]
    assert found == {"Muon": [shared], "AdamW": [["gate.weight"], biases]}


def test_initial_values_are_those_of_the_roles() -> None:
    model = moe.Transformer(moe.ModelConfig(**EVERYTHING[2]), seed=3)
    for name, parameter in model.named_parameters():
        kind, values = kinds(model)[name], parameter.detach()
        constant = {"norm": 1.0, "bias": 0.0}.get(kind)
        assert (values == constant).all() if constant is not None else values.std() > 0, name
    assert all((buffer == 0).all() for buffer in model.buffers())


def test_learning_rates() -> None:
    def course(schedule: str, steps: int, warmup: int) -> list[float]:
        kwargs = {"steps": steps, "warmup": warmup, "schedule": schedule}
        return [learning_rate_factor(step, **kwargs) for step in range(1, steps + 1)]  # pyright: ignore

    cosine = course("cosine", 101, 1)
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.55) and cosine[-1] == pytest.approx(0.1)
    wsd = course("wsd", 100, 4)
    assert wsd[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert wsd[69] == 1 and wsd[70] == pytest.approx(30 / 31) and wsd[-1] == pytest.approx(1 / 31)
    assert course("wsd", 3, 0) == [1, 1, 0.5]
    assert course("wsd", 2, 10) == [0.1, 0.2], "shorter than its warm-up"
