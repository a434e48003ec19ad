"""Save random models of every family, load them in transformers and compare logits: `python -m tests.exports`.

A model without `family_problems` must load in transformers without a warning and give the same logits. For any other
model, the save must raise the first problem.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe import CheckpointError, ConfigError, ModelConfig, RopeParameters, Transformer
from moe.checkpoint.format.families import FAMILIES
from moe.config import LayerType

TOLERANCE = 2e-5  # relative to the largest logit
LENGTH = 24


def draw(rng: random.Random, model_type: str) -> ModelConfig | None:
    """Return a small random config of the family, often with a field that has no effect or must be refused.

    Returns None if the config is invalid.
    """
    pick = rng.choice
    mla = model_type in ("deepseek_v3", "kimi_k2", "kimi_k25", "deepseek_v2", "glm4_moe_lite")
    layers, heads = rng.randint(1, 3), pick((2, 4))
    groups, each = pick((1, 1, 2, 4)), pick((2, 3))
    values: dict[str, Any] = dict(
        model_type=model_type,
        vocab_size=61,
        hidden_size=heads * 2 * rng.randint(3, 6),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=rng.randint(3, 20),
        moe_intermediate_size=rng.randint(3, 20),
        n_routed_experts=groups * each,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters=RopeParameters(rope_theta=pick((1e4, 5e5))),
        seq_aux=pick((True, False)),
        mtp_loss_weight=pick((0.3, 0.1)),
    )
    values["n_group"], values["topk_group"] = pick(((1, 1), (groups, rng.randint(1, groups)), (groups, groups)))
    reachable = values["topk_group"] * values["n_routed_experts"] // values["n_group"]
    values["num_experts_per_tok"] = rng.randint(1, reachable)
    if mla:
        # transformers views pairs of DeepSeek-V2's fp32 activations as complex numbers, which needs even strides.
        values |= dict(
            kv_lora_rank=2 * rng.randint(2, 5), qk_nope_head_dim=2 * rng.randint(1, 3), q_lora_rank=pick((None, 5))
        )
        values |= dict(qk_rope_head_dim=2 * rng.randint(1, 3), v_head_dim=rng.randint(2, 9))
        values |= dict(n_shared_experts=rng.randint(1, 2), first_k_dense_replace=rng.randint(0, layers))
        values |= dict(tie_word_embeddings=pick((True, False)), routed_scaling_factor=pick((1.0, 2.5)))
    else:
        dim = values["hidden_size"] // heads
        dim = dim if model_type in ("olmoe", "qwen2_moe") else 8
        values |= dict(num_key_value_heads=pick((heads, heads // 2)), head_dim=dim)
    softmax = dict(scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
    yarn = RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    match model_type:
        case "deepseek_v2":
            values |= dict(scoring_func="softmax", topk_method=pick(("greedy", "group_limited_greedy")))
            values |= dict(norm_topk_prob=False) | ({} if values["topk_method"] != "greedy" else softmax)
        case "deepseek_v3" | "kimi_k2" | "kimi_k25":
            values |= dict(norm_topk_prob=pick((True, False)))
        case "mixtral":
            values |= softmax
        case "qwen2_moe":
            values |= softmax | dict(norm_topk_prob=False, attention_bias=pick((True, False)))
            values |= dict(attention_output_bias=False, n_shared_experts=1, shared_expert_gate=True)
            values |= dict(shared_expert_intermediate_size=pick((None, 7)))
        case "qwen3_moe":
            values |= softmax | dict(qk_norm="head")
        case "glm4_moe":
            values |= dict(
                qk_norm=pick(("none", "head")), attention_bias=pick((True, False)), attention_output_bias=False
            )
            values |= dict(n_shared_experts=1, first_k_dense_replace=rng.randint(0, layers))
            values["rope_parameters"] = RopeParameters(partial_rotary_factor=0.5)
        case "gpt_oss":
            types: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
            values |= softmax | dict(attention_bias=pick((True, False)), attention_sinks=True, sliding_window=5)
            values |= dict(layer_types=tuple(types[i % 2] for i in range(layers)), router_bias=True, expert_bias=True)
            values |= dict(swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0)
        case "olmoe":
            values |= softmax | dict(qk_norm="whole", norm_topk_prob=False)
        case "glm4_moe_lite":
            values |= dict(norm_topk_prob=pick((True, False)), tie_word_embeddings=False)
        case "dots1":
            values |= dict(qk_norm="head", norm_topk_prob=pick((True, False)), n_shared_experts=rng.randint(1, 2))
            values |= dict(first_k_dense_replace=rng.randint(0, layers), routed_scaling_factor=pick((1.0, 2.5)))
        case "ernie4_5_moe":
            values |= softmax | dict(topk_method="noaux_tc", rope_interleave=True, moe_norm_min=1e-12)
            values |= dict(first_k_dense_replace=rng.randint(0, layers), decoder_sparse_step=pick((1, 2)))
            values |= dict(n_shared_experts=rng.randint(0, 2), tie_word_embeddings=pick((True, False)))
        case "qwen3":
            values |= dict(qk_norm="head", tie_word_embeddings=pick((True, False)), n_group=1, topk_group=1)
            values |= dict(n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
        case _:
            values |= dict(qk_norm="whole", n_group=groups, topk_group=groups)
            values["num_experts_per_tok"] = rng.randint(1, groups * each)
            values["rope_parameters"] = RopeParameters(partial_rotary_factor=pick((0.5, 1.0)))
    if pick((True, False, False)):
        scaled = dataclasses.replace(yarn, mscale=0.7, mscale_all_dim=0.7) if mla else yarn
        partial = values["rope_parameters"].partial_rotary_factor
        values["rope_parameters"] = dataclasses.replace(scaled, partial_rotary_factor=partial)
    # In half of the cases, one more change; some have no effect, some must be refused.
    odd: list[dict[str, Any]] = [
        *({"norm_topk_prob": norm} for norm in (True, False)),
        *({"rope_interleave": interleave} for interleave in (True, False)),
        *({"rms_norm_eps": eps} for eps in (1e-6, 1e-3)),
        *({"mlp_only_layers": (0,)}, {"decoder_sparse_step": 2}, {"first_k_dense_replace": 1}),
        *({"attention_bias": True}, {"tie_word_embeddings": True}, {"sliding_window": 5}, {"swiglu_limit": 1.0}),
        *({"aux_loss_alpha": 0.01}, {"router_z_loss_coef": 0.01}, {"n_shared_experts": 2}, {"swiglu_alpha": 1.5}),
        *({"scoring_func": "softmax"}, {"topk_method": "noaux_tc"}, {"routed_scaling_factor": 1.5}),
        *({"rope_parameters": dataclasses.replace(yarn, **change)} for change in ({}, {"attention_factor": 1.2})),
        *(
            {"rope_parameters": dataclasses.replace(yarn, **change)}
            for change in ({"truncate": False}, {"mscale": 0.5})
        ),
        *({"rope_parameters": RopeParameters(partial_rotary_factor=0.5)}, {"qk_norm": "head"}, {"qk_norm": "none"}),
        *({"moe_norm_min": least} for least in (0.0, 1e-12, 0.5)),
    ]
    try:
        return ModelConfig(**values | (pick(odd) if pick((True, False)) else {}))
    except ConfigError:
        return None


def build(config: ModelConfig, seed: int) -> Transformer:
    """Return a model with random values for which every parameter affects the output."""
    model = Transformer(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            size = 0.3 if name.endswith("e_score_correction_bias") else 0.25
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * size + ("norm" in name))
    return model


def check(config: ModelConfig, seed: int, root: Path) -> str | None:
    """Return the first problem with the export of a model of this config, or None."""
    model = build(config, seed)
    problems = config.family_problems()
    folder = root / f"{config.model_type}-{seed}"
    try:
        model.save(folder)
    except CheckpointError as error:
        if not problems:
            return f"refused without a problem: {error}"
        return None if str(error).endswith(problems[0]) else f"other error than {problems[0]}: {error}"
    if problems:
        return f"saved despite {problems}"
    ids = torch.randint(0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    with warnings_of_transformers() as warnings:
        there, info = read_in_transformers(folder, config.model_type)
    found = [*warnings, *(f"{key} {names}" for key, names in info.items() if names)]
    if found:
        return f"transformers says {found[0]}"
    with torch.no_grad():
        ours, theirs = model(ids).logits, there(ids).logits
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return None if error <= TOLERANCE else f"logits differ by {error:.1e}"


def read_in_transformers(folder: Path, model_type: str) -> tuple[Any, dict[str, Any]]:
    """Return the model and transformers' loading information."""
    import transformers

    if model_type == "kimi_k2":  # transformers loads it as DeepSeek-V3
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "deepseek_v3"}))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager", attn_implementation="eager"
    )
    model, info = loaded
    return model.eval(), info


@contextlib.contextmanager
def warnings_of_transformers() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def examples(count: int, seed: int) -> Iterator[tuple[int, ModelConfig]]:
    """Yield (number, config) for `count` configs of each family."""
    for number, model_type in enumerate(FAMILIES):
        rng, found = random.Random(f"{seed} {model_type}"), 0
        while found < count:
            config = draw(rng, model_type)
            if config is not None:
                yield seed + 1000 * number + found, config
                found += 1


def main(count: int = 100, seed: int = 0) -> int:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    wrong, refused, total = 0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        for number, config in examples(count, seed):
            problem = check(config, number, Path(root))
            total, refused = total + 1, refused + bool(config.family_problems())
            if problem is not None:
                wrong += 1
                print(f"{config.model_type}: {problem}\n  {config}")
    print(f"{total} models, {refused} refused by name, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.exports", description=str(__doc__).partition(":")[0] + ".")
    parser.add_argument("--count", type=int, default=100, help="Number of models (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="Random seed (default: 0)")
    options = parser.parse_args()
    sys.exit(main(options.count, options.seed))
