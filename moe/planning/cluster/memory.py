"""Memory of a rank in a training run.

Let a rank have n_e parameters of experts and n_o others. With ZeRO-1, it holds 2 bytes of weight and 4 of gradient for
each, and the optimizer state (4 bytes of master weight and two moments) of n_e / (dp / ep) + n_o / dp parameters; half
as many with dualpipe, where two ranks of a pipeline hold the same parameters. FSDP shards weights and gradients too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe.planning.cluster.settings import Run
from moe.planning.cluster.stages import Block, Rank
from moe.planning.cluster.traffic import traffic


@dataclass(frozen=True)
class Memory:
    """Memory of one rank: its index in the pipeline, and bytes by part."""

    rank: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def held(rank: Rank, run: Run) -> int:
    """Number of parameters of a rank, before sharding."""
    return rank.parameters(experts=True) // run.mesh.ep + rank.parameters(experts=False)


def shard(rank: Rank, run: Run) -> float:
    """Number of parameters whose optimizer state a rank holds."""
    mesh, copies = run.mesh, 2 if run.folded else 1
    experts = rank.parameters(experts=True) / mesh.ep / (mesh.dp // mesh.ep)
    return (experts + rank.parameters(experts=False) / mesh.dp) / copies


def moment_bytes(run: Run) -> int:
    """Bytes of both moments of one parameter."""
    return 2 * (2 if run.training.moments == "bf16" else 4)


def memory(rank: Rank, run: Run) -> Memory:
    """Peak memory of a rank, with balanced experts."""
    config, training, tokens = run.config, run.training, run.tokens
    whole, mine = held(rank, run), shard(rank, run)
    sharded = mine if training.sharding == "fsdp" else whole
    copies = traffic(config, run.mesh, training)
    saved = sum(
        flight * sum(saved_bytes(block, run, copies.ranks, training.recompute) for block in stage)
        for flight, stage in zip(in_flight(rank, run), rank.stages, strict=True)
    )
    parts = {
        "parameters": round(2 * sharded),
        "gradients": round(4 * sharded),
        "optimizer": round((4 + moment_bytes(run)) * mine),
        "activations in flight": round(tokens * saved),
        # Recomputed activations, and their gradients.
        "a block's working set": round(
            2 * tokens * max(saved_bytes(b, run, copies.ranks, "none") for b in rank.blocks)
        ),
    }
    if training.sharding == "fsdp":
        parts["a gathered block"] = max(2 * held(Rank(0, ((b,),)), run) for b in rank.blocks)
    if run.mesh.ep > 1:
        received = copies.dispatch_bytes + copies.combine_bytes
        parts["all-to-all buffers"] = round(tokens * copies.ranks * received)
    if any("norm.weight" in block.shapes for block in rank.blocks):  # the final norm is in the block that has the head
        parts["logits"] = tokens * config.vocab_size * 4 * 2
    return Memory(rank.index, parts)


def in_flight(rank: Rank, run: Run) -> list[float]:
    """Number of micro-batches whose activations each stage of a rank holds.

    With dualpipe it is pp + 1 for both stages together (DeepSeek-V3's report, table 2). In a one-way pipeline, the
    first stage starts pp micro-batches before the first one returns.
    """
    pp, batches = run.mesh.pp, run.micro_batches
    if run.folded:
        return [min((pp + 1) / 2, batches / 2)] * 2
    return [min(pp - rank.index, batches)]


def saved_bytes(block: Block, run: Run, reached: float, recompute: str) -> float:
    """Bytes of activations saved for backward, per token and block.

    Saved always: the input, in bf16. Unless blocks are recomputed in full: the sum after attention, latents (or q, k,
    v) and the output of attention in bf16; expert inputs (a copy for each of the `reached` ranks) and gate and up rows
    in the dtype of the matrix products. With recompute="none": also normed inputs, q, k and v of MLA, and the results
    of SwiGLU.
    """
    config = run.config
    width, heads = config.hidden_size, config.num_attention_heads
    if recompute == "full":
        return 2 * width
    values = config.v_head_dim or config.qk_head_dim
    qkv = 2 * heads * config.qk_head_dim + heads * values
    if config.kv_lora_rank is not None:
        kept = config.kv_lora_rank + config.rope_dim + (config.q_lora_rank or heads * config.qk_head_dim)
    else:
        kv = config.num_key_value_heads or heads
        qkv = kept = (heads + 2 * kv) * config.qk_head_dim
    hidden = config.intermediate_size
    inputs = 0.0
    if block.has_experts:
        hidden = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_width
        inputs = reached * width
    size = 1 if run.dtype == "fp8" else 2
    saved = 2 * (2 * width + kept + heads * values) + size * (inputs + 2 * hidden)
    if recompute == "none":
        saved += 2 * (qkv if config.is_mla else 0) + size * (2 * width + hidden)
    return saved
