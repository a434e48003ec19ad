"""config.json <-> ModelConfig, torch-free: every spelling is understood, kept and written back, or refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import moe
from moe import CheckpointError, ModelConfig, RopeParameters
from moe.checkpoint import read_config
from moe.checkpoint.format.config_json import parse_config, render_config
from moe.rope import attention_factor
from tests.support.checkpoint_cases import BY_FAMILY, V2, V3, V3_MTP, YARN, configs

PATH = Path("config.json")

V3_FILE = json.loads(json.dumps(render_config(V3, PATH)))
V2_FILE = json.loads(json.dumps(render_config(V2, PATH)))
# As DeepSeek publishes it.
OLD_YARN = {
    "beta_fast": 1,
    "beta_slow": 1,
    "factor": 8,
    "mscale": 0.8,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 16,
    "type": "yarn",
}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


NO_ROPE = without(V3_FILE, "rope_theta", "rope_scaling", "rope_parameters")


def fields(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, extra={})


@settings(deadline=None, derandomize=True, max_examples=80)
@given(configs("deepseek_v3") | configs("deepseek_v2"))
def test_round_trip(config: ModelConfig) -> None:
    values = json.loads(json.dumps(render_config(config, PATH)))
    back = parse_config(values, PATH)
    expected = config.num_key_value_heads or config.num_attention_heads
    assert fields(back) == dataclasses.replace(config, num_key_value_heads=expected)
    assert back.extra == {}
    assert render_config(back, PATH) == values


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "tiny", "bench_400m", "bench_1500m"),
        *("dots_llm1", "glm_4_7_flash", "ernie_4_5_21b_a3b", "ernie_4_5_300b_a47b"),
    ],
)
def test_presets_round_trip(name: str) -> None:
    config = moe.preset(name)
    back = parse_config(render_config(config, PATH), PATH)
    heads = None if config.is_mla else config.num_key_value_heads
    assert dataclasses.replace(back, num_key_value_heads=heads) == config


RELEASED = {
    # The first two as in each model's published config.json, without token ids, quantisation and the classes of remote
    # code. The others were put together from excerpts of the published files and from transformers' defaults, so single
    # keys may be missing in the real files or be spelt otherwise there.
    "deepseek_v3": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32,
        "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
        "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}""",
    "deepseek_v2_lite": """{"attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40,
        "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 102400}""",
    "dots_llm1": """{"architectures": ["Dots1ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 10944, "max_position_embeddings": 32768, "max_window_layers": 62, "model_type": "dots1",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 2, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts_per_tok": 6,
        "num_hidden_layers": 62, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "sliding_window": null,
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": true, "vocab_size": 152064}""",
    "glm_4_7_flash": """{"architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
        "kv_lora_rank": 512, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
        "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1,
        "norm_topk_prob": true, "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47,
        "num_key_value_heads": 20, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 1000000, "routed_scaling_factor": 1.8, "tie_word_embeddings": false, "topk_group": 1,
        "topk_method": "noaux_tc", "v_head_dim": 256, "vocab_size": 154880}""",
    "ernie_4_5_21b_a3b": """{"architectures": ["Ernie4_5_MoeForCausalLM"], "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072,
        "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536,
        "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_layer_start_index": 1,
        "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": true, "num_attention_heads": 20,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_bias": false,
        "use_cache": false, "vocab_size": 103424}""",
    "qwen3_0_6b": """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_the_presets(name: str) -> None:
    values = json.loads(RELEASED[name])
    config = parse_config(values, PATH)
    # The balance loss was a matter of training; V3's file does not say.
    heads, width = (None, None) if config.is_mla else (config.num_key_value_heads, config.qk_head_dim)
    trained = {key: getattr(moe.preset(name), key) for key in ("aux_loss_alpha", "seq_aux")}
    plain = dataclasses.replace(config, extra={}, num_key_value_heads=heads, head_dim=width, **trained)
    assert plain == moe.preset(name)
    assert without(values, "architectures", "torch_dtype").items() <= render_config(config, PATH).items()


def test_routing_is_always_written() -> None:
    assert (V3_FILE["scoring_func"], V3_FILE["topk_method"]) == ("sigmoid", "noaux_tc")
    assert (V2_FILE["scoring_func"], V2_FILE["topk_method"]) == ("softmax", "greedy")


def test_absent_routing_keys_take_the_familys_default() -> None:
    keys = ("scoring_func", "topk_method", "norm_topk_prob", "rope_interleave", "routed_scaling_factor")
    v3 = parse_config(without(V3_FILE, *keys), PATH)
    assert (v3.scoring_func, v3.topk_method, v3.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert (v3.rope_interleave, v3.routed_scaling_factor) == (True, 2.5)
    v2 = parse_config(without(V2_FILE, *keys), PATH)
    assert (v2.scoring_func, v2.topk_method, v2.norm_topk_prob) == ("softmax", "greedy", False)
    assert (v2.rope_interleave, v2.routed_scaling_factor) == (True, 1.0)


def test_null_routing_keys_are_absent_and_written_with_their_values() -> None:
    """For a topk_method of null vLLM leaves out the correction bias."""
    for family, file in (("deepseek_v3", V3_FILE), ("deepseek_v2", V2_FILE)):
        config = parse_config({**file, "scoring_func": None, "topk_method": None}, PATH)
        assert fields(config) == fields(parse_config(file, PATH)), family
        assert render_config(config, PATH) == file
    others = {"minimax_m2": "scoring_func", "dots1": "topk_method", "glm4_moe_lite": "topk_method"}
    for family, key in others.items():
        file = json.loads(json.dumps(render_config(BY_FAMILY[family], PATH)))
        config = parse_config({**file, key: None}, PATH)
        assert fields(config) == fields(parse_config(file, PATH)), family
        assert render_config(config, PATH).get(key) == file.get(key)


def test_null_groups_are_one_group_and_written_so() -> None:
    """vLLM takes the number as it is, and fails on null."""
    config = parse_config({**V2_FILE, "n_group": None, "topk_group": None}, PATH)
    assert (config.n_group, config.topk_group) == (1, 1)
    assert render_config(config, PATH)["n_group"] == 1


def test_group_numbers_that_greedy_ignores_are_not_written() -> None:
    """vLLM and llama.cpp limit routing to groups by their number alone."""
    config = parse_config({**V2_FILE, "n_group": 8, "topk_group": 3}, PATH)
    assert (config.n_group, config.topk_group) == (1, 1)
    assert (render_config(config, PATH)["n_group"], render_config(config, PATH)["topk_group"]) == (1, 1)
    limited = dataclasses.replace(config, topk_method="group_limited_greedy", n_group=4, topk_group=2)
    assert render_config(limited, PATH)["n_group"] == 4


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000, "rope_scaling": OLD_YARN},
        {"rope_scaling": {**without(OLD_YARN, "type"), "rope_type": "yarn"}},
        {"rope_parameters": {**without(OLD_YARN, "type"), "rope_type": "yarn", "rope_theta": 10000.0}},
        {"rope_parameters": {**OLD_YARN, "rope_type": "yarn"}, "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {**OLD_YARN, "partial_rotary_factor": 1.0, "truncate": None}},
        {"rope_parameters": OLD_YARN, "original_max_position_embeddings": 16},
        {"rope_parameters": OLD_YARN, "rope_scaling": {**OLD_YARN, "beta_slow": None}},
        {"rope_scaling": {**OLD_YARN, "attn_factor": 1.0}},
        {"rope_parameters": {**OLD_YARN, "attn_factor": 1}},
    ],
)
def test_every_form_of_rope_means_the_same_and_is_kept(rope: dict[str, Any]) -> None:
    config = parse_config({**NO_ROPE, **rope}, PATH)
    assert config.rope_parameters == YARN
    written = render_config(config, PATH)
    assert rope.items() <= written.items()
    assert fields(parse_config(written, PATH)) == fields(config)


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_an_attention_factor_that_says_what_is_computed_anyway_is_kept(where: str) -> None:
    """mscale over mscale_all_dim is 1; with another factor the engines would compute another function."""
    config = parse_config({**NO_ROPE, where: {**OLD_YARN, "attention_factor": 1.0}}, PATH)
    assert attention_factor(dataclasses.replace(YARN, attention_factor=1.0)) == attention_factor(YARN) == 1
    assert config.rope_parameters == YARN
    for rope in (YARN, dataclasses.replace(YARN, attention_factor=1.0)):
        assert not dataclasses.replace(V3, rope_parameters=rope).family_problems()
    written = render_config(config, PATH)
    assert written[where] == {**OLD_YARN, "attention_factor": 1.0}
    assert config.family_problems() == ()
    for factor, problem in ((1.5, "attention_factor"), (True, "attention_factor")):
        with pytest.raises(CheckpointError, match=problem):
            other = parse_config({**NO_ROPE, where: {**OLD_YARN, "attention_factor": factor}}, PATH)
            render_config(other, PATH)
    with pytest.raises(CheckpointError, match=r"attn_factor is not supported; found 2\.0"):
        parse_config({**NO_ROPE, where: {**OLD_YARN, "attn_factor": 2.0}}, PATH)


@pytest.mark.parametrize("file", [{"sliding_window": None}, {}])
def test_a_mixtral_without_a_window_is_written_as_it_was_and_one_with_a_window_is_refused(file: dict[str, Any]) -> None:
    """As Mixtral-8x7B's file has it, and as the first releases and Mistral's have it."""
    whole = json.loads(json.dumps(render_config(BY_FAMILY["mixtral"], PATH)))
    released = without(whole, "sliding_window", "head_dim", "rope_parameters", "partial_rotary_factor") | file
    released |= {"output_router_logits": False, "router_aux_loss_coef": 0.02, "attention_dropout": 0.0}
    config = parse_config({**released, "head_dim": BY_FAMILY["mixtral"].head_dim}, PATH)
    assert config.sliding_window is None
    assert released.items() <= render_config(config, PATH).items()

    sliding = parse_config({**whole, "sliding_window": 4096}, PATH)
    assert sliding.sliding_window == 4096 and sliding.is_sliding_layer(0)
    message = "sliding_window: SGLang and llama.cpp attend to all tokens; expected none; found 4096"
    assert sliding.family_problems() == (message,)
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        render_config(sliding, PATH)


def test_readers_of_both_generations_find_their_rope() -> None:
    written = render_config(dataclasses.replace(V3, rope_parameters=YARN), PATH)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10000.0
    assert written["rope_scaling"].items() >= OLD_YARN.items()
    assert written["rope_parameters"].items() >= (OLD_YARN | {"rope_type": "yarn"}).items() - {("type", "yarn")}
    assert (V3_FILE["rope_scaling"], V3_FILE["rope_theta"]) == (None, 10000.0)


def test_a_changed_rope_replaces_the_one_that_was_read() -> None:
    config = parse_config({**NO_ROPE, "rope_theta": 10000, "rope_scaling": OLD_YARN}, PATH)
    for rope in (dataclasses.replace(YARN, factor=16.0), RopeParameters(rope_theta=5e5)):
        written = render_config(dataclasses.replace(config, rope_parameters=rope), PATH)
        assert parse_config(written, PATH).rope_parameters == rope
        assert written["rope_theta"] == rope.rope_theta


def test_theta_alone() -> None:
    assert parse_config({**NO_ROPE, "rope_theta": 5e5}, PATH).rope_parameters == RopeParameters(rope_theta=5e5)
    assert parse_config(NO_ROPE, PATH).rope_parameters == RopeParameters()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": (
        {**V3_FILE, "model_type": "llama"},
        "model_type; expected one of deepseek_v3, kimi_k2, deepseek_v2",
    ),
    "no family": (without(V3_FILE, "model_type"), "model_type"),
    "family is a list": ({**V3_FILE, "model_type": ["deepseek_v3"]}, "model_type"),
    "activation": ({**V3_FILE, "hidden_act": "gelu"}, "hidden_act"),
    "dropout": ({**V3_FILE, "attention_dropout": 0.1}, "attention_dropout"),
    "MLP bias": ({**V2_FILE, "mlp_bias": True}, "mlp_bias"),
    "MoE in every second layer": ({**V3_FILE, "moe_layer_freq": 2}, "moe_layer_freq"),
    "partial rotary": ({**V3_FILE, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotary inside": (
        {**V3_FILE, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "rope type": ({**NO_ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
    "rope of unknown kind": ({**NO_ROPE, "rope_parameters": {"mrope_section": [1, 2]}}, "mrope_section"),
    "rope types disagree": ({**NO_ROPE, "rope_scaling": {**OLD_YARN, "rope_type": "default"}}, "has two values"),
    "rope forms disagree": (
        {**NO_ROPE, "rope_scaling": OLD_YARN, "rope_parameters": {**OLD_YARN, "factor": 9.0}},
        "disagree",
    ),
    "theta twice": (
        {**NO_ROPE, "rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
        "rope_theta has two values",
    ),
    "original length twice": (
        {**NO_ROPE, "rope_parameters": OLD_YARN, "original_max_position_embeddings": 32},
        "original_max_position_embeddings has two values",
    ),
    "factor without a type": ({**NO_ROPE, "rope_scaling": without(OLD_YARN, "type")}, "factor without a rope_type"),
    "yarn without its length": (
        {**NO_ROPE, "rope_scaling": without(OLD_YARN, "original_max_position_embeddings")},
        "original_max_position_embeddings",
    ),
    "rope is a list": ({**NO_ROPE, "rope_scaling": [1]}, "rope_scaling"),
    "V2 with normalised weights": ({**V2_FILE, "norm_topk_prob": True}, "norm_topk_prob"),
    "V2 in halves": ({**V2_FILE, "rope_interleave": False}, "rope_interleave"),
    "V2 with a bias": ({**V2_FILE, "topk_method": "noaux_tc"}, "topk_method"),
    "V2 with sigmoid": ({**V2_FILE, "scoring_func": "sigmoid"}, "scoring_func"),
    "V2 with MTP": ({**V2_FILE, "num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
    "V3 with softmax": ({**V3_FILE, "scoring_func": "softmax"}, "scoring_func"),
    "V3 without bias": ({**V3_FILE, "topk_method": "greedy"}, "topk_method"),
    "size missing": (without(V3_FILE, "hidden_size"), "hidden_size: deepseek_v3 requires a value"),
    "size null": ({**V3_FILE, "kv_lora_rank": None}, "kv_lora_rank: deepseek_v3 requires a value"),
    "size is text": ({**V3_FILE, "hidden_size": "42"}, "hidden_size"),
    "size is a fraction": ({**V3_FILE, "hidden_size": 42.0}, "hidden_size"),
    "size absurd": ({**V3_FILE, "vocab_size": 2**60}, "vocab_size"),
    "dense layers null": ({**V3_FILE, "first_k_dense_replace": None}, "first_k_dense_replace"),
    "rope width twice": ({**V3_FILE, "head_dim": 2}, "head_dim disagrees with the sizes from which it is derived"),
    "head width twice": ({**V3_FILE, "qk_head_dim": 2}, "qk_head_dim disagrees"),
    "size beyond floats": ({**V3_FILE, "rms_norm_eps": 10**400}, "rms_norm_eps"),
    "grouped-query": ({**V3_FILE, "num_key_value_heads": 1}, "num_key_value_heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_function_is_refused_by_name(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_config(values, PATH)
    assert str(caught.value).startswith("config.json: ")


def test_unknown_keys_are_kept() -> None:
    more = {"bos_token_id": 0, "eos_token_id": [1, 2], "auto_map": {"A": "b.C"}, "head_dim": 8, "pad_token_id": None}
    config = parse_config({**V3_FILE, **more}, PATH)
    assert config.extra == more
    assert more.items() <= render_config(config, PATH).items()


def test_keys_that_repeat_sizes_follow_them() -> None:
    """transformers computes with head_dim, and a stale one is a model that it cannot load."""
    given = {"head_dim": V3.qk_rope_head_dim, "qk_head_dim": V3.qk_head_dim}
    config = parse_config({**V3_FILE, **given}, PATH)
    assert given.items() <= render_config(config, PATH).items()
    wider = dataclasses.replace(config, qk_rope_head_dim=2 + (V3.qk_rope_head_dim or 0))
    again = render_config(wider, PATH)
    assert (again["head_dim"], again["qk_head_dim"]) == (wider.qk_rope_head_dim, wider.qk_head_dim)


def test_more_dense_layers_than_layers_is_all() -> None:
    """The default of transformers, 3, in a model of two layers."""
    config = parse_config({**V3_FILE, "num_hidden_layers": 2, "first_k_dense_replace": 3}, PATH)
    assert config.first_k_dense_replace == 2
    assert render_config(config, PATH)["first_k_dense_replace"] == 3


def test_what_describes_the_files_is_not_kept() -> None:
    stored = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "architectures": ["X"], "quantization_config": {"a": 1}}
    assert parse_config({**V3_FILE, **stored}, PATH).extra == {}


GQA = dataclasses.replace(
    V3, kv_lora_rank=None, q_lora_rank=None, qk_nope_head_dim=None, qk_rope_head_dim=None, v_head_dim=None
)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (GQA, "kv_lora_rank"),
        (dataclasses.replace(V3, scoring_func="softmax"), "scoring_func"),
        (dataclasses.replace(V3, topk_method="group_limited_greedy"), "topk_method"),
        (dataclasses.replace(V2, norm_topk_prob=True), "norm_topk_prob"),
        (dataclasses.replace(V2, rope_interleave=False), "rope_interleave"),
        (dataclasses.replace(V3_MTP, model_type="deepseek_v2", norm_topk_prob=False), "scoring_func"),
        (dataclasses.replace(V3, model_type="llama"), "model_type"),
        (dataclasses.replace(V3, model_type="mixtral"), "n_shared_experts"),
        (dataclasses.replace(V3, extra={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ],
)
def test_a_config_that_the_readers_cannot_express_is_not_written(config: ModelConfig, field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        render_config(config, PATH)


def test_a_field_overrides_the_same_key_of_extra() -> None:
    config = dataclasses.replace(V3, extra={"n_group": 3, "hidden_act": "gelu", "dtype": "int8"})
    written = render_config(config, PATH)
    assert (written["n_group"], written["hidden_act"]) == (4, "silu")
    assert "dtype" not in written


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        read_config(tmp_path)


def test_config_and_headers_need_no_torch() -> None:
    code = "import sys, moe.checkpoint, moe.counts; assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(moe.__file__).parents[1])


def test_what_transformers_takes_is_taken() -> None:
    """Keys that its configurations omit or set to null, with the values that it gives them."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    qwen = dict(model_type="qwen3_moe", vocab_size=61, hidden_size=42, num_hidden_layers=3, num_attention_heads=6)
    qwen |= dict(num_key_value_heads=3, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10)
    qwen |= dict(intermediate_size=20, max_position_embeddings=64, router_aux_loss_coef=0.9)
    assert parse_config({**qwen, "mlp_only_layers": [1, 7]}, PATH).mlp_only_layers == (1,)
    assert not parse_config(qwen, PATH).norm_topk_prob
    config = parse_config({**qwen, "rope_scaling": yarn, "mlp_only_layers": [7], "norm_topk_prob": True}, PATH)
    assert config.rope_parameters.original_max_position_embeddings == 64
    assert config.aux_loss_alpha == 0  # its loss is another, and off
    again = render_config(config, PATH)
    assert again["router_aux_loss_coef"] == 0.9
    trained = dataclasses.replace(config, aux_loss_alpha=0.01)
    assert parse_config(render_config(trained, PATH), PATH).aux_loss_alpha == 0.01


