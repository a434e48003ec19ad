"""Cost model of a training run: formulae compared with enumeration, sampling, results by hand and published runs."""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import moe
from moe import ConfigError
from moe.cli import main
from moe.config import ModelConfig
from moe.counts import count_parameters
from moe.planning.cluster.gpus import GPUS
from moe.planning.cluster.memory import in_flight, memory
from moe.planning.cluster.settings import Mesh, Rates, Run, Training
from moe.planning.cluster.stages import _divide, blocks, mean_context, model_flops, ranks
from moe.planning.cluster.step import collective_seconds, step
from moe.planning.cluster.traffic import Traffic, copy_bytes, expected_destinations, reach_probability, traffic
from moe.planning.published import OTHERS, V3, compare, fit
from tests.support.checkpoint_cases import V3 as SMALL

# Tensors of DeepSeek-V3, by the shapes in its report.
WIDTH, EXPERT = 7168, 3 * 7168 * 2048
MLA = WIDTH * 1536 + 1536 * 128 * 192 + WIDTH * 576 + 512 * 128 * 256 + 128 * 128 * WIDTH
UP_PROJECTIONS = 1536 * 128 * 192 + 512 * 128 * 256
GATE, HEAD = 256 * WIDTH, 129_280 * WIDTH
ATTENTION = 128 * (192 + 128) * 2048.5  # multiply-adds of a token; causal: half of 4,096, and itself
BF16, FP8 = 989.4e12, 1978.9e12
SHARE = Rates().matmul_share


def routed(experts: int, groups: int, opened: int, top: int) -> ModelConfig:
    sizes = {"n_routed_experts": experts, "n_group": groups, "topk_group": opened, "num_experts_per_tok": top}
    return dataclasses.replace(SMALL, **sizes)


@pytest.mark.parametrize(("groups", "opened", "top"), [(1, 1, 3), (4, 2, 3), (4, 3, 1), (2, 1, 4), (4, 4, 8)])
def test_reach_probability_by_enumeration(groups: int, opened: int, top: int) -> None:
    """Enumerate all selections of groups and of experts in them, for every range of experts."""
    config, size = routed(8, groups, opened, top), 8 // groups
    chosen = [
        set(experts)
        for open_groups in itertools.combinations(range(groups), opened)
        for experts in itertools.combinations([g * size + i for g in open_groups for i in range(size)], top)
    ]
    for first in range(8):
        for count in range(1, 9 - first):
            hits = sum(bool(experts & set(range(first, first + count))) for experts in chosen)
            assert reach_probability(config, first, count) == pytest.approx(hits / len(chosen), abs=1e-12)


def test_deepseek_v3_reaches() -> None:
    """EP 64: 4 experts per rank, 32 per node, which is a group. Half of the groups: 32 ranks, 128 experts."""
    config = moe.preset("deepseek_v3")
    by_hand = 32 * (1 - math.comb(124, 8) / math.comb(128, 8))
    assert expected_destinations(config, 64) == pytest.approx(by_hand) == pytest.approx(7.36, abs=0.01)
    assert expected_destinations(config, 8) == pytest.approx(4 * (1 - math.comb(96, 8) / math.comb(128, 8)))
    assert expected_destinations(config, 1) == 1 and expected_destinations(config, 256) == pytest.approx(8)


