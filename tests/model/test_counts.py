"""Counts from arithmetic against the published figures and against the model itself."""

import dataclasses
import math
import random

import pytest
import torch

import moe
from moe.cache import Cache
from moe.counts import count_parameters, parameter_shapes
from moe.layer import Experts
from moe.planning.cluster.stages import blocks
from moe.planning.footprint import Deployment, inference, training
from moe.router import Router
from tests.support.any_config import draw
from tests.support.checkpoint_cases import BY_FAMILY, V3, V3_MTP


def test_deepseek_v3() -> None:
    counts = count_parameters(moe.preset("deepseek_v3"))
    assert counts.total == 671_026_419_200
    assert counts.activated == 37_552_297_472
    assert counts.activated_without_embedding == 36_625_618_432
    assert counts.with_mtp == 682_636_487_424
    assert counts.released == 684_489_845_504
    assert counts.attention == 61 * 187_107_328
    assert counts.routed_experts == 58 * 256 * 44_040_192
    assert counts.shared_experts == 58 * 44_040_192


@pytest.mark.parametrize(
    ("layer", "expected"), [(0, 583_483_392), (2, 583_483_392), (3, 11_507_286_272), (60, 11_507_286_272)]
)
def test_one_layer_of_deepseek_v3(layer: int, expected: int) -> None:
    shapes = parameter_shapes(moe.preset("deepseek_v3"))
    assert sum(math.prod(s) for name, s in shapes.items() if name.startswith(f"layers.{layer}.")) == expected


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [("deepseek_v2", 235_741_434_880, 21_375_800_320), ("deepseek_v2_lite", 15_706_484_224, 2_661_150_208)],
)
def test_deepseek_v2(name: str, total: int, activated: int) -> None:
    counts = count_parameters(moe.preset(name))
    assert (counts.total, counts.activated) == (total, activated)
    assert counts.released == counts.with_mtp == total


@pytest.mark.parametrize(
    ("name", "total"),
    [  # as the safetensors headers of the released files add up, or as their model cards say
        ("mixtral_8x7b", 46_702_792_704),
        ("qwen3_30b_a3b", 30_532_122_624),
        ("qwen1_5_moe_a2_7b", 14_315_784_192),
        ("olmoe_1b_7b", 6_919_161_856),
        ("gpt_oss_20b", 20_914_757_184),
        ("gpt_oss_120b", 116_829_156_672),
        ("dots_llm1", 142_774_381_696),
        ("kimi_k2_5", 1_026_408_232_448),
        ("ernie_4_5_21b_a3b", 21_825_437_888),
        ("qwen3_0_6b", 596_049_920),  # its files repeat the tied embedding as the head
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_other_released_models(name: str, total: int) -> None:
    assert count_parameters(moe.preset(name)).total == total


def test_glm_4_7_flash() -> None:
    """Its files have the MTP layer and repeat embedding and head in it."""
    counts = count_parameters(moe.preset("glm_4_7_flash"))
    assert (counts.total, counts.released) == (29_943_393_920, 31_221_488_576)


def test_ernie_4_5_300b_is_as_large_as_its_name() -> None:
    counts = count_parameters(moe.preset("ernie_4_5_300b_a47b"))
    assert counts.total == pytest.approx(300e9, rel=0.01) and counts.activated == pytest.approx(47e9, rel=0.02)


def test_tied_embeddings_count_once_and_stay_the_head() -> None:
    untied, tied = count_parameters(V3), count_parameters(dataclasses.replace(V3, tie_word_embeddings=True))
    embedding = V3.vocab_size * V3.hidden_size
    assert tied.total == untied.total - embedding
    assert tied.activated == tied.activated_without_embedding == untied.activated_without_embedding


def test_released_repeats_embedding_and_head_per_mtp_module() -> None:
    counts = count_parameters(V3_MTP)
    assert counts.released - counts.with_mtp == 2 * 2 * V3.vocab_size * V3.hidden_size
    assert counts.mtp > 0 and counts.total == count_parameters(V3).total


def test_counts_shapes_and_products_of_random_models_are_those_of_their_modules() -> None:
    """All fields of a config at random: what is computed by arithmetic against what is built."""
    rng = random.Random(0)
    for _ in range(200):
        config = draw(rng)
        with torch.device("meta"):
            model = moe.Transformer(config)
        state = model.state_dict()
        assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}, config

        counts = count_parameters(config)
        sizes = {name: tensor.numel() for name, tensor in state.items()}
        assert counts.with_mtp == sum(sizes.values()), config
        assert counts.mtp == sum(n for name, n in sizes.items() if name.startswith("mtp.")), config
        assert counts.routed_experts == sum(
            n for name, n in sizes.items() if name.startswith("layers") and "experts." in name and "shared" not in name
        )
        assert counts.attention == sum(
            n for name, n in sizes.items() if name.startswith("layers") and "self_attn" in name
        )
        idle = config.n_routed_experts - config.num_experts_per_tok
        share = idle / config.n_routed_experts if config.n_routed_experts else 0
        assert counts.activated == counts.total - counts.routed_experts * share, config

        # Multiply-adds of one token with weights: each prediction module uses the head once more.
        head = state["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].numel()
        products = head * (1 + config.num_nextn_predict_layers)
        for name, module in model.named_modules():
            if isinstance(module, Router) or (isinstance(module, torch.nn.Linear) and name != "lm_head"):
                products += module.weight.numel()
            if isinstance(module, Experts):
                each = (module.gate_up_proj.numel() + module.down_proj.numel()) // config.n_routed_experts
                products += config.num_experts_per_tok * each
        assert sum(block.macs for block in blocks(config, 8)) == products, config

        parts = training(config, Deployment(1, 1, "bf16", 1)).parts
        assert parts["parameters"] == 4 * counts.with_mtp, config
        units = [*model.layers, *model.mtp]
        largest = max(sum(tensor.numel() for tensor in unit.state_dict().values()) for unit in units)
        assert parts["a gathered block"] == 2 * largest, config


@pytest.mark.parametrize("family", BY_FAMILY)
def test_the_planned_cache_is_the_one_that_a_model_fills(family: str) -> None:
    config = BY_FAMILY[family]
    cache = Cache(config)
    with torch.no_grad():
        moe.Transformer(config).eval()(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    planned = inference(config, Deployment(1, 1, "bf16", 6)).parts["cache"]
    assert cache.nbytes == 2 * planned  # fp32 here
