"""transformers' tiny random models, loaded where transformers cannot be imported, saved there, and loaded back."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe
from moe.checkpoint import read_summary
from moe.checkpoint.format.config_json import parse_config
from moe.checkpoint.format.layout import layout
from moe.counts import count_parameters
from tests.support.checkpoint_cases import SMALL, V3_MTP

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5  # of the largest logit

COMMON = {k: v for k, v in SMALL.items() if k != "rope_interleave"}
COMMON |= dict(num_key_value_heads=3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
V3 = dict(COMMON, n_group=4, topk_group=2, routed_scaling_factor=2.5)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("DeepseekV3", V3),
    "v3_no_q_lora_halves": ("DeepseekV3", dict(V3, q_lora_rank=None, rope_interleave=False)),
    "v3_yarn": ("DeepseekV3", dict(V3, rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0))),
    "v3_yarn_mscales_differ": (
        "DeepseekV3",
        dict(V3, rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=1.2, beta_fast=3, beta_slow=0.5)),
    ),
    "v3_yarn_no_mscale_halves": ("DeepseekV3", dict(V3, rope_parameters=YARN, rope_interleave=False)),
    "v3_yarn_attention_factor": ("DeepseekV3", dict(V3, rope_parameters=dict(YARN, attention_factor=1.3))),
    "v3_one_group_unnormalised": ("DeepseekV3", dict(V3, n_group=1, topk_group=1, norm_topk_prob=False)),
    "v3_tied_biased": ("DeepseekV3", dict(V3, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-3)),
    "v3_tied": ("DeepseekV3", dict(V3, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "v3_theta_two_shared": (
        "DeepseekV3",
        dict(V3, n_shared_experts=2, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    ),
    "v2_greedy": ("DeepseekV2", dict(COMMON, n_shared_experts=2)),
    "v2_no_q_lora_yarn": (
        "DeepseekV2",
        dict(COMMON, q_lora_rank=None, rope_parameters=dict(YARN, mscale=0.707, mscale_all_dim=0.707)),
    ),
    "v2_groups": (
        "DeepseekV2",
        dict(COMMON, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0),
    ),
    "v2_biased": ("DeepseekV2", dict(COMMON, attention_bias=True, rms_norm_eps=1e-3)),
}

# Every size differs from the others, heads have more than one query head a key head, windows are shorter than the text.
GROUPED = dict(vocab_size=61, hidden_size=42, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3)
GROUPED |= dict(head_dim=12, max_position_embeddings=64, num_experts_per_tok=3, initializer_range=0.1)
GROUPED |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
WINDOW = dict(use_sliding_window=True, sliding_window=5)
QWEN = dict(GROUPED, num_experts=12, intermediate_size=46, moe_intermediate_size=20)
QWEN2 = dict(QWEN, shared_expert_intermediate_size=26)
GLM = dict(GROUPED, n_routed_experts=12, intermediate_size=46, moe_intermediate_size=20, routed_scaling_factor=1.5)
ONE_WIDTH = dict(GROUPED, intermediate_size=20)
GPT_OSS = dict(ONE_WIDTH, num_local_experts=12, sliding_window=5, swiglu_limit=0.4)
# V is wider than the queries and keys here.
GLM_LITE = {k: v for k, v in COMMON.items() if k != "first_k_dense_replace"} | dict(v_head_dim=22, n_shared_experts=2)
BIASED = dict(attention_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3)
ERNIE = dict(GROUPED, moe_num_experts=12, moe_k=3, intermediate_size=46, moe_intermediate_size=20)
ERNIE = {k: v for k, v in ERNIE.items() if k != "num_experts_per_tok"}
DOTS1 = dict(GROUPED, n_routed_experts=12, intermediate_size=46, moe_intermediate_size=20, n_shared_experts=2)
DENSE = {k: v for k, v in GROUPED.items() if k != "num_experts_per_tok"} | dict(intermediate_size=46)
OLMOE = dict(ONE_WIDTH, num_experts=12, hidden_size=48, head_dim=8)
CASES |= {
    "mixtral": ("Mixtral", dict(ONE_WIDTH, num_local_experts=12)),
    "mixtral_window": ("Mixtral", dict(ONE_WIDTH, num_local_experts=12, sliding_window=5, tie_word_embeddings=True)),
    "qwen2_moe": ("Qwen2Moe", dict(QWEN2, mlp_only_layers=[1], norm_topk_prob=True)),
    "qwen2_moe_windows": ("Qwen2Moe", dict(QWEN2, decoder_sparse_step=2, **WINDOW, max_window_layers=3)),
    "qwen2_moe_no_bias": ("Qwen2Moe", dict(QWEN2, qkv_bias=False)),
    "qwen3_moe_normalised": ("Qwen3Moe", dict(QWEN, norm_topk_prob=True)),
    "qwen3_moe_normalised_yarn": ("Qwen3Moe", dict(QWEN, norm_topk_prob=True, rope_parameters=YARN)),
    "qwen3_moe": ("Qwen3Moe", dict(QWEN, mlp_only_layers=[0, 2], tie_word_embeddings=True)),
    "qwen3_moe_window": ("Qwen3Moe", dict(QWEN, norm_topk_prob=True, attention_bias=True, **WINDOW)),
    "qwen3_moe_yarn": ("Qwen3Moe", dict(QWEN, decoder_sparse_step=3, rope_parameters=YARN)),
    "glm4_moe": ("Glm4Moe", dict(GLM, use_qk_norm=True, first_k_dense_replace=2, n_group=4, topk_group=2)),
    "glm4_moe_biased": ("Glm4Moe", dict(GLM, attention_bias=True, n_shared_experts=2, norm_topk_prob=False)),
    "gpt_oss": ("GptOss", dict(GPT_OSS, swiglu_limit=7.0)),
    "gpt_oss_limit": ("GptOss", GPT_OSS),
    "gpt_oss_full": (
        "GptOss",
        dict(
            GPT_OSS,
            layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(rope_type="default", rope_theta=5e3),
            attention_bias=False,
            swiglu_alpha=1.3,
        ),
    ),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe_normalised": ("Olmoe", dict(OLMOE, norm_topk_prob=True, attention_bias=True)),
    "minimax_m2": (
        "MiniMaxM2",
        dict(
            ONE_WIDTH,
            num_local_experts=12,
            rope_parameters=dict(rope_type="default", rope_theta=5e3, partial_rotary_factor=0.5),
        ),
    ),
    "minimax_m2_whole": ("MiniMaxM2", dict(ONE_WIDTH, num_local_experts=12)),
    "dots1": ("Dots1", dict(DOTS1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5)),
    "dots1_groups": ("Dots1", dict(DOTS1, n_group=4, topk_group=2, rope_parameters=YARN)),
    "dots1_tied": ("Dots1", dict(DOTS1, tie_word_embeddings=True)),
    "dots1_windows": ("Dots1", dict(DOTS1, sliding_window=5, max_window_layers=2, rms_norm_eps=1e-3)),
    "glm4_moe_lite": ("Glm4MoeLite", dict(GLM_LITE, routed_scaling_factor=1.8, n_group=4, topk_group=2)),
    "glm4_moe_lite_leading": (
        "Glm4MoeLite",
        dict(
            GLM_LITE,
            mlp_layer_types=["dense", "dense", "sparse"],
            q_lora_rank=None,
            rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=0.7),
        ),
    ),
    "glm4_moe_lite_pattern": (
        "Glm4MoeLite",
        dict(GLM_LITE, mlp_layer_types=["sparse", "dense", "sparse"], norm_topk_prob=False, q_lora_rank=None),
    ),
    "glm4_moe_lite_yarn_halves": (
        "Glm4MoeLite",
        dict(GLM_LITE, rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=1.2), rope_interleave=False, **BIASED),
    ),
    "ernie4_5_moe": ("Ernie4_5_Moe", ERNIE),
    "ernie4_5_moe_some_layers": (
        "Ernie4_5_Moe",
        dict(ERNIE, moe_layer_interval=2, moe_layer_end_index=2, moe_num_shared_experts=0, tie_word_embeddings=False),
    ),
    "ernie4_5_moe_least_sum": ("Ernie4_5_Moe", dict(ERNIE, moe_norm_min=0.4)),
    "qwen3": ("Qwen3", dict(DENSE, tie_word_embeddings=True)),
    "qwen3_untied_yarn": ("Qwen3", dict(DENSE, rope_parameters=YARN, rms_norm_eps=1e-3)),
    "qwen3_windows": ("Qwen3", dict(DENSE, **WINDOW, max_window_layers=2)),
    "qwen3_biased": ("Qwen3", dict(DENSE, attention_bias=True)),
    "ernie4_5_moe_yarn": ("Ernie4_5_Moe", dict(ERNIE, moe_layer_start_index=0, rope_parameters=YARN)),
}
# The same tensors as transformers has them in memory, all experts of a layer stacked.
STACKED = (
    "v3",
    "v2_groups",
    "mixtral",
    "qwen2_moe_no_bias",
    "qwen3_moe_normalised",
    "glm4_moe",
    "olmoe",
    "minimax_m2",
    "dots1",
    "glm4_moe_lite",
    "ernie4_5_moe",
)

# Kimi-K2.5's text_config as released, without its sizes and quantisation.
KIMI_TEXT = """{"_name_or_path": "", "add_cross_attention": false, "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": false, "attention_dropout": 0.0, "auto_map": {"AutoConfig":
    "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model", "AutoModelForCausalLM":
    "modeling_deepseek.DeepseekV3ForCausalLM"}, "aux_loss_alpha": 0.001, "bad_words_ids": null,
    "begin_suppress_tokens": null, "bos_token_id": 58, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false,
    "dtype": "bfloat16", "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 59, "ep_size": 1,
    "exponential_decay_length_penalty": null, "finetuning_task": null, "forced_bos_token_id": null,
    "forced_eos_token_id": null, "hidden_act": "silu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02, "is_decoder": false, "is_encoder_decoder": false, "label2id": {"LABEL_0": 0,
    "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "model_type": "kimi_k2",
    "moe_layer_freq": 1, "n_group": 1, "no_repeat_ngram_size": 0, "norm_topk_prob": true, "num_beam_groups": 1,
    "num_beams": 1, "num_nextn_predict_layers": 0, "num_return_sequences": 1, "output_attentions": false,
    "output_hidden_states": false, "output_scores": false, "pad_token_id": 60, "prefix": null, "pretraining_tp": 1,
    "problem_type": null, "pruned_heads": {}, "remove_invalid_values": false, "repetition_penalty": 1.0,
    "return_dict": true, "return_dict_in_generate": false, "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0,
    "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    "type": "yarn"}, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
    "sep_token_id": null, "seq_aux": true, "suppress_tokens": null, "task_specific_params": null, "temperature": 1.0,
    "tf_legacy_loss": false, "tie_encoder_decoder": false, "tie_word_embeddings": false, "tokenizer_class": null,
    "top_k": 50, "top_p": 1.0, "topk_group": 1, "topk_method": "noaux_tc", "torchscript": false,
    "transformers_version": "4.56.2", "typical_p": 1.0, "use_bfloat16": false, "use_cache": true}"""

FOLDERS = (*CASES, *(f"{name}.stacked" for name in STACKED))

# What transformers computes and another engine does not: read as transformers reads it, and refused by a save.
REFUSED = {
    "v3_no_q_lora_halves": "rope_interleave",
    "v3_yarn_mscales_differ": "rope_parameters.mscale",
    "v3_yarn_no_mscale_halves": "rope_interleave",
    "v3_yarn_attention_factor": "rope_parameters.mscale",
    "v3_tied_biased": "attention_bias",
    "v2_biased": "attention_bias",
    "mixtral_window": "tie_word_embeddings",
    "qwen2_moe": "norm_topk_prob",
    "qwen2_moe_windows": "decoder_sparse_step",
    "qwen3_moe": "norm_topk_prob",
    "qwen3_moe_window": "attention_bias",
    "qwen3_moe_yarn": "norm_topk_prob",
    "gpt_oss_limit": "swiglu_limit",
    "gpt_oss_full": "swiglu_limit",
    "olmoe_normalised": "norm_topk_prob",
    "dots1_tied": "tie_word_embeddings",
    "dots1_windows": "sliding_window",
    "glm4_moe_lite_pattern": "mlp_only_layers",
    "glm4_moe_lite_yarn_halves": "rope_interleave",
    "ernie4_5_moe_least_sum": "moe_norm_min",
    "qwen3_windows": "sliding_window",
    "qwen3_biased": "attention_bias",
}
SAVED = tuple(name for name in FOLDERS if name not in REFUSED)

HERE = """
import json, sys
sys.modules["transformers"] = None  # every import of it fails
import torch
from safetensors.torch import load_file, save_file
import moe, moe.router

