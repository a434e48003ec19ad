"""Grouped matrix multiplication: many products of different sizes in one call."""

from typing import Any

import torch
from torch import Tensor

from moe.ops.library import Tier, autocast, check_tier, define, define_gradient, has_values
from moe.ops.matmul import product_into

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tier: Tier = "auto",
) -> Tensor:
    """Multiply matrices of G groups, with the semantics of `torch.nn.functional.grouped_mm`.

    `offs` [G] int32 is the end of each group along the ragged dimension; group g is start:end = offs[g-1]:offs[g].

        a [R, K]     b [G, K, N]  -> [R, N]     rows:     out[start:end] = a[start:end] @ b[g]
        a [M, R]     b [R, N]     -> [G, M, N]  products: out[g] = a[:, start:end] @ b[start:end]
        a [G, M, K]  b [G, K, N]  -> [G, M, N]  batched:  out[g] = a[g] @ b[g], no offs
        a [G, M, K]  b [K, R]     -> [M, R]     columns:  out[:, start:end] = a[g] @ b[:, start:end]

    In contrast to torch, rows and columns past the last offset are zero, an empty group of the "products" form gives an
    exact zero matrix, every size may be 0, and float64, any strides (transposed weights, expanded gradients) and any
    alignment are supported.

    Both operands have the same dtype: float32, float64, bfloat16 or float16. Products accumulate in float32 or wider
    and are rounded to that dtype once. Under autocast both operands are cast, as for `torch.matmul`. Differentiable in
    a and b any number of times. Identical inputs give bit-identical results. `tier` is as for `moe_mlp`.

    Raises TypeError for other or unequal dtypes, or if offs is not int32. Raises ValueError for incompatible shapes; if
    offs decreases or ends past the ragged dimension (on CPU; undefined on CUDA); and, as torch does, for a `bias` or an
    `out_dtype` other than the operands' (both are in the signature for compatibility with torch).
    """
    if bias is not None:
        raise ValueError("bias: not supported, as in torch; expected None, add the bias to the rows instead")
    a, b = autocast(a, b)  # pyright: ignore[reportAssignmentType]
    _check(a, b, offs)
    if out_dtype not in (None, a.dtype):
        raise ValueError(f"out_dtype = {out_dtype}: expected the operands' dtype {a.dtype}, or None")
    check_tier(tier)
    use_reference = tier == "reference" and a.device.type != "meta"
    return grouped_mm_reference(a, b, offs) if use_reference else _GROUPED_MM(a, b, offs, tier)


def grouped_mm_reference(a: Tensor, b: Tensor, offs: Tensor | None = None) -> Tensor:
    """Definition of `grouped_mm`."""
    _check(a, b, offs)
    if offs is None:
        return torch.stack([p @ q for p, q in zip(a, b, strict=True)]) if len(a) else a.new_zeros(_shape(a, b, offs))
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if a.dim() == 2 and b.dim() == 3:
        parts = [a[start:end] @ b[g] for g, (start, end) in enumerate(spans)]
        return torch.cat([*parts, a.new_zeros(a.shape[0] - (ends or [0])[-1], b.shape[2])])
    if a.dim() == 2:
        parts = [a[:, start:end] @ b[start:end] for start, end in spans]
        return torch.stack(parts) if parts else a.new_zeros(_shape(a, b, offs))
    parts = [a[g] @ b[:, start:end] for g, (start, end) in enumerate(spans)]
    return torch.cat([*parts, a.new_zeros(a.shape[1], b.shape[1] - (ends or [0])[-1])], dim=1)


