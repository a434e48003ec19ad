"""Definitions of the checkpoint families, as data; `family.py` documents the fields."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.checkpoint.format.family import BUFFERS, MXFP4, Conversion, Family, Names, Reordered, Row, Rule, Table, setting
from moe.checkpoint.format.folder import CONFIG
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError, did_you_mean


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def under(prefix: str, names: Names) -> dict[str, Any]:
    """Return `names` with "mlp." replaced by `prefix` in the files' names."""

    def moved(name: str) -> str:
        return prefix + name.removeprefix("mlp.") if name.startswith("mlp.") else name

    return {
        key: tuple(map(moved, value)) if isinstance(value, tuple) else moved(value)
        for key, value in names.items()
        if isinstance(value, str | tuple)
    }


_TOP = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_NORMS = same("input_layernorm.weight", "post_attention_layernorm.weight")
_GQA = same(
    *(f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.sinks"),
)
_MLA = same(
    *(
        f"self_attn.{name}.weight"
        for name in ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_b_proj", "o_proj")
    ),
    *(f"self_attn.{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm")),
    *(f"self_attn.{name}.bias" for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")),
)
_DENSE = same(*(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")))
_ROUTER = same("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
_SHARED = same(*(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")))

# A tensor per expert, as in most files, and all experts stacked, as transformers has them in memory.
_EACH: dict[str, Any] = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp.experts.down_proj": "mlp.experts.{expert}.down_proj.weight",
}
_STACKED = same("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def _tables(block: Names, each: Names = _EACH, **rest: Any) -> dict[str, Table]:
    """Return a layout with a tensor per expert, and one with stacked experts."""
    rest = {"top": _TOP, "layer_prefix": "model.layers.{layer}.", **rest}
    return {"experts": Table(block={**block, **each}, **rest), "stacked": Table(block={**block, **_STACKED}, **rest)}


_MTP: dict[str, Any] = {
    "mtp": same("enorm.weight", "hnorm.weight", "eh_proj.weight") | {"norm.weight": "shared_head.norm.weight"},
    "mtp_repeats": {"embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"},
}

_DEEPSEEK_BLOCK = _NORMS | _MLA | _DENSE | _ROUTER | _SHARED

# Names in DeepSeek's inference code.
_OFFICIAL_BLOCK: dict[str, Any] = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn.wq.weight",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_layernorm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn.wkv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attn.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attn.wkv_b.weight",
    "self_attn.o_proj.weight": "attn.wo.weight",
    "mlp.gate_proj.weight": "ffn.w1.weight",
    "mlp.down_proj.weight": "ffn.w2.weight",
    "mlp.up_proj.weight": "ffn.w3.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.experts.gate_up_proj": ("ffn.experts.{expert}.w1.weight", "ffn.experts.{expert}.w3.weight"),
    "mlp.experts.down_proj": "ffn.experts.{expert}.w2.weight",
}
_OFFICIAL = Table(
    top={"embed_tokens.weight": "embed.weight", "norm.weight": "norm.weight", "lm_head.weight": "head.weight"},
    layer_prefix="layers.{layer}.",
    block=_OFFICIAL_BLOCK,
    scale=(".weight", ".scale"),
)

_MIXTRAL_EACH: dict[str, Any] = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{expert}.w1.weight", "mlp.experts.{expert}.w3.weight"),
    "mlp.experts.down_proj": "mlp.experts.{expert}.w2.weight",
}


def _mixtral_tables(router: dict[str, str]) -> dict[str, Table]:
    block = _NORMS | _GQA | router
    tables = _tables(block, _MIXTRAL_EACH)
    return tables | {
        "experts": replace(tables["experts"], block=under("block_sparse_moe.", {**block, **_MIXTRAL_EACH}))
    }


# gpt-oss has its experts' input axis first, and alternating gate and up rows.
_GPT_OSS_BLOCK: dict[str, Any] = {
    **_NORMS,
    **_GQA,
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.experts.gate_up_proj_bias": Reordered("mlp.experts.gate_up_proj_bias", "e f two", "e two f"),
    "mlp.experts.down_proj_bias": "mlp.experts.down_proj_bias",
}
_GPT_OSS_EXPERTS: dict[str, Any] = {
    "mlp.experts.gate_up_proj": Reordered("mlp.experts.gate_up_proj", "e d f two", "e two f d"),
    "mlp.experts.down_proj": Reordered("mlp.experts.down_proj", "e f d", "e d f"),
}
_GPT_OSS_MXFP4: dict[str, Any] = {
    "mlp.experts.gate_up_proj": MXFP4("mlp.experts.gate_up_proj", interleaved=True),
    "mlp.experts.down_proj": MXFP4("mlp.experts.down_proj"),
}


def _only(field: str, value: Any, reason: str) -> Rule:
    """Return the rule that `field` has this value."""

    def holds(config: ModelConfig) -> bool:
        return setting(config, field) == value

    return Rule(field, holds, str(value).lower() if value is None or isinstance(value, bool) else str(value), reason)


# The rules are from the code of vLLM 0.33.0 (model_executor/models, layers/rotary_embedding), SGLang 0.5.23
# (srt/models, srt/layers/rotary_embedding) and llama.cpp as of llama-cpp-python 0.3.36 (conversion, src/models,
# llama-graph.cpp, llama-context.cpp). A setting with which an engine fails needs no rule. Released models are never
# refused, although llama.cpp differs for three of them: it scores groups of DeepSeek-V2 by the sum of two experts
# instead of the best one, truncates gpt-oss's YaRN range, and uses 32 instead of Kimi-K2's beta_fast of 1.
# `python -m tests.engines` runs llama.cpp.
_BETA_SLOW = _only("rope_parameters.beta_slow", 1.0, "llama.cpp always uses 1")
_PLAIN_YARN = (
    _only("rope_parameters.beta_fast", 32.0, "llama.cpp always uses 32"),
    _BETA_SLOW,
    _only("rope_parameters.attention_factor", None, "SGLang and llama.cpp compute it from the factor instead"),
    _only("rope_parameters.mscale", None, "llama.cpp ignores it"),
    _only("rope_parameters.mscale_all_dim", None, "llama.cpp ignores it"),
)
_TRUNCATED_YARN = _only("rope_parameters.truncate", True, "llama.cpp always truncates YaRN's range")
_UNTIED = _only("tie_word_embeddings", False, "SGLang does not tie weights and leaves the head uninitialised")
_NO_WINDOW = _only("sliding_window", None, "SGLang and llama.cpp attend to all tokens")
_ALL_SPARSE = (
    _only("decoder_sparse_step", 1, "SGLang builds experts in every layer"),
    _only("mlp_only_layers", (), "SGLang builds experts in every layer"),
)


def _yarn_agrees(config: ModelConfig) -> bool:
    rope = config.rope_parameters
    return rope.rope_type != "yarn" or (bool(rope.mscale) and rope.mscale == rope.mscale_all_dim)


_MLA_RULES = (
    Rule(
        "rope_interleave",
        lambda config: config.rope_interleave is True or not config.is_mla,
        "true",
        "vLLM and llama.cpp always rotate interleaved pairs; moe.checkpoint.interleave(model) reorders the weights",
    ),
    _only("attention_bias", False, "vLLM leaves out biases of MLA's projections"),
    # The latents' norms use 1e-6 in transformers and DeepSeek's code, but rms_norm_eps in the engines. Kimi-K2.5 and
    # Moonlight have 1e-5.
    Rule(
        "rms_norm_eps",
        lambda config: config.rms_norm_eps <= 1e-5,
        "at most 1e-5",
        "the engines apply it to the latents, transformers does not",
    ),
    Rule(
        "rope_parameters.mscale",
        _yarn_agrees,
        "a value above 0, equal to mscale_all_dim",
        "llama.cpp uses mscale_all_dim for both",
    ),
    _BETA_SLOW,
    Rule(
        "rope_parameters.beta_fast",
        lambda config: config.rope_parameters.beta_fast in (32.0, 1.0),
        "32.0, or Kimi-K2's 1.0",
        "llama.cpp always uses 32",
    ),
    _only("rope_parameters.attention_factor", None, "vLLM and SGLang compute it from mscale and mscale_all_dim"),
    _only("rope_parameters.truncate", True, "the engines always truncate YaRN's range"),
)

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_MOE_SIZES = (*_SIZES, "num_experts_per_tok", "moe_intermediate_size", "n_routed_experts")
_DENSE_AND_MOE_SIZES = (*_MOE_SIZES, "intermediate_size")
_DENSE_KEYS = same(
    *_SIZES,
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
)
_COMMON_KEYS = _DENSE_KEYS | same(
    "num_experts_per_tok",
    # For training. Not router_aux_loss_coef, which has another meaning: transformers' loss pools all layers, does not
    # divide by K, and is off by default.
    *("aux_loss_alpha", "seq_aux", "router_z_loss_coef", "mtp_loss_weight"),
)
_GQA_KEYS = {**_COMMON_KEYS, "head_dim": "head_dim"}
_EXPERT_COUNT = ("num_experts", "num_local_experts")
_ONE_WIDTH = {"intermediate_size": "intermediate_size", "moe_intermediate_size": "intermediate_size"}
_SILU = {"hidden_act": ("silu",), "attention_dropout": (0.0, None)}
# transformers ignores this key and rotates whole heads; vLLM reads it.
_WHOLE_HEADS = _SILU | {"partial_rotary_factor": (None, 1.0)}
_SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy"}


def _window_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read a window, which Qwen has only with use_sliding_window."""
    if not values.get("use_sliding_window"):
        return {}
    return {"sliding_window": values.get("sliding_window", 4096)}


def _window_write(config: ModelConfig) -> dict[str, Any]:
    return {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}


def _alternating_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read Qwen2's windows: every other layer of the first max_window_layers, if there are no layer_types."""
    if not values.get("use_sliding_window"):
        return {}
    types = values.get("layer_types")
    layers, most = values.get("num_hidden_layers"), values.get("max_window_layers", 28)
    if types is None and type(layers) is int and type(most) is int and 0 <= layers <= 10_000:
        types = tuple("sliding_attention" if i % 2 == 0 and i < most else "full_attention" for i in range(layers))
    return {**_window_read(values), "layer_types": types}


def _layer_types(config: ModelConfig) -> list[str]:
    slides = (config.is_sliding_layer(i) for i in range(config.num_hidden_layers))
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _alternating_write(config: ModelConfig) -> dict[str, Any]:
    return {**_window_write(config), "layer_types": _layer_types(config)}


_DEEPSEEK_SIZES = (*_DENSE_AND_MOE_SIZES, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_DEEPSEEK_KEYS = _COMMON_KEYS | same(
    *_DEEPSEEK_SIZES,
    *("q_lora_rank", "n_shared_experts", "first_k_dense_replace"),
    *("scoring_func", "topk_method", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
    *("attention_bias", "rope_interleave", "num_nextn_predict_layers"),
)
_GLM_LITE_OTHERS = ("scoring_func", "topk_method", "first_k_dense_replace")
_DEEPSEEK_FIXED = _WHOLE_HEADS | {"mlp_bias": (False, None), "moe_layer_freq": (1, None)}
# vLLM leaves out the correction bias if topk_method is null.
_DEEPSEEK_OWN = ("n_group", "topk_group", "scoring_func", "topk_method")
_DEEPSEEK_DERIVED: dict[str, Callable[[ModelConfig], Any]] = {
    "head_dim": lambda config: config.qk_rope_head_dim,
    "qk_head_dim": lambda config: config.qk_head_dim,
}

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    tables=_tables(_DEEPSEEK_BLOCK, **_MTP) | {"deepseek": _OFFICIAL},
    keys=_DEEPSEEK_KEYS,
    required=_DEEPSEEK_SIZES,
    defaults={
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
    rules=_MLA_RULES,
    fixed=_DEEPSEEK_FIXED,
    own=_DEEPSEEK_OWN,
    derived=_DEEPSEEK_DERIVED,
    yarn_from_length=False,
)

# Kimi-K2: DeepSeek-V3's code and names with other sizes.
KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2", without_code="deepseek_v3")


def _within(prefix: str, table: Table, layers: str = "layers") -> Table:
    """Return `table` with `prefix` before all names in the files."""
    top = {name: f"{prefix}{file}" for name, file in table.top.items()}
    return replace(table, top=top, layer_prefix=prefix + table.layer_prefix.replace("layers", layers))


# Kimi-K2.5 and K2.6: DeepSeek-V3 with a vision tower. A save writes a deepseek_v3, which every engine loads; for
# kimi_k25, transformers and vLLM would add a tower of random weights. transformers 5.24 writes "blocks" instead of
# "layers", and reads both.
KIMI_K25 = replace(
    DEEPSEEK_V3,
    model_type="kimi_k25",
    architecture="KimiK25ForConditionalGeneration",
    tables={name: _within("language_model.", DEEPSEEK_V3.tables[name]) for name in ("experts", "stacked")}
    | {"blocks": _within("language_model.", DEEPSEEK_V3.tables["experts"], layers="blocks")},
    left_out=("vision_tower.", "mm_projector.", "model.mm_projector."),
    left_out_keys=("auto_map",),
    text="text_config",
    text_types=("deepseek_v3", "kimi_k2"),
    written_as="deepseek_v3",
    buffers=tuple("language_model." + name for name in BUFFERS),
)

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    tables=_tables(_DEEPSEEK_BLOCK) | {"deepseek": _OFFICIAL},
    keys=_DEEPSEEK_KEYS,
    required=_DEEPSEEK_SIZES,
    defaults={
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
        # DeepSeek's code normalises, transformers ignores the key.
        "norm_topk_prob": (False,),
        "rope_interleave": (True,),
        "num_nextn_predict_layers": (0,),
    },
    rules=_MLA_RULES,
    fixed=_DEEPSEEK_FIXED,
    own=_DEEPSEEK_OWN,
    derived=_DEEPSEEK_DERIVED,
    yarn_from_length=False,
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tables=_mixtral_tables(same("mlp.gate.weight")),
    keys=_GQA_KEYS | _ONE_WIDTH | {"n_routed_experts": _EXPERT_COUNT[::-1], "sliding_window": "sliding_window"},
    required=_MOE_SIZES,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "seq_aux": False},
    implied=_SOFTMAX,
    rules=(
        _UNTIED,
        _NO_WINDOW,
        _only("rope_parameters.rope_type", "default", "SGLang reads only rope_theta"),
        Rule(
            "rope_parameters.rope_theta",
            lambda config: float(config.rope_parameters.rope_theta).is_integer(),
            "an integer",
            "SGLang rounds it down",
        ),
    ),
    fixed=_WHOLE_HEADS,
    rope={"rope_theta": 1e6},
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    tables=_tables(
        _NORMS
        | _GQA
        | _DENSE
        | same("mlp.gate.weight", "mlp.shared_expert_gate.weight")
        | {name: file.replace("shared_experts", "shared_expert") for name, file in _SHARED.items()}
    ),
    keys=_GQA_KEYS
    | same("intermediate_size", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    | same("shared_expert_intermediate_size")
    | {"n_routed_experts": _EXPERT_COUNT, "attention_bias": "qkv_bias"},
    required=(*_DENSE_AND_MOE_SIZES, "shared_expert_intermediate_size"),
    defaults={"norm_topk_prob": False, "attention_bias": True, "max_position_embeddings": 32768, "seq_aux": False},
    implied=_SOFTMAX | {"n_shared_experts": 1, "shared_expert_gate": True, "attention_output_bias": False},
    rules=(
        _only("norm_topk_prob", False, "llama.cpp ignores it and does not normalise"),
        *(*_ALL_SPARSE, _UNTIED, _NO_WINDOW, *_PLAIN_YARN, _TRUNCATED_YARN),
    ),
    fixed=_WHOLE_HEADS,
    conversions=(
        Conversion(
            ("use_sliding_window", "sliding_window", "layer_types", "max_window_layers"),
            _alternating_read,
            _alternating_write,
        ),
    ),
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tables=_tables(_NORMS | _GQA | _DENSE | same("mlp.gate.weight")),
    keys=_GQA_KEYS
    | same("intermediate_size", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    | {"n_routed_experts": _EXPERT_COUNT, "attention_bias": "attention_bias"},
    required=_DENSE_AND_MOE_SIZES,
    defaults={"norm_topk_prob": False, "num_key_value_heads": 4, "max_position_embeddings": 32768, "seq_aux": False},
    implied=_SOFTMAX | {"qk_norm": "head"},
    rules=(
        _only("norm_topk_prob", True, "llama.cpp ignores it and normalises"),
        _only("attention_bias", False, "vLLM leaves out the output projection's bias"),
        *(*_ALL_SPARSE, _UNTIED, _NO_WINDOW, *_PLAIN_YARN, _TRUNCATED_YARN),
    ),
    fixed=_WHOLE_HEADS,
    conversions=(Conversion(("use_sliding_window", "sliding_window"), _window_read, _window_write),),
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    tables=_tables(_NORMS | _GQA | _DENSE | _ROUTER | _SHARED, **_MTP),
    keys=_COMMON_KEYS
    | same("intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "head_dim")
    | same("first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
    | same("attention_bias", "num_nextn_predict_layers"),
    required=_DENSE_AND_MOE_SIZES,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
    implied={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "attention_output_bias": False},
    rules=(
        Rule(
            "n_shared_experts",
            lambda config: config.shared_width > 0 or config.num_moe_layers + config.num_nextn_predict_layers == 0,
            "at least 1",
            "llama.cpp adds the silu of the experts' input if there is no shared expert",
        ),
        *(_UNTIED, *_PLAIN_YARN, _TRUNCATED_YARN),
    ),
    fixed=_SILU,
    conversions=(
        Conversion(
            ("use_qk_norm",),
            lambda values: {"qk_norm": "head" if values.get("use_qk_norm") else "none"},
            lambda config: {"use_qk_norm": config.qk_norm == "head"},
        ),
    ),
    rope={"partial_rotary_factor": 0.5},
)

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    tables={
        name: Table(_TOP, "model.layers.{layer}.", {**_GPT_OSS_BLOCK, **experts})
        for name, experts in (("stacked", _GPT_OSS_EXPERTS), ("mxfp4", _GPT_OSS_MXFP4))
    },
    keys=_GQA_KEYS
    | _ONE_WIDTH
    | same("attention_bias", "sliding_window", "swiglu_limit", "swiglu_alpha")
    | {"n_routed_experts": _EXPERT_COUNT[::-1]},
    required=_MOE_SIZES,
    defaults={"attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "head_dim": 64}
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "seq_aux": False},
    implied=_SOFTMAX | {"attention_sinks": True, "router_bias": True, "expert_bias": True, "swiglu_beta": 1.0},
    rules=(
        _only("swiglu_limit", 7.0, "llama.cpp always uses 7"),
        _only("swiglu_alpha", 1.702, "SGLang and llama.cpp always use 1.702"),
        Rule(
            "layer_types",
            lambda config: all(config.is_sliding_layer(i) == (i % 2 == 0) for i in range(config.num_hidden_layers)),
            "alternating sliding_attention and full_attention",
            "vLLM and llama.cpp use a window in every other layer",
        ),
        *(_UNTIED, *_PLAIN_YARN),
    ),
    derived={"experts_per_token": lambda config: config.num_experts_per_tok},  # read by vLLM
    fixed=_WHOLE_HEADS,
    conversions=(
        Conversion(
            ("layer_types",),
            lambda values: {"layer_types": values.get("layer_types") or _every_other(values.get("num_hidden_layers"))},
            lambda config: {"layer_types": _layer_types(config)},
        ),
    ),
    rope={
        "rope_theta": 150000.0,
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)


def _every_other(layers: Any) -> tuple[str, ...] | None:
    if type(layers) is not int or not 0 <= layers <= 10_000:
        return None
    return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    tables=_tables(_NORMS | _GQA | same("mlp.gate.weight")),
    keys=_GQA_KEYS | _ONE_WIDTH | same("norm_topk_prob", "attention_bias") | {"n_routed_experts": _EXPERT_COUNT},
    required=_MOE_SIZES,
    defaults={"norm_topk_prob": False, "rms_norm_eps": 1e-5, "seq_aux": False},
    implied=_SOFTMAX | {"qk_norm": "whole"},
    rules=(
        _only("norm_topk_prob", False, "vLLM, SGLang and llama.cpp ignore it and do not normalise"),
        _only("rms_norm_eps", 1e-5, "vLLM, SGLang and llama.cpp always use 1e-5"),
        _only("attention_bias", False, "vLLM and SGLang leave out biases"),
        *(_UNTIED, *_PLAIN_YARN, _TRUNCATED_YARN),
    ),
    fixed=_WHOLE_HEADS | {"clip_qkv": (None,)},
)

MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    tables=_mixtral_tables(
        {"mlp.gate.weight": "mlp.gate.weight", "mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"}
    ),
    keys=_GQA_KEYS | _ONE_WIDTH | {"n_routed_experts": _EXPERT_COUNT[::-1]},
    required=_MOE_SIZES,
    defaults={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608, "seq_aux": False},
    implied={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "qk_norm": "whole"},
    rules=(_UNTIED, *_PLAIN_YARN, _TRUNCATED_YARN),
    # transformers ignores these keys. Without them vLLM and SGLang leave out the correction bias, SGLang leaves out the
    # norms, and llama.cpp has no scoring function.
    fixed=_SILU
    | {"use_qk_norm": (True, None), "qk_norm_type": ("per_layer", None), "scoring_func": ("sigmoid", None)}
    | {"use_routing_bias": (True, None), "shared_intermediate_size": (None, 0)},
    # Other readers take the number of rotary dimensions from this key; it is read with the rest of RoPE.
    own=("n_group", "topk_group", "rotary_dim"),
    conversions=(Conversion(("rotary_dim",), lambda values: {}, lambda config: {"rotary_dim": config.rope_dim}),),
    rope={"rope_theta": 5e6},
)


def _late_windows_read(values: Mapping[str, Any], default: int) -> dict[str, Any]:
    """Read windows of the layers from max_window_layers (or `default`) on, if there are no layer_types."""
    window = values.get("sliding_window", 4096)
    layers, first = values.get("num_hidden_layers"), values.get("max_window_layers", default)
    types = values.get("layer_types")
    if types is None:
        if window is None or type(layers) is not int or not 0 <= layers <= 10_000:
            return {}
        if type(first) is not int:
            raise ConfigError("max_window_layers", first, "an integer")
        if first >= layers:
            return {}
        types = tuple("sliding_attention" if i >= first else "full_attention" for i in range(layers))
    return {"sliding_window": window, "layer_types": types}


def _late_windows_write(config: ModelConfig) -> dict[str, Any]:
    types = _layer_types(config)
    if "sliding_attention" not in types:
        return {"sliding_window": None}
    return {"sliding_window": config.sliding_window, "layer_types": types}


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    tables=_tables(_NORMS | _GQA | _DENSE | _ROUTER | _SHARED),
    keys=_GQA_KEYS
    | same("intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts")
    | same("first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
    | same("attention_bias"),
    required=_DENSE_AND_MOE_SIZES,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 2048, "norm_topk_prob": False},
    implied={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "qk_norm": "head"},
    # SGLang does not support the family; vLLM does not from 0.23 on.
    rules=(
        _only("attention_bias", False, "vLLM leaves out the output projection's bias"),
        _only("sliding_window", None, "vLLM and llama.cpp attend to all tokens"),
        _only("tie_word_embeddings", False, "vLLM does not tie weights and leaves the head uninitialised"),
        *(*_PLAIN_YARN, _TRUNCATED_YARN),
    ),
    # vLLM reads these keys, transformers does not. The first releases have "noaux_tc" as their scoring_func.
    fixed=_WHOLE_HEADS
    | {"scoring_func": ("sigmoid", "noaux_tc", None), "topk_method": ("noaux_tc", None), "moe_layer_freq": (1, None)},
    conversions=(
        Conversion(
            ("sliding_window", "layer_types", "max_window_layers"),
            lambda values: _late_windows_read(values, 62),
            _late_windows_write,
        ),
    ),
)

# Qwen3's dense models: the only family without experts.
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tables={"dense": Table(_TOP, "model.layers.{layer}.", _NORMS | _GQA | _DENSE)},
    keys=_DENSE_KEYS | same("intermediate_size", "head_dim", "attention_bias"),
    required=(*_SIZES, "intermediate_size"),
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    implied={"qk_norm": "head"},
    rules=(
        _only("attention_bias", False, "vLLM leaves out the output projection's bias"),
        *(_NO_WINDOW, *_PLAIN_YARN, _TRUNCATED_YARN),
    ),
    fixed=_WHOLE_HEADS,
    conversions=(
        Conversion(
            ("use_sliding_window", "sliding_window", "layer_types", "max_window_layers"),
            lambda values: _late_windows_read(values, 28) if values.get("use_sliding_window") else {},
            lambda config: {**_window_write(config), **_late_windows_write(config)},
        ),
    ),
)


def _mlp_types_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the dense layers from a list, as transformers does, or from the number of leading ones, as engines do."""
    types, leading, layers = (
        values.get(key) for key in ("mlp_layer_types", "first_k_dense_replace", "num_hidden_layers")
    )
    if types is None:
        return {"first_k_dense_replace": 1 if leading is None else leading}
    if not isinstance(types, list) or len(types) != layers or not all(kind in ("dense", "sparse") for kind in types):
        raise ConfigError("mlp_layer_types", types, "'dense' or 'sparse' for each layer")
    dense = [i for i, kind in enumerate(types) if kind == "dense"]
    first = types.index("sparse") if "sparse" in types else len(types)
    if leading not in (None, first):
        raise ConfigError("first_k_dense_replace", leading, f"{first}, the leading dense layers of mlp_layer_types")
    return {"first_k_dense_replace": first, "mlp_only_layers": tuple(i for i in dense if i > first)}


def _mlp_types_write(config: ModelConfig) -> dict[str, Any]:
    types = ["sparse" if config.is_moe_layer(i) else "dense" for i in range(config.num_hidden_layers)]
    return {"mlp_layer_types": types, "first_k_dense_replace": _leading(config)}


def _leading(config: ModelConfig) -> int:
    """Return the number of dense layers before the first layer with experts."""
    layers = range(config.num_hidden_layers)
    return next((i for i in layers if config.is_moe_layer(i)), len(layers))


# GLM-4.7-Flash: DeepSeek-V3's attention and names.
GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    tables=_tables(_DEEPSEEK_BLOCK, **_MTP),
    keys={name: key for name, key in _DEEPSEEK_KEYS.items() if name not in _GLM_LITE_OTHERS},
    required=_DEEPSEEK_SIZES,
    defaults={
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 1,
        "q_lora_rank": 768,
        "routed_scaling_factor": 1.8,
        "rope_interleave": True,
    },
    implied={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    rules=(
        *_MLA_RULES,
        _only("tie_word_embeddings", False, "vLLM and SGLang do not tie weights and leave the head uninitialised"),
        Rule(
            "mlp_only_layers",
            lambda config: config.num_hidden_layers - config.num_moe_layers == _leading(config),
            "no dense layers after the leading ones",
            "SGLang builds experts in them",
        ),
    ),
    fixed=_DEEPSEEK_FIXED | {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)},
    derived=_DEEPSEEK_DERIVED,
    conversions=(Conversion(("mlp_layer_types", "first_k_dense_replace"), _mlp_types_read, _mlp_types_write),),
    yarn_from_length=False,
)


def _last_layer_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read ERNIE's dense layers after moe_layer_end_index, where -1 is the last layer and -2 none."""
    end, layers = values.get("moe_layer_end_index"), values.get("num_hidden_layers")
    if end is None or end == -1 or type(layers) is not int or not 0 <= layers <= 10_000:
        return {}
    if type(end) is not int:
        raise ConfigError("moe_layer_end_index", end, "an integer")
    return {"mlp_only_layers": tuple(range(max(end + 1, 0), layers))}


def _last_layer_write(config: ModelConfig) -> dict[str, Any]:
    dense = (i for i in reversed(range(config.num_hidden_layers)) if i not in config.mlp_only_layers)
    return {"moe_layer_end_index": next(dense, -2)}


def _ernie_table(table: Table, bias: str) -> Table:
    return replace(table, block={**table.block, "mlp.gate.e_score_correction_bias": Row(bias)})


_ERNIE_TABLES = _tables(_NORMS | _GQA | _DENSE | same("mlp.gate.weight") | _SHARED)
ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    tables={
        "experts": _ernie_table(_ERNIE_TABLES["experts"], "mlp.moe_statics.e_score_correction_bias"),
        "stacked": _ernie_table(_ERNIE_TABLES["stacked"], "mlp.gate.moe_statics.e_score_correction_bias"),
    },
    keys=_GQA_KEYS
    | same("intermediate_size", "moe_intermediate_size", "moe_norm_min")
    | {
        "n_routed_experts": ("moe_num_experts", "num_experts"),
        "num_experts_per_tok": ("moe_k", "num_experts_per_tok"),
        "n_shared_experts": "moe_num_shared_experts",
        "first_k_dense_replace": "moe_layer_start_index",
        "decoder_sparse_step": "moe_layer_interval",
    },
    required=_DENSE_AND_MOE_SIZES,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_norm_min": 1e-12,
        "seq_aux": False,
    },
    implied=_SOFTMAX | {"topk_method": "noaux_tc", "rope_interleave": True},
    rules=(_only("moe_norm_min", 1e-12, "vLLM, SGLang and llama.cpp ignore it"), *(*_PLAIN_YARN, _TRUNCATED_YARN)),
    # With use_bias, vLLM drops the biases of attention's output projection and of the head.
    fixed=_WHOLE_HEADS
    | {"use_bias": (False, None), "moe_gate_act": ("softmax", None), "moe_use_aux_free": (True, None)}
    | {"use_moe": (None, True)},
    conversions=(Conversion(("moe_layer_end_index",), _last_layer_read, _last_layer_write),),
    rope={"rope_theta": 500000.0},
    # The MTP module is a dense layer, which is not supported.
    left_out=tuple(f"model.mtp_{part}." for part in ("block", "emb_norm", "hidden_norm", "linear_proj")),
    left_out_keys=("num_nextn_predict_layers",),
)

FAMILIES = {
    family.model_type: family
    for family in (
        *(DEEPSEEK_V3, KIMI_K2, DEEPSEEK_V2, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, GPT_OSS, OLMOE, MINIMAX_M2),
        *(DOTS1, GLM4_MOE_LITE, ERNIE4_5_MOE, KIMI_K25, QWEN3),
    )
}


def family_of(model_type: Any, path: Any) -> Family:
    """Return the family of `model_type`; raises `CheckpointError` about `path`, a folder or a JSON file, if unknown."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        hint = did_you_mean(model_type, FAMILIES) if isinstance(model_type, str) else ""
        expected = f"one of {', '.join(FAMILIES)}{hint}"
        where = path if Path(path).suffix == ".json" else Path(path) / CONFIG
        raise CheckpointError(where, "unknown model_type", expected=expected, found=model_type)
    return family
