"""Output of `moesmith plan --gpu` and `--published`: a run on a cluster, and published runs beside the model."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from moe.checkpoint.format.sizes import parse_size
from moe.errors import ConfigError, did_you_mean
from moe.planning.cluster.gpus import GPUS, Gpu
from moe.planning.cluster.memory import memory
from moe.planning.cluster.settings import Rates, Run, Training
from moe.planning.cluster.stages import ranks
from moe.planning.cluster.step import ratio, step
from moe.planning.cluster.traffic import traffic
from moe.planning.published import OTHERS, V3, compare, fit

MODEL = (
    "experts are balanced, and a token's groups and experts any; no tensor or context parallelism",
    "stages are whole blocks, divided as evenly as they go",
    "weights and their gather bf16, gradients, their reduction and master weights fp32; AdamW",
    "products of blocks in the dtype of the run; router, head and attention bf16",
    "memory is without what the CUDA context, communication libraries and fragmentation take",
    "GPU hours are without restarts, evaluation and batches that ramp up; what is not modelled is in the matmul share",
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
    train_tokens: str = "1T"
    """Tokens of the whole run, for example 14.8T."""
    price: float = 2.0
    """Price of a GPU hour in dollars."""
    training: Training = field(default_factory=Training)
    rates: Rates = field(default_factory=Rates)
    rated: Rated = field(default_factory=Rated)


def find_gpu(name: str, rated: Rated, memory_bytes: int | None) -> Gpu:
    """The GPU of the table, with what the user says of it."""
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
    """Everything that is printed, as plain values."""
    if not 0 <= args.price < math.inf:
        raise ConfigError("price", args.price, "dollars from 0 up")
    wanted = parse_size(args.train_tokens, "--train-tokens")
    mesh = run.mesh
    made = step(run, gpu, args.rates)
    fullest = max((memory(rank, run) for rank in ranks(run, ratio(gpu))), key=lambda found: found.total)
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
        "memory": dataclasses.asdict(fullest) | {"total": fullest.total, "fits": fullest.total <= gpu.memory * 2**30},
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
        "assumptions": MODEL,
    }


def print_plan(console: Console, facts: dict[str, Any]) -> None:
    mesh, training, gpu = facts["mesh"], facts["training"], facts["gpu"]
    where = f"{facts['model']} on {mesh['gpus']:,} {gpu['name']}, {training['dtype']}"
    console.print(f"{where}: PP {mesh['pp']} x DP {mesh['dp']}, EP {mesh['ep']} ({mesh['experts']} experts per GPU)")
    held = facts["memory"]
    table = _table(console, f"memory of pipeline rank {held['rank']}, which holds most", "part", "GiB")
    for part, nbytes in held["parts"].items():
        table.add_row(part, f"{nbytes / 2**30:,.2f}")
    table.add_row("total", f"{held['total'] / 2**30:,.2f}", style="bold")
    console.print(table)
    console.print(f"{'fits' if held['fits'] else 'does not fit'} into {gpu['memory']:,.2f} GiB")

    sent = facts["all_to_all"]
    table = _table(
        console, "all-to-all of a token in a MoE layer, forward (backward: the same)", "", "a copy", "NVLink", "network"
    )
    for name in ("dispatch", "combine"):
        row = (sent[f"{name}_bytes"], sent[name]["nvlink"], sent[name]["network"])
        table.add_row(name, *(f"{nbytes:,.0f} B" for nbytes in row))
    console.print(table)
    console.print(f"a token reaches {sent['ranks']:.2f} ranks on {sent['nodes']:.2f} nodes, its own included")

    made = facts["step"]
    table = _table(
        console, f"step of {made['tokens']:,} tokens, {training['micro_batches']} micro-batches", "part", "s", "share"
    )
    for part, seconds in made["parts"].items():
        table.add_row(part, f"{seconds:,.3f}", f"{seconds / made['seconds']:.1%}")
    table.add_row("total", f"{made['seconds']:,.3f}", "", style="bold")
    console.print(table)
    console.print(f"communication behind computation: {made['hidden']:,.3f} s")
    console.print(f"{made['tokens_per_gpu']:,.0f} tokens/s per GPU, MFU {made['mfu']:.1%} of the dense bf16 peak")
    cost = facts["cost"]
    console.print(
        f"{cost['tokens']:,} tokens: {cost['gpu_hours']:,.0f} GPU hours, {cost['days']:,.1f} days, "
        f"${cost['dollars']:,.0f} at ${cost['price']:,.2f} an hour"
    )
    for name in ("mesh", "training", "rates", "gpu"):
        values = ", ".join(f"{key} {value}" for key, value in facts[name].items())
        console.print(f"  assumed {name}: {values}")
    for line in facts["assumptions"]:
        console.print(f"  assumed: {line}")


def published_facts() -> dict[str, Any]:
    """The fit, and each run beside it."""
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
    title = f"GPU hours; matmul share {facts['matmul_share']:.4f} fitted on the first, the others as they come"
    table = _table(console, title, "run", "published", "modelled", "error", "all hidden", "none hidden")
    for run in facts["runs"]:
        table.add_row(
            run["run"],
            *(f"{run[key]:,.0f}" for key in ("published", "modelled")),
            "fitted" if run["fitted"] else f"{run['error']:+.1%}",
            *(f"{run[key]:,.0f}" for key in ("all_hidden", "none_hidden")),
        )
    console.print(table)
    console.print("hidden: modelled hours with all communication behind computation, and with none")
    table = _table(console, "MFU, of bf16's peak", "run", "tokens", "published hours", "modelled hours")
    for run in facts["runs"]:
        shares = (f"{run[key]:.1%}" for key in ("published_mfu", "modelled_mfu"))
        table.add_row(run["run"], f"{run['tokens'] / 1e12:g}T", *shares)
    console.print(table)
    for run in facts["runs"]:
        console.print(f"  {run['run']}: {run['source']}; assumed: {run['assumed']}")


def _table(console: Console, title: str, first: str, *numbers: str) -> Table:
    console.print(title)  # rich would fold a title to the width of its table
    table = Table()
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