root = sys.argv[1]
ids = load_file(root + "/ids.safetensors")["ids"]
logits, refused, gaps = {}, {}, {}

def measure(router, _, routing):
    bias, k = router.e_score_correction_bias, routing.expert_ids.shape[1]
    best = (routing.scores if bias is None else routing.scores + bias).sort(dim=1, descending=True).values
    gaps[name] = min([gaps.get(name, 1.0), *(best[:, k - 1 : k] - best[:, k : k + 1]).flatten().tolist()])

for name in json.loads(sys.argv[2]):
    model = moe.load(f"{root}/{name}")
    assert not model.training
    for module in model.modules():
        if isinstance(module, moe.router.Router):
            module.register_forward_hook(measure)
    with torch.no_grad():
        logits[name] = model(ids).logits
    try:
        model.save(f"{root}/{name}.saved")
    except moe.CheckpointError as error:
        refused[name] = str(error)
        problems = model.config.family_problems()
        assert str(error).endswith(problems[0]), problems
with torch.no_grad():
    model = moe.load(root + "/mtp")
    logits["mtp"] = model(ids).logits
save_file(logits, root + "/here.safetensors")
print(json.dumps([refused, gaps]))
"""


# With their first seeds, two experts of some token have scores that differ by less than rounding.
SEEDS = {"qwen2_moe": 101}


def as_configured(model: Any) -> Any:
    """The model in eager mode: the default experts implementation wants sizes that are multiples of 16 bytes."""
    model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts):
            # transformers 5.17 takes 7.0 and 1.702 whatever config.json says. OpenAI's own model reads the limit there,
            # as do releases from 5.19 on.
            module.limit = getattr(model.config, "swiglu_limit", module.limit)
            module.alpha = getattr(model.config, "swiglu_alpha", module.alpha)
    return model.eval()


def build(kind: str, values: dict[str, Any], seed: int) -> Any:
    config = getattr(transformers, kind + "Config")(**values)
    model = as_configured(getattr(transformers, kind + "ForCausalLM")(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            # Scores are in (0, 1): biases of both signs and this size change many choices, and leave many.
            scale = {"e_score_correction_bias": 0.3, "norm.weight": 0.5}
            size = next((s for end, s in scale.items() if name.endswith(end)), 0.25)
            tensor.copy_(noise * size + (1.0 if "norm" in name else 0.0))
    return model


def read_there(folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """The model as transformers loads it, and what it says about names that did not fit.

    A loaded tensor may begin at any address of a mapped file, and then products are summed in another order than with
    the same tensor in a buffer from torch's allocator, which aligns all alike.
    """
    model, info = getattr(transformers, kind + "ForCausalLM").from_pretrained(folder, output_loading_info=True)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return as_configured(model), info


@dataclasses.dataclass
class World:
    """All cases after one run of the process that has no transformers."""

    root: Path
    ids: torch.Tensor
    there: dict[str, torch.Tensor]
    here: dict[str, torch.Tensor]
    refused: dict[str, str]
    gaps: dict[str, float]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("parity")
    # Three times the original length of the YaRN cases.
    ids = torch.randint(0, SMALL["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(7))
    save_file({"ids": ids}, root / "ids.safetensors")
    there = {}
    for seed, (name, (kind, values)) in enumerate(CASES.items()):
        model = build(kind, values, SEEDS.get(name, seed))
        model.save_pretrained(root / name)
        with torch.no_grad():
            there[name] = model(ids).logits
        if name in STACKED:
            shutil.copytree(root / name, root / f"{name}.stacked")
            tied = model.config.tie_word_embeddings
            tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not tied}
            save_file(tensors, root / f"{name}.stacked" / "model.safetensors", metadata={"format": "pt"})
            there[f"{name}.stacked"] = there[name]
    mtp = moe.Transformer(V3_MTP, seed=3)
    with torch.no_grad():
        for tensor in mtp.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) * 0.2)
    mtp.save(root / "mtp")
    command = [sys.executable, "-W", "error", "-c", HERE, str(root), json.dumps(list(FOLDERS))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(moe.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    yield World(root, ids, there, load_file(root / "here.safetensors"), *json.loads(done.stdout))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{error:.2e}"


each_saved = pytest.mark.parametrize("name", SAVED)


def test_what_other_engines_compute_otherwise_is_refused_by_name(world: World) -> None:
    assert world.refused.keys() == REFUSED.keys()
    for name, field in REFUSED.items():
        assert f"config.json: {field}: " in world.refused[name] and "; expected " in world.refused[name]
        assert not (world.root / f"{name}.saved").exists()


def test_no_choice_of_an_expert_is_a_near_tie(world: World) -> None:
    """Otherwise rounding decides it, and with it these tests, on each processor differently."""
    assert world.gaps.keys() == {name for name in FOLDERS if CASES[name.removesuffix(".stacked")][0] != "Qwen3"}
    assert min(world.gaps.values()) > 4e-6, min(world.gaps, key=lambda name: world.gaps[name])


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_of_their_model_here(world: World, name: str) -> None:
    assert world.there[name].std() > 0.1
    assert_close(world.here[name], world.there[name])


@each_saved
def test_saved_here_is_what_they_had_saved(world: World, name: str) -> None:
    theirs, ours = world.root / name, world.root / f"{name}.saved"
    a, b = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert a.keys() == b.keys()
    for tensor in a:
        assert a[tensor].dtype == b[tensor].dtype and torch.equal(a[tensor], b[tensor]), tensor
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (theirs, ours))
    # They state one MTP layer and save none; the count in the folder we write is that of its files.
    assert before.pop("num_nextn_predict_layers", 0) in (0, 1)
    assert after.pop("num_nextn_predict_layers", 0) == 0
    before |= {
        key: 1 for key in ("n_group", "topk_group") if key in before and before[key] is None
    }  # vLLM needs numbers
    assert before.items() <= after.items()
    generation = "generation_config.json"
    assert (theirs / generation).read_bytes() == (ours / generation).read_bytes()
    assert read_summary(ours).agrees


@each_saved
def test_saved_here_loads_there(world: World, name: str) -> None:
    kind = CASES[name.removesuffix(".stacked")][0]
    model, info = read_there(world.root / f"{name}.saved", kind)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = model(world.ids).logits
    assert torch.equal(logits, world.there[name])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_untied_yarn"])
def test_gradients_and_greedy_tokens_of_a_dense_model(world: World, name: str) -> None:
    there, _ = read_there(world.root / name, "Qwen3")
    here = moe.load(world.root / name)
    prompt = world.ids[:, :16]
    options: dict[str, Any] = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24)
    assert torch.equal(moe.generate(here, prompt, max_new_tokens=24), there.generate(prompt, **options))
    losses = [model.double()(world.ids, labels=world.ids).loss for model in (here, there)]
    for loss in losses:
        loss.backward()
    assert_close(*losses)
    theirs = dict(there.named_parameters())
    mine = {spec.name: spec.parameter for spec in layout(here.config).values() if spec.written}
    assert mine.keys() == theirs.keys()
    for their, my in mine.items():
        found, expected = here.get_parameter(my).grad, theirs[their].grad
        assert found is not None and expected.abs().max() > 0
        assert_close(found, expected)


def test_our_model_with_mtp_loads_there(world: World) -> None:
    model, info = read_there(world.root / "mtp", "DeepseekV3")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # It has no MTP modules; it must see ours as layers beyond its own and as nothing else.
    layers = SMALL["num_hidden_layers"]
    beyond = tuple(f"model.layers.{layers + k}." for k in range(V3_MTP.num_nextn_predict_layers))
    assert info["unexpected_keys"] and all(name.startswith(beyond) for name in info["unexpected_keys"])
    with torch.no_grad():
        assert_close(world.here["mtp"], model(world.ids).logits)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A Kimi-K2.5 of transformers, saved by it ("theirs") and with the names of the release ("released"); token ids and
    their logits."""
    if not hasattr(transformers, "Kimi_K25Config"):
        pytest.skip("transformers without Kimi-K2.5")
    root = tmp_path_factory.mktemp("kimi")
    vision = dict(num_hidden_layers=1, hidden_size=24, num_attention_heads=2, intermediate_size=30)
    vision |= dict(pos_emb_height=4, pos_emb_width=4)
    text = dict(
        COMMON,
        model_type="deepseek_v3",
        n_group=1,
        topk_group=1,
        rope_parameters=dict(YARN, mscale=1.0, mscale_all_dim=1.0),
    )
    config = transformers.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=24, tie_word_embeddings=False
    )
    model = transformers.Kimi_K25ForConditionalGeneration(config).eval()
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            size = 0.3 if name.endswith("e_score_correction_bias") else 0.25
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(root / "theirs")
    shutil.copytree(root / "theirs", root / "released")
    tensors = load_file(root / "theirs" / "model.safetensors")
    renamed = {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): t for name, t in tensors.items()
    }
    save_file(renamed, root / "released" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(0, SMALL["vocab_size"], (2, 48), generator=generator)
    with torch.no_grad():
        return root, ids, model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["theirs", "released"])
