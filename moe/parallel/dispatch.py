"""Dispatch of tokens to the ranks that hold their experts, and combination of the results.

A token is sent once to each rank that holds any of its experts, with its expert ids and weights. That rank sums the
results of its experts, and the token's own rank sums the results of the ranks. `permute` and `unpermute` are used with
ranks in place of experts: one sorts rows by destination, the other sums them.

Every rank performs four collectives forward (counts, routing, rows, results) and three backward, in the same order,
whatever its number of tokens. The only host synchronisation is the read of the counts, which `all_to_all` needs as
Python integers.
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
    """Communication of one forward pass of a layer.

    Attributes:
        sent, received: numbers of rows sent to and received from each rank.
        rank: index of this rank.
        bytes_out: bytes of one row with its routing, on the way to experts.
        bytes_back: bytes of one row of results.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    rank: int
    bytes_out: int
    bytes_back: int

    @property
    def to_others(self) -> int:
        """Bytes that leave this rank in the forward pass: rows with routing, and results for other ranks."""
        away = sum(self.sent) - self.sent[self.rank]
        back = sum(self.received) - self.received[self.rank]
        return away * self.bytes_out + back * self.bytes_back


@dataclass(frozen=True)
class Sent:
    """Tokens in transit, as returned by `AllToAllDispatcher.dispatch`.

    Attributes:
        traffic: numbers of rows and bytes.
        position: int64 [T, J], row of each copy of a token; see `moe.ops.permute`.
    """

    dispatcher: "AllToAllDispatcher"
    traffic: Traffic
    position: Tensor
    pending: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for the rows that this rank receives.

        Returns rows [N, D], weights [N, K] and local expert ids [N, K], which are -1 for experts of other ranks.
        """
        return self.dispatcher.receive(self)


class AllToAllDispatcher:
    """Dispatcher of a layer whose experts are divided evenly among ranks, in order.

    Replaces `moe.layer.LocalDispatcher`; the layer's `experts` are then those of this rank.

    Args:
        transport: moves rows between the ranks.
        num_experts: E, a multiple of the number of ranks.
        payload: format of the rows sent to experts. "same": their own dtype; "fp8": e4m3 with a float32 scale per 128
            values, as in DeepSeek-V3. Results and gradients always keep their dtype.

    Raises:
        ParallelError: num_experts is not a multiple of the number of ranks, or payload is unknown.
    """

    def __init__(self, transport: Transport, num_experts: int, *, payload: Payload = "same") -> None:
        self.transport, self.payload = transport, payload
        if num_experts % transport.size:
            problem = f"num_experts = {num_experts}: expected a multiple of the {transport.size} ranks"
            raise ParallelError(problem, layer=transport.name)
        if payload not in get_args(Payload):
            raise ParallelError(f"payload = {payload!r}: expected 'same' or 'fp8'", layer=transport.name)
        self.experts_per_rank = num_experts // transport.size

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllToAllDispatcher":
        return self  # a copy of the layer uses the same ranks

    @eager
    def dispatch(self, x: Tensor, routing: Routing) -> Sent:
        """Start to send x [T, D] to the ranks that hold its experts. A collective call."""
        (sending,) = autocast(x)  # the experts would cast anyway, and this halves the bytes
        assert sending is not None
        permuted = ops.permute(sending.detach(), self.destinations(routing.expert_ids), self.transport.size)
        counts = permuted.offsets.diff(prepend=permuted.offsets.new_zeros(1)).to(torch.int64)
        splits = self.transport.exchange_counts(counts)
        pending = _Send.apply(sending, routing.weights, routing.expert_ids, permuted, self, splits)
        out = sum(part.shape[1] * part.itemsize for part in pending[2:])
        back = sending.shape[1] * sending.itemsize
        traffic = Traffic(tuple(splits[0]), tuple(splits[1]), self.transport.rank, out, back)
        return Sent(self, traffic, permuted.position, pending)

    @eager
    def receive(self, sent: Sent) -> tuple[Tensor, Tensor, Tensor]:
        """See `Sent.wait`."""
        rows, weights, ids = _Receive.apply(*sent.pending, self, (sent.traffic.sent, sent.traffic.received))
        start = self.transport.rank * self.experts_per_rank
        here = (ids >= start) & (ids < start + self.experts_per_rank)
        return rows, weights, torch.where(here, ids - start, -1)

    @eager
    def combine(self, y: Tensor, sent: Sent) -> Tensor:
        """Return y [N, D] to the ranks of its tokens and sum it per token: [T, D]. A collective call."""
        rows = _Return.apply(y, self.transport, (sent.traffic.sent, sent.traffic.received))
        return ops.unpermute(rows, sent.position)

    def destinations(self, expert_ids: Tensor) -> Tensor:
        """Distinct ranks of each token's experts: [T, K] -> [T, min(K, ranks)], descending, padded with -1."""
        # An id below -1 is kept, so that `permute` rejects it.
        rank = torch.where(expert_ids < 0, expert_ids, expert_ids // self.experts_per_rank)
        ordered = rank.sort(dim=-1, descending=True).values
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        ordered = ordered.masked_fill(repeated, -1).sort(dim=-1, descending=True).values
        return ordered[:, : self.transport.size].contiguous()

    def pack(self, rows: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pack rows [N, D] and their routing [N, K] for transport.

        Returns the routing as bytes, uint8 [N, B], and the rows, [N, D] or with "fp8" as bytes.
        """
        if self.payload == "fp8":
            codes, scales = quantize_rows(rows, FP8_BLOCK)
            rows = torch.cat((_bytes(scales), _bytes(codes)), dim=1)
        return torch.cat((_bytes(weights), _bytes(expert_ids.to(torch.int32))), dim=1), rows

    def unpack(
        self, routing: Tensor, rows: Tensor, like_rows: Tensor, like_weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse of `pack`: rows [N, D], weights [N, K] and expert ids int64 [N, K].

        `like_rows` and `like_weights` have the widths and dtypes of what was packed.
        """
        if self.payload == "fp8":
            at = rows.shape[1] - like_rows.shape[1]
            scales, codes = _typed(rows[:, :at], torch.float32), _typed(rows[:, at:], torch.float8_e4m3fn)
            rows = dequantize_blocks(codes, scales, (1, FP8_BLOCK), like_rows.dtype)
        at = like_weights.shape[1] * like_weights.itemsize
        return rows, _typed(routing[:, :at], like_weights.dtype), _typed(routing[:, at:], torch.int32).to(torch.int64)


def source_tokens(position: Tensor) -> Tensor:
    """Token of each row: position [T, J] of `permute` -> int64 [T * J], arbitrary after the last row."""
    tokens, each = position.shape
    flat = position.reshape(-1)
    token = torch.arange(tokens, device=position.device).repeat_interleave(each)
    # Slots without a row write to an extra last element, so that the host need not know their number.
    target = token.new_zeros(flat.shape[0] + 1)
    return target.scatter_(0, torch.where(flat < 0, flat.shape[0], flat), token)[:-1]


def _bytes(rows: Tensor) -> Tensor:
    """View [N, M] of any dtype as uint8 [N, M * itemsize]."""
    return rows.contiguous().view(torch.uint8)


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy uint8 [N, M * itemsize] to [N, M] of `dtype`; a view could be misaligned."""
    rows = torch.empty(data.shape[0], data.shape[1] // dtype.itemsize, dtype=dtype, device=data.device)
    rows.view(torch.uint8).copy_(data)
    return rows


class _Send(torch.autograd.Function):
    """Start to send x [T, D], weights [T, K] and ids [T, K]; returns two placeholders, and routing and rows in transit.

    The placeholders only connect the autograd graph to `_Receive`. Their gradients are those that `_Receive` starts to
    send back.
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
        num_rows = sum(splits[0])
        token = source_tokens(permuted.position)[:num_rows]
        weight, ids = weights.index_select(0, token), expert_ids.index_select(0, token)
        routing, rows = dispatcher.pack(permuted.rows[:num_rows], weight, ids)
        pending = (
            transport.start("dispatch of routing", routing, *splits),
            transport.start("dispatch of rows", rows, *splits),
        )
        ctx.mark_non_differentiable(*pending)
        ctx.set_materialize_grads(False)
        return x.new_empty(num_rows, x.shape[1]), weights.new_empty(num_rows, weights.shape[1]), *pending

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (position,) = ctx.saved_tensors
        for operation, grad in zip(("gradient of rows", "gradient of weights"), grads, strict=False):
            ctx.transport.wait(operation, grad)
        return *(ops.unpermute(grad, position) for grad in grads[:2]), None, None, None, None


class _Receive(torch.autograd.Function):
    """Wait for the dispatch; returns rows [N, D], weights [N, K] and global expert ids int64 [N, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        like_rows: Tensor,
        like_weights: Tensor,
        routing: Tensor,
        rows: Tensor,
        dispatcher: AllToAllDispatcher,
        splits: Splits,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.transport, ctx.splits = dispatcher.transport, splits
        ctx.transport.wait("dispatch of routing", routing)
        ctx.transport.wait("dispatch of rows", rows)
        rows, weights, ids = dispatcher.unpack(routing, rows, like_rows, like_weights)
        ctx.mark_non_differentiable(ids)
        return rows, weights, ids

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
    """Send results y [N, D] back to the ranks that sent the rows; returns one result per row sent."""

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
