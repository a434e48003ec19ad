"""Arguments of modules that keep their dtype, whatever is around the module."""

from typing import Any, Self

from torch import Tensor


class Uncast:
    """Tensors that a module gets as they are.

    FSDP's mixed precision casts every floating-point tensor in a module's arguments, and looks for them in tuples,
    mappings and dataclasses. `to` is what accelerate calls to move an argument to another device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        return type(self)(*(tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors))
