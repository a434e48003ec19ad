"""Placement of experts, compared with results by hand and with an exhaustive search; and the command."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe
from moe.balance import routers
from moe.cli import main
from moe.cli.place import layer_names
from moe.planning.placement import Placement, _swap, place

# The example in the README of github.com/deepseek-ai/EPLB: 4 groups, 2 nodes, 8 GPUs, 16 physical experts.
LOAD = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def rows_of(*layers: list[float]) -> torch.Tensor:
    return torch.tensor(layers, dtype=torch.float64)


def by_gpu(placement: Placement, layer: int = 0) -> list[list[int]]:
    return placement.physical_to_logical[layer].view(placement.gpus, -1).tolist()


def busiest(placement: Placement, load: list[float]) -> float:
    """Load of the busiest GPU in one layer."""
    gpus = by_gpu(placement)
    held = list(itertools.chain(*gpus))
    return max(math.fsum(load[e] / held.count(e) for e in gpu) for gpu in gpus)


def policy(load: list[float], gpus: int, physical: int) -> tuple[float, bool]:
    """Load of the busiest GPU under the plain policy, and whether the least loaded GPU always had room."""
    held = list(range(len(load)))
    while len(held) < physical:
        held.append(max(range(len(load)), key=lambda e: (load[e] / held.count(e), -e)))
    packs: list[list[float]] = [[] for _ in range(gpus)]
    free = True
    for item in sorted((load[e] / held.count(e) for e in held), reverse=True):
        least = min(packs, key=sum)
        free &= len(least) < physical // gpus
        min((pack for pack in packs if len(pack) < physical // gpus), key=sum).append(item)
    return max(math.fsum(pack) for pack in packs), free


def best(load: list[float], gpus: int, physical: int) -> float:
    """Load of the busiest GPU in the best placement, by exhaustive search."""

    def fill(items: list[float], room: list[int], weight: list[float], limit: float) -> float:
        if not items:
            return max(weight)
        for pack in range(gpus):
            first_like_this = (room[pack], weight[pack]) not in list(zip(room, weight, strict=True))[:pack]
            if room[pack] and first_like_this and weight[pack] + items[0] < limit:
                r = [n - (i == pack) for i, n in enumerate(room)]
                w = [x + items[0] * (i == pack) for i, x in enumerate(weight)]
                limit = min(limit, fill(items[1:], r, w, limit))
        return limit

    found = math.inf
    for more in itertools.combinations_with_replacement(range(len(load)), physical - len(load)):
        held = [*range(len(load)), *more]
        items = sorted((load[e] / held.count(e) for e in held), reverse=True)
        found = min(found, fill(items, [physical // gpus] * gpus, [0.0] * gpus, found))
    return found


@st.composite
def cases(draw: st.DrawFn, most_physical: int = 40) -> tuple[list[float], int, int]:
    """Loads of one layer, number of GPUs and of physical experts; many ties and zeros."""
    gpus = draw(st.integers(1, 6))
    experts = draw(st.integers(1, most_physical - gpus))
    most = min(most_physical, experts * gpus) // gpus
    physical = gpus * draw(st.integers(-(-experts // gpus), most))
    value = draw(st.sampled_from([st.integers(0, 3), st.integers(0, 10**6), st.floats(0, 1e6)]))
    return draw(st.lists(value.map(float), min_size=experts, max_size=experts)), gpus, physical


def test_the_example_of_eplb() -> None:
    """Layer 0: groups weigh 262, 330, 116, 325, so the second and third share the first node, with experts 3 to 8.

    There 5 (165) and then 4 (104) get a replica. 5, 5, 8, 3 go to one GPU each before 4, 4, 6, 7 fill them.
    """
    placement = place(LOAD, gpus=8, physical_experts=16, nodes=2, groups=4)
    assert by_gpu(placement, 0) == [[5, 6], [5, 7], [4, 8], [3, 4], [9, 10], [2, 10], [0, 1], [1, 11]]
    assert by_gpu(placement, 1) == [[7, 10], [6, 8], [6, 11], [8, 9], [2, 4], [1, 5], [0, 5], [1, 3]]
    assert placement.replicas.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert placement.logical_to_physical[0, [0, 1, 10]].tolist() == [[12, -1], [13, 14], [9, 11]]
    assert placement.gpu_load(LOAD).tolist() == [
        [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
        [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
    ]
    # Printed in the README of EPLB: the same experts share each GPU.
    theirs = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    for layer, held in enumerate(theirs):
        assert by_gpu(placement, layer) == [sorted(held[i : i + 2]) for i in range(0, 16, 2)]


def test_a_report_by_hand() -> None:
    load = torch.tensor([[8, 2, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    placement = place(load, gpus=2, physical_experts=6)
    # Expert 0 twice, 4 each; then again (4 is still the most), but no GPU has use for a third: 1 gets it.
    assert placement.replicas.tolist()[0] == [2, 2, 1, 1]
    assert by_gpu(placement) == [[0, 1, 2], [0, 1, 3]]
    report = placement.report(load, ["a", "b", "longer"])
    assert (report.mean, report.before, report.after, report.bound) == ([6, 0, 2], [10, 0, 2], [6, 0, 2], [6, 0, 2])
    assert report.before is not None
    assert report.ratios(report.before) == [10 / 6, 1, 1]
    assert report.overall(report.before) == 12 / 8
    assert report.redundant_experts_per_gpu == 1
    uneven = place(LOAD, gpus=8, physical_experts=16).report(LOAD)
    assert uneven.before is None
    # Another load than the one that decided: expert 0 is cold now, and 3 alone on its GPU with half of 1.
    assert placement.gpu_load(torch.tensor([[0, 2, 0, 6]] * 3))[0].tolist() == [1, 7]


def test_hierarchical_or_global() -> None:
    """Groups stay on one node only if nodes divides groups."""
    load = torch.tensor([[9, 1, 1, 1, 1, 1, 1, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    by_node = place(load, gpus=4, physical_experts=12, nodes=2, groups=4).physical_to_logical.view(2, 2, -1)
    for layer in by_node:
        first, second = ({e // 2 for e in node} for node in layer.tolist())
        assert not first & second and first | second == {0, 1, 2, 3}
    everywhere = place(load, gpus=4, physical_experts=12)
    for nodes, groups in ((4, 2), (2, 1)):
        ungrouped = place(load, gpus=4, physical_experts=12, nodes=nodes, groups=groups)
        assert torch.equal(ungrouped.physical_to_logical, everywhere.physical_to_logical)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 50), min_size=24, max_size=24), st.sampled_from([24, 32, 40]))
def test_a_group_stays_on_one_node(load: list[int], physical: int) -> None:
    """8 groups of 3 experts, 4 nodes of 2 GPUs: two groups each, and never worse than in order."""
    rows = torch.tensor([load])
    placement = place(rows, gpus=8, physical_experts=physical, nodes=4, groups=8)
    nodes = [{e // 3 for e in node} for node in placement.physical_to_logical.view(4, -1).tolist()]
    assert sorted(itertools.chain(*nodes)) == list(range(8)) and {len(node) for node in nodes} == {2}
    report = placement.report(rows)
    assert report.before is not None and report.after[0] <= report.before[0] * (1 + 1e-9)


@settings(deadline=None, max_examples=150)
@given(cases(most_physical=8))
def test_against_exhaustive_search(case: tuple[list[float], int, int]) -> None:
    load, gpus, physical = case
    ours = busiest(place(rows_of(load), gpus=gpus, physical_experts=physical), load)
    optimum = best(load, gpus, physical)
    tiny = 1e-9 * sum(load)
    plain, free = policy(load, gpus, physical)
    assert optimum - tiny <= ours <= plain + tiny
    if physical == gpus:
        # One expert a GPU: giving the next replica to the hottest is optimal.
        assert ours <= optimum + tiny
    if physical == len(load):
        if physical == 2 * gpus:
            # Two items a GPU: heaviest first pairs the heaviest with the lightest, which is optimal.
            assert ours <= optimum + tiny
        if free:
            # No GPU was full too early, so this is LPT: Graham (1969), 4/3 - 1 / 3 G of any optimum.
            assert ours <= (4 / 3 - 1 / (3 * gpus)) * optimum + tiny
    if free:
        # Graham (1966): list scheduling, within 2 - 1 / G of the mean or the largest item, and replication made the
        # largest item as small as any placement's.
        assert ours <= (2 - 1 / gpus) * optimum + tiny
    bound = place(rows_of(load), gpus=gpus, physical_experts=physical).report(rows_of(load)).bound[0]
    assert bound <= optimum + tiny


@settings(deadline=None, max_examples=200)
@given(cases(), st.randoms(use_true_random=False))
def test_invariants(case: tuple[list[float], int, int], random) -> None:
    load, gpus, size = case
    rows = rows_of(load, random.sample(load, len(load)))
    placement = place(rows, gpus=gpus, physical_experts=size)
    physical, logical = placement.physical_to_logical, placement.logical_to_physical
    assert physical.shape == (2, size) and physical.dtype == placement.replicas.dtype == logical.dtype == torch.int64
    for layer in range(2):
        held = physical[layer].tolist()
        assert set(held) == set(range(len(load)))
        assert placement.replicas[layer].tolist() == [held.count(e) for e in range(len(load))]
        for expert, replicas_of_it in enumerate(logical[layer].tolist()):
            where = [i for i, e in enumerate(held) if e == expert]
            assert replicas_of_it == where + [-1] * (logical.shape[2] - len(where))
    assert logical.shape[2] == placement.replicas.max()
    gpu_load = placement.gpu_load(rows)
    torch.testing.assert_close(gpu_load.sum(1), rows.double().sum(1))

    report = placement.report(rows)
    close = 1 + 1e-9
    for layer in range(2):
        assert report.bound[layer] <= report.after[layer] * close
        assert report.after[layer] <= policy(rows[layer].tolist(), gpus, size)[0] * close + 1e-300
        if report.before is not None:
            assert report.after[layer] <= report.before[layer] * close
    again = place(rows, gpus=gpus, physical_experts=size)
    assert torch.equal(again.physical_to_logical, physical)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_equal_loads_are_balanced(experts: int, gpus: int, replicas: int, value: int) -> None:
    """All experts have the same number of replicas, so every GPU has the mean load."""
    experts, replicas = experts * gpus, min(replicas, gpus)
    load = torch.full((1, experts), value)
    report = place(load, gpus=gpus, physical_experts=experts * replicas).report(load)
    torch.testing.assert_close(report.after, report.bound)
    torch.testing.assert_close(report.after, report.mean)


@settings(deadline=None, max_examples=50)
@given(
    st.permutations([101, 103, 107, 109, 211, 307, 401, 503, 601, 1009]), st.sampled_from([(2, 10), (4, 12), (5, 20)])
)
def test_the_order_of_experts_does_not_matter(load: list[int], shape: tuple[int, int]) -> None:
    """With primes larger than the number of replicas, no two loads per replica are equal, so there are no ties."""
    gpus, physical = shape
    rows = torch.tensor([load, sorted(load)])
    first, second = place(rows, gpus=gpus, physical_experts=physical).gpu_load(rows).sort().values
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_no_gpu_holds_an_expert_twice() -> None:
    """The policy gives expert 0 six replicas of 20 on four GPUs. Four replicas of 30 leave room for two others."""
    load = [120.0, *[float(n) for n in range(10, 0, -1)]]
    assert policy(load, 4, 16)[0] == 45
    assert busiest(place(rows_of(load), gpus=4, physical_experts=16), load) == 44
    for gpu in by_gpu(place(rows_of(load), gpus=4, physical_experts=16)):
        assert len(set(gpu)) == len(gpu)


def test_swaps_improve_on_heaviest_first() -> None:
    """Heaviest first gives 9 + 6 + 5 and 8 + 7 + 3; 8 + 6 + 5 and 9 + 7 + 3 are equal."""
    load = [9.0, 8.0, 7.0, 6.0, 5.0, 3.0]
    assert policy(load, 2, 6)[0] == 20
    assert busiest(place(rows_of(load), gpus=2, physical_experts=6), load) == best(load, 2, 6) == 19


@pytest.mark.parametrize(
    ("packed", "share", "expected"),
    [
        # Swapping 0 and 2, or 1 and 0, would put two replicas of 0 on one GPU.
        ([[0, 1], [0, 2]], [3, 4, 0], [[0, 1], [0, 2]]),
        # 2 is swapped for 0 of the first pack, and then for 0 of the second: the first may hold 0 again.
        ([[0, 3], [0, 1], [2, 4]], [0, 0, 4, 4, 8], [[0, 3], [2, 1], [0, 4]]),
        # 0 is swapped for 3. Swapping 3 and 2 would be better still, but that pack already holds 2.
        ([[1, 3], [1, 2], [0, 2]], [8, 2, 4, 7], [[1, 0], [1, 2], [3, 2]]),
    ],
)
def test_swaps_by_hand(packed: list[list[int]], share: list[float], expected: list[list[int]]) -> None:
    assert _swap(packed, share) == expected


@settings(deadline=None, max_examples=150)
@given(cases(), st.randoms(use_true_random=False))
def test_no_swap_is_left(case: tuple[list[float], int, int], random) -> None:
    """No swap with the busiest GPU lowers its load, except those that put two replicas on one GPU."""
    load, gpus, physical = case
    if len(load) % gpus == 0:
        return  # experts may stay in order
    load = [round(value * random.random(), 1) for value in load]
    placed = by_gpu(place(rows_of(load), gpus=gpus, physical_experts=physical))
    held = list(itertools.chain(*placed))
    share = [load[e] / held.count(e) for e in range(len(load))]
    total = [math.fsum(share[e] for e in gpu) for gpu in placed]

    def stuck(busiest: int) -> bool:
        return not any(
            max(total[busiest] - share[a] + share[b], total[gpu] - share[b] + share[a]) < total[busiest] * (1 - 1e-8)
            for gpu in range(gpus)
            for a, b in itertools.product(placed[busiest], placed[gpu])
            if a not in placed[gpu] and b not in placed[busiest]
        )

    assert any(stuck(gpu) for gpu in range(gpus) if total[gpu] >= max(total) * (1 - 1e-9))


def test_experts_stay_in_order_if_that_is_better() -> None:
    """Heaviest first gives 6 + 3 + 2 + 2 and 4 + 4 + 3 + 0; no swap moves exactly 1."""
    load = [2.0, 4.0, 4.0, 2.0, 3.0, 0.0, 6.0, 3.0]
    assert policy(load, 2, 8)[0] == 13
    assert by_gpu(place(rows_of(load), gpus=2, physical_experts=8)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("load", "gpus", "physical", "expected"),
    [
        ([[5]], 1, 1, [[[0]]]),
        ([[5]], 3, 3, [[[0], [0], [0]]]),
        ([[3, 1, 2]], 1, 3, [[[0, 1, 2]]]),
        ([[0, 0, 0, 0]], 2, 4, [[[0, 1], [2, 3]]]),
        ([[0, 0], [0, 7]], 2, 4, [[[0, 1], [0, 1]]] * 2),
        ([[1, 2, 3, 4]], 4, 4, [[[3], [2], [1], [0]]]),
        ([[1e-320, 0.0]], 2, 2, [[[0], [1]]]),
    ],
)
def test_degenerate(load: list[list[float]], gpus: int, physical: int, expected: list[list[list[int]]]) -> None:
    placement = place(torch.tensor(load, dtype=torch.float64), gpus=gpus, physical_experts=physical)
    assert [by_gpu(placement, layer) for layer in range(len(load))] == expected


def test_zipf_at_the_size_of_deepseek_v3() -> None:
    """58 layers of 256 experts with loads by Zipf's law: 32 redundant ones balance them."""
    generator = torch.Generator().manual_seed(0)
    zipf = 1e6 / torch.arange(1, 257, dtype=torch.float64)
    load = torch.stack([zipf[torch.randperm(256, generator=generator)] for _ in range(58)])
    placement = place(load, gpus=32, physical_experts=288)
    report = placement.report(load)
    assert report.before is not None
    assert report.overall(report.before) > 5
    assert report.overall(report.after) < 1.001
    for layer in range(58):
        assert all(len(set(gpu)) == len(gpu) for gpu in by_gpu(placement, layer))
    hot = torch.zeros(1, 256)
    hot[0, 77] = 1e9
    one = place(hot, gpus=32, physical_experts=288)
    assert one.replicas[0, 77] == 32 and one.gpu_load(hot).unique().tolist() == [1e9 / 32]


