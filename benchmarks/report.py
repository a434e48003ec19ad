"""Tables, comparison with earlier results, and plots, all made from records as the JSON lines contain them.

Tables fit 80 columns. Names that are too long continue on the next line.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness import BadInput, disturbance
from benchmarks.roofline import Ceilings
from benchmarks.shapes import SHAPES, Shape

MODES = ("eager", "graph")
SMOKE_TEST = "smoke test: this run shows that everything works and is correct; it does not measure speed"


@dataclass(frozen=True)
class Kernel:
    """Calls and own seconds of a kernel, per call of the profiled function."""

    name: str
    count: float
    seconds: float


def print_line(text: str) -> None:
    _console().print(Text(text), soft_wrap=True)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> None:
    """The first `names` columns are names: aligned to the left, and folded if they are too long."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < names else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    print_line(f"\n{title}")
    _console().print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 80, highlight=False)


def print_run(about: Mapping[str, Any], ceilings: Mapping[str, Ceilings]) -> None:
    """Origin of the results, and the ceilings unless the run is a smoke test."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    driver = f", driver {about['driver']}" if about["driver"] else ""
    print_line(f"{about['device']}{driver}; {versions}; commit {about['commit']}, run {about['run']}")
    if about["small"]:
        print_line(SMOKE_TEST)
        return
    for name, found in ceilings.items():
        print_line(f"{name} ceilings: matmul {found.matmul / 1e12:.4g} TFLOP/s, copy {found.copy / 1e9:.4g} GB/s")
    if ceilings:
        print_line("times are medians; rates and % of the limit are of the faster mode; error: worst row")


def print_layer(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One case of the layer benchmark, a row for each candidate."""
    if records[0]["small"]:
        rows = [(r["candidate"], r["status"], *_worst_row(r)) for r in records]
        print_table(title, ("candidate", "result", "error", "at most"), rows, names=2)
        _print_reasons(records, lambda r: r["candidate"])
        return
    on_gpu = any(r["peak_bytes"] is not None for r in records)
    gpu_headings = ("graph\nms", "peak\nMiB") if on_gpu else ()
    headings = ("candidate", "eager\nms", *gpu_headings, "TFLOP/s", "GB/s", "% of\nlimit", "error")
    rows = []
    for r in records:
        if "eager" not in r:
            rows.append((r["candidate"], r["status"]))
            continue
        cells = [_ms(r["eager"]["median_s"])]
        if on_gpu:
            cells += [_ms(r["graph"]["median_s"]) if r["graph"] else "no", f"{r['peak_bytes'] / 2**20:.0f}"]
        cells += [f"{r['tflops']:.4g}", f"{r['gbytes']:.4g}", f"{100 * r['share']:.1f}"]
        rows.append((r["candidate"], *cells, _worst_row(r)[0] or "unchecked"))
    print_table(f"{title}: limit {_ms(records[0]['limit_s'])} ms", headings, rows)
    _print_reasons(records, lambda r: r["candidate"])
    for r in records:
        if r.get("no_graph"):
            print_line(f"{r['candidate']} has no graph: {r['no_graph']}")


def _worst_row(record: Mapping[str, Any]) -> tuple[str, str]:
    """The row error that is largest beside its limit, and that limit; empty if the result was not checked."""
    worst = max(record["errors"].values(), key=lambda e: e["row"] / e["row_limit"], default=None)
    return (f"{worst['row']:.1e}", f"{worst['row_limit']:.1e}") if worst else ("", "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _print_reasons(records: Sequence[Mapping[str, Any]], name: Callable[[Mapping[str, Any]], str]) -> None:
    """A line for each record that has no result, or a note."""
    for r in records:
        if r["reason"]:
            print_line(f"{name(r)} is {r['status']}: {r['reason']}")
        if r.get("note"):
            print_line(f"{name(r)}: {r['note']}")


def print_packing(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """One rank's part of a dispatch, a row for each step and candidate."""

    def name(record: Mapping[str, Any]) -> str:
        return f"{record['step']}, {record['candidate']}"

    if records[0]["small"]:
        rows = [(r["step"], r["candidate"], r["status"]) for r in records]
        print_table(title, ("step", "candidate", "result"), rows, names=3)
        _print_reasons(records, name)
        return
    ours = {r["step"]: r["eager"]["median_s"] for r in records if r["ours"] and "eager" in r}
    rows = []
    for r in records:
        if "eager" not in r:
            rows.append((r["step"], r["candidate"], r["status"]))
            continue
        took = r["eager"]["median_s"]
        times = f"{took / ours[r['step']]:.2f}" if r["step"] in ours else ""
        # The bytes that a candidate moves for other work are not known.
        moved = (f"{r['bytes'] / 1e6:.4g}", f"{r['gbytes']:.4g}", f"{100 * r['share']:.1f}")
        if r["status"] != "right":
            moved = ("", "", "")
        rows.append((r["step"], r["candidate"], _ms(took), times, *moved))
    print_table(title, ("step", "candidate", "ms", "time /\nours", "MB", "GB/s", "% of\nlimit"), rows, names=2)
    _print_reasons(records, name)


def print_bytes(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Bytes that leave a rank per token and layer, forward."""
    is_small = records[0]["small"]
    headings = ("copies", "expected\ncopies", "bytes", "naive\nbytes")
    rows = []
    for r in records:
        names = (r["shape"], r["routing"], "fp8" if r["payload"] == "fp8" else "bf16")
        if r["status"] != "right" or is_small:
            rows.append((*names, r["status"]))
            continue
        numbers = (
            f"{r['copies']:.3f}",
            f"{r['expected_copies']:.3f}",
            f"{r['bytes']:,.0f}",
            f"{r['naive_bytes']:,.0f}",
        )
        ratio = "" if r["of_expected"] is None else f"{r['of_expected']:.3f}"
        saves = "" if r["dedup"] is None else f"{r['dedup']:.2f} x"
        rows.append((*names, *numbers, ratio, saves))
    more = ("result",) if is_small else (*headings, "bytes /\nexpected", "saves")
    print_table(title, ("shape", "routing", "rows\nas", *more), rows, names=3)
    _print_reasons(records, lambda r: f"{r['shape']}, {r['routing']}, {r['payload']}, {r['ranks']} ranks")


def print_scaling(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Tokens per second of a layer whose experts are divided among ranks."""
    is_small = records[0]["small"]
    rows = []
    for r in records:
        names = (str(r["ranks"]), r["fixed"], f"{r['tokens']:,}")
        if r["status"] != "right" or is_small:
            rows.append((*names, r["status"]))
            continue
        rates = (f"{r[name]:,.0f}" for name in ("tokens_per_s", "undivided_tokens_per_s", "limit_tokens_per_s"))
        shares = (f"{100 * r['share']:.1f}", f"{100 * r['in_collectives']:.1f}")
        rows.append((*names, _ms(r["together"]["median_s"]), *rates, *shares))
    more = ("ms", "tokens/s", "undivided", "limit", "% of\nlimit", "% in col-\nlectives")
    print_table(title, ("ranks", "fixed", "tokens", *(("result",) if is_small else more)), rows, names=2)
    _print_reasons(records, lambda r: f"{r['shape']}, {r['ranks']} ranks, {r['fixed']}")


def print_absent(absent: Mapping[str, str]) -> None:
    for name, reason in absent.items():
        print_line(f"absent: {name} ({reason})")


def print_list(
    shapes: Iterable[Shape], ops: Iterable[str], present: Mapping[str, str], absent: Mapping[str, str]
) -> None:
    rows = [(s.name, *map(str, s.sizes), " ".join(map(str, s.tokens))) for s in shapes]
    print_table("shapes", ("name", "d", "n", "E", "K", "T"), rows)
    print_line(f"operations: {' '.join(ops)}")
    for name, description in present.items():
        print_line(f"present: {name} ({description})")
    print_absent(absent)


def print_profile(kernels: Iterable[Kernel], rows: int = 12) -> None:
    """The kernels that take longest, with their shares of the total time."""
    ordered = sorted(kernels, key=lambda kernel: -kernel.seconds)
    total = sum(kernel.seconds for kernel in ordered) or 1.0
    shown = [(k.name, f"{k.count:g}", _ms(k.seconds), f"{100 * k.seconds / total:.1f}") for k in ordered[:rows]]
    print_table("profile of moesmith, per call", ("kernel", "calls", "ms", "% of\ntime"), shown)


KEY = {
    **dict.fromkeys(("op", "shape", "routing", "dtype", "candidate", "device"), str),
    **dict.fromkeys(("d", "n", "experts", "top_k", "tokens"), int),
}


def read(file: Path, small: bool) -> list[dict[str, Any]]:
    """The records of earlier runs that were smoke tests, if `small`, or were not. Raises BadInput."""
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
            raise BadInput(f"--compare {file}: line {number} is not a record of `layer --json`: {fault}")
        records.append(record)
    if not records:
        raise BadInput(f"--compare {file}: no records")
    alike = [record for record in records if record["small"] == small]
    if not alike:
        sizes = ("small", "full") if small else ("full", "small")
        raise BadInput(
            f"--compare {file}: small runs cannot be compared with full ones; "
            f"expected results of a {sizes[0]} run; found those of a {sizes[1]} run"
        )
    return alike


def _fault(record: Any) -> str:
    """The first field needed for a comparison that is missing or wrong; empty if there is none."""
    if not isinstance(record, dict):
        return "not a JSON object"
    for name, kind in {**KEY, "ours": bool, "small": bool, "status": str}.items():
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
    """The values that two records must share to be compared."""
    return tuple(record[name] for name in KEY)


def compare(
    new: Sequence[Mapping[str, Any]],
    old: Sequence[Mapping[str, Any]],
    tolerance: float,
    planned: Iterable[Mapping[str, Any]] = (),
) -> bool:
    """Print new / old times of the last record of each case, and return whether ours got worse.

    Worse is slower than `tolerance` allows, no longer right, without a graph that it had, or without a new record
    although it was `planned` (values of `KEY`).
    """
    after = {key_of(record): record for record in new}
    wanted = {key_of(plan) for plan in planned} | set(after)
    worse, notes, rows = False, [], []
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
        case = f"{then['op']} {then['shape']} T {then['tokens']} {then['routing']} {then['dtype']}"
        notes += [f"{case}, {then['candidate']}: {note}"] if note else []
        rows.append((case, then["candidate"], *(f"{ratios[m]:.2f}" if m in ratios else "" for m in MODES)))
    print_table("new time / old time (lower is better)", ("case", "candidate", *MODES), rows, names=2)
    for note in notes:
        print_line(note)
    return worse


def check_plot(file: Path) -> None:
    """Raise BadInput if no plot can be made, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--plot: {error}; pip install matplotlib") from None
    if file.suffix.lower() != ".png":
        raise BadInput(f"--plot {file}: not a PNG file; expected a name that ends in .png")
    if not file.parent.is_dir():
        raise BadInput(f"--plot {file}: no folder {file.parent}")
    new = not file.exists()
    try:
        file.open("ab").close()
        if new:
            file.unlink()
    except OSError as error:
        raise BadInput(f"--plot {file}: {error.strerror}") from None


# Okabe and Ito's colours, which colour-blind people can tell apart; ours is the first.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "////", "....")  # of the candidates after the eighth and sixteenth


def plot(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write bars for each case, in a panel for each operation: % of the limit, or of a smoke test milliseconds."""
    try:
        figure(records).savefig(file, dpi=130)
    except OSError as error:
        raise BadInput(f"--plot {file}: {error.strerror}") from None


def figure(records: Sequence[Mapping[str, Any]]) -> Any:
    """The matplotlib figure of `plot`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timed = [r for r in records if "share" in r]
    is_small = any(r["small"] for r in records)
    ops = list(dict.fromkeys(r["op"] for r in timed))
    candidates = list(dict.fromkeys(r["candidate"] for r in sorted(timed, key=lambda r: not r["ours"])))
    looks: dict[str, dict[str, Any]] = {
        name: {"fc": COLORS[i % len(COLORS)], "ec": "white", "hatch": HATCHES[i // len(COLORS) % len(HATCHES)]}
        for i, name in enumerate(candidates)
    }
    cases = {op: list(dict.fromkeys(_case(r) for r in timed if r["op"] == op)) for op in ops}
    heights = [0.6 + 0.16 * len([r for r in timed if r["op"] == op]) + 0.2 * len(cases[op]) for op in ops]
    made = Figure(figsize=(9, 1.4 + sum(heights)), layout="constrained")
    panels = made.subplots(max(len(ops), 1), squeeze=False, height_ratios=heights or None)[:, 0]
    for op, panel in zip(ops, panels, strict=False):
        last, place, ticks = 0.0, 0.0, []
        for case in cases[op]:
            group = [r for r in timed if r["op"] == op and _case(r) == case]
            ticks.append(place + (len(group) - 1) / 2)
            for r in group:
                value = 1e3 * _fastest(r) if is_small else 100 * r["share"]
                panel.barh(place, value, height=0.9, linewidth=0.3, **looks[r["candidate"]])
                panel.text(value, place, f" {value:.3g}", va="center", fontsize=6)
                last, place = place, place + 1
            place += max(0.8, 2.4 - len(group))  # a label takes two lines
        panel.set_yticks(ticks, cases[op], fontsize=7)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_title(op, loc="left", fontsize=9)
        panel.set_ylim(last + 0.8, -0.8)  # the first bar is on top
        panel.margins(x=0.08)
    unit = "median time in ms (lower is better)" if is_small else "% of the limit (higher is better)"
    panels[-1].set_xlabel(unit, fontsize=8)
    handles = [Patch(label=Path(name).name, **looks[name]) for name in candidates]
    about = records[0]
    title = textwrap.fill(f"{about['device']}; {_dtypes(records)}; commit {about['commit']}", 100)
    note = SMOKE_TEST if is_small else disturbance(records)
    made.suptitle(f"{title}\n{note}" if note else title, fontsize=9)
    made.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return made


def _dtypes(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({r["dtype"] for r in records}))


def _fastest(record: Mapping[str, Any]) -> float:
    """Median seconds of the faster mode, eager or graph."""
    return min(record[mode]["median_s"] for mode in MODES if record.get(mode))


def _case(record: Mapping[str, Any]) -> str:
    shrunk = " (shrunk)" if record["small"] and record["shape"] in SHAPES else ""
    return f"{record['shape']}{shrunk}\nT {record['tokens']}, {record['routing']}, {record['dtype']}"