def test_keys_that_are_not_read_may_hold_what_python_alone_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = json.dumps(V3_FILE)[:-1] + ', "a": NaN, "b": [{"c": -Infinity}], "d": 1, "d": {"e": 2, "e": 3}, "f": [null]}'
    (tmp_path / "config.json").write_text(text)
    config = read_config(tmp_path)
    assert config.extra == {"d": {"e": 3}, "f": [None]}
    assert [m.partition("config.json: ")[2] for m in caplog.messages] == [
        "a is left out, because it contains nan",
        "b is left out, because it contains -inf",
    ]
    moe.Transformer(config).save(tmp_path / "saved")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    saved = json.loads((tmp_path / "saved" / "config.json").read_text(), parse_constant=refuse)
    assert saved["d"] == {"e": 3} and saved["f"] == [None] and "a" not in saved and "b" not in saved


@pytest.mark.parametrize("key", ["use_sliding_window", "layer_types", "rotary_dim", "head_dim", "rope_theta"])
def test_nan_in_a_key_that_is_read_is_refused(key: str) -> None:
    """Python takes NaN for true, and a key that only decides how others are read has no field that refuses it."""
    family = {"use_sliding_window": "qwen3_moe", "layer_types": "gpt_oss", "rotary_dim": "minimax_m2"}
    values = {"model_type": family.get(key, "deepseek_v3")}
    with pytest.raises(
        CheckpointError, match=f"p: {key} is ambiguous; expected one value, and finite numbers; found nan"
    ):
        parse_config({**values, key: float("nan")}, Path("p"))


