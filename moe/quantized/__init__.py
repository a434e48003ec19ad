"""Modules that keep quantised weights in memory and turn them into numbers when they are used.

Their results are, bit for bit, those of `nn.Linear` and `moe.layer.Experts` with the dequantised weights in x's dtype.
Quantised weights are frozen: gradients flow to x, to the routing weights and to biases, once: a second differentiation
raises RuntimeError, but for that of a linear function, which is zero. Dequantised weights live within one forward or
backward pass and are computed again in the latter; no graph keeps them.

A cast is refused. torch would round FP8 codes to the new dtype and leave their scales, or cast the scales as well, and
in either case the weights would be others without a word. Call the modules with x in the dtype to compute in instead.
"""

from moe.quantized.base import Quantized as Quantized
from moe.quantized.base import QuantizedExperts as QuantizedExperts
from moe.quantized.fp8 import FP8Experts as FP8Experts
from moe.quantized.fp8 import FP8Linear as FP8Linear
from moe.quantized.mxfp4 import MXFP4Experts as MXFP4Experts
