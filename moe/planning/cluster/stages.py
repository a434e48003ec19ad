"""What each block of a model holds and multiplies, and which blocks a rank of the pipeline has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

from moe.config import ModelConfig
from moe.counts import Shape, parameter_shapes
from moe.planning.cluster.settings import Run

# In bf16 whatever the rest is (DeepSeek-V3's report, section 3.3.1; eh_proj from the released file).
SIXTEEN = ("lm_head.weight", "embed_tokens.weight", "mlp.gate.weight", "shared_expert_gate.weight", "eh_proj.weight")
LATENT = ("q_b_proj.weight", "kv_b_proj.weight")  # MLA's up-projections, which selective recomputation does again


@dataclass(frozen=True)
class Block:
    """A block of the main model or an MTP module, with the embedding, norm and head where they lie.

    shapes: its tensors. products: multiply-adds with weights of one token's forward pass; sixteen: those of them that
    stay in bf16; again: those that selective recomputation repeats; attention: multiply-adds of q k^T and p v.
    """

    shapes: Mapping[str, Shape]
    products: int
    sixteen: int
    again: int
    attention: float
    has_experts: bool


def blocks(config: ModelConfig, sequence: int) -> list[Block]:
    """In the order of the pipeline. The last has the head, once for itself and once for each MTP module."""
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
    if modules or config.tie_word_embeddings:  # the far end of the pipeline needs it too
        found[-1][embedding] = shapes[embedding]
    made = []
    for i, tensors in enumerate(found):
        products = {n: _products(config, n, s) for n, s in tensors.items() if n != embedding}
        if i == len(found) - 1:
            products[head] = math.prod(shapes[head]) * (1 + modules)
        window = config.sliding_window if i < layers and config.is_sliding_layer(i) else None
        width = config.qk_head_dim + (config.v_head_dim or config.qk_head_dim)
        made.append(
            Block(
                tensors,
                sum(products.values()),
                sum(n for name, n in products.items() if name.endswith(SIXTEEN)),
                sum(n for name, n in products.items() if name.endswith(LATENT)),
                config.num_attention_heads * width * mean_context(sequence, window),
                any(".mlp.experts." in name for name in tensors),
            )
        )
    return made


def _products(config: ModelConfig, name: str, shape: Shape) -> int:
    """Multiply-adds of a token with a tensor: none with norms and biases; with top-k of stacked experts."""
    if ".mlp.experts." in name:
        return config.num_experts_per_tok * math.prod(shape[1:]) if len(shape) == 3 else 0
    return math.prod(shape) if len(shape) == 2 else 0


def mean_context(sequence: int, window: int | None = None) -> float:
    """Keys that a query sees under a causal mask, itself included: mean of min(i, window) for i = 1 ... sequence."""
    seen = min(sequence, window or sequence)
    return (seen * (seen + 1) / 2 + (sequence - seen) * seen) / sequence


def model_flops(config: ModelConfig, sequence: int) -> float:
    """FLOPs of training on one token: forward 2 per multiply-add, backward twice that; nothing for recomputation."""
    return 6 * sum(block.products + block.attention for block in blocks(config, sequence))


@dataclass(frozen=True)
class Rank:
    """What one rank of a pipeline holds: one stage, or with dualpipe its two, from either end."""

    index: int
    stages: tuple[tuple[Block, ...], ...]

    @property
    def blocks(self) -> list[Block]:
        return [block for stage in self.stages for block in stage]

    def parameters(self, experts: bool) -> int:
        """Of all routed experts of its blocks, or of everything else; a tensor of both its stages counts once."""
        shapes = {name: shape for block in self.blocks for name, shape in block.shapes.items()}
        return sum(math.prod(shape) for name, shape in shapes.items() if (".mlp.experts." in name) == experts)


def ranks(run: Run, bf16_per_fp8: float) -> list[Rank]:
    """Ranks that differ, in the order of the pipeline: pp of them, or half as many with dualpipe, whose rank i holds
    what rank pp - 1 - i holds.

    Blocks stay whole. They are divided so that the squares of the ranks' FLOPs have the least sum, and, where several
    do, so that the two stages of a rank are most alike. A product in FP8 weighs `bf16_per_fp8`, the ratio of peaks.
    """
    made = blocks(run.config, run.training.sequence)
    eight = bf16_per_fp8 if run.dtype == "fp8" else 1.0
    costs = [(b.products - b.sixteen) * eight + b.sixteen + b.attention for b in made]
    # To a hundredth of a typical block: that a dense one differs from one with experts by less should not decide.
    typical = sorted(costs)[len(costs) // 2] / 100
    whole = tuple(round(cost / typical) for cost in costs)
    held = _divide(whole, run.mesh.pp // 2 if run.folded else run.mesh.pp, run.folded)
    return [Rank(i, tuple(tuple(made[a:b]) for a, b in stages)) for i, stages in enumerate(held)]


Spans = tuple[tuple[tuple[int, int], ...], ...]


@lru_cache
def _divide(costs: tuple[int, ...], count: int, folded: bool) -> Spans:
    """Spans of blocks of each rank; `folded`: a span from either end. Costs are integers, so that ties are exact."""
    before = list(accumulate(costs, initial=0))
    most = before[-1] // count + 2 * max(costs)  # a heavier rank could give a block away

    @cache
    def best(left: int, i: int, j: int) -> tuple[tuple[float, float], Spans]:
        """The blocks i ... j - 1 among `left` ranks: sums of squares of loads and of differences, and the spans."""
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
