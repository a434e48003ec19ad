"""What is timed: an operation on one shape, with its inputs, its judge and its cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.limits import Work, activated, work
from benchmarks.peers import GemmInputs, LayerInputs, Peer, RouteInputs
from benchmarks.routings import Assignment, assign
from benchmarks.shapes import Shape

OPS = ("route", "gemm", "gemm_dx", "gemm_dw", "forward", "train", "decode")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One piece of work that all candidates do."""

    op: str
    shape: Shape
    tokens: int
    routing: str
    dtype: str

    def __str__(self) -> str:
        d, n, experts, top_k = self.shape.sizes
        sizes = f"T {self.tokens}, d {d}, n {n}, E {experts}, K {top_k}"
        return f"{self.op} {self.shape.name} ({sizes}), {self.routing}, {self.dtype}"


@dataclass(frozen=True)
class Job:
    """How a peer goes to work on an entry's inputs, how its result is judged, what it costs with `active` experts."""

    build: Callable[[Peer], Callable[[], Any]]
    judge: Callable[[Any], dict[str, gate.Verdict]]
    work: Work
    active: float


def able(peer: Peer, op: str) -> bool:
    if op == "route":
        return peer.route is not None
    if op.startswith("gemm"):
        return peer.gemm is not None
    return peer.layer is not None and (op != "train" or peer.backward)


class _Inputs:
    """Normal random numbers of one seed, on the device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.on_device, self.on_cpu = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=self.on_device, device=self.device, dtype=self.dtype)
        return values.mul_(scale)


def prepare(entry: Entry, device: str, seed: int) -> Job:
    """Raises BadInput for a routing file that does not fit the entry."""
    shape, dtype = entry.shape, DTYPES[entry.dtype]
    inputs = _Inputs(dtype, device, seed)
    if entry.op == "route":
        logits = RouteInputs(inputs.normal(entry.tokens, shape.experts), shape.top_k)
        return _route(logits, work(entry.op, shape, entry.tokens, 0.0, dtype.itemsize))
    assigned = assign(entry.routing, entry.tokens, shape.experts, shape.top_k, inputs.on_cpu)
    active = activated(shape, entry.tokens)
    if entry.routing != "uniform":
        active = float(assigned.expert_ids.unique().numel())
    cost = work(entry.op, shape, entry.tokens, active, dtype.itemsize)
    if entry.op.startswith("gemm"):
        return _gemm(_gemm_inputs(entry.op, shape, assigned, inputs), cost, active)
    return _layer(_layer_inputs(entry, assigned, inputs), cost, active)


def _gemm_inputs(op: str, shape: Shape, assigned: Assignment, inputs: _Inputs) -> GemmInputs:
    rows = assigned.expert_ids.numel()
    counts = torch.bincount(assigned.expert_ids.flatten(), minlength=shape.experts)
    offs = counts.cumsum(0).int().to(inputs.device)
    if op == "gemm_dw":
        return GemmInputs(inputs.normal(rows, 2 * shape.n).t(), inputs.normal(rows, shape.d), offs)
    gate_up = inputs.normal(shape.experts, 2 * shape.n, shape.d, scale=shape.d**-0.5)
    if op == "gemm_dx":
        return GemmInputs(inputs.normal(rows, 2 * shape.n), gate_up, offs)
    return GemmInputs(inputs.normal(rows, shape.d), gate_up.transpose(1, 2), offs)


def _layer_inputs(entry: Entry, assigned: Assignment, inputs: _Inputs) -> LayerInputs:
    shape = entry.shape
    made = LayerInputs(
        x=inputs.normal(entry.tokens, shape.d),
        gate_up=inputs.normal(shape.experts, 2 * shape.n, shape.d, scale=shape.d**-0.5),
        down=inputs.normal(shape.experts, shape.d, shape.n, scale=shape.n**-0.5),
        weights=assigned.weights.to(inputs.device),
        expert_ids=assigned.expert_ids.to(inputs.device),
        grad=inputs.normal(entry.tokens, shape.d),
        train=entry.op == "train",
    )
    for leaf in made.leaves:
        leaf.requires_grad_(made.train)
    return made


def _route(inputs: RouteInputs, cost: Work) -> Job:
    def build(peer: Peer) -> Callable[[], Any]:
        assert peer.route is not None
        return peer.route(inputs)

    return Job(build, lambda found: {"routing": gate.judge_route(found, inputs)}, cost, 0.0)


def _gemm(inputs: GemmInputs, cost: Work, active: float) -> Job:
    exact = gate.gemm(inputs, gate.BUDGET[inputs.a.device.type])["out"]

    def build(peer: Peer) -> Callable[[], Any]:
        assert peer.gemm is not None
        return peer.gemm(inputs)

    return Job(build, lambda found: {"out": gate.judge(found, exact, inputs.a.dtype)}, cost, active)


def _layer(inputs: LayerInputs, cost: Work, active: float) -> Job:
    exact = gate.layer(inputs, gate.BUDGET[inputs.x.device.type])

    def build(peer: Peer) -> Callable[[], Any]:
        assert peer.layer is not None
        forward = peer.layer(inputs)
        if not peer.same_work:
            return forward

        def call() -> tuple[Tensor, ...]:
            y = forward()
            if not inputs.train:
                return (y,)
            return (y, *torch.autograd.grad(y, inputs.leaves, inputs.grad))

        return call

    def judge(found: tuple[Tensor, ...]) -> dict[str, gate.Verdict]:
        parts = zip(exact.items(), found, strict=True)
        return {name: gate.judge(tensor, part, inputs.x.dtype) for (name, part), tensor in parts}

    return Job(build, judge, cost, active)
