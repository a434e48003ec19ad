"""Operators of a Mixture-of-Experts layer, one module each.

A module contains the specification (the docstring of the public function), the definition (`*_reference`), the CPU
implementation, the fake and the gradient. The device of the tensors selects the implementation.
"""

from moe.config import SwiGLU
from moe.ops.activation import swiglu
from moe.ops.grouped_gemm import grouped_mm
from moe.ops.int8 import dequantize_int8, quantize_int8
from moe.ops.mlp import moe_mlp
from moe.ops.permutation import Permuted, permute, unpermute
from moe.ops.quantization import dequantize_blocks, dequantize_mxfp4, quantize_blocks, quantize_mxfp4
from moe.ops.routing import Routing, route

__all__ = [
    "Permuted",
    "Routing",
    "SwiGLU",
    "dequantize_blocks",
    "dequantize_int8",
    "dequantize_mxfp4",
    "grouped_mm",
    "moe_mlp",
    "permute",
    "quantize_blocks",
    "quantize_int8",
    "quantize_mxfp4",
    "route",
    "swiglu",
    "unpermute",
]
