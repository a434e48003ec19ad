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
from moe.checkpoint.folder import CONFIG, locate, read_config_values
from moe.checkpoint.planning import Estimate, Placement
from moe.checkpoint.quantization import parse_quantization
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
    dtype: Literal["fp8", "mxfp4", "bf16", "fp32"] | None = None
    """Of the weights, for inference and on disk; by default a quantised folder's own, and else bf16."""
    tokens: int = 8192
    """A GPU: in the cache for inference, in a micro-batch for training."""
    json: bool = False
    """One JSON object instead of tables."""


def run(args: Args) -> int:
    config, own = _config(args.model)
    dtype = args.dtype or own
    memory = parse_size(args.memory, "--memory")
    placement = Placement(args.gpus, args.ep, dtype, args.tokens)
    estimates = {"inference": planning.inference(config, placement), "training": planning.training(config, placement)}
    files = planning.stored(config, dtype)
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
    console.print(f"{args.model} in {dtype} files: {files.tensors:,} tensors, {files.bytes:,} bytes (values: {kinds})")
    for name, estimate in estimates.items():
        _print(console, name, estimate, placement, memory, config)
    return 0


def _config(model: str) -> tuple[ModelConfig, planning.Dtype]:
    """The configuration, and the dtype in which a folder's weights are quantised."""
    if model in PRESETS:
        return PRESETS[model], "bf16"
    if not Path(model).exists():
        raise ConfigError("FOLDER-OR-PRESET", model, f"a folder, or one of the presets {', '.join(PRESETS)}")
    folder = locate(model)
    found = parse_quantization(read_config_values(folder), folder / CONFIG)
    return read_config(model), "bf16" if found is None else "fp8" if found.method == "fp8" else "mxfp4"


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
