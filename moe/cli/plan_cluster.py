"""Output of `moesmith plan --gpu` and `--published`: a run on a cluster, and published runs compared with the model."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from rich.console import Console

from moe.checkpoint.format.sizes import parse_size
from moe.cli.options import Option
from moe.errors import ConfigError, did_you_mean
from moe.planning.cluster.gpus import GPUS, Gpu
from moe.planning.cluster.memory import memory
from moe.planning.cluster.settings import Rates, Run, Training
from moe.planning.cluster.stages import ranks
from moe.planning.cluster.step import bf16_per_fp8, step
from moe.planning.cluster.traffic import traffic
from moe.planning.published import OTHERS, V3, compare, fit
from moe.train.report import print_table, print_text, say

ASSUMPTIONS = (
    "experts are balanced, and every choice of experts is equally likely; no tensor or context parallelism",
    "stages are whole blocks, divided as evenly as possible",
    "weights and their all-gather are bf16; gradients, their reduction and master weights are fp32; AdamW",
    "matrix products of blocks use the dtype of the run; router, head and attention use bf16",
    "memory excludes the CUDA context, communication libraries and fragmentation",
    "GPU hours exclude restarts, evaluation and batch-size ramp-up; matmul_share absorbs what is not modelled",
)


@dataclass(frozen=True)
class Rated:
    """Rates of the GPU, in place of those of --gpu."""

    bf16: float | None = None
    """Dense bf16 rate, TFLOP/s."""
    fp8: float | None = None
    """Dense FP8 rate, TFLOP/s."""
    bandwidth: float | None = None
    """Memory bandwidth, GB/s."""
    nvlink: float | None = None
    """NVLink bandwidth per GPU, GB/s per direction."""
    network: float | None = None
    """Network bandwidth per GPU, GB/s per direction."""


@dataclass(frozen=True)
class ClusterArgs:
    """Training run, with --gpu."""

    pp: int = 1
    """Number of pipeline stages. Each has --gpus / --pp data-parallel ranks, among which experts are divided."""
    gpus_per_node: int = 8
    """GPUs per NVLink domain."""
    train_tokens: Annotated[str, Option("COUNT")] = "1T"
    """Tokens of the whole run, for example 14.8T."""
    price: float = 2.0
    """Price of a GPU hour in dollars."""
    training: Training = field(default_factory=Training)
    rates: Rates = field(default_factory=Rates)
    rated: Rated = field(default_factory=Rated)


def find_gpu(name: str, rated: Rated, memory_bytes: int | None) -> Gpu:
    """The GPU called `name`, with the rates and the memory that the user gave."""
    if name not in GPUS:
        raise ConfigError("--gpu", name, f"one of {', '.join(GPUS)}{did_you_mean(name, GPUS)}")
    given = {key: value for key, value in dataclasses.asdict(rated).items() if value is not None}
    for key, value in given.items():
        if not 0 < value < math.inf:
            raise ConfigError(key, value, "a number above 0")
    if memory_bytes is not None:
        given["memory"] = memory_bytes / 2**30
    return dataclasses.replace(GPUS[name], **given)


def plan_facts(name: str, run: Run, gpu_name: str, gpu: Gpu, args: ClusterArgs) -> dict[str, Any]:
    """All printed values, for --json."""
    if not 0 <= args.price < math.inf:
        raise ConfigError("price", args.price, "a finite number of at least 0")
    wanted = parse_size(args.train_tokens, "--train-tokens", allowed="a number of tokens such as 14.8T")
    mesh = run.mesh
    made = step(run, gpu, args.rates)
    largest = max((memory(rank, run) for rank in ranks(run, bf16_per_fp8(gpu))), key=lambda found: found.total)
    sent = traffic(run.config, mesh, run.training)
    sizes = (("dispatch", sent.dispatch_bytes), ("combine", sent.combine_bytes))
    hours = made.gpu_hours(wanted)
    return {
        "model": name,
        "gpu": {"name": gpu_name} | dataclasses.asdict(gpu),
        "mesh": dataclasses.asdict(mesh) | {"dp": mesh.dp, "experts": run.config.n_routed_experts // mesh.ep},
        "training": dataclasses.asdict(run.training)
        | {"tokens": run.tokens, "micro_batches": run.micro_batches, "dtype": run.dtype},
        "rates": dataclasses.asdict(args.rates),
        "memory": dataclasses.asdict(largest) | {"total": largest.total, "fits": largest.total <= gpu.memory * 2**30},
        "all_to_all": dataclasses.asdict(sent)
        | {key: {"nvlink": sent.nvlink * size, "network": sent.network * size} for key, size in sizes},
        "step": dataclasses.asdict(made) | {"seconds": made.seconds, "tokens_per_gpu": made.tokens_per_gpu},
        "cost": {
            "tokens": wanted,
            "gpu_hours": hours,
            "days": hours / 24 / mesh.gpus,
            "price": args.price,
            "dollars": hours * args.price,
        },
        "assumptions": ASSUMPTIONS,
    }


def print_plan(console: Console, facts: dict[str, Any]) -> None:
    mesh, training, gpu = facts["mesh"], facts["training"], facts["gpu"]
    where = f"{facts['model']} on {mesh['gpus']:,} {gpu['name']} GPUs, {training['dtype']}"
    experts = f" ({mesh['experts']} experts per GPU)" if mesh["experts"] else ""
    say(console, f"{where}: PP {mesh['pp']} x DP {mesh['dp']}, EP {mesh['ep']}{experts}\n")
    held = facts["memory"]
    rows = [(part, f"{nbytes / 2**30:,.2f}") for part, nbytes in (held["parts"] | {"total": held["total"]}).items()]
    print_table(console, f"memory of pipeline rank {held['rank']}, which needs the most", ("part", "GiB per GPU"), rows)
    print_fit(console, held["total"], gpu["memory"] * 2**30)

    sent = facts["all_to_all"]
    if mesh["experts"]:
        rows = [
            (
                name,
                *(f"{nbytes:,.0f}" for nbytes in (sent[f"{name}_bytes"], sent[name]["nvlink"], sent[name]["network"])),
            )
            for name in ("dispatch", "combine")
        ]
        title = "all-to-all bytes per token and MoE layer, forward (backward: the same)"
        print_table(console, title, ("", "per copy", "NVLink", "network"), rows)
        reach = f"A token is sent to {sent['ranks']:.2f} ranks on {sent['nodes']:.2f} nodes, including its own."
        print_text(console, reach)
        console.print()

    made = facts["step"]
    rows = [(part, f"{s:,.3f}", f"{s / made['seconds']:.1%}") for part, s in made["parts"].items()]
    rows.append(("total", f"{made['seconds']:,.3f}", "100.0%"))
    title = f"step of {made['tokens']:,} tokens in {training['micro_batches']} micro-batches"
    print_table(console, title, ("part", "seconds", "share"), rows)
    cost = facts["cost"]
    for line in (
        f"Communication hidden behind computation: {made['hidden']:,.3f} s.",
        f"Speed: {made['tokens_per_gpu']:,.0f} tokens/s per GPU, MFU {made['mfu']:.1%} of the dense bf16 peak.",
        f"Cost of {cost['tokens']:,} tokens: {cost['gpu_hours']:,.0f} GPU hours, {cost['days']:,.1f} days, "
        f"${cost['dollars']:,.0f} at ${cost['price']:,.2f} per GPU hour.",
    ):
        print_text(console, line)
    console.print()
    values = (
        f"{name}: {', '.join(f'{key} {value}' for key, value in facts[name].items())}"
        for name in ("mesh", "training", "rates", "gpu")
    )
    print_assumptions(console, [*values, *facts["assumptions"]])


def print_fit(console: Console, needed: float, memory: float) -> None:
    """Print whether as many bytes fit into the memory of a GPU."""
    left = (memory - needed) / 2**30
    fits, room = ("Fits", "free") if left >= 0 else ("Does not fit", "too much")
    print_text(console, f"{fits} into {memory / 2**30:,.2f} GiB: {abs(left):,.2f} GiB {room}.")
    console.print()


def print_assumptions(console: Console, lines: Iterable[str]) -> None:
    say(console, "Assumptions:")
    for line in lines:
        print_text(console, f"- {line}", indent="  ")


def published_facts() -> dict[str, Any]:
    """The fit, and each published run compared with it."""
    share = fit()
    found = []
    for published in (V3, *OTHERS):
        compared = compare(published, share)
        found.append(
            {
                "run": published.name,
                "fitted": published is V3,
                "tokens": published.tokens,
                "published": published.gpu_hours,
                "modelled": compared.hours,
                "error": compared.error,
                "all_hidden": compared.hidden,
                "none_hidden": compared.exposed,
                "published_mfu": published.implied_mfu(),
                "modelled_mfu": compared.mfu,
                "source": published.source,
                "assumed": published.assumed,
            }
        )
    return {"matmul_share": share, "runs": found}


def print_published(console: Console, facts: dict[str, Any]) -> None:
    runs = facts["runs"]
    rows = [
        (
            run["run"],
            f"{run['published']:,.0f}",
            f"{run['modelled']:,.0f}",
            "fitted" if run["fitted"] else f"{run['error']:+.1%}",
            f"{run['all_hidden']:,.0f}",
            f"{run['none_hidden']:,.0f}",
        )
        for run in runs
    ]
    title = f"GPU hours; the matmul share, {facts['matmul_share']:.4f}, is fitted to the first run only"
    print_table(console, title, ("run", "published", "modelled", "error", "all hidden", "none hidden"), rows)
    print_text(console, "all hidden, none hidden: modelled hours if all or no communication is hidden.")
    console.print()
    rows = [
        (run["run"], f"{run['tokens'] / 1e12:g}T", f"{run['published_mfu']:.1%}", f"{run['modelled_mfu']:.1%}")
        for run in runs
    ]
    headings = ("run", "tokens", "of published hours", "of modelled hours")
    print_table(console, "MFU, relative to the bf16 peak", headings, rows)
    print_assumptions(console, [f"{run['run']} ({run['source']}): {run['assumed']}" for run in runs])
