"""Bfloat16 weights in oneDNN's own layout, and products with them; without gradients, on a CPU.

A product with few rows takes as long as reading the weights, and oneDNN reads its own layout faster. Time relative to
`F.linear`, bfloat16, one core of an Intel Xeon with AVX-512 BF16, weights of 4096 x 1024 and 1024 x 512 in memory: 0.56
and 0.75 with one row, 0.72 and 0.76 with 8, 0.88 and 0.92 with 32. In float32 it gains nothing.
"""

import torch
from torch import Tensor

from moe.ops.matmul import least_widened, product

# Larger matrices are not converted to float32, which would take 256 MiB.
_MOST_CONVERTED = 2**26


def can_pack() -> bool:
    """Return whether oneDNN packs bfloat16 weights on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a bfloat16 matrix [N, K], neither N nor K zero, into oneDNN's layout; `to_dense` of it is exact."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` with a packed weight [N, K]: x [..., K] and bias [N], both bfloat16, to [..., N].

    Sums accumulate in float32, and the result is rounded once, with the bias added before. Many rows are multiplied in
    float32 where the processor prefers that, see `moe.ops.matmul.least_widened`; converting a packed matrix adds up to
    a fifth to their time.
    """
    least, width = least_widened(x.dtype), packed.shape[1]
    if least is None or min(x.numel() // width, *packed.shape) < least or packed.numel() > _MOST_CONVERTED:
        return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    y = product(x.reshape(-1, width).float(), packed.to_dense(torch.float32).t())
    return (y if bias is None else y.add_(bias)).to(x.dtype).view(*x.shape[:-1], packed.shape[0])
