"""Linear layers and experts with int8 weights, one scale per output row."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from moe import ops
from moe.ops import SwiGLU
from moe.ops.int8 import int8_linear, int8_mlp
from moe.ops.library import autocast, check_device
from moe.quantized.base import Decode, FrozenLinear, Quantized, QuantizedExperts, bias_parameter, frozen, new_bias


def _reads_codes(*tensors: Tensor | None) -> bool:
    """Whether the products can read the codes: on a CPU, if none of these tensors requires a gradient."""
    found = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.device.type != "cpu" for tensor in found) or forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in found))


class Int8Linear(Quantized):
    """`nn.Linear` with int8 weights: y = x @ W.T + bias, W = `ops.dequantize_int8(weight, weight_scale)`.

    weight [out, in] is a frozen int8 parameter, weight_scale [out] a bfloat16 buffer, bias [out] a parameter of any
    dtype. y has autocast's dtype if it is on, otherwise x's.

    Without gradients, the CPU reads the codes and computes in W exactly; see `moe.ops.int8.int8_linear`. Otherwise W is
    dequantised to the dtype of y, and results are bit-identical to those of `moe.linear.Linear` with it.
    """

    quantized = ("weight", "weight_scale")
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = frozen(torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.bfloat16))
        self.bias = new_bias((out_features,), bias)

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Quantise weight [out, in]. Raises the errors of `ops.quantize_int8`."""
        codes, scale = ops.quantize_int8(weight)
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bias is not None)
        made.weight, made.weight_scale = frozen(codes), scale
        made.bias = bias_parameter(bias, (weight.shape[0],), "bias")
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        check_device("Int8Linear", self.weight, x)
        (x,) = autocast(x)  # pyright: ignore[reportAssignmentType]
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not _reads_codes(x, bias):
            return FrozenLinear.apply(x, bias, self.weight, self.weight_scale, ops.dequantize_int8)  # pyright: ignore
        y = int8_linear(x, self.weight, self.weight_scale)
        return y if bias is None else y.add_(bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Experts(QuantizedExperts):
    """All routed experts in int8; see `QuantizedExperts`, and `ops.dequantize_int8` for the format.

    Frozen int8 parameters: gate_up_proj [E, 2F, D], gate rows first, and down_proj [E, D, F]. Bfloat16 buffers:
    gate_up_proj_scale [E, 2F] and down_proj_scale [E, D]. Optional biases gate_up_proj_bias [E, 2F] and down_proj_bias
    [E, D] are ordinary parameters.

    Without gradients, the CPU reads the codes of the experts that a batch uses, and nothing is dequantised in advance.
    """

    quantized = ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")
    gate_up_proj: nn.Parameter
    gate_up_proj_scale: Tensor
    down_proj: nn.Parameter
    down_proj_scale: Tensor

    def __init__(
        self, num_experts: int, width: int, hidden: int, *, bias: bool = False, activation: SwiGLU = SwiGLU()
    ) -> None:
        super().__init__(num_experts, width, hidden, bias=bias, activation=activation)
        for name, shape in (("gate_up", (num_experts, 2 * hidden, width)), ("down", (num_experts, width, hidden))):
            self.register_parameter(f"{name}_proj", frozen(torch.empty(shape, dtype=torch.int8)))
            self.register_buffer(f"{name}_proj_scale", torch.empty(shape[:2], dtype=torch.bfloat16))

    @classmethod
    def from_weights(
        cls,
        gate_up: Tensor,
        down: Tensor,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: SwiGLU = SwiGLU(),
    ) -> Self:
        """Quantise gate_up [E, 2F, D] and down [E, D, F]. Raises the errors of `ops.quantize_int8`."""
        parts = (*ops.quantize_int8(gate_up), *ops.quantize_int8(down))
        return cls._from_tensors(gate_up.shape, down.shape, parts, gate_up_bias, down_bias, activation=activation)

    def _decoders(self) -> tuple[Decode, Decode]:
        return ops.dequantize_int8, ops.dequantize_int8

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Apply `ops.moe_mlp`: x [T, D], weights [T, K] and expert_ids [T, K] -> [T, D]. Raises the same errors."""
        if not _reads_codes(x, weights, expert_ids, *self.parameters()):
            return super().forward(x, weights, expert_ids)
        x, gate_up_bias, down_bias = self._operands(x, weights, expert_ids)
        return int8_mlp(
            x,
            self.gate_up_proj,
            self.gate_up_proj_scale,
            self.down_proj,
            self.down_proj_scale,
            weights,
            expert_ids,
            gate_up_bias,
            down_bias,
            self.activation,
        )
