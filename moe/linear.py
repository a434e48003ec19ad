"""Linear layer that multiplies half precision as fast as the processor can."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from moe.ops.matmul import is_widened, widened_parts


class Linear(nn.Linear):
    """`nn.Linear` that multiplies many rows in float32 on a CPU that computes bfloat16 or float16 slowly.

    The weights keep their dtype, and the result is rounded once, with the bias added before.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`: x [..., K], weight [N, K] and bias [N] -> [..., N]; see `Linear`."""
    if _is_plain(x, weight) and is_widened(rows := x.reshape(-1, x.shape[-1]), weight.t()):
        return _Widened.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Return whether nothing but this call decides how x and the weight are multiplied."""
    return (
        x.dtype == weight.dtype
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)  # not of a library that shards or quantises
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _Widened(torch.autograd.Function):
    """`F.linear` in float32 of half-precision tensors, x [M, K]; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(x.shape[0], weight.shape[0])
        for columns, part in widened_parts(x, weight.t()):
            out[:, columns] = part if bias is None else part.add_(bias[columns])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(grad.t(), x.t()) if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )
