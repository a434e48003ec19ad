"""`moesmith inspect`: what a preset or a checkpoint folder is and weighs, without torch and without weights."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from moe.config import ModelConfig
from moe.counts import ParameterCounts, count_parameters
from moe.errors import ConfigError
from moe.presets import PRESETS

_COMPONENTS = ("embedding", "attention", "dense_mlp", "routed_experts", "shared_experts", "routers", "norms", "head")


@dataclass(frozen=True)
class Args:
    """Print the configuration and the parameter counts of a preset or a checkpoint folder.

    Of a folder only config.json and the headers of the weight files are read.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME-OR-FOLDER")]
    """A preset (tiny, deepseek_v3 ...) or a folder; ./tiny is a folder whatever the presets are called."""
    json: bool = False
    """One JSON object instead of tables."""


def run(args: Args) -> int:
    config, stored = _find(args.model)
    counts = count_parameters(config)
    if args.json:
        facts: dict[str, Any] = {"model": args.model, "config": config.to_dict(), "parameters": _numbers(counts)}
        if stored is not None:
            facts["stored"] = stored
        print(json.dumps(facts, default=str))
        return 0
    _print(args.model, config, counts, stored)
    return 0


def _find(model: str) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The configuration, and for a folder what its headers say."""
    if model in PRESETS:
        return PRESETS[model], None
    folder = Path(model)
    if not folder.exists():
        raise ConfigError("NAME-OR-FOLDER", model, f"a folder, or one of the presets {', '.join(PRESETS)}")
    from moe.checkpoint import read_config, read_summary

    return read_config(folder), dataclasses.asdict(read_summary(folder))


def _numbers(counts: ParameterCounts) -> dict[str, int]:
    return {
        "total": counts.total,
        "activated": counts.activated,
        "activated_without_embedding": counts.activated_without_embedding,
        "with_mtp": counts.with_mtp,
        "released": counts.released,
        **{name: getattr(counts, name) for name in (*_COMPONENTS, "mtp")},
    }


def _print(model: str, config: ModelConfig, counts: ParameterCounts, stored: dict[str, Any] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    totals = Table(title=f"{model}: parameters", title_justify="left")
    totals.add_column("what")
    totals.add_column("parameters", justify="right", no_wrap=True)
    for label, number in (
        ("total", counts.total),
        ("activated by one token", counts.activated),
        ("activated, without the input embedding", counts.activated_without_embedding),
        ("in released files, with MTP", counts.released),
    ):
        totals.add_row(label, f"{number:,}")
    console.print(totals)

    parts = Table(title="by component", title_justify="left")
    parts.add_column("component")
    for heading in ("parameters", "share", "activated"):
        parts.add_column(heading, justify="right", no_wrap=True)
    for name in _COMPONENTS:
        number = getattr(counts, name)
        if number:
            used = (
                number * config.num_experts_per_tok // config.n_routed_experts if name == "routed_experts" else number
            )
            parts.add_row(name.replace("_", " "), f"{number:,}", f"{number / counts.total:.2%}", f"{used:,}")
    if counts.mtp:
        parts.add_row("mtp (not in the total)", f"{counts.mtp:,}", "", "")
    console.print(parts)

    values = Table(title="configuration", title_justify="left")
    values.add_column("field")
    values.add_column("value", overflow="fold")
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            for key, inner in value.items():
                if inner is not None:
                    values.add_row(f"{name}.{key}", str(inner))
        elif value is not None:
            values.add_row(name, str(value))
    console.print(values)

    if stored is not None:
        files = Table(title="stored", title_justify="left")
        files.add_column("what")
        files.add_column("value", overflow="fold")
        for name, value in stored.items():
            files.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        console.print(files)
