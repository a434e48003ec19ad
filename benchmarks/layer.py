"""Times one MoE layer and its operations, compared with peers, for any shape,
routing and device.

Operations:
  route    softmax, top-k and normalised weights, from float32 logits
  gemm     up-projection of rows in expert order; gemm_dx, gemm_dw: the
           products of its backward pass
  forward  expert MLP from x, ids and weights to y, including all work that
           depends on the ids; no gradients
  train    forward, and the gradients of x, gate_up, down and the routing
           weights
  decode   forward of 1, 4, 16 and 64 tokens (--small: 1 and 4)

Inputs are normally distributed random numbers. The candidates (moesmith and the
peers) take turns in one process, and times are medians. On a GPU they are
measured by events with a cold cache, eagerly and, if a CUDA graph can be
captured, as its replay. Only correct results are timed
(benchmarks/correctness.py). The limit of each result (benchmarks/roofline.py)
is based on the rates of a large matrix product and a large copy, measured in
the same run.

A shape T,d,n,E,K is T tokens, model width d, expert width n, and E experts, K
of them per token.

Without a GPU, or with --small, named shapes keep their experts and shrink in d,
n and T; a shape given as numbers does not shrink. A run with --small or a
shrunk shape is a smoke test: it shows that everything runs and is correct, and
prints no times. Its JSON lines have times and "small": true.

"disturbed: other processes used X of N cores" at the end of a run describes
the most disturbed measurement; JSON lines have "other_cores" and "disturbed".

Exit status: 0; 1 if moesmith is wrong, fails, runs out of memory, or is slower
than --compare allows; 2 for bad input; 3 if a candidate left the device
unusable (by an illegal access, for example), so that this process can measure
nothing more; 130 after Ctrl-C.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda, report
from benchmarks.harness import (
    RESULTS,
    BadInput,
    OtherProcesses,
    Timer,
    append,
    commit,
    copy_rate,
    cpu_name,
    disturbance,
    interleave,
    matmul_rate,
    once,
    one_line,
    out_of_memory,
    say,
    summary,
)
from benchmarks.jobs import DTYPES, OPS, Entry, Job, able, prepare
from benchmarks.peers import DESCRIPTIONS, OURS, PEERS, Peer, load_peer
from benchmarks.roofline import Ceilings
from benchmarks.routings import NAMES, assign, tokens_in
from benchmarks.shapes import LARGEST, SHAPES, Shape, parse_shape, shrink

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "scattermoe",
    "sonic-moe",
    "moe-ops",
    "triton_kernels",
    "vllm",
)
ROUNDS = range(5, 201)  # limits for the number of timings of a candidate


@dataclass(frozen=True)
class Run:
    """Settings common to all cases of a run. `about` is in every record."""

    device: str
    seconds: float
    seed: int
    timer: Timer
    peers: tuple[Peer, ...]
    ceilings: dict[str, Ceilings]
    about: dict[str, Any]


@dataclass
class Candidate:
    """A peer on one case. `fault` is why it has no time, `no_graph` why its graph has none."""

    peer: Peer
    call: Callable[[], Any] = lambda: None
    status: str = "right"
    fault: str = ""
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    peak_bytes: int | None = None
    replay: Callable[[], Any] | None = None
    no_graph: str = ""
    note: str = ""

    def failed(self, status: str, fault: str) -> None:
        self.status, self.fault = status, fault


class Lost(Exception):
    """This process can no longer use the device or the inputs on it. The message names the cause.

    `records` are those of the interrupted case, one for each candidate, as far as they are known.
    """

    records: list[dict[str, Any]]


def measure(entry: Entry, run: Run) -> list[dict[str, Any]]:
    """A record for each candidate, with times if it is right. Raises Lost."""
    job = prepare(entry, run.device, run.seed)
    candidates = [Candidate(peer) for peer in run.peers if able(peer, entry.op)]
    times: dict[str, dict[str, Any]] = {}
    try:
        with torch.set_grad_enabled(entry.op == "train"):
            pool = torch.cuda.graph_pool_handle() if run.device == "cuda" else None
            for candidate in candidates:
                _try(candidate, job, pool)
            times = _time([c for c in candidates if not c.fault], job, run)
            _judge_again([c for c in candidates if not c.fault], job)
    except Lost as lost:
        for c in candidates:
            if not c.fault:
                c.failed("not measured", str(lost))
        lost.records = _records(entry, run, job, candidates, times)
        raise
    return _records(entry, run, job, candidates, times)


def _records(
    entry: Entry, run: Run, job: Job, candidates: list[Candidate], times: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    limit = job.work.seconds(run.ceilings[entry.dtype])
    about = {
        **run.about,
        **entry.record,
        "activated_experts": job.active,
        "seed": run.seed,
        "matmul_flops": run.ceilings[entry.dtype].matmul,
        "copy_bytes": run.ceilings[entry.dtype].copy,
        "flops": job.work.flops,
        "bytes": job.work.bytes,
        "limit_s": limit,
    }
    records = []
    for c in candidates:
        record = {**about, "candidate": c.peer.name, "ours": c.peer.ours, "status": c.status}
        record |= {"reason": c.fault or None, "errors": c.errors, "peak_bytes": c.peak_bytes}
        record["note"] = c.note or None
        if c.peer.name in times and not c.fault:
            record |= times[c.peer.name]
            best = min(record[mode]["median_s"] for mode in ("eager", "graph") if record[mode])
            record |= {"tflops": job.work.flops / best / 1e12, "gbytes": job.work.bytes / best / 1e9}
            record |= {"share": limit / best, "no_graph": c.no_graph or None}
        records.append(record)
    return records


@contextlib.contextmanager
def _guarded(candidate: Candidate, job: Job, changed: Callable[[], list[str]], when: str = "") -> Iterator[None]:
    """Record any failure of a peer, and protect the other candidates from it.

    Raises Lost if the inputs cannot be read afterwards: a kernel's error stays with the process.
    """
    failed = False
    try:
        yield
    except (Exception, SystemExit) as error:
        failed = True
        candidate.failed("failed", f"{when}{type(error).__name__}: {one_line(error)}")
    try:
        if failed and job.inputs.device == "cuda":
            torch.cuda.empty_cache()  # after a lack of memory, free some for the next candidate
            torch.cuda.synchronize()
        names = changed()
        if names:
            candidate.failed("wrong", f"{when}it changes its inputs: {', '.join(names)}")
            job.inputs.restore()
    except Exception as error:
        if not candidate.fault:
            candidate.failed("failed", f"{when}{type(error).__name__}: {one_line(error)}")
        raise Lost(f"{candidate.peer.name} left the device unusable: {candidate.fault}") from error


def _try(candidate: Candidate, job: Job, pool: Any) -> None:
    """Build, run and judge one candidate; on a GPU, which has a memory pool for graphs, capture it as well."""
    with _guarded(candidate, job, job.inputs.changed):
        candidate.call = job.build(candidate.peer)
        candidate.note = candidate.peer.note() if candidate.peer.note else ""
        if pool is not None:
            cuda.poison(int(job.work.bytes))
        result = candidate.call()
        _judge(candidate, result, job)
        del result
        if not candidate.fault and pool is not None:
            candidate.peak_bytes = cuda.peak_bytes(candidate.call)
            _capture(candidate, job, pool)


def _judge(candidate: Candidate, result: Any, job: Job) -> None:
    if not candidate.peer.same_work:
        candidate.status = "not the same work"
        return
    verdicts = job.judge(result)
    # JSON has no infinity.
    largest = sys.float_info.max
    candidate.errors = {
        name: {
            "whole": min(v.error, largest),
            "row": min(v.row_error, largest),
            "limit": v.limit,
            "row_limit": v.row_limit,
            "scale": min(v.scale_error, largest),
            "scale_limit": min(v.scale_limit, largest),
        }
        for name, v in verdicts.items()
    }
    faults = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.right]
    if faults:
        candidate.failed("wrong", "; ".join(faults))


def _capture(candidate: Candidate, job: Job, pool: Any) -> None:
    """Capture a graph and judge the result of its replay, which lacks anything that the call did on the host."""
    try:
        captured = cuda.capture(candidate.call, pool)
    except cuda.NotCapturable as error:
        candidate.no_graph = one_line(error)
        return
    _judge(candidate, captured.result, job)
    if candidate.fault:
        candidate.fault = f"as a CUDA graph: {candidate.fault}"
    candidate.replay = captured.replay


def _time(candidates: list[Candidate], job: Job, run: Run) -> dict[str, dict[str, Any]]:
    """Eager and graph times of each candidate, all taking turns, for `seconds` each on average."""
    calls: dict[str, Callable[[], Any]] = {}
    of: dict[Callable[[], Any], Candidate] = {}
    for c in candidates:
        for mode, call in (("eager", c.call), ("graph", c.replay)):
            if call is not None:
                calls[f"{mode} {c.peer.name}"], of[call] = call, c
    if not calls:
        return {}

    def timer(call: Callable[[], Any]) -> float:
        """Infinite if the candidate fails, now or earlier."""
        took = math.inf
        if not of[call].fault:
            with _guarded(of[call], job, job.inputs.touched, "during timing: "):
                took = run.timer(call)
        return took

    one_round = sum(took for took in map(timer, calls.values()) if took < math.inf)
    rounds = math.ceil(run.seconds * len(calls) / one_round) if one_round else 0
    seconds = interleave(calls, max(ROUNDS.start, min(rounds, ROUNDS[-1])), timer)
    times = {key: summary(found) for key, found in seconds.items()}
    return {c.peer.name: {mode: times.get(f"{mode} {c.peer.name}") for mode in ("eager", "graph")} for c in candidates}


def _judge_again(candidates: list[Candidate], job: Job) -> None:
    """Judge with new values in the same inputs, for which no remembered result is right.

    If a candidate changed the inputs during timing, unseen by torch, and none does so now, every peer may have done it.
    """
    for c in candidates:
        c.replay = None  # the graphs' memory is needed for float64
    try:
        if job.inputs.device == "cuda":
            torch.cuda.empty_cache()
        spoiled = job.inputs.changed()
        if spoiled:
            job.inputs.restore()
        job.renew()
    except Exception as error:
        unjudged = f"later results could not be judged: {type(error).__name__}: {one_line(error)}"
        if not out_of_memory(error):
            raise Lost(unjudged) from error
        for c in candidates:
            c.failed("not measured", unjudged)
        return
    for c in candidates:
        with _guarded(c, job, job.inputs.changed, "on a later call: "):
            _judge(c, c.call(), job)
            if c.fault:
                c.fault = f"with other values of its inputs: {c.fault}"
    if spoiled and not any(c.fault for c in candidates):
        for c in candidates:
            if not c.peer.ours:
                c.failed("failed", f"a candidate changed the inputs during timing: {', '.join(spoiled)}")


def entries(args: argparse.Namespace, shapes: list[Shape]) -> Iterator[Entry]:
    for shape in shapes:
        for op in args.op:
            routings, dtypes = (["-"], ["fp32"]) if op == "route" else (args.routing, args.dtype)
            for routing in routings:
                for tokens in _tokens(args, shape, op, routing):
                    for dtype in dtypes:
                        yield Entry(op, shape, tokens, routing, dtype)


def _tokens(args: argparse.Namespace, shape: Shape, op: str, routing: str) -> tuple[int, ...]:
    if args.tokens:
        return tuple(args.tokens)
    own = shape.decode_tokens if op == "decode" else shape.tokens
    if routing in NAMES or routing == "-":
        return own
    routed = tokens_in(routing)
    return tuple(tokens for tokens in own if tokens <= routed) if op == "decode" else (routed,)


def profile(entry: Entry, run: Run) -> list[report.Kernel]:
    """Time of each kernel of ours on a GPU, of each operator on a CPU."""
    job = prepare(entry, run.device, run.seed)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    repeats = 5
    with torch.set_grad_enabled(entry.op == "train"):
        call = job.build(OURS)
        call()
        with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
            for _ in range(repeats):
                call()
            if run.device == "cuda":
                torch.cuda.synchronize()
    kernels = []
    for event in recorded.key_averages():
        on_device = event.device_type.name == "CUDA"
        if on_device == (run.device == "cuda"):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            kernels.append(report.Kernel(event.key, event.count / repeats, microseconds / repeats / 1e6))
    return kernels


def about(device: str, small: bool) -> dict[str, Any]:
    """Origin of a result, common to all records of a run; `small` marks a smoke test."""
    name, driver = cpu_name(), None
    if device == "cuda":
        name, driver = torch.cuda.get_device_properties(torch.cuda.current_device()).name, cuda.driver()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "run": uuid.uuid4().hex[:12],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "device": name,
        "driver": driver,
        "versions": versions,
        "load": round(os.getloadavg()[0], 2),
        "small": small,
    }


def ceilings(dtypes: set[str], device: str, timer: Timer, small: bool) -> dict[str, Ceilings]:
    size, bytes_ = (16384, 2**32) if device == "cuda" else (512, 2**24) if small else (2048, 2**28)
    copy = copy_rate(bytes_, device, timer)
    return {name: Ceilings(matmul_rate(DTYPES[name], size, device, timer), copy) for name in sorted(dtypes)}


DTYPE_HELP = f"Some of {' '.join(DTYPES)}; default: bf16 on a GPU, fp32 on a CPU; route is always fp32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--list", action="store_true", help="List shapes, operations and peers, and which peers are available")
    add("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"Some of {' '.join(OPS)}; default: all")
    add("--shape", nargs="+", metavar="SHAPE", help="Names shown by --list, or T,d,n,E,K; default: all names")
    add("--tokens", nargs="+", type=_positive, metavar="T", help="Numbers of tokens; default: those of the shapes")
    add(
        "--routing",
        nargs="+",
        default=["uniform"],
        metavar="ROUTING",
        help=f"{', '.join(NAMES)} or FILE.npz[:LAYER], see benchmarks/routings.py; default: uniform",
    )
    add("--dtype", nargs="+", choices=list(DTYPES), metavar="DTYPE", help=DTYPE_HELP)
    add("--peers", nargs="*", metavar="NAME", help="Peers to time; without a name, none; default: all available")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="Your own peer, a function of LayerInputs that returns y; repeatable",
    )
    add("--device", choices=("cpu", "cuda"), help="Device; default: cuda if there is one, otherwise cpu")
    add("--small", action="store_true", help="Smoke test with shrunk shapes; always on for named shapes on a CPU")
    add(
        "--seconds",
        type=_not_negative,
        metavar="S",
        help="Seconds per candidate and case; default: 0.5; with --small: 0.01",
    )
    add("--seed", type=_seed, default=0, metavar="N", help="Random seed of all inputs; default: 0")
    add(
        "--json",
        nargs="?",
        type=Path,
        const=RESULTS / "layer.jsonl",
        metavar="FILE",
        help="Append a JSON line per measurement; default: benchmarks/results/layer.jsonl",
    )
    add(
        "--compare",
        type=Path,
        metavar="OLD.jsonl",
        help="Exit with status 1 if moesmith is wrong or slower than in this file",
    )
    add(
        "--tolerance",
        type=_not_negative,
        default=0.1,
        metavar="X",
        help="Relative slowdown that --compare allows; default: 0.1",
    )
    add("--plot", type=Path, metavar="FILE.png", help="Write a bar chart of each result's share of its limit")
    add("--profile", action="store_true", help="Print the time of each of moesmith's kernels")


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to {LARGEST}; found {text[:40]!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^32 - 1; found {text[:40]!r}")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0; found {text[:40]!r}")
    return value


def select(names: list[str] | None) -> list[Peer]:
    """Ours, and the peers with these names, all if None. Raises BadInput."""
    known = {peer.name: peer for peer in PEERS}
    for name in names or ():
        if name not in known:
            raise BadInput(f"--peers {name}: unknown peer; expected one of {', '.join(known)}")
    return [OURS, *(peer for peer in PEERS if names is None or peer.name in names)]


def run(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this torch finds no GPU")
    peers, absent = [], {}
    for peer in select(args.peers):
        reason = peer.absent(device)
        if reason:
            absent[peer.name] = reason
        else:
            peers.append(peer)
    peers += map(load_peer, args.peer)
    if args.list:
        report.print_list(SHAPES.values(), OPS, {p.name: DESCRIPTIONS.get(p.name, "yours") for p in peers}, absent)
        return 0
    shapes = [parse_shape(text) for text in args.shape or SHAPES]
    if args.small or device == "cpu":
        shapes = [shrink(shape) if shape.name in SHAPES else shape for shape in shapes]
    small = args.small or any(shape.shrunk for shape in shapes)
    args.dtype = args.dtype or ["bf16" if device == "cuda" else "fp32"]
    old = report.read(args.compare, small) if args.compare else []
    if args.plot:
        report.check_plot(args.plot)
    if args.json:
        append(args.json, [])
    todo = list(entries(args, shapes))
    for entry in todo:
        if entry.routing not in (*NAMES, "-"):  # reports a file that does not fit before anything is timed
            assign(entry.routing, entry.tokens, entry.shape.experts, entry.shape.top_k, torch.Generator())
    seconds = args.seconds if args.seconds is not None else 0.01 if small else 0.5
    timer = cuda.timer() if device == "cuda" else once
    origin = about(device, small)
    planned = [
        {**entry.record, "device": origin["device"], "candidate": peer.name}
        for entry in todo
        for peer in peers
        if able(peer, entry.op)
    ]
    if args.compare and not {report.key_of(plan) for plan in planned} & {report.key_of(record) for record in old}:
        raise BadInput(
            f"--compare {args.compare}: no case of this run; expected records with the same {', '.join(report.KEY)}"
        )
    found = ceilings({entry.dtype for entry in todo}, device, timer, small)
    this = Run(device, seconds, args.seed, timer, tuple(peers), found, origin)
    records: list[dict[str, Any]] = []
    report.print_run(this.about, found)
    status = done = lacking = 0
    try:
        for number, entry in enumerate(todo, 1):
            say(f"{number} of {len(todo)}: {entry}")
            others = OtherProcesses()
            try:
                if device == "cuda":
                    torch.cuda.empty_cache()
                new = measure(entry, this)
                load = others.record()
                new = [record | load for record in new]
            except Lost as lost:
                records, status = records + lost.records, 3
                report.print_layer(str(entry), lost.records)
                if args.json:
                    append(args.json, lost.records)
                say(f"{lost}; {done} of {len(todo)} measured")
                break
            except torch.AcceleratorError as error:
                status = 3
                say(f"{entry}: the device failed: {one_line(error)}; {done} of {len(todo)} measured")
                break
            except Exception as error:
                if not out_of_memory(error):
                    raise
                say(f"{entry}: not enough memory for the inputs and the float64 reference")
                lacking += 1
                continue
            records, done = records + new, number
            report.print_layer(str(entry), new)
            if args.json:
                append(args.json, new)
            if args.profile and new[0]["status"] == "right":
                try:
                    report.print_profile(profile(entry, this))
                except Exception as error:  # the measurements that follow matter more
                    say(f"{entry}: no profile: {type(error).__name__}: {one_line(error)}")
    except KeyboardInterrupt:
        say(f"interrupted: {done} of {len(todo)} measured")
        status = 130
    report.print_absent(absent)
    if not small and (line := disturbance(records)):
        report.print_line(line)
    if args.plot and records:
        report.plot(args.plot, records)
    if status:
        return status
    bad = any(r["ours"] and r["status"] in ("wrong", "failed") for r in records)
    worse = report.compare(records, old, args.tolerance, planned) if args.compare else False
    return 1 if bad or worse or lacking else 0
