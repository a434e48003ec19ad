"""`experts_implementation="moesmith"`: every experts class of the installed transformers beside its own eager forward.

The classes are found in the sources, so that a new release of transformers brings its own tests.
"""

import importlib
import inspect
import itertools
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

import moe.integrations.transformers as integration
from moe.errors import ConfigError
from moe.ops import grouped_mm, moe_mlp, unpermute
from tests.support.bound import Verdict, against_eager

integration.register()

SPEC = find_spec("transformers")
assert SPEC is not None and SPEC.origin is not None
ROOT = Path(SPEC.origin).parent
DECORATED = r"^@use_experts_implementation(?:\(([^)]*)\))?\n(?:@.*\n)*class (\w+)\("
SOURCES = {path: path.read_text() for path in sorted(ROOT.glob("models/*/modeling_*.py"))}
EXPERTS = {
    name: f"transformers.models.{path.parent.name}.{path.stem}"
    for path, text in SOURCES.items()
    for _, name in re.findall(DECORATED, text, re.MULTILINE)
}
D, F, E = 24, 40, 6
SIZES = {
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), F),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    "moe_latent_size": None,
    "swiglu_limit": 0.7,  # so that there is something to clamp
}
# Flags of `flagged` under which no class of the oldest supported release of transformers falls.
OWN = {"Transposed": (True, False, True, False, False), "Normed": (True, False, False, False, True)}
# One of each kind: SwiGLU, transposed, transposed with bias and interleaved, without gate, with a norm, clamped.
KINDS = ("MixtralExperts", "Transposed", "GptOssExperts", "NemotronHExperts", "Normed", "DeepseekV4Experts")
each_experts = pytest.mark.parametrize("name", sorted(EXPERTS))
each_kind = pytest.mark.parametrize("name", KINDS)


