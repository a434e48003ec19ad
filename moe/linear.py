"""Linear layer that multiplies by the library that is fastest for the dtype, the size and the processor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from moe.ops.matmul import is_faster, is_widened, product, widened_parts

# With fewer rows, `F.linear` is the fastest.
_LEAST_ROWS = 8


class Linear(nn.Linear):
    """`nn.Linear` that chooses how a CPU multiplies many rows.

    On a CPU that computes bfloat16 or float16 slowly, they are multiplied in float32: the weights keep their dtype, and
    the result is rounded once, with the bias added before.
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear`: x [..., K], weight [N, K] and bias [N] -> [..., N]; see `Linear`."""
    # Cheap tests first, because this is called many times for each token that is decoded. A compiled graph must not
    # depend on the number of rows, and x may be a proxy of torch.fx.
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.numel() < _LEAST_ROWS * weight.shape[-1]:
        return F.linear(x, weight, bias)
    if not _is_plain(x, weight, bias) or not is_faster(x.reshape(-1, x.shape[-1]), weight.t()):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


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
        and not torch._C._is_tracing()  # of torch.jit, which cannot record oneDNN's operator
    )


class _Linear(torch.autograd.Function):
    """`F.linear` by `product`; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        rows, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], weight.shape[0])
        if not is_widened(rows, weight.t()):
            out = product(rows, weight.t())
            # Not a view, because a view made without gradients cannot be modified in place later.
            return torch.ops.aten._unsafe_view.default(out if bias is None else out.add_(bias), shape)
        out = x.new_empty(shape)
        for columns, part in widened_parts(rows, weight.t()):
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
