"""`moesmith inspect`: configuration and size of a preset or a checkpoint, without torch and without reading weights.

With `--verify`: whether the bytes of a folder are those that were saved.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moe.checkpoint import CheckpointSummary, read_summary
from moe.checkpoint.format.families import FAMILIES
from moe.checkpoint.format.folder import CUT_RECORD, MANIFEST
from moe.checkpoint.format.manifest import verify
from moe.checkpoint.reading.hub import CONFIGS, FILES, find
from moe.cli.options import Option
from moe.cli.source import MODEL, unknown
from moe.config import EXPERT_FIELDS, ModelConfig
from moe.counts import ParameterCounts, activated, count_parameters
from moe.errors import CheckpointError, ConfigError, did_you_mean, one_line
from moe.presets import PRESETS
from moe.train.report import print_table, print_text

_COMPONENTS = ("embedding", "attention", "dense_mlp", "routed_experts", "shared_experts", "routers", "norms", "head")

_SHOWN = 20  # differences; a folder that another program has saved again has thousands


@dataclass(frozen=True)
class Args:
    """Print the configuration and the parameter counts of a model.

    Reads only config.json and the headers of the weight files, also on the Hub, unless --verify is given.
    """

    model: Annotated[str, Option("MODEL", positional=True, text=MODEL)]
    json: bool = False
    """Print one JSON object instead of tables."""
    verify: bool = False
    """Check instead that every byte of a folder is unchanged since it was saved, according to its manifest. Prints one
    line per difference. The exit status is 2 if there is a difference or no manifest."""


def run(args: Args) -> int:
    if args.verify:
        return _verify(args)
    config, stored = _find(args.model)
    counts = count_parameters(config) if config is not None else None
    if args.json:
        facts = {
            "model": args.model,
            "config": config.to_dict() if config is not None else None,
            "parameters": _numbers(counts) if counts is not None else None,
            "stored": _plain(stored) if stored is not None else None,
        }
        print(json.dumps(facts, default=dict))
        return 0
    console = Console(highlight=False)
    if config is not None and counts is not None:
        _print_counts(console, args.model, config, counts)
        _print_config(console, config)
    if stored is not None:
        _print_stored(console, stored)
    return 0


def _verify(args: Args) -> int:
    if args.model in PRESETS:
        raise ConfigError("MODEL", args.model, "a folder to verify, not a preset")
    folder = find(args.model, files=(*CONFIGS, MANIFEST))
    if (folder / MANIFEST).exists():
        folder = find(args.model, files=(*FILES, MANIFEST, CUT_RECORD))
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    terminal.quiet = not terminal.is_terminal  # before rich 14.3 a disabled bar ends with an empty line
    with Progress(*columns, console=terminal, transient=True, disable=terminal.quiet) as progress:
        task = progress.add_task("", total=None)
        verification = verify(folder, lambda read, total: progress.update(task, advance=read, total=total))
    findings = verification.findings
    size = f"{verification.tensors:,} tensors, {verification.bytes:,} bytes in {verification.files:,} files"
    if args.json:
        print(json.dumps({"model": args.model, "verified": dataclasses.asdict(verification)}))
    elif not findings:
        print(f"{verification.folder}: every byte is unchanged since it was saved: {size}")
    else:
        for finding in findings[:_SHOWN]:
            print(" ".join(str(finding).split()))
        if len(findings) > _SHOWN:
            print(f"and {len(findings) - _SHOWN:,} more; --json has them all")
    if findings:
        found = f"{len(findings):,} difference{'s' if len(findings) > 1 else ''}"
        raise CheckpointError(verification.folder, "not as it was saved", expected=size, found=found)
    return 0


def _find(model: str) -> tuple[ModelConfig | None, CheckpointSummary | None]:
    """The configuration (None for an unknown family), and for a folder the contents of its headers."""
    if model in PRESETS:
        return PRESETS[model], None
    try:
        stored = read_summary(model)
    except CheckpointError as error:
        raise unknown(error, model, "MODEL") from error
    return stored.config, stored


def _plain(stored: CheckpointSummary) -> dict[str, Any]:
    values = {f.name: getattr(stored, f.name) for f in dataclasses.fields(stored) if f.name != "config"}
    return values | {"dtypes": {name: dataclasses.asdict(totals) for name, totals in stored.dtypes.items()}}


def _numbers(counts: ParameterCounts) -> dict[str, int]:
    return {
        "total": counts.total,
        "activated": counts.activated,
        "activated_without_embedding": counts.activated_without_embedding,
        "with_mtp": counts.with_mtp,
        "released": counts.released,
        **{name: getattr(counts, name) for name in (*_COMPONENTS, "mtp")},
    }


def _shown(value: Any) -> str:
    """Text of an untrusted file, which may contain commands for the terminal."""
    return one_line(value, 2000)


def _print_counts(console: Console, model: str, config: ModelConfig, counts: ParameterCounts) -> None:
    totals = {
        "total": counts.total,
        "activated per token": counts.activated,
        "activated per token, without the input embedding": counts.activated_without_embedding,
        "in released files, with MTP": counts.released,
    }
    rows = [(name, f"{number:,}") for name, number in totals.items()]
    print_table(console, _shown(model), ("", "parameters"), rows)

    parts: list[tuple[str, ...]] = []
    for name in _COMPONENTS:
        number = getattr(counts, name)
        if not number:
            continue
        used = activated(number, config) if name == "routed_experts" else number
        parts.append((name.replace("_", " "), f"{number:,}", f"{number / counts.total:.2%}", f"{used:,}"))
    if counts.mtp:
        parts.append(("mtp, not in the total", f"{counts.mtp:,}"))
    print_table(console, "by component", ("component", "parameters", "share", "activated"), parts)


def _print_config(console: Console, config: ModelConfig) -> None:
    rows: list[tuple[str, str]] = []
    for name, value in config.to_dict().items():
        if name in EXPERT_FIELDS and not config.has_experts:
            continue
        found = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        rows += [(_shown(key), _shown(inner)) for key, inner in found.items() if inner is not None]
    print_table(console, "configuration", ("field", "value"), rows, text_columns=2)


def _print_stored(console: Console, stored: CheckpointSummary) -> None:
    title = f"{stored.folder}: {stored.model_type}, {stored.files} file{'s' if stored.files > 1 else ''}"
    rows = [
        (_shown(name), f"{totals.tensors:,}", f"{totals.values:,}", f"{totals.bytes:,}")
        for name, totals in [*stored.dtypes.items(), ("total", stored)]
    ]
    print_table(console, _shown(title), ("dtype", "tensors", "values", "bytes"), rows)
    if stored.quantization is not None:
        note = "" if stored.loadable else ", a format that cannot be loaded"
        print_text(console, f"quantisation: {stored.quantization}{note}")
    if stored.config is None:
        hint = did_you_mean(stored.model_type, FAMILIES)
        print_text(console, f"{_shown(stored.model_type)} is not a supported model family{hint}")
    elif stored.agrees:
        apart = "Apart from ignored tensors, the" if stored.ignored else "The"
        print_text(console, f"{apart} files contain exactly the tensors that the configuration requires.")
    for problem in ("missing", "unexpected", "misshaped", "unscaled", "ignored"):
        names = getattr(stored, problem)
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            print_text(console, f"{problem}: {', '.join(map(_shown, names[:3]))}{more}")
