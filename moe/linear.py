"""Linear layer that multiplies half precision as fast as the processor can."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from moe.ops.matmul import is_widened, widened_parts


class Linear(nn.Linear):
    """`nn.Linear`; on a CPU that computes bfloat16 or float16 slowly, the products of many rows are float32.

    The weights keep their dtype, and the result is rounded once, with the bias added before.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`: x [..., K], weight [N, K] and bias [N] -> [..., N]; see `Linear`."""
    if _is_plain(x, weight, bias) and is_widened(rows := x.reshape(-1, x.shape[-1]), weight.t()):
        return _Widened.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the operands are valid, and nothing but this call decides how they are multiplied."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.dtype.itemsize == 2  # the others need no further checks
        and x.numel() > 0
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(each.dtype == weight.dtype and each.device == x.device for each in operands)
        and all(type(each) in (Tensor, nn.Parameter) for each in operands)  # not of a library that shards or quantises
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not is_legacy_batchedtensor(x)  # of is_grads_batched
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
