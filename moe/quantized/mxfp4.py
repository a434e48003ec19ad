"""Experts with weights in MXFP4."""

from typing import Self

import torch
from torch import Tensor

from moe import ops
from moe.ops import SwiGLU
from moe.ops.quantization import MX_BLOCK
from moe.quantized.base import Decode, QuantizedExperts, frozen


class MXFP4Experts(QuantizedExperts):
    """All routed experts in MXFP4; see `QuantizedExperts`, and `ops.dequantize_mxfp4` for the format.

    Frozen uint8 parameters: gate_up_proj_blocks [E, 2F, D/32, 16], gate rows first, and down_proj_blocks
    [E, D, F/32, 16]. Uint8 buffers: gate_up_proj_scales [E, 2F, D/32] and down_proj_scales [E, D, F/32]. Optional
    biases gate_up_proj_bias [E, 2F] and down_proj_bias [E, D] are ordinary parameters. gpt-oss alternates gate and up
    rows; because blocks do not cross rows, rows are reordered without loss.

    A cast to a floating dtype changes the biases only, because uint8 tensors are not cast.
    """

    quantized = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
    gate_up_proj_scales: Tensor
    down_proj_scales: Tensor

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        activation: SwiGLU = SwiGLU(),
    ) -> None:
        super().__init__(num_experts, width, hidden, bias=bias, activation=activation)
        for name, size in (("width", width), ("hidden", hidden)):
            if size % MX_BLOCK:
                raise ValueError(f"{name} = {size}: expected a multiple of {MX_BLOCK}")
        gate_up, down = (num_experts, 2 * hidden, width // MX_BLOCK), (num_experts, width, hidden // MX_BLOCK)
        self.gate_up_proj_blocks = frozen(torch.empty(*gate_up, MX_BLOCK // 2, dtype=torch.uint8))
        self.down_proj_blocks = frozen(torch.empty(*down, MX_BLOCK // 2, dtype=torch.uint8))
        self.register_buffer("gate_up_proj_scales", torch.empty(gate_up, dtype=torch.uint8))
        self.register_buffer("down_proj_scales", torch.empty(down, dtype=torch.uint8))

    @classmethod
    def from_parts(
        cls,
        gate_up_blocks: Tensor,
        gate_up_scales: Tensor,
        down_blocks: Tensor,
        down_scales: Tensor,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: SwiGLU = SwiGLU(),
    ) -> Self:
        """Build a module from these tensors without copying. Raises the errors of `ops.dequantize_mxfp4`."""
        gate_up = ops.dequantize_mxfp4(gate_up_blocks.to("meta"), gate_up_scales.to("meta"))
        down = ops.dequantize_mxfp4(down_blocks.to("meta"), down_scales.to("meta"))
        return cls._from_tensors(
            gate_up.shape,
            down.shape,
            (gate_up_blocks, gate_up_scales, down_blocks, down_scales),
            gate_up_bias,
            down_bias,
            activation=activation,
        )

    def _decoders(self) -> tuple[Decode, Decode]:
        return ops.dequantize_mxfp4, ops.dequantize_mxfp4
