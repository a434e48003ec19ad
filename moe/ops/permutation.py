"""Permutation of token rows into expert order, and back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ops.library import define, define_gradient, has_values


@dataclass(frozen=True)
class Permuted:
    """Rows in expert order, their slots, and the end of each expert.

    rows [R, D]; position [T, K] int64, the row of slot (t, k), or -1 if it has none; offsets [E] int32, the end of each
    expert's rows, the `offs` of grouped GEMMs.
    """

    rows: Tensor
    position: Tensor
    offsets: Tensor


def permute(x: Tensor, expert_ids: Tensor, num_experts: int) -> Permuted:
    """Copy the rows of x [T, D] into expert order, one for each of the R = T * K slots of expert_ids [T, K] int64.

    The order is stable: by expert, then token, then k. A slot with id -1 (absent) has position -1. For each such slot,
    a row of zeros follows the last offset, so R does not depend on the ids. T = 0, K = 0, E = 0 and experts without
    tokens are valid. Differentiable once in x: the gradient of a token is the sum of its rows' gradients in order of k,
    accumulated in float32 or wider. Raises ValueError if num_experts < 0, IndexError for an id below -1 or >= E (on
    CPU; a device assertion on CUDA).

    Source: the "unpermute/permute" pair of Megatron-LM and torchtitan, with counting offsets as in MegaBlocks
    (arXiv 2211.15841).
    """
    check_ids(x, expert_ids)
    if num_experts < 0:
        raise ValueError(f"num_experts = {num_experts}: expected 0 or more")
    rows, position, offsets = _PERMUTE(x, expert_ids, num_experts)
    return Permuted(rows, position, offsets)


def unpermute(rows: Tensor, position: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows: rows [R, D] and position [T, K] of `permute`, weights [T, K] -> [T, D].

        out[t] = sum over k, in order, of weights[t, k] * rows[position[t, k]], for position[t, k] != -1

    accumulated in float32 (float64 if rows or weights are float64) and rounded once to the rows' dtype; without
    weights, a plain sum. A position of -1 contributes nothing, even if its weight is NaN, and gets a zero gradient. A
    token without rows gives zero. Differentiable once in rows and weights (float32 or float64, TypeError otherwise). No
    atomics are used, so identical inputs give bit-identical results. Positions are not checked: they must be distinct
    and below R, as are those of `permute`. The rows of absent slots, which come last, may be omitted.
    """
    if weights is not None:
        check_weights(weights, position)
    return _UNPERMUTE(rows, position, weights)


