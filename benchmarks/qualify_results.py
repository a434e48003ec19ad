"""Results of `qualify`: JSON lines, one verdict per stage, report.md and plots.

The `kind` of a line is `run` (start of a call), `task` (end of a program), `stage` (end of a stage), or one of their
parts: `fact`, `check`, `test`, `layer`, `profile`, `other`. Every line has device, versions, commit, and `source`, a
hash of the program's files, because a copied tree may have no commit.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks import report
from benchmarks.harness import ROOT, BadInput, disturbance
from benchmarks.report import SMOKE_TEST
from benchmarks.supervise import parse

Record = dict[str, Any]
KINDS = ("run", "task", "stage", "fact", "check", "test", "layer", "profile", "other")
RESULTS, REPORT, LOG = "results.jsonl", "report.md", "log.txt"
PLOTS = {op: f"{op}.png" for op in ("forward", "train", "decode")}
DONE = ("passed", "failed", "not usable")  # statuses of tasks that are not repeated
SAME = ("device", "source", "small", "versions")  # equal in all calls that continue one another


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of a stage: status, counts, seconds, the reason, and the tasks that are left."""

    stage: str
    status: str
    counts: str = ""
    seconds: float | None = None
    reason: str = ""
    left: tuple[str, ...] = ()


def source() -> str:
    """A hash of the program's files."""
    found = hashlib.sha256()
    for folder in ("moe", "kernels", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def read(path: Path) -> list[Record]:
    """Records of an earlier call, from its folder or file, without an incomplete last line. Raises BadInput."""
    file = path / RESULTS if path.is_dir() else path
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise BadInput(f"--resume {path}: {error.strerror}") from None
    records = [record for record in map(parse, lines) if record is not None]
    if not records or any(record.get("kind") not in KINDS or "source" not in record for record in records):
        raise BadInput(f"--resume {path}: not results of `qualify`; expected its folder or results.jsonl")
    return records


def append(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def of_this(records: Iterable[Record], about: Mapping[str, Any]) -> list[Record]:
    """Records with the same device, sources, size and packages."""
    return [record for record in records if all(record.get(name) == about[name] for name in SAME)]


def tasks(records: Iterable[Record], stage: str) -> dict[str, Record]:
    """The last record of each task of a stage."""
    return {record["task"]: record for record in records if record["kind"] == "task" and record["stage"] == stage}


def judge(stage: str, planned: Sequence[str], records: Sequence[Record], unable: str = "") -> Verdict:
    """Verdict of a stage. `planned` are all its tasks; `unable` is why none of them can run."""
    ended = [record for record in records if record["kind"] == "stage" and record["stage"] == stage]
    seconds = sum(record["seconds"] for record in ended) if ended else None
    found = tasks(records, stage)
    done = [found[name] for name in planned if name in found and found[name]["status"] in DONE]
    left = tuple(name for name in planned if name not in found or found[name]["status"] not in DONE)
    if unable:
        return Verdict(stage, unable.partition(":")[0], reason=unable.partition(": ")[2])
    if not found and not ended:
        return Verdict(stage, "not run", left=left)
    stopped = [found[name] for name in left if name in found]
    counts = _counts(done, stopped)
    failed = [r for r in (*done, *stopped) if r["status"] == "failed" or r.get("tests", {}).get("failed")]
    unusable = [record for record in done if record["status"] == "not usable"]
    reasons = [f"{record['task']}: {record['reason']}" for record in (*failed, *unusable)]
    if left:
        why = ended[-1]["why"] if ended and ended[-1]["why"] else "not all were asked for"
        reasons.append(f"{why}, {len(left)} of {len(planned)} left")
    status = "failed" if failed else "stopped" if left else "not usable" if len(unusable) == len(done) else "passed"
    return Verdict(stage, status, counts, seconds, "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else ""), left)


def _counts(done: Sequence[Record], stopped: Sequence[Record]) -> str:
    """Outcomes of tests, including those of stopped tasks; without tests, passed tasks."""
    tests: dict[str, int] = {}
    for record in (*done, *stopped):
        for outcome, number in record.get("tests", {}).items():
            tests[outcome] = tests.get(outcome, 0) + number
    if tests:
        return ", ".join(f"{number} tests {outcome}" for outcome, number in tests.items() if number)
    passed = sum(record["status"] == "passed" for record in done)
    return f"{passed} of {len(done)} passed"


def write_report(
    out: Path,
    verdicts: Sequence[Verdict],
    records: Sequence[Record],
    about: Mapping[str, Any],
    command: str,
    notes: Sequence[str] = (),
) -> None:
    """Write report.md. `command` continues with the tasks that are left."""
    table = [["stage", "verdict", "counts", "seconds", "reason"]]
    for v in verdicts:
        table.append([v.stage, v.status, v.counts, "" if v.seconds is None else f"{v.seconds:.0f}", v.reason])
    text = ["# Qualification", "", _origin(about), "", *_table(table), ""]
    left = [v for v in verdicts if v.left]
    if left:
        text += ["## Tasks left", "", *(f"- {v.stage}: {_some(v.left)}" for v in left), ""]
        text += ["Continue with", "", f"    {command}", ""]
    for section in (_failures, _checks, _layers, _profiles, _facts):
        try:
            text += section(records)
        except Exception as error:  # an unexpected record must not cost the verdicts
            text += [f"{section.__name__}: {type(error).__name__}: {error}", ""]
    pictures = [name for name in PLOTS.values() if (out / name).exists()]
    text += [f"![{Path(name).stem}]({name})" for name in pictures]
    text += [*(f"- {note}" for note in notes), ""] if notes else [""]
    partial = out / (REPORT + ".partial")
    partial.write_text("\n".join(text))
    os.replace(partial, out / REPORT)


def _origin(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    small = "Smoke test, no measure of speed: " if about["small"] else ""
    return f"{small}{about['device']}{driver}; commit {about['commit']}, source {about['source']}; {versions}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _failures(records: Iterable[Record], most: int = 60) -> list[str]:
    found: dict[str, dict[tuple[str, str], list[str]]] = {"failed": {}, "skipped": {}}
    begun: dict[tuple[str, str], dict[str, list[str]]] = {}
    for r in records:
        task = (r["stage"], r["task"])
        if r["kind"] == "test":
            lines = begun.setdefault(task, {"failed": [], "skipped": []})
            lines[r["outcome"]].append(f"- {r['stage']}: `{r['test']}`: {r['reason']}")
        elif r["kind"] == "task":  # its results replace those of an earlier call
            lines = begun.pop(task, {"failed": [], "skipped": []})
            if r["status"] == "failed" and not lines["failed"]:
                lines["failed"] = [f"- {r['stage']}: `{r['task']}`: {r['reason']}"]
            for outcome, those in lines.items():
                found[outcome][task] = those
    for task, lines in begun.items():  # of a killed call
        for outcome, those in lines.items():
            found[outcome][task] = those
    text: list[str] = []
    for title, outcome in (("Failures", "failed"), ("Skipped tests", "skipped")):
        lines = [line for those in found[outcome].values() for line in those]
        if lines:
            more = [f"- and {len(lines) - most} more, in {RESULTS}"] if len(lines) > most else []
            text += [f"## {title}", "", *lines[:most], *more, ""]
    return text


def _checks(records: Iterable[Record]) -> list[str]:
    last = {(r["stage"], r["task"], r["check"]): r for r in records if r["kind"] == "check"}
    if not last:
        return []
    rows = [["task", "check", "found", "at most", ""]]
    for (_, task, what), r in last.items():
        rows.append([task, what, f"{r['found']:.3g}", f"{r['most']:.3g}", "" if r["right"] else "failed"])
    return ["## Checks", "", *_table(rows), ""]


def _seconds(record: Record) -> float:
    """Median seconds of the faster mode, eager or graph."""
    return min(record[mode]["median_s"] for mode in ("eager", "graph") if record.get(mode))


def _works(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """(op, shape, tokens, dtype) -> candidate -> its last record."""
    works: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        if r["kind"] == "layer":
            works.setdefault((r["op"], r["shape"], r["tokens"], r["dtype"]), {})[r["candidate"]] = r
    return works


def _best(found: Mapping[str, Record]) -> str:
    """Name of the fastest peer that is right, without the yardstick, which does other work; empty if there is none."""
    peers = [name for name, r in found.items() if "tflops" in r and not r["ours"] and r["status"] == "right"]
    return min((n for n in peers if n != "dense"), key=lambda name: _seconds(found[name]), default="")


def _layers(records: Sequence[Record]) -> list[str]:
    works = _works(records)
    if not works:
        return []
    layers = [record for record in records if record["kind"] == "layer"]
    notes = [
        f"- {op} {shape} T {tokens}: {name} is {r['status']}: {r['reason']}"
        for (op, shape, tokens, _), found in works.items()
        for name, r in found.items()
        if r["reason"] and r["status"] != "right"
    ]
    if layers[0]["small"]:
        rows = [["op", "shape", "T", "result"]]
        rows += [
            [op, shape, str(tokens), r["status"]]
            for (op, shape, tokens, _), found in sorted(works.items(), key=lambda work: work[0][:1])
            for r in found.values()
            if r["ours"]
        ]
        return ["## Benchmark", "", SMOKE_TEST, "", *_table(rows), "", *notes, ""]
    rows = [["op", "shape", "T", "ms", "TFLOP/s", "GB/s", "% of limit", "best peer", "its time / ours"]]
    for (op, shape, tokens, _), found in sorted(works.items(), key=lambda work: work[0][:1]):
        best = _best(found)
        for r in found.values():
            if r["ours"]:
                cells = [r["status"], "", "", "", best, ""]
                if "tflops" in r:
                    took = _seconds(r)
                    cells = [f"{took * 1e3:.4g}", f"{r['tflops']:.4g}", f"{r['gbytes']:.4g}", f"{r['share']:.1%}", best]
                    cells.append(f"{_seconds(found[best]) / took:.2f}" if best else "")
                rows.append([op, shape, str(tokens), *cells])
    ceilings = []
    for dtype in sorted({r["dtype"] for r in layers}):
        matmul, copy = (
            sorted({r[name] for r in layers if r["dtype"] == dtype}) for name in ("matmul_flops", "copy_bytes")
        )
        rates = f"matmul {matmul[0] / 1e12:.3g} to {matmul[-1] / 1e12:.3g} TFLOP/s"
        ceilings.append(f"{dtype}: {rates}, copy {copy[0] / 1e9:.4g} to {copy[-1] / 1e9:.4g} GB/s")
    disturbed = disturbance(layers)
    return [
        "## Benchmark",
        "",
        "Ceilings, lowest to highest of all processes: " + "; ".join(ceilings),
        "",
        *_table(rows),
        "",
        *([disturbed, ""] if disturbed else []),
        *notes,
        "",
    ]


def _profiles(records: Sequence[Record]) -> list[str]:
    records = [record for record in records if record["kind"] == "profile"]
    if not records:
        return []
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    rows = [["metric", *(f"{r['kernel']} {r['launch']}" for r in records)]]
    rows += [[name, *(str(r["metrics"].get(name, "")) for r in records)] for name in names]
    return ["## Profile", "", *_table(rows), ""]


def _facts(records: Iterable[Record]) -> list[str]:
    last = {(record["task"], record["fact"]): record["value"] for record in records if record["kind"] == "fact"}
    rows = [["task", "fact", "value"]] + [[task, name, str(value)] for (task, name), value in last.items()]
    return ["## Facts", "", *_table(rows), ""] if last else []


def plot(out: Path, records: Sequence[Record]) -> str:
    """Write a PNG for each operation, of ours and the best peer; returns the error if that failed, otherwise empty."""
    works = _works(records)
    try:
        for op, name in PLOTS.items():
            chosen: list[Record] = []
            for work, found in works.items():
                ours = [record for record in found.values() if record["ours"] and "share" in record]
                best = _best(found)
                if work[0] == op and ours:
                    chosen += ours + ([found[best]] if best else [])
            if chosen:
                report.plot(out / name, chosen)
    except Exception as error:  # the report matters more
        return f"no plots: {type(error).__name__}: {error}"
    return ""


def check_out(out: Path, resumed: Path | None) -> None:
    """Raise BadInput for a folder that cannot take the results, or that has other files."""
    ours = {RESULTS, REPORT, LOG, REPORT + ".partial", *PLOTS.values()}
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: a file; expected a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted({path.name for path in out.iterdir()} - ours)
        if others:
            raise BadInput(f"--out {out}: has other files; expected a new or empty folder; found {others[0]}")
        file = out / RESULTS
        earlier = file.exists() and file.stat().st_size > 0
        if earlier and not (resumed and file.samefile(resumed)):
            raise BadInput(f"--out {out}: has results of an earlier call; continue it with --resume {out}")
        probe = out / (REPORT + ".partial")
        probe.touch()
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()
    except OSError as error:
        raise BadInput(f"--out {out}: {error.strerror}") from None