DOTS1_FILE = json.loads(RELEASED["dots_llm1"])
GLM_LITE_FILE = json.loads(RELEASED["glm_4_7_flash"])
ERNIE_FILE = json.loads(RELEASED["ernie_4_5_21b_a3b"])
QWEN3_FILE = json.loads(RELEASED["qwen3_0_6b"])


def test_windows_of_dots1() -> None:
    """transformers' defaults, where a file leaves them out: a window of 4,096 from layer 62 on."""
    deep = {**without(DOTS1_FILE, "sliding_window", "max_window_layers"), "num_hidden_layers": 64}
    config = parse_config(deep, PATH)
    assert config.sliding_window == 4096
    assert [i for i in range(64) if config.is_sliding_layer(i)] == [62, 63]
    assert parse_config({**deep, "num_hidden_layers": 62}, PATH).sliding_window is None
    types = ["sliding_attention", "full_attention"]
    config = parse_config({**DOTS1_FILE, "num_hidden_layers": 2, "layer_types": types, "sliding_window": 8}, PATH)
    assert (config.sliding_window, config.layer_types) == (8, tuple(types))


def test_windows_of_qwen3() -> None:
    """transformers' defaults: none, or with use_sliding_window 4,096 tokens from layer 28 on."""
    deep = {**without(QWEN3_FILE, "sliding_window", "max_window_layers"), "num_hidden_layers": 30}
    assert parse_config(deep, PATH).sliding_window is None
    config = parse_config({**deep, "use_sliding_window": True}, PATH)
    assert config.sliding_window == 4096
    assert [i for i in range(30) if config.is_sliding_layer(i)] == [28, 29]
    for use, window in ((True, 8), (False, None)):
        values = {"num_hidden_layers": 3, "use_sliding_window": use, "sliding_window": 8, "max_window_layers": 1}
        config = parse_config({**QWEN3_FILE, **values}, PATH)
        assert config.sliding_window == window
        assert [config.is_sliding_layer(i) for i in range(3)] == [False, use, use]
    types = ["sliding_attention", "full_attention"]
    values = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    assert parse_config({**QWEN3_FILE, **values}, PATH).layer_types == tuple(types)


