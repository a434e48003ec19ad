"""Configs that make no sense are refused before anything is allocated, naming field, value and what is allowed."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe.config import SwiGLU
from moe.errors import did_you_mean, nearest
from moe.presets import PRESETS

V3 = moe.preset("deepseek_v3")

NO_EXPERTS: dict[str, Any] = dict(n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"num_experts_per_tok": 0}, "num_experts_per_tok", "from 1"),
    ({"n_routed_experts": 0}, "n_routed_experts", "from 1"),
    (NO_EXPERTS, "num_nextn_predict_layers", "0 without n_routed_experts"),
    ({**NO_EXPERTS, "num_experts_per_tok": 2}, "moe_intermediate_size", "from 1"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok", "at most n_routed_experts (256)"),
    ({"num_experts_per_tok": 200}, "num_experts_per_tok", "at most 128"),
    ({"n_group": 7}, "n_routed_experts", "a multiple of n_group (7)"),
    ({"topk_group": 9}, "topk_group", "at most n_group (8)"),
    ({"topk_method": "greedy"}, "n_group", "1 with topk_method 'greedy'"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim", "even"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps", "finite"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps", "between 0 and 1"),
    ({"routed_scaling_factor": math.inf}, "routed_scaling_factor", "finite"),
    ({"routed_scaling_factor": -1.0}, "routed_scaling_factor", "above 0"),
    ({"hidden_size": "7168"}, "hidden_size", "an integer"),
    ({"hidden_size": 7168.0}, "hidden_size", "an integer"),
    ({"hidden_size": True}, "hidden_size", "an integer"),
    ({"hidden_size": 0}, "hidden_size", "from 1"),
    ({"hidden_size": -8}, "hidden_size", "from 1"),
    ({"hidden_size": 2**40}, "hidden_size", "to 16777216"),
    ({"hidden_size": 2**20, "moe_intermediate_size": 2**20}, "n_routed_experts", "2^46"),
    ({"hidden_size": 2**20, "intermediate_size": 2**20}, "intermediate_size", "2^46"),
    ({"hidden_size": 2**24, "vocab_size": 2**24}, "vocab_size", "2^46"),
    ({"moe_intermediate_size": 2**24}, "n_routed_experts", "2^46"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps", "finite"),
    ({"rms_norm_eps": 10**5000}, "rms_norm_eps", "finite"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers", "at most 10000"),
    ({"scoring_func": "tanh"}, "scoring_func", "sigmoid, softmax"),
    ({"topk_method": None}, "topk_method", "noaux_tc"),
    ({"norm_topk_prob": 1}, "norm_topk_prob", "true or false"),
    ({"first_k_dense_replace": 62}, "first_k_dense_replace", "num_hidden_layers (61)"),
    ({"qk_nope_head_dim": None}, "qk_nope_head_dim", "kv_lora_rank selects MLA"),
    ({"head_dim": 64}, "head_dim", "None with MLA"),
    ({"num_key_value_heads": 8}, "num_key_value_heads", "num_attention_heads (128)"),
    ({"qk_norm": "head"}, "qk_norm", "'none' with MLA"),
    ({"kv_lora_rank": None}, "q_lora_rank", "None without kv_lora_rank"),
    ({"aux_loss_alpha": -1e-4}, "aux_loss_alpha", "at least 0"),
    ({"moe_norm_min": -1e-12}, "moe_norm_min", "at least 0"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "0 to 1024"),
    ({"rope_parameters": {}}, "rope_parameters", "RopeParameters"),
    ({"model_type": 3}, "model_type", "a string"),
    ({"extra": None}, "extra", "a mapping"),
]


@pytest.mark.parametrize(
    ("change", "field", "allowed"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _, _) in enumerate(BAD)]
)
def test_nonsense_is_refused_by_name(change: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(moe.ConfigError) as caught:
        dataclasses.replace(V3, **change)
    assert caught.value.field == field
    assert allowed in str(caught.value)
    assert str(caught.value).startswith(f"{field} = ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_theta": 0.5}, "rope_parameters.rope_theta"),
        ({"rope_theta": math.nan}, "rope_parameters.rope_theta"),
        ({"rope_type": "llama3"}, "rope_parameters.rope_type"),
        ({"rope_type": "yarn"}, "rope_parameters.factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "rope_parameters.factor"),
        ({"rope_type": "yarn", "factor": 4.0}, "rope_parameters.original_max_position_embeddings"),
        ({"beta_fast": 0.0}, "rope_parameters.beta_fast"),
        ({"mscale": -1.0}, "rope_parameters.mscale"),
    ],
)
def test_rope_nonsense_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(moe.ConfigError) as caught:
        moe.RopeParameters(**change)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0.0}, "limit = 0.0: expected a positive number, or None"),
        ({"limit": math.inf}, "limit = inf: expected a finite number"),
        ({"alpha": math.nan}, "alpha = nan: expected a finite number"),
        ({"alpha": None}, "alpha = None: expected a finite number"),
        ({"beta": "1"}, "beta = '1': expected a finite number"),
    ],
)
def test_activation_nonsense_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(moe.ConfigError, match=message):
        SwiGLU(**change)


def test_a_config_is_a_plain_value() -> None:
    copied = pickle.loads(pickle.dumps(V3))
    assert copied == V3 and copied.selection == V3.selection and copied.activation == SwiGLU()
    assert dataclasses.replace(V3, swiglu_limit=7.0, swiglu_beta=1.0).activation == SwiGLU(7.0, beta=1.0)
    assert dataclasses.replace(V3, n_group=4) != V3
    with pytest.raises(dataclasses.FrozenInstanceError):
        V3.n_group = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_unknown_and_missing_fields() -> None:
    values = V3.to_dict()
    with pytest.raises(
        moe.ConfigError, match="num_expert_per_tok = 8: expected no such field; did you mean num_experts"
    ):
        moe.ModelConfig.from_dict({**values, "num_expert_per_tok": 8})
    with pytest.raises(moe.ConfigError, match=r"rope_parameters\.theta"):
        moe.ModelConfig.from_dict({**values, "rope_parameters": {"theta": 1}})
    del values["hidden_size"]
    with pytest.raises(moe.ConfigError, match="hidden_size = None: expected a value"):
        moe.ModelConfig.from_dict(values)


def test_a_path_is_shown_whole_and_a_megabyte_by_its_ends() -> None:
    path = "/" + "folder/" * 30 + "file.txt"
    assert str(moe.ConfigError("--data", path, "a file")) == f"--data = {path!r}: expected a file"
    assert str(moe.ConfigError("--data", Path(path), "a file")) == f"--data = {path!r}: expected a file"
    message = str(moe.ConfigError("name", "begin" + "-" * 10**6 + "end\n", "a name"))
    assert message.startswith("name = 'begin-") and message.endswith("-end\\n': expected a name") and len(message) < 400


def test_presets_round_trip_and_unknown_preset() -> None:
    for config in PRESETS.values():
        assert moe.ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(moe.ConfigError, match="did you mean deepseek_v3"):
        moe.preset("deepseek-v3")


def test_tiny_keeps_every_part_of_deepseek_v3() -> None:
    tiny = moe.preset("tiny")
    assert tiny.is_mla and tiny.kv_lora_rank and tiny.q_lora_rank
    assert tiny.first_k_dense_replace == 1 and tiny.n_shared_experts == 1 and tiny.num_nextn_predict_layers == 1
    assert (tiny.scoring_func, tiny.topk_method) == ("sigmoid", "noaux_tc")
    assert 1 < tiny.topk_group < tiny.n_group


def test_a_refused_model_allocates_nothing() -> None:
    before = torch.get_rng_state()
    with pytest.raises(moe.ConfigError):
        moe.MoELayer(64, 32, n_routed_experts=4, num_experts_per_tok=5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("tyni", ["tiny", "tune"], "tiny"),
        ("itny", ["tiny"], "tiny"),
        ("Tiyn", ["tiny"], "tiny"),
        ("fp23", ["fp8", "fp16", "fp32"], "fp32"),
        ("tinn", ["tiny"], "tiny"),
        ("tinyny", ["tiny"], "tiny"),
        ("ynit", ["tiny"], None),  # all four letters have changed places
        ("", ["tiny"], None),
        ("tiny", [], None),
    ],
)
def test_did_you_mean(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, known) == expected
    assert did_you_mean(name, known) == (f"; did you mean {expected}?" if expected else "")
