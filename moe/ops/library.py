"""The `moesmith` operator namespace, and the one way in which an operator enters it.

An operator has a schema, a CPU implementation, a CUDA implementation (which ROCm shares) and a fake. A differentiable
one has an "Autograd" implementation as well, which applies an `autograd.Function` when a gradient is needed and
otherwise goes on below autograd; its backward is an operator of its own. This is the form that opcheck and
`torch.compile(fullgraph=True, dynamic=True)` both accept, forward and backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("moesmith", "DEF")


def define(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Adds the operator and returns its overload. No output may alias an input, however small the shapes."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"moesmith::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.moesmith, name).default


def define_gradient(op: Any, save: Callable[[Any, tuple[Any, ...], Any], None], gradient: Callable[..., Any]) -> None:
    """Makes `op` differentiable.

    `save(ctx, args, result)` keeps what the backward pass needs; `gradient(ctx, *grads)` gives one gradient for each
    argument, None for those that have none. It is wrapped in `once_differentiable` unless its own operators are
    differentiable.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*args)
            save(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            return gradient(ctx, *grad_outputs)

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return Differentiable.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(op.name().partition("::")[2].partition(".")[0], autograd, "Autograd")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast would hand them to a matrix product: cast when it is on, except float64."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
