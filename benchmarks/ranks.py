"""Processes over gloo, one thread each, that measure the bytes of a dispatch and the speed of an expert-parallel layer.

Processes are forked from a server that has imported torch and computed nothing, because threads do not survive a fork.
They leave Ctrl-C to the parent process and end whenever it ends.
"""

import copy
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from multiprocessing import connection, forkserver
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import correctness
from benchmarks.harness import OtherProcesses, once, one_line, summary
from benchmarks.packing import members, trip
from benchmarks.routings import Assignment, assign
from benchmarks.shapes import Shape
from moe.config import ModelConfig
from moe.layer import MoELayer
from moe.ops import Routing
from moe.parallel import divide_experts, make_mesh
from moe.parallel.collective_log import CollectiveLog
from moe.parallel.dispatch import AllToAllDispatcher, Payload, Traffic
from moe.parallel.transport import AllToAll
from moe.planning.cluster import traffic

START = "forkserver"
TIMEOUT = 300  # seconds for a collective


class RankFailed(RuntimeError):
    """A process returned no result; the message names the rank and the reason."""


@dataclass(frozen=True)
class World:
    """Rank of this process and number of processes."""

    rank: int
    size: int

    @cached_property
    def ep(self) -> Any:
        return make_mesh(ep=self.size).experts["ep"]


def over(size: int, jobs: Sequence[Callable[[World], Any]]) -> Generator[list[Any]]:
    """Results of each job, in order, as a list over `size` processes. Raises RankFailed; leaves no process behind."""
    if not jobs:
        return
    context: Any = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload([__name__])
        _start_server()
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="benchmark-ranks-") as folder:
        try:
            for rank in range(size):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(rank, size, folder, there, jobs), daemon=True)
                process.start()
                there.close()
                processes.append(process)
                pipes.append(here)
            for _ in jobs:
                yield _gather(pipes)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _start_server() -> None:
    """Start the fork server with Ctrl-C ignored, which all processes inherit that it forks."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _gather(pipes: list[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready: Any = connection.wait(waiting)
        faults: list[tuple[float, str]] = []
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                found[rank], fault, when = pipe.recv()
            except EOFError:
                faults.append((0.0, f"rank {rank} of {len(pipes)} ended without a result"))
                continue
            if fault:
                faults.append((when, f"rank {rank} of {len(pipes)}: {fault}"))
        if faults:  # the first is the cause: its closed connections make the others fail
            raise RankFailed(min(faults)[1])
    return [found[rank] for rank in range(len(pipes))]


def _work(rank: int, size: int, folder: str, pipe: Any, jobs: Sequence[Callable[[World], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'rendezvous'}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        world = World(rank, size)
        for job in jobs:
            pipe.send((job(world), "", 0.0))
    except Exception as error:  # the parent ends the other ranks, which wait for this one
        pipe.send((None, f"{type(error).__name__}: {one_line(error)}", time.monotonic()))
    os._exit(0)  # groups cannot be destroyed in order after a failure


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class CountBytes:
    """Job: one dispatch of `shape.tokens[0]` tokens per rank, in bfloat16, without experts."""

    shape: Shape
    routing: str
    payload: Payload
    seed: int

    def routed(self, ranks: int) -> list[Assignment]:
        return shares(self.shape, [self.shape.tokens[0]] * ranks, self.routing, self.seed)

    def __call__(self, world: World) -> dict[str, Any]:
        """`sent`: rows to each rank; `bytes` that left this rank; `slots`: copies of a naive dispatch; `fault`."""
        parts = self.routed(world.size)
        mine = parts[world.rank]
        x = torch.randn(len(mine.weights), self.shape.d, generator=torch.Generator().manual_seed(world.rank))
        transport = Counting(world.ep.get_group(), "layer")
        dispatcher = AllToAllDispatcher(transport, self.shape.experts, payload=self.payload)
        with torch.no_grad():
            _, counted = trip(dispatcher, x.bfloat16(), Routing(mine.weights, mine.expert_ids, mine.weights))
        each = self.shape.experts // world.size
        return {
            "sent": counted.sent,
            "bytes": counted.to_others,
            "slots": int((mine.expert_ids // each != world.rank).sum()),
            "fault": miscounted(self, [part.expert_ids for part in parts], counted, transport.away),
        }


class Counting(AllToAll):
    """Transport that counts in `away` the bytes handed to collectives for other ranks."""

    away = 0

    def start(self, operation: str, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        self.away += (sum(sent) - sent[self.rank]) * math.prod(rows.shape[1:]) * rows.itemsize
        return super().start(operation, rows, sent, received)


def miscounted(job: CountBytes, expert_ids: list[Tensor], counted: Traffic, away: int) -> str:
    """First difference of `counted` from a count by sets, from the planner's bytes per row, or from the bytes handed to
    collectives; empty if there is none."""
    ranks, rank = len(expert_ids), counted.rank
    each = job.shape.experts // ranks
    rows = [[len(tokens) for tokens in members(ids, ranks, each)] for ids in expert_ids]
    out, back = row_bytes(job)
    left = (sum(rows[rank]) - rows[rank][rank]) * out
    left += sum(rows[other][rank] for other in range(ranks) if other != rank) * back
    for what, found, expected in (
        ("rows sent", list(counted.sent), rows[rank]),
        ("rows received", list(counted.received), [row[rank] for row in rows]),
        ("bytes of a row", (counted.bytes_out, counted.bytes_back), (out, back)),
        ("bytes to others", counted.to_others, left),
        ("bytes handed to collectives", away, left),
    ):
        if found != expected:
            return f"rank {rank}: {what}: wrong count; expected {expected}; found {found}"
    return ""


def row_bytes(job: CountBytes) -> tuple[int, int]:
    """Bytes of a row with its routing (a float32 weight and an int32 id per expert), and of its result."""
    kind = "fp8" if job.payload == "fp8" else "bf16"
    return traffic.copy_bytes(job.shape.d, kind) + 8 * job.shape.top_k, traffic.copy_bytes(job.shape.d, "bf16")


def byte_record(job: CountBytes, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Averages over all ranks per token and layer, forward, beside the expectation for balanced routing.

    A naive dispatch sends a copy for each expert on another rank, with one weight and id.
    """
    ranks, tokens = len(found), job.shape.tokens[0] * len(found)
    fault = next((part["fault"] for part in found if part["fault"]), "")
    record = _about(job.shape, ranks) | {
        "routing": job.routing,
        "payload": job.payload,
        "tokens_per_rank": tokens // ranks,
    }
    record |= {"status": "wrong" if fault else "right", "reason": fault or None}
    if fault:
        return record
    out, back = row_bytes(job)
    copies = traffic.expected_destinations(config(job.shape), ranks) * (1 - 1 / ranks)
    moved = sum(part["bytes"] for part in found) / tokens
    naive = sum(part["slots"] for part in found) / tokens * (out - 8 * (job.shape.top_k - 1) + back)
    away = sum(sum(part["sent"]) - part["sent"][rank] for rank, part in enumerate(found)) / tokens
    return record | {
        "copies": away,
        "expected_copies": copies,
        "row_bytes_out": out,
        "row_bytes_back": back,
        "bytes": moved,
        "expected_bytes": copies * (out + back),
        "of_expected": moved / (copies * (out + back)) if copies else None,
        "naive_bytes": naive,
        "dedup": naive / moved if moved else None,
    }


