"""Expert parallelism: packing, bytes and scaling of a dispatch, beside torch's operators, theory and one process.

Parts:
  pack     what one rank among 8, 16 and 64 does for a dispatch, without communication: destinations, rows in their
           order, routing as bytes, rows as fp8, results summed; and what it makes of rows that arrive. On a GPU, too.
           Shares are of the time that its bytes take at the rate of a large copy, measured in the same run
  bytes    what leaves a rank for each token and layer, forward: a dispatch over gloo, one process a rank, beside the
           expectation of `moesmith plan --gpu` for balanced routing, and a copy for each expert. Counts are compared
           with sets, and with what collectives were given
  scaling  a layer forward and backward, one process and one thread a rank, with fixed tokens per rank and fixed tokens
           in all, beside the undivided layer on one thread, in turns. Shares are of its speed times the cores that the
           ranks can have; outputs and gradients are compared with float64 first. Time in collectives is also the time
           that a rank waits there for others

On a machine with C cores more ranks than C share cores: nothing is gained beyond, and more is sent.

Widths are the shapes' own for pack and bytes; an eighth for scaling and, on a CPU, for the experts of pack; a 64th with
--small. A shape that is given as numbers stays as it is.

Exit status: 0; 1 if ours is wrong or fails; 2 for bad input; 130 after Ctrl-C.
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
from benchmarks.harness import RESULTS, BadInput, append, once, one_line, out_of_memory, say
from benchmarks.layer import about, ceilings
from benchmarks.ranks import CountBytes, Scale
from benchmarks.roofline import Ceilings
from benchmarks.shapes import SHAPES, Shape, parse_shape, small
from moe.checkpoint.reading.memory import free_bytes
from moe.ops.library import why_no_kernels

PARTS = ("pack", "bytes", "scaling")
KNOWN = ("deepseek_v3", "deepseek_v2_lite", "qwen3_30b_a3b", "mixtral_8x7b", "olmoe")
KNOWN_SMALL = ("deepseek_v3", "mixtral_8x7b")
MOST_RANKS = 64
SCALED = 8  # by how much widths shrink for what a CPU computes
TOKENS = {"cpu": 512, "cuda": 4096}
TOTAL = 4  # the fixed total, in tokens per rank
# Of a rank's copies of the layer: float32, its gradients and its share; float64 and its gradients.
BYTES_A_WEIGHT = 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--ranks", nargs="+", type=int, metavar="N", help="processes; default: 1 2 4 8, small: 1 2")
    shapes = f"default: {' '.join(KNOWN)}, small: {' '.join(KNOWN_SMALL)}"
    add("--shape", nargs="+", metavar="NAME|T,d,n,E,K", help=f"T tokens on each rank; {shapes}")
    add("--device", choices=("cpu", "cuda"), help="for pack; default: cuda if there is one")
    add("--small", action="store_true", help="small shapes and few rounds, to see that it works")
    add("--seed", type=int, default=0, help="of routing and weights")
    add(
        "--json",
        nargs="?",
        type=Path,
        const=RESULTS / "parallel.jsonl",
        help="append a line a measurement to this file",
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
        """What stands in every record of a part."""
        return about(device) | {"run": self.run, "part": part, "seed": self.seed}

    def sized(self, shape: Shape, *, by: int, tokens: int) -> Shape:
        """A shape of the registry as a part takes it; others as they are."""
        if shape.name not in SHAPES:
            return shape
        if self.small:
            return small(shape)
        return replace(small(shape, by) if by > 1 else shape, tokens=(tokens,))


def check(args: argparse.Namespace) -> Asked:
    """Raises BadInput."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this torch finds no GPU")
    if device == "cuda" and "pack" in args.part and (why := why_no_kernels(torch.device(device))):
        raise BadInput(f"--device cuda: {why}")  # torch's operators are not to be timed in the place of kernels
    numbers = tuple(dict.fromkeys(args.ranks or ((1, 2) if args.small else (1, 2, 4, 8))))
    for number in numbers:
        if not 1 <= number <= MOST_RANKS:
            raise BadInput(f"--ranks {number}: expected numbers from 1 to {MOST_RANKS}, each rank being a process")
    if not 0 <= args.seed < 2**32:
        raise BadInput(f"--seed {args.seed}: expected an integer from 0, below 2^32")
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
    wrong = any(r["status"] in ("wrong", "failed") and r.get("ours", True) for r in records)
    return 1 if wrong else status


def pack(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    dtype, name = (torch.bfloat16, "bf16") if asked.device == "cuda" else (torch.float32, "fp32")
    timer = cuda.timer() if asked.device == "cuda" else once
    limit = ceilings({name}, asked.device, timer, asked.small)[name]
    origin = asked.origin("pack", asked.device)
    report.show_run(origin, {name: limit})
    seconds = 0.01 if asked.small else 0.3
    for shape in asked.shapes:
        numbers = [number for number in packing.VIRTUAL_RANKS if shape.experts % number == 0]
        _say_left_out("pack", shape, [n for n in packing.VIRTUAL_RANKS if n not in numbers])
        for number in numbers:
            say(f"pack: {shape.name}, a rank of {number}")
            try:
                new = list(_steps(asked, shape, number, dtype, limit, seconds, timer))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                say(f"pack: {shape.name}, a rank of {number}: not enough memory")
                continue
            yield [origin | record for record in new]
            sizes = f"T {new[0]['tokens']}, d {new[0]['d']}, E {new[0]['experts']}, K {new[0]['top_k']}"
            report.show_packing(f"pack: {shape.name} ({sizes}), a rank of {number}, {new[0]['dtype']}", new)


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
                for record in packing.measure(step(job), limit, seconds, timer):
                    yield entry.record | record
        if asked.device == "cuda":
            del job
            torch.cuda.empty_cache()


def count_bytes(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    origin = asked.origin("bytes", "cpu")
    report.show_run(origin, {})
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
            title = f"bytes that leave a rank for each token and layer, forward: {number} ranks over gloo"
            report.show_bytes(f"{title}; expected: balanced routing", new)


def scale(asked: Asked) -> Iterator[list[dict[str, Any]]]:
    cores = len(os.sched_getaffinity(0))
    origin = asked.origin("scaling", "cpu")
    report.show_run(origin, {})
    shapes = [asked.sized(shape, by=SCALED, tokens=TOKENS["cpu"]) for shape in asked.shapes]
    rounds = 2 if asked.small else 9
    of: dict[str, list[dict[str, Any]]] = {shape.name: [] for shape in shapes}
    for number in asked.ranks:
        jobs = []
        for shape in _divisible("scaling", shapes, number):
            need = number * BYTES_A_WEIGHT * 3 * shape.d * shape.n * shape.experts
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
            report.show_scaling(title, sorted(of[shape.name], key=lambda r: r["fixed"]))
    if max(asked.ranks) > cores:
        report.note(f"this machine has {cores} cores: more ranks than {cores} share them, and the limit stays")


def _divisible(part: str, shapes: list[Shape], number: int) -> list[Shape]:
    for shape in shapes:
        _say_left_out(part, shape, [number] if shape.experts % number else [])
    return [shape for shape in shapes if shape.experts % number == 0]


def _say_left_out(part: str, shape: Shape, numbers: list[int]) -> None:
    for number in numbers:
        say(f"{part}: {shape.name} left out for {number} ranks, which do not divide its {shape.experts} experts")


MEASURE = {"pack": pack, "bytes": count_bytes, "scaling": scale}
