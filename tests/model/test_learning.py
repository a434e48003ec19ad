"""Legal settings train: every parameter gets a gradient, or the model says which does not and why."""

import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import ConfigError, ModelConfig, MoELayer, RopeParameters
from moe.checkpoint import read_config
from tests.support.any_config import draw
from tests.support.checkpoint_cases import BY_FAMILY, configure

NOTHING = 1e-13  # of gradients in float64; rounding leaves 1e-15


def train_once(config: ModelConfig) -> tuple[set[str], set[str]]:
    """(names of the parameters without a gradient, numbers removed; warnings)."""
    model = moe.Transformer(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
            if name.endswith("norm.weight"):
                parameter.add_(1)
    ids = torch.randint(0, config.vocab_size, (6, 12), generator=generator)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    without = (n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < NOTHING)
    names = {".".join(part for part in name.split(".") if not part.isdecimal()) for name in without}
    return names, {str(warning.message) for warning in told}


def test_every_parameter_of_random_models_learns_or_is_named() -> None:
    rng, idle = random.Random(1), 0
    for _ in range(60):
        config = draw(rng)
        dead, told = train_once(config)
        experts = config.num_moe_layers + config.num_nextn_predict_layers > 0
        single = config.num_experts_per_tok == 1 and config.norm_topk_prob and config.moe_norm_min < 0.5
        constant = single or (config.n_routed_experts == 1 and config.scoring_func == "softmax")
        # Balance losses move a router wherever some experts are left out.
        balanced = config.router_z_loss_coef > 0 or (config.aux_loss_alpha > 0 and config.n_routed_experts > 1)
        if constant and experts:
            idle += 1
            assert len(told) == 1 and "the router does not learn" in told.pop(), config
            assert balanced or dead, config
            assert {name.rpartition("mlp.")[2] for name in dead} <= {"gate.weight", "gate.bias"}, config
        else:
            assert not told and not dead, (config, dead)
    assert idle > 2


SMALL: dict[str, Any] = dict(
    hidden_size=16,
    moe_intermediate_size=6,
    n_routed_experts=4,
    num_experts_per_tok=2,
    vocab_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=7,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_key_value_heads=1,
    head_dim=6,
)
MLA: dict[str, Any] = dict(kv_lora_rank=6, q_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5)
MLA |= dict(num_key_value_heads=None, head_dim=None)
YARN: dict[str, Any] = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)
ROUTER, QK = {"layers.mlp.gate.weight"}, {"layers.self_attn.q_proj.weight", "layers.self_attn.k_proj.weight"}


@pytest.mark.parametrize(
    "settings",
    [
        dict(n_group=4, topk_group=4),
        dict(n_group=4, topk_group=1, num_experts_per_tok=1, norm_topk_prob=False),
        dict(n_group=2, topk_group=1, topk_method="group_limited_greedy"),
        dict(num_experts_per_tok=4),
        dict(num_experts_per_tok=4, scoring_func="softmax", topk_method="greedy"),
        dict(num_experts_per_tok=4, scoring_func="softmax", norm_topk_prob=False),
        dict(num_experts_per_tok=1, norm_topk_prob=False, scoring_func="softmax"),
        dict(num_experts_per_tok=1, moe_norm_min=1.0),
        dict(n_routed_experts=1, num_experts_per_tok=1, norm_topk_prob=False),
        dict(routed_scaling_factor=1e-6),
        dict(router_bias=True, expert_bias=True),
        dict(swiglu_limit=0.1, swiglu_alpha=0.0, swiglu_beta=-1.0),
        dict(shared_expert_gate=True),
        dict(first_k_dense_replace=2),
        dict(tie_word_embeddings=True, num_nextn_predict_layers=2),
        dict(sliding_window=1, attention_sinks=True),
        dict(sliding_window=2, attention_bias=True, attention_output_bias=False),
        dict(sliding_window=1, layer_types=("full_attention", "full_attention")),
        dict(qk_norm="head", head_dim=2),
        dict(qk_norm="whole"),
        dict(rope_parameters=RopeParameters(partial_rotary_factor=0.4)),
        dict(rope_parameters=RopeParameters(**YARN, mscale=0.0, mscale_all_dim=0.0)),
        MLA,
        MLA | dict(q_lora_rank=None, qk_nope_head_dim=0),
        MLA | dict(q_lora_rank=1, kv_lora_rank=1, v_head_dim=1, qk_rope_head_dim=2),
        MLA | dict(attention_bias=True, num_nextn_predict_layers=1),
    ],
    ids=lambda settings: "-".join(settings),
)
def test_extremes_that_learn(settings: dict[str, Any]) -> None:
    assert train_once(ModelConfig(**SMALL | settings)) == (set(), set())