def check_ids(x: Tensor, expert_ids: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x: expected [T, D]; found {tuple(x.shape)}")
    if expert_ids.dim() != 2 or expert_ids.shape[0] != x.shape[0]:
        raise ValueError(f"expert_ids: expected [{x.shape[0]}, K]; found {tuple(expert_ids.shape)}")
    if expert_ids.dtype != torch.int64:
        raise TypeError(f"expert_ids: expected int64; found {expert_ids.dtype}")


def count_slots(expert_ids: Tensor) -> int:
    """Count the slots of expert_ids [T, K] whose expert is present; T * K if the values cannot be read."""
    if has_values(expert_ids) and not torch.compiler.is_compiling():
        return int((expert_ids != -1).sum())
    return expert_ids.shape[0] * expert_ids.shape[1]


def check_weights(weights: Tensor, slots: Tensor) -> None:
    if weights.shape != slots.shape:
        raise ValueError(f"weights: expected {tuple(slots.shape)}; found {tuple(weights.shape)}")
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weights: expected float32 or float64; found {weights.dtype}; do not cast routing weights")


def permute_reference(x: Tensor, expert_ids: Tensor, num_experts: int) -> Permuted:
    """Definition of `permute`."""
    check_ids(x, expert_ids)
    order = _sort_slots(expert_ids, num_experts)
    rows = x.index_select(0, order.slots // expert_ids.shape[1])
    here = expert_ids.reshape(-1).index_select(0, order.slots) >= 0
    return Permuted(torch.where(here[:, None], rows, 0), order.position, order.offsets)


def unpermute_reference(rows: Tensor, position: Tensor, weights: Tensor | None = None) -> Tensor:
    """Definition of `unpermute`."""
    wide = accumulation_dtype(rows, weights)
    out = torch.zeros(position.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    padded = F.pad(rows, (0, 0, 0, 1))  # a row to read for absent slots, even if R is 0
    for k in range(position.shape[1]):
        here = position[:, k, None] >= 0
        part = padded.index_select(0, position[:, k].clamp(min=0)).to(wide)
        if weights is not None:
            part = part * weights[:, k, None]
        out = out + torch.where(here, part, 0)
    return out.to(rows.dtype)


def accumulation_dtype(rows: Tensor, weights: Tensor | None) -> torch.dtype:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return wide if weights is None else torch.promote_types(wide, weights.dtype)


@dataclass(frozen=True)
class SlotOrder:
    """Slots t * K + k in expert order: slots [R] int64, absent ones last; position and offsets as in `Permuted`."""

    slots: Tensor
    position: Tensor
    offsets: Tensor


def sort_slots(expert_ids: Tensor, num_experts: int) -> SlotOrder:
    """Sort the slots of expert_ids [T, K] by expert, stably. Raises IndexError for ids out of range."""
    if expert_ids.device.type != "cpu":
        return _sort_slots(expert_ids, num_experts)
    # NumPy's radix sort of 16-bit integers is ten times faster than torch's stable sort.
    ids = expert_ids.numpy().reshape(-1)
    some_absent = False
    if ids.size:
        low, high = ids.min(), ids.max()
        if low < -1 or high >= num_experts:
            raise IndexError(f"expert_ids: {low if low < -1 else high} is neither -1 nor in [0, {num_experts})")
        some_absent = low < 0
    keys = np.where(ids < 0, num_experts, ids) if some_absent else ids
    slots = np.argsort(keys.astype(np.int16) if num_experts < 2**15 else keys, kind="stable")
    offsets = np.cumsum(np.bincount(keys, minlength=num_experts)[:num_experts], dtype=np.int32)
    position = np.empty(ids.size, dtype=np.int64)
    position[slots] = np.arange(ids.size)
    if some_absent:
        position[ids < 0] = -1
    return SlotOrder(
        torch.from_numpy(slots), torch.from_numpy(position).view(expert_ids.shape), torch.from_numpy(offsets)
    )


def _sort_slots(expert_ids: Tensor, num_experts: int) -> SlotOrder:
    """`sort_slots` with torch's operators, on any device."""
    flat = expert_ids.reshape(-1)
    bad = (flat < -1) | (flat >= num_experts)
    if flat.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~bad.any(), f"expert_ids: an id is neither -1 nor in [0, {num_experts})")
    elif bad.any():
        raise IndexError(f"expert_ids: {int(flat[bad][0])} is neither -1 nor in [0, {num_experts})")
    ids, slots = torch.where(flat < 0, num_experts, flat).sort(stable=True)
    experts = torch.arange(num_experts, device=flat.device)
    rows = torch.arange(slots.shape[0], device=flat.device)
    position = torch.empty_like(rows).scatter_(0, slots, rows).masked_fill_(flat < 0, -1)
    offsets = torch.searchsorted(ids, experts, right=True, out_int32=True)
    return SlotOrder(slots, position.view(expert_ids.shape), offsets)


def combine(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """Compute `unpermute` without a gradient, by `embedding_bag`: each token's rows are one bag, summed in order."""
    if not rows.numel():
        return rows.new_zeros(position.shape[0], rows.shape[1])
    wide = accumulation_dtype(rows, weights)
    here = position >= 0
    count = here.sum(dim=1)
    end = count.cumsum(0)
    start, place, weight = end - count, position[here], None if weights is None else weights[here].to(wide)
    if rows.dtype == wide:
        return F.embedding_bag(place, rows, start, mode="sum", per_sample_weights=weight)
    # embedding_bag requires equal dtypes of rows and weights, so narrow rows are widened in chunks that fit into cache.
    out = rows.new_empty(position.shape[0], rows.shape[1])
    tokens = max(1, 2**20 // max(position.shape[1] * rows.shape[1], 1))
    order = torch.arange(tokens * position.shape[1], device=rows.device)
    first, lasts = 0, [*end[tokens - 1 :: tokens].tolist(), len(place)]
    for t, last in zip(range(0, len(out), tokens), lasts, strict=False):
        table = rows.index_select(0, place[first:last]).to(wide)
        part = None if weight is None else weight[first:last]
        bags = start[t : t + tokens] - first
        out[t : t + tokens] = F.embedding_bag(order[: len(table)], table, bags, mode="sum", per_sample_weights=part)
        first = last
    return out


def _permute(x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = sort_slots(expert_ids, num_experts)
    present = int(order.offsets[-1]) if num_experts else 0
    rows = x.new_empty(expert_ids.numel(), x.shape[1])
    torch.index_select(x, 0, order.slots[:present] // expert_ids.shape[1], out=rows[:present])
    rows[present:] = 0
    return rows, order.position, order.offsets


def _permute_fake(x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(expert_ids.shape[0] * expert_ids.shape[1], x.shape[1])
    return rows, expert_ids.new_empty(expert_ids.shape), x.new_empty(num_experts, dtype=torch.int32)


def _unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    return combine(rows, position, weights)


def _unpermute_fake(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(position.shape[0], rows.shape[1])


def _unpermute_backward(
    grad: Tensor, rows: Tensor, position: Tensor, weights: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of (rows, weights); empty if not needed."""
    wide = accumulation_dtype(rows, weights)
    here = position >= 0
    grad_rows, grad_weights = rows.new_empty(0), rows.new_empty(0, dtype=wide)
    slots = here.reshape(-1).nonzero().squeeze(1)
    place = position.reshape(-1).index_select(0, slots)
    part = grad.index_select(0, slots // max(position.shape[1], 1)).to(wide)
    if needed[0]:
        scaled = part if weights is None else part * weights.reshape(-1).index_select(0, slots)[:, None]
        grad_rows = rows.new_zeros(rows.shape).index_copy_(0, place, scaled.to(rows.dtype))
    if needed[1] and weights is not None:
        dots = (part * rows.index_select(0, place)).sum(dim=1).to(weights.dtype)
        grad_weights = weights.new_zeros(weights.numel()).index_copy_(0, slots, dots).view(weights.shape)
    return grad_rows, grad_weights


def _unpermute_backward_fake(
    grad: Tensor, rows: Tensor, position: Tensor, weights: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_rows = rows.new_empty(rows.shape if needed[0] else (0,))
    if needed[1] and weights is not None:
        return grad_rows, weights.new_empty(weights.shape)
    return grad_rows, rows.new_empty(0, dtype=accumulation_dtype(rows, weights))


_PERMUTE = define(
    "permute(Tensor x, Tensor expert_ids, SymInt num_experts) -> (Tensor, Tensor, Tensor)",
    kernel_module="permutation",
    cpu=_permute,
    fake=_permute_fake,
)
_UNPERMUTE = define(
    "unpermute(Tensor rows, Tensor position, Tensor? weights) -> Tensor",
    kernel_module="permutation",
    cpu=_unpermute,
    fake=_unpermute_fake,
)
_UNPERMUTE_BACKWARD = define(
    "unpermute_backward(Tensor grad, Tensor rows, Tensor position, Tensor? weights, bool[] needed) -> (Tensor, Tensor)",
    kernel_module="permutation",
    cpu=_unpermute_backward,
    fake=_unpermute_backward_fake,
)


def _permute_save(ctx: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]) -> None:
    _, position, offsets = result
    ctx.save_for_backward(position)
    ctx.mark_non_differentiable(position, offsets)


def _permute_gradient(ctx: Any, saved: tuple[Any, ...], grad_rows: Tensor, *_: Any) -> tuple[Any, ...]:
    # The transpose of copying a token to its positions is the sum over these positions.
    return _UNPERMUTE(grad_rows, *saved, None), None, None


def _unpermute_save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    ctx.save_for_backward(*args)


def _unpermute_gradient(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grad_rows, grad_weights = _UNPERMUTE_BACKWARD(grad, *saved, needed)
    return grad_rows if needed[0] else None, None, grad_weights if needed[1] else None


define_gradient(_PERMUTE, _permute_save, _permute_gradient)
define_gradient(_UNPERMUTE, _unpermute_save, _unpermute_gradient)
