"""The families of checkpoints, as data.

A name table maps each tensor of the model to the tensors of the files that fill it:

    "norm.weight": "model.norm.weight"                 one to one
    "gate_up": ("gate.weight", "up.weight")            the files' tensors stand one after the other along the rows
    "experts": "experts.{expert}.weight"               one file tensor for each slice along the first dimension

The table reads and writes: every tensor of the model has exactly one entry, and entries tile what they fill.
`layout.py` expands it for a configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe.checkpoint.folder import CONFIG
from moe.config import ModelConfig
from moe.errors import CheckpointError

Names = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """How one `model_type` names its tensors and its configuration.

    Attributes:
        architecture: the class in transformers.
        top: names of what stands outside the layers.
        layer_prefix: of the names in `block`, `mtp` and `mtp_repeats` in the files; MTP modules count on from the last
            layer.
        block: names within a layer.
        mtp: names of an MTP module outside its block.
        mtp_repeats: what each MTP module's layer holds again, as written by DeepSeek: tensor of the model -> name.
        keys: fields of `ModelConfig` -> their keys in config.json.
        required: fields that a file must give and that are not null.
        absent: fields -> value where the file does not give them, which is what transformers assumes.
        allowed: fields -> the values that this family's readers implement. Others ignore the key, or compute
            something else, without a word.
        fixed: keys that no field holds -> the values that leave the model's function as it is; the first is
            written, unless it is None.
        derived: keys that repeat what fields say -> how. transformers writes them, and computes with what it reads.
    """

    model_type: str
    architecture: str
    top: Names
    layer_prefix: str
    block: Names
    keys: Mapping[str, str]
    required: tuple[str, ...]
    absent: Mapping[str, Any]
    allowed: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, tuple[Any, ...]]
    derived: Mapping[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    mtp: Names = field(default_factory=dict)
    mtp_repeats: Mapping[str, str] = field(default_factory=dict)


_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

_DEEPSEEK_BLOCK: dict[str, str | tuple[str, ...]] = {
    **{
        name: name
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "self_attn.q_proj.weight",
            "self_attn.q_a_proj.weight",
            "self_attn.q_a_proj.bias",
            "self_attn.q_a_layernorm.weight",
            "self_attn.q_b_proj.weight",
            "self_attn.kv_a_proj_with_mqa.weight",
            "self_attn.kv_a_proj_with_mqa.bias",
            "self_attn.kv_a_layernorm.weight",
            "self_attn.kv_b_proj.weight",
            "self_attn.o_proj.weight",
            "self_attn.o_proj.bias",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "mlp.gate.weight",
            "mlp.gate.e_score_correction_bias",
            "mlp.shared_experts.gate_proj.weight",
            "mlp.shared_experts.up_proj.weight",
            "mlp.shared_experts.down_proj.weight",
        )
    },
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.down_proj": "mlp.experts.{expert}.down_proj.weight",
}

_DEEPSEEK_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim"),
)
_DEEPSEEK_KEYS = {
    name: name
    for name in (
        *_DEEPSEEK_SIZES,
        *("q_lora_rank", "num_key_value_heads", "max_position_embeddings", "n_shared_experts", "first_k_dense_replace"),
        *("scoring_func", "topk_method", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
        *("attention_bias", "rope_interleave", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
        *("num_nextn_predict_layers", "aux_loss_alpha", "seq_aux", "router_z_loss_coef", "mtp_loss_weight"),
    )
}
_DEEPSEEK_FIXED = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1, None),
    "partial_rotary_factor": (None, 1.0),
}

_DEEPSEEK_DERIVED: dict[str, Callable[[ModelConfig], Any]] = {
    "head_dim": lambda config: config.qk_rope_head_dim,
    "qk_head_dim": lambda config: config.qk_head_dim,
}

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    top=_TOP,
    layer_prefix="model.layers.{layer}.",
    block=_DEEPSEEK_BLOCK,
    mtp={
        "enorm.weight": "enorm.weight",
        "hnorm.weight": "hnorm.weight",
        "eh_proj.weight": "eh_proj.weight",
        "norm.weight": "shared_head.norm.weight",
    },
    mtp_repeats={"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"},
    keys=_DEEPSEEK_KEYS,
    required=_DEEPSEEK_SIZES,
    absent={
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "rope_interleave": True,
    },
    allowed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    fixed=_DEEPSEEK_FIXED,
    derived=_DEEPSEEK_DERIVED,
)

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    top=_TOP,
    layer_prefix="model.layers.{layer}.",
    block=_DEEPSEEK_BLOCK,
    keys=_DEEPSEEK_KEYS,
    required=_DEEPSEEK_SIZES,
    absent={
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "rope_interleave": True,
        "max_position_embeddings": 2048,
    },
    allowed={
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        # DeepSeek's own code normalises, transformers ignores the key: one file, two functions.
        "norm_topk_prob": (False,),
        "rope_interleave": (True,),
        "num_nextn_predict_layers": (0,),
    },
    fixed=_DEEPSEEK_FIXED,
    derived=_DEEPSEEK_DERIVED,
)

FAMILIES = {family.model_type: family for family in (DEEPSEEK_V3, DEEPSEEK_V2)}


def family_of(model_type: Any, path: Any) -> Family:
    """The family, or a `CheckpointError` about `path` with the list of those there are."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(path, f"{CONFIG}: model_type", expected=f"one of {', '.join(FAMILIES)}", found=model_type)
    return family