@pytest.mark.parametrize(
    ("settings", "dead", "said"),
    [
        (dict(num_experts_per_tok=1), ROUTER, "the router does not learn: norm_topk_prob with num_experts_per_tok = 1"),
        (dict(num_experts_per_tok=1, router_bias=True, moe_norm_min=1e-12), ROUTER | {"layers.mlp.gate.bias"}, "w / w"),
        (dict(n_group=4, topk_group=1, num_experts_per_tok=1), ROUTER, "the only weight is w / w = 1"),
        (
            dict(n_routed_experts=1, num_experts_per_tok=1, scoring_func="softmax", norm_topk_prob=False),
            ROUTER,
            "the score is 1",
        ),
        (dict(sliding_window=1), QK, "q_proj, k_proj and their norms: in a sliding_window of 1"),
        (
            dict(sliding_window=1, layer_types=("sliding_attention", "full_attention"), qk_norm="head"),
            QK | {"layers.self_attn.q_norm.weight", "layers.self_attn.k_norm.weight"},
            "in a sliding_window of 1",
        ),
    ],
)
def test_settings_that_cannot_learn_are_named(settings: dict[str, Any], dead: set[str], said: str) -> None:
    config = ModelConfig(**SMALL | settings)
    if config.layer_types is not None:  # one layer slides
        config = dataclasses.replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1])
        assert config.is_sliding_layer(0)
    found, told = train_once(config)
    assert found == dead and len(told) == 1 and said in told.pop()


def test_prediction_modules_without_a_loss_are_named() -> None:
    config = ModelConfig(**SMALL, num_nextn_predict_layers=1, mtp_loss_weight=0.0)
    dead, told = train_once(config)
    assert {name.split(".")[0] for name in dead} == {"mtp"} and len(dead) == 16
    assert told == {
        "parameters that do not learn: mtp: mtp_loss_weight is 0; use num_nextn_predict_layers=0, or moe.load(..., "
        "mtp=False)"
    }


def test_a_vocabulary_of_one_token_is_named() -> None:
    dead, told = train_once(dataclasses.replace(ModelConfig(**SMALL), vocab_size=1))
    assert "embed_tokens.weight" in dead and "a vocabulary of one token makes the loss 0" in told.pop()


@pytest.mark.parametrize("settings", [dict(attention_factor=0.0), dict(factor=4.0, rope_type="default")])
def test_rotations_by_nothing_are_refused(settings: dict[str, Any]) -> None:
    """With an attention factor of 0 the rotated dimensions of q and k vanish; a factor is one of YaRN's."""
    with pytest.raises(ConfigError, match=r"rope_parameters\.(attention_factor = 0.0|factor = 4.0)"):
        RopeParameters(**YARN | settings)


def top1(**settings: Any) -> MoELayer:
    return MoELayer(32, 16, 8, 1, seed=0, initializer_range=0.3, **settings).double()


def test_a_layer_of_its_own_warns_where_it_is_trained_and_nowhere_else() -> None:
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = top1()
    with pytest.warns(UserWarning, match="the router does not learn: norm_topk_prob.*use norm_topk_prob=False") as told:
        layer(x).square().sum().backward()
    assert len(told) == 1
    assert layer.gate.weight.grad is not None and layer.gate.weight.grad.abs().max() == 0
    with torch.no_grad():
        layer(x)
    layer.gate.requires_grad_(False)
    layer(x).square().sum().backward()  # the experts, around a router that is meant to stay
    layer.requires_grad_(True)
    layer.eval()
    layer(x).square().sum().backward()
    free = top1(norm_topk_prob=False)
    free(x).square().sum().backward()
    assert free.gate.weight.grad is not None and free.gate.weight.grad.norm() > 1


def test_a_checkpoint_with_one_expert_per_token_loads_and_computes(tmp_path: Path) -> None:
    """Mixtral's files have no key for the normalisation. Nothing warns: the model is used as it is."""
    config = dataclasses.replace(BY_FAMILY["mixtral"], num_experts_per_tok=1)
    moe.save(moe.Transformer(config), tmp_path / "m")
    model = moe.load(tmp_path / "m")
    assert model.config.num_experts_per_tok == 1 and model.config.norm_topk_prob
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    configure(tmp_path / "m", num_experts_per_tok=2)
    assert read_config(tmp_path / "m").idle_router is None
