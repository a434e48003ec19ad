"""Measures expert parallelism: packing, bytes and scaling of a dispatch, compared
with PyTorch's operators, the expected bytes, and one process.

Parts:
  pack     Work of one rank out of 8, 16 and 64 for a dispatch, without
           communication: finding destinations, sorting rows, packing routing,
           converting rows to FP8, summing results; and the experts' work on
           received rows. Runs on a CPU or a GPU. Percentages are relative to
           the time that the bytes take at the rate of a large copy, measured
           in the same run.
  bytes    Bytes that a rank sends per token and layer in the forward pass: a
           dispatch over gloo, one process per rank, compared with the bytes
           that `moesmith plan --gpu` expects for balanced routing, and with a
           naive dispatch that sends a copy for each expert. Counts are checked
           against sets of ranks, and against the bytes passed to collectives.
  scaling  A layer forward and backward, one process and one thread per rank,
           with fixed tokens per rank and with a fixed total, taking turns with
           the undivided layer on one thread. Percentages are relative to its
           speed times the number of cores that the ranks can use. Outputs and
           gradients are compared with float64 first. Time in collectives
           includes waiting for other ranks.

If there are more ranks than cores, ranks share cores: the speed does not grow
further, but more bytes are sent.

A shape T,d,n,E,K is T tokens per rank, model width d, expert width n, and E
experts, K of them per token.

Widths are those of the shapes for pack and bytes; an eighth for scaling and, on
a CPU, for the experts of pack; a 64th with --small. A shape given as numbers
does not shrink.

--small is a smoke test: it shows that everything runs and is correct, and
prints no times or ratios. Its JSON lines have times and "small": true.
"disturbed: other processes used X of N cores" describes the most disturbed
measurement; JSON lines of pack and scaling have "other_cores" and "disturbed".

Exit status: 0; 1 if moesmith is wrong or fails; 2 for bad input; 130 after
Ctrl-C.
"""

import argparse
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda, packing, ranks, report
from benchmarks.harness import (
    RESULTS,
    BadInput,
    OtherProcesses,
    append,
    disturbance,
    once,
    one_line,
    out_of_memory,
    say,
)
from benchmarks.layer import about, ceilings
from benchmarks.ranks import CountBytes, Scale
from benchmarks.roofline import Ceilings
from benchmarks.shapes import SHAPES, Shape, parse_shape, shrink
from moe.checkpoint.reading.memory import free_bytes
from moe.ops.library import why_no_kernels

PARTS = ("pack", "bytes", "scaling")
KNOWN = ("deepseek_v3", "deepseek_v2_lite", "qwen3_30b_a3b", "mixtral_8x7b", "olmoe")
KNOWN_SMALL = ("deepseek_v3", "mixtral_8x7b")
MOST_RANKS = 64
SCALED = 8  # divisor of the widths that a CPU computes with
TOKENS = {"cpu": 512, "cuda": 4096}
TOTAL = 4  # the fixed total, in tokens per rank
# A rank's copies of the layer: float32, its gradients and its share; float64 and its gradients.
BYTES_PER_WEIGHT = 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help="Some of pack bytes scaling; default: all",
    )
    add("--ranks", nargs="+", type=int, metavar="N", help="Numbers of processes; default: 1 2 4 8; with --small: 1 2")
    add(
        "--shape",
        nargs="+",
        metavar="SHAPE",
        help="Names of benchmarks/shapes.py, or T,d,n,E,K with T tokens per rank; default: "
        f"{' '.join(KNOWN)}, with --small: {' '.join(KNOWN_SMALL)}",
    )
    add("--device", choices=("cpu", "cuda"), help="Device for pack; default: cuda if there is one, otherwise cpu")
    add("--small", action="store_true", help="Smoke test with shrunk shapes and few rounds")
    add("--seed", type=int, default=0, metavar="N", help="Random seed of routing and weights; default: 0")
    add(
        "--json",
        nargs="?",
        type=Path,
        const=RESULTS / "parallel.jsonl",
        metavar="FILE",
        help="Append a JSON line per measurement; default: benchmarks/results/parallel.jsonl",
    )


