"""Tokens to the ranks that have their experts, and back.

A token goes once to each rank that has any of its experts, with its expert ids and weights; that rank sums what its
experts make of it, and the token's own rank sums what comes back. Ranks play the part of experts here: `permute` puts
the rows into the order of their destinations, `unpermute` sums them.

Four collectives forward (counts, routing, rows, results), three backward, on every rank and in the same order, however
few tokens it has. The one host synchronisation is the read of the counts, which all_to_all needs as Python integers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe import ops
from moe.errors import ParallelError
from moe.layer import Experts
from moe.ops import Routing
from moe.ops.library import autocast
from moe.ops.quantization import dequantize_blocks, quantize_rows
from moe.parallel.journal import Journal

Payload = Literal["same", "fp8"]
FP8_BLOCK = 128
MAX_ROWS = 2**31  # from one rank to another: more is no number of tokens


@dataclass(frozen=True)
class Traffic:
    """What one forward pass of a layer moved: rows sent to and received from each rank, and the bytes of one row.

    `to_others` counts what leaves this rank, forward: rows and their routing one way, results the other.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    rank: int
    bytes_out: int
    bytes_back: int

    @property
    def to_others(self) -> int:
        away = sum(self.sent) - self.sent[self.rank]
        back = sum(self.received) - self.received[self.rank]
        return away * self.bytes_out + back * self.bytes_back


