"""Container that protects module arguments from casts by wrappers."""

from typing import Any, Self

from torch import Tensor


class Uncast:
    """Tensors that keep their dtype when passed to a module.

    FSDP's mixed precision casts all floating-point tensors that it finds in a module's arguments, also in tuples,
    mappings and dataclasses. accelerate calls `to` to move an argument to another device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        return type(self)(*(tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors))