def test_a_family_has_experts_or_none() -> None:
    dense = moe.preset("qwen3_0_6b")
    (problem,) = dataclasses.replace(moe.preset("qwen3_30b_a3b"), model_type="qwen3").family_problems()
    assert problem == "n_routed_experts: qwen3 is a family without experts; expected 0; found 128"
    (problem,) = dataclasses.replace(dense, model_type="deepseek_v3", qk_norm="none").family_problems()
    assert problem == "n_routed_experts: deepseek_v3 is a family with experts; expected 1 or more; found 0"
    sparse = json.loads(json.dumps(render_config(moe.preset("qwen3_30b_a3b"), PATH)))
    with pytest.raises(CheckpointError, match="num_experts: qwen3_moe is a family with experts; expected 1 or more"):
        parse_config({**sparse, "num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}, PATH)
    written = render_config(dense, PATH)
    assert not [key for key in written if "expert" in key or "moe" in key or "aux" in key or "mtp" in key]


def test_dense_layers_of_glm4_moe_lite() -> None:
    """A list to transformers, a number to the engines: either is read, and both are written."""
    file = {**GLM_LITE_FILE, "num_hidden_layers": 4, "num_nextn_predict_layers": 0}
    neither = parse_config(without(file, "first_k_dense_replace"), PATH)
    assert [neither.is_moe_layer(i) for i in range(4)] == [False, True, True, True]
    assert parse_config({**file, "first_k_dense_replace": 3}, PATH).first_k_dense_replace == 3
    types = ["dense", "sparse", "dense", "sparse"]
    config = parse_config({**without(file, "first_k_dense_replace"), "mlp_layer_types": types}, PATH)
    assert (config.first_k_dense_replace, config.mlp_only_layers) == (1, (2,))
    with pytest.raises(CheckpointError, match="mlp_only_layers: SGLang builds experts in them"):
        render_config(config, PATH)
    for leading in (
        dataclasses.replace(config, first_k_dense_replace=2, mlp_only_layers=()),
        dataclasses.replace(config, first_k_dense_replace=0, mlp_only_layers=(1, 0)),
    ):
        written = render_config(leading, PATH)
        assert written["mlp_layer_types"] == ["dense", "dense", "sparse", "sparse"]
        assert written["first_k_dense_replace"] == 2


def test_vllm_finds_the_keys_that_it_looks_for() -> None:
    """Without them it raises AttributeError, or routes by softmax."""
    dots = render_config(moe.preset("dots_llm1"), PATH)
    assert (dots["scoring_func"], dots["topk_method"], dots["moe_layer_freq"]) == ("sigmoid", "noaux_tc", 1)
    early = parse_config({**DOTS1_FILE, "scoring_func": "noaux_tc"}, PATH)  # as it was called at first
    assert render_config(early, PATH)["scoring_func"] == "sigmoid"
    glm = render_config(moe.preset("glm_4_7_flash"), PATH)
    assert (glm["scoring_func"], glm["topk_method"], glm["moe_layer_freq"]) == ("sigmoid", "noaux_tc", 1)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1, 2, 3]),
        ({"moe_layer_end_index": -1}, [1, 2, 3]),
        ({"moe_layer_end_index": 2}, [1, 2]),
        ({"moe_layer_end_index": 9}, [1, 2, 3]),
        ({"moe_layer_end_index": -2}, []),
        ({"moe_layer_interval": 2}, [1, 3]),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 2}, [3]),
        ({"moe_layer_interval": 3, "moe_layer_end_index": 2}, [2]),
        ({"moe_layer_start_index": 3, "moe_layer_end_index": 1}, []),
    ],
)
def test_layers_with_experts_of_ernie(keys: dict[str, int], expected: list[int]) -> None:
    config = parse_config({**without(ERNIE_FILE, "moe_layer_end_index"), "num_hidden_layers": 4, **keys}, PATH)
    assert [i for i in range(4) if config.is_moe_layer(i)] == expected
    back = parse_config(render_config(config, PATH), PATH)
    assert [i for i in range(4) if back.is_moe_layer(i)] == expected


