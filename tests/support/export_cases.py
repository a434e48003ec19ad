"""Other values for every field of a configuration that a family's files could hold."""

import dataclasses
from typing import Any

from moe import ConfigError, ModelConfig, RopeParameters
from moe.presets import PRESETS

YARN = RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)
MLA_YARN = dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0)
BASE = {config.model_type: config for config in reversed(PRESETS.values())}  # the first preset of each family

# Other values for every field that a family's files could hold. Sizes are not in question: all engines read them.
OTHERS: dict[str, tuple[Any, ...]] = {
    "first_k_dense_replace": (0, 2),
    "mlp_only_layers": ((1,), (0, 1)),
    "decoder_sparse_step": (2,),
    "n_shared_experts": (0, 2),
    "shared_expert_intermediate_size": (24,),
    "shared_expert_gate": (True, False),
    "expert_bias": (True, False),
    "swiglu_limit": (None, 1.0, 7.0),
    "swiglu_alpha": (1.0, 1.5, 1.702),
    "swiglu_beta": (0.0, 1.0),
    "qk_norm": ("none", "head", "whole"),
    "attention_bias": (True, False),
    "attention_output_bias": (True, False),
    "attention_sinks": (True, False),
    "sliding_window": (None, 7),
    "layer_types": (None, ("sliding_attention",) * 4, ("full_attention", "sliding_attention") * 2),
    "rope_parameters": (
        *(RopeParameters(), RopeParameters(rope_theta=12345.5), RopeParameters(partial_rotary_factor=0.25)),
        *(YARN, MLA_YARN),
        *(dataclasses.replace(YARN, **more) for more in ({"mscale": 0.7, "mscale_all_dim": 0.8}, {"mscale": 0.7})),
        *(dataclasses.replace(YARN, **more) for more in ({"attention_factor": 1.1}, {"truncate": False})),
        *(dataclasses.replace(YARN, **more) for more in ({"beta_fast": 16.0}, {"beta_slow": 2.0})),
        *(dataclasses.replace(MLA_YARN, **more) for more in ({"beta_fast": 16.0}, {"beta_slow": 2.0})),
        dataclasses.replace(MLA_YARN, beta_fast=1.0),
    ),
    "rope_interleave": (True, False),
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("noaux_tc", "group_limited_greedy", "greedy"),
    "n_group": (2,),
    "topk_group": (1,),
    "norm_topk_prob": (True, False),
    "routed_scaling_factor": (1.0, 3.0),
    "moe_norm_min": (0.0, 1e-12, 0.1),
    "router_bias": (True, False),
    "num_nextn_predict_layers": (0, 1),
    "tie_word_embeddings": (True, False),
    "rms_norm_eps": (1e-6, 1e-5, 1e-3),
    "initializer_range": (0.03,),
    "aux_loss_alpha": (0.0, 0.1),
    "seq_aux": (True, False),
    "router_z_loss_coef": (0.1,),
    "mtp_loss_weight": (0.1,),
    "max_position_embeddings": (4096,),
}


def changed(config: ModelConfig, field: str, value: Any) -> ModelConfig | None:
    changes: dict[str, Any] = {field: value}
    if field == "topk_method" and value == "greedy":
        changes |= {"n_group": 1, "topk_group": 1}
    if field == "sliding_window" and value is None:
        changes["layer_types"] = None
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError:
        return None  # no valid config
