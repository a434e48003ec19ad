"""Jobs of the layer benchmark: an operation on one shape, with inputs, cost and a check of results."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import correctness
from benchmarks.peers import GemmInputs, LayerInputs, Peer, RouteInputs
from benchmarks.roofline import Work, activated, work
from benchmarks.routings import Assignment, assign
from benchmarks.shapes import Shape

OPS = ("route", "gemm", "gemm_dx", "gemm_dw", "forward", "train", "decode")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Entry:
    """One case of the benchmark, the same for all candidates."""

    op: str
    shape: Shape
    tokens: int
    routing: str
    dtype: str

    def __str__(self) -> str:
        d, n, experts, top_k = self.shape.sizes
        sizes = f"{'shrunk to ' * self.shape.shrunk}T {self.tokens}, d {d}, n {n}, E {experts}, K {top_k}"
        return f"{self.op} {self.shape.name} ({sizes}), {self.routing}, {self.dtype}"

    @property
    def record(self) -> dict[str, Any]:
        """Fields of its JSON lines."""
        d, n, experts, top_k = self.shape.sizes
        sizes = {"tokens": self.tokens, "d": d, "n": n, "experts": experts, "top_k": top_k}
        return {"op": self.op, "shape": self.shape.name, **sizes, "routing": self.routing, "dtype": self.dtype}


@dataclass(frozen=True)
class Job:
    """An entry's inputs, its cost with `active` experts, the calls of peers, and the check of results.

    `renew` replaces the values of x (for products a, for route the logits) in place, and results are judged by the new
    values afterwards, so that a result remembered from an earlier call is wrong.
    """

    build: Callable[[Peer], Callable[[], Any]]
    judge: Callable[[Any], dict[str, correctness.Verdict]]
    renew: Callable[[], None]
    inputs: "Inputs"
    work: Work
    active: float


def able(peer: Peer, op: str) -> bool:
    if op == "route":
        return peer.route is not None
    if op.startswith("gemm"):
        return peer.gemm is not None
    return peer.layer is not None and (op != "train" or peer.backward)


class Inputs:
    """Tensors that all candidates share, most of them normally distributed random numbers, on the device.

    A candidate that writes to them would spoil the others' results. Checksums detect that, and the tensors can be
    filled again; copies of all would not fit beside the weights of the largest shapes.
    """

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device, self.seed = dtype, device, seed
        self.on_cpu = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.fills: dict[str, Callable[[], Any]] = {}
        self.sums: dict[str, tuple[int, int]] = {}
        self.versions: dict[str, int] = {}

    def normal(self, name: str, *size: int, scale: float = 1.0, again: bool = False) -> Tensor:
        """A new tensor, or with `again` new values for an existing one."""
        if not again:
            self.tensors[name] = torch.empty(*size, device=self.device, dtype=self.dtype)
        seed = 4 * (len(self.fills) + 64 * self.seed) + 2 + again
        self.fills[name] = lambda: self.tensors[name].normal_(generator=self._generator(seed)).mul_(scale)
        return self._filled(name)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """A small tensor, of which a copy is kept."""
        self.tensors[name], copy = tensor.to(self.device), tensor.clone()
        self.fills[name] = lambda: self.tensors[name].copy_(copy)
        return self._filled(name)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def _filled(self, name: str) -> Tensor:
        self.fills[name]()
        self.sums[name], self.versions[name] = _sums(self.tensors[name]), self.tensors[name]._version
        return self.tensors[name]

    def touched(self) -> list[str]:
        """Names of tensors that torch's operations wrote to. It costs nothing, so it is checked after every call."""
        return [name for name, tensor in self.tensors.items() if tensor._version != self.versions[name]]

    def changed(self) -> list[str]:
        """Names of tensors whose values changed, by any means."""
        return [name for name, tensor in self.tensors.items() if _sums(tensor) != self.sums[name]]

    def restore(self) -> None:
        for name in self.tensors:
            self._filled(name)


AT_A_TIME = 2**26  # elements per partial sum, which take eight bytes each


def _sums(tensor: Tensor) -> tuple[int, int]:
    """Checksums of the bits: sums by row and by column, each weighted by its index."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    matrix = tensor.detach().view(bits).reshape(-1, tensor.shape[-1])
    rows, columns = [], torch.zeros(matrix.shape[1], dtype=torch.int64, device=matrix.device)
    for part in matrix.split(max(1, AT_A_TIME // max(1, matrix.shape[1]))):
        wide = part.long()
        rows.append(wide.sum(dim=1))
        columns += wide.sum(dim=0)
    of_rows, of_columns = (
        int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()) for sums in (torch.cat(rows), columns)
    )
    return of_rows, of_columns


def prepare(entry: Entry, device: str, seed: int) -> Job:
    """The job of an entry. Raises BadInput for a routing file that does not fit."""
    shape, dtype = entry.shape, DTYPES[entry.dtype]
    inputs = Inputs(dtype, device, seed)
    if entry.op == "route":
        cost = work(entry.op, shape, entry.tokens, 0.0, dtype.itemsize)
        return _route(RouteInputs(inputs.normal("logits", entry.tokens, shape.experts), shape.top_k), inputs, cost)
    assigned = assign(entry.routing, entry.tokens, shape.experts, shape.top_k, inputs.on_cpu)
    active = activated(shape, entry.tokens)
    if entry.routing != "uniform":
        active = float(assigned.expert_ids.unique().numel())
    cost = work(entry.op, shape, entry.tokens, active, dtype.itemsize)
    if entry.op.startswith("gemm"):
        return _gemm(_gemm_inputs(entry.op, shape, assigned, inputs), inputs, cost, active)
    return _layer(_layer_inputs(entry, assigned, inputs), inputs, cost, active)


def _gemm_inputs(op: str, shape: Shape, assigned: Assignment, inputs: Inputs) -> GemmInputs:
    rows = assigned.expert_ids.numel()
    counts = torch.bincount(assigned.expert_ids.flatten(), minlength=shape.experts)
    offs = inputs.kept("offs", counts.cumsum(0).int())
    if op == "gemm_dw":
        return GemmInputs(inputs.normal("a", rows, 2 * shape.n).t(), inputs.normal("b", rows, shape.d), offs)
    gate_up = inputs.normal("b", shape.experts, 2 * shape.n, shape.d, scale=shape.d**-0.5)
    if op == "gemm_dx":
        return GemmInputs(inputs.normal("a", rows, 2 * shape.n), gate_up, offs)
    return GemmInputs(inputs.normal("a", rows, shape.d), gate_up.transpose(1, 2), offs)


def _layer_inputs(entry: Entry, assigned: Assignment, inputs: Inputs) -> LayerInputs:
    shape = entry.shape
    return LayerInputs(
        x=inputs.normal("x", entry.tokens, shape.d),
        gate_up=inputs.normal("gate_up", shape.experts, 2 * shape.n, shape.d, scale=shape.d**-0.5),
        down=inputs.normal("down", shape.experts, shape.d, shape.n, scale=shape.n**-0.5),
        weights=inputs.kept("weights", assigned.weights),
        expert_ids=inputs.kept("expert_ids", assigned.expert_ids),
        grad=inputs.normal("grad", entry.tokens, shape.d),
        train=entry.op == "train",
    )


def _route(given: RouteInputs, inputs: Inputs, cost: Work) -> Job:
    def build(peer: Peer) -> Callable[[], Any]:
        assert peer.route is not None
        return peer.route(RouteInputs(given.logits.detach(), given.top_k))

    def renew() -> None:
        inputs.normal("logits", again=True)

    return Job(build, lambda found: {"routing": correctness.judge_route(found, given)}, renew, inputs, cost, 0.0)


def _gemm(given: GemmInputs, inputs: Inputs, cost: Work, active: float) -> Job:
    exact = correctness.gemm(given, correctness.BUDGET[given.a.device.type])

    def build(peer: Peer) -> Callable[[], Any]:
        assert peer.gemm is not None
        return peer.gemm(GemmInputs(given.a.detach(), given.b.detach(), given.offs.detach()))

    def renew() -> None:
        inputs.normal("a", again=True)
        exact.clear()
        exact.update(correctness.gemm(given, correctness.BUDGET[given.a.device.type]))

    def judge(found: Any) -> dict[str, correctness.Verdict]:
        return {"out": correctness.judge(found, exact["out"], given.a.dtype)}

    return Job(build, judge, renew, inputs, cost, active)


def _layer(given: LayerInputs, inputs: Inputs, cost: Work, active: float) -> Job:
    exact = correctness.layer(given, correctness.BUDGET[given.x.device.type])

    def build(peer: Peer) -> Callable[[], Any]:
        assert peer.layer is not None
        # Values are shared; other changes, such as a new shape, must stay with this candidate.
        own = replace(given, **{name: tensor.detach() for name, tensor in inputs.tensors.items()})
        for leaf in own.leaves:
            leaf.requires_grad_(own.train)
        forward = peer.layer(own)
        if not peer.same_work:
            return forward

        def call() -> tuple[Tensor, ...]:
            y = forward()
            if not own.train:
                return (y,)
            return (y, *torch.autograd.grad(y, own.leaves, own.grad))

        return call

    def renew() -> None:
        inputs.normal("x", again=True)
        exact.clear()
        exact.update(correctness.layer(given, correctness.BUDGET[given.x.device.type]))

    def judge(found: tuple[Tensor, ...]) -> dict[str, correctness.Verdict]:
        parts = zip(exact.items(), found, strict=True)
        return {name: correctness.judge(part, tensor, given.x.dtype) for (name, tensor), part in parts}

    return Job(build, judge, renew, inputs, cost, active)
