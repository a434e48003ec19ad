"""A model that trains in a moment, and the settings of its runs."""

import io
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moe.config import ModelConfig
from moe.train.settings import Settings

MICRO = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_interleave=True,
    max_position_embeddings=64,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
    aux_loss_alpha=1e-3,
)
MICRO_SETTINGS = Settings(
    preset="micro", steps=6, batch_size=2, seq_length=16, lr=1e-2, warmup=2, eval_every=0, save_every=0
)
QUIET = Console(file=io.StringIO())
State = tuple[dict[str, Tensor], dict[str, Any]]


def assert_same_state(a: State, b: State) -> None:
    (tensors_a, values_a), (tensors_b, values_b) = a, b
    assert values_a == values_b and tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []
