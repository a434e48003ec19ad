"""Configurations and models for tests of counts and checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe import ModelConfig, RopeParameters, Transformer
from moe.config import EXPERT_FIELDS

# No two sizes are equal and none divides another, so that a transposed or swapped tensor cannot match by accident.
SMALL: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=42,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=46,
    moe_intermediate_size=20,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=14,
    q_lora_rank=26,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=16,
    rope_interleave=True,
    max_position_embeddings=64,
)

V3 = ModelConfig(
    **SMALL,
    model_type="deepseek_v3",
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
V3_MTP = dataclasses.replace(V3, num_nextn_predict_layers=2)
V2 = ModelConfig(**SMALL, model_type="deepseek_v2", scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)

YARN = RopeParameters(
    rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=0.8, beta_fast=1.0
)

_GROUPED: dict[str, Any] = {k: v for k, v in SMALL.items() if not k.startswith(("kv_", "q_", "qk_", "v_", "rope_"))}
_GROUPED |= dict(num_attention_heads=6, num_key_value_heads=2, head_dim=12)
_PLAIN: dict[str, Any] = dict(n_shared_experts=0, first_k_dense_replace=0)
_SOFTMAX: dict[str, Any] = dict(scoring_func="softmax", topk_method="greedy", seq_aux=False)
_ONE_WIDTH: dict[str, Any] = dict(_GROUPED, **_PLAIN, intermediate_size=20)
_DENSE: dict[str, Any] = {k: v for k, v in _GROUPED.items() if k not in EXPERT_FIELDS and k != "first_k_dense_replace"}

# One small configuration per family; a save of kimi_k25 writes a deepseek_v3.
BY_FAMILY = {
    config.model_type: config
    for config in (
        V3_MTP,
        dataclasses.replace(V3, model_type="kimi_k2", num_nextn_predict_layers=0),
        V2,
        ModelConfig(**_ONE_WIDTH, **_SOFTMAX, model_type="mixtral"),
        ModelConfig(
            **{**_GROUPED, **_PLAIN, **_SOFTMAX, "n_shared_experts": 1},
            model_type="qwen2_moe",
            shared_expert_intermediate_size=26,
            shared_expert_gate=True,
            attention_bias=True,
            attention_output_bias=False,
            norm_topk_prob=False,
        ),
        ModelConfig(
            **{**_GROUPED, **_PLAIN, **_SOFTMAX},
            model_type="qwen3_moe",
            qk_norm="head",
        ),
        ModelConfig(
            **_GROUPED, model_type="glm4_moe", qk_norm="head", attention_output_bias=False, num_nextn_predict_layers=1
        ),
        ModelConfig(
            **_ONE_WIDTH,
            **_SOFTMAX,
            model_type="gpt_oss",
            attention_sinks=True,
            sliding_window=9,
            layer_types=("sliding_attention", "full_attention", "sliding_attention"),
            router_bias=True,
            expert_bias=True,
            attention_bias=True,
            swiglu_limit=7.0,
            swiglu_alpha=1.702,
            swiglu_beta=1.0,
        ),
        ModelConfig(
            **_ONE_WIDTH, **_SOFTMAX, model_type="olmoe", qk_norm="whole", norm_topk_prob=False, rms_norm_eps=1e-5
        ),
        ModelConfig(**_ONE_WIDTH, model_type="minimax_m2", qk_norm="whole", seq_aux=False),
        ModelConfig(**_GROUPED, model_type="dots1", qk_norm="head", routed_scaling_factor=2.5),
        ModelConfig(**{**SMALL, "v_head_dim": 22}, model_type="glm4_moe_lite", num_nextn_predict_layers=1),
        ModelConfig(
            **_GROUPED,
            model_type="ernie4_5_moe",
            rope_interleave=True,
            scoring_func="softmax",
            seq_aux=False,
            moe_norm_min=1e-12,
            tie_word_embeddings=True,
        ),
        dataclasses.replace(V3, model_type="kimi_k25"),
        ModelConfig(**_DENSE, model_type="qwen3", qk_norm="head"),
    )
}

_size = st.integers(1, 9)


@st.composite
def configs(draw: st.DrawFn, model_type: str | None = None) -> ModelConfig:
    """Draw a small config: any valid one, or one that a family's files can express."""
    layers = draw(st.integers(1, 4))
    heads = draw(st.integers(1, 4))
    groups = draw(st.integers(1, 3))
    per_group = draw(st.integers(1, 3))
    values: dict[str, Any] = dict(
        vocab_size=draw(_size),
        hidden_size=heads * 2 * draw(_size),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=draw(_size),
        moe_intermediate_size=draw(_size),
        n_shared_experts=draw(st.integers(0, 2)),
        first_k_dense_replace=draw(st.integers(0, layers)),
        attention_bias=model_type is None and draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_parameters=draw(st.sampled_from([RopeParameters(), RopeParameters(rope_theta=5e5), YARN])),
        aux_loss_alpha=draw(st.sampled_from([0.0, 1e-4])),
    )
    if model_type is not None or draw(st.booleans()):
        values |= dict(
            kv_lora_rank=draw(_size),
            q_lora_rank=draw(st.none() | _size),
            qk_nope_head_dim=draw(_size),
            qk_rope_head_dim=2 * draw(_size),
            v_head_dim=draw(_size),
            num_key_value_heads=draw(st.sampled_from([None, heads])),
        )
    else:
        values |= dict(
            num_key_value_heads=draw(st.sampled_from([None, 1])),
            head_dim=draw(st.sampled_from([None, 6])),
            qk_norm=draw(st.sampled_from(["none", "head", "whole"])),
        )
    if model_type == "deepseek_v2":
        values |= dict(model_type=model_type, scoring_func="softmax", norm_topk_prob=False)
        methods = ["greedy", "group_limited_greedy"]
    elif model_type == "deepseek_v3":
        values |= dict(scoring_func="sigmoid", norm_topk_prob=draw(st.booleans()))
        methods = ["noaux_tc"]
    else:
        values |= dict(scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])))
        methods = ["greedy", "group_limited_greedy", "noaux_tc"]
    if model_type != "deepseek_v2":
        values["num_nextn_predict_layers"] = draw(st.integers(0, 2))
    method = draw(st.sampled_from(methods))
    if method == "greedy":
        groups = 1
    topk_group = draw(st.integers(1, groups))
    values |= dict(
        topk_method=method,
        n_group=groups,
        topk_group=topk_group,
        n_routed_experts=groups * per_group,
        num_experts_per_tok=draw(st.integers(1, topk_group * per_group)),
    )
    return ModelConfig(**values)


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return a model with random values in every tensor, including norms and biases."""
    model = Transformer(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def as_kimi_k25(folder: Path) -> None:
    """Convert a saved deepseek_v3 to a kimi_k25 as released: with prefixed names, text_config, and a vision tower."""
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "text_config": config}
    whole |= {"media_placeholder_token_id": 60, "tie_word_embeddings": False, "vision_config": {"patch_size": 14}}
    (folder / "config.json").write_text(json.dumps(whole))
    vision = {"vision_tower.patch_embed.pos_emb.weight": torch.ones(2, 3), "mm_projector.proj.0.bias": torch.ones(5)}
    *_, last = files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
        save_file(tensors | (vision if file == last else {}), file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        names = {f"language_model.{name}": file for name, file in names.items()} | dict.fromkeys(vision, last.name)
        index.write_text(json.dumps({"weight_map": names}))


def configure(folder: Path, **changes: Any) -> None:
    """Change keys in a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(a: Transformer, b: Transformer) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name
