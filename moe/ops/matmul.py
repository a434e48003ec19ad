"""One matrix product, on CPU by whichever of torch's libraries is fastest for its dtype and size.

Kernels call these and never a plain `matmul`: autocast, which may be on while a kernel runs, would change its dtype.
"""

from pathlib import Path

import torch
from torch import Tensor

_has_onednn = torch.backends.mkldnn.is_available()


def _is_intel() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return "GenuineIntel" in file.read(4096)
    except OSError:
        return False


_on_intel = _is_intel()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in the dtype of `a`, any strides, accumulated in float32 or wider."""
    if _by_onednn(a, b):
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


def can_group(*weights: Tensor) -> bool:
    """Whether torch's grouped product takes these stacked matrices, on the CPU, where it is a loop of `mm` in C++."""
    return all(
        w.device.type == "cpu"
        and w.dtype in (torch.float32, torch.bfloat16)  # in half precision the loop would be the slow one
        and w.is_contiguous()
        and w.data_ptr() % 16 == 0
        and all(size * w.dtype.itemsize % 16 == 0 for size in w.shape[1:])
        for w in weights
    )


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [R, K] @ b [G, K, N] -> [R, N], each group of rows, up to its end, with its matrix."""
    if len(b) == 1:
        return product(a, b[0])
    return _without_autocast(a, b, ends)


def _without_autocast(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.grouped_mm(a, b, offs=ends)
    with torch.autocast("cpu", enabled=False):
        return torch.nn.functional.grouped_mm(a, b, offs=ends)


def grouped_product_into(out: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> None:
    if len(b) == 1:
        product_into(out, a, b[0])
    else:
        out.copy_(grouped_product(a, b, ends))


def group_products_into(out: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> None:
    """out [G, M, N]: a.T @ b of each group's rows, a [R, M] and b [R, N]."""
    if len(out) == 1:
        product_into(out[0], a.t(), b)
    else:
        out.copy_(_without_autocast(a.t(), b, ends))


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """On AMD processors MKL's float32 product runs at half the speed of oneDNN's; on Intel's only x @ W.T is faster so.

    A call costs ten microseconds more than MKL's: made good at a million multiplications, where nothing is empty.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _has_onednn or (_on_intel and b.stride(0) != 1):
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= 2**20
