"""Matrix products, on CPU by the library that is fastest for the dtype and size.

CPU implementations call these instead of `matmul`, which would change the dtype under autocast.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moe.ops.flops import register_formula

_HALF = (torch.bfloat16, torch.float16)

# Elements of a matrix that are converted to float32 at a time, so that they stay in cache.
_CONVERTED = 2**20

_has_onednn = torch.backends.mkldnn.is_available()

if _has_onednn:
    register_formula(torch.ops.mkldnn._linear_pointwise, lambda x, weight, *_: 2 * x.numel() * weight.shape[0])


def _is_intel() -> bool:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return "GenuineIntel" in file.read(4096)
    except OSError:
        return False


_on_intel = _is_intel()


@cache
def least_widened(dtype: torch.dtype) -> int | None:
    """Return the least size of a product in `dtype` that this processor computes faster in float32; None if none.

    Time in bfloat16 / time in float32, conversions included, for weights of 4096 x 1024 on one core of an Intel Xeon
    with AVX-512 BF16: 0.56 with 16 rows, 0.98 with 64, 1.21 with 128, 1.44 with 256. The same processor limited to
    AVX-512 without BF16: 0.98 with 8 rows, 1.47 with 16, 3.6 with 128; limited to AVX2: 1.2, 2.0, 4.8. With AMX, and
    on AMD processors with AVX-512 BF16, products are faster in bfloat16.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    if dtype not in _HALF or known.get("architecture") != "x86_64" or not known.get("avx2"):
        return None
    if dtype == torch.bfloat16:
        if known.get("amx_bf16") or (known.get("avx512_bf16") and not _on_intel):
            return None
        return 128 if known.get("avx512_bf16") else 16
    return None if known.get("amx_fp16") else 16


def prefers_float32(x: Tensor) -> bool:
    """Return whether x is half-precision on a processor that computes large products of its dtype faster in float32."""
    known = x.dtype in _HALF and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return known and not torch.is_autocast_enabled("cpu") and least_widened(x.dtype) is not None


def is_widened(a: Tensor, b: Tensor) -> bool:
    """Return whether a [M, K] @ b [K, N] is computed in float32, because that is faster here than in their dtype."""
    if a.dtype not in _HALF or a.device.type != "cpu":
        return False
    least = least_widened(a.dtype)
    return least is not None and min(*a.shape, b.shape[1]) >= least


def widened_parts(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, their product in float32) of a [M, K] @ b [K, N]; b is converted in parts."""
    a, size = a.float(), max(_CONVERTED // max(b.shape[0], 1), 1)
    for start in range(0, b.shape[1], size):
        columns = slice(start, min(start + size, b.shape[1]))
        yield columns, product(a, b[:, columns].float())


def is_faster(a: Tensor, b: Tensor) -> bool:
    """Return whether `product` of a [M, K] and b [K, N] is faster here than `F.linear`."""
    return is_widened(a, b) or _is_transposed(a, b) or (not _on_intel and _by_onednn(a, b))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a [M, K] @ b [K, N] -> [M, N] in the dtype of `a`, any strides, accumulating in float32 or wider."""
    if _is_transposed(a, b):
        return torch.mm(b.t(), a.t().contiguous()).t().contiguous()
    if _by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise.default(a, b.t(), None, "none", [], "")
    return _mm_into(a.new_empty(a.shape[0], b.shape[1]), a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write `product` to `out` [M, N]; K = 0 gives zeros."""
    if _is_transposed(a, b) or _by_onednn(a, b):
        return out.copy_(product(a, b))
    return _mm_into(out, a, b)


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # On most processors, float16 products of layouts other than x @ W.T are a hundred times slower than in float32.
    if is_widened(a, b) or (a.dtype == torch.float16 and a.device.type == "cpu"):
        for columns, part in widened_parts(a, b):
            out[:, columns] = part
        return out
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


def most_grouped(dtype: torch.dtype, small: int, few: int) -> int:
    """Return up to how many rows a group is multiplied by `mm` with others: `small` if its product is, otherwise `few`.

    Fewer if `product` is faster than `mm`: in half precision that is widened, and in float32 by oneDNN.
    """
    if dtype == torch.float32 and _has_onednn and not _on_intel:
        return small
    least = least_widened(dtype)
    return max(small, few) if least is None else min(max(small, few), least - 1)


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


def _is_transposed(a: Tensor, b: Tensor) -> bool:
    """Return whether MKL multiplies x W^T faster as (W x^T)^T: float32 on Intel, a few rows by a large matrix.

    With 8 to 48 rows it takes 0.54 to 0.85 of the time for weights of 8192 x 1024, and 0.60 to 0.85 for 1024 x 2048;
    twice the time with 2 or 3 rows.
    """
    return (
        8 <= a.shape[0] < 64
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and _on_intel
        and b.stride(0) == 1
        and b.shape[0] * b.shape[1] >= 2**20
    )


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN is faster than MKL here: float32 on AMD processors (twice), and x @ W.T on Intel's.

    A call takes ten microseconds longer, which pays off from a million multiplications.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _has_onednn or (_on_intel and b.stride(0) != 1):
        return False
    return a.shape[0] * a.shape[1] * b.shape[1] >= 2**20