def test_kimi_k25(kimi: tuple[Path, torch.Tensor, torch.Tensor], name: str) -> None:
    """Text alone, in both directions: what we save of it is a DeepSeek-V3 to them."""
    root, ids, expected = kimi
    there = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(root / name, experts_implementation="eager")
    model = moe.load(root / name)
    with torch.no_grad():
        assert torch.equal(there.eval()(input_ids=ids).logits, expected)
        assert_close(model(ids).logits, expected)
    model.save(root / f"{name}.saved")
    assert transformers.AutoConfig.from_pretrained(root / f"{name}.saved").model_type == "deepseek_v3"
    back, info = read_there(root / f"{name}.saved", "DeepseekV3")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, expected)


def test_what_is_saved_of_the_released_kimi_k25_config_is_read_there(tmp_path: Path) -> None:
    """Its text_config has keys of generation that transformers wrote years ago."""
    text = {**json.loads(KIMI_TEXT), **{k: v for k, v in COMMON.items() if not k.endswith("_token_id")}}
    moe.Transformer(parse_config({"model_type": "kimi_k25", "text_config": text}, Path("config.json"))).save(
        tmp_path / "m"
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.model_type, config.routed_scaling_factor) == ("deepseek_v3", 2.827)
    assert config.rope_parameters["factor"] == 64.0 and not hasattr(config, "auto_map")
    _, info = read_there(tmp_path / "m", "DeepseekV3")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