class AllToAllDispatcher:
    """The dispatcher of a layer whose experts are divided among the ranks of `group`, in order, equally many each.

    Takes the place of `moe.layer.local_dispatcher`; the layer's `experts` are then this rank's alone.

    Args:
        group: the ranks; a rank's place in the group says which experts it has.
        num_experts: E, a multiple of the group's size.
        payload: how rows travel to the experts: "same", in their dtype, or "fp8", as e4m3 with a float32 scale for
            every 128 values (DeepSeek-V3's dispatch). Results and gradients always travel in their dtype.
        name, journal: for errors: the layer, and the journal that collectives are noted in.
    """

    def __init__(
        self, group: Any, num_experts: int, *, payload: Payload = "same", name: str = "", journal: Journal | None = None
    ) -> None:
        self.group, self.name, self.payload = group, name, payload
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.journal = journal if journal is not None else Journal(dist.get_rank())
        self.traffic: Traffic | None = None
        if num_experts % self.size:
            raise ParallelError(f"{num_experts} experts: expected a multiple of the {self.size} ranks", layer=name)
        if payload not in ("same", "fp8"):
            raise ParallelError(f"payload = {payload!r}: expected 'same' or 'fp8'", layer=name)
        self.experts_per_rank = num_experts // self.size

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllToAllDispatcher":
        return self  # a copy of the layer talks to the same ranks

    def __call__(
        self, x: Tensor, routing: Routing, experts: Experts, shared: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """x [T, D] -> [T, D], as `local_dispatcher`; `shared` is computed while rows travel."""
        return self._eager(x, routing, experts, shared)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _eager(
        self, x: Tensor, routing: Routing, experts: Experts, shared: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        (sending,) = autocast(x)  # the experts would, and half the bytes travel
        assert sending is not None
        first = self.destinations(routing.expert_ids)
        sent = ops.permute(sending.detach(), first, self.size)
        counts = sent.offsets.diff(prepend=sent.offsets.new_zeros(1)).to(torch.int64)
        trip = self._agree(counts)
        rows, weights = _Send.apply(sending, routing.weights, routing.expert_ids, sent, self, trip)
        alongside = None if shared is None else shared(x)
        rows, weights, ids = _Arrive.apply(rows, weights, self, trip)
        start = self.rank * self.experts_per_rank
        here = (ids >= start) & (ids < start + self.experts_per_rank)
        y = experts(rows, weights, torch.where(here, ids - start, -1))
        y = ops.unpermute(_Return.apply(y, self, trip), sent.position)
        return y if alongside is None else y + alongside

    def destinations(self, expert_ids: Tensor) -> Tensor:
        """expert_ids [T, K] -> ranks [T, min(K, ranks)]: the distinct ones of each token, descending, then -1."""
        rank = torch.where(expert_ids < 0, -1, expert_ids // self.experts_per_rank)
        ordered = rank.sort(dim=-1, descending=True).values
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        ordered = ordered.masked_fill(again, -1).sort(dim=-1, descending=True).values
        return ordered[:, : self.size].contiguous()

    def _agree(self, counts: Tensor) -> "_Trip":
        operation = "exchange of counts"
        with self.journal.collective(self.name, operation, self.group) as entry:
            # The ticket says which collective it is: no rows follow counts that were meant for another.
            leaving = torch.stack((counts, torch.full_like(counts, entry.ticket)), dim=1)
            arriving = torch.empty_like(leaving)
            dist.all_to_all_single(arriving, leaving, group=self.group)
        told = torch.cat((leaving, arriving), dim=1).tolist()
        for place, (_, ticket, rows, theirs) in enumerate(told):
            rank = dist.get_global_rank(self.group, place)
            if theirs != ticket:
                raise self.journal.error(f"rank {rank} came to another collective", self.name, operation)
            if not 0 <= rows < MAX_ROWS:
                raise self.journal.error(f"it wants to send {rows} rows", self.name, operation, culprit=rank)
        return _Trip([row[0] for row in told], [row[2] for row in told])

    def exchange(self, operation: str, source: Tensor, trip: "_Trip", *, back: bool = False) -> tuple[Tensor, Any]:
        """Starts to move rows [leaving, ...], or with `back` [arriving, ...] -> (what will be filled, the work)."""
        out_splits, in_splits = (trip.sent, trip.received) if back else (trip.received, trip.sent)
        target = source.new_empty((sum(out_splits), *source.shape[1:]))
        with self.journal.collective(self.name, operation, self.group, sent=in_splits, expected=out_splits):
            work = dist.all_to_all_single(
                target, source.contiguous(), out_splits, in_splits, group=self.group, async_op=True
            )
        return target, work

    def wait(self, operation: str, work: Any) -> None:
        self.journal.wait(self.name, operation, work)


@dataclass
class _Trip:
    """Rows for, and from, each rank; and what is under way between the two autograd functions of a direction."""

    sent: list[int]
    received: list[int]
    landing: Sequence[tuple[str, Tensor, Any]] = ()

    @property
    def leaving(self) -> int:
        return sum(self.sent)

    @property
    def arriving(self) -> int:
        return sum(self.received)

    def landed(self, dispatcher: AllToAllDispatcher) -> list[Tensor]:
        """Waits for what is under way, and returns it."""
        for operation, _, work in self.landing:
            dispatcher.wait(operation, work)
        buffers = [buffer for _, buffer, _ in self.landing]
        self.landing = ()
        return buffers


def _source_tokens(position: Tensor) -> Tensor:
    """position [T, J] of `permute` -> the token of each row [T * J]; those past the last offset are any."""
    tokens, each = position.shape
    flat = position.reshape(-1)
    token = torch.arange(tokens, device=position.device).repeat_interleave(each)
    # Slots without a row write to one place more, which is cut off: no host needs to know how many there are.
    target = token.new_zeros(flat.shape[0] + 1)
    return target.scatter_(0, torch.where(flat < 0, flat.shape[0], flat), token)[:-1]


def _bytes(rows: Tensor) -> Tensor:
    """[N, M] of any dtype -> uint8 [N, M * itemsize]."""
    return rows.contiguous().view(torch.uint8)


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [N, M * itemsize] -> [N, M] of `dtype`: a copy, for a part of a longer row is not aligned where it lies."""
    rows = torch.empty(data.shape[0], data.shape[1] // dtype.itemsize, dtype=dtype, device=data.device)
    rows.view(torch.uint8).copy_(data)
    return rows


class _Send(torch.autograd.Function):
    """Starts the dispatch: of x [T, D] the rows in order of destinations, and of their tokens weights and ids [T, K].

    Its results [arriving, ...] hold nothing yet and only carry the graph to `_Arrive`. Backward, it waits for the
    gradients whose way back `_Arrive` has started; what autograd hands it holds nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        sent: ops.Permuted,
        dispatcher: AllToAllDispatcher,
        trip: _Trip,
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.trip = dispatcher, trip
        ctx.save_for_backward(sent.position)
        here, token = sent.rows[: trip.leaving], _source_tokens(sent.position)[: trip.leaving]
        weight, ids = weights.index_select(0, token), expert_ids.index_select(0, token)
        if dispatcher.payload == "fp8":
            codes, scales = quantize_rows(here, FP8_BLOCK)
            here = torch.cat((_bytes(scales), _bytes(codes)), dim=1)
        routing = torch.cat((_bytes(weight), _bytes(ids.to(torch.int32))), dim=1)
        trip.landing = (
            ("dispatch of routing", *dispatcher.exchange("dispatch of routing", routing, trip)),
            ("dispatch of rows", *dispatcher.exchange("dispatch of rows", here, trip)),
        )
        out, back = routing.shape[1] + here.shape[1] * here.itemsize, x.shape[1] * x.itemsize
        dispatcher.traffic = Traffic(tuple(trip.sent), tuple(trip.received), dispatcher.rank, out, back)
        return x.new_empty(trip.arriving, x.shape[1]), weights.new_empty(trip.arriving, weights.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (position,) = ctx.saved_tensors
        grads = (ops.unpermute(grad, position) for grad in ctx.trip.landed(ctx.dispatcher))
        return *grads, None, None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for the dispatch: -> rows [arriving, D], weights [arriving, K], expert ids [arriving, K] int64."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, dispatcher: AllToAllDispatcher, trip: _Trip
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dispatcher, ctx.trip = dispatcher, trip
        routing, arrived = trip.landed(dispatcher)
        if dispatcher.payload == "fp8":
            at = arrived.shape[1] - rows.shape[1]
            scales, codes = _typed(arrived[:, :at], torch.float32), _typed(arrived[:, at:], torch.float8_e4m3fn)
            arrived = dequantize_blocks(codes, scales, (1, FP8_BLOCK), rows.dtype)
        at = weights.shape[1] * weights.itemsize
        ids = _typed(routing[:, at:], torch.int32).to(torch.int64)
        ctx.mark_non_differentiable(ids)
        return arrived, _typed(routing[:, :at], weights.dtype), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dispatcher, trip = ctx.dispatcher, ctx.trip
        trip.landing = tuple(
            (operation, *dispatcher.exchange(operation, grad, trip, back=True))
            for operation, grad in (("gradient of rows", grad_rows), ("gradient of weights", grad_weights))
        )
        return (*(grad.new_zeros(()).expand_as(grad) for grad in (grad_rows, grad_weights)), None, None)


class _Return(torch.autograd.Function):
    """y [arriving, D] back to where the rows came from: [leaving, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dispatcher: AllToAllDispatcher, trip: _Trip) -> Tensor:
        ctx.dispatcher, ctx.trip = dispatcher, trip
        rows, work = dispatcher.exchange("return of results", y, trip, back=True)
        dispatcher.wait("return of results", work)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dispatcher, trip = ctx.dispatcher, ctx.trip
        rows, work = dispatcher.exchange("gradient of results", grad, trip)
        dispatcher.wait("gradient of results", work)
        return rows, None, None
