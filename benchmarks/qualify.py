"""Tests and times everything on this machine, in stages with time limits.

Stages, in this order:
  environment  whether the kernels run, and which optional packages and tools
               work
  kernels      the operators' tests on the Triton kernels, in many processes
               (on a CPU: a few of them, in Triton's interpreter)
  cuda         tests/kernels/test_cuda.py: no synchronisation, CUDA
               graphs, bit-identical repeats, more than 2^31 elements
  model        training, loading, generation, transformers, torch.compile, one
               rank of NCCL; each compared with the CPU
  sanitizer    compute-sanitizer on ten small cases: memcheck, racecheck,
               initcheck
  benchmark    forward, training and decode, compared with peers; one process
               per shape
  profile      Nsight Compute on the kernels of a training step: L2 throughput,
               use of the tensor cores

Each task runs in its own process with a time limit. A crash, a lost GPU or a
hung compilation ends that process and is recorded; the other tasks continue.
Warnings are written to the log and fail no task, with one exception: the
warning that torch's operators run instead of the kernels.

--resume skips tasks that passed, failed or were not usable, if the device, the
sources and the packages are the same. To repeat them, use a new folder.

The folder --out receives report.md (rewritten after each stage), results.jsonl
(appended line by line), log.txt, and a PNG for each of forward, train and
decode.

--small, and any run on a CPU, is a smoke test of the benchmark stage: it prints
no times.

Requires torch, triton, numpy, pytest, rich, einops and safetensors. moesmith
need not be installed. A task that requires more is "not usable" if that is
missing.

Exit status: 0 if nothing failed, even if tasks are left or not usable; 1 if a
task failed; 2 for bad input; 130 after Ctrl-C or SIGTERM. The report is written
in every case except bad input.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib.util
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.harness import ROOT, BadInput, say
from benchmarks.qualify_results import (
    DONE,
    LOG,
    REPORT,
    RESULTS,
    Record,
    Verdict,
    append,
    check_out,
    judge,
    of_this,
    plot,
    read,
    source,
    tasks,
    write_report,
)
from benchmarks.qualify_steps import NO_KERNELS, NOT_USABLE, OPERATORS
from benchmarks.report import print_line, print_table
from benchmarks.shapes import SHAPES, SONIC
from benchmarks.supervise import Ended, Program

PARTS = 16  # parts of the kernels' tests, on every machine, so that another machine can continue
RESTARTS = 8  # most restarts of a part whose processes crash
QUIET = 180.0  # most seconds for one test, including compilation
LAST_SECONDS = 30.0  # reserved within --minutes for starting, plots and the report
MODELS = ("qwen3_30b_a3b", "deepseek_v3", "olmoe", "deepseek_v2_lite", "mixtral_8x7b")
SMALL_SHAPES = ("olmoe", "sonic_768_256_128")
KERNELS = ("up_kernel", "rows_kernel", "products_kernel", "hidden_backward_kernel")
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
METRICS = re.compile("gpu__time_duration|lts__throughput|lts__t_sectors?_hit|dram__throughput|sm__throughput|tensor")


@dataclasses.dataclass(frozen=True)
class Task:
    """A program, its limit in seconds, and the meaning of its output.

    Attributes:
        tests: the program is pytest with tests.support.recorded; after a crash another process runs the other tests.
        probe: a failure means that a tool is not usable.
        says: pattern that must be in the output; its match is recorded as the reason.
        kernel: name of the kernel whose Nsight Compute table is in the output.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tests: bool = False
    probe: bool = False
    says: str = ""
    kernel: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Tasks with a common limit in seconds, at most `beside` at a time, after the probe of `tool` has passed."""

    name: str
    limit: float
    tasks: Callable[[str, bool], list[Task]]
    beside: int = 1
    gpu: bool = False
    tool: str = ""


def step(name: str, *words: str, device: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.qualify_steps", name, *words, "--device", device, "--lines", "{lines}")


def environment(device: str, small: bool) -> list[Task]:
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    found = [Task("kernel", step("kernel", device=device), 150, interpreted)]
    found.append(Task("packages", step("packages", device=device), 90))
    if device == "cuda":
        sanitizer, ncu = _sanitizer("memcheck", "probe"), _ncu("--launch-count", "1", "--section", SECTIONS[0])
        found.append(Task("compute-sanitizer", sanitizer, 30, probe=True, says=SUMMARY))
        watched = (*ncu, *step("probe", device=device))
        found.append(Task("ncu", watched, 30, probe=True, says="gpu__time_duration"))
    return found


def kernels(device: str, small: bool) -> list[Task]:
    files = ("tests/ops/test_ops.py", "tests/ops/test_routing.py")
    # Without tests of the tests ("the bounds see"), and without tests of packages that need not be installed.
    chosen = "not see" + ("" if importlib.util.find_spec("transformers") else " and not beside_transformers")
    if device == "cpu":
        # One small case of each kind, forward and backward.
        case = "(test_moe_mlp and two_tokens) or (test_permute and one_slot) or (test_route and one_expert)"
        command = _pytest("-p", "tests.support.kernels", "-k", f"float32 and ({case}) and {chosen}", *files)
        return [Task("tests", command, 300, {"TRITON_INTERPRET": "1"}, tests=True)]
    few = ["-k", f"{chosen} and (ragged or one_token or deepseek_v3)"] if small else ["-k", chosen]
    parts = 2 if small else PARTS
    commands = [_pytest("-p", "tests.support.kernels", "--part", f"{i}/{parts}", *few, *files) for i in range(parts)]
    return [Task(f"part {i + 1}", command, 600, tests=True) for i, command in enumerate(commands)]


def cuda(device: str, small: bool) -> list[Task]:
    parts = 4
    return [
        Task(f"part {i + 1}", _pytest("--part", f"{i}/{parts}", "tests/kernels/test_cuda.py"), 420, tests=True)
        for i in range(parts)
    ]


def _pytest(*options: str) -> tuple[str, ...]:
    # Warnings of other releases of torch or Triton are logged; ours must fail the test.
    warnings = ("-W", "default", "-W", f"error:{NO_KERNELS}")
    recorded = ("-p", "tests.support.recorded", "--record", "{lines}", "--without", "{without}")
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *recorded, *warnings, *options)


def model(device: str, small: bool) -> list[Task]:
    names = ("load", "generate", "train", "transformers", "compiled", "one_rank")
    limit = 240 if device == "cuda" else 600  # a busy CPU compiles for minutes
    return [Task(name, step(name, device=device), limit) for name in names]


SUMMARY = r"(?:ERROR|RACECHECK) SUMMARY: .*"
TOOLS = ("memcheck", "racecheck", "initcheck")


def _sanitizer(tool: str, *words: str) -> tuple[str, ...]:
    quiet = ("--report-api-errors", "no") if tool == "memcheck" else ()
    options = ("--tool", tool, *quiet, "--target-processes", "application-only", "--error-exitcode", "86")
    return (_found("compute-sanitizer"), *options, *step(*words, device="cuda"))


def sanitizer(device: str, small: bool) -> list[Task]:
    # Every tensor is an allocation of its own, so that reads beyond its end are found.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    cases = OPERATORS[:2] if small else OPERATORS
    return [
        Task(f"{tool} {case}", _sanitizer(tool, "operator", *case.split()), 240, env, says=SUMMARY)
        for tool in TOOLS
        for case in cases
    ]


def benchmark(device: str, small: bool) -> list[Task]:
    # Different kinds first, in case there is no time for all.
    names = SMALL_SHAPES if small else (*MODELS[:3], *(shape.name for shape in SONIC), *MODELS[3:])
    assert set(names) <= set(SHAPES)
    words = ["small"] if small else []
    return [Task(name, step("benchmark", name, *words, device=device), 300) for name in names]


def _ncu(*options: str) -> tuple[str, ...]:
    watched = ("--target-processes", "application-only")  # without the compilers that it starts
    return (_found("ncu"), *watched, "--clock-control", "none", "--page", "raw", "--csv", *options)


def _found(tool: str) -> str:
    """Path of a CUDA tool, which is often not on PATH."""
    return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin") or tool


def profile(device: str, small: bool) -> list[Task]:
    sections = [word for name in SECTIONS for word in ("--section", name)]
    shape = ("olmoe", "4096")
    # First without the profiler, which would slow the compiler down.
    compiled = Task("compiled", step("profile", *shape, device=device), 180)
    return [compiled] + [
        Task(
            f"{kernel} {' '.join(shape)}",
            (
                *_ncu("--kernel-name", kernel, "--launch-count", "2", *sections),
                *step("profile", *shape, device=device),
            ),
            180,
            kernel=kernel,
        )
        for kernel in KERNELS
    ]


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
STAGES = (
    Stage("environment", 300, environment, beside=2),
    Stage("kernels", 600, kernels, beside=min(PARTS, CORES)),
    Stage("cuda", 420, cuda, beside=4, gpu=True),
    Stage("model", 900, model, beside=2),
    Stage("sanitizer", 420, sanitizer, beside=min(8, CORES), gpu=True, tool="compute-sanitizer"),
    Stage("benchmark", 1500, benchmark),
    Stage("profile", 420, profile, gpu=True, tool="ncu"),
)


@dataclasses.dataclass
class Call:
    """One call of the command: its options, its files, and the records so far."""

    device: str
    small: bool
    out: Path
    temporary: Path
    minutes: float | None
    deadline: float
    stages: Sequence[Stage]
    about: Record
    results: TextIO
    log: TextIO
    records: list[Record]
    notes: list[str] = dataclasses.field(default_factory=list)

    def write(self, stage: str, task: str, kind: str, record: Mapping[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        whole = {**record, **self.about, "kind": kind, "stage": stage, "task": task, "time": now}
        append(self.results, whole)
        self.records.append(whole)

    def note(self, text: str) -> None:
        print(text, file=self.log, flush=True)

    def planned(self, stage: Stage) -> list[Task]:
        return [] if stage.gpu and self.device == "cpu" else stage.tasks(self.device, self.small)

    def done(self, task: Task, found: Mapping[str, Record]) -> bool:
        """Whether a task is not run again. A tool that was not usable is probed once in each call."""
        record = found.get(task.name, {})
        again = task.probe and record.get("status") == "not usable" and record["run"] != self.about["run"]
        return record.get("status") in DONE and not again

    def unable(self, stage: Stage) -> str:
        """Verdict and reason if a stage cannot run here; otherwise empty."""
        if stage.gpu and self.device == "cpu":
            return "not run: needs a GPU"
        tool = tasks(of_this(self.records, self.about), "environment").get(stage.tool) if stage.tool else None
        return f"not usable: {tool['reason']}" if tool and tool["status"] == "not usable" else ""

    def verdicts(self) -> list[Verdict]:
        mine = of_this(self.records, self.about)
        return [judge(s.name, [t.name for t in self.planned(s)], mine, self.unable(s)) for s in self.stages]

    def report(self) -> list[Verdict]:
        """Write report.md."""
        verdicts = self.verdicts()
        words = ["python", "-m", "benchmarks", "qualify", "--resume", str(self.out)]
        words += ["--device", self.device] + ["--small"] * (self.small and self.device != "cpu")
        words += ["--minutes", f"{self.minutes:g}"] if self.minutes else []
        words += ["--stage", *(v.stage for v in verdicts if v.left)]
        mine = of_this(self.records, self.about)
        write_report(self.out, verdicts, mine, self.about, shlex.join(words), self.notes)
        return verdicts


def run_stage(call: Call, stage: Stage) -> None:
    """Run the remaining tasks of a stage. However it ends, its programs are gone and its end is recorded."""
    begun = time.monotonic()
    until = min(call.deadline, begun + stage.limit)
    found = tasks(of_this(call.records, call.about), stage.name)
    waiting = deque(Running(call, stage, task) for task in call.planned(stage) if not call.done(task, found))
    running: list[Running] = []
    why = "interrupted"
    try:
        while waiting or running:
            if time.monotonic() >= until:
                why = "--minutes reached" if until == call.deadline else f"the stage's {stage.limit:g} s reached"
                return
            while waiting and len(running) < stage.beside:
                running.append(waiting.popleft())
                running[-1].start(min(stage.beside, len(waiting) + len(running)))
            time.sleep(0.05)
            running = [each for each in running if not each.ended()]
        why = ""
    finally:
        for each in running:  # all at once: a process that holds a GPU takes seconds to end
            each.program.send_kill()
        for each in running:
            each.stop()
        record = {"why": why, "seconds": round(time.monotonic() - begun, 1)}
        call.write(stage.name, "", "stage", record)


class Running:
    """A running task: one program, or for tests one after another until no test is left."""

    def __init__(self, call: Call, stage: Stage, task: Task) -> None:
        self.call, self.stage, self.task = call, stage, task
        self.seconds, self.starts = 0.0, 0
        self.tests: dict[str, int] = {}
        self.begun: list[str] = []  # ids of all started tests
        self.total = 0  # number of tests of the task
        self.expected = self.answered = 0  # tests of this program, and how many have an outcome
        self.said = self.lost = ""

    def start(self, beside: int) -> None:
        self.beside = beside
        self.starts += 1
        self.expected, self.answered, self.lost = 0, 0, ""
        slug = re.sub(r"\W+", "-", f"{self.stage.name}-{self.task.name}")
        lines, without = (self.call.temporary / f"{slug}-{self.starts}.{end}" for end in ("jsonl", "txt"))
        without.write_text("".join(f"{name}\n" for name in self.begun))
        places = {"{lines}": str(lines), "{without}": str(without)}
        command = [places.get(word, word) for word in self.task.command]
        quiet = QUIET if self.task.tests else None
        env = {**environment_of(beside), **self.task.env}
        self.program = Program(command, lines=lines, env=env, limit=self.task.limit, quiet=quiet)

    def ended(self) -> bool:
        """Read new results, and return whether the task has ended and is recorded."""
        records, end = self.program.poll()
        self._take(records)
        return end is not None and self._finish(end)

    def stop(self) -> None:
        records, end = self.program.kill("stopped")
        self._take(records)
        if end is not None:
            self._log(end, "stopped")
            self._record("stopped", "", end.seconds)

    def _take(self, records: Sequence[Record]) -> None:
        for record in records:
            if "begin" in record:
                self.begun.append(record["begin"])
            elif "tests" in record:
                self.expected = record["tests"]
                self.total = self.total or self.expected
            elif "test" in record:
                self.answered += 1
                self._outcome(record)
            elif "lost" in record:
                self.lost = f"the GPU was lost after it: {record['lost']}"
            elif "warning" in record:
                self.call.note(f"\n== warning in {record['where']}: {record['warning']}")
            elif "failed" in record or "unusable" in record:
                self.said = record.get("failed") or record["unusable"]
            else:
                kinds = {"fact": "fact", "check": "check", "candidate": "layer"}
                kind = next((kind for key, kind in kinds.items() if key in record), "other")
                self.call.write(self.stage.name, self.task.name, kind, record)

    def _outcome(self, record: Record) -> None:
        outcome = record["outcome"]
        self.tests[outcome] = self.tests.get(outcome, 0) + 1
        if outcome != "passed":
            self.call.note(f"\n== {outcome}: {record['test']}\n{record.pop('detail', record['reason'])}")
            self.call.write(self.stage.name, self.task.name, "test", record)

    def _finish(self, end: Ended) -> bool:
        self._log(end, end.reason or "ended")
        self.seconds += end.seconds
        if self.task.tests:
            return self._finish_tests(end)
        said = re.findall(self.task.says, end.output) if self.task.says else []
        status, reason = "passed", said[-1] if said else ""
        if end.code == NOT_USABLE and not end.why:
            status, reason = "not usable", self.said
        elif end.reason:
            status, reason = "failed", self.said or end.reason + (f"; {reason}" if said else _last_line(end.output))
        elif self.task.says and not said:
            status, reason = "failed", f"{self.task.says!r} is missing in the output{_last_line(end.output)}"
        if self.task.kernel and status == "passed":
            figures = profile_rows(end.output)
            status, reason = ("passed", "") if figures else ("failed", "no measurements in ncu's output")
            for number, metrics in enumerate(figures, 1):
                record = {"kernel": self.task.kernel, "launch": number, "metrics": metrics}
                self.call.write(self.stage.name, self.task.name, "profile", record)
        if self.task.probe and status == "failed":
            status = "not usable"
        self._record(status, reason)
        return True

    def _finish_tests(self, end: Ended) -> bool:
        """A started test without an outcome ended the program; another program runs the tests after it."""
        if self.begun and self.answered < self.expected:
            if self.lost:
                self.call.note(f"\n== {self.lost}")
            elif len(self.begun) > sum(self.tests.values()):
                self._outcome({"test": self.begun[-1], "outcome": "failed", "reason": f"in this test: {end.reason}"})
            if sum(self.tests.values()) < self.total and self.starts <= RESTARTS:
                self.start(self.beside)
                return False
        elif end.why or end.fault or end.code not in (0, 1):
            self._record("failed", f"{end.reason}{_last_line(end.output)}")
            return True
        tests, failed = sum(self.tests.values()), self.tests.get("failed", 0)
        reasons = [f"{failed} of {tests} tests failed"] if failed else []
        if not failed and not self.tests.get("passed"):
            reasons.append(f"none of {tests} tests passed")
        if tests < self.total:
            reasons.append(f"{self.total - tests} were not run after {self.starts} crashes")
        self._record("failed" if reasons else "passed", "; ".join(reasons))
        return True

    def _record(self, status: str, reason: str, seconds: float | None = None) -> None:
        record: Record = {"status": status, "reason": reason, "seconds": round(seconds or self.seconds, 2)}
        if self.task.tests:
            record |= {"tests": self.tests, "starts": self.starts}
        self.call.write(self.stage.name, self.task.name, "task", record)
        counts = "".join(f", {number} {outcome}" for outcome, number in self.tests.items())
        why = f": {reason}" if reason else ""
        say(f"{self.stage.name}, {self.task.name}: {status}{counts}, {record['seconds']} s{why}")

    def _log(self, end: Ended, how: str) -> None:
        title = f"{self.stage.name}, {self.task.name}: {how}, {end.seconds:.1f} s"
        self.call.note(f"\n==== {title}\n{shlex.join(self.task.command)}\n{end.output}")


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""


def profile_rows(output: str) -> list[dict[str, str]]:
    """Measurements of each launch from Nsight Compute's raw page in CSV: names, units, then launches."""
    found: list[dict[str, str]] = []
    lines = [line for line in output.splitlines() if line.startswith('"')]
    names: list[str] = []
    units: list[str] = []
    for row in csv.reader(lines):
        if row[0] == "ID":
            names, units = row, []
        elif names and not row[0]:
            units = row
        elif names and len(row) == len(names):
            cells = zip(names, units or [""] * len(names), row, strict=True)
            chosen = {
                f"{name} [{unit}]" if unit else name: value for name, unit, value in cells if METRICS.search(name)
            }
            found.append(chosen)
    return [row for row in found if row]


