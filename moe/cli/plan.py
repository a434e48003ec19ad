"""`moesmith plan`: what each GPU would hold of a model, before a byte is moved."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from moe.checkpoint import planning, read_config
from moe.checkpoint.folder import locate, read_config_values
from moe.checkpoint.planning import Estimate, Placement
from moe.checkpoint.quantization import Quantization, read_quantization
from moe.checkpoint.sizes import parse_size
from moe.cli.plan_cluster import ClusterArgs, find_gpu, plan_facts, print_plan, print_published, published_facts
from moe.cluster.settings import Mesh, Run
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.presets import PRESETS


@dataclass(frozen=True)
class Args:
    """Say what each GPU would hold of a preset or a checkpoint folder, for inference and for training, and if it fits.

    With --gpu: a training run on a cluster of these, memory of a rank, all-to-all bytes, time of a step, days and cost.
    By arithmetic from config.json alone, on the GPU that holds most; the assumptions are printed.
    """

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER-OR-PRESET")] = None
    """A preset (deepseek_v3, qwen3_30b_a3b ...) or a folder."""
    gpus: int = 1
    """That hold one model together."""
    gpu: str | None = None
    """h800, h100, h200, a100, b200 or mi300x."""
    memory: str | None = None
    """Of one GPU; by default that of --gpu, and else 80GiB."""
    ep: int = 1
    """GPUs among which the experts of a layer are divided."""
    dtype: Literal["fp8", "mxfp4", "bf16", "fp32"] | None = None
    """Of the weights, for inference and on disk; by default a quantised folder's own, and else bf16. With --gpu, of the
    matrix products: fp8 or bf16, by default bf16."""
    tokens: int | None = None
    """A GPU: in the cache for inference, in a micro-batch for training; by default 8,192, with --gpu one sequence."""
    json: bool = False
    """One JSON object instead of tables."""
    published: bool = False
    """Fit the model of a step to DeepSeek-V3's published GPU hours, and set it beside those of other runs."""
    cluster: Annotated[ClusterArgs, tyro.conf.arg(name="")] = field(default_factory=ClusterArgs)


def run(args: Args) -> int:
    console = Console(highlight=False)
    if args.published:
        if args != Args(published=True, json=args.json):
            raise ConfigError("--published", True, "no other option than --json")
        facts = published_facts()
        print(json.dumps(facts)) if args.json else print_published(console, facts)
        return 0
    if args.model is None:
        raise ConfigError("FOLDER-OR-PRESET", None, f"a folder, or one of the presets {', '.join(PRESETS)}")
    config, found = _config(args.model)
    memory = None if args.memory is None else parse_size(args.memory, "--memory")
    if memory is not None and memory < 2**20:
        raise ConfigError("--memory", args.memory, "at least 1MiB, with a unit: 80GiB")
    if args.gpu is not None:
        facts = _cluster(args, args.model, args.gpu, config, memory)
        print(json.dumps(facts, default=dict)) if args.json else print_plan(console, facts)
        return 0
    if args.cluster != ClusterArgs():
        raise ConfigError("--gpu", None, "a GPU, because an option of a training run is given")
    dtype = args.dtype or _dtype(found)
    return _tables(args, args.model, config, dtype, found, memory or 80 * 2**30, console)


def _cluster(args: Args, model: str, name: str, config: ModelConfig, memory: int | None) -> dict[str, Any]:
    dtype = args.dtype or "bf16"
    if dtype not in ("fp8", "bf16"):
        raise ConfigError("dtype", dtype, "fp8 or bf16 with --gpu")
    cluster = args.cluster
    mesh = Mesh(args.gpus, cluster.pp, args.ep, cluster.gpus_per_node)
    tokens = cluster.training.sequence if args.tokens is None else args.tokens
    training_run = Run(config, mesh, cluster.training, tokens, dtype)
    return plan_facts(model, training_run, name, find_gpu(name, cluster.rated, memory), cluster)


def _dtype(found: Quantization | None) -> planning.Dtype:
    """The dtype of files in this format."""
    if found is None:
        return "bf16"
    if found.error is not None:
        error = found.error
        expected = f"{error.expected}, or --dtype to plan for other files"
        raise CheckpointError(error.path, error.problem, expected=expected, found=error.found)
    return "fp8" if found.method == "fp8" else "mxfp4"


def _tables(
    args: Args,
    model: str,
    config: ModelConfig,
    dtype: planning.Dtype,
    found: Quantization | None,
    memory: int,
    console: Console,
) -> int:
    placement = Placement(args.gpus, args.ep, dtype, 8192 if args.tokens is None else args.tokens)
    estimates = {"inference": planning.inference(config, placement), "training": planning.training(config, placement)}
    files = planning.stored(config, dtype)
    if args.json:
        facts: dict[str, Any] = {"model": model, "memory": memory, "placement": dataclasses.asdict(placement)}
        facts["stored"] = dataclasses.asdict(files)
        facts["quantization"] = None if found is None else found.name
        for name, estimate in estimates.items():
            fits = estimate.total <= memory
            facts[name] = dataclasses.asdict(estimate) | {"total": estimate.total, "fits": fits}
        print(json.dumps(facts, default=dict))
        return 0
    if found is not None and found.error is not None:
        console.print(f"{model} holds {found.name} files, which cannot be loaded; planned for {dtype}", markup=False)
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in files.values.items())
    console.print(f"{model} in {dtype} files: {files.tensors:,} tensors, {files.bytes:,} bytes (values: {kinds})")
    for name, estimate in estimates.items():
        _print(console, name, estimate, placement, memory, config)
    return 0


def _config(model: str) -> tuple[ModelConfig, Quantization | None]:
    """The configuration, and the format in which a folder's weights are quantised."""
    if model in PRESETS:
        return PRESETS[model], None
    if not Path(model).exists():
        raise ConfigError("FOLDER-OR-PRESET", model, f"a folder, or one of the presets {', '.join(PRESETS)}")
    folder = locate(model)
    return read_config(model), read_quantization(folder, read_config_values(folder))


def _print(
    console: Console, name: str, estimate: Estimate, placement: Placement, memory: int, config: ModelConfig
) -> None:
    where = f"{name} on {placement.gpus} GPU{'s' if placement.gpus > 1 else ''}, EP {placement.ep}"
    title = f"{where}: {estimate.experts} of {config.n_routed_experts} experts a GPU"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("GiB a GPU", justify="right", no_wrap=True)
    for part, nbytes in estimate.parts.items():
        table.add_row(part, f"{nbytes / 2**30:,.2f}")
    table.add_row("all", f"{estimate.total / 2**30:,.2f}", style="bold")
    console.print(table)
    left = memory - estimate.total
    room = f"{abs(left) / 2**30:,.2f} GiB {'to spare' if left >= 0 else 'too much'}"
    console.print(f"{'fits' if left >= 0 else 'does not fit'} into {memory / 2**30:,.2f} GiB: {room}")
    for assumption in estimate.assumptions:
        console.print(f"  assumed: {assumption}")
