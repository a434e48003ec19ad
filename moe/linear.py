"""Linear layer that multiplies half precision as fast as the processor can."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from moe.ops import matmul
from moe.ops.matmul import is_widened, widened_parts


class Linear(nn.Linear):
    """`nn.Linear` that multiplies many rows in float32 on a CPU that computes bfloat16 or float16 slowly.

    The weights keep their dtype, and the result is rounded once, with the bias added before.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`: x [..., K], weight [N, K] and bias [N] -> [..., N]; see `Linear`."""
    # Cheap tests first: this is called many times for each token that is decoded.
    least = None if torch.compiler.is_compiling() else matmul.least_widened(x.dtype)
    if least is None or x.numel() < least * weight.shape[-1] or not _is_plain(x, weight, bias):
        return F.linear(x, weight, bias)
    if not is_widened(x.reshape(-1, x.shape[-1]), weight.t()):
        return F.linear(x, weight, bias)
    return _Widened.apply(x, weight, bias)


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the operands are valid, and nothing but this call decides how they are multiplied."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.numel() > 0
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and all(each.dtype == weight.dtype and each.device == x.device for each in operands)
        and all(type(each) in (Tensor, nn.Parameter) for each in operands)  # not of a library that shards or quantises
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not is_legacy_batchedtensor(x)  # of is_grads_batched
        and forward_ad._current_level < 0
    )


class _Widened(torch.autograd.Function):
    """`F.linear` in float32 of half-precision tensors; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        for columns, part in widened_parts(x.reshape(-1, x.shape[-1]), weight.t()):
            out.view(-1, weight.shape[0])[:, columns] = part if bias is None else part.add_(bias[columns])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            linear(grad, weight.t()) if needs_x else None,
            linear(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )
