"""Modules that keep quantised weights in memory and dequantise them on use.

Results are bit-identical to those of `nn.Linear` and `moe.layer.Experts` with the dequantised weights in x's dtype.
Quantised weights are frozen. Results are differentiable once in x, routing weights and biases; a second differentiation
raises RuntimeError, except that of a linear function, which is zero. Dequantised weights are not saved for the backward
pass but recomputed.

Casts raise TypeError. torch would cast FP8 codes or scales separately, which changes the weights silently. Call the
modules with x in the compute dtype instead.
"""

from moe.quantized.base import Quantized as Quantized
from moe.quantized.base import QuantizedExperts as QuantizedExperts
from moe.quantized.fp8 import FP8Experts as FP8Experts
from moe.quantized.fp8 import FP8Linear as FP8Linear
from moe.quantized.int8 import Int8Experts as Int8Experts
from moe.quantized.int8 import Int8Linear as Int8Linear
from moe.quantized.mxfp4 import MXFP4Experts as MXFP4Experts
