"""All-to-all traffic of a token: the ranks and nodes that it reaches, and bytes.

Routing is assumed to be balanced: all choices of groups, of experts within them, and of the token's own rank in the
expert group are equally likely. A token is sent once to each destination, whatever the number of its experts there.
Group-limited routing by scores reaches slightly more: with independent scores and EP 64, DeepSeek-V3's rule reaches
7.49 ranks on 3.95 nodes, and this model gives 7.36 on 3.63.
"""

import math
from collections import Counter
from dataclasses import dataclass

from moe.config import ModelConfig
from moe.planning.cluster.gpus import Gpu
from moe.planning.cluster.settings import Mesh, Precision, Rates, Training


def reach_probability(config: ModelConfig, first: int, count: int) -> float:
    """Probability that at least one of the experts first ... first + count - 1 is among a token's top-k.

    topk_group of the n_group groups are selected, with N experts in total. If n of these are in the range, the token
    misses it with probability C(N - n, K) / C(N, K). The result is the mean over all selections of groups.
    """
    size = config.n_routed_experts // config.n_group
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})  # (groups selected, their experts in the range)
    for group in range(config.n_group):
        inside = max(0, min(first + count, (group + 1) * size) - max(first, group * size))
        for (taken, covered), number in list(ways.items()):
            ways[taken + 1, covered + inside] += number
    reachable, top = config.topk_group * size, config.num_experts_per_tok
    selections = {covered: number for (taken, covered), number in ways.items() if taken == config.topk_group}
    missed = sum(number * math.comb(reachable - covered, top) for covered, number in selections.items())
    return 1 - missed / (math.comb(reachable, top) * math.comb(config.n_group, config.topk_group))


def expected_destinations(config: ModelConfig, parts: int) -> float:
    """Expected number of parts that a token reaches if consecutive experts are divided evenly among `parts`."""
    count = config.n_routed_experts // parts
    return sum(reach_probability(config, part * count, count) for part in range(parts))


def copy_bytes(width: int, precision: Precision) -> int:
    """Bytes of one copy of a token, without expert ids and weights."""
    return 2 * width if precision == "bf16" else width + 4 * math.ceil(width / 128)


@dataclass(frozen=True)
class Traffic:
    """All-to-all traffic per token and MoE layer in the forward pass; backward sends the same amount.

    Attributes:
        ranks, nodes: expected number of ranks and nodes that the token reaches, including its own.
        nvlink, network: expected number of copies sent over NVLink and over the network.
        dispatch_bytes, combine_bytes: bytes of one copy.
    """

    ranks: float
    nodes: float
    nvlink: float
    network: float
    dispatch_bytes: int
    combine_bytes: int

    def seconds(self, tokens: int, gpu: Gpu, rates: Rates) -> float:
        """Seconds of one dispatch and one combine: each takes alpha + bytes / beta on the slower link."""
        return sum(
            rates.latency_us * 1e-6
            + tokens * size * max(self.nvlink / gpu.nvlink, self.network / gpu.network) / (rates.link_share * 1e9)
            for size in (self.dispatch_bytes, self.combine_bytes)
        )


def traffic(config: ModelConfig, mesh: Mesh, training: Training) -> Traffic:
    """Traffic within the expert groups of a mesh.

    With transport "node", one copy per node crosses the network, to the rank with the sender's local index, which
    forwards it over NVLink (DeepSeek-V3's report, section 3.2.2). Results return the same way, summed in each node.
    """
    nodes = mesh.ep // mesh.ranks_per_node
    to_ranks, to_nodes = expected_destinations(config, mesh.ep), expected_destinations(config, nodes)
    if training.transport == "node":
        nvlink, network = to_ranks * (1 - 1 / mesh.ranks_per_node), to_nodes * (1 - 1 / nodes)
    else:
        nvlink, network = to_ranks / nodes - to_ranks / mesh.ep, to_ranks * (1 - 1 / nodes)
    width = config.hidden_size
    sizes = copy_bytes(width, training.dispatch), copy_bytes(width, "bf16")
    return Traffic(to_ranks, to_nodes, nvlink, network, *sizes)
