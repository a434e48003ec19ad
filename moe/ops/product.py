"""One matrix product on CPU, on whichever of torch's libraries is fastest for its dtype and layout.

Kernels call these and never a plain `matmul`: autocast, which may be on while a kernel runs, would change its dtype.
"""

import torch
from torch import Tensor

_onednn_linear = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in the dtype of `a`, any strides, accumulated in float32 or wider."""
    if a.dtype == torch.float32 and _onednn_linear is not None and a.numel() and b.numel():
        # The float32 product of MKL runs at half the speed of oneDNN's on AMD processors, for one row as for hundreds.
        return _onednn_linear(a, b.t(), None, "none", [], "")
    return product_into(a.new_empty(a.shape[0], b.shape[1]), a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`product` written to `out` [M, N]; K = 0 gives zeros."""
    if a.dtype == torch.float16:
        # Half-precision products of layouts other than x @ W.T are a hundred times slower than this on most processors.
        return out.copy_(product(a.float(), b.float()))
    if a.dtype == torch.float32 and _onednn_linear is not None and a.numel() and b.numel():
        return out.copy_(_onednn_linear(a, b.t(), None, "none", [], ""))
    return torch.mm(a, b, out=out)
