"""Small models with every kind of attention."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

import moe

SMALL = moe.ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=40,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_interleave=True,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.2,
)
GROUPED = dataclasses.replace(
    SMALL,
    kv_lora_rank=None,
    q_lora_rank=None,
    qk_nope_head_dim=None,
    qk_rope_head_dim=None,
    v_head_dim=None,
    num_key_value_heads=1,
    head_dim=6,
    qk_norm="head",
    rope_interleave=False,
)


MLA = dict(kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
GQA = dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)


def small_model(attention: dict[str, Any], **more: Any) -> moe.Transformer:
    settings: dict[str, Any] = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    settings |= dict(intermediate_size=24, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3)
    settings |= dict(first_k_dense_replace=1, aux_loss_alpha=0.1, router_z_loss_coef=0.01, initializer_range=0.2)
    return moe.Transformer(moe.ModelConfig(**settings | attention | more))


def distance(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def noisy(config: moe.ModelConfig) -> moe.Transformer:
    """A model whose norms, biases and sinks are not the initial ones."""
    model = moe.Transformer(config, seed=1).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=g) * 0.2)
    return model
