"""What a rank of a training run holds.

Where each rank has parameters n_e of experts and n_o of others, ZeRO-1 keeps 2 bytes of weights and 4 of gradient for
all of them, and a share of the optimizer: 4 of master weight and two moments. That share is n_e / (dp / ep) + n_o / dp,
and half of it with dualpipe, where two ranks of a pipeline hold the same. FSDP divides weights and gradients too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe.planning.cluster.settings import Run
from moe.planning.cluster.stages import Block, Rank
from moe.planning.cluster.traffic import traffic


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part. `rank` counts along its pipeline."""

    rank: int
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def held(rank: Rank, run: Run) -> int:
    """Parameters of a rank, before sharding."""
    return rank.parameters(experts=True) // run.mesh.ep + rank.parameters(experts=False)


def shard(rank: Rank, run: Run) -> float:
    """Parameters of which a rank keeps the optimizer's state."""
    mesh, copies = run.mesh, 2 if run.folded else 1
    experts = rank.parameters(experts=True) / mesh.ep / (mesh.dp // mesh.ep)
    return (experts + rank.parameters(experts=False) / mesh.dp) / copies


def moment_bytes(run: Run) -> int:
    """Of both moments of one parameter."""
    return 2 * (2 if run.training.moments == "bf16" else 4)


def memory(rank: Rank, run: Run) -> Memory:
    """What a rank holds at its fullest, experts balanced."""
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
        # What recomputation brings back, and as much of gradients.
        "a block's working set": round(
            2 * tokens * max(saved_bytes(b, run, copies.ranks, "none") for b in rank.blocks)
        ),
    }
    if training.sharding == "fsdp":
        parts["a gathered block"] = max(2 * held(Rank(0, ((b,),)), run) for b in rank.blocks)
    if run.mesh.ep > 1:
        received = copies.dispatch_bytes + copies.combine_bytes
        parts["all-to-all buffers"] = round(tokens * copies.ranks * received)
    if any("norm.weight" in block.shapes for block in rank.blocks):  # the final norm goes with the head
        parts["logits"] = tokens * config.vocab_size * 4 * 2
    return Memory(rank.index, parts)


def in_flight(rank: Rank, run: Run) -> list[float]:
    """Micro-batches whose activations each stage of a rank keeps (DeepSeek-V3's report, table 2: with dualpipe pp + 1
    for the two together). The first stage of a one-way pipeline starts pp before it sees one again.
    """
    pp, batches = run.mesh.pp, run.micro_batches
    if run.folded:
        return [min((pp + 1) / 2, batches / 2)] * 2
    return [min(pp - rank.index, batches)]


def saved_bytes(block: Block, run: Run, reached: float, recompute: str) -> float:
    """Bytes that a token's forward pass through a block leaves for backward.

    Always its input, bf16. Unless blocks are recomputed whole: the sum after attention, latents (or q, k, v) and
    attention's output in bf16, and, in FP8 where products are, what experts receive (a copy for each of the
    `reached` ranks) and gate and up rows. With nothing recomputed also the normed inputs, q, k and v of MLA, and
    SwiGLU's results.
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
    small = 1 if run.dtype == "fp8" else 2
    saved = 2 * (2 * width + kept + heads * values) + small * (inputs + 2 * hidden)
    if recompute == "none":
        saved += 2 * (qkv if config.is_mla else 0) + small * (2 * width + hidden)
    return saved
