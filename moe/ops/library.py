"""The `moesmith` operator namespace, and the one way in which an operator enters it.

An operator has a schema, a CPU implementation, a CUDA implementation (which ROCm shares) and a fake. On CUDA the Triton
kernels of the same page and name in `moe_triton` run. Torch's operators run the CPU's algorithm for float64, silently,
because the kernels do not take it. They also run where there are no kernels (a GPU before compute capability 8.0, or
nothing installed), with one warning that says why. A differentiable operator has an "Autograd" implementation as well,
which applies an `autograd.Function` when a gradient is needed and otherwise goes on below autograd; its backward is an
operator of its own. This is the form that opcheck and `torch.compile(fullgraph=True, dynamic=True)` both accept,
forward and backward.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("moesmith", "DEF")
Tier = Literal["auto", "triton", "reference"]


def check_tier(tier: str) -> None:
    if tier not in get_args(Tier):
        raise ValueError(f"tier = {tier!r}: expected 'auto', 'triton' or 'reference'")


def define(
    schema: str, *, page: str | None, cpu: Callable[..., Any], fake: Callable[..., Any], tiered: bool = False
) -> Any:
    """Adds the operator and returns its overload. No output may alias an input, however small the shapes.

    `page` is the module of moe_triton that has kernels of the operator's name and arguments; without one, torch's
    operators do it on every device. A `tiered` operator has one argument more, the tier, at the end.
    """
    name = schema.partition("(")[0]

    def implementation(*args: Any) -> Any:
        tier = args[-1] if tiered else "auto"
        args = args[:-1] if tiered else args
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        kernels = None if page is None else kernels_for(page, tensors, tier)
        if kernels is None:
            return cpu(*args)
        with torch.cuda.device_of(tensors[0]):
            return getattr(kernels, name)(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation if tiered else cpu, "CPU")
    LIBRARY.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"moesmith::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.moesmith, name).default


def kernels_for(page: str, tensors: list[Tensor], tier: str = "auto") -> ModuleType | None:
    """The module of Triton kernels for these tensors, or None if torch's operators are to run.

    None for CUDA tensors means that the kernels do not take float64, or, with a warning, that there are no kernels.
    Tier "triton" raises ValueError instead of None.
    """
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise ValueError(f"tensors on {', '.join(sorted({str(t.device) for t in tensors}))}: expected one device")
    if device.type == "cpu" and tier != "triton":
        return None
    why = why_no_kernels(device)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if why is None and not wide:
        return importlib.import_module(f"moe_triton.{page}")
    if tier == "triton":
        raise ValueError(f"tier = 'triton': {why or 'a tensor is float64'}")
    if not wide:
        _warn_once(f"torch's operators run on {device.type} in the place of moesmith's Triton kernels: {why}")
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


_REMEDIES = {
    "triton": "install triton 3.6 or later",
    "moe_triton": "install moesmith, or put the folder kernels of its repository on PYTHONPATH",
}


@cache
def why_no_kernels(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, and what to do; None if they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on the CPU, where kernels run only by Triton's interpreter (TRITON_INTERPRET=1)"
    for package, remedy in _REMEDIES.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"cannot import {package} ({error}); {remedy}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    return None


class _Once(torch.autograd.Function):
    """A gradient that may be used and not differentiated again.

    torch's `once_differentiable` says so only where the outgoing gradient is differentiable, and otherwise gives a
    constant: the second derivative of a sum would be zero. This one hangs on what the first depended on.
    """

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *origins: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: differentiable once, and this is a second differentiation")


def differentiable_once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes `gradient(ctx, saved, *grads)` the backward of an `autograd.Function`, which can be differentiated once.

    A second differentiation raises RuntimeError if what is saved says that it depends on more than `grads`: at least
    one saved tensor has to be an input or an output of the function. Saved tensors are read once, for activation
    checkpointing hands out each of them only once.
    """

    def decorate(gradient: Callable[..., Any]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = gradient(ctx, saved, *grads)
            # In a compiled graph it is torch that answers a second differentiation.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return results
            origins = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
            return tuple(None if result is None else _Once.apply(name, result, *origins) for result in results)

        return backward

    return decorate


def define_gradient(
    op: Any, save: Callable[[Any, tuple[Any, ...], Any], None], gradient: Callable[..., Any], *, once: bool = True
) -> None:
    """Makes `op` differentiable: once, a second differentiation raising RuntimeError, or as often as `gradient` is.

    `save(ctx, args, result)` keeps what the backward pass needs; `gradient(ctx, saved, *grads)` gives one gradient for
    each argument, None for those that have none.
    """

    def often(ctx: Any, *grads: Any) -> Any:
        return gradient(ctx, ctx.saved_tensors, *grads)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*args)
            save(ctx, args, result)
            return result

        backward = staticmethod(differentiable_once(op.name())(gradient) if once else often)

    def autograd(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Differentiable.apply(*args)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{op.name()}: no forward-mode gradient; use the reverse mode")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(op.name().partition("::")[2].partition(".")[0], autograd, "Autograd")


def index_error(name: str, ids: Tensor, size: int, ignored: int | None, error: Exception) -> Exception:
    """What to raise for an `error` of torch's: on the CPU an IndexError that names the first id out of range.

    Looking only after torch has refused costs nothing before, and is no obstacle to tensors without data.
    """
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong = wrong & (ids != ignored)
    if ids.device.type != "cpu" or not wrong.any():
        return error
    at = wrong.nonzero()[0].tolist()
    allowed = f"0 to {size - 1}" + ("" if ignored is None else f", or {ignored}")
    return IndexError(f"{name}{at} = {ids[tuple(at)].item()}: expected {allowed}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast would hand them to a matrix product: cast when it is on, except float64."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
