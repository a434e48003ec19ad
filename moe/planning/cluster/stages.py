"""Tensors and multiply-adds (MACs) of each block, and the division of blocks among pipeline stages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

from moe.config import ModelConfig
from moe.counts import Shape, parameter_shapes
from moe.planning.cluster.settings import Run

# Weights whose products stay in bf16 (DeepSeek-V3's report, section 3.3.1; eh_proj from the released checkpoint).
BF16_WEIGHTS = (
    "lm_head.weight",
    "embed_tokens.weight",
    "mlp.gate.weight",
    "shared_expert_gate.weight",
    "eh_proj.weight",
)
MLA_UP_PROJECTIONS = ("q_b_proj.weight", "kv_b_proj.weight")  # recomputed by selective recomputation


@dataclass(frozen=True)
class Block:
    """Block of the main model or MTP module, including the embedding, final norm and head where the model has them.

    Attributes:
        shapes: its tensors.
        macs: multiply-adds with weights, in the forward pass of one token.
        bf16_macs: those that stay in bf16.
        recomputed_macs: those that selective recomputation repeats.
        attention_macs: multiply-adds of q k^T and p v.
        has_experts: whether it has routed experts.
    """

    shapes: Mapping[str, Shape]
    macs: int
    bf16_macs: int
    recomputed_macs: int
    attention_macs: float
    has_experts: bool


def blocks(config: ModelConfig, sequence: int) -> list[Block]:
    """Blocks in pipeline order. The last one has the head, which counts once for itself and once per MTP module."""
    layers, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    found: list[dict[str, Shape]] = [{} for _ in range(layers + modules)]
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        first, _, rest = name.partition(".")
        index = int(rest.split(".")[0]) if first in ("layers", "mtp") else -1
        index += layers if first == "mtp" else 0
        found[0 if first == "embed_tokens" else index][name] = shape
    embedding = "embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    if modules or config.tie_word_embeddings:  # the last stage needs a copy
        found[-1][embedding] = shapes[embedding]
    made = []
    for i, tensors in enumerate(found):
        macs = {n: _macs(config, n, s) for n, s in tensors.items() if n != embedding}
        if i == len(found) - 1:
            macs[head] = math.prod(shapes[head]) * (1 + modules)
        window = config.sliding_window if i < layers and config.is_sliding_layer(i) else None
        width = config.qk_head_dim + (config.v_head_dim or config.qk_head_dim)
        made.append(
            Block(
                tensors,
                sum(macs.values()),
                sum(n for name, n in macs.items() if name.endswith(BF16_WEIGHTS)),
                sum(n for name, n in macs.items() if name.endswith(MLA_UP_PROJECTIONS)),
                config.num_attention_heads * width * mean_context(sequence, window),
                any(".mlp.experts." in name for name in tensors),
            )
        )
    return made


def _macs(config: ModelConfig, name: str, shape: Shape) -> int:
    """Multiply-adds of a token with a tensor: 0 for norms and biases; with K of the stacked experts."""
    if ".mlp.experts." in name:
        return config.num_experts_per_tok * math.prod(shape[1:]) if len(shape) == 3 else 0
    return math.prod(shape) if len(shape) == 2 else 0


def mean_context(sequence: int, window: int | None = None) -> float:
    """Mean number of keys per query under a causal mask: the mean of min(i, window) for i = 1 ... sequence."""
    seen = min(sequence, window or sequence)
    return (seen * (seen + 1) / 2 + (sequence - seen) * seen) / sequence


def model_flops(config: ModelConfig, sequence: int) -> float:
    """Training FLOPs per token: 2 per multiply-add forward and 4 backward, without recomputation."""
    return 6 * sum(block.macs + block.attention_macs for block in blocks(config, sequence))


@dataclass(frozen=True)
class Rank:
    """Rank of a pipeline, with its stages: one, or with dualpipe two, one from either end."""

    index: int
    stages: tuple[tuple[Block, ...], ...]

    @property
    def blocks(self) -> list[Block]:
        return [block for stage in self.stages for block in stage]

    def parameters(self, experts: bool) -> int:
        """Number of parameters of routed experts, or of all others; a tensor in both stages counts once."""
        shapes = {name: shape for block in self.blocks for name, shape in block.shapes.items()}
        return sum(math.prod(shape) for name, shape in shapes.items() if (".mlp.experts." in name) == experts)


def ranks(run: Run, bf16_per_fp8: float) -> list[Rank]:
    """Distinct ranks in pipeline order: pp, or pp / 2 with dualpipe, where ranks i and pp - 1 - i hold the same blocks.

    Blocks are not split. The division minimises the sum of squares of the ranks' FLOPs, and among equal sums the
    difference between the two stages of a rank. FP8 products are weighted by `bf16_per_fp8`, the ratio of the peaks.
    """
    made = blocks(run.config, run.training.sequence)
    weight = bf16_per_fp8 if run.dtype == "fp8" else 1.0
    costs = [(b.macs - b.bf16_macs) * weight + b.bf16_macs + b.attention_macs for b in made]
    # Rounded to 1% of a typical block, so that smaller differences between dense and MoE blocks do not matter.
    typical = sorted(costs)[len(costs) // 2] / 100
    rounded = tuple(round(cost / typical) for cost in costs)
    held = _divide(rounded, run.mesh.pp // 2 if run.folded else run.mesh.pp, run.folded)
    return [Rank(i, tuple(tuple(made[a:b]) for a, b in stages)) for i, stages in enumerate(held)]


Spans = tuple[tuple[tuple[int, int], ...], ...]


@lru_cache
def _divide(costs: tuple[int, ...], count: int, folded: bool) -> Spans:
    """Spans of blocks for each rank; if `folded`, one from either end. Costs are integers, so that ties are exact."""
    before = list(accumulate(costs, initial=0))
    most = before[-1] // count + 2 * max(costs)  # a heavier rank could pass a block to another

    @cache
    def best(left: int, i: int, j: int) -> tuple[tuple[float, float], Spans]:
        """Best division of blocks i ... j - 1 among `left` ranks: sums of squares (loads, differences), and spans."""
        if left == 0:
            return (0.0 if i == j else math.inf, 0.0), ()
        found: tuple[tuple[float, float], Spans] = ((math.inf, math.inf), ())
        for front in range(1, j - i + 1):
            here = before[i + front] - before[i]
            if here > most:
                break
            for back in range(1, j - i - front + 1) if folded else (0,):
                there = before[j] - before[j - back]
                if here + there > most:
                    break
                (loads, differences), rest = best(left - 1, i + front, j - back)
                score = (loads + (here + there) ** 2, differences + ((here - there) ** 2 if folded else 0))
                if score < found[0]:
                    spans = ((i, i + front), (j - back, j))
                    found = (score, (spans if folded else spans[:1], *rest))
        return found

    return best(count, 0, len(costs))[1]
