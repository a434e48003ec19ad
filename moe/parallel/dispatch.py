"""Tokens to the ranks that have their experts, and back.

A token goes once to each rank that has any of its experts, with its expert ids and weights; that rank sums what its
experts make of it, and the token's own rank sums what comes back. Ranks play the part of experts here: `permute` puts
the rows into the order of their destinations, `unpermute` sums them.

Four collectives forward (counts, routing, rows, results), three backward, on every rank and in the same order, however
few tokens it has. The one host synchronisation is the read of the counts, which all_to_all needs as Python integers.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe import ops
from moe.errors import ParallelError
from moe.ops import Routing
from moe.ops.library import autocast
from moe.ops.quantization import dequantize_blocks, quantize_rows
from moe.parallel.transport import Splits, Transport, eager

Payload = Literal["same", "fp8"]
FP8_BLOCK = 128


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


@dataclass(frozen=True)
class Sent:
    """Tokens on their way: what `AllToAllDispatcher.dispatch` returns.

    Attributes:
        traffic: what is moved.
        position: int64 [T, J], the row of each of a token's copies; see `moe.ops.permute`.
    """

    dispatcher: "AllToAllDispatcher"
    traffic: Traffic
    position: Tensor
    arriving: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """rows [N, D], weights [N, K] and the ids [N, K] of this rank's experts, -1 for those of other ranks."""
        return self.dispatcher.arrive(self)


