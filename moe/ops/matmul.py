"""Matrix products, on CPU by the library that is fastest for the dtype and size.

CPU implementations call these instead of `matmul`, which would change the dtype under autocast.
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
    """Multiply a [M, K] @ b [K, N] -> [M, N] in the dtype of `a`, any strides, accumulating in float32 or wider."""
    if _by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    if a.dtype == torch.float16 and a.device.type == "cpu":
        # On most processors, float16 products of layouts other than x @ W.T are a hundred times slower than this.
        return product(a.float(), b.float()).to(a.dtype)
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write `product` to `out` [M, N]; K = 0 gives zeros."""
    if _by_onednn(a, b) or (a.dtype == torch.float16 and a.device.type == "cpu"):
        return out.copy_(product(a, b))
    return torch.mm(a, b, out=out)


def can_group(*weights: Tensor) -> bool:
    """Return whether torch's CPU grouped product, a C++ loop of `mm`, supports these stacked matrices."""
    return all(
        w.device.type == "cpu"
        and w.dtype in (torch.float32, torch.bfloat16)  # float16 would use the slow products
        and w.is_contiguous()
        and w.data_ptr() % 16 == 0
        and all(size * w.dtype.itemsize % 16 == 0 for size in w.shape[1:])
        for w in weights
    )


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows of a [R, K] by its matrix of b [G, K, N] -> [R, N]; `ends` [G] ends each group."""
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
    """Write a.T @ b of each group's rows, a [R, M] and b [R, N], to out [G, M, N]."""
    if len(out) == 1:
        product_into(out[0], a.t(), b)
    else:
        out.copy_(_without_autocast(a.t(), b, ends))


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN is faster than MKL here: float32 on AMD processors (twice), and x @ W.T on Intel's.

    A call takes ten microseconds longer, which pays off from a million multiplications.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _has_onednn or (_on_intel and b.stride(0) != 1):
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= 2**20
