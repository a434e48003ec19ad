"""Replication and placement of experts on GPUs from recorded loads, as in EPLB.

L layers, E experts, G GPUs, P physical experts: the number of experts that all GPUs together hold per layer, replicas
included, P / G on each.
The load of an expert is divided evenly among its replicas.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import ConfigError

MAX_PHYSICAL_EXPERTS = 2**16  # per layer, so that a placement takes seconds
PAIRS_AT_ONCE = 2**16  # of items whose swap is considered


@dataclass(frozen=True)
class PlacementReport:
    """Load of the busiest GPU in each layer, in the unit of the load.

    Attributes:
        layers: L names.
        experts, physical_experts, gpus: E, P, G.
        mean: mean load of the GPUs.
        before: load with the experts in order, E / G on each GPU without replicas; None if G does not divide E.
        after: load with the placement.
        bound: lower bound for any placement of P physical experts: the maximum of the mean and of the smallest possible
            load of the hottest replica. It may not be attainable.
    """

    layers: list[str]
    experts: int
    physical_experts: int
    gpus: int
    mean: list[float]
    before: list[float] | None
    after: list[float]
    bound: list[float]

    @property
    def redundant_experts_per_gpu(self) -> float:
        """Additional experts per GPU and layer that the replicas need, beyond E / G."""
        return (self.physical_experts - self.experts) / self.gpus

    def ratios(self, load: list[float]) -> list[float]:
        """`before`, `after` or `bound` divided by the mean: from 1 (balanced) to G. 1 for a layer without load."""
        return [most / mean if mean else 1.0 for most, mean in zip(load, self.mean, strict=True)]

    def overall(self, load: list[float]) -> float:
        """Ratio for all layers together: sum of the busiest GPUs' loads divided by the sum of the means.

        In every layer the other GPUs wait for the busiest one.
        """
        return math.fsum(load) / math.fsum(self.mean) if any(self.mean) else 1.0


@dataclass(frozen=True, eq=False)
class Placement:
    """Assignment of physical experts, of which GPU g holds g P / G to (g + 1) P / G - 1.

    Attributes:
        physical_to_logical: int64 [L, P], expert of which each physical one is a replica, ascending within a GPU.
        replicas: int64 [L, E], number of physical experts of each expert, at least 1.
        logical_to_physical: int64 [L, E, maximum of replicas], physical experts of each expert, ascending, padded with
            -1.
        gpus: G.
    """

    physical_to_logical: Tensor
    replicas: Tensor
    logical_to_physical: Tensor
    gpus: int

    def gpu_load(self, load: Tensor) -> Tensor:
        """Load of each GPU: float64 [L, G] from any load [L, E].

        Raises:
            ConfigError: the load has a different shape, or is invalid as in `place`.
        """
        load = _checked(load)
        if load.shape != self.replicas.shape:
            raise ConfigError("load", list(load.shape), f"the placement's layers and experts, {[*self.replicas.shape]}")
        share = (load / self.replicas).gather(1, self.physical_to_logical)
        return share.unflatten(1, (self.gpus, -1)).sum(-1)

    def report(self, load: Tensor, layers: Sequence[str] | None = None) -> PlacementReport:
        """Compare the placement with the experts in order for load [L, E]; layers are named load[0], ... by default.

        Raises:
            ConfigError: as in `gpu_load`; or the number of names is not L.
        """
        after = self.gpu_load(load).amax(1)
        load = _checked(load)
        experts, physical = load.shape[1], self.physical_to_logical.shape[1]
        names = [f"load[{i}]" for i in range(len(load))] if layers is None else list(layers)
        if len(names) != len(load):
            raise ConfigError("layers", names, f"{len(load)} names")
        mean = load.sum(1) / self.gpus
        before = None
        if experts % self.gpus == 0:
            before = load.unflatten(1, (self.gpus, -1)).sum(-1).amax(1).tolist()
        hottest = [max(_share(row, _replicate(row, physical, self.gpus))) for row in load.tolist()]
        bound = torch.maximum(mean, mean.new_tensor(hottest))
        loads = mean.tolist(), before, after.tolist(), bound.tolist()
        return PlacementReport(names, experts, physical, self.gpus, *loads)


def place(load: Tensor, *, gpus: int, physical_experts: int, nodes: int = 1, groups: int = 1) -> Placement:
    """Replicate and place the experts of every layer to minimise the load of the busiest GPU.

    If nodes divides groups, each group of E / groups consecutive experts is placed on one node: heaviest group first,
    on the least loaded node with room. Each node then replicates its experts and packs them onto its GPUs. Otherwise
    all GPUs count as one node. The next replica goes to the expert with the highest load per replica. Packing places
    the heaviest replica first, on the least loaded GPU with room. Ties go to the lowest index.

    This policy of EPLB is improved in three ways. A GPU holds two replicas of one expert only if that is better. The
    busiest GPU swaps physical experts with others while its load decreases. Experts stay in order if that is better
    than the result. The load of the busiest GPU is therefore at most that of the policy, and of the experts in order.

    Args:
        load: [L, E], of any real dtype: counts, or an average of counts. A layer may be without load.
        gpus: G, a multiple of nodes.
        physical_experts: P, a multiple of G from E to E * G / nodes; at the maximum, every GPU holds all experts of its
            node.
        nodes: number of nodes.
        groups: n_group of the router, a divisor of E.

    Returns:
        Tensors on the CPU; deterministic.

    Raises:
        ConfigError: the numbers do not fit together; or the load is empty, negative or not finite, or its sum is not.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.4, and the README of github.com/deepseek-ai/EPLB.
    """
    load = _checked(load)
    experts = load.shape[1]
    for name, value in (("gpus", gpus), ("physical_experts", physical_experts), ("nodes", nodes), ("groups", groups)):
        if type(value) is not int or value < 1:
            raise ConfigError(name, value, "a positive integer")
    if gpus % nodes:
        raise ConfigError("nodes", nodes, f"a divisor of the {gpus} GPUs")
    if experts % groups:
        raise ConfigError("groups", groups, f"a divisor of the {experts} experts")
    if groups % nodes:
        nodes = groups = 1
    if not experts <= physical_experts <= experts * gpus // nodes or physical_experts % gpus:
        most = f"{experts * gpus // nodes}, at which each GPU holds all experts of its node"
        allowed = f"a multiple of the {gpus} GPUs from the {experts} experts up to {most}"
        raise ConfigError("physical_experts", physical_experts, allowed)
    if physical_experts > MAX_PHYSICAL_EXPERTS:
        raise ConfigError("physical_experts", physical_experts, f"at most {MAX_PHYSICAL_EXPERTS:,}")
    placed = [_place_layer(row, gpus, physical_experts, nodes, groups) for row in load.tolist()]
    physical = torch.tensor([[e for gpu in layer for e in sorted(gpu)] for layer in placed])
    replicas = torch.zeros(load.shape, dtype=torch.int64).scatter_add_(1, physical, torch.ones_like(physical))

    by_expert = physical.argsort(dim=1, stable=True)
    expert = physical.gather(1, by_expert)
    rank = torch.arange(physical_experts) - (replicas.cumsum(1) - replicas).gather(1, expert)
    logical = torch.full((*load.shape, int(replicas.max())), -1)
    logical[torch.arange(len(load))[:, None], expert, rank] = by_expert
    return Placement(physical, replicas, logical, gpus)


def _checked(load: Tensor) -> Tensor:
    """Check the load and convert it to float64 on the CPU."""
    if load.dim() != 2 or not load.numel():
        raise ConfigError("load", list(load.shape), "a shape [layers, experts] without 0")
    if load.dtype == torch.bool or load.is_complex():
        raise ConfigError("load", load.dtype, "integers or floats")
    load = load.detach().to("cpu", torch.float64)
    wrong = (~(load.isfinite() & (load >= 0))).nonzero().tolist()
    if wrong:
        layer, expert = wrong[0]
        raise ConfigError(f"load[{layer}][{expert}]", load[layer, expert].item(), "a finite number of at least 0")
    if not load.sum().isfinite():
        raise ConfigError("load", load.max().item(), "a finite sum in float64")
    return load


def _place_layer(load: list[float], gpus: int, physical: int, nodes: int, groups: int) -> list[list[int]]:
    """Place the experts of one layer; returns those of each GPU."""
    size = len(load) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    placed = []
    for node in _pack([math.fsum(load[e] for e in group) for group in members], [1] * groups, nodes, apart=False):
        experts = sorted(e for group in node for e in members[group])
        local = _place_node([load[e] for e in experts], gpus // nodes, physical // nodes)
        placed += [[experts[i] for i in gpu] for gpu in local]
    own = len(load) // gpus
    if own * gpus == len(load):
        # A replica on the same GPU does not change its load, so this is the load of the experts in order.
        in_order = [[gpu * own + i % own for i in range(physical // gpus)] for gpu in range(gpus)]
        return min(placed, in_order, key=lambda experts: _max_load(experts, load))
    return placed


def _place_node(load: list[float], gpus: int, physical: int) -> list[list[int]]:
    """Replicate and place the experts of one node; returns those of each GPU."""
    replicas = _replicate(load, physical, physical)
    share = _share(load, replicas)
    policy = _pack(share, replicas, gpus, apart=False)
    replicas_apart = _replicate(load, physical, gpus)
    share_apart = _share(load, replicas_apart)
    placed = _swap(_pack(share_apart, replicas_apart, gpus, apart=True), share_apart)
    return placed if _max_load(placed, load) <= _max_load(policy, load) else _swap(policy, share)


def _replicate(load: list[float], physical: int, most: int) -> list[int]:
    """Number of replicas of each expert, at most `most`, that minimises the largest load per replica."""
    replicas = [1] * len(load)
    hottest = [(-value, expert) for expert, value in enumerate(load) if most > 1]
    heapq.heapify(hottest)
    for _ in range(physical - len(load)):
        _, expert = heapq.heappop(hottest)
        replicas[expert] += 1
        if replicas[expert] < most:
            heapq.heappush(hottest, (-load[expert] / replicas[expert], expert))
    return replicas


def _share(load: list[float], replicas: list[int]) -> list[float]:
    """Load per replica of each expert."""
    return [value / number for value, number in zip(load, replicas, strict=True)]


def _pack(share: list[float], replicas: list[int], packs: int, *, apart: bool) -> list[list[int]]:
    """Pack the same number of items into each pack; with `apart`, avoid packs that already contain the item."""
    size = sum(replicas) // packs
    packed: list[list[int]] = [[] for _ in range(packs)]
    room = [(0.0, pack) for pack in range(packs)]  # a heap of the weights of packs that are not full
    for item in sorted(range(len(share)), key=lambda item: (-share[item], item)):
        filled: list[tuple[float, int]] = []  # a heap of packs that contain the item
        avoided = apart
        for _ in range(replicas[item]):
            if not room:
                room, filled, avoided = filled, [], False
            weight, pack = heapq.heappop(room)
            packed[pack].append(item)
            if len(packed[pack]) < size:
                heapq.heappush(filled if avoided else room, (weight + share[item], pack))
        for entry in filled:
            heapq.heappush(room, entry)
    return packed


def _swap(packed: list[list[int]], share: list[float]) -> list[list[int]]:
    """Swap items of the heaviest pack with items of other packs until no swap lowers its weight.

    Each swap is the one after which the heavier of the two packs is lightest. An item is never moved to a pack that
    contains it.
    """
    item, weight = torch.tensor(packed), torch.tensor(share, dtype=torch.float64)
    held = torch.zeros(len(packed), len(share), dtype=torch.bool).scatter_(1, item, True)
    total = weight[item].sum(1)
    while True:
        heaviest = int(total.argmax())
        least, i, pack, j = _best_swap(item, weight, held, total, heaviest)
        # The margin exceeds the rounding error of a sum, so that no two swaps undo each other.
        if not least < total[heaviest] * (1 - 1e-9):
            return item.tolist()
        out, into = int(item[heaviest, i]), int(item[pack, j])
        item[heaviest, i], item[pack, j] = into, out
        for changed in (heaviest, pack):
            held[changed] = False
            held[changed, item[changed]] = True
            total[changed] = weight[item[changed]].sum()


def _best_swap(item: Tensor, weight: Tensor, held: Tensor, total: Tensor, heaviest: int) -> tuple[float, int, int, int]:
    """Find the best swap: the weight of the heavier pack after it, and its item i, the other pack and its item j."""
    best, own = (math.inf, 0, 0, 0), item[heaviest]
    for packs in total.argsort(stable=True).split(max(PAIRS_AT_ONCE // len(own) ** 2, 1)):
        # No swap makes both packs lighter than their mean.
        if (total[heaviest] + total[packs[0]]) / 2 > best[0]:
            break
        # [item of the heaviest pack, pack, item of that pack]
        moved = weight[own][:, None, None] - weight[item[packs]]
        heavier = torch.maximum(total[heaviest] - moved, total[packs, None] + moved)
        refused = held[packs][:, own].T[:, :, None] | held[heaviest, item[packs]]
        values, at = heavier.masked_fill_(refused, torch.inf).flatten().min(0)
        if values < best[0]:
            i, rest = divmod(int(at), len(packs) * len(own))
            best = float(values), i, int(packs[rest // len(own)]), rest % len(own)
    return best


def _max_load(packed: list[list[int]], load: list[float]) -> float:
    """Load of the busiest GPU."""
    replicas = [0] * len(load)
    for gpu in packed:
        for expert in gpu:
            replicas[expert] += 1
    return max(math.fsum(load[e] / replicas[e] for e in gpu) for gpu in packed)