@pytest.mark.parametrize("inner", ["kimi_k2", "deepseek_v3", None])
def test_the_text_of_kimi_k25(inner: str | None) -> None:
    """Keys outside text_config apply to the whole model: transformers and vLLM read them there."""
    text = {**V3_FILE, "model_type": inner, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    text |= {"eos_token_id": 1, "use_cache": True}
    outside = {"tie_word_embeddings": True, "eos_token_id": 2, "image_token_id": 5, "vision_config": {"patch_size": 14}}
    config = parse_config({"model_type": "kimi_k25", "text_config": text, **outside}, PATH)
    assert fields(config) == dataclasses.replace(
        V3, model_type="kimi_k25", tie_word_embeddings=True, num_key_value_heads=V3.num_attention_heads
    )
    assert config.extra == {"eos_token_id": 2, "use_cache": True}
    written = render_config(config, PATH)
    assert (written["model_type"], written["eos_token_id"]) == ("deepseek_v3", 2)


def test_presets_of_kimi_differ_only_in_what_a_longer_context_needs() -> None:
    k2, k25 = moe.preset("kimi_k2"), moe.preset("kimi_k2_5")
    same = {"model_type", "rope_parameters", "max_position_embeddings", "rms_norm_eps"}
    different = {f.name for f in dataclasses.fields(k2) if getattr(k2, f.name) != getattr(k25, f.name)}
    assert different == same
    assert (k25.rope_parameters.factor, k25.max_position_embeddings) == (64.0, 64 * 4096)


REFUSED_BY_FAMILY: dict[str, tuple[dict[str, Any], str]] = {
    "dots1 with softmax": ({**DOTS1_FILE, "scoring_func": "softmax"}, "scoring_func is not supported"),
    "dots1 without bias": ({**DOTS1_FILE, "topk_method": "greedy"}, "topk_method is not supported"),
    "dots1 with MoE in every second layer": ({**DOTS1_FILE, "moe_layer_freq": 2}, "moe_layer_freq"),
    "dots1 with a window of nothing": (
        {**DOTS1_FILE, "sliding_window": 0, "max_window_layers": 3},
        "sliding_window = 0",
    ),
    "dots1 with a text for its first window": (
        {**DOTS1_FILE, "sliding_window": 4, "max_window_layers": "x"},
        "max_window_layers = 'x': expected an integer",
    ),
    "dots1 with layer types of another model": ({**DOTS1_FILE, "layer_types": ["full_attention"]}, "layer_types"),
    "GLM with too few layer types": ({**GLM_LITE_FILE, "mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
    "GLM with a layer of another kind": (
        {**GLM_LITE_FILE, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "moe"]},
        "mlp_layer_types = .*: expected 'dense' or 'sparse' for each layer",
    ),
    "GLM with two counts of dense layers": (
        {**GLM_LITE_FILE, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "dense", "sparse"]},
        "first_k_dense_replace = 1: expected 2, the leading dense layers of mlp_layer_types",
    ),
    "ERNIE with biases": ({**ERNIE_FILE, "use_bias": True}, "use_bias is not supported"),
    "ERNIE with sigmoid": ({**ERNIE_FILE, "moe_gate_act": "sigmoid"}, "moe_gate_act is not supported"),
    "ERNIE without correction bias": ({**ERNIE_FILE, "moe_use_aux_free": False}, "moe_use_aux_free is not supported"),
    "ERNIE with half of each head rotated": (
        {**ERNIE_FILE, "partial_rotary_factor": 0.5},
        "partial_rotary_factor is not supported",
    ),
    "ERNIE with a text for its last layer": (
        {**ERNIE_FILE, "moe_layer_end_index": "last"},
        "moe_layer_end_index = 'last': expected an integer",
    ),
    "ERNIE with two counts of experts": ({**ERNIE_FILE, "num_experts": 32}, "moe_num_experts and num_experts disagree"),
    "ERNIE with images": ({**ERNIE_FILE, "model_type": "ernie4_5_vl_moe"}, "model_type; expected one of"),
    "Kimi-K2.5 without its text": ({"model_type": "kimi_k25", "vision_config": {}}, "text_config; expected an object"),
    "Kimi-K2.5 with another text": (
        {"model_type": "kimi_k25", "text_config": {**V3_FILE, "model_type": "llama"}},
        "text_config.model_type; expected deepseek_v3 or kimi_k2; found 'llama'",
    ),
    "Kimi-K2.5 with nonsense in its text": (
        {"model_type": "kimi_k25", "text_config": {**V3_FILE, "hidden_size": "wide"}},
        "hidden_size = 'wide': expected an integer",
    ),
    "GLM with softmax": ({**GLM_LITE_FILE, "scoring_func": "softmax"}, "scoring_func is not supported"),
}


@pytest.mark.parametrize("case", REFUSED_BY_FAMILY)
def test_what_a_family_cannot_be_is_refused_by_name(case: str) -> None:
    values, message = REFUSED_BY_FAMILY[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_config(values, PATH)
    assert str(caught.value).startswith("config.json: ")
