"""The simulated caches of experts, beside caches that are written as lists, and the best of all possible choices."""

import itertools

import numpy as np
import pytest

from moe.errors import ConfigError
from moe.planning.expert_cache import POLICIES, simulate


def requests(layers: int, tokens: int, experts: int, k: int, seed: int) -> np.ndarray:
    """Skewed and correlated: a token often repeats the experts of the one before."""
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full(experts, 0.5), layers) + 1e-3
    ids = np.empty((layers, tokens, k), np.uint8)
    for layer, t in itertools.product(range(layers), range(tokens)):
        ids[layer, t] = rng.choice(experts, k, replace=False, p=chances[layer] / chances[layer].sum())
        if t and rng.random() < 0.3:
            ids[layer, t] = rng.permutation(ids[layer, t - 1])
    return ids


def most_frequent(before: np.ndarray, capacity: int, experts: int) -> list[int]:
    counts = [before.ravel().tolist().count(expert) for expert in range(experts)]
    return sorted(range(experts), key=lambda expert: (-counts[expert], expert))[:capacity]


def lru(cache: list[int], tokens: np.ndarray, capacity: int) -> int:
    """`cache` begins with the expert that was used last."""
    hits = 0
    for token in tokens.tolist():
        hits += sum(expert in cache for expert in token)
        cache = (token + [expert for expert in cache if expert not in token])[:capacity]
    return hits


def best(cache: frozenset[int], tokens: np.ndarray, capacity: int) -> int:
    """Most hits of any choice after every token, by trying all of them."""
    reached = {cache: 0}
    for token in tokens.tolist():
        after: dict[frozenset[int], int] = {}
        for held, hits in reached.items():
            hits += len(held & set(token))
            for kept in itertools.combinations(held | set(token), capacity):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits)
        reached = after
    return max(reached.values())


@pytest.mark.parametrize(("experts", "k"), [(5, 1), (6, 2), (7, 3)])
def test_hits_are_those_of_plain_caches(experts: int, k: int) -> None:
    before, tokens = np.split(requests(3, 60, experts, k, seed=experts), 2, axis=1)
    capacities = tuple(range(1, experts + 1))
    for capacity, report in zip(capacities, simulate(before, tokens, experts, capacities), strict=True):
        assert (report.capacity, report.requests, tuple(report.hits)) == (capacity, 30 * k, POLICIES)
        for layer in range(3):
            held = most_frequent(before[layer], capacity, experts)
            expected = {
                "lru": lru(held, tokens[layer], capacity),
                "frequency": sum(expert in held for token in tokens[layer].tolist() for expert in token),
                "oracle": best(frozenset(held), tokens[layer], capacity),
            }
            assert {policy: int(hits[layer]) for policy, hits in report.hits.items()} == expected
        for policy, hits in report.hits.items():
            assert report.hit_rate(policy) == pytest.approx(hits.sum() / (3 * 30 * k))
            assert report.misses_per_token(policy, k) == pytest.approx((3 * 30 * k - hits.sum()) / 30)
        if capacity == experts:
            assert all(report.hit_rate(policy) == 1 for policy in POLICIES)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_has_more_hits_than_the_oracle(seed: int) -> None:
    before, tokens = np.split(requests(4, 400, 24, 4, seed), 2, axis=1)
    sizes = (1, 2, 4, 8, 16, 23, 24)
    reports = simulate(before, tokens, 24, sizes)
    for smaller, larger in itertools.pairwise(reports):
        assert all((smaller.hits[policy] <= larger.hits[policy]).all() for policy in POLICIES)
    for report in reports:
        assert all((report.hits[policy] <= report.hits["oracle"]).all() for policy in POLICIES)


def test_known_sequences() -> None:
    def hits(before: list[list[int]], tokens: list[list[int]], capacity: int) -> tuple[int, ...]:
        (report,) = simulate(np.array([before]), np.array([tokens]), 4, (capacity,))
        return tuple(int(report.hits[policy][0]) for policy in POLICIES)

    loop = [[0], [1], [2]] * 3
    # A loop over one expert too many is LRU's worst case. The oracle keeps one of the two for good.
    assert hits([[0], [1]], loop, 2) == (2, 6, 6)
    # Of 0 and 1, which are used equally often, 0 is the one of lower index; it is never needed.
    assert hits([[1], [0]], [[3], [3], [3]], 1) == (2, 0, 2)
    # Of one token, the expert that comes first is kept: 2 is a hit, and 3 is not.
    assert hits([[0, 1]], [[2, 3], [2, 1]], 1) == (1, 0, 1)
    assert hits([[0, 1]], [[2, 3], [3, 1]], 1) == (0, 0, 1)
    # Experts of one token are needed at once, so that a miss does not displace a hit of the same token.
    assert hits([[0, 1]], [[3, 0]], 2) == (1, 1, 1)


def test_a_capacity_out_of_range_is_refused() -> None:
    ids = np.zeros((1, 2, 1), np.uint8)
    for capacity in (0, 5):
        with pytest.raises(ConfigError, match=f"capacity = {capacity}: expected 1 to the 4 experts"):
            simulate(ids, ids, 4, (capacity,))
