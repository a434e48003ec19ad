"""Whether a run fits into memory: a lower bound from its settings, before anything is written or allocated."""

import dataclasses
import math
import os

import torch

from moe.checkpoint.reading.memory import free_bytes
from moe.config import ModelConfig
from moe.counts import parameter_shapes
from moe.errors import ConfigError
from moe.roles import role_of
from moe.train.settings import Settings

BYTES = 256  # what a tokenizer that is trained on the text has at least


def check_memory(
    config: ModelConfig, settings: Settings, *, ranks: int = 1, device: torch.device, vocab_size: int | None = None
) -> None:
    """Raise `ConfigError` if a run certainly needs more than the free memory of `device`.

    Args:
        ranks: processes that train together; those of one machine share its memory.
        vocab_size: that of the tokenizer; None if there is no tokenizer yet.
    """
    known = vocab_size or (1 if settings.tokenizer else min(BYTES, config.vocab_size))
    config = dataclasses.replace(config, vocab_size=known)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks > 1 and device.type == "cpu" else 1
    free, what = free_bytes(device)
    states, optimizer = (here * size for size in state_bytes(config, settings, ranks))
    rows = settings.batch_size / ranks

    def needed(rows: float, micro_batches: int = settings.accumulation) -> int:
        # Optimizers have a state after the first step. Then there are no gradients during a forward pass.
        waiting = 8 * (micro_batches - 1) * rows * settings.seq_length  # ids, counted before the first forward pass
        activations = here * round(activation_bytes(config, settings, rows) + waiting)
        kept = states // 2 + activations + (optimizer if settings.steps > 1 else 0)
        return round(max(states + optimizer, kept))

    if needed(rows) <= free:
        return
    option, advice = f"--{settings.source}", "a smaller model, or, under torchrun, more ranks that share it"
    if states + optimizer <= free:
        option, advice = "--seq-length", "shorter sequences"
        if needed(min(rows, 1)) <= free:
            option, advice = "--batch-size", "fewer sequences, and --accumulation"
        if needed(rows, 1) <= free:
            option, advice = "--accumulation", "fewer forward passes per step"
    name = option[2:].replace("-", "_")
    value = settings.name if name == settings.source else getattr(settings, name)
    found = f"{_gib(needed(rows))} are needed at least and {_gib(free)} are free"
    raise ConfigError(option, value, f"a run that fits into {what}, where {found}: {advice}")


def state_bytes(config: ModelConfig, settings: Settings, ranks: int) -> tuple[int, int]:
    """Bytes of a rank for parameters and gradients, and for the optimizer's states, all in fp32.

    Experts are divided among `ep` ranks, and cut further where more ranks share the other parameters.
    """
    shards = (settings.dp_shard or ranks // settings.dp_replicate) if ranks > 1 else 1
    cut = max(settings.ep, shards) if ranks > 1 else 1
    weights = moments = 0.0
    for name, shape in parameter_shapes(config).items():
        role = role_of(name)
        mine = math.prod(shape) / (cut if ".mlp.experts." in name else shards)
        if role.name != "correction bias":
            weights += mine
            moments += mine if role.orthogonalised and settings.optimizer == "muon" else 2 * mine
    return round(2 * 4 * weights), round(4 * moments)


def activation_bytes(config: ModelConfig, settings: Settings, rows: float) -> int:
    """Bytes that a forward pass on `rows` sequences keeps for the backward pass, or fewer.

    Counted are a block's two sums and what its products read: inputs in the compute dtype, the attention's q, k, v and
    output, the experts' pre-activations; with activation checkpointing, a block's input alone. Then the logits and
    log-probabilities, and masks of [S, S]. MTP modules are left out.
    """
    size = 2 if settings.dtype == "bf16" else 4
    width, heads, length = config.hidden_size, config.num_attention_heads, settings.seq_length
    value = config.v_head_dim or config.qk_head_dim
    attention = size * heads * (2 * config.qk_head_dim + 2 * value)
    routed = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_width
    layers = range(config.num_hidden_layers)
    hidden = [2 * (routed if config.is_moe_layer(i) else config.intermediate_size) for i in layers]
    blocks = [2 * 4 * width + 2 * size * width + attention + size * each for each in hidden]
    kept = 4 * width * len(blocks) if settings.activation_checkpointing else sum(blocks)
    tokens = rows * length
    masks = rows * length**2 if settings.document_mask else 0
    return round(tokens * (kept + config.vocab_size * (size + 4)) + masks)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
