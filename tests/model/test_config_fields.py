"""Every field of a config does something that can be seen, with each kind of attention, or is refused there."""

import copy
import dataclasses
import functools
import random
from typing import Any

import pytest
import torch

import moe
from moe import ConfigError, ModelConfig, RopeParameters
from moe.cache import Cache
from moe.config import MoEConfig
from moe.counts import parameter_shapes
from tests.support.any_config import draw

ROPE: dict[str, Any] = dict(
    rope_theta=50.0,
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=0.5,
    mscale=0.7,
    mscale_all_dim=0.9,
)
COMMON: dict[str, Any] = dict(
    hidden_size=16,
    moe_intermediate_size=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    vocab_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=7,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.1,
    router_z_loss_coef=0.1,
    rms_norm_eps=1e-3,
    rope_parameters=RopeParameters(**ROPE),
)
ATTENTION: dict[str, dict[str, Any]] = {
    "mla": dict(kv_lora_rank=6, q_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=8, v_head_dim=5),
    "gqa": dict(head_dim=8, num_key_value_heads=2, sliding_window=3, layer_types=("sliding_attention",) * 3),
}
TYPES = ("full_attention", "sliding_attention", "full_attention")

# A field, another value, and what that changes with MLA and with grouped-query attention: "shapes" of parameters,
# "initial" values, "output" of the same parameters, "training" (loss or gradients) where the output is the same, or
# nothing; or the field is "refused".
FIELDS: list[tuple[str, Any, str, str]] = [
    ("hidden_size", 32, "shapes", "shapes"),
    ("moe_intermediate_size", 5, "shapes", "shapes"),
    ("n_shared_experts", 2, "shapes", "shapes"),
    ("shared_expert_intermediate_size", 9, "shapes", "shapes"),
    ("shared_expert_gate", True, "shapes", "shapes"),
    ("expert_bias", True, "shapes", "shapes"),
    ("swiglu_limit", 0.2, "output", "output"),
    ("swiglu_alpha", 1.7, "output", "output"),
    ("swiglu_beta", 1.0, "output", "output"),
    ("n_routed_experts", 12, "shapes", "shapes"),
    ("num_experts_per_tok", 2, "output", "output"),
    ("scoring_func", "softmax", "output", "output"),
    ("topk_method", "group_limited_greedy", "shapes", "shapes"),
    ("n_group", 2, "output", "output"),
    ("topk_group", 3, "output", "output"),
    ("norm_topk_prob", False, "output", "output"),
    ("routed_scaling_factor", 2.5, "output", "output"),
    ("router_bias", True, "shapes", "shapes"),
    ("moe_norm_min", 5.0, "output", "output"),
    ("aux_loss_alpha", 0.2, "training", "training"),
    ("seq_aux", False, "training", "training"),
    ("router_z_loss_coef", 0.2, "training", "training"),
    ("initializer_range", 0.1, "initial", "initial"),
    ("vocab_size", 21, "shapes", "shapes"),
    ("num_hidden_layers", 4, "shapes", "shapes"),
    ("num_attention_heads", 4, "shapes", "shapes"),
    ("intermediate_size", 5, "shapes", "shapes"),
    ("first_k_dense_replace", 2, "shapes", "shapes"),
    ("mlp_only_layers", (1,), "shapes", "shapes"),
    ("decoder_sparse_step", 2, "shapes", "shapes"),
    ("kv_lora_rank", 7, "shapes", "refused"),
    ("q_lora_rank", 6, "shapes", "refused"),
    ("q_lora_rank", None, "shapes", "nothing"),
    ("qk_nope_head_dim", 0, "shapes", "refused"),
    ("qk_rope_head_dim", 6, "shapes", "refused"),
    ("v_head_dim", 4, "shapes", "refused"),
    ("num_key_value_heads", 1, "refused", "shapes"),
    ("num_key_value_heads", None, "nothing", "nothing"),  # as many as there are heads
    ("head_dim", 6, "refused", "shapes"),
    ("qk_norm", "head", "refused", "shapes"),
    ("qk_norm", "whole", "refused", "shapes"),
    ("attention_bias", True, "shapes", "shapes"),
    ("attention_output_bias", True, "shapes", "shapes"),
    ("attention_sinks", True, "refused", "shapes"),
    ("sliding_window", 4, "refused", "output"),
    ("sliding_window", None, "nothing", "refused"),
    ("layer_types", TYPES, "refused", "output"),
    ("layer_types", ("full_attention",) * 3, "nothing", "output"),
    ("rope_parameters.rope_theta", 5000.0, "output", "output"),
    ("rope_parameters.rope_type", "default", "refused", "refused"),  # with a factor
    ("rope_parameters.factor", 2.0, "output", "output"),
    ("rope_parameters.original_max_position_embeddings", 32, "output", "output"),
    ("rope_parameters.beta_fast", 0.6, "output", "output"),
    ("rope_parameters.beta_slow", 0.2, "output", "output"),
    ("rope_parameters.mscale", 0.2, "output", "output"),
    ("rope_parameters.mscale_all_dim", 0.2, "output", "output"),
    ("rope_parameters.attention_factor", 1.5, "output", "output"),
    ("rope_parameters.truncate", False, "output", "output"),
    ("rope_parameters.partial_rotary_factor", 0.5, "refused", "output"),
    ("rope_interleave", {"mla": False, "gqa": True}, "output", "output"),
    ("max_position_embeddings", 8, "nothing", "nothing"),  # the limit of `moesmith train` and of engines
    ("num_nextn_predict_layers", 2, "shapes", "shapes"),
    ("mtp_loss_weight", 0.1, "training", "training"),
    ("tie_word_embeddings", True, "shapes", "shapes"),
    ("rms_norm_eps", 1e-2, "output", "output"),
    ("model_type", "mixtral", "nothing", "nothing"),  # the layout of files
    ("extra", {"key": 1}, "nothing", "nothing"),  # kept for the files
]


def values_of(model: moe.Transformer, training: bool) -> torch.Tensor:
    """All that a model computes on a fixed batch: logits, or loss and gradients."""
    ids = torch.randint(0, 20, (3, 16), generator=torch.Generator().manual_seed(0))
    model.train(training)
    out = model(ids, labels=ids if training else None)
    if out.loss is None:
        return out.logits.detach()
    out.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat((out.loss.detach()[None], *gradients))


Tensors = dict[str, torch.Tensor]


@functools.cache
def base(attention: str) -> tuple[ModelConfig, Tensors, Tensors, dict[bool, torch.Tensor]]:
    """The config, its initial values, others with what is computed from these."""
    config = ModelConfig(**COMMON | ATTENTION[attention])
    model = moe.Transformer(config, seed=1).double()
    initial = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return config, initial, model.state_dict(), {training: values_of(model, training) for training in (False, True)}


def difference(attention: str, other: ModelConfig) -> str:
    """The first effect in which `other` differs from the base with that attention."""
    config, initial, state, values = base(attention)
    shapes = parameter_shapes(other)
    if shapes != parameter_shapes(config):
        with torch.device("meta"):
            model = moe.Transformer(other)
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
        return "shapes"
    model = moe.Transformer(other, seed=1).double()
    if any(not torch.equal(tensor, initial[name]) for name, tensor in model.state_dict().items()):
        return "initial"
    model.load_state_dict(state)
    for training, kind in ((False, "output"), (True, "training")):
        if not torch.equal(values_of(model, training), values[training]):
            return kind
    return "nothing"


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize(("field", "value", "mla", "gqa"), FIELDS, ids=[f"{f[0]}-{i}" for i, f in enumerate(FIELDS)])
def test_what_a_field_changes(field: str, value: Any, mla: str, gqa: str, attention: str) -> None:
    config = base(attention)[0]
    settings = COMMON | ATTENTION[attention]
    name, _, inner = field.partition(".")
    value = value[attention] if field == "rope_interleave" else value
    try:
        if inner:
            value = dataclasses.replace(config.rope_parameters, **{inner: value})
        if name == "num_hidden_layers" and config.layer_types:
            settings |= dict(layer_types=config.layer_types[:1] * value)
        found = difference(attention, ModelConfig(**settings | {name: value}))
    except ConfigError:
        found = "refused"
    assert found == {"mla": mla, "gqa": gqa}[attention]


def test_no_field_is_left_out() -> None:
    listed = {field for field, *_ in FIELDS}
    fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"rope_parameters"}
    assert listed == fields | {f"rope_parameters.{f.name}" for f in dataclasses.fields(RopeParameters)}


def test_decoding_reads_the_fields_that_a_whole_pass_reads() -> None:
    """Absorbed and expanded MLA, cached and uncached attention, of random models: the same logits."""
    rng, absorbed = random.Random(3), 0
    for _ in range(40):
        config = draw(rng)
        model = moe.Transformer(config).double().eval()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (2, 9), generator=generator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
            whole, cache = model(ids).logits, Cache(config)
            steps = [model(part, cache=cache).logits for part in ids.split((4, 1, 1, 3), dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-9, atol=1e-9)
        absorbed += config.is_mla and any(layer.made is not None for layer in cache.layers)
    assert absorbed > 5


def test_a_layer_reads_the_fields_that_a_model_reads() -> None:
    """`MoELayer` alone is the layer of a model: its config has the same values, and its parameters the same shapes."""
    settings: dict[str, Any] = (
        COMMON | ATTENTION["gqa"] | dict(expert_bias=True, router_bias=True, shared_expert_gate=True)
    )
    settings |= dict(swiglu_limit=3.0, swiglu_alpha=1.7, swiglu_beta=1.0, moe_norm_min=0.1, scoring_func="softmax")
    config = ModelConfig(**settings)
    names = [f.name for f in dataclasses.fields(MoEConfig)]
    with torch.device("meta"):
        layer = moe.MoELayer(**{name: getattr(config, name) for name in names})
        inside = moe.Transformer(config).layers[2].mlp
    assert isinstance(inside, moe.MoELayer) and inside.config == layer.config
    shapes = {f"layers.2.mlp.{name}": tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes.items() <= parameter_shapes(config).items()
    assert layer.experts.activation == inside.experts.activation == config.activation
    assert layer.gate.selection == inside.gate.selection == config.selection
