"""What tensors must be for what they do, beyond their shapes: dtypes of a role, values, and how many there may be."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moe.checkpoint.format.header import TensorInfo
from moe.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["router", "correction bias", "projection", "plain"]

_FLOATS = ("F64", "F32", "F16", "BF16")
# The router decides between experts on small differences; its bias moves in steps that only fp32 holds, and a wider
# one would be rounded.
ROLE_DTYPES: dict[Role, tuple[str, ...]] = {
    "router": _FLOATS,
    "correction bias": ("F32", "F16", "BF16"),
    "projection": _FLOATS,
    "plain": _FLOATS,
}

_SURPLUS = 2**14  # experts more than tensors; the names of that many are made in no time


def role_of(parameter: str) -> Role:
    """The role of a parameter of the model. Only a projection may be quantised."""
    match parameter.split("."):
        case [*_, "gate", "e_score_correction_bias"]:
            return "correction bias"
        case [*_, "mlp", "gate", "weight" | "bias"]:
            return "router"
        case [*_, "gate_up_proj" | "down_proj"]:
            return "projection"
        case [*_, name, "weight"] if (name.endswith("_proj") and name != "eh_proj") or name == "kv_a_proj_with_mqa":
            return "projection"
        case _:
            return "plain"


def needs_common_dtype(parameter: str) -> bool:
    """Whether `parameter` must have the dtype of the activations. Norms, routers and sinks compute in their own."""
    kinds = ("norm.weight", "mlp.gate.weight", "mlp.gate.bias", "e_score_correction_bias", "sinks", "_scale_inv")
    return not parameter.endswith(kinds)


def allowed_dtypes(parameter: str, *, quantised: Collection[str] = ()) -> tuple[str, ...]:
    """The dtypes that the role of `parameter` allows; a projection may also have those in `quantised`."""
    role = role_of(parameter)
    return (*ROLE_DTYPES[role], *(quantised if role == "projection" else ()))


def check_scales(info: TensorInfo, values: "Tensor") -> None:
    """Refuse scales of a quantised tensor that are not finite numbers above 0: they erase or flip whole blocks."""
    flat = values.detach().reshape(-1)
    # MXFP4's are exponents, of which 255 is no number.
    flat = flat.float() if flat.is_floating_point() else flat.float().masked_fill(flat == 255, float("nan")) + 1
    good = (flat > 0) & flat.isfinite()
    if not good.all():
        at = int((~good).nonzero()[0])
        raise CheckpointError(
            info.path,
            "scale",
            tensor=info.name,
            expected="finite numbers above 0",
            found=f"{flat[at].item()} at index {at}",
        )


def check_experts(asked: int, tensors: Collection[str], path: Path) -> None:
    """Refuse a config.json with far more experts, in all layers, than the files have tensors.

    For families that have a tensor or more for each expert. Limits memory: a small config.json could otherwise request
    hundreds of megabytes of names. A smaller difference is an error that names the first missing tensor.
    """
    if asked > len(tensors) + _SURPLUS:
        expected = f"no more than there are tensors in the files ({len(tensors)})"
        raise CheckpointError(path, "n_routed_experts in all layers", expected=expected, found=asked)
