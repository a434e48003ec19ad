"""One rank's part of a dispatch to P ranks, without communication: what it packs, and what it does with returned rows.

No collective is needed, so one device plays a rank among any number. With T tokens, K experts per token,
J = min(K, P), R rows that leave (a token is sent once to each rank that has any of its experts), d columns of b bytes
and s = 4 ceil(d / 128) bytes of scales, a step moves at least

    destinations  8 T K + 8 T J                  expert ids to distinct ranks
    permute       8 T K + T d b + R d b          ids and rows to rows in the order of their destinations
    routing       12 T K + 8 R K                 weights and ids of these rows, packed into bytes
    quantise      R d b + R (d + s)              rows to e4m3 with a scale for every 128 values
    unpermute     R d b + T d b + 8 T J          returned rows to one sum for each token
    trip          permute, routing, unpermute, and 20 R K to unpack routing; with fp8 also quantise and its reverse
    experts       the experts' work on rows that a rank receives, where slots of other ranks' experts are -1: as
                  `forward` in benchmarks/roofline.py, for the slots of this rank, with each row counted once

Candidates beside ours are torch's own operators: a token-by-rank mask and its `nonzero`, a sort that drops repetitions,
and `index_add` for results. Everything is compared with a list of tokens for each rank, built from Python sets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import correctness
from benchmarks.harness import Timer, interleave, one_line, summary
from benchmarks.peers import PEERS, LayerInputs, tier_for
from benchmarks.roofline import Ceilings, Phase, Work
from benchmarks.routings import assign
from benchmarks.shapes import Shape
from moe import ops
from moe.ops import Routing
from moe.ops.quantization import FP8_MAX, quantize_rows
from moe.parallel.dispatch import FP8_BLOCK, AllToAllDispatcher, Payload, Traffic, source_tokens
from moe.parallel.transport import Loopback

VIRTUAL_RANKS = (8, 16, 64)
ROUNDS = range(5, 201)


def virtual_rank(size: int, num_experts: int, payload: Payload = "same") -> AllToAllDispatcher:
    """Dispatcher of the last of `size` ranks; the other ranks do not exist."""
    return AllToAllDispatcher(Loopback(size, size - 1), num_experts, payload=payload)


def trip(dispatcher: AllToAllDispatcher, x: Tensor, routing: Routing) -> tuple[Tensor, Traffic]:
    """Dispatch and combine without experts in between, so that only the dispatch is measured."""
    sent = dispatcher.dispatch(x, routing)
    rows, _, _ = sent.wait()
    return dispatcher.combine(rows, sent), sent.traffic


@dataclass(frozen=True)
class Entry:
    """One rank of `ranks`, with `tokens` tokens."""

    shape: Shape
    tokens: int
    ranks: int
    routing: str
    dtype: torch.dtype
    device: str
    seed: int

    @property
    def record(self) -> dict[str, Any]:
        d, n, experts, top_k = self.shape.sizes
        sizes = {"tokens": self.tokens, "d": d, "n": n, "experts": experts, "top_k": top_k}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": self.shape.name, **sizes, "ranks": self.ranks, "routing": self.routing, "dtype": dtype}


@dataclass(frozen=True)
class Candidate:
    name: str
    call: Callable[[], Any]
    same_work: bool = True

    @property
    def ours(self) -> bool:
        return self.name == "moesmith"


@dataclass(frozen=True)
class Step:
    """One task for all candidates. The values of `inputs` may change between calls.

    `fault` returns why a result is wrong for the current values; empty if it is right.
    """

    name: str
    candidates: tuple[Candidate, ...]
    fault: Callable[[Any], str]
    work: Work
    inputs: tuple[Tensor, ...] = ()


def members(expert_ids: Tensor, ranks: int, each: int) -> list[list[int]]:
    """The tokens sent to each rank, found with sets: the definition of a dispatch."""
    tokens: list[list[int]] = [[] for _ in range(ranks)]
    for token, row in enumerate(expert_ids.tolist()):
        for rank in {i // each for i in row if i >= 0}:
            tokens[rank].append(token)
    return tokens


def by_mask(expert_ids: Tensor, ranks: int, each: int) -> tuple[Tensor, Tensor]:
    """Token of each row, and number of rows for each rank, from a mask [T, ranks]."""
    mask = torch.zeros(len(expert_ids), ranks, dtype=torch.bool, device=expert_ids.device)
    mask.scatter_(1, expert_ids // each, True)
    return mask.t().nonzero()[:, 1], mask.sum(0)


def by_sort(expert_ids: Tensor, ranks: int, each: int) -> tuple[Tensor, Tensor]:
    """Same as `by_mask`, by sorting (rank, token) as one number and dropping repetitions."""
    tokens = len(expert_ids)
    token = torch.arange(tokens, device=expert_ids.device)[:, None]
    keys = torch.unique(expert_ids // each * tokens + token)
    return keys % tokens, torch.bincount(keys // tokens, minlength=ranks)


class Packing:
    """Inputs of an entry, and its steps. Each step is built when it is measured, so that not all inputs use memory."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.shape = entry, entry.shape
        self.each = entry.shape.experts // entry.ranks
        generator = torch.Generator().manual_seed(entry.seed)
        assigned = assign(entry.routing, entry.tokens, self.shape.experts, self.shape.top_k, generator)
        tokens = members(assigned.expert_ids, entry.ranks, self.each)
        self.counts = [len(part) for part in tokens]
        self.token = torch.tensor([t for part in tokens for t in part], device=entry.device)
        self.ids, self.weights = assigned.expert_ids.to(entry.device), assigned.weights.to(entry.device)
        self.x = self._normal(entry.tokens, self.shape.d)
        self.rows = len(self.token)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.entry.device).to(self.entry.dtype)

    def _moved(self, step: str) -> Work:
        t, k, j, r = self.entry.tokens, self.shape.top_k, min(self.shape.top_k, self.entry.ranks), self.rows
        row = self.shape.d * self.entry.dtype.itemsize
        coded = self.shape.d + 4 * math.ceil(self.shape.d / FP8_BLOCK)
        of = {
            "destinations": 8 * t * k + 8 * t * j,
            "permute": 8 * t * k + t * row + r * row,
            "routing": 12 * t * k + 8 * r * k,
            "quantise": r * row + r * coded,
            "unpermute": r * row + t * row + 8 * t * j,
        }
        of["trip"] = of["permute"] + of["routing"] + of["unpermute"] + 20 * r * k
        of["trip, fp8"] = of["trip"] + 2 * of["quantise"]
        return Work((Phase(0.0, of[step]),))

    def destinations(self) -> Step:
        rank, ranks = virtual_rank(self.entry.ranks, self.shape.experts), self.entry.ranks

        def mask() -> Tensor:
            found = torch.zeros(len(self.ids), ranks, dtype=torch.bool, device=self.ids.device)
            return found.scatter_(1, self.ids // self.each, True)

        def fault(found: Tensor) -> str:
            if found.dtype != torch.bool:  # ranks, or -1, which is counted in a column of its own
                wide = torch.zeros(len(found), ranks + 1, dtype=torch.int64, device=found.device)
                wide.scatter_add_(1, torch.where(found < 0, ranks, found), torch.ones_like(found))
                found = wide[:, :ranks]
            expected = torch.zeros(len(found), ranks, dtype=torch.int64, device=found.device)
            expected[self.token, torch.repeat_interleave(torch.tensor(self.counts)).to(found.device)] = 1
            return "" if torch.equal(found.long(), expected) else "not each distinct rank exactly once"

        ours = Candidate("moesmith", lambda: rank.destinations(self.ids))
        return Step("destinations", (ours, Candidate("torch: mask", mask)), fault, self._moved("destinations"))

    def permute(self) -> Step:
        rank, ranks = virtual_rank(self.entry.ranks, self.shape.experts), self.entry.ranks

        def ours() -> tuple[Tensor, Tensor]:
            sent = ops.permute(self.x, rank.destinations(self.ids), ranks)
            return sent.rows, sent.offsets.diff(prepend=sent.offsets.new_zeros(1))

        def torchs(order: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
            def call() -> tuple[Tensor, Tensor]:
                token, counts = order(self.ids, ranks, self.each)
                return self.x.index_select(0, token), counts

            return call

        def slots() -> Tensor:
            order = self.ids.flatten().argsort(stable=True)
            return self.x.index_select(0, order // self.shape.top_k)

        candidates = (
            Candidate("moesmith", ours),
            Candidate("torch: mask", torchs(by_mask)),
            Candidate("torch: sort", torchs(by_sort)),
            Candidate("torch: a copy for each expert", slots, same_work=False),
        )
        return Step("permute", candidates, self._misplaced, self._moved("permute"), (self.x,))

    def _misplaced(self, found: tuple[Tensor, Tensor]) -> str:
        rows, counts = found
        if counts.tolist() != self.counts:
            return "wrong numbers of rows for the ranks"
        same = torch.equal(rows[: self.rows], self.x[self.token]) and not rows[self.rows :].any()
        return "" if same else "wrong rows, or wrong order"

    def routing(self) -> Step:
        rank = virtual_rank(self.entry.ranks, self.shape.experts)
        first = rank.destinations(self.ids)
        position = ops.permute(self.x[:, :1].contiguous(), first, self.entry.ranks).position

        def ours() -> Tensor:
            token = source_tokens(position)[: self.rows]
            packed, _ = rank.pack(self.x, self.weights.index_select(0, token), self.ids.index_select(0, token))
            return packed

        def fault(found: Tensor) -> str:
            weights, ids = self.weights[self.token], self.ids[self.token].int()
            expected = torch.cat((weights.view(torch.uint8), ids.view(torch.uint8)), dim=1)
            return "" if torch.equal(found, expected) else "wrong bytes"

        candidates = (Candidate("moesmith", ours), Candidate("torch: index_select", self._packed_routing))
        return Step("routing", candidates, fault, self._moved("routing"), (self.weights,))

    def _packed_routing(self) -> Tensor:
        weights, ids = self.weights.index_select(0, self.token), self.ids.index_select(0, self.token)
        return torch.cat((weights.view(torch.uint8), ids.int().view(torch.uint8)), dim=1)

    def quantise(self) -> Step:
        rows, width = self._normal(self.rows, self.shape.d), self.shape.d

        def cast() -> tuple[Tensor, Tensor]:
            """Multiply with the inverse of the scale, as DeepEP's tests do."""
            blocks = F.pad(rows, (0, -width % FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
            largest = blocks.abs().float().amax(dim=2, keepdim=True).clamp(1e-4)
            codes = (blocks * (FP8_MAX / largest)).to(torch.float8_e4m3fn)
            return codes.flatten(1)[:, :width], largest[:, :, 0] / FP8_MAX

        def fault(found: tuple[Tensor, Tensor]) -> str:
            codes, scales = found
            blocks = F.pad(rows, (0, -width % FP8_BLOCK)).double().unflatten(1, (-1, FP8_BLOCK))
            exact = blocks.abs().amax(dim=2).clamp(1e-4) / FP8_MAX
            if ((scales.double() / exact) - 1).abs().max() > 2**-20:
                return "wrong scales"
            wide = scales.double().repeat_interleave(FP8_BLOCK, dim=1)[:, :width]
            error = (codes.double() * wide - rows.double()).abs()
            # Half a unit in the last of four bits, for subnormals 2^-10; multiplying with an inverse may tip a tie.
            off = error > (rows.double().abs() * 2**-4 + wide * 2**-10) * (1 + 2**-6)
            return f"{int(off.sum())} values are not the nearest e4m3 numbers" if off.any() else ""

        candidates = (
            Candidate("moesmith", lambda: quantize_rows(rows, FP8_BLOCK)),
            Candidate("torch: as DeepEP's cast", cast),
        )
        return Step("quantise", candidates, fault, self._moved("quantise"), (rows,))

    def unpermute(self) -> Step:
        first = virtual_rank(self.entry.ranks, self.shape.experts).destinations(self.ids)
        position = ops.permute(self.x[:, :1].contiguous(), first, self.entry.ranks).position
        back = self._normal(position.numel(), self.shape.d)  # rows past the last are not read

        def gather() -> Tensor:
            there = (position >= 0)[:, :, None]
            rows = back.index_select(0, position.clamp_min(0).flatten()).view(*position.shape, -1)
            return torch.where(there, rows, 0).sum(dim=1, dtype=torch.float32).to(back.dtype)

        def fault(found: Tensor) -> str:
            return self._off(found, back[: self.rows])

        candidates = (
            Candidate("moesmith", lambda: ops.unpermute(back, position)),
            Candidate("torch: index_add", lambda: self._summed(back[: self.rows])),
            Candidate("torch: gather and sum", gather),
        )
        return Step("unpermute", candidates, fault, self._moved("unpermute"), (back,))

    def _summed(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Sum of the rows of each token, added in `dtype`."""
        y = torch.zeros(self.entry.tokens, self.shape.d, dtype=dtype, device=rows.device)
        return y.index_add_(0, self.token, rows.to(dtype)).to(self.entry.dtype if dtype == torch.float32 else dtype)

    def _off(self, found: Tensor, rows: Tensor) -> str:
        """Why `found` is not the sums of `rows`, by float64; empty if it is."""
        exact = self._summed(rows, torch.float64)
        eager = self._summed(rows.to(self.entry.dtype))
        return _judged(found, exact, eager, self.shape.top_k, self.entry.dtype)

    def trip(self) -> Step:
        ranks, shape = self.entry.ranks, self.shape
        routing = Routing(self.weights, self.ids, self.weights)
        ours = virtual_rank(ranks, shape.experts)

        def torchs() -> Tensor:
            token, counts = by_mask(self.ids, ranks, self.each)
            counts.tolist()
            rows = self.x.index_select(0, token)
            packed = self._packed_routing()
            at = 4 * shape.top_k
            _ = packed[:, :at].contiguous().view(torch.float32), packed[:, at:].contiguous().view(torch.int32).long()
            y = torch.zeros(len(self.x), shape.d, dtype=torch.float32, device=rows.device)
            return y.index_add_(0, token, rows.float()).to(self.x.dtype)

        candidates = (
            Candidate("moesmith", lambda: trip(ours, self.x, routing)[0]),
            Candidate("torch: mask, index_add", torchs),
        )
        return Step("trip", candidates, lambda y: self._off(y, self.x[self.token]), self._moved("trip"), (self.x,))

    def trip_fp8(self) -> Step:
        ours = virtual_rank(self.entry.ranks, self.shape.experts, payload="fp8")
        routing = Routing(self.weights, self.ids, self.weights)

        def fault(y: Tensor) -> str:
            # Uses the codes that the exact scale gives; the step `quantise` judges the codes themselves.
            blocks = F.pad(self.x.float(), (0, -self.shape.d % FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
            scale = blocks.abs().amax(dim=2, keepdim=True).clamp(1e-4) / FP8_MAX
            read = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
            return self._off(y, read.flatten(1)[:, : self.shape.d].to(self.x.dtype)[self.token])

        candidates = (Candidate("moesmith", lambda: trip(ours, self.x, routing)[0]),)
        return Step("trip, fp8", candidates, fault, self._moved("trip, fp8"), (self.x,))

    def experts(self) -> Step:
        """The last rank's experts on its share of the tokens of all ranks, which have equally many."""
        d, n, experts, top_k = self.shape.sizes
        generator = torch.Generator().manual_seed(self.entry.seed + 1)
        everywhere = assign(self.entry.routing, self.entry.tokens * self.entry.ranks, experts, top_k, generator)
        here = everywhere.expert_ids // self.each == self.entry.ranks - 1
        arriving = here.any(dim=1)
        start = experts - self.each
        ids = torch.where(here, everywhere.expert_ids - start, -1)[arriving].to(self.entry.device)
        weights = everywhere.weights[arriving].to(self.entry.device)
        rows = self._normal(len(ids), d)
        gate_up = self._normal(self.each, 2 * n, d).mul_(d**-0.5)
        down = self._normal(self.each, d, n).mul_(n**-0.5)

        def compacted(peer: str) -> Callable[[], Tensor]:
            """Peers do not support slots of -1, so these are removed first."""
            layer = next(p.layer for p in PEERS if p.name == peer)
            assert layer is not None

            def call() -> Tensor:
                row, k = (ids >= 0).nonzero(as_tuple=True)
                slots = LayerInputs(
                    rows.index_select(0, row), gate_up, down, weights[row, k, None], ids[row, k, None], rows, False
                )
                return torch.zeros_like(rows).index_add_(0, row, layer(slots)())

            return call

        def plain(dtype: torch.dtype) -> Tensor:
            y = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
            for expert in range(self.each):
                row, k = (ids == expert).nonzero(as_tuple=True)
                gate_, up = (rows[row].to(dtype) @ gate_up[expert].to(dtype).t()).chunk(2, dim=1)
                part = (F.silu(gate_) * up @ down[expert].to(dtype).t()) * weights[row, k, None]
                y.index_add_(0, row, part.to(dtype))
            return y

        def fault(found: Tensor) -> str:
            return _judged(found, plain(torch.float64), plain(rows.dtype), max(d, n), rows.dtype)

        slots = int((ids >= 0).sum())
        active = float(ids[ids >= 0].unique().numel())
        b = self.entry.dtype.itemsize
        moved = active * 3 * d * n * b + 2 * len(rows) * d * b + 2 * slots * n * b + 2 * slots * d * b
        candidates = (
            Candidate("moesmith", lambda: ops.moe_mlp(rows, gate_up, down, weights, ids, tier=tier_for(rows))),
            Candidate("torch: grouped_mm, -1 removed", compacted("torch")),
            Candidate("torch: loop, -1 removed", compacted("loop")),
        )
        return Step("experts", candidates, fault, Work((Phase(6.0 * slots * d * n, moved),)), (rows,))


COPYING = (
    Packing.destinations,
    Packing.permute,
    Packing.routing,
    Packing.quantise,
    Packing.unpermute,
    Packing.trip,
    Packing.trip_fp8,
)
COMPUTING = (Packing.experts,)


def _judged(found: Tensor, exact: Tensor, eager: Tensor, inner: int, dtype: torch.dtype) -> str:
    every = torch.ones(len(exact), dtype=torch.bool, device=exact.device)
    index = torch.arange(len(exact), device=exact.device)
    part = correctness.Exact(tuple(exact.shape), index, exact, eager, every, inner, exact.shape[1], exact.numel())
    verdict = correctness.judge(found, part, dtype)
    return "" if verdict.right else str(verdict)


def measure(step: Step, ceilings: Ceilings, seconds: float, timer: Timer) -> list[dict[str, Any]]:
    """A record for each candidate, with times if it is right before and after the timing."""
    faults = {c.name: _fault(step, c) for c in step.candidates}
    right = {c.name: c.call for c in step.candidates if not faults[c.name]}
    one_round = sum(map(timer, right.values()))
    rounds = math.ceil(seconds * len(right) / one_round) if one_round else 0
    times = interleave(right, max(ROUNDS.start, min(rounds, ROUNDS[-1])), timer) if right else {}
    for tensor in step.inputs:
        tensor.normal_()
    limit = step.work.seconds(ceilings)
    records = []
    for c in step.candidates:
        fault = faults[c.name] or _fault(step, c, "with other values of its inputs: ")
        status = ("wrong" if fault else "right") if c.same_work else "failed" if fault else "not the same work"
        record = {"step": step.name, "candidate": c.name, "ours": c.ours, "status": status, "reason": fault or None}
        record |= {"flops": step.work.flops, "bytes": step.work.bytes, "limit_s": limit, "errors": {}}
        record |= {"matmul_flops": ceilings.matmul, "copy_bytes": ceilings.copy, "peak_bytes": None}
        if not fault:
            found = summary(times[c.name])
            best = found["median_s"]
            record |= {"eager": found, "graph": None, "share": limit / best}
            record |= {"tflops": step.work.flops / best / 1e12, "gbytes": step.work.bytes / best / 1e9}
        records.append(record)
    return records


def _fault(step: Step, candidate: Candidate, when: str = "") -> str:
    try:
        result = candidate.call()
        fault = step.fault(result) if candidate.same_work else ""
    except Exception as error:  # recorded for this candidate alone
        fault = f"{type(error).__name__}: {one_line(error)}"
    return f"{when}{fault}" if fault else ""
