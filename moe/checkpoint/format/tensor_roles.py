"""Constraints on tensors by role: dtypes, values and numbers of tensors."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from moe.checkpoint.format.header import TensorInfo
from moe.errors import CheckpointError
from moe.roles import role_of

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("F64", "F32", "F16", "BF16")
_BIAS_DTYPES = ("F32", "F16", "BF16")  # the correction bias is fp32 in every model; F64 would be rounded
_QUANTISABLE = ("projection", "experts")
_OWN_DTYPE = ("norm", "router", "router bias", "correction bias", "sink", "scales")

_SURPLUS = 2**14  # allowed excess of experts over tensors; their names take little time


def is_quantisable(parameter: str) -> bool:
    """Whether files may hold `parameter` quantised: a projection of attention, an MLP or experts."""
    return role_of(parameter).name in _QUANTISABLE


def needs_common_dtype(parameter: str) -> bool:
    """Whether `parameter` must have the activations' dtype. Norms, routers and sinks have their own."""
    return role_of(parameter).name not in _OWN_DTYPE


def allowed_dtypes(parameter: str, *, quantised: Collection[str] = ()) -> tuple[str, ...]:
    """Return the dtypes allowed for `parameter`; those in `quantised` only if it is quantisable."""
    floats = _BIAS_DTYPES if role_of(parameter).name == "correction bias" else _FLOATS
    return (*floats, *(quantised if is_quantisable(parameter) else ()))


def check_scales(info: TensorInfo, values: "Tensor") -> None:
    """Raise `CheckpointError` for scales that are not finite and positive, which would erase or flip whole blocks."""
    flat = values.detach().reshape(-1)
    # MXFP4's are exponents, where 255 is NaN.
    flat = flat.float() if flat.is_floating_point() else flat.float().masked_fill(flat == 255, float("nan")) + 1
    good = (flat > 0) & flat.isfinite()
    if not good.all():
        at = int((~good).nonzero()[0])
        raise CheckpointError(
            info.path,
            "invalid scale",
            tensor=info.name,
            expected="finite numbers above 0",
            found=f"{flat[at].item()} at index {at}",
        )


def check_experts(experts: int, tensors: Collection[str], path: Path) -> None:
    """Raise `CheckpointError` if config.json has far more experts, in all layers, than the files have tensors.

    For layouts with tensors per expert. Limits memory: a small config.json could otherwise request hundreds of
    megabytes of names. A smaller difference becomes an error about the first missing tensor.
    """
    if experts > len(tensors) + _SURPLUS:
        expected = f"at most the number of tensors in the files ({len(tensors)})"
        raise CheckpointError(path, "too many n_routed_experts in all layers", expected=expected, found=experts)
