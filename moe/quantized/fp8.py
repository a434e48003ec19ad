"""Linear layers and experts with weights in FP8 blocks."""

from functools import partial
from typing import Self

import torch
from torch import Tensor

from moe import ops
from moe.ops import SwiGLU
from moe.ops.library import autocast, check_device
from moe.ops.quantization import scale_shape
from moe.quantized.base import Decode, FrozenLinear, Quantized, QuantizedExperts, bias_parameter, frozen, new_bias


class FP8Linear(Quantized):
    """`nn.Linear` with FP8 weights: y = x @ W.T + bias, W = `ops.dequantize_blocks(weight, weight_scale_inv)`.

    weight [out, in] is a frozen float8_e4m3fn parameter, weight_scale_inv [ceil(out / bn), ceil(in / bk)] a float32 or
    float8_e8m0fnu buffer, bias [out] a parameter of any dtype. W, bias and y have autocast's dtype if it is on,
    otherwise x's.
    """

    quantized = ("weight", "weight_scale_inv")
    weight_scale_inv: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, block_size: tuple[int, int] = (128, 128)
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        scales = scale_shape((out_features, in_features), block_size)
        self.weight = frozen(torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale_inv", torch.empty(scales, dtype=torch.float32))
        self.bias = new_bias((out_features,), bias)

    @classmethod
    def from_parts(
        cls, weight: Tensor, scale_inv: Tensor, bias: Tensor | None = None, *, block_size: tuple[int, int]
    ) -> Self:
        """Build a module from these tensors without copying. Raises the errors of `ops.dequantize_blocks`."""
        _check_parts(weight, scale_inv, block_size)
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bias is not None, block_size=block_size)
        made.weight, made.weight_scale_inv = frozen(weight), scale_inv.detach()
        made.bias = bias_parameter(bias, (weight.shape[0],), "bias")
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        check_device("FP8Linear", self.weight, x)
        (x,) = autocast(x)  # pyright: ignore[reportAssignmentType]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        decode = partial(ops.dequantize_blocks, block_size=self.block_size)
        return FrozenLinear.apply(x, bias, self.weight, self.weight_scale_inv, decode)  # pyright: ignore

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, block_size={self.block_size}"


def _check_parts(weight: Tensor, scale_inv: Tensor, block_size: tuple[int, int], halves: int = 1) -> None:
    """Raise the errors of `dequantize_blocks`, without computing it."""
    ops.dequantize_blocks(weight.to("meta"), scale_inv.to("meta"), block_size, halves=halves)


class FP8Experts(QuantizedExperts):
    """All routed experts in FP8 blocks; see `QuantizedExperts`, and `ops.dequantize_blocks` for the format.

    Frozen float8_e4m3fn parameters: gate_up_proj [E, 2F, D], gate rows first, and down_proj [E, D, F]. Float32 or
    float8_e8m0fnu buffers: gate_up_proj_scale_inv [E, 2 ceil(F / bn), ceil(D / bk)], with separate blocks for the gate
    and up halves, and down_proj_scale_inv [E, ceil(D / bn), ceil(F / bk)]. Optional biases gate_up_proj_bias [E, 2F]
    and down_proj_bias [E, D] are ordinary parameters.
    """

    quantized = ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv")
    gate_up_proj_scale_inv: Tensor
    down_proj_scale_inv: Tensor

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        block_size: tuple[int, int] = (128, 128),
        bias: bool = False,
        activation: SwiGLU = SwiGLU(),
    ) -> None:
        super().__init__(num_experts, width, hidden, bias=bias, activation=activation)
        self.block_size = block_size
        gate_up, down = (num_experts, 2 * hidden, width), (num_experts, width, hidden)
        self.gate_up_proj = frozen(torch.empty(gate_up, dtype=torch.float8_e4m3fn))
        self.down_proj = frozen(torch.empty(down, dtype=torch.float8_e4m3fn))
        gate_up, down = scale_shape(gate_up, block_size, halves=2), scale_shape(down, block_size)
        self.register_buffer("gate_up_proj_scale_inv", torch.empty(gate_up, dtype=torch.float32))
        self.register_buffer("down_proj_scale_inv", torch.empty(down, dtype=torch.float32))

    @classmethod
    def from_parts(
        cls,
        gate_up: Tensor,
        gate_up_scale_inv: Tensor,
        down: Tensor,
        down_scale_inv: Tensor,
        *,
        block_size: tuple[int, int],
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: SwiGLU = SwiGLU(),
    ) -> Self:
        """Build a module from these tensors without copying. Raises the errors of `ops.dequantize_blocks`."""
        _check_parts(gate_up, gate_up_scale_inv, block_size, halves=2)
        _check_parts(down, down_scale_inv, block_size)
        return cls._from_tensors(
            gate_up.shape,
            down.shape,
            (gate_up, gate_up_scale_inv, down, down_scale_inv),
            gate_up_bias,
            down_bias,
            block_size=block_size,
            activation=activation,
        )

    def _decoders(self) -> tuple[Decode, Decode]:
        decode = partial(ops.dequantize_blocks, block_size=self.block_size)
        return partial(decode, halves=2), decode

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"
