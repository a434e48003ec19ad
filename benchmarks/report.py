"""Tables, the comparison with earlier results, and the plot. Works on records as they stand in the JSON lines."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness import BadInput
from benchmarks.roofline import Ceilings
from benchmarks.shapes import Shape

MODES = ("eager", "graph")


@dataclass(frozen=True)
class Kernel:
    """What a profile says of one call: how often, and seconds of its own."""

    name: str
    count: float
    seconds: float


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def show_run(about: Mapping[str, Any], ceilings: Mapping[str, Ceilings]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    driver = f", driver {about['driver']}" if about["driver"] else ""
    console = _console()
    line = f"{about['device']}{driver}; {versions}; commit {about['commit']}, run {about['run']}"
    console.print(Text(line), soft_wrap=True)
    for name, found in ceilings.items():
        console.print(f"{name} ceilings: matmul {found.matmul / 1e12:.4g} TFLOP/s, copy {found.copy / 1e9:.4g} GB/s")
    if ceilings:
        console.print(
            "times are medians; rates and % of the limit are those of the faster way; error: of the worst row"
        )


def show(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One piece of work, a row for each candidate."""
    table = Table(title=Text(f"{title}: limit {_ms(records[0]['limit_s'])} ms"), title_justify="left")
    table.add_column("candidate", overflow="fold")
    on_gpu = any(r["peak_bytes"] is not None for r in records)
    for heading in ("eager, ms", *(("graph, ms", "peak, MiB") if on_gpu else ()), "TFLOP/s", "GB/s", "% of limit"):
        table.add_column(heading, justify="right")
    table.add_column("error", justify="right")
    for r in records:
        if "eager" not in r:
            table.add_row(Text(r["candidate"]), Text(r["status"]))
            continue
        cells = [_ms(r["eager"]["median_s"])]
        if on_gpu:
            cells += [_ms(r["graph"]["median_s"]) if r["graph"] else "no", f"{r['peak_bytes'] / 2**20:.1f}"]
        cells += [f"{r['tflops']:.4g}", f"{r['gbytes']:.4g}", f"{r['share']:.1%}"]
        error = f"{max(e['row'] for e in r['errors'].values()):.1e}" if r["errors"] else r["status"]
        table.add_row(Text(r["candidate"]), *cells, error)
    console = _console()
    console.print(table)
    for r in records:
        if r["reason"]:
            console.print(Text(f"{r['candidate']} is {r['status']}: {r['reason']}"), soft_wrap=True)
        if r.get("no_graph"):
            console.print(Text(f"{r['candidate']} has no graph: {r['no_graph']}"), soft_wrap=True)
        if r.get("note"):
            console.print(Text(f"{r['candidate']}: {r['note']}"), soft_wrap=True)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def show_packing(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One rank's part of a dispatch, a row for each step and candidate."""
    table = Table(title=Text(title), title_justify="left")
    for heading in ("step", "candidate", "ms", "times ours", "MB", "GB/s", "% of limit"):
        table.add_column(heading, justify="left" if heading in ("step", "candidate") else "right", overflow="fold")
    ours = {r["step"]: r["eager"]["median_s"] for r in records if r["ours"] and "eager" in r}
    for r in records:
        names = (Text(r["step"]), Text(r["candidate"]))
        if "eager" not in r:
            table.add_row(*names, Text(r["status"]))
            continue
        took = r["eager"]["median_s"]
        times = f"{took / ours[r['step']]:.2f}" if r["step"] in ours else ""
        # What a candidate moves that does other work is not known.
        moved = (f"{r['bytes'] / 1e6:.4g}", f"{r['gbytes']:.4g}", f"{r['share']:.1%}")
        if r["status"] != "right":
            moved = ("", "", r["status"])
        table.add_row(*names, _ms(took), times, *moved)
    _print(table, records, lambda r: f"{r['step']}, {r['candidate']}")


def show_bytes(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """What a token costs its rank in one layer, forward, in bytes that leave it."""
    table = Table(title=Text(title), title_justify="left")
    left = ("shape", "routing", "rows as")
    for heading in (*left, "ranks", "copies", "expected", "bytes", "of expected", "a copy for each expert", "saves"):
        table.add_column(heading, justify="left" if heading in left else "right")
    for r in records:
        names = (Text(r["shape"]), Text(r["routing"]), "fp8" if r["payload"] == "fp8" else "bf16", str(r["ranks"]))
        if r["status"] != "right":
            table.add_row(*names, Text(r["status"]))
            continue
        numbers = (f"{r['copies']:.3f}", f"{r['expected_copies']:.3f}", f"{r['bytes']:,.0f}")
        ratio = "" if r["of_expected"] is None else f"{r['of_expected']:.3f}"
        saves = "" if r["dedup"] is None else f"{r['dedup']:.2f} x"
        table.add_row(*names, *numbers, ratio, f"{r['naive_bytes']:,.0f}", saves)
    _print(table, records, lambda r: f"{r['shape']}, {r['routing']}, {r['payload']}, {r['ranks']} ranks")


def show_scaling(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Tokens a second of a layer whose experts are divided."""
    table = Table(title=Text(title), title_justify="left")
    for heading in ("ranks", "tokens", "fixed", "ms", "tokens/s", "undivided", "limit", "% of limit", "in collectives"):
        table.add_column(heading, justify="left" if heading == "fixed" else "right")
    for r in records:
        names = (str(r["ranks"]), f"{r['tokens']:,}", r["fixed"])
        if r["status"] != "right":
            table.add_row(*names, Text(r["status"]))
            continue
        rates = (f"{r[name]:,.0f}" for name in ("tokens_per_s", "undivided_tokens_per_s", "limit_tokens_per_s"))
        shares = (f"{r['share']:.1%}", f"{r['in_collectives']:.1%}")
        table.add_row(*names, _ms(r["together"]["median_s"]), *rates, *shares)
    _print(table, records, lambda r: f"{r['shape']}, {r['ranks']} ranks, {r['fixed']}")


def note(text: str) -> None:
    _console().print(Text(text), soft_wrap=True)


def _print(table: Table, records: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]) -> None:
    console = _console()
    console.print(table)
    for r in records:
        if r["reason"]:
            console.print(Text(f"{name(r)} is {r['status']}: {r['reason']}"), soft_wrap=True)


def show_absent(absent: Mapping[str, str]) -> None:
    for name, reason in absent.items():
        _console().print(Text(f"absent: {name} ({reason})"), soft_wrap=True)


def show_list(
    shapes: Iterable[Shape], ops: Iterable[str], present: Mapping[str, str], absent: Mapping[str, str]
) -> None:
    console = _console()
    table = Table(title="shapes", title_justify="left")
    for heading in ("name", "d", "n", "E", "K", "T"):
        table.add_column(heading, justify="left" if heading == "name" else "right")
    for shape in shapes:
        table.add_row(shape.name, *map(str, shape.sizes), " ".join(map(str, shape.tokens)))
    console.print(table)
    console.print(f"operations: {' '.join(ops)}")
    for name, description in present.items():
        console.print(Text(f"present: {name} ({description})"), soft_wrap=True)
    show_absent(absent)


def show_profile(kernels: Iterable[Kernel], rows: int = 12) -> None:
    """Those that take longest, each with its share of the sum."""
    ordered = sorted(kernels, key=lambda kernel: -kernel.seconds)
    total = sum(kernel.seconds for kernel in ordered) or 1.0
    table = Table(title="profile of moesmith, a call", title_justify="left")
    for heading in ("kernel", "calls", "ms", "share"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", overflow="fold")
    for kernel in ordered[:rows]:
        table.add_row(Text(kernel.name), f"{kernel.count:g}", _ms(kernel.seconds), f"{kernel.seconds / total:.1%}")
    _console().print(table)


KEY = {
    **dict.fromkeys(("op", "shape", "routing", "dtype", "candidate", "device"), str),
    **dict.fromkeys(("d", "n", "experts", "top_k", "tokens"), int),
}


def read(file: Path) -> list[dict[str, Any]]:
    """The records of earlier runs. Raises BadInput."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"--compare {file}: cannot be read ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        fault = _fault(record)
        if fault:
            raise BadInput(f"--compare {file}: line {number} is no record of `layer --json`: {fault}")
        records.append(record)
    if not records:
        raise BadInput(f"--compare {file}: no records")
    return records


def _fault(record: Any) -> str:
    """What a record lacks that is compared; empty if nothing."""
    if not isinstance(record, dict):
        return "not a JSON object"
    for name, kind in {**KEY, "ours": bool, "status": str}.items():
        if type(record.get(name)) is not kind:
            return f"{name} is not of type {kind.__name__}"
    for mode in MODES:
        found = record.get(mode)
        if found is not None:
            median = found.get("median_s") if isinstance(found, dict) else None
            if isinstance(median, bool) or not isinstance(median, int | float) or not 0 < median < 1e300:
                return f"the median_s of {mode} is not a positive number"
    return ""


def key_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two records must share to be compared; a shape is its sizes, small or not."""
    return tuple(record[name] for name in KEY)


def compare(
    new: Sequence[Mapping[str, Any]],
    old: Sequence[Mapping[str, Any]],
    tolerance: float,
    planned: Iterable[Mapping[str, Any]] = (),
) -> bool:
    """Prints new over old times, of the last record of each kind; whether ours is slower than allowed or went wrong.

    What it could do and cannot now is worse as well: to have a graph, or a time for something that was `planned` (the
    values of `KEY`) and has no new record.
    """
    after = {key_of(record): record for record in new}
    wanted = {key_of(plan) for plan in planned} | set(after)
    table = Table(title="time over what it was", title_justify="left")
    for heading in ("work", "candidate", *MODES):
        table.add_column(heading)
    worse, notes = False, []
    for key, then in {key_of(record): record for record in old if key_of(record) in wanted}.items():
        now = after.get(key, {})
        ratios = {m: now[m]["median_s"] / then[m]["median_s"] for m in MODES if then.get(m) and now.get(m)}
        gone = [m for m in MODES if then.get(m) and not now.get(m)]
        note = ""
        if then["status"] == "right" and now and now["status"] != "right":
            note = f"was right, now {now['status']}: {now['reason']}"
        elif gone:
            note = f"had a time, now none: {', '.join(gone)}"
        elif any(ratio > 1 + tolerance for ratio in ratios.values()):
            note = "slower"
        worse = worse or (bool(note) and bool(now.get("ours", then["ours"])))
        work = f"{then['op']} {then['shape']} T {then['tokens']} {then['routing']} {then['dtype']}"
        notes += [f"{work}, {then['candidate']}: {note}"] if note else []
        table.add_row(Text(work), Text(then["candidate"]), *(f"{ratios[m]:.2f}" if m in ratios else "" for m in MODES))
    console = _console()
    console.print(table)
    for note in notes:
        console.print(Text(note), soft_wrap=True)
    return worse


def check_plot(file: Path) -> None:
    """Raises BadInput if no plot can be made, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--plot: {error}; pip install matplotlib") from None
    if file.suffix.lower() != ".png":
        raise BadInput(f"--plot {file}: expected a name that ends in .png")
    if not file.parent.is_dir():
        raise BadInput(f"--plot {file}: no folder {file.parent}")
    new = not file.exists()
    try:
        file.open("ab").close()
        if new:
            file.unlink()
    except OSError as error:
        raise BadInput(f"--plot {file}: {error.strerror}") from None


def plot(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Shares of the limit: a panel for each operation, a group of bars for each piece of work."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    timed = [r for r in records if "share" in r]
    ops = list(dict.fromkeys(r["op"] for r in timed))
    candidates = list(dict.fromkeys(r["candidate"] for r in timed))
    works = {op: list(dict.fromkeys(_work(r) for r in timed if r["op"] == op)) for op in ops}
    heights = [0.6 + 0.16 * len([r for r in timed if r["op"] == op]) + 0.1 * len(works[op]) for op in ops]
    figure = Figure(figsize=(9, 1.0 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(ops), 1), squeeze=False, height_ratios=heights or None)[:, 0]
    for op, panel in zip(ops, panels, strict=False):
        place, ticks = 0.0, []
        for work in works[op]:
            group = [r for r in timed if r["op"] == op and _work(r) == work]
            ticks.append(place + (len(group) - 1) / 2)
            for r in group:
                color = colors[candidates.index(r["candidate"]) % len(colors)]
                panel.barh(place, 100 * r["share"], color=color, height=0.9)
                panel.text(100 * r["share"], place, f" {100 * r['share']:.3g}", va="center", fontsize=6)
                place += 1
            place += 0.8
        panel.set_yticks(ticks, works[op], fontsize=7)
        panel.invert_yaxis()
        panel.tick_params(axis="x", labelsize=7)
        panel.set_title(op, loc="left", fontsize=9)
        panel.margins(x=0.08, y=0.01)
    panels[-1].set_xlabel("% of the limit", fontsize=8)
    handles = [Patch(color=colors[i % len(colors)], label=Path(name).name) for i, name in enumerate(candidates)]
    about = records[0]
    figure.suptitle(f"{about['device']}, commit {about['commit']}", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    try:
        figure.savefig(file, dpi=130)
    except OSError as error:
        raise BadInput(f"--plot {file}: {error.strerror}") from None


def _work(record: Mapping[str, Any]) -> str:
    return f"{record['shape']}\nT {record['tokens']}, {record['routing']}, {record['dtype']}"
