"""Which GPU holds which experts, hot ones several times, from recorded loads: replication and placement as in EPLB.

L layers, E experts, G GPUs, S slots: the places for an expert that all GPUs have together in one layer, S / G on each.
The load of an expert is shared evenly among its replicas.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import ConfigError


@dataclass(frozen=True)
class PlacementReport:
    """Load of the fullest GPU in each layer, in the unit of the load.

    Attributes:
        layers: L names.
        experts, slots, gpus: E, S, G.
        mean: of the GPUs.
        before: with the experts in order, E / G on each GPU and no replica; None when G does not divide E.
        after: with the placement.
        bound: no placement in S slots is below it: the larger of the mean and of the least load that the hottest
            replica can have. It may be out of reach.
    """

    layers: list[str]
    experts: int
    slots: int
    gpus: int
    mean: list[float]
    before: list[float] | None
    after: list[float]
    bound: list[float]

    @property
    def extra_slots_per_gpu(self) -> float:
        """Memory that the replicas cost: experts' weights on a GPU, per layer, beyond E / G."""
        return (self.slots - self.experts) / self.gpus

    def ratios(self, load: list[float]) -> list[float]:
        """`before`, `after` or `bound` over the mean: 1 is balance, G the worst. 1 for a layer without load."""
        return [most / mean if mean else 1.0 for most, mean in zip(load, self.mean, strict=True)]

    def overall(self, load: list[float]) -> float:
        """The same for all layers together: the sum of the fullest GPUs over the sum of the means, because in every
        layer the other GPUs wait for the fullest one."""
        return math.fsum(load) / math.fsum(self.mean) if any(self.mean) else 1.0


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots; GPU g has the slots g S / G up to (g + 1) S / G.

    Attributes:
        physical_to_logical: int64 [L, S], the expert in each slot, ascending within a GPU.
        replicas: int64 [L, E], how many slots an expert has; at least 1.
        logical_to_physical: int64 [L, E, most replicas], an expert's slots, ascending, then -1.
        gpus: G.
    """

    physical_to_logical: Tensor
    replicas: Tensor
    logical_to_physical: Tensor
    gpus: int

    def gpu_load(self, load: Tensor) -> Tensor:
        """float64 [L, G] from load [L, E], which need not be the load that decided the placement.

        Raises:
            ConfigError: a load of another shape, or as in `place`.
        """
        load = _checked(load)
        if load.shape != self.replicas.shape:
            raise ConfigError("load", list(load.shape), f"the placement's layers and experts, {[*self.replicas.shape]}")
        slots = (load / self.replicas).gather(1, self.physical_to_logical)
        return slots.unflatten(1, (self.gpus, -1)).sum(-1)

    def report(self, load: Tensor, layers: Sequence[str] | None = None) -> PlacementReport:
        """What the placement gains for load [L, E]. Layers are called load[0], load[1] ... unless they have names.

        Raises:
            ConfigError: as `gpu_load`; a number of names other than L.
        """
        after = self.gpu_load(load).amax(1)
        load = _checked(load)
        experts, slots = load.shape[1], self.physical_to_logical.shape[1]
        names = [f"load[{i}]" for i in range(len(load))] if layers is None else list(layers)
        if len(names) != len(load):
            raise ConfigError("layers", names, f"{len(load)} names")
        mean = load.sum(1) / self.gpus
        before = None
        if experts % self.gpus == 0:
            before = load.unflatten(1, (self.gpus, -1)).sum(-1).amax(1).tolist()
        hottest = [max(_share(row, _replicate(row, slots, self.gpus))) for row in load.tolist()]
        bound = torch.maximum(mean, mean.new_tensor(hottest))
        return PlacementReport(names, experts, slots, self.gpus, mean.tolist(), before, after.tolist(), bound.tolist())


def place(load: Tensor, *, gpus: int, slots: int, nodes: int = 1, groups: int = 1) -> Placement:
    """Replicate and place the experts of every layer so that the fullest GPU has little load.

    Where nodes divides groups, groups (E / groups experts that follow each other) go whole to nodes, heaviest first to
    the least loaded node that has room; then each node replicates its experts and packs them to its GPUs. Elsewhere all
    GPUs count as one node. A further replica goes to the expert with the highest load per replica, the lowest index
    among equals; packing is again heaviest first (lowest index) to the least loaded GPU (lowest index) that has room.

    Beyond that policy: a GPU gets a second replica of an expert only if the policy with such replicas is better; slots
    of the fullest GPU and another are swapped while that lowers it; and experts stay in order where all this would be
    worse. So the fullest GPU of a layer has at most the load that the policy, or the order, would give it.

    Args:
        load: [L, E], of any real dtype; counts or an average of counts. A layer without load is placed like the others.
        gpus: G, a multiple of nodes.
        slots: S, a multiple of G from E up to E * G / nodes, where every GPU holds all that its node has.
        nodes: machines with a fast network inside.
        groups: of the router, a divisor of E.

    Returns:
        On the CPU, the same for equal arguments.

    Raises:
        ConfigError: arguments that do not fit each other; a load that is empty, negative or not finite, or whose sum
            float64 does not hold.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.4, and the README of github.com/deepseek-ai/EPLB.
    """
    load = _checked(load)
    experts = load.shape[1]
    for name, value in (("gpus", gpus), ("slots", slots), ("nodes", nodes), ("groups", groups)):
        if type(value) is not int or value < 1:
            raise ConfigError(name, value, "a whole number from 1 up")
    if gpus % nodes:
        raise ConfigError("nodes", nodes, f"a divisor of the {gpus} GPUs")
    if experts % groups:
        raise ConfigError("groups", groups, f"a divisor of the {experts} experts")
    if groups % nodes:
        nodes = groups = 1
    if not experts <= slots <= experts * gpus // nodes or slots % gpus:
        most = f"{experts * gpus // nodes}, beyond which each GPU would hold an expert twice"
        raise ConfigError("slots", slots, f"a multiple of the {gpus} GPUs from the {experts} experts up to {most}")
    placed = [_place_layer(row, gpus, slots, nodes, groups) for row in load.tolist()]
    physical = torch.tensor([[e for gpu in layer for e in sorted(gpu)] for layer in placed])
    replicas = torch.zeros(load.shape, dtype=torch.int64).scatter_add_(1, physical, torch.ones_like(physical))

    by_expert = physical.argsort(dim=1, stable=True)
    expert = physical.gather(1, by_expert)
    rank = torch.arange(slots) - (replicas.cumsum(1) - replicas).gather(1, expert)
    logical = torch.full((*load.shape, int(replicas.max())), -1)
    logical[torch.arange(len(load))[:, None], expert, rank] = by_expert
    return Placement(physical, replicas, logical, gpus)


def _checked(load: Tensor) -> Tensor:
    """The load as float64 on the CPU, if it is one."""
    if load.dim() != 2 or not load.numel():
        raise ConfigError("load", list(load.shape), "a shape [layers, experts] without 0")
    if load.dtype == torch.bool or load.is_complex():
        raise ConfigError("load", load.dtype, "integers or floats")
    load = load.detach().to("cpu", torch.float64)
    wrong = (~(load.isfinite() & (load >= 0))).nonzero().tolist()
    if wrong:
        layer, expert = wrong[0]
        raise ConfigError(f"load[{layer}][{expert}]", load[layer, expert].item(), "a finite number from 0 up")
    if not load.sum().isfinite():
        raise ConfigError("load", load.max().item(), "numbers whose sum float64 holds")
    return load


def _place_layer(load: list[float], gpus: int, slots: int, nodes: int, groups: int) -> list[list[int]]:
    """The experts of each GPU."""
    size = len(load) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    placed = []
    for node in _pack([math.fsum(load[e] for e in group) for group in members], [1] * groups, nodes, apart=False):
        experts = sorted(e for group in node for e in members[group])
        local = _place_node([load[e] for e in experts], gpus // nodes, slots // nodes)
        placed += [[experts[i] for i in gpu] for gpu in local]
    own = len(load) // gpus
    if own * gpus == len(load):
        # Replicas on the GPU of their expert change nothing: this is the load without a placement.
        in_order = [[gpu * own + i % own for i in range(slots // gpus)] for gpu in range(gpus)]
        return min(placed, in_order, key=lambda experts: _fullest(experts, load))
    return placed


def _place_node(load: list[float], gpus: int, slots: int) -> list[list[int]]:
    replicas = _replicate(load, slots, slots)
    share = _share(load, replicas)
    policy = _pack(share, replicas, gpus, apart=False)
    replicas_apart = _replicate(load, slots, gpus)
    share_apart = _share(load, replicas_apart)
    placed = _swap(_pack(share_apart, replicas_apart, gpus, apart=True), share_apart)
    return placed if _fullest(placed, load) <= _fullest(policy, load) else _swap(policy, share)


def _replicate(load: list[float], slots: int, most: int) -> list[int]:
    """Replicas of each expert, `most` at the most. No other numbers have a smaller largest load per replica."""
    replicas = [1] * len(load)
    hottest = [(-value, expert) for expert, value in enumerate(load) if most > 1]
    heapq.heapify(hottest)
    for _ in range(slots - len(load)):
        _, expert = heapq.heappop(hottest)
        replicas[expert] += 1
        if replicas[expert] < most:
            heapq.heappush(hottest, (-load[expert] / replicas[expert], expert))
    return replicas


def _share(load: list[float], replicas: list[int]) -> list[float]:
    return [value / number for value, number in zip(load, replicas, strict=True)]


def _pack(share: list[float], replicas: list[int], packs: int, *, apart: bool) -> list[list[int]]:
    """Equally many items in each pack. `apart`: a pack that has the item already is the last resort."""
    size = sum(replicas) // packs
    packed: list[list[int]] = [[] for _ in range(packs)]
    weight = [0.0] * packs
    for item in sorted(range(len(share)), key=lambda item: (-share[item], item)):
        for _ in range(replicas[item]):
            room = [pack for pack in range(packs) if len(packed[pack]) < size]
            new = [pack for pack in room if item not in packed[pack]] if apart else []
            pack = min(new or room, key=weight.__getitem__)
            packed[pack].append(item)
            weight[pack] += share[item]
    return packed


def _swap(packed: list[list[int]], share: list[float]) -> list[list[int]]:
    """Swap an item of the fullest pack with one of another pack, always the pair that leaves the fuller of the two
    packs lowest, until no swap lowers it. Never puts an item beside its replica."""
    item, weight = torch.tensor(packed), torch.tensor(share, dtype=torch.float64)
    held = torch.zeros(len(packed), len(share), dtype=torch.bool).scatter_(1, item, True)
    while True:
        total = weight[item].sum(1)
        full = int(total.argmax())
        moved = weight[item[full]][:, None, None] - weight[item]  # [item of the full pack, pack, item of that pack]
        fuller = torch.maximum(total[full] - moved, total[:, None] + moved)
        fuller.masked_fill_(held[:, item[full]].T[:, :, None] | held[full, item], torch.inf)
        best = int(fuller.argmin())
        # The margin is above the rounding of a sum, so that no two swaps undo each other.
        if not fuller.flatten()[best] < total[full] * (1 - 1e-9):
            return item.tolist()
        i, rest = divmod(best, item.numel())
        pack, j = divmod(rest, item.shape[1])
        out, into = int(item[full, i]), int(item[pack, j])
        item[full, i], item[pack, j] = into, out
        for changed in (full, pack):
            held[changed] = False
            held[changed, item[changed]] = True


def _fullest(packed: list[list[int]], load: list[float]) -> float:
    """Load of the fullest GPU."""
    replicas = [0] * len(load)
    for gpu in packed:
        for expert in gpu:
            replicas[expert] += 1
    return max(math.fsum(load[e] / replicas[e] for e in gpu) for gpu in packed)