def _check(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise ValueError(f"a, b: expected two or three dimensions each; found {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype not in _DTYPES or a.dtype != b.dtype:
        raise TypeError(f"a, b: expected one floating dtype for both; found {a.dtype} and {b.dtype}")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a, b: expected equal inner sizes; found {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dim() == 3 and b.dim() == 3:
        if offs is not None:
            raise ValueError("offs: expected None for two three-dimensional operands")
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"a, b: expected equal numbers of groups; found {a.shape[0]} and {b.shape[0]}")
        return
    if offs is None:
        raise ValueError("offs: expected [G] int32 for a two-dimensional operand; found None")
    if offs.dtype != torch.int32:
        raise TypeError(f"offs: expected int32; found {offs.dtype}")
    groups = offs.shape[0] if a.dim() == b.dim() else (a if a.dim() == 3 else b).shape[0]
    if offs.dim() != 1 or offs.shape[0] != groups:
        raise ValueError(f"offs: expected [{groups}]; found {tuple(offs.shape)}")


def _shape(a: Tensor, b: Tensor, offs: Tensor | None) -> tuple[int, ...]:
    if a.dim() == 3:
        return (a.shape[0], a.shape[1], b.shape[2]) if b.dim() == 3 else (a.shape[1], b.shape[1])
    if b.dim() == 3:
        return a.shape[0], b.shape[2]
    assert offs is not None
    return offs.shape[0], a.shape[0], b.shape[1]


def _spans(offs: Tensor, length: int) -> list[tuple[int, int]]:
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    if any(start > end for start, end in spans) or (ends and ends[-1] > length):
        raise ValueError(f"offs: expected non-decreasing offsets up to {length}; found {ends}")
    return spans


def _forward(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    out = a.new_empty(_shape(a, b, offs))
    if offs is None:
        for g in range(a.shape[0]):
            product_into(out[g], a[g], b[g])
        return out
    ragged_rows, ragged_inner = a.dim() == 2 and b.dim() == 3, a.dim() == b.dim()
    spans = _spans(offs, a.shape[0] if ragged_rows else b.shape[-2] if ragged_inner else b.shape[1])
    end = spans[-1][1] if spans else 0
    if ragged_inner:
        for g, (start, stop) in enumerate(spans):
            if start == stop:
                out[g].zero_()
            else:
                product_into(out[g], a[:, start:stop], b[start:stop])
    elif ragged_rows:
        for g, (start, stop) in enumerate(spans):
            if start < stop:
                product_into(out[start:stop], a[start:stop], b[g])
        out[end:].zero_()
    else:
        for g, (start, stop) in enumerate(spans):
            if start < stop:
                product_into(out[:, start:stop], a[g], b[:, start:stop])
        out[:, end:].zero_()
    return out


def _forward_fake(a: Tensor, b: Tensor, offs: Tensor | None, tier: str) -> Tensor:
    return a.new_empty(_shape(a, b, offs))


def _forward_flops(a: Tensor, b: Tensor, offs: Tensor | None, tier: str) -> int:
    """Count the FLOPs, without rows and columns past the last offset."""
    if offs is None:
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    ragged = a.shape[0] if b.dim() == 3 else b.shape[-2] if a.dim() == 2 else b.shape[1]
    if has_values(offs) and not torch.compiler.is_compiling():
        ragged = int(offs[-1]) if len(offs) else 0
    others = b.shape[1:] if b.dim() == 3 else (a.shape[0], b.shape[1]) if a.dim() == 2 else a.shape[1:]
    return 2 * ragged * others[0] * others[1]


_GROUPED_MM = define(
    "grouped_mm(Tensor a, Tensor b, Tensor? offs, str tier) -> Tensor",
    kernel_module="grouped_gemm",
    cpu=_forward,
    fake=_forward_fake,
    flops=_forward_flops,
    tiered=True,
)


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    *tensors, ctx.tier = args
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    # Both gradients are grouped products with the same offs, in another form.
    a, b, offs = saved
    grad_a = _GROUPED_MM(grad, b.transpose(-1, -2), offs, ctx.tier) if ctx.needs_input_grad[0] else None
    grad_b = _GROUPED_MM(a.transpose(-1, -2), grad, offs, ctx.tier) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None, None


define_gradient(_GROUPED_MM, _save, _gradient, once=False)
