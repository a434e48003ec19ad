"""Modules that keep quantised weights in memory and dequantise them on use.

Results are bit-identical to those of `moe.linear.Linear` and `moe.layer.Experts` with the dequantised weights in x's
dtype, except that Int8 modules without gradients on a CPU read the codes, which rounds less. Quantised weights are
frozen.
Results are differentiable once in x, routing weights and biases; a second differentiation raises RuntimeError, except
that of a linear function, which is zero. Dequantised weights are not saved for the backward pass but recomputed.

Casts that would change codes or scales raise TypeError, because torch would cast them separately, which changes the
weights silently. Call the modules with x in the compute dtype instead.
"""

from moe.quantized.base import Quantized as Quantized
from moe.quantized.base import QuantizedExperts as QuantizedExperts
from moe.quantized.fp8 import FP8Experts as FP8Experts
from moe.quantized.fp8 import FP8Linear as FP8Linear
from moe.quantized.int8 import Int8Experts as Int8Experts
from moe.quantized.int8 import Int8Linear as Int8Linear
from moe.quantized.mxfp4 import MXFP4Experts as MXFP4Experts
