"""Lower bound of a run's memory, computed from its settings before anything is written or allocated."""

import dataclasses
import math
import os

import torch

from moe.checkpoint.reading.memory import free_bytes
from moe.config import ModelConfig
from moe.counts import parameter_shapes
from moe.errors import ConfigError
from moe.roles import role_of
from moe.train.settings import RunSettings

MIN_VOCABULARY = 256  # the byte tokens of a trained tokenizer


def check_memory(
    config: ModelConfig, settings: RunSettings, *, ranks: int = 1, device: torch.device, vocab_size: int | None = None
) -> None:
    """Raise `ConfigError` if a run needs more than the free memory of `device`, even by a lower bound.

    Args:
        ranks: number of processes that train together; those of one machine share its memory.
        vocab_size: vocabulary size of the tokenizer; None if there is no tokenizer yet.
    """
    known = vocab_size or (1 if settings.tokenizer else min(MIN_VOCABULARY, config.vocab_size))
    config = dataclasses.replace(config, vocab_size=known)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks > 1 and device.type == "cpu" else 1
    free, what = free_bytes(device)
    states, optimizer = (here * size for size in state_bytes(config, settings, ranks))
    rows = settings.batch_size / ranks

    def needed(rows: float, micro_batches: int = settings.accumulation) -> int:
        # Optimizer state exists after the first step. Gradients do not exist during the forward pass.
        waiting = 8 * (micro_batches - 1) * rows * settings.seq_length  # ids, counted before the first forward pass
        activations = here * round(activation_bytes(config, settings, rows) + waiting)
        kept = states // 2 + activations + (optimizer if settings.steps > 1 else 0)
        return round(max(states + optimizer, kept))

    if needed(rows) <= free:
        return
    option, advice = f"--{settings.source}", "use a smaller model or, under torchrun, more ranks"
    if states + optimizer <= free:
        option, advice = "--seq-length", "use shorter sequences"
        if needed(min(rows, 1)) <= free:
            option, advice = "--batch-size", "use fewer sequences with --accumulation"
        if needed(rows, 1) <= free:
            option, advice = "--accumulation", "use fewer forward passes per step"
    name = option[2:].replace("-", "_")
    value = settings.name if name == settings.source else getattr(settings, name)
    found = f"{_gib(needed(rows))} needed at least, {_gib(free)} free"
    raise ConfigError(option, value, f"a run that fits into {what}; found {found}; {advice}")


def state_bytes(config: ModelConfig, settings: RunSettings, ranks: int) -> tuple[int, int]:
    """Return the bytes per rank of (parameters and gradients, optimizer state), all in fp32.

    Experts are divided among `ep` ranks, and sharded further if more ranks shard the other parameters.
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


def activation_bytes(config: ModelConfig, settings: RunSettings, rows: float) -> int:
    """Return a lower bound of the bytes that a forward pass on `rows` sequences saves for the backward pass.

    Counts per block the two residual sums and the inputs of its products: inputs in the compute dtype, attention's q,
    k, v and output, pre-activations of experts; with activation checkpointing only the block's input. Also counts
    logits, log-probabilities and masks [S, S], but not MTP modules.
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
    masks = rows * length**2 if settings.attention_masks else 0
    return round(tokens * (kept + config.vocab_size * (size + 4)) + masks)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