@pytest.mark.parametrize(
    ("experts", "gpus", "physical"), [(8, 2**16, 2**16), (256, 256, 2**16), (256, 64, 64 * 128), (256, 256, 256 * 32)]
)
def test_the_largest_placements_take_seconds(experts: int, gpus: int, physical: int) -> None:
    """Comparing every item with every pack would take minutes per layer, for some of these hours."""
    load = torch.randint(1000, (1, experts), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    report = place(load, gpus=gpus, physical_experts=physical).report(load)
    assert time.process_time() - began < 10
    assert report.after[0] <= report.bound[0] * 1.001


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (torch.zeros(3), {}, r"load = \[3\]: expected a shape \[layers, experts\] without 0"),
        (torch.zeros(0, 4), {}, r"load = \[0, 4\]: expected a shape"),
        (torch.zeros(2, 0), {}, r"load = \[2, 0\]: expected a shape"),
        (torch.zeros(2, 4, dtype=torch.bool), {}, r"load = torch.bool: expected integers or floats"),
        (
            torch.tensor([[1, 1, 1, 1], [1, 1, -2, 1]]),
            {},
            r"load\[1\]\[2\] = -2.0: expected a finite number of at least 0",
        ),
        (torch.tensor([[1, NAN, 1, 1]]), {}, r"load\[0\]\[1\] = nan: expected a finite number"),
        (torch.tensor([[1, 1, 1, INF]]), {}, r"load\[0\]\[3\] = inf: expected a finite number"),
        (
            torch.full((1, 4), 1e308, dtype=torch.float64),
            {},
            r"load = 1e\+308: expected a finite sum in float64",
        ),
        (torch.ones(1, 4), {"gpus": 0}, "gpus = 0: expected a positive integer"),
        (torch.ones(1, 4), {"gpus": 2.0}, "gpus = 2.0: expected a positive integer"),
        (torch.ones(1, 4), {"physical_experts": True}, "physical_experts = True: expected a positive integer"),
        (torch.ones(1, 4), {"nodes": -1}, "nodes = -1: expected a positive integer"),
        (torch.ones(1, 4), {"nodes": 3}, "nodes = 3: expected a divisor of the 2 GPUs"),
        (torch.ones(1, 4), {"groups": 3}, "groups = 3: expected a divisor of the 4 experts"),
        (
            torch.ones(1, 4),
            {"physical_experts": 2},
            "physical_experts = 2: expected a multiple of the 2 GPUs from the 4 experts",
        ),
        (
            torch.ones(1, 4),
            {"physical_experts": 5},
            "physical_experts = 5: expected a multiple of the 2 GPUs from the 4 experts",
        ),
        (
            torch.ones(1, 4),
            {"physical_experts": 10},
            "physical_experts = 10: expected a multiple .* up to 8, at which each GPU holds all experts of its node",
        ),
        (
            torch.ones(1, 4),
            {"physical_experts": 6, "nodes": 2, "groups": 2},
            "physical_experts = 6: expected a multiple .* up to 4",
        ),
        (
            torch.ones(1, 4),
            {"gpus": 10**9, "physical_experts": 10**9},
            "physical_experts = 1000000000: expected at most 65,536",
        ),
    ],
)
def test_arguments_that_do_not_fit(load: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(moe.ConfigError, match=f"^{message}"):
        place(load, **{"gpus": 2, "physical_experts": 4, **options})


def test_a_report_for_a_load_of_another_shape() -> None:
    placement = place(torch.ones(2, 4), gpus=2, physical_experts=4)
    with pytest.raises(
        moe.ConfigError, match=r"load = \[1, 4\]: expected the placement's layers and experts, \[2, 4\]"
    ):
        placement.gpu_load(torch.ones(1, 4))
    with pytest.raises(moe.ConfigError, match=r"layers = \['a'\]: expected 2 names"):
        placement.report(torch.ones(2, 4), ["a"])


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(("place", *argv))
    except SystemExit as stop:  # after --help
        status = stop.code if isinstance(stop.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", ["tiny", "deepseek_v3", "mixtral_8x7b"])
def test_layer_names_match_the_routers(name: str) -> None:
    with torch.device("meta"):
        model = moe.Transformer(moe.preset(name))
    assert layer_names(moe.preset(name)) == [router.removesuffix(".gate") for router, _ in routers(model)]


def test_the_command_reads_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = [[8, 2, 1, 1], [1, 1, 1, 1], [1, 2, 3, 4]]
    records = [
        {"kind": "validation", "step": 0, "load": [[1, 1, 1, 1]] * 3},
        {"kind": "validation", "step": 2, "load": load},
        {"kind": "train", "step": 3, "ce": 1.0},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "valid')
    options = ("--gpus", "2", "--physical-experts", "6")
    status, out, err = run(capsys, str(metrics), *options)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    # By hand: 10, 2, 7 before, with means of 6, 2, 5; the placement reaches 6, 2, 5.
    assert rows[3:7] == [
        ["load[0]", "1.667", "1.000", "1.000"],
        ["load[1]", "1.000", "1.000", "1.000"],
        ["load[2]", "1.400", "1.000", "1.000"],
        ["all", "layers", "1.462", "1.000", "1.000"],
    ]
    assert out.endswith("\n4 experts, 6 physical experts on 2 GPUs: 3 per GPU, 1 of them redundant.\n")

    (tmp_path / "settings.json").write_text('{"preset": "tiny"}')
    assert "\nlayers.1.mlp " in run(capsys, str(tmp_path), *options)[1]
    (tmp_path / "settings.json").write_text('{"preset": "mixtral_8x7b"}')  # a different number of layers
    assert "\nload[1] " in run(capsys, str(tmp_path), *options)[1]

    file = tmp_path / "load.json"
    file.write_text(json.dumps({"load": load}))
    status, out, err = run(capsys, str(file), *options, "--json", "--out", str(tmp_path / "new.json"))
    assert (status, err, out) == (0, "", (tmp_path / "new.json").read_text())
    facts = json.loads(out)
    assert facts["report"]["before"] == [10, 2, 7] and facts["report"]["physical_experts"] == 6
    assert facts["overall"]["before"] == 19 / 13
    assert facts["physical_to_logical"][0] == [0, 1, 2, 0, 1, 3]
    assert facts["replicas"][0] == [2, 2, 1, 1] and facts["logical_to_physical"][0][:2] == [[0, 3], [1, 4]]
    status, out, err = run(capsys, str(file), *options, "--out", str(file))
    assert (status, out) == (2, "") and "File exists" in err and err.count("\n") == 1
    monkeypatch.setattr("moe.planning.placement.place", None)  # an --out that cannot be written is refused before
    status, out, err = run(capsys, str(file), *options, "--out", str(file / "out"))
    assert (status, out) == (2, "") and "Not a directory" in err and err.count("\n") == 1
    monkeypatch.undo()
    assert run(capsys, str(file), "--gpus", "2", "--physical-experts", "5", "--out", str(tmp_path / "no"))[0] == 2
    assert not (tmp_path / "no").exists()
    uneven = (str(file), "--gpus", "3", "--physical-experts", "6")
    assert json.loads(run(capsys, *uneven, "--json")[1])["overall"]["before"] is None
    out = run(capsys, *uneven)[1]
    assert out.endswith("\nbefore: unknown, because 3 GPUs do not divide 4 experts.\n") and " - " in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": expected JSON; found 'Expecting value: line 1 column 1 (char 0)'"),
        ("[" * 100_000, ": expected JSON"),
        ('{"load": [[' + "9" * 5000 + "]]}", ": expected JSON"),
        (b"\xff", ": expected UTF-8 text; found 'invalid start byte'"),
        ("[1]", ": expected a JSON object; found [1]"),
        ('{"loads": 1}', ": expected a key \"load\"; found ['loads']"),
        ('{"load": []}', ": load: expected a list of layers, each a list of the tokens of its experts; found []"),
        (
            '{"load": {"a": 1}}',
            ": load: expected a list of layers, each a list of the tokens of its experts; found {'a': 1}",
        ),
        ('{"load": [1, 2]}', ": load[0]: expected a list of the tokens of each expert; found 1"),
        ('{"load": [[1, 2], []]}', ": load[1]: expected a list of the tokens of each expert; found []"),
        ('{"load": [[1, 2], [1, 2, 3]]}', ": load[1]: expected 2, as in load[0]; found '3 experts'"),
        ('{"load": [[1, -2]]}', ": load[0][1]: expected a number from 0 to 1e300; found -2"),
        ('{"load": [[1, NaN]]}', ": load[0][1]: expected a number from 0 to 1e300; found nan"),
        ('{"load": [[1, Infinity]]}', ": load[0][1]: expected a number from 0 to 1e300; found inf"),
        ('{"load": [[1, true]]}', ": load[0][1]: expected a number from 0 to 1e300; found True"),
        ('{"load": [[1, "2"]]}', ": load[0][1]: expected a number from 0 to 1e300; found '2'"),
        ('{"load": [[1, ' + "9" * 400 + "]]}", ": expected a number from 0 to 1e300"),
        ('{"load": [[1, 2, 3]]}', "--physical-experts: expected a multiple of the 2 GPUs from the 3 experts up to 6, "),
    ],
)
def test_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "load.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = run(capsys, str(file), "--gpus", "2", "--physical-experts", "2")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err and (str(file) in err or "physical-experts" in err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "metrics.jsonl: expected one with kind \"validation\" and load; found '0 records'"),
        (
            '{"kind": "train", "load": [[1]]}\n',
            "; found '1 records'",
        ),
        ('{"kind": "validation", "load": [[1]]}\n{"kind\n', "metrics.jsonl, line 2: expected JSON; found "),
        (
            '{"kind": "validation", "load": 3}\n',
            "metrics.jsonl, line 1: load: expected a list of layers, each a list of the tokens of its experts; found 3",
        ),
        (None, "expected an existing file; found '"),
    ],
)
def test_bad_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    status, out, err = run(capsys, str(tmp_path), "--gpus", "1", "--physical-experts", "1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_large_integers_of_a_file_are_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text('{"load": [[99999999999999999999999, 1e22]]}')
    status, out, _ = run(capsys, str(tmp_path / "load.json"), "--gpus", "1", "--physical-experts", "2")
    assert status == 0 and "all layers" in out
