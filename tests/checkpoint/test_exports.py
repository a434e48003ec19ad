"""Exports mean the same in every engine: each field of each family, fields without effect, and transformers."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import CheckpointError, ConfigError, ModelConfig, RopeParameters
from moe.checkpoint import interleave
from moe.checkpoint.format.config_json import parse_config, render_config
from moe.checkpoint.format.families import FAMILIES
from moe.checkpoint.format.family import setting
from moe.presets import PRESETS
from tests.support.checkpoint_cases import V3, build
from tests.support.export_cases import BASE, MLA_YARN, OTHERS, YARN, changed

PATH = Path("config.json")


# Families, field and values of which some engine computes something else than transformers, without an error. The
# sources: vLLM 0.33.0, SGLang 0.5.23, llama.cpp of llama-cpp-python 0.3.36. None: every family.
MLA = ("deepseek_v3", "kimi_k2", "deepseek_v2", "glm4_moe_lite", "kimi_k25")
GQA = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss", "olmoe", "minimax_m2", "dots1")
DIFFERENT: list[tuple[tuple[str, ...], str, Any]] = [
    (MLA, "rope_interleave", False),
    (MLA, "attention_bias", True),
    (MLA, "rms_norm_eps", 1e-3),
    (("olmoe",), "rms_norm_eps", 1e-6),
    (("olmoe", "qwen2_moe"), "norm_topk_prob", True),
    (("qwen3_moe",), "norm_topk_prob", False),
    (("olmoe", "qwen3_moe", "dots1", "qwen3"), "attention_bias", True),
    (GQA, "tie_word_embeddings", True),
    (("mixtral", "qwen2_moe", "qwen3_moe", "dots1", "qwen3"), "sliding_window", 7),
    (("qwen2_moe", "qwen3_moe"), "mlp_only_layers", (1,)),
    (("glm4_moe_lite",), "decoder_sparse_step", 2),
    (("glm4_moe_lite",), "tie_word_embeddings", True),
    (("ernie4_5_moe",), "moe_norm_min", 0.1),
    (("ernie4_5_moe",), "rope_parameters", dataclasses.replace(YARN, attention_factor=1.1)),
    (("ernie4_5_moe",), "rope_parameters", dataclasses.replace(YARN, truncate=False)),
    (("qwen2_moe", "qwen3_moe"), "decoder_sparse_step", 2),
    (("gpt_oss",), "swiglu_limit", 1.0),
    (("gpt_oss",), "swiglu_alpha", 1.5),
    (("gpt_oss",), "layer_types", ("full_attention", "sliding_attention") * 2),
    (("gpt_oss",), "sliding_window", None),
    (("mixtral",), "rope_parameters", YARN),
    (("mixtral",), "rope_parameters", RopeParameters(rope_theta=12345.5)),
    (MLA, "rope_parameters", YARN),
    (MLA, "rope_parameters", dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=0.8)),
    *(
        ((*MLA, *GQA, "qwen3"), "rope_parameters", dataclasses.replace(YARN, **more))
        for more in ({"attention_factor": 1.1}, {"mscale": 0.7})
    ),
    *(
        (models, "rope_parameters", dataclasses.replace(yarn, **more))
        for models, yarn in ((MLA, MLA_YARN), ((*GQA, "ernie4_5_moe", "qwen3"), YARN))
        for more in ({"beta_fast": 16.0}, {"beta_slow": 2.0})
    ),
    (("glm4_moe",), "n_shared_experts", 0),
    (tuple({*MLA, *GQA, "qwen3"} - {"gpt_oss"}), "rope_parameters", dataclasses.replace(YARN, truncate=False)),
    (
        ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "dots1", "ernie4_5_moe", "qwen3"),
        "rope_parameters",
        RopeParameters(partial_rotary_factor=0.25),
    ),
]


# What a problem with a field may be called instead.
ALIASES = {
    "n_shared_experts": ("shared_expert_intermediate_size",),
    "shared_expert_intermediate_size": ("n_shared_experts",),
    "decoder_sparse_step": ("mlp_only_layers",),
    "sliding_window": ("layer_types",),
    "layer_types": ("sliding_window",),
    "rope_parameters": ("partial_rotary_factor",),
}


def small(config: ModelConfig) -> ModelConfig:
    """The preset with four layers."""
    types = config.layer_types and config.layer_types[:4]
    return dataclasses.replace(config, num_hidden_layers=4, layer_types=types, vocab_size=99)


def test_every_field_is_tried() -> None:
    sizes = {f.name for f in dataclasses.fields(ModelConfig) if f.name.endswith(("_size", "_dim", "_rank", "_heads"))}
    sizes |= {"num_hidden_layers", "n_routed_experts", "num_experts_per_tok", "model_type", "extra"}
    assert OTHERS.keys() | sizes == {f.name for f in dataclasses.fields(ModelConfig)}
    fields = {field.split(".")[0] for family in FAMILIES.values() for field in (rule.field for rule in family.rules)}
    assert fields <= OTHERS.keys()
    assert BASE.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_value_comes_back_or_is_refused_by_its_name(model_type: str) -> None:
    base = small(BASE[model_type])
    assert base.family_problems() == ()
    kept, refused = set(), set()
    for field, values in OTHERS.items():
        for value in values:
            config = changed(base, field, value)
            if config is None:
                continue
            problems = config.family_problems()
            if problems:
                names = (field, *ALIASES.get(field, ()))
                assert any(problem.startswith(names) for problem in problems), (config, problems)
                assert all("\n" not in problem and "; found " in problem for problem in problems)
                with pytest.raises(CheckpointError) as caught:
                    render_config(config, PATH)
                assert str(caught.value) == f"config.json: {problems[0]}"
                refused.add((field, str(value)))
                continue
            back = parse_config(json.loads(json.dumps(render_config(config, PATH))), PATH)
            assert back.family_problems() == () and render_config(back, PATH) == render_config(config, PATH)
            for name in ("qk_head_dim", "rope_dim", "output_bias", "shared_width", "num_moe_layers"):
                assert getattr(back, name) == getattr(config, name), (field, value)
            kept.add((field, str(value)))
    assert len(kept) > 20 and len(refused) > 15
    expected = {(field, str(value)) for models, field, value in DIFFERENT if model_type in models}
    assert expected <= refused


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rules_hold_for_released_models_and_read_no_more_than_their_field(model_type: str) -> None:
    for config in PRESETS.values():
        if config.model_type != model_type:
            continue
        for rule in FAMILIES[model_type].rules:
            assert rule.holds(config), rule.field
            setting(config, rule.field)
            assert any(engine in rule.reason for engine in ("vLLM", "SGLang", "llama.cpp", "engines")), rule.reason


WITHOUT_EFFECT: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {"seq_aux": aux, "aux_loss_alpha": 0.0}) for model_type in FAMILIES for aux in (True, False)),
    *((model_type, {"mtp_loss_weight": 0.1, "num_nextn_predict_layers": 0}) for model_type in FAMILIES),
    *((model_type, {"intermediate_size": 77}) for model_type in FAMILIES),
    *((model_type, {"sliding_window": 7, "layer_types": ("full_attention",) * 4}) for model_type in GQA[:4]),
    *((model_type, {"attention_output_bias": False}) for model_type in ("mixtral", "olmoe", "minimax_m2")),
    ("minimax_m2", {"n_group": 4, "topk_group": 4}),
    ("mixtral", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2}),
    ("mixtral", {"decoder_sparse_step": 1, "mlp_only_layers": ()}),
    ("deepseek_v3", {"first_k_dense_replace": 2, "mlp_only_layers": (0, 1)}),
    ("deepseek_v3", {"first_k_dense_replace": 0, "mlp_only_layers": (1, 0)}),
    ("deepseek_v3", {"first_k_dense_replace": 0, "mlp_only_layers": (0, 1, 2, 3), "decoder_sparse_step": 2}),
    ("glm4_moe", {"first_k_dense_replace": 3, "decoder_sparse_step": 4}),
    ("deepseek_v3", {"qk_rope_head_dim": 2, "rope_interleave": False}),
    ("deepseek_v3", {"n_shared_experts": 1, "shared_expert_intermediate_size": BASE["deepseek_v3"].shared_width}),
    ("qwen2_moe", {"shared_expert_intermediate_size": None}),
    *(
        (model_type, {"first_k_dense_replace": 4, "num_nextn_predict_layers": 0, name: value})
        for model_type in (*MLA, "glm4_moe")
        for name, value in (("scoring_func", "softmax"), ("scoring_func", "sigmoid"), ("router_bias", True))
    ),
    *(
        ("deepseek_v3", {"first_k_dense_replace": 4, "moe_norm_min": x, "num_nextn_predict_layers": 0})
        for x in (0.0, 0.5)
    ),
    ("olmoe", {"norm_topk_prob": False, "moe_norm_min": 0.5}),
    ("qwen3", {"n_shared_experts": 2, "scoring_func": "softmax", "aux_loss_alpha": 0.1, "first_k_dense_replace": 2}),
    ("qwen3", {"topk_method": "group_limited_greedy", "n_group": 2, "decoder_sparse_step": 2}),
    (
        "qwen3",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "first_k_dense_replace": 4},
    ),
    ("deepseek_v3", {"rope_parameters": RopeParameters(mscale=0.4, attention_factor=2.0, truncate=False)}),
]


@pytest.mark.parametrize(("model_type", "changes"), WITHOUT_EFFECT, ids=[str(i) for i in range(len(WITHOUT_EFFECT))])
def test_what_has_no_effect_makes_no_config_unsaveable(model_type: str, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(small(BASE[model_type]), **changes)
    assert config.family_problems() == ()
    written = render_config(config, PATH)
    assert render_config(parse_config(written, PATH), PATH) == written


def test_unknown_families_several_problems_and_values_that_are_not_json() -> None:
    problems = dataclasses.replace(V3, model_type="llama").family_problems()
    assert len(problems) == 1 and problems[0].startswith("unknown model_type; expected one of deepseek_v3, ")
    config = dataclasses.replace(V3, rope_interleave=False, attention_bias=True, qk_norm="none", router_bias=True)
    assert [problem.split(":")[0] for problem in config.family_problems()] == [
        *("rope_interleave", "attention_bias", "router_bias")
    ]
    for value in (object(), float("nan")):
        (problem,) = dataclasses.replace(V3, extra={"x": value}).family_problems()
        assert problem.startswith("extra: not JSON: ")


def test_a_default_config_is_interleaved_with_mla_and_in_halves_without() -> None:
    mla: dict[str, Any] = {
        name: getattr(V3, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    }
    mla |= dict(num_attention_heads=3, moe_intermediate_size=20, n_routed_experts=4, num_experts_per_tok=2)
    assert ModelConfig(**mla, head_dim=8).rope_interleave is False
    mla |= dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    config = ModelConfig(**mla)
    assert config.rope_interleave is True and config.family_problems() == ()
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert not dataclasses.replace(config, rope_interleave=False).rope_interleave


def test_keys_that_engines_read_and_transformers_does_not(tmp_path: Path) -> None:
    config = small(BASE["minimax_m2"])
    keys = {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer"}
    keys["rotary_dim"] = 64
    written = render_config(config, PATH)
    assert {key: written[key] for key in keys} == keys
    # transformers writes none of them, and null is false to SGLang.
    for spelling in ({}, dict.fromkeys(keys)):
        values = {name: value for name, value in written.items() if name not in keys} | spelling
        again = render_config(parse_config(values, PATH), PATH)
        assert {key: again[key] for key in keys} == keys
    with pytest.raises(CheckpointError, match="use_routing_bias"):
        parse_config({**written, "use_routing_bias": False}, PATH)


def test_partial_rotation_where_readers_differ_is_not_read() -> None:
    written = render_config(small(BASE["qwen3_moe"]), PATH)
    for more in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(CheckpointError, match="partial_rotary_factor is not supported"):
            parse_config({**written, "rope_scaling": None, **more}, PATH)


@pytest.mark.parametrize("q_lora_rank", [None, 26])
def test_interleaving_keeps_the_function(tmp_path: Path, q_lora_rank: int | None) -> None:
    config = dataclasses.replace(V3, rope_interleave=False, q_lora_rank=q_lora_rank, num_nextn_predict_layers=1)
    model = build(config, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    ids = torch.arange(40).view(2, 20)
    before, weights = model(ids).logits.detach(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"rope_interleave: .*moe\.checkpoint\.interleave"):
        model.save(tmp_path / "m")
    interleave(model)
    assert model.config == dataclasses.replace(config, rope_interleave=True)
    assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    queries = "q_b_proj" if q_lora_rank else "q_proj"
    assert {name.rsplit(".", 2)[1] for name in moved} == {queries, "kv_a_proj_with_mqa"}
    model.save(tmp_path / "m")
    assert torch.equal(moe.load(tmp_path / "m")(ids).logits, model.eval()(ids).logits)
    again = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    interleave(model)
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_interleaving_refuses_before_it_changes_anything() -> None:
    with pytest.raises(ConfigError, match="a model with MLA"):
        interleave(moe.Transformer(dataclasses.replace(small(BASE["qwen3_moe"]), hidden_size=8, n_routed_experts=8)))
    model = build(dataclasses.replace(V3, rope_interleave=False))
    last: Any = model.layers[-1].self_attn
    last.kv_a_proj_with_mqa = torch.nn.Sequential(last.kv_a_proj_with_mqa)
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=r"nn\.Linear"):
        interleave(model)
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_new_model_has_no_token_ids_of_a_released_tokenizer(tmp_path: Path) -> None:
    """transformers' classes have defaults: 1 ends a text of any DeepSeek-V3 whose config.json does not say."""
    transformers = pytest.importorskip("transformers")
    model = build(V3)
    model.save(tmp_path / "new")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "new")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del values[key]
    (tmp_path / "new" / "config.json").write_text(json.dumps(values))
    moe.load(tmp_path / "new").save(tmp_path / "again")  # what a folder leaves to transformers stays so
    assert "eos_token_id" not in json.loads((tmp_path / "again" / "config.json").read_text())
    model.config = dataclasses.replace(V3, extra={"eos_token_id": [3, 4]})
    model.save(tmp_path / "ids")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ids").eos_token_id == [3, 4]


def test_random_exports_are_read_by_transformers_or_refused(tmp_path: Path) -> None:
    """`python -m tests.exports --count 300` tries more."""
    pytest.importorskip("transformers")
    from tests.exports import check, examples

    os.environ.setdefault("TQDM_DISABLE", "1")
    for number, config in examples(4, seed=1):
        problem = check(config, number, tmp_path)
        assert problem is None, (problem, config)