def environment_of(beside: int) -> dict[str, str]:
    """Environment of one of `beside` child processes: import path, share of the cores, fault handler."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # installed plugins must not matter
        "OMP_NUM_THREADS": str(max(1, CORES // beside)),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
    }


def describe(device: str, small: bool, temporary: Path) -> tuple[Record, list[Record], str]:
    """Run the step `machine`: fields common to all records, facts, and the error if it failed."""
    lines = temporary / "machine.jsonl"
    command = [word.replace("{lines}", str(lines)) for word in step("machine", device=device)]
    program = Program(command, lines=lines, env=environment_of(1), limit=180)
    records: list[Record] = []
    try:
        while True:
            new, end = program.poll()
            records += new
            if end is not None:
                break
            time.sleep(0.05)
    except KeyboardInterrupt:
        program.kill("stopped")
        raise
    about = next((record["about"] for record in records if "about" in record), None)
    fault = "" if about and not end.reason else f"{end.reason}{_last_line(end.output)}"
    about = about or {"run": "", "commit": "unknown", "device": "unknown", "driver": None, "versions": {}, "load": 0.0}
    return about | {"source": source(), "small": small}, [r for r in records if "fact" in r], fault


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [stage.name for stage in STAGES]
    add = parser.add_argument
    add(
        "--stage",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"Stages to run, in the given order; default: {' '.join(names)}",
    )
    add(
        "--minutes",
        type=_minutes,
        metavar="M",
        help="Stop within M minutes (at least 0.5) and list the remaining tasks; default: no limit",
    )
    add("--resume", type=Path, metavar="RESULTS", help="Continue an earlier run: its folder or results.jsonl")
    add("--device", choices=("cpu", "cuda"), help="Device; default: cuda if there is one, otherwise cpu")
    add("--small", action="store_true", help="Smoke test with few cases and shrunk shapes; always on for a CPU")
    add("--out", type=Path, metavar="DIR", help="Output folder; default: that of --resume, otherwise runs/qualify")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.5 <= value <= 10000:
        raise argparse.ArgumentTypeError(f"expected 0.5 to 10000 minutes; found {text!r}")
    return value


def run(args: argparse.Namespace, stages: Sequence[Stage] = STAGES) -> int:
    begun = time.monotonic()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this torch finds no GPU")
    earlier = read(args.resume) if args.resume else []
    resumed = args.resume / RESULTS if args.resume and args.resume.is_dir() else args.resume
    out = args.out or (resumed.parent if resumed else Path("runs") / "qualify")
    check_out(out, resumed)
    deadline = begun + args.minutes * 60 - LAST_SECONDS if args.minutes else math.inf
    small = args.small or device == "cpu"
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a crash with a GPU would write gigabytes
    with (
        tempfile.TemporaryDirectory(prefix="qualify-") as temporary,
        _results(out, earlier, resumed) as results,
        (out / LOG).open("a") as log,
        _terminated_as_interrupted(),
    ):
        about, facts, fault = describe(device, small, Path(temporary))
        call = Call(device, small, out, Path(temporary), args.minutes, deadline, stages, about, results, log, earlier)
        call.write("", "machine", "run", {"argv": sys.argv[1:], "fault": fault})
        for fact in facts:
            call.write("", "machine", "fact", fact)
        if fault:
            call.notes.append(f"the machine could not be described: {fault}")
        status = 0
        by_name = {stage.name: stage for stage in stages}
        try:
            for name in dict.fromkeys(args.stage):
                try:
                    _run(call, by_name[name])
                except Exception:  # a defect of this program must not end the other stages
                    call.note(traceback.format_exc())
                    call.notes.append(f"{name}: this program failed, see {LOG}")
                    status = 1
                call.report()
        except KeyboardInterrupt:
            status = 130
        call.notes += filter(None, [plot(out, of_this(call.records, about))])
        verdicts = call.report()
        print_verdicts(verdicts)
        print_line(f"report: {out / REPORT}")
        failed = any(v.status == "failed" for v in verdicts)
        return status or (1 if failed else 0)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    rows = [(v.stage, v.status, "" if v.seconds is None else f"{v.seconds:.0f}", v.counts) for v in verdicts]
    print_table("verdicts", ("stage", "verdict", "seconds", "counts"), rows, names=2)
    for v in verdicts:
        if v.reason:
            print_line(f"{v.stage}: {v.reason}")


def _run(call: Call, stage: Stage) -> None:
    """Run one stage, after the probe of its tool unless it has passed, or was tried in this call."""
    tool = tasks(of_this(call.records, call.about), "environment").get(stage.tool, {})
    probe = bool(stage.tool) and tool.get("status") != "passed" and tool.get("run") != call.about["run"]
    if call.unable(stage) and not probe:
        return
    probes = next((each for each in call.stages if each.name == "environment"), None)
    if probe and probes:
        only = [task for task in probes.tasks(call.device, call.small) if task.name == stage.tool]
        run_stage(call, dataclasses.replace(probes, tasks=lambda device, small: only))
        if call.unable(stage):
            return
    run_stage(call, stage)


@contextlib.contextmanager
def _results(out: Path, earlier: Sequence[Record], resumed: Path | None) -> Iterator[TextIO]:
    """results.jsonl, open for appending; in a new folder it begins with the resumed records."""
    file = out / RESULTS
    same = resumed is not None and file.exists() and file.samefile(resumed)
    cut = same and not file.read_bytes().endswith(b"\n")
    with file.open("a") as opened:
        if cut:
            opened.write("\n")
        for record in [] if same else earlier:
            append(opened, record)
        yield opened


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which `timeout` sends, end the block as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