class Wide(TorchFunctionMode):
    """Makes a modelling file that says `.float()` or `torch.float32` mean float64, so that it is its own oracle."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def build(name: str) -> Any:
    """The class with small and distinct sizes, random parameters and the config class of its own model."""
    if name in OWN:
        return flagged(*OWN[name])
    module = importlib.import_module(EXPERTS[name])
    package, experts_class = module.__name__.rpartition(".")[0], getattr(module, name)
    for config_class in vars(module).values():
        if not inspect.isclass(config_class) or not config_class.__module__.startswith(package + ".configuration"):
            continue
        config: Any = config_class()
        for field, value in SIZES.items():
            if hasattr(config, field):
                # Ernie has one width for text and one for vision, and says which when it builds its experts.
                setattr(config, field, [value] * 2 if isinstance(getattr(config, field), list) else value)
        try:
            widths = [F] if "intermediate_size" in inspect.signature(experts_class).parameters else []
            experts = experts_class(config, *widths)
        except AttributeError:  # the config of another part of the model
            continue
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.5 if parameter.dim() < 3 else 0.2)
        up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
        assert up.shape[0] == down.shape[0] == E and {*up.shape[1:], *down.shape[1:]} <= {D, F, 2 * F}, name
        return experts
    raise AssertionError(f"{name}: no config class of {package} has what it reads")


TINY = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("num_hidden_layers", "num_experts_per_tok", "eos_token_id"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("intermediate_size", "shared_expert_intermediate_size"), F),
    **dict.fromkeys(("moe_intermediate_size", "q_lora_rank"), D),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 64),
    "hidden_size": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ATTENTION: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
DEEPER: dict[str, Any] = {"num_hidden_layers": 4}
# What else a model wants in its config, in order to be small, to have experts and to have no recurrent layers.
WANTS: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": ATTENTION,
    "BeamForCausalLM": DEEPER,
    "DeepseekOcr2TextModel": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaEncoderTextModel": {"top_k_experts": 2},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "Ernie4_5_VLMoeTextModel": {"moe_intermediate_size": [D, D], "head_dim": 128},
    "FlintForCausalLM": DEEPER,
    "Gemma4ForCausalLM": {"enable_moe_block": True, "top_k_experts": 2, "vocab_size_per_layer_input": 64},
    "Glm4vMoeTextModel": {"head_dim": 128, "attention_bias": False},
    "Glm5NextTextModel": {**DEEPER, "qk_rope_head_dim": 0, "layer_types": ["full_attention"] * 4},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["attention"] * 2, "mamba_n_heads": 8},
    "HYV4VLTextModel": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "JambaForCausalLM": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "KimiLinearForCausalLM": ATTENTION,
    "Lfm2MoeForCausalLM": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "MiMoV2FlashForCausalLM": {"num_key_value_heads": 2, "head_dim": D},
    "NemotronHForCausalLM": {"layers_block_type": ["attention", "moe"]},
    "Qwen3NextForCausalLM": ATTENTION,
    "Qwen3_5MoeForCausalLM": ATTENTION,
    "Qwen4ExpForCausalLM": {
        **ATTENTION,
        "head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


def model_classes() -> list[str]:
    """One model of every modelling file with experts: the causal one, or else the first over text."""
    found = []
    for path, text in SOURCES.items():
        if re.search(DECORATED, text, re.MULTILINE):
            names = re.findall(r"^class (\w+)\(", text, re.MULTILINE)
            pick = [n for n in names if n.endswith("ForCausalLM")] or [n for n in names if n.endswith("TextModel")]
            pick = pick or [n for n in names if n.endswith("Model") and not n.endswith("PreTrainedModel")]
            found.append(f"{path.parent.name}.{path.stem}.{pick[0]}")
    return found


def build_model(where: str, **fields: Any) -> Any:
    module, _, name = where.rpartition(".")
    model_class: Any = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    model = model_class(model_class.config_class(**{**TINY, **WANTS.get(name, {}), **fields})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for buffer_name, table in model.named_buffers():
        if buffer_name.endswith("tid2eid"):
            # With zeros, every token has one expert K times, whose normalised weights are constant: the gate's gradient
            # would be rounding alone.
            tokens, top_k = table.shape
            table.copy_((torch.arange(tokens)[:, None] + torch.arange(top_k)) % model.config.num_local_experts)
    return model


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    before = config._experts_implementation
    config._experts_implementation = name
    yield
    config._experts_implementation = before


def routing(tokens: int, top_k: int = 3) -> tuple[Tensor, Tensor]:
    """Distinct ids of which expert 4 gets no token and expert 1 most, and weights."""
    scores = torch.rand(tokens, E)
    scores[:, 1] += 0.7
    scores[:, 4] = -1
    return scores.topk(top_k, dim=1).indices, torch.rand(tokens, top_k) + 0.05


Call = tuple[Tensor, Tensor, Tensor]


def gradients(
    experts: Any, name: str, call: Call, grad: Tensor, dtype: torch.dtype, autocast: bool = False
) -> dict[str, Tensor]:
    """Output and every gradient of an implementation, on the module's values in `dtype`."""
    experts = experts.to(dtype)
    x, ids, weights = call
    x, weights = x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
    with implementation(experts.config, name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = experts(x, ids, weights)
    assert y.dtype == x.dtype
    leaves = {"x": x, "weights": weights, **{n: p for n, p in experts.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def verdicts(
    experts: Any, call: Call, dtype: torch.dtype, autocast: bool = False, peer: str = "eager"
) -> dict[str, Verdict]:
    """Ours beside `peer`, both judged against eager in float64 on the values that `dtype` can hold."""
    experts, call = experts.to(dtype), (call[0].to(dtype), call[1], call[2].to(dtype))
    grad = torch.randn(call[0].shape).to(dtype)
    theirs = gradients(experts, peer, call, grad, dtype, autocast)
    with Wide() if dtype == torch.float64 else nullcontext():
        ours = gradients(experts, "moesmith", call, grad, dtype, autocast)
    with Wide():
        exact = gradients(experts, "eager", call, grad, torch.float64)
    experts.to(dtype)
    return {n: against_eager(ours[n], theirs[n], exact[n], dtype) for n in ours}


def right(found: dict[str, Verdict]) -> bool:
    return all(verdict.right for verdict in found.values())


def test_every_use_of_the_interface_is_found() -> None:
    """All of them are tested below: no class is refused, only weights are."""
    uses = sum(len(re.findall(r"^@use_experts_implementation", text, re.MULTILINE)) for text in SOURCES.values())
    assert uses == len(EXPERTS) > 0
    assert set(KINDS) <= {*EXPERTS, *OWN}


@each_experts
def test_experts_equal_eager(name: str) -> None:
    experts = build(name)
    one, many = ((torch.randn(tokens, D), *routing(tokens)) for tokens in (1, 29))
    for call, dtype in ((one, torch.float64), (many, torch.float64), (many, torch.float32)):
        found = verdicts(experts, call, dtype)
        assert right(found), (dtype, found)
    ours = gradients(experts, "moesmith", many, torch.ones(29, D), torch.float32)
    stacked = [grad for n, grad in ours.items() if n.endswith(("_proj", "_bias"))]
    assert all((grad[4] == 0).all() and (grad[1] != 0).any() for grad in stacked)  # 4 has no token


@each_experts
def test_experts_in_half_precision_and_under_autocast(name: str) -> None:
    experts, call = build(name), (torch.randn(29, D), *routing(29))
    # In bfloat16 its eager forward computes in float32, which no implementation of the interface does.
    peer = "grouped_mm" if name == "OpenAIPrivacyFilterExperts" else "eager"
    found = verdicts(experts, call, torch.bfloat16, peer=peer)
    assert right(found), found
    found = verdicts(experts, call, torch.float32, autocast=True)
    assert right(found), found


@each_kind
def test_no_tokens(name: str) -> None:
    experts = build(name)
    call = torch.randn(0, D), torch.zeros(0, 3, dtype=torch.int64), torch.rand(0, 3)
    ours = gradients(experts, "moesmith", call, torch.zeros(0, D), torch.float32)
    assert ours["y"].shape == (0, D)
    assert all((ours[n] == 0).all() for n in ours)


@each_kind
def test_on_the_meta_device(name: str) -> None:
    ids, weights = routing(5)
    call = (torch.randn(5, D).to("meta"), ids.to("meta"), weights.to("meta"))
    found = gradients(build(name).to("meta"), "moesmith", call, torch.zeros(5, D, device="meta"), torch.bfloat16)
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in found.values())


def flagged(has_gate: bool, has_bias: bool, is_transposed: bool, own_gate: bool, has_post_expert_norm: bool) -> Any:
    """An experts module of our own under transformers' decorator, any combination of whose flags may be asked for."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = E, nn.SiLU()
            wide = 2 * F if has_gate else F
            for name, k, n in (("gate_up" if has_gate else "up", D, wide), ("down", F, D)):
                shape = (E, k, n) if is_transposed else (E, n, k)
                self.register_parameter(f"{name}_proj", nn.Parameter(0.2 * torch.randn(shape)))
                if has_bias:
                    self.register_parameter(f"{name}_proj_bias", nn.Parameter(torch.randn(E, n)))
            if has_post_expert_norm:
                self.post_expert_norm = nn.RMSNorm(D, eps=0.0)  # of a row of zeros: NaN

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for e in range(E):
                token, k = (ids == e).nonzero(as_tuple=True)
                up = self.project("gate_up" if has_gate else "up", e, x[token])
                rows = self._apply_gate(up) if has_gate else self.act_fn(up)  # pyright: ignore
                rows = self.project("down", e, rows)
                rows = self.post_expert_norm(rows) if has_post_expert_norm else rows
                y = y.index_add(0, token, rows * weights[token, k, None])
            return y

        def project(self, name: str, e: int, rows: Tensor) -> Tensor:
            weight = self.get_parameter(f"{name}_proj")[e]
            rows = rows @ (weight if is_transposed else weight.T)
            return rows + self.get_parameter(f"{name}_proj_bias")[e] if has_bias else rows

    if own_gate:
        Experts._apply_gate = lambda self, up: up[..., ::2].sigmoid() * (up[..., 1::2] + 1)  # pyright: ignore
    flags: dict[str, Any] = {"has_gate": has_gate, "has_bias": has_bias, "is_transposed": is_transposed}
    experts: Any = use_experts_implementation(Experts, is_concatenated=not own_gate, **flags)(MixtralConfig())
    experts.has_post_expert_norm = has_post_expert_norm  # the decorator of transformers 5.17 has no such argument
    return experts


FLAGS = [f for f in itertools.product((True, False), repeat=5) if f[0] or not f[3]]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_combination_of_flags(flags: tuple[bool, ...]) -> None:
    experts = flagged(*flags)
    ids, weights = routing(29)
    for dtype in (torch.float32, torch.float64):
        assert right(verdicts(experts, (torch.randn(29, D), ids, weights), dtype))
    # Slots that are not here, one token's all, whatever their weights are.
    absent = torch.rand(ids.shape) < 0.3
    absent[3] = True
    x, grad = torch.randn(29, D), torch.randn(29, D)
    ours = gradients(experts, "moesmith", (x, ids.masked_fill(absent, E), weights), grad, torch.float64)
    exact = gradients(experts, "eager", (x, ids.masked_fill(absent, E), weights), grad, torch.float64)
    assert right({n: against_eager(ours[n], exact[n], exact[n], torch.float64) for n in ours})


@each_kind
def test_ids_past_the_last_expert_are_sentinels_under_expert_parallelism(name: str) -> None:
    experts = build(name)
    ids, weights = routing(29)
    absent = torch.rand(ids.shape) < 0.3
    absent[[0, 7]] = True
    x, grad, far = torch.randn(29, D), torch.randn(29, D), E + torch.arange(ids.numel()).view(ids.shape) % 5
    experts._is_expert_parallel = True
    call = x, torch.where(absent, far, ids), weights.masked_fill(absent, 0)
    alike = x, ids, call[2]  # the same for an implementation that knows no sentinels
    for dtype in (torch.float32, torch.float64):
        theirs = gradients(experts, "eager", alike, grad, dtype)
        with Wide() if dtype == torch.float64 else nullcontext():
            ours = gradients(experts, "moesmith", call, grad, dtype)
        with Wide():
            exact = gradients(experts, "eager", alike, grad, torch.float64)
        for result in (theirs, exact):
            result["weights"].masked_fill_(absent, 0)
        found = {n: against_eager(ours[n], theirs[n], exact[n], dtype) for n in ours}
        assert right(found), found
        assert (ours["y"][[0, 7]] == 0).all() and (ours["weights"][absent] == 0).all()


@each_kind
def test_ids_out_of_range_raise(name: str) -> None:
    experts = build(name).requires_grad_(False)
    ids, weights = routing(5)
    with implementation(experts.config, "moesmith"):
        for wrong in (E + 1, -2):
            with pytest.raises(IndexError, match=f"{wrong} is neither"):
                experts(torch.randn(5, D), ids.index_fill(1, torch.tensor([1]), wrong), weights)
        last = experts(torch.ones(5, D), torch.full_like(ids, E), weights)
    assert (last == 0).all()  # the one sentinel of eager mode


@each_kind
def test_integer_ids_and_half_precision_weights(name: str) -> None:
    experts, x, (ids, weights) = build(name), torch.randn(29, D), routing(29)
    weights = weights.bfloat16()
    with implementation(experts.config, "moesmith"):
        assert torch.equal(experts(x, ids.int(), weights), experts(x, ids, weights.float()))


def test_which_experts_take_the_fused_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(integration, "moe_mlp", lambda x, *_, **__: calls.append(x) or x)
    fused = set()
    for name in KINDS:
        experts = build(name)
        with implementation(experts.config, "moesmith"):
            experts(torch.randn(5, D), *routing(5))
        fused |= {name} if calls else set()
        calls.clear()
    assert fused == {"MixtralExperts", "Transposed"}


def swapped(x: Tensor, up: Tensor, *rest: Any, **biases: Any) -> Tensor:
    return moe_mlp(x, up.roll(up.shape[1] // 2, 1), *rest, **biases)


def without_bias(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return grouped_mm(rows, weight, offsets)


def mixed_up(rows: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    return unpermute(rows, position, weights.flip(1))


@pytest.mark.parametrize(
    ("name", "attribute", "wrong"),
    [
        ("MixtralExperts", "moe_mlp", swapped),
        ("Transposed", "moe_mlp", swapped),
        ("DeepseekV4Experts", "_default_apply_gate", vars(DeepseekV4Experts)["_apply_gate"]),  # without its clamp
        ("Gemma4TextExperts", "_is_silu", lambda act_fn: True),
        ("GptOssExperts", "_linear", without_bias),
        ("NemotronHExperts", "unpermute", mixed_up),
    ],
)
def test_a_seeded_mistake_is_seen(name: str, attribute: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, call = build(name), (torch.randn(29, D), *routing(29))
    assert right(verdicts(experts, call, torch.float32))
    monkeypatch.setattr(integration, attribute, wrong)
    assert not right(verdicts(experts, call, torch.float32))


def test_low_rank_adapters_by_parametrisation() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(E, 2 * F, 2)), nn.Parameter(torch.randn(E, 2, D))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1 * self.a @ self.b

    experts = build("MixtralExperts").requires_grad_(False)
    parametrize.register_parametrization(experts, "gate_up_proj", Adapter())
    call = torch.randn(29, D), *routing(29)
    found = verdicts(experts, call, torch.float32)
    assert right(found) and any(n.endswith(".a") for n in found)


def refused(experts: Any) -> str:
    with implementation(experts.config, "moesmith"), pytest.raises(ConfigError) as caught:
        experts(torch.randn(5, D), *routing(5))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refused() -> None:
    fp8 = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    assert refused(fp8(config)).startswith("FP8Experts.gate_up_proj = torch.float8_e4m3fn: expected float32, ")
    experts = build("MixtralExperts")
    experts.down_proj = nn.Parameter(torch.zeros(E, D, F, dtype=torch.uint8), requires_grad=False)
    assert refused(experts).startswith("MixtralExperts.down_proj = torch.uint8: expected float32, ")
    experts.down_proj = nn.Parameter(TwoTensor(torch.zeros(E, D, F), torch.zeros(E, D, F)))
    assert refused(experts).startswith("MixtralExperts.down_proj = 'TwoTensor': expected a dense tensor")
    experts.down_proj = None
    assert refused(experts).startswith("MixtralExperts.down_proj = 'NoneType': expected a dense tensor")
    experts = build("MixtralExperts")
    experts.is_concatenated = False
    assert refused(experts).startswith("MixtralExperts.is_concatenated = False: expected True, or an _apply_gate")


@pytest.mark.parametrize("version", ["5.16.1", None])
def test_transformers_missing_or_too_old(version: str | None) -> None:
    fake = (
        "sys.modules['transformers'] = None"
        if version is None
        else f"import transformers; transformers.__version__ = {version!r}"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {fake}; import moe.integrations.transformers"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: moe.integrations.transformers needs transformers 5.17 or later")
    assert (version or "transformers") in last


def test_register_twice_changes_nothing() -> None:
    before = dict(integration.ExpertsInterface._global_mapping)
    integration.register()
    assert integration.ExpertsInterface._global_mapping == before
    assert before["moesmith"] is integration.experts_forward


TOKENS = torch.arange(3, 59, 4).view(2, 7)


def model_gradients(model: Any, name: str) -> dict[str, Tensor]:
    model.set_experts_implementation(name)
    y = model(input_ids=TOKENS)[0]
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("where", model_classes(), ids=lambda where: where.rpartition(".")[2])
def test_models_equal_eager(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(experts: Any, *args: Tensor) -> Tensor:
        seen.append(experts)
        return integration.experts_forward(experts, *args)

    monkeypatch.setitem(integration.ExpertsInterface._global_mapping, "moesmith", spy)
    model = build_model(where).double()
    with Wide():
        ours, eager = model_gradients(model, "moesmith"), model_gradients(model, "eager")
    found = {n: against_eager(ours[n], eager[n], eager[n], torch.float64) for n in ours}
    assert right(found), found
    ran = [n for n, module in model.named_modules() if module in seen]
    assert ran and {type(module).__name__ for module in seen} <= set(EXPERTS)
    assert all((ours[n] != 0).any() for n in ours if n.rpartition(".")[0] in ran)


def test_from_pretrained_trains_as_eager(tmp_path: Path) -> None:
    build_model("mixtral.modeling_mixtral.MixtralForCausalLM").save_pretrained(tmp_path)
    losses = {}
    for name in ("eager", "moesmith"):
        model: Any = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation=name, dtype=torch.float64)
        assert model.config._experts_implementation == name
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[name] = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["moesmith"][-1] < losses["moesmith"][0]
    assert losses["moesmith"] == pytest.approx(losses["eager"], rel=1e-6)


def test_compiled_model() -> None:
    model = build_model("mixtral.modeling_mixtral.MixtralForCausalLM", num_hidden_layers=1)
    model.set_experts_implementation("moesmith")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)

    def run(call: Any, tokens: Tensor) -> list[Tensor]:
        y = call(input_ids=tokens, use_cache=False).logits
        return [y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))]

    for tokens in (TOKENS, TOKENS[:, :5]):
        traced, plain = run(compiled, tokens), run(model, tokens)
        with Wide():
            exact = run(model.double(), tokens)
        model.float()
        assert all(against_eager(t, p, e, torch.float32).right for t, p, e in zip(traced, plain, exact, strict=True))


@pytest.mark.parametrize("name", ["GptOssExperts", "NemotronHExperts", "Normed"])
def test_compiled_experts(name: str) -> None:
    experts = build(name)
    experts.config._experts_implementation = "moesmith"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (29, 11):
        x, (ids, weights), grad = torch.randn(tokens, D), routing(tokens), torch.randn(tokens, D)
        results = []
        for call, dtype in ((compiled, torch.float32), (experts, torch.float32), (experts, torch.float64)):
            experts.to(dtype)
            with Wide() if dtype == torch.float64 else nullcontext():
                y = call(x.to(dtype), ids, weights.to(dtype))
                results.append([y, *torch.autograd.grad(y, list(experts.parameters()), grad.to(dtype))])
        experts.float()
        assert all(against_eager(t, p, e, torch.float32).right for t, p, e in zip(*results, strict=True))


def graph_of(experts: Any) -> set[str]:
    """Names of our operators in the single graph that the experts are compiled to."""
    experts.config._experts_implementation = "moesmith"
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(experts, fullgraph=True, backend=backend)(torch.randn(29, D), *routing(29))
    (graph,) = graphs
    return {getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes}


@each_kind
def test_compiled_experts_take_the_operator_that_eager_takes(name: str) -> None:
    fused = name in ("MixtralExperts", "Transposed")
    assert ("moe_mlp_forward.default" in graph_of(build(name))) == fused
    experts = build(name)
    if experts.has_gate:
        experts._apply_gate = lambda rows: rows.chunk(2, dim=-1)[1]  # of this instance alone
        assert "moe_mlp_forward.default" not in graph_of(experts)


def test_compiled_experts_refuse_interleaved_weights_too() -> None:
    experts = build("MixtralExperts")
    experts.is_concatenated = False
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager")
    experts.config._experts_implementation = "moesmith"
    with pytest.raises(ConfigError, match=r"MixtralExperts\.is_concatenated = False: expected True"):
        compiled(torch.randn(5, D), *routing(5))
    with pytest.raises(Exception, match="raise ConfigError"):
        graph_of(experts)  # one graph has no place for an error: it is the compilation that fails


# Models with routed experts that are not under the interface, with what makes them small, or makes them have experts.
EAGER: dict[str, dict[str, Any]] = {
    "dbrx.modeling_dbrx.DbrxForCausalLM": {"n_layers": 1, "attn_config": {"rope_theta": 1e4}},
    "doge.modeling_doge.DogeForCausalLM": {"num_hidden_layers": 1, "is_moe": True},
    "jetmoe.modeling_jetmoe.JetMoeForCausalLM": {"num_hidden_layers": 1},
    "llama4.modeling_llama4.Llama4ForCausalLM": {"num_hidden_layers": 1},
    "longcat_flash.modeling_longcat_flash.LongcatFlashForCausalLM": {"num_layers": 1, "num_hidden_layers": 2},
    "nllb_moe.modeling_nllb_moe.NllbMoeModel": {"encoder_layers": 1, "decoder_layers": 1},
    "switch_transformers.modeling_switch_transformers.SwitchTransformersModel": {"num_layers": 1},
}


def on_meta(where: str, **fields: Any) -> Any:
    module, _, name = where.rpartition(".")
    model_class: Any = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    with torch.device("meta"):
        return model_class(model_class.config_class(**fields))


@pytest.mark.parametrize("where", sorted(EAGER))
def test_a_model_that_stays_eager_is_named(where: str) -> None:
    model = on_meta(where, **EAGER[where])
    name = type(model).__name__
    with pytest.warns(UserWarning, match=f"{name}: its experts do not use transformers' experts interface"):
        model.set_experts_implementation("moesmith")
    with pytest.raises(ConfigError, match=f"experts interface; {name} has none"):
        integration.check(model)
    config = type(model.config)(**EAGER[where])
    config._experts_implementation = "moesmith"
    with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        type(model)(config)  # and of the models that it is made of
    assert name in str(caught[0].message) and all("experts do not use" in str(each.message) for each in caught)


def test_models_under_the_interface_are_not_named() -> None:
    """Nor are those without experts, and those made of models."""
    sizes: Any = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"), 1)
    mixtral = on_meta("mixtral.modeling_mixtral.MixtralForCausalLM", **sizes)
    with pytest.raises(ConfigError, match=r"layers.0.mlp.experts: experts_implementation = 'grouped_mm': expected"):
        integration.check(mixtral)
    mixtral.set_experts_implementation("moesmith")
    assert integration.check(mixtral) == ["model.layers.0.mlp.experts"]
    on_meta("llama.modeling_llama.LlamaForCausalLM", **sizes).set_experts_implementation("moesmith")
    parts: Any = {"text_config": {"model_type": "qwen3_moe", **sizes}, "vision_config": {"num_hidden_layers": 1}}
    made = on_meta("llava.modeling_llava.LlavaForConditionalGeneration", **parts)
    made.set_experts_implementation("moesmith")
    assert integration.check(made) == ["model.language_model.layers.0.mlp.experts"]
