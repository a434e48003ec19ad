"""How many ranks and nodes a token reaches, and the bytes that it costs.

Routing is taken as balanced: each choice of groups is as likely as any other, and so is each choice of experts in
them; a token's own rank is any of the expert group. A token goes once to a destination, however many of its experts
lie there. A rule that opens the groups of the best experts uses each a little more: DeepSeek-V3's, on independent
scores, reaches 7.49 ranks on 3.95 nodes where this says 7.36 on 3.63 (EP 64).
"""

import math
from collections import Counter
from dataclasses import dataclass

from moe.config import ModelConfig
from moe.planning.cluster.gpus import Gpu
from moe.planning.cluster.settings import Mesh, Precision, Rates, Training


def reached(config: ModelConfig, first: int, count: int) -> float:
    """Probability that a token has at least one of the experts first ... first + count - 1 among its top-k.

    topk_group of n_group groups are open, with N experts in all. If n of them lie in the range, the token misses it
    with probability C(N - n, K) / C(N, K); this is averaged over the ways to open groups.
    """
    size = config.n_routed_experts // config.n_group
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (groups open, their experts in the range)
    for group in range(config.n_group):
        inside = max(0, min(first + count, (group + 1) * size) - max(first, group * size))
        for (taken, covered), number in list(ways.items()):
            ways[taken + 1, covered + inside] += number
    reachable, top = config.topk_group * size, config.num_experts_per_tok
    opened = {covered: number for (taken, covered), number in ways.items() if taken == config.topk_group}
    missed = sum(number * math.comb(reachable - covered, top) for covered, number in opened.items())
    return 1 - missed / (math.comb(reachable, top) * math.comb(config.n_group, config.topk_group))


def destinations(config: ModelConfig, parts: int) -> float:
    """Expected number of parts that a token reaches, where `parts` share a layer's experts in equal runs."""
    count = config.n_routed_experts // parts
    return sum(reached(config, part * count, count) for part in range(parts))


def payload(width: int, precision: Precision) -> int:
    """Bytes of one token's copy; expert ids and weights are not counted."""
    return 2 * width if precision == "bf16" else width + 4 * math.ceil(width / 128)


@dataclass(frozen=True)
class Traffic:
    """What one token costs its rank in one MoE layer, forward; backward sends the same again.

    ranks, nodes: distinct ones that the token reaches, its own included. nvlink, network: copies of it that leave over
    them. dispatch_bytes, combine_bytes: of one copy.
    """

    ranks: float
    nodes: float
    nvlink: float
    network: float
    dispatch_bytes: int
    combine_bytes: int

    def seconds(self, tokens: int, gpu: Gpu, rates: Rates) -> float:
        """One dispatch and one combine of so many tokens: each is alpha + bytes / beta of the slower of the links."""
        return sum(
            rates.latency_us * 1e-6
            + tokens * size * max(self.nvlink / gpu.nvlink, self.network / gpu.network) / (rates.link_share * 1e9)
            for size in (self.dispatch_bytes, self.combine_bytes)
        )


def traffic(config: ModelConfig, mesh: Mesh, training: Training) -> Traffic:
    """Of a mesh's expert groups.

    With transport "node" the copy for a node crosses the network to the rank at the sender's place there, which hands
    it on over NVLink (DeepSeek-V3's report, section 3.2.2); combining goes the same way back, summed in each node.
    """
    nodes = mesh.ep // mesh.ranks_per_node
    to_ranks, to_nodes = destinations(config, mesh.ep), destinations(config, nodes)
    if training.transport == "node":
        nvlink, network = to_ranks * (1 - 1 / mesh.ranks_per_node), to_nodes * (1 - 1 / nodes)
    else:
        nvlink, network = to_ranks / nodes - to_ranks / mesh.ep, to_ranks * (1 - 1 / nodes)
    width = config.hidden_size
    sizes = payload(width, training.dispatch), payload(width, "bf16")
    return Traffic(to_ranks, to_nodes, nvlink, network, *sizes)