class AllToAllDispatcher:
    """The dispatcher of a layer whose experts are divided among ranks, in order, equally many each.

    Takes the place of `moe.layer.LocalDispatcher`; the layer's `experts` are then this rank's alone.

    Args:
        transport: what moves rows between the ranks.
        num_experts: E, a multiple of the number of ranks.
        payload: how rows travel to the experts: "same", in their dtype, or "fp8", as e4m3 with a float32 scale for
            every 128 values (DeepSeek-V3's dispatch). Results and gradients always travel in their dtype.
    """

    def __init__(self, transport: Transport, num_experts: int, *, payload: Payload = "same") -> None:
        self.transport, self.payload = transport, payload
        if num_experts % transport.size:
            problem = f"{num_experts} experts: expected a multiple of the {transport.size} ranks"
            raise ParallelError(problem, layer=transport.name)
        if payload not in get_args(Payload):
            raise ParallelError(f"payload = {payload!r}: expected 'same' or 'fp8'", layer=transport.name)
        self.experts_per_rank = num_experts // transport.size

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllToAllDispatcher":
        return self  # a copy of the layer talks to the same ranks

    @eager
    def dispatch(self, x: Tensor, routing: Routing) -> Sent:
        """Start to move x [T, D] to the ranks that have its experts. A collective call."""
        (sending,) = autocast(x)  # the experts would, and half the bytes travel
        assert sending is not None
        permuted = ops.permute(sending.detach(), self.destinations(routing.expert_ids), self.transport.size)
        counts = permuted.offsets.diff(prepend=permuted.offsets.new_zeros(1)).to(torch.int64)
        splits = self.transport.agree(counts)
        arriving = _Send.apply(sending, routing.weights, routing.expert_ids, permuted, self, splits)
        out = sum(part.shape[1] * part.itemsize for part in arriving[2:])
        back = sending.shape[1] * sending.itemsize
        traffic = Traffic(tuple(splits[0]), tuple(splits[1]), self.transport.rank, out, back)
        return Sent(self, traffic, permuted.position, arriving)

    @eager
    def arrive(self, sent: Sent) -> tuple[Tensor, Tensor, Tensor]:
        """See `Sent.wait`."""
        rows, weights, ids = _Arrive.apply(*sent.arriving, self, (sent.traffic.sent, sent.traffic.received))
        start = self.transport.rank * self.experts_per_rank
        here = (ids >= start) & (ids < start + self.experts_per_rank)
        return rows, weights, torch.where(here, ids - start, -1)

    @eager
    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        """y [N, D] of the rows that arrived -> [T, D], each token's sum on its own rank. A collective call."""
        rows = _Return.apply(y, self.transport, (sent.traffic.sent, sent.traffic.received))
        return ops.unpermute(rows, sent.position)

    def destinations(self, expert_ids: Tensor) -> Tensor:
        """expert_ids [T, K] -> ranks [T, min(K, ranks)]: the distinct ones of each token, descending, then -1."""
        # An id below -1 stays what it is, for `permute` to refuse.
        rank = torch.where(expert_ids < 0, expert_ids, expert_ids // self.experts_per_rank)
        ordered = rank.sort(dim=-1, descending=True).values
        again = torch.zeros_like(ordered, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        ordered = ordered.masked_fill(again, -1).sort(dim=-1, descending=True).values
        return ordered[:, : self.transport.size].contiguous()

    def pack(self, rows: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What travels of rows [N, D] and their routing [N, K]: (routing in bytes [N, ...], rows or bytes [N, ...])."""
        if self.payload == "fp8":
            codes, scales = quantize_rows(rows, FP8_BLOCK)
            rows = torch.cat((_bytes(scales), _bytes(codes)), dim=1)
        return torch.cat((_bytes(weights), _bytes(expert_ids.to(torch.int32))), dim=1), rows

    def unpack(
        self, routing: Tensor, rows: Tensor, like_rows: Tensor, like_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rows [N, D], weights [N, K] and expert ids int64 [N, K], widths and dtypes as packed: those of `like_*`."""
        if self.payload == "fp8":
            at = rows.shape[1] - like_rows.shape[1]
            scales, codes = _typed(rows[:, :at], torch.float32), _typed(rows[:, at:], torch.float8_e4m3fn)
            rows = dequantize_blocks(codes, scales, (1, FP8_BLOCK), like_rows.dtype)
        at = like_weights.shape[1] * like_weights.itemsize
        return rows, _typed(routing[:, :at], like_weights.dtype), _typed(routing[:, at:], torch.int32).to(torch.int64)


def source_tokens(position: Tensor) -> Tensor:
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
    """Starts the dispatch of x [T, D], weights and ids [T, K]: the routing and the rows that are arriving.

    Its first two results hold nothing and only carry the graph to `_Arrive`. Their gradients are what `_Arrive` has
    started to move back, and arrive here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        expert_ids: Tensor,
        permuted: ops.Permuted,
        dispatcher: AllToAllDispatcher,
        splits: Splits,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.transport = transport = dispatcher.transport
        ctx.save_for_backward(permuted.position)
        leaving = sum(splits[0])
        token = source_tokens(permuted.position)[:leaving]
        weight, ids = weights.index_select(0, token), expert_ids.index_select(0, token)
        routing, rows = dispatcher.pack(permuted.rows[:leaving], weight, ids)
        arriving = (
            transport.start("dispatch of routing", routing, *splits),
            transport.start("dispatch of rows", rows, *splits),
        )
        ctx.mark_non_differentiable(*arriving)
        ctx.set_materialize_grads(False)
        return x.new_empty(leaving, x.shape[1]), weights.new_empty(leaving, weights.shape[1]), *arriving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (position,) = ctx.saved_tensors
        for operation, grad in zip(("gradient of rows", "gradient of weights"), grads, strict=False):
            ctx.transport.wait(operation, grad)
        return *(ops.unpermute(grad, position) for grad in grads[:2]), None, None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for the dispatch: -> rows [arriving, D], weights [arriving, K], expert ids [arriving, K] int64."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        routing: Tensor,
        arriving: Tensor,
        dispatcher: AllToAllDispatcher,
        splits: Splits,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.transport, ctx.splits = dispatcher.transport, splits
        ctx.transport.wait("dispatch of routing", routing)
        ctx.transport.wait("dispatch of rows", arriving)
        arrived, weights, ids = dispatcher.unpack(routing, arriving, rows, weights)
        ctx.mark_non_differentiable(ids)
        return arrived, weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        back = ctx.splits[::-1]
        grads = (
            ctx.transport.start("gradient of rows", grad_rows, *back),
            ctx.transport.start("gradient of weights", grad_weights, *back),
        )
        return *grads, None, None, None, None


class _Return(torch.autograd.Function):
    """y [arriving, D] back to where the rows came from: [leaving, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, transport: Transport, splits: Splits) -> Tensor:
        ctx.transport, ctx.splits = transport, splits
        return _move(transport, "return of results", y, (splits[1], splits[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _move(ctx.transport, "gradient of results", grad, ctx.splits), None, None


def _move(transport: Transport, operation: str, rows: Tensor, splits: Splits) -> Tensor:
    moved = transport.start(operation, rows, *splits)
    transport.wait(operation, moved)
    return moved
