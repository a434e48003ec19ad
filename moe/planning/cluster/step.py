"""Time of a training step, and GPU hours of a run.

A micro-batch takes a rank t = compute + exposed communication, a third of it in the forward pass. A step takes

    micro-batches * t  +  bubble  +  exposed reduction  +  optimizer

on the slowest rank. Bubbles are those of table 2 in DeepSeek-V3's report, with F = W = t / 3 (forward, and backward for
weights) and B = 2 t / 3 (all of backward): 1f1b (pp - 1)(F + B), zb1p (pp - 1)(F + B - 2W), dualpipe
(pp / 2 - 1)(F&B + B - 3W), where F&B = F + B.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe.errors import ConfigError
from moe.planning.cluster.gpus import Gpu
from moe.planning.cluster.memory import moment_bytes, shard
from moe.planning.cluster.settings import Rates, Run
from moe.planning.cluster.stages import Block, Rank, model_flops, ranks
from moe.planning.cluster.traffic import traffic


@dataclass(frozen=True)
class Step:
    """Time of one optimizer step.

    Attributes:
        parts: seconds of the slowest rank by part.
        hidden: seconds of its communication that computation hides.
        tokens, gpus: tokens of the step, and number of GPUs.
        mfu: the model's FLOPs, without recomputation, as a fraction of the dense bf16 peak.
    """

    parts: Mapping[str, float]
    hidden: float
    tokens: int
    gpus: int
    mfu: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.seconds / self.gpus

    def gpu_hours(self, tokens: float) -> float:
        """GPU hours for `tokens`, without restarts, evaluation and batch size warmup."""
        return tokens / self.tokens_per_gpu / 3600


def bf16_per_fp8(gpu: Gpu) -> float:
    """Ratio of the bf16 peak to the FP8 peak."""
    return gpu.bf16 / (gpu.fp8 or gpu.bf16)


def compute_seconds(block: Block, run: Run, gpu: Gpu, rates: Rates) -> float:
    """Seconds for the forward and backward pass of one token.

    Products take 2 FLOPs per multiply-add forward, 4 backward and 2 for recomputation. Attention has two matrix
    products forward and five backward: 3.5 times forward in total, 4.5 with recomputation.
    """
    full = run.training.recompute == "full"
    bf16_flops = block.bf16_macs * (8 if full else 6)
    flops = (block.macs - block.bf16_macs) * (8 if full else 6)
    flops += block.recomputed_macs * 2 if run.training.recompute == "selective" else 0
    attention = 2 * block.attention_macs * (4.5 if full else 3.5)
    scale = bf16_per_fp8(gpu) if run.dtype == "fp8" else 1.0
    products = (flops * scale + bf16_flops) / rates.matmul_share
    return (products + attention / rates.attention_share) / (gpu.bf16 * 1e12)


def all_to_all_seconds(run: Run, gpu: Gpu, rates: Rates) -> float:
    """Seconds of all-to-all in an MoE layer per micro-batch: forward, backward, and forward again if recomputed."""
    if run.mesh.ep == 1:
        return 0.0
    times = 3 if run.training.recompute == "full" else 2
    return times * traffic(run.config, run.mesh, run.training).seconds(run.tokens, gpu, rates)


def collective_seconds(nbytes: float, replicas: int, neighbours: int, gpu: Gpu, rates: Rates) -> float:
    """Seconds of a reduce-scatter or all-gather of `nbytes` among replicas, of which `neighbours` share a node.

    With w replicas per node on n nodes, each rank moves (w - 1) / w of the bytes over NVLink, and the ranks of a node
    together move (n - 1) / n over the network. Both run concurrently.
    """
    nodes = replicas / neighbours
    inside = nbytes * (1 - 1 / neighbours) / gpu.nvlink
    across = nbytes * (1 - 1 / nodes) / neighbours / gpu.network
    return max(inside, across) / (rates.link_share * 1e9)


def reduction_seconds(rank: Rank, run: Run, gpu: Gpu, rates: Rates) -> float:
    """Seconds to reduce-scatter fp32 gradients and all-gather bf16 weights among ranks with the same parameters.

    With ZeRO-1 once per step; with FSDP in each micro-batch, where weights are gathered again for backward.
    """
    mesh, node = run.mesh, run.mesh.gpus_per_node
    experts = rank.parameters(experts=True) / mesh.ep
    others = rank.parameters(experts=False)
    fsdp = run.training.sharding == "fsdp"
    each = (4 + 2 * 2) * run.micro_batches if fsdp else 4 + 2
    copies = mesh.dp // mesh.ep
    beside = min(copies, max(1, node // mesh.ep))
    return collective_seconds(each * experts, copies, beside, gpu, rates) + collective_seconds(
        each * others, mesh.dp, min(mesh.dp, node), gpu, rates
    )


def step(run: Run, gpu: Gpu, rates: Rates) -> Step:
    """Time of an optimizer step, which is that of the slowest rank."""
    rates.check()
    if run.dtype == "fp8" and gpu.fp8 is None:
        raise ConfigError("dtype", run.dtype, "bf16 on a GPU without FP8")
    exchange = all_to_all_seconds(run, gpu, rates)
    timed = [_parts(rank, run, gpu, rates, exchange) for rank in ranks(run, bf16_per_fp8(gpu))]
    parts, hidden = max(timed, key=lambda found: sum(found[0].values()))
    flops = model_flops(run.config, run.training.sequence) * run.step_tokens
    mfu = flops / sum(parts.values()) / (run.mesh.gpus * gpu.bf16 * 1e12)
    return Step(parts, hidden, run.step_tokens, run.mesh.gpus, mfu)


def _parts(rank: Rank, run: Run, gpu: Gpu, rates: Rates, layer: float) -> tuple[dict[str, float], float]:
    """Seconds of a rank's step by part, and hidden seconds; `layer`: all-to-all seconds per layer and micro-batch."""
    # With dualpipe, each stage of a rank processes half of the micro-batches.
    batches = run.micro_batches / len(rank.stages)
    compute = batches * run.tokens * sum(compute_seconds(b, run, gpu, rates) for b in rank.blocks)
    exchange = batches * layer * sum(block.has_experts for block in rank.blocks)
    reduction = reduction_seconds(rank, run, gpu, rates)
    hidden = min(rates.overlap * (exchange + reduction), compute)
    shown = 1 - hidden / (exchange + reduction) if exchange + reduction else 1.0
    pp = run.mesh.pp
    bubbles = {"1f1b": pp - 1, "zb1p": (pp - 1) / 3, "dualpipe": (pp / 2 - 1) * 2 / 3}
    micro_batch = (compute + exchange * shown) / run.micro_batches
    # AdamW reads a gradient, reads and writes the master weight and both moments, and writes the weight.
    touched = 4 + 2 * 4 + 2 * moment_bytes(run) + 2
    return {
        "compute": compute,
        "all-to-all": exchange * shown,
        "bubble": bubbles[run.training.schedule] * micro_batch,
        "reduction": reduction * shown,
        "optimizer": touched * shard(rank, run) / (gpu.bandwidth * 1e9),
    }, hidden
