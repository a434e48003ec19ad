"""Simulation of a cache of experts in fast memory, while tokens are decoded one after the other.

Each layer has a cache of its own, which holds C of its E experts between tokens. A token needs K experts at once: those
in the cache are hits, and each other one is a miss, whose parameters are copied from slow memory. After the token, the
cache keeps C experts, chosen by the policy among those that it held and those of the token.
"""

from dataclasses import dataclass

import numpy as np

from moe.errors import ConfigError

POLICIES = ("lru", "frequency", "oracle")


@dataclass(frozen=True, eq=False)
class CacheReport:
    """Hits of each policy in caches of `capacity` experts per layer.

    Attributes:
        capacity: C.
        requests: requests per layer: tokens * K.
        hits: policy -> hits per layer, int64 [L].
    """

    capacity: int
    requests: int
    hits: dict[str, np.ndarray]

    def hit_rate(self, policy: str) -> float:
        """Hits of all layers divided by their requests."""
        return float(self.hits[policy].mean() / self.requests)

    def misses_per_token(self, policy: str, k: int) -> float:
        """Misses of all layers per token, each of which needs `k` experts per layer."""
        return float((self.requests - self.hits[policy]).sum() / (self.requests / k))


def simulate(before: np.ndarray, tokens: np.ndarray, experts: int, capacities: tuple[int, ...]) -> list[CacheReport]:
    """Count the hits of each policy on `tokens`, with one report per capacity.

    All caches begin with the C experts that `before` uses most often; ties go to the lowest index.

        lru        keeps the experts that were used last; of one token, the first ids count as used last.
        frequency  keeps the experts with which it begins.
        oracle     keeps the experts that will be used again first (Belady's MIN). No policy has more hits.

    Args:
        before, tokens: ids of the experts of each token, integers [L, T, K], distinct for each token.
        experts: E.
        capacities: C of each report, from 1 to E.

    Raises:
        ConfigError: a capacity is out of range.
    """
    for capacity in capacities:
        if not 1 <= capacity <= experts:
            raise ConfigError("capacity", capacity, f"1 to the {experts} experts of a layer")
    load = np.stack([np.bincount(ids.ravel(), minlength=experts) for ids in before])
    rank = (-load).argsort(axis=1, kind="stable").argsort(axis=1)  # 0: the most frequent expert
    ids, requests = tokens.astype(np.int64), tokens.shape[1] * tokens.shape[2]
    places = _lru_places(rank, ids)
    fixed = np.take_along_axis(rank, ids.reshape(len(ids), -1), axis=1)
    uses = _next_uses(ids, experts)
    return [
        CacheReport(
            capacity,
            requests,
            {
                "lru": (places < capacity).sum(axis=(1, 2)),
                "frequency": (fixed < capacity).sum(axis=1),
                "oracle": _oracle_hits(rank < capacity, ids, *uses),
            },
        )
        for capacity in capacities
    ]


def _lru_places(rank: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Number of experts that were used later than each requested one, [L, T, K], before its token.

    An expert is in an LRU cache of C if this is below C, because a cache holds all experts of a smaller one.
    """
    used, places, k = -rank, np.empty(ids.shape, np.int64), ids.shape[2]
    for t in range(ids.shape[1]):
        now = ids[:, t]
        places[:, t] = (used[:, None] > np.take_along_axis(used, now, axis=1)[:, :, None]).sum(axis=2)
        np.put_along_axis(used, now, (t + 1) * k - np.arange(k)[None], axis=1)
    return places


def _next_uses(ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """First token that uses each expert, [L, E], and the next one after each request, [L, T, K]; T if there is none."""
    first, following = np.full((len(ids), experts), ids.shape[1]), np.empty_like(ids)
    for t in reversed(range(ids.shape[1])):
        following[:, t] = np.take_along_axis(first, ids[:, t], axis=1)
        np.put_along_axis(first, ids[:, t], t, axis=1)
    return first, following


def _oracle_hits(cached: np.ndarray, ids: np.ndarray, first: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Hits of Belady's MIN, int64 [L], for caches that first hold `cached`, bool [L, E]."""
    uses, (layers, experts) = first.copy(), first.shape
    capacity, hits = int(cached[0].sum()), np.zeros(layers, np.int64)
    for t in range(ids.shape[1]):
        now = ids[:, t]
        found = np.take_along_axis(cached, now, axis=1)
        hits += found.sum(axis=1)
        np.put_along_axis(uses, now, following[:, t], axis=1)
        full = np.flatnonzero(~found.all(axis=1))  # elsewhere the cache does not change
        np.put_along_axis(cached, now, True, axis=1)
        # Distinct keys, so that the result does not depend on the implementation of the partition.
        keys = np.where(cached[full], uses[full], ids.shape[1] + 1) * experts + np.arange(experts)
        kept = keys.argpartition(capacity - 1, axis=1)[:, :capacity]
        cached[full] = False
        cached[full[:, None], kept] = True
    return hits
