"""One matrix product, on CPU by whichever of torch's libraries is fastest for its dtype and size.

Kernels call these and never a plain `matmul`: autocast, which may be on while a kernel runs, would change its dtype.
"""

import torch
from torch import Tensor

_has_onednn = torch.backends.mkldnn.is_available()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in the dtype of `a`, any strides, accumulated in float32 or wider."""
    if _by_onednn(a, b):
        # On AMD processors the float32 product of MKL runs at half the speed of this one.
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    if a.dtype == torch.float16 and a.device.type == "cpu":
        # Half-precision products of layouts other than x @ W.T are a hundred times slower than this on most processors.
        return product(a.float(), b.float()).to(a.dtype)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`product` written to `out` [M, N]; K = 0 gives zeros."""
    if _by_onednn(a, b) or (a.dtype == torch.float16 and a.device.type == "cpu"):
        return out.copy_(product(a, b))
    return torch.mm(a, b, out=out)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    # A call costs ten microseconds more than MKL's: made good at a million multiplications, where nothing is empty.
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _has_onednn:
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= 2**20
