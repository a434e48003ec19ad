"""`moesmith plan`: what each GPU would hold of a model, before a byte is moved."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from moe.checkpoint import planning, read_config
from moe.checkpoint.planning import Estimate, Placement
from moe.checkpoint.sizes import parse_size
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.presets import PRESETS


@dataclass(frozen=True)
class Args:
    """Say what each GPU would hold of a preset or a checkpoint folder, for inference and for training, and if it fits.

    By arithmetic from config.json alone, on the GPU that holds most; the assumptions are printed.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER-OR-PRESET")]
    """A preset (deepseek_v3, qwen3_30b_a3b ...) or a folder."""
    gpus: int = 1
    """That hold one model together."""
    memory: str = "80GiB"
    """Of one GPU."""
    ep: int = 1
    """GPUs among which the experts of a layer are divided."""
    dtype: Literal["fp8", "bf16", "fp32"] = "bf16"
    """Of the weights, for inference and on disk."""
    tokens: int = 8192
    """A GPU: in the cache for inference, in a micro-batch for training."""
    json: bool = False
    """One JSON object instead of tables."""


def run(args: Args) -> int:
    config = _config(args.model)
    memory = parse_size(args.memory, "--memory")
    placement = Placement(args.gpus, args.ep, args.dtype, args.tokens)
    estimates = {"inference": planning.inference(config, placement), "training": planning.training(config, placement)}
    files = planning.stored(config, args.dtype)
    if args.json:
        facts: dict[str, Any] = {"model": args.model, "memory": memory, "placement": dataclasses.asdict(placement)}
        facts["stored"] = dataclasses.asdict(files)
        for name, estimate in estimates.items():
            fits = estimate.total <= memory
            facts[name] = dataclasses.asdict(estimate) | {"total": estimate.total, "fits": fits}
        print(json.dumps(facts, default=dict))
        return 0
    console = Console(highlight=False)
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in files.values.items())
    console.print(
        f"{args.model} in {args.dtype} files: {files.tensors:,} tensors, {files.bytes:,} bytes (values: {kinds})"
    )
    for name, estimate in estimates.items():
        _print(console, name, estimate, placement, memory, config)
    return 0


def _config(model: str) -> ModelConfig:
    if model in PRESETS:
        return PRESETS[model]
    if not Path(model).exists():
        raise ConfigError("FOLDER-OR-PRESET", model, f"a folder, or one of the presets {', '.join(PRESETS)}")
    return read_config(model)


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
