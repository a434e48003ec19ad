"""Random small configs in which every field of `ModelConfig` has many values, whatever family could express them."""

import random
from typing import Any

from moe import ConfigError, ModelConfig, RopeParameters
from moe.config import LayerType

TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")


def draw(rng: random.Random) -> ModelConfig:
    """A config; drawn again until its fields go together."""
    while True:
        try:
            return ModelConfig(**_values(rng))
        except ConfigError:
            continue


def _values(rng: random.Random) -> dict[str, Any]:
    def pick(*values: Any) -> Any:
        return rng.choice(values)

    layers, heads, groups = rng.randint(1, 3), pick(1, 2, 4), pick(1, 1, 2, 3)
    method = pick("noaux_tc", "group_limited_greedy", "greedy")
    groups = 1 if method == "greedy" else groups
    experts = groups * rng.randint(1, 4)
    topk_group = rng.randint(1, groups)
    shared = pick({}, {"n_shared_experts": 2}, {"n_shared_experts": 1, "shared_expert_intermediate_size": 7})
    values: dict[str, Any] = dict(
        hidden_size=heads * 2 * rng.randint(2, 5),
        moe_intermediate_size=rng.randint(2, 9),
        **shared,
        shared_expert_gate=bool(shared) and pick(True, False),
        expert_bias=pick(True, False),
        swiglu_limit=pick(None, 0.5),
        swiglu_alpha=pick(1.0, 1.7),
        swiglu_beta=pick(0.0, 1.0),
        n_routed_experts=experts,
        num_experts_per_tok=rng.randint(1, topk_group * (experts // groups)),
        scoring_func=pick("sigmoid", "softmax"),
        topk_method=method,
        n_group=groups,
        topk_group=topk_group,
        norm_topk_prob=pick(True, False),
        routed_scaling_factor=pick(1.0, 2.5),
        router_bias=pick(True, False),
        moe_norm_min=pick(0.0, 1e-12, 0.9),
        aux_loss_alpha=pick(0.0, 0.01),
        seq_aux=pick(True, False),
        router_z_loss_coef=pick(0.0, 0.01),
        initializer_range=pick(0.02, 0.1),
        vocab_size=rng.randint(5, 40),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=rng.randint(2, 9),
        first_k_dense_replace=rng.randint(0, layers),
        mlp_only_layers=tuple(i for i in range(layers) if rng.random() < 0.2),
        decoder_sparse_step=pick(1, 1, 2),
        attention_bias=pick(True, False),
        attention_output_bias=pick(None, True, False),
        rope_interleave=pick(None, True, False),
        max_position_embeddings=pick(64, 128),
        num_nextn_predict_layers=rng.randint(0, 2),
        mtp_loss_weight=pick(0.3, 0.1),
        tie_word_embeddings=pick(True, False),
        rms_norm_eps=pick(1e-6, 1e-5),
        rope_parameters=_rope(rng),
    )
    if rng.random() < 0.1:
        values |= dict(n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, num_nextn_predict_layers=0)
    if rng.random() < 0.5:
        return values | dict(
            kv_lora_rank=rng.randint(2, 9),
            q_lora_rank=pick(None, rng.randint(2, 9)),
            qk_nope_head_dim=rng.randint(0, 5),
            qk_rope_head_dim=2 * rng.randint(1, 3),
            v_head_dim=rng.randint(1, 9),
            num_key_value_heads=pick(None, heads),
            layer_types=pick(None, TYPES[:1] * layers),
        )
    window = pick(None, 2, 5)
    types = tuple(rng.choice(TYPES if window else TYPES[:1]) for _ in range(layers))
    return values | dict(
        num_key_value_heads=pick(None, *(n for n in (1, 2, 4) if heads % n == 0)),
        head_dim=pick(None, 4, 6),
        qk_norm=pick("none", "head", "whole"),
        attention_sinks=pick(True, False),
        sliding_window=window,
        layer_types=pick(None, types),
    )


def _rope(rng: random.Random) -> RopeParameters:
    values: dict[str, Any] = dict(rope_theta=rng.choice((1e4, 50.0)), partial_rotary_factor=rng.choice((1.0, 1.0, 0.5)))
    if rng.random() < 0.5:
        values |= dict(
            rope_type="yarn",
            factor=rng.choice((1.0, 4.0)),
            original_max_position_embeddings=rng.choice((8, 16)),
            beta_fast=rng.choice((32.0, 2.0)),
            beta_slow=rng.choice((1.0, 0.5)),
            mscale=rng.choice((None, 0.7)),
            mscale_all_dim=rng.choice((None, 0.0, 0.9)),
            attention_factor=rng.choice((None, 1.2)),
            truncate=rng.choice((True, False)),
        )
    return RopeParameters(**values)
