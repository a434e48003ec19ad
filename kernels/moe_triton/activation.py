"""SwiGLU and its gradient. The epilogues of the expert MLP use the same device functions."""

# Triton's decorator keeps the signature and hides the result; constexprs take plain values, launches also options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class SwiGLU:
    """hidden = gate * sigmoid(alpha * gate) * (up + beta), with gate <= limit and |up| <= limit if there is a limit.

    Kernels take it as one compile-time value.
    """

    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0


@triton.jit
def exp(x):
    """e^x for float32 within two roundings.

    `tl.exp` multiplies x by log2(e) first, and its rounding error grows with |x|. Here n = round(x / ln 2) is removed
    exactly, and the rest goes through the Taylor series.
    """
    # Beyond these bounds the result is 0 or infinite; NaN stays NaN.
    x = tl.where(x < -104.0, -104.0, tl.where(x > 104.0, 104.0, x))
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = x - n * 0.693359375  # ln 2 in nine bits: the product is exact
    r = r + n * 2.1219444005469058e-4
    p = 1.9841269841269841e-4
    p = p * r + 1.3888888888888889e-3
    p = p * r + 8.3333333333333333e-3
    p = p * r + 4.1666666666666666e-2
    p = p * r + 1.6666666666666666e-1
    p = p * r + 0.5
    # 2^n in two factors, each of them a normal number.
    half = tl.floor(n * 0.5)
    return (p * r * r + r + 1.0) * tl.exp2(half) * tl.exp2(n - half)


@triton.jit
def sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exp(-x))


@triton.jit
def quick_sigmoid(x):
    """(sigmoid(x), sigmoid(-x)) to about 2^-17 for normal results, in a third of the instructions; for half precision.

    e^-|x| cannot overflow, and the divisor is between 1 and 2. It is the square of a power of two, because the hardware
    makes none that is subnormal.
    """
    root = tl.exp2(tl.abs(x) * -0.7213475204444817)  # half of log2(e)
    e = root * root
    r = tl.rsqrt(1.0 + e)
    above = r * r
    below = e * above
    return tl.where(x < 0, below, above), tl.where(x < 0, above, below)


@triton.jit
def clamp(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION.limit is not None:
        limit: tl.constexpr = ACTIVATION.limit
        # Written so that NaN stays NaN.
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up


@triton.jit
def swiglu_tile(gate, up, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Hidden activation from float32 tiles of the gate and up halves; EXACT if the result stays float32."""
    gate, up = clamp(gate, up, ACTIVATION)
    z = ACTIVATION.alpha * gate
    act = tl.div_rn(gate, 1.0 + exp(-z)) if EXACT else gate * quick_sigmoid(z)[0]
    return act * (up + ACTIVATION.beta)


@triton.jit
def swiglu_backward_tile(grad, gate, up, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(hidden, gradient of the gate half, gradient of the up half), from float32 tiles; EXACT if they stay float32."""
    clamped_gate, clamped_up = clamp(gate, up, ACTIVATION)
    z = ACTIVATION.alpha * clamped_gate
    if EXACT:
        below = 1.0 + exp(-z)
        s, act = tl.div_rn(1.0, below), tl.div_rn(clamped_gate, below)
        rest = 1.0 - s
    else:
        s, rest = quick_sigmoid(z)
        act = clamped_gate * s
    factor = clamped_up + ACTIVATION.beta
    grad_gate = grad * factor * (s * (1.0 + z * rest))
    grad_up = grad * act
    if ACTIVATION.limit is not None:
        grad_gate = tl.where(gate <= ACTIVATION.limit, grad_gate, 0.0)
        grad_up = tl.where(tl.abs(up) <= ACTIVATION.limit, grad_up, 0.0)
    return act * factor, grad_gate, grad_up


@triton.jit
def swiglu_kernel(gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * 2 * width + column
    gate = tl.load(at, mask=column < width, other=0).to(tl.float32)
    up = tl.load(at + width, mask=column < width, other=0).to(tl.float32)
    hidden = swiglu_tile(gate, up, ACTIVATION, out.dtype.element_ty == tl.float32)
    tl.store(out + row * width + column, hidden, mask=column < width)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * 2 * width + column
    gate = tl.load(gate_up + at, mask=column < width, other=0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=column < width, other=0).to(tl.float32)
    g = tl.load(grad + row * width + column, mask=column < width, other=0).to(tl.float32)
    _, grad_gate, grad_up = swiglu_backward_tile(g, gate, up, ACTIVATION, out.dtype.element_ty == tl.float32)
    tl.store(out + at, grad_gate, mask=column < width)
    tl.store(out + at + width, grad_up, mask=column < width)


def _grid(count: int, width: int) -> tuple[tuple[int, int], int]:
    """(grid of rows and blocks of columns, BLOCK)"""
    block = min(1024, 1 << (width - 1).bit_length())
    return (count // width, -(-width // block)), block


def swiglu(gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid, block = _grid(out.numel(), width)
        activation = SwiGLU(limit, alpha, beta)
        swiglu_kernel[grid](gate_up.contiguous(), out, width, ACTIVATION=activation, BLOCK=block)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    width = gate_up.shape[-1] // 2
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid, block = _grid(grad.numel(), width)
        activation = SwiGLU(limit, alpha, beta)
        grad, gate_up = grad.contiguous(), gate_up.contiguous()
        swiglu_backward_kernel[grid](grad, gate_up, out, width, ACTIVATION=activation, BLOCK=block)
    return out
