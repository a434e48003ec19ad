"""SwiGLU, the gated activation between the two matrix products of an expert."""

from typing import Any

import torch
from torch import Tensor

from moe.config import SwiGLU
from moe.ops.library import define, define_gradient


def swiglu(gate_up: Tensor, activation: SwiGLU = SwiGLU()) -> Tensor:
    """Apply the gated activation to adjacent halves: [..., 2F] -> [..., F], gate half first.

        gate, up = gate_up[..., :F], gate_up[..., F:]
        if limit is not None: gate = min(gate, limit); up = max(min(up, limit), -limit)
        out = gate * sigmoid(alpha * gate) * (up + beta)

    limit, alpha and beta are those of `activation`. The default is silu(gate) * up; gpt-oss uses
    SwiGLU(limit=7.0, alpha=1.702, beta=1.0). As in `torch.clamp`, the gradient is zero strictly outside the limits, and
    NaN stays NaN. Differentiable once: a second differentiation raises RuntimeError.

    Accepts any floating dtype, leading dimensions and strides. The output is contiguous, has the same dtype and is
    accurate to four roundings in that dtype (0 if exp(-gate) exceeds float32). If `limit`, `alpha` or `beta` is used,
    it is computed in float32 or wider. If alpha is not 1, alpha * gate is also rounded in that wider dtype of unit
    roundoff u, which the exponential amplifies to a relative error of up to 2 u |alpha * gate|. Empty inputs give empty
    outputs. Raises ValueError if the last dimension is odd.

    Source: Shazeer, GLU variants improve Transformer (arXiv 2002.05202); limit, alpha and beta: openai/gpt-oss.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension (gate half, up half); found {tuple(gate_up.shape)}")
    return _SWIGLU(gate_up, activation.limit, activation.alpha, activation.beta)


def swiglu_reference(gate_up: Tensor, activation: SwiGLU = SwiGLU()) -> Tensor:
    """Definition of `swiglu`, with every step in the input's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)


def swiglu_into(out: Tensor, gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    """Write `swiglu` to `out` [..., F], whose dtype may be wider than the input's; no gradient."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is None and (alpha, beta) == (1.0, 0.0):
        # silu computes in float32, so a half-precision result is rounded twice: after silu and after the product.
        return torch.ops.aten.silu.out(gate.to(out.dtype), out=out).mul_(up.to(out.dtype))
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate.to(wide), up.to(wide)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if beta != 0.0:
        up = up + beta
    return out.copy_(torch.sigmoid(gate if alpha == 1.0 else alpha * gate).mul_(gate).mul_(up))


def swiglu_backward_into(
    out: Tensor, grad: Tensor, gate_up: Tensor, limit: float | None, alpha: float, beta: float
) -> Tensor:
    """Write the gradient of `swiglu` for `gate_up` [..., 2F] to `out`; `grad` [..., F] may have a wider dtype."""
    if limit is None and (alpha, beta) == (1.0, 0.0) and grad.dtype == out.dtype == gate_up.dtype:
        (gate, up), (out_gate, out_up) = gate_up.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=out_up).mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out_gate)
        return out
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    grad = grad.to(wide)
    gate, up = (half.to(wide) for half in gate_up.chunk(2, dim=-1))
    inside = None
    if limit is not None:
        inside = gate <= limit, (up >= -limit) & (up <= limit)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if beta != 0.0:
        up = up + beta
    out_gate, out_up = out.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate if alpha == 1.0 else alpha * gate)
    scaled = gate if alpha == 1.0 else alpha * gate
    # d(gate * sigmoid) / d gate = sigmoid * (1 + alpha * gate * (1 - sigmoid))
    slope = torch.addcmul(scaled, scaled, sigmoid, value=-1).add_(1).mul_(sigmoid).mul_(up).mul_(grad)
    lift = sigmoid.mul_(gate).mul_(grad)
    if inside is not None:
        slope.masked_fill_(~inside[0], 0)
        lift.masked_fill_(~inside[1], 0)
    out_gate.copy_(slope)
    out_up.copy_(lift)
    return out


def _forward(gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    return swiglu_into(gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up, limit, alpha, beta)


def _forward_fake(gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _backward(grad: Tensor, gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    return swiglu_backward_into(gate_up.new_empty(gate_up.shape), grad, gate_up, limit, alpha, beta)


def _backward_fake(grad: Tensor, gate_up: Tensor, limit: float | None, alpha: float, beta: float) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_SWIGLU = define(
    "swiglu(Tensor gate_up, float? limit, float alpha, float beta) -> Tensor",
    kernel_module="activation",
    cpu=_forward,
    fake=_forward_fake,
)
_SWIGLU_BACKWARD = define(
    "swiglu_backward(Tensor grad, Tensor gate_up, float? limit, float alpha, float beta) -> Tensor",
    kernel_module="activation",
    cpu=_backward,
    fake=_backward_fake,
)


def _save(ctx: Any, args: tuple[Any, ...], result: Tensor) -> None:
    gate_up, ctx.limit, ctx.alpha, ctx.beta = args
    ctx.save_for_backward(gate_up)


def _gradient(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    return _SWIGLU_BACKWARD(grad, *saved, ctx.limit, ctx.alpha, ctx.beta), None, None, None


define_gradient(_SWIGLU, _save, _gradient)