def test_routing_by_independent_scores_reaches_a_little_more() -> None:
    """Values in the docstring of `traffic`, measured with the router's op."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10_000, 256, generator=generator)
    kinds: dict[str, Any] = {"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4}
    ids = moe.ops.route(logits, torch.zeros(256), top_k=8, **kinds).expert_ids
    for experts, expected in ((4, 7.49), (32, 3.95)):
        hit = torch.zeros(10_000, 256 // experts).scatter_(1, ids // experts, 1.0)
        assert hit.sum(1).mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("ep", "node"), [(16, 8), (16, 4), (8, 8), (4, 8), (2, 1), (1, 8)])
def test_copies_are_those_of_sampled_tokens(ep: int, node: int) -> None:
    """Sample tokens of random ranks with random experts, and count the copies of each."""
    config = routed(16, 4, 2, 3)
    rng, tokens, width = random.Random(0), 20_000, min(ep, node)
    moved = {"node": [0, 0], "rank": [0, 0]}
    for _ in range(tokens):
        home = rng.randrange(ep)
        pool = [g * 4 + i for g in rng.sample(range(4), 2) for i in range(4)]
        to = {expert // (16 // ep) for expert in rng.sample(pool, 3)}
        moved["rank"][0] += sum(r != home and r // width == home // width for r in to)
        moved["rank"][1] += sum(r // width != home // width for r in to)
        moved["node"][0] += sum(r % width != home % width for r in to)
        moved["node"][1] += len({r // width for r in to} - {home // width})
    transports: tuple[Literal["node", "rank"], ...] = ("node", "rank")
    for transport in transports:
        found = traffic(config, Mesh(16, 1, ep, node), Training(transport=transport))
        assert found.nvlink == pytest.approx(moved[transport][0] / tokens, abs=0.02)
        assert found.network == pytest.approx(moved[transport][1] / tokens, abs=0.02)


def test_bytes_of_deepseek_v3() -> None:
    assert copy_bytes(7168, "fp8") == 7168 + 56 * 4 and copy_bytes(7168, "bf16") == 14_336
    assert copy_bytes(100, "fp8") == 104  # a partial block has a scale too
    found = traffic(V3.run.config, V3.run.mesh, V3.run.training)
    assert (found.dispatch_bytes, found.combine_bytes) == (7392, 14_336)
    ranks_reached = 32 * (1 - math.comb(124, 8) / math.comb(128, 8))
    nodes_reached = 4 * (1 - math.comb(96, 8) / math.comb(128, 8))
    assert found.nvlink == pytest.approx(ranks_reached * 7 / 8)  # one in eight is the rank that receives the copy
    assert found.network == pytest.approx(nodes_reached * 7 / 8)  # one in eight is the token's own node


def test_an_all_to_all_is_alpha_and_bytes_over_beta() -> None:
    """1,000 tokens: 2 copies over NVLink of 200 GB/s or 1 over 50 GB/s, which is slower; half of that is achieved."""
    sent = Traffic(ranks=3, nodes=2, nvlink=2, network=1, dispatch_bytes=100, combine_bytes=200)
    rates = Rates(link_share=0.5, latency_us=10)
    assert sent.seconds(1000, GPUS["h800"], rates) == pytest.approx(2 * 10e-6 + 1000 * 300 / 25e9)
    near = dataclasses.replace(sent, nvlink=12)
    assert near.seconds(1000, GPUS["h800"], rates) == pytest.approx(2 * 10e-6 + 1000 * 300 * 12 / 100e9)


def test_a_collective_takes_the_slower_link() -> None:
    rates = Rates(link_share=1)
    h100 = GPUS["h100"]
    assert collective_seconds(450e9, 8, 8, h100, rates) == pytest.approx(7 / 8)  # one node: NVLink alone
    assert collective_seconds(50e9, 4, 1, h100, rates) == pytest.approx(3 / 4)  # one rank per node: network alone
    assert collective_seconds(400e9, 256, 8, h100, rates) == pytest.approx(31 / 32)  # eight adapters share it
    assert collective_seconds(1e9, 1, 1, h100, rates) == 0


@pytest.mark.parametrize(("sequence", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 100)])
def test_mean_context(sequence: int, window: int | None) -> None:
    seen = [sum(max(0, i - (window or sequence)) < j <= i for j in range(1, i + 1)) for i in range(1, sequence + 1)]
    assert mean_context(sequence, window) == pytest.approx(sum(seen) / sequence)


def test_flops_of_deepseek_v3_by_hand() -> None:
    sparse = MLA + 9 * EXPERT + GATE
    products = 3 * (MLA + 3 * WIDTH * 18_432) + 58 * sparse + HEAD
    config = moe.preset("deepseek_v3")
    one = dataclasses.replace(config, num_nextn_predict_layers=0)
    assert sum(block.macs for block in blocks(one, 4096)) == products
    # The 37B activated parameters, without norms and correction biases, which have no multiply-adds.
    small = 61 * (1536 + 512 + 2 * WIDTH) + WIDTH + 58 * 256
    assert products == count_parameters(config).activated_without_embedding - small
    products += 2 * WIDTH * WIDTH + sparse + HEAD  # the MTP module
    assert model_flops(config, 4096) == pytest.approx(6 * (products + 62 * ATTENTION), rel=1e-12)


def test_windows_shorten_attention() -> None:
    found = blocks(moe.preset("gpt_oss_20b"), 4096)
    assert found[1].attention_macs == 64 * 128 * 2048.5
    assert found[0].attention_macs == pytest.approx(64 * 128 * (128 * 129 / 2 + 3968 * 128) / 4096)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("costs", [(3, 3, 3, 3, 3, 3, 9), (1, 5, 2, 2, 7, 1, 1, 4), (1, 1, 1, 1, 50), (8, 1, 1, 1)])
def test_blocks_are_divided_evenly(costs: tuple[int, ...], folded: bool) -> None:
    """Compare with all possible divisions."""
    n = len(costs)

    def squares(cuts: Sequence[int]) -> int:
        ends = (0, *cuts, n)
        loads = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        if folded:
            loads = [front + back for front, back in zip(loads, reversed(loads), strict=True)][: len(loads) // 2]
        return sum(load**2 for load in loads)

    for count in range(1, n // 2 + 1 if folded else n + 1):
        stages = 2 * count if folded else count
        best = min(squares(cuts) for cuts in itertools.combinations(range(1, n), stages - 1))
        spans = _divide(costs, count, folded)
        flat = sorted(span for rank in spans for span in rank)
        assert [i for a, b in flat for i in range(a, b)] == list(range(n)) and len(flat) == stages
        assert sum(sum(sum(costs[a:b]) for a, b in rank) ** 2 for rank in spans) == best


def test_a_step_of_deepseek_v3_by_hand() -> None:
    """The slowest rank has nine blocks with experts in its two stages; all communication is hidden."""
    found = step(V3.run, GPUS["h800"], Rates(overlap=1.0))
    assert max(len(rank.blocks) for rank in ranks(V3.run, 0.5)) == 9
    products = (6 * (MLA + 9 * EXPERT) + 2 * UP_PROJECTIONS) / FP8 + 6 * GATE / BF16
    token = 9 * (products / SHARE + 2 * 3.5 * ATTENTION / BF16 / 0.5) / 2  # each stage processes half the tokens
    compute = token * 15_360 * 4096 / 128
    assert found.parts["compute"] == pytest.approx(compute, rel=1e-4)
    assert found.parts["bubble"] == pytest.approx(compute / 120 * 7 * 2 / 3, rel=1e-4)
    assert found.parts["all-to-all"] == found.parts["reduction"] == 0
    each = 7392 + 14_336
    sent = traffic(V3.run.config, V3.run.mesh, V3.run.training)
    slower = max(sent.nvlink / 200e9, sent.network / 50e9) / 0.8
    exchanged = 9 * 60 * 2 * (2 * 20e-6 + 4096 * each * slower)
    # Gradients and weights, 6 bytes: experts between two nodes, others among 128 ranks, where NVLink is slower.
    others = 9 * (MLA + 1536 + 512 + EXPERT + GATE + 256 + 2 * WIDTH)
    reduced = 6 * (36 * EXPERT / 2 / 50e9 + others * 7 / 8 / 200e9) / 0.8
    assert found.hidden == pytest.approx(exchanged + reduced, rel=1e-9)
    seconds = compute * (1 + 14 / 360)
    assert found.gpu_hours(14.8e12) == pytest.approx(seconds * 2048 / 3600 * 14.8e12 / (15_360 * 4096), rel=1e-3)


def test_a_step_of_fsdp_by_hand() -> None:
    """One micro-batch on 32 nodes: two bf16 all-gathers of weights, one fp32 reduce-scatter, sharded AdamW."""
    olmoe = next(published for published in OTHERS if published.name == "OLMoE-1B-7B")
    parts = step(olmoe.run, GPUS["h100"], Rates(overlap=0)).parts
    parameters = count_parameters(olmoe.run.config).total
    slower = max(7 / 8 / 450e9, 31 / 32 / 8 / 50e9)
    assert parts["reduction"] == pytest.approx(8 * parameters * slower / 0.8)
    # gradient read; master weight and two moments read and written; weight written
    assert parts["optimizer"] == pytest.approx((4 + 2 * 4 + 2 * 8 + 2) * parameters / 256 / 3350e9)


@pytest.mark.parametrize(("schedule", "times"), [("1f1b", 3), ("zb1p", 3 / 3), ("dualpipe", 1 * 2 / 3)])
def test_bubbles(schedule: Any, times: float) -> None:
    """4 stages, in times of a micro-batch: (pp - 1) t, (pp - 1) t / 3, (pp / 2 - 1) 2 t / 3."""
    training = Training(schedule=schedule, global_batch=64)
    run = Run(moe.preset("deepseek_v2_lite"), Mesh(32, pp=4, ep=8), training, 4096, "bf16")
    parts = step(run, GPUS["h100"], Rates()).parts
    assert parts["bubble"] == pytest.approx(times * (parts["compute"] + parts["all-to-all"]) / 8)
    assert parts["compute"] > 0 and parts["all-to-all"] > 0 and parts["reduction"] > 0


def test_computation_hides_communication() -> None:
    run = Run(moe.preset("olmoe_1b_7b"), Mesh(16, ep=16), Training(global_batch=16), 4096, "bf16")
    none, half, most = (step(run, GPUS["h100"], Rates(overlap=share)) for share in (0, 0.5, 1))
    assert none.hidden == 0 and half.parts["all-to-all"] == pytest.approx(none.parts["all-to-all"] / 2)
    assert most.parts["all-to-all"] == 0 and most.hidden == pytest.approx(2 * half.hidden)
    slow = dataclasses.replace(GPUS["h100"], network=0.1)  # more communication than computation can cover
    covered = step(run, slow, Rates(overlap=1))
    assert covered.hidden == covered.parts["compute"] and covered.parts["all-to-all"] > 0


def test_recomputing_blocks_costs_a_forward_pass() -> None:
    """Matrix products take 8 / 6 of the time, attention 4.5 / 3.5, all-to-alls 3 / 2."""
    config, mesh = moe.preset("olmoe_1b_7b"), Mesh(8, ep=8)
    plain, full = (Run(config, mesh, Training(global_batch=8, recompute=r), 4096, "bf16") for r in ("none", "full"))
    rates = Rates(attention_share=1e-9)  # attention dominates
    assert _compute(full, rates) / _compute(plain, rates) == pytest.approx(4.5 / 3.5, rel=1e-3)
    rates = Rates(matmul_share=1e-9)
    assert _compute(full, rates) / _compute(plain, rates) == pytest.approx(8 / 6, rel=1e-3)
    exposed = [step(run, GPUS["h100"], Rates(overlap=0)).parts["all-to-all"] for run in (plain, full)]
    assert exposed[1] / exposed[0] == pytest.approx(1.5)


def _compute(run: Run, rates: Rates) -> float:
    return step(run, GPUS["h100"], rates).parts["compute"]


def test_memory_of_deepseek_v3_by_hand() -> None:
    """A rank with nine MoE blocks: 36 experts, and all other parameters of these blocks."""
    rank = next(rank for rank in ranks(V3.run, 0.5) if len(rank.blocks) == 9)
    parts = memory(rank, V3.run).parts
    others = 9 * (MLA + 1536 + 512 + EXPERT + GATE + 256 + 2 * WIDTH)
    mine = others + 36 * EXPERT
    assert parts["parameters"] == 2 * mine and parts["gradients"] == 4 * mine
    # fp32 master and two bf16 moments, over 128 data-parallel ranks (2 for experts) and two ranks with equal blocks
    assert parts["optimizer"] == pytest.approx(8 * (others / 128 + 36 * EXPERT / 2) / 2)
    reach = 32 * (1 - math.comb(124, 8) / math.comb(128, 8))
    block = 2 * (2 * WIDTH + 1536 + 576 + 128 * 128) + reach * WIDTH + 2 * 9 * 2048
    assert parts["activations in flight"] == pytest.approx(4096 * block * 9 * 17 / 2, rel=1e-9)
    whole = block + 2 * 128 * (192 + 192 + 128) + 2 * WIDTH + 9 * 2048
    assert parts["a block's working set"] == pytest.approx(2 * 4096 * whole, rel=1e-9)
    assert parts["all-to-all buffers"] == pytest.approx(4096 * reach * (7392 + 14_336), rel=1e-6)
    assert "logits" not in parts
    ends = memory(ranks(V3.run, 0.5)[0], V3.run)
    assert ends.parts["logits"] == 4096 * 129_280 * 8 and ends.total < sum(parts.values())


@pytest.mark.parametrize("ep", [1, 4, 16])
def test_fsdp_holds_the_model_once(ep: int) -> None:
    config = moe.preset("qwen3_30b_a3b")
    run = Run(config, Mesh(16, ep=ep), Training(global_batch=16, sharding="fsdp"), 4096, "bf16")
    (rank,) = ranks(run, 1.0)
    parts = memory(rank, run).parts
    assert parts["parameters"] * 16 == pytest.approx(2 * count_parameters(config).total, rel=1e-6)
    assert parts["optimizer"] == pytest.approx(6 * parts["parameters"], rel=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_a_pipeline_holds_each_tensor_once(schedule: Any) -> None:
    config = moe.preset("deepseek_v2_lite")
    run = Run(config, Mesh(8, pp=4), Training(global_batch=6, schedule=schedule), 4096, "bf16")
    held = ranks(run, 1.0)
    assert sum(memory(rank, run).parts["parameters"] for rank in held) == 2 * count_parameters(config).total
    assert [in_flight(rank, run) for rank in held] == [[3], [3], [2], [1]]  # there are only three micro-batches


def test_the_last_stage_has_a_tied_embedding() -> None:
    config = dataclasses.replace(moe.preset("tiny"), num_nextn_predict_layers=0)  # its head is its embedding
    run = Run(config, Mesh(3, pp=3, gpus_per_node=1), Training(sequence=64, global_batch=3), 64, "bf16")
    held = ranks(run, 1.0)
    assert sum(rank.parameters(experts=False) + rank.parameters(experts=True) for rank in held) == (
        count_parameters(config).total + config.vocab_size * config.hidden_size
    )


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (Mesh(12, pp=5), "pp = 5: expected a divisor of the 12 GPUs"),
        (Mesh(8, pp=8), "pp = 8: expected at most the 4 blocks of the model, MTP included"),
        (Mesh(16, ep=16), "ep = 16: expected at most the 12 experts of a layer"),
        (Mesh(8, ep=8), "ep = 8: expected a divisor of the 12 experts of a layer"),
        (Mesh(8, pp=4, ep=4), r"ep = 4: expected a divisor of the 2 data-parallel ranks \(8 GPUs / 4 stages\)"),
        (Mesh(6, ep=6), "ep = 6: expected a divisor or multiple of the 8 GPUs of a node"),
        (Mesh(12, ep=4), "gpus_per_node = 8: expected a divisor or multiple of the 12 data-parallel ranks"),
        (Mesh(0), "gpus = 0: expected a positive integer"),
        (Mesh(8, gpus_per_node=0), "gpus_per_node = 0: expected a positive integer"),
    ],
)
def test_invalid_meshes(mesh: Mesh, message: str) -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=4, num_nextn_predict_layers=0)
    with pytest.raises(ConfigError, match=message):
        mesh.check(config)


@pytest.mark.parametrize(
    ("mesh", "training", "tokens", "message"),
    [
        (Mesh(8), Training(sequence=100), 150, "tokens = 150: expected a multiple of the 100 tokens of a sequence"),
        (Mesh(8), Training(sequence=100), 0, "tokens = 0: expected a multiple"),
        (
            Mesh(8),
            Training(sequence=100, global_batch=24),
            200,
            "global_batch = 24: expected a multiple of the 16 sequences that the 8 data-parallel ranks run at a time",
        ),
        (Mesh(8), Training(global_batch=0), 4096, "global_batch = 0: expected a positive integer"),
        (Mesh(24, pp=3), Training(schedule="dualpipe"), 4096, "pp = 3: expected an even number of stages for dualpipe"),
        (Mesh(16, pp=2), Training(schedule="dualpipe", global_batch=8), 4096, "dualpipe; it makes 1"),
    ],
)
def test_invalid_runs(mesh: Mesh, training: Training, tokens: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Run(moe.preset("deepseek_v2_lite"), mesh, training, tokens, "bf16")


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (Rates(matmul_share=0), "matmul_share = 0: expected a fraction above 0, at most 1"),
        (Rates(overlap=1.5), "overlap = 1.5: expected a fraction from 0 to 1"),
        (Rates(latency_us=-1), "latency_us = -1: expected a finite number of at least 0"),
    ],
)
def test_invalid_rates(rates: Rates, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step(V3.run, GPUS["h800"], rates)


def test_the_fit_is_the_default() -> None:
    assert fit() == pytest.approx(Rates().matmul_share, abs=5e-5)
    assert compare(V3, fit()).hours == pytest.approx(2.664e6, rel=1e-6)


def test_implied_mfu_of_deepseek_v3() -> None:
    """FLOPs per token by the numbers of the report, divided by the peak of 2.664M H800 hours."""
    flops = 6 * (3 * (MLA + 3 * WIDTH * 18_432) + 59 * (MLA + 9 * EXPERT + GATE) + 2 * WIDTH**2 + 2 * HEAD)
    flops += 6 * 62 * ATTENTION
    assert flops == pytest.approx(260.6e9, rel=1e-3)
    assert (
        V3.implied_mfu() == pytest.approx(flops * 14.8e12 / (2.664e6 * 3600 * BF16)) == pytest.approx(0.4065, rel=1e-3)
    )


def test_runs_that_were_not_fitted() -> None:
    """Modelled GPU hours beside published ones, as docs/planning.md has them. If the model changes, change it there."""
    errors = {published.name: round(100 * compare(published, fit()).error, 1) for published in OTHERS}
    assert errors == {"DeepSeek-V2": 10.5, "dots.llm1": 4.5, "OLMoE-1B-7B": -16.1}


def test_dots_llm1_is_as_large_as_published() -> None:
    counts = count_parameters(moe.preset("dots_llm1"))
    assert counts.total == pytest.approx(142e9, rel=0.01) and counts.activated == pytest.approx(14e9, rel=0.01)


def run(capsys: Any, *args: str) -> tuple[int, str, str]:
    status = main(args)
    out, err = capsys.readouterr()
    return status, out, err


PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
(COMMAND,) = re.findall(r"^moesmith (plan .* --gpu .*)$", PAGE, re.MULTILINE)
CLUSTER = ("plan", "deepseek_v3", "--gpus", "2048", "--gpu", "h800", "--ep", "64", "--pp", "16")


def test_the_command(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, *COMMAND.split())
    assert status == 0 and "\nFits into 80.00 GiB" in out and "2,664," in out
    assert " 7,392 " in out and "A token is sent to 7.36 ranks on 3.63 nodes, including its own." in out
    facts = json.loads(run(capsys, *COMMAND.split(), "--price", "3", "--json")[1])
    for kind in (Training, Rates):  # every assumption is printed
        names = {kind_field.name for kind_field in dataclasses.fields(kind)}
        said = facts["training"] | facts["rates"]
        assert names <= said.keys() and all(f"{name} {said[name]}" in out for name in names)
    said = (
        f"fits into 80 GiB ({facts['memory']['total'] / 2**30:.2f} GiB), sends each token to 7.36 ranks on 3.63 nodes"
    )
    assert f"{said}, and takes {facts['cost']['days']:.1f} days" in " ".join(PAGE.split())
    assert facts["memory"]["total"] == sum(facts["memory"]["parts"].values()) and facts["memory"]["fits"]
    assert facts["step"]["seconds"] == pytest.approx(sum(facts["step"]["parts"].values()))
    cost = facts["cost"]
    assert cost["gpu_hours"] == pytest.approx(2.664e6, rel=1e-3)
    assert cost["dollars"] == 3 * cost["gpu_hours"] and cost["days"] == cost["gpu_hours"] / 24 / 2048
    assert facts["all_to_all"]["dispatch"]["network"] == pytest.approx(7392 * facts["all_to_all"]["network"])


def test_rates_of_a_gpu_as_options(capsys: Any) -> None:
    rated = ("--memory", "60GiB", "--network", "100", "--bf16", "500", "--nvlink", "300", "--bandwidth", "1000")
    facts = json.loads(run(capsys, *CLUSTER, *rated, "--json")[1])
    expected = {"memory": 60, "network": 100, "bf16": 500, "nvlink": 300, "bandwidth": 1000, "fp8": 1978.9}
    assert facts["gpu"] == {"name": "h800"} | expected and not facts["memory"]["fits"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tiny", "--pp", "2"), "--gpu: expected a GPU, which the options of a training run require"),
        (("tiny", "--gpu", "h900"), "--gpu: expected one of a100, h100, h800, h200, b200, mi300x; found 'h900'"),
        (("tiny", "--gpu", "h100", "--network", "-1"), "--network: expected a number above 0; found -1.0"),
        (("tiny", "--gpu", "a100", "--dtype", "fp8"), "--dtype: expected bf16 on a GPU without FP8; found 'fp8'"),
        (("tiny", "--gpu", "h100", "--dtype", "fp32"), "--dtype: expected fp8 or bf16 with --gpu; found 'fp32'"),
        (("tiny", "--gpu", "h100", "--price", "nan"), "--price: expected a finite number of at least 0; found nan"),
        (("tiny", "--gpu", "h100", "--train-tokens", "many"), "found 'many'"),
        (("tiny", "--published"), "--published: expected no other option than --json"),
        ((), "MODEL: expected a folder, or one of the presets"),
    ],
)
def test_errors_of_the_command(capsys: Any, args: tuple[str, ...], message: str) -> None:
    status, _, err = run(capsys, "plan", *args)
    assert status == 2 and message in err


def test_published_runs(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, "plan", "--published")
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    for number in ("2,664,000", "3,755,960", "1,569,274", "40.7%"):
        assert number in out
    assert status == 0 and "the matmul share, 0.2455, is fitted" in out and "fitted" in out
    facts = json.loads(run(capsys, "plan", "--published", "--json")[1])
    for found, published in zip(facts["runs"], (V3, *OTHERS), strict=True):
        assert f"{found['modelled']:,.0f}" in out and f"{found['published']:,.0f}" in out
        assert found["error"] == found["modelled"] / found["published"] - 1
        assert found["fitted"] or f"{found['error']:+.1%}" in out
        error = "fitted" if found["fitted"] else f"{found['error']:+.1%}"
        communication = f"{found['all_hidden']:,.0f} / {found['none_hidden']:,.0f}"
        row = f"{found['published']:,.0f} | {found['modelled']:,.0f} | {error} | {communication} | "
        assert row + f"{found['published_mfu']:.1%} |" in PAGE
        assert (
            published.source in " ".join(out.split())
            and found["all_hidden"] <= found["modelled"] <= found["none_hidden"]
        )