def config(shape: Shape) -> ModelConfig:
    """The fields of a model that the expected number of destinations depends on."""
    return ModelConfig(
        vocab_size=1,
        hidden_size=shape.d,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        intermediate_size=1,
        moe_intermediate_size=shape.n,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        n_group=1,
        topk_group=1,
    )


def shares(shape: Shape, tokens: Sequence[int], routing: str, seed: int) -> list[Assignment]:
    """Each rank's part of one routing of all tokens, so that the same experts are popular on every rank."""
    generator = torch.Generator().manual_seed(seed)
    whole = assign(routing, sum(tokens), shape.experts, shape.top_k, generator)
    columns = zip(whole.expert_ids.split(list(tokens)), whole.weights.split(list(tokens)), strict=True)
    return [Assignment(ids, weights) for ids, weights in columns]


def _about(shape: Shape, ranks: int) -> dict[str, Any]:
    d, n, experts, top_k = shape.sizes
    return {"shape": shape.name, "d": d, "n": n, "experts": experts, "top_k": top_k, "ranks": ranks}


@dataclass
class Clock(CollectiveLog):
    """Collective log that measures the seconds spent in collectives, including the wait for other ranks."""

    seconds: float = 0.0

    @contextmanager
    def locate_errors(self, layer: str, operation: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            with CollectiveLog.locate_errors(self, layer, operation):
                yield
        finally:
            self.seconds += time.perf_counter() - begun


@dataclass(frozen=True)
class Scale:
    """Job: forward and backward of one layer in float32, with its experts divided among all ranks.

    `shape.tokens[0]` is the number of tokens of each rank (`fixed` "per rank") or of all ranks ("total").
    """

    shape: Shape
    fixed: str
    rounds: int
    seed: int

    def tokens(self, ranks: int) -> list[int]:
        whole = self.shape.tokens[0]
        return [whole] * ranks if self.fixed == "per rank" else [len(range(i, whole, ranks)) for i in range(ranks)]

    def __call__(self, world: World) -> dict[str, Any]:
        """Seconds of each round: `together`, of these `waited` in collectives, and `alone`; `fault`; load by others.

        `alone` is the undivided layer on the first rank while the others rest, with that rank's tokens or all tokens.
        """
        d, n, experts, top_k = self.shape.sizes
        counts = self.tokens(world.size)
        parts = shares(self.shape, counts, "uniform", self.seed)
        layer = MoELayer(d, n, experts, top_k, seed=self.seed, initializer_range=d**-0.5)
        clock = Clock(world.rank)
        divided = divide_experts(copy.deepcopy(layer), world.ep, name="layer", log=clock)
        mine = _batch(parts[world.rank].expert_ids, d, self.seed + world.rank)
        fault = wrong(divided, layer, *mine, world)
        anywhere = torch.tensor(int(bool(fault)))
        dist.all_reduce(anywhere)
        found: dict[str, Any] = {"fault": fault, "together": [], "waited": [], "alone": []}
        if anywhere.item():
            return found
        ids = parts[0].expert_ids if self.fixed == "per rank" else torch.cat([part.expert_ids for part in parts])
        reference = _batch(ids, d, self.seed) if world.rank == 0 else None
        dist.barrier()
        others, begun = OtherProcesses(), time.process_time()
        for number in range(self.rounds + 1):
            dist.barrier()
            alone = once(lambda: train(layer, *reference)) if reference else 0.0
            dist.barrier()
            clock.seconds = 0.0
            together = once(lambda: train(divided, *mine))
            if number:  # the first fills caches
                found["alone"].append(alone)
                found["together"].append(together)
                found["waited"].append(clock.seconds)
        own = torch.tensor(time.process_time() - begun, dtype=torch.float64)
        dist.all_reduce(own)  # this process's measurement would count the other ranks as others
        return found | {"load": others.record(own.item())}


def scale_record(job: Scale, found: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """Medians over rounds, each as long as its slowest rank.

    The limit is the undivided layer's speed times the number of cores that the ranks can use.
    """
    ranks, counts = len(found), job.tokens(len(found))
    fault = next((part["fault"] for part in found if part["fault"]), "")
    record = _about(job.shape, ranks) | {"fixed": job.fixed, "tokens": sum(counts), "cores": cores, "dtype": "float32"}
    record |= {"status": "wrong" if fault else "right", "reason": fault or None}
    if fault:
        return record
    rounds = list(zip(*(part["together"] for part in found), strict=True))
    waited = zip(*(part["waited"] for part in found), strict=True)
    together, alone = summary([max(each) for each in rounds]), summary(found[0]["alone"])
    rate = sum(counts) / together["median_s"]
    undivided = (counts[0] if job.fixed == "per rank" else sum(counts)) / alone["median_s"]
    limit = undivided * min(ranks, cores)
    return (
        found[0]["load"]
        | record
        | {
            "together": together,
            "alone": alone,
            "tokens_per_s": rate,
            "undivided_tokens_per_s": undivided,
            "limit_tokens_per_s": limit,
            "share": rate / limit,
            "in_collectives": median(sum(w) / sum(t) for w, t in zip(waited, rounds, strict=True)),
        }
    )


def _batch(expert_ids: Tensor, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, expert ids and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(len(expert_ids), d, generator=generator) for _ in range(2))
    return x, expert_ids, grad


def train(layer: MoELayer, x: Tensor, expert_ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y and the gradient of x; parameters keep their gradients.

    The experts are given, and weighted by this layer's scores: two computations of one score may differ in the last
    bit, and select different experts.
    """
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = layer(x, routing=expert_ids)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def wrong(divided: MoELayer, undivided: MoELayer, x: Tensor, expert_ids: Tensor, grad: Tensor, world: World) -> str:
    """Why y or a gradient (of x, router, experts) is wrong, by float64; empty if all are right. A collective call.

    `undivided` is the same layer with all experts; torch sums its experts' gradients over ranks.
    """
    start = world.rank * (undivided.config.n_routed_experts // world.size)
    mine = slice(start, start + undivided.config.n_routed_experts // world.size)

    def whole(layer: MoELayer, dtype: torch.dtype) -> dict[str, Tensor]:
        y, dx = train(layer, x.to(dtype), expert_ids, grad.to(dtype))
        found = {"y": y, "gradient of x": dx}
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            of = parameter.grad
            if name.startswith("experts."):
                dist.all_reduce(of)
                of = of[mine] / world.size
            found[f"gradient of {name}"] = of
        return found

    exact = whole(copy.deepcopy(undivided).double(), torch.float64)
    eager = whole(undivided, torch.float32)
    y, dx = train(divided, x, expert_ids, grad)
    found = {"y": y, "gradient of x": dx}
    for name, parameter in divided.named_parameters():
        of: Any = parameter.grad
        found[f"gradient of {name}"] = of.to_local() if name.startswith("experts.") else of
    undivided.zero_grad(set_to_none=True)
    inner = max(len(x) * world.size, *exact["gradient of experts.gate_up_proj"].shape[1:])
    for name, values in exact.items():
        every = torch.ones(len(values), dtype=torch.bool)
        # All elements of a row of an expert's gradient share the errors of its tokens.
        shape, rows = tuple(values.shape), torch.arange(len(values))
        part = correctness.Exact(shape, rows, values, eager[name], every, inner, 1, 1)
        verdict = correctness.judge(found[name], part, torch.float32)
        if not verdict.right:
            return f"rank {world.rank}: {name}: {verdict}"
    return ""