QWEN3_SIZES = {
    name: dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=hidden,
        tie_word_embeddings=tied,
    )
    for name, width, layers, heads, hidden, tied in (
        ("0_6b", 1024, 28, 16, 3072, True),
        ("1_7b", 2048, 28, 16, 6144, True),
        ("4b", 2560, 36, 32, 9728, True),
        ("8b", 4096, 36, 32, 12288, False),
        ("14b", 5120, 40, 40, 17408, False),
        ("32b", 5120, 64, 64, 25600, False),
    )
}


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        # The sizes of GLM-4.7-Flash and ERNIE-4.5-21B-A3B are the defaults of their classes.
        ("glm_4_7_flash", "Glm4MoeLite", {}),
        ("ernie_4_5_21b_a3b", "Ernie4_5_Moe", {}),
        *((f"qwen3_{name}", "Qwen3", sizes) for name, sizes in QWEN3_SIZES.items()),
        (
            "dots_llm1",
            "Dots1",
            dict(
                hidden_size=4096,
                n_routed_experts=128,
                n_shared_experts=2,
                num_experts_per_tok=6,
                first_k_dense_replace=1,
            ),
        ),
    ],
)
def test_presets_are_as_large_as_their_models(name: str, kind: str, values: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**values))
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # a tied one once
    assert count_parameters(moe.preset(name)).total == sum(tensor.numel() for tensor in tensors.values())


def test_the_bound_is_tight_enough_to_see_a_wrong_model(world: World) -> None:
    """Each change is one that a careless loader makes; all are far outside the tolerance."""
    name = "v3_yarn_mscales_differ"
    model = moe.load(world.root / name)
    model.config = dataclasses.replace(
        model.config, rope_parameters=dataclasses.replace(model.config.rope_parameters, mscale=1.2)
    )
    bias_lost = moe.load(world.root / name)
    swapped = moe.load(world.root / name)
    with torch.no_grad():
        for tensor_name, tensor in bias_lost.state_dict().items():
            if tensor_name.endswith("e_score_correction_bias"):
                tensor.zero_()
        gate_up = swapped.state_dict()["layers.1.mlp.experts.gate_up_proj"]
        gate_up[4] = gate_up[4].roll(gate_up.shape[1] // 2, 0)
        for wrong in (model, bias_lost, swapped):
            with pytest.raises(AssertionError):
                assert_close(wrong(world.ids).logits, world.there[name])
