"""Registration of operators in the `moesmith` namespace.

An operator has a schema, a CPU implementation, a CUDA implementation (which ROCm shares) and a fake. On CUDA the Triton
kernels of the same module and function name in `moe_triton` run. torch's operators run for float64, which the kernels
do not support, and on GPUs where the kernels cannot run (compute capability below 8.0, or kernels not installed). In
the latter case, one warning gives the reason.

A differentiable operator also has an "Autograd" implementation, which applies an `autograd.Function` if a gradient is
needed and otherwise redispatches below autograd; its backward is a separate operator. opcheck and
`torch.compile(fullgraph=True, dynamic=True)` accept this form, forward and backward.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from moe.ops.flops import register_formula

LIBRARY = torch.library.Library("moesmith", "DEF")
Tier = Literal["auto", "triton", "reference"]


def is_fake(tensor: Tensor) -> bool:
    """Return whether `tensor` is a FakeTensor, which has a device but no values."""
    return isinstance(tensor, FakeTensor)


def has_values(tensor: Tensor) -> bool:
    """Return whether the values of `tensor` can be read. Compiled graphs must not read values in any case."""
    return not (tensor.is_meta or is_fake(tensor))


def check_device(module: str, weight: Tensor, x: Tensor) -> None:
    """Raise ValueError if `weight` is still on the meta device but `x` is not.

    Some of torch's operators accept it without an error and return uninitialised memory.
    """
    if weight.is_meta and not x.is_meta:
        raise ValueError(
            f"{module}: its weight is on the meta device; expected {x.device}; load or initialise it first"
        )


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor.to(dtype)`, without the cost of calling it if the dtype is right."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_tier(tier: str) -> None:
    if tier not in get_args(Tier):
        raise ValueError(f"tier = {tier!r}: expected 'auto', 'triton' or 'reference'")


def define(
    schema: str,
    *,
    kernel_module: str | None,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    tiered: bool = False,
) -> Any:
    """Register an operator and return its overload. Its outputs must not alias inputs, even if they are empty.

    `kernel_module` is the module of moe_triton with a function of the operator's name and arguments; None runs `cpu`
    on every device. A `tiered` operator takes the tier as an additional last argument. `flops` computes the FLOPs of
    its products from the operator's arguments, for torch's FlopCounterMode.
    """
    name = schema.partition("(")[0]

    def implementation(*args: Any) -> Any:
        tier = args[-1] if tiered else "auto"
        args = args[:-1] if tiered else args
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        kernels = None if kernel_module is None else kernels_for(kernel_module, tensors, tier)
        if kernels is None:
            return cpu(*args)
        with torch.cuda.device_of(tensors[0]):
            return getattr(kernels, name)(*args)

    def without_values(*args: Any) -> Any:
        _check_device([arg for arg in args if isinstance(arg, Tensor)])
        return fake(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation if tiered else cpu, "CPU")
    LIBRARY.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"moesmith::{name}", without_values, lib=LIBRARY)
    if flops is not None:
        register_formula(getattr(torch.ops.moesmith, name), flops)
    return getattr(torch.ops.moesmith, name).default


def kernels_for(name: str, tensors: list[Tensor], tier: str = "auto") -> ModuleType | None:
    """Return the module `name` of moe_triton, or None to run torch's operators on these tensors.

    On CUDA, None means float64, which the kernels do not support, or, with a warning, that kernels cannot run. With
    tier "triton" it raises ValueError instead of returning None.
    """
    _check_device(tensors)
    device = tensors[0].device
    if device.type == "cpu" and tier != "triton":
        return None
    why = why_no_kernels(device)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if why is None and not wide:
        return importlib.import_module(f"moe_triton.{name}")
    if tier == "triton":
        raise ValueError(f"tier = 'triton': {why or 'a tensor is float64'}")
    if not wide:
        _warn_once(f"torch's operators run on {device.type} instead of moesmith's Triton kernels: {why}")
    return None


def _check_device(tensors: list[Tensor]) -> None:
    if any(tensor.device != tensors[0].device for tensor in tensors):
        raise ValueError(f"tensors on {', '.join(sorted({str(t.device) for t in tensors}))}: expected one device")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


_REMEDIES = {
    "triton": "install triton 3.6 or later",
    "moe_triton": "install moesmith, or put the folder kernels of its repository on PYTHONPATH",
}


@cache
def why_no_kernels(device: torch.device) -> str | None:
    """Return why the kernels cannot run on `device`, and the remedy; None if they can."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors are on the CPU, where kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
    for package, remedy in _REMEDIES.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"cannot import {package} ({error}); {remedy}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0"
    return None


class _Once(torch.autograd.Function):
    """Identity on a gradient; differentiating it raises RuntimeError.

    torch's `once_differentiable` raises only if the outgoing gradient requires grad, and otherwise returns a constant,
    so the second derivative of a sum would be zero. This result depends on all origins of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *origins: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: differentiable once; this is a second differentiation")


def differentiable_once(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn `gradient(ctx, saved, *grads)` into the backward of an `autograd.Function` that is differentiable once.

    A second differentiation raises RuntimeError. For this, at least one saved tensor must be an input or an output of
    the function. Saved tensors are read once, because activation checkpointing returns each only once.
    """

    def decorate(gradient: Callable[..., Any]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = gradient(ctx, saved, *grads)
            # In a compiled graph torch itself rejects a second differentiation.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return results
            origins = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
            return tuple(None if result is None else _Once.apply(name, result, *origins) for result in results)

        return backward

    return decorate


def define_gradient(
    op: Any,
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradient: Callable[..., Any],
    *,
    once: bool = True,
    forward: Callable[..., Any] | None = None,
) -> None:
    """Make `op` differentiable: once, after which RuntimeError is raised, or else as often as `gradient` is.

    `save(ctx, args, result)` saves what the backward pass needs. `gradient(ctx, saved, *grads)` returns one gradient or
    None per argument. `forward` replaces `op` if a gradient is needed; this is decided per call, because a graph may be
    exported without gradients and run with them.
    """

    def often(ctx: Any, *grads: Any) -> Any:
        return gradient(ctx, ctx.saved_tensors, *grads)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = (forward or op)(*args)
            save(ctx, args, result)
            return result

        backward = staticmethod(differentiable_once(op.name())(gradient) if once else often)

    def autograd(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Differentiable.apply(*args)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(f"{op.name()}: forward-mode gradients are not supported; use reverse mode")
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(op.name().partition("::")[2].partition(".")[0], autograd, "Autograd")


def index_error(name: str, ids: Tensor, size: int, ignored: int | None, error: Exception) -> Exception:
    """Return the exception to raise for torch's `error`: on the CPU an IndexError with the first id out of range.

    Checking only after torch has failed costs nothing otherwise, and works with tensors without values.
    """
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong = wrong & (ids != ignored)
    if ids.device.type != "cpu" or not wrong.any():
        return error
    at = wrong.nonzero()[0].tolist()
    allowed = f"0 to {size - 1}" + ("" if ignored is None else f", or {ignored}")
    return IndexError(f"{name}{at} = {ids[tuple(at)].item()}: expected {allowed}")


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast on this device type.

    Entering torch's context takes as long as a small product. A graph that is traced without autocast may run with it.
    """
    if is_autocast_on(device) or (torch.compiler.is_compiling() and torch.amp.is_autocast_available(device)):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def is_autocast_on(device: str) -> bool:
    """Return whether autocast is on for this device type. Some types, such as "meta", have no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the tensors as autocast does for a matrix product: only if it is on, and except float64."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not is_autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
