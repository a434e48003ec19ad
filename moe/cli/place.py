"""`moesmith place`: replicas and GPUs of experts for serving, from recorded loads, and the gain."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from moe.cli.options import Option
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.presets import PRESETS

if TYPE_CHECKING:
    from moe.planning.placement import PlacementReport

METRICS, SETTINGS = "metrics.jsonl", "settings.json"


@dataclass(frozen=True)
class Args:
    """Assign experts to GPUs, and replicate those with a high load, to minimise the load of the busiest GPU.

    For each layer, prints the load of the busiest GPU divided by the mean, before (experts in order) and after, and a
    lower bound for any placement of that many physical experts.
    """

    file: Annotated[Path, Option("FOLDER-OR-FILE", positional=True)]
    """Run folder or metrics.jsonl of `moesmith train`, whose last validation is used; or a JSON file that
    contains {"load": [[tokens per expert] per layer]}."""
    gpus: int
    """Number of GPUs that divide the experts of each layer."""
    physical_experts: int
    """Number of experts that all GPUs together hold per layer, replicas included: a multiple of --gpus, at least the
    number of experts."""
    nodes: int = 1
    """Number of nodes. If it divides --groups, the experts of a group stay on one node."""
    groups: int = 1
    """Number of groups of the model's group-limited router (n_group)."""
    json: bool = False
    """Print one JSON object, with the placement, instead of a table."""
    out: Path | None = None
    """New file for the JSON object that --json prints."""


def run(args: Args) -> int:
    layers, load = _read(args.file)
    from moe.planning.placement import place

    sizes = {name: getattr(args, name) for name in ("gpus", "physical_experts", "nodes", "groups")}
    with nullcontext() if args.out is None else _new_file(args.out) as file:
        placement = place(load, **sizes)
        report = placement.report(load, layers if layers is not None and len(layers) == len(load) else None)
        overall = {name: getattr(report, name) for name in ("before", "after", "bound")}
        facts: dict[str, Any] = {
            "file": str(args.file),
            "nodes": args.nodes,
            "groups": args.groups,
            "report": dataclasses.asdict(report),
            "overall": {name: report.overall(values) if values else None for name, values in overall.items()},
            "physical_to_logical": placement.physical_to_logical.tolist(),
            "replicas": placement.replicas.tolist(),
            "logical_to_physical": placement.logical_to_physical.tolist(),
        }
        text = json.dumps(facts)
        if file is not None:
            file.write(text + "\n")
    print(text) if args.json else _print(report)
    return 0


@contextmanager
def _new_file(path: Path) -> "Iterator[TextIO]":
    """A new file, which is removed after an exception."""
    with path.open("x", encoding="utf-8") as file:
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _print(report: "PlacementReport") -> None:
    from rich.console import Console

    from moe.train.report import print_table, print_text

    columns: list[list[str]] = []
    for load in (report.before, report.after, report.bound):
        ratios = [] if load is None else [*report.ratios(load), report.overall(load)]
        columns.append([f"{ratio:.3f}" for ratio in ratios] or ["-"] * (len(report.layers) + 1))
    rows = zip([*report.layers, "all layers"], *columns, strict=True)
    console, experts, gpus = Console(), report.experts, report.gpus
    title = "load of the busiest GPU / mean load"
    print_table(console, title, ("layer", "before", "after", "lower bound"), list(rows))
    each = f"{report.physical_experts / gpus:g} per GPU, {report.redundant_experts_per_gpu:g} of them redundant"
    print_text(console, f"{experts} experts, {report.physical_experts} physical experts on {gpus} GPUs: {each}.")
    if report.before is None:
        print_text(console, f"before: unknown, because {gpus} GPUs do not divide {experts} experts.")


def _read(path: Path) -> tuple[list[str] | None, Any]:
    """Names of the layers if they are known, and the load as a tensor [layers, experts]."""
    file = path / METRICS if path.is_dir() else path
    try:
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("FOLDER-OR-FILE", str(file), "an existing file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), error.reason, "UTF-8 text") from None
    if file.suffix != ".jsonl":
        values = _object(content, str(file))
        if "load" not in values:
            raise ConfigError(str(file), list(values), 'a key "load"')
        return None, _matrix(values["load"], f"{file}: load")
    lines = content.split("\n")[:-1]  # a line that a kill cut short has no line break
    for number in range(len(lines), 0, -1):
        where = f"{file}, line {number}"
        record = _object(lines[number - 1], where)
        if record.get("kind") == "validation" and "load" in record:
            return _layer_names(file.with_name(SETTINGS)), _matrix(record["load"], f"{where}: load")
    raise ConfigError(str(file), f"{len(lines)} records", 'one with kind "validation" and load')


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, str(error), "JSON") from None
    if not isinstance(values, dict):
        raise ConfigError(where, values, "a JSON object")
    return values


def _layer_names(settings: Path) -> list[str] | None:
    """Layer names as in the table of `moesmith train`, from the preset of the run; None without its settings."""
    if not settings.exists():
        return None
    config = PRESETS.get(str(_object(settings.read_text(encoding="utf-8"), str(settings)).get("preset")))
    return None if config is None else layer_names(config)


def layer_names(config: ModelConfig) -> list[str]:
    layers = [f"layers.{i}.mlp" for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    return layers + [f"mtp.{i}.block.mlp" for i in range(config.num_nextn_predict_layers)]


def _matrix(rows: Any, where: str) -> Any:
    """A tensor [layers, experts] of the values in the file. Raises ConfigError for anything but numbers."""
    import torch

    if not isinstance(rows, list) or not rows:
        raise ConfigError(where, rows, "a list of layers, each a list of the tokens of its experts")
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            raise ConfigError(f"{where}[{layer}]", row, "a list of the tokens of each expert")
        if len(row) != len(rows[0]):
            raise ConfigError(f"{where}[{layer}]", f"{len(row)} experts", f"{len(rows[0])}, as in load[0]")
        for expert, value in enumerate(row):
            if type(value) not in (int, float) or not 0 <= value <= 1e300:
                raise ConfigError(f"{where}[{layer}][{expert}]", value, "a number from 0 to 1e300")
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)