@dataclass(frozen=True)
class Asked:
    """The arguments, checked."""

    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    shapes: tuple[Shape, ...]
    device: str
    small: bool
    seed: int
    file: Path | None
    run: str

    def origin(self, part: str, device: str) -> dict[str, Any]:
        """Fields common to all records of a part."""
        return about(device, self.small) | {"run": self.run, "part": part, "seed": self.seed}

    def sized(self, shape: Shape, *, by: int, tokens: int) -> Shape:
        """A registry shape with the sizes that a part uses; other shapes unchanged."""
        if shape.name not in SHAPES:
            return shape
        if self.small:
            return shrink(shape)
        return replace(shrink(shape, by) if by > 1 else shape, tokens=(tokens,))


def check(args: argparse.Namespace) -> Asked:
    """The checked arguments. Raises BadInput."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this torch finds no GPU")
    if device == "cuda" and "pack" in args.part and (why := why_no_kernels(torch.device(device))):
        raise BadInput(f"--device cuda: {why}")  # torch's operators must not be timed in place of the kernels
    numbers = tuple(dict.fromkeys(args.ranks or ((1, 2) if args.small else (1, 2, 4, 8))))
    for number in numbers:
        if not 1 <= number <= MOST_RANKS:
            raise BadInput(f"--ranks {number}: out of range; expected 1 to {MOST_RANKS} processes")
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed {args.seed}: out of range; expected an integer from 0 to 2^32 - 1")
    shapes = tuple(parse_shape(text) for text in args.shape or (KNOWN_SMALL if args.small else KNOWN))
    if args.json:
        append(args.json, [])
    parts = tuple(part for part in PARTS if part in args.part)
    return Asked(parts, numbers, shapes, device, args.small, args.seed, args.json, uuid.uuid4().hex[:12])


def run(args: argparse.Namespace) -> int:
    asked = check(args)
    records: list[dict[str, Any]] = []
    status = 0
    try:
        for part in asked.parts:
            try:
                for new in MEASURE[part](asked):
                    records += new
                    if asked.file:
                        append(asked.file, new)
            except (ranks.RankFailed, torch.AcceleratorError) as error:
                say(f"{part}: {one_line(error)}")
                status = 1
    except KeyboardInterrupt:
        say(f"interrupted: {len(records)} measurements")
        return 130
    if not asked.small and (line := disturbance(records)):
        report.print_line(line)
    wrong = any(r["status"] in ("wrong", "failed") and r.get("ours", True) for r in records)
    return 1 if wrong else status


def pack(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    dtype, name = (torch.bfloat16, "bf16") if asked.device == "cuda" else (torch.float32, "fp32")
    timer = cuda.timer() if asked.device == "cuda" else once
    limit = ceilings({name}, asked.device, timer, asked.small)[name]
    origin = asked.origin("pack", asked.device)
    report.print_run(origin, {name: limit})
    seconds = 0.01 if asked.small else 0.3
    for shape in asked.shapes:
        numbers = [number for number in packing.VIRTUAL_RANKS if shape.experts % number == 0]
        _say_left_out("pack", shape, [n for n in packing.VIRTUAL_RANKS if n not in numbers])
        for number in numbers:
            say(f"pack: {shape.name}, one of {number} ranks")
            try:
                steps = _steps(asked, shape, number, dtype, limit, seconds, timer)
                new = [origin | record for record in steps]
            except Exception as error:
                if not out_of_memory(error):
                    raise
                say(f"pack: {shape.name}, one of {number} ranks: not enough memory")
                continue
            yield new
            sizes = f"T {new[0]['tokens']}, d {new[0]['d']}, E {new[0]['experts']}, K {new[0]['top_k']}"
            report.print_packing(f"pack: {shape.name} ({sizes}), one of {number} ranks, {new[0]['dtype']}", new)


def _steps(
    asked: Asked,
    shape: Shape,
    number: int,
    dtype: torch.dtype,
    limit: Ceilings,
    seconds: float,
    timer: Callable[[Callable[[], Any]], float],
) -> Iterator[dict[str, Any]]:
    copied = asked.sized(shape, by=1, tokens=TOKENS[asked.device])
    computed = copied if asked.device == "cuda" else asked.sized(shape, by=SCALED, tokens=TOKENS["cpu"])
    for sizes, steps in ((copied, packing.COPYING), (computed, packing.COMPUTING)):
        entry = packing.Entry(sizes, sizes.tokens[0], number, "uniform", dtype, asked.device, asked.seed)
        with torch.no_grad():
            job = packing.Packing(entry)
            for step in steps:
                made, others = step(job), OtherProcesses()
                new = packing.measure(made, limit, seconds, timer)
                load = others.record()
                yield from (entry.record | record | load for record in new)
        if asked.device == "cuda":
            del job
            torch.cuda.empty_cache()


def count_bytes(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    origin = asked.origin("bytes", "cpu")
    report.print_run(origin, {})
    shapes = [asked.sized(shape, by=1, tokens=TOKENS["cpu"]) for shape in asked.shapes]
    for number in asked.ranks:
        if number == 1:
            continue  # nothing leaves
        jobs = [
            CountBytes(shape, routing, payload, asked.seed)
            for shape in _divisible("bytes", shapes, number)
            for routing in ("uniform", "zipf")
            for payload in ("same", "fp8")
        ]
        new = []
        with closing(ranks.over(number, jobs)) as results:
            for job, found in zip(jobs, results, strict=True):
                say(f"bytes: {number} ranks, {job.shape.name}, {job.routing}, {job.payload}")
                new.append(origin | ranks.byte_record(job, found))
                yield new[-1:]
        if new:
            title = f"bytes that leave a rank per token and layer, forward: {number} ranks over gloo"
            report.print_bytes(title, new)
            if not asked.small:
                report.print_line(
                    "expected: with balanced routing; naive: a copy for each expert; saves: naive over bytes"
                )


def scale(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    cores = len(os.sched_getaffinity(0))
    origin = asked.origin("scaling", "cpu")
    report.print_run(origin, {})
    shapes = [asked.sized(shape, by=SCALED, tokens=TOKENS["cpu"]) for shape in asked.shapes]
    rounds = 2 if asked.small else 9
    of: dict[str, list[dict[str, Any]]] = {shape.name: [] for shape in shapes}
    for number in asked.ranks:
        jobs = []
        for shape in _divisible("scaling", shapes, number):
            need = number * BYTES_PER_WEIGHT * 3 * shape.d * shape.n * shape.experts
            if need > free_bytes(torch.device("cpu"))[0]:
                say(f"scaling: {shape.name} on {number} ranks: not enough memory for {need / 2**30:.1f} GiB")
                continue
            total = replace(shape, tokens=(TOTAL * shape.tokens[0],))
            jobs += [Scale(shape, "per rank", rounds, asked.seed), Scale(total, "total", rounds, asked.seed)]
        with closing(ranks.over(number, jobs)) as results:
            for job, found in zip(jobs, results, strict=True):
                say(f"scaling: {number} ranks, {job.shape.name}, fixed tokens {job.fixed}")
                of[job.shape.name].append(origin | ranks.scale_record(job, found, cores))
                yield of[job.shape.name][-1:]
    for shape in shapes:
        if of[shape.name]:
            d, n, experts, top_k = shape.sizes
            sizes = f"d {d}, n {n}, E {experts}, K {top_k}"
            title = f"scaling over gloo, forward and backward: {shape.name} ({sizes}), float32; {cores} cores"
            report.print_scaling(title, sorted(of[shape.name], key=lambda r: r["fixed"]))
    if max(asked.ranks) > cores:
        report.print_line(
            f"this machine has {cores} cores: more ranks than {cores} share them, so the limit does not grow"
        )


def _divisible(part: str, shapes: list[Shape], number: int) -> list[Shape]:
    for shape in shapes:
        _say_left_out(part, shape, [number] if shape.experts % number else [])
    return [shape for shape in shapes if shape.experts % number == 0]


def _say_left_out(part: str, shape: Shape, numbers: list[int]) -> None:
    for number in numbers:
        say(f"{part}: {shape.name} left out for {number} ranks, which do not divide its {shape.experts} experts")


MEASURE = {"pack": pack, "bytes": count_bytes, "scaling": scale}
