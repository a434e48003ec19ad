"""How wrong a result may be, judged against float64 on the same rounded inputs.

A limit is a tensor, one number for each element, and never a tolerance picked by hand: `excess` says by what factor the
worst element breaks it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DTYPES = tuple(UNIT)


def excess(result: Tensor, exact: Tensor, limit: Tensor) -> float:
    """max |result - exact| / limit; infinite where a NaN stands on one side only. At most 1 is right."""
    assert result.shape == exact.shape, f"{tuple(result.shape)} instead of {tuple(exact.shape)}"
    if result.numel() == 0:
        return 0.0
    # Below the smallest normal number a result may be flushed to zero or lose digits.
    limit = limit + torch.finfo(result.dtype).tiny
    ratio = (result.double() - exact).abs() / limit
    ratio = ratio.masked_fill(result.isnan() & exact.isnan(), 0)
    return ratio.nan_to_num(torch.inf).max().item()


def product_limit(exact: Tensor, magnitude: Tensor, inner: int, dtype: torch.dtype) -> Tensor:
    """For A @ B of inner size `inner`: one rounding of the result, float32 accumulation. `magnitude` is |A| @ |B|."""
    accumulation = UNIT[dtype] if dtype == torch.float64 else UNIT[torch.float32]
    return UNIT[dtype] * exact.abs() + 2 * inner * accumulation * magnitude


def elementwise_limit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    return 4 * UNIT[dtype] * exact.abs()


@dataclass(frozen=True)
class Verdict:
    """`worst` and `rms` as multiples of what is allowed; `wrong_rows` that are zero or not zero when they should be."""

    worst: float
    rms: float
    wrong_signs: int
    wrong_rows: int

    @property
    def right(self) -> bool:
        return self.worst <= 1 and self.rms <= 1 and self.wrong_signs == 0 and self.wrong_rows == 0


def against_eager(result: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> Verdict:
    """Judges a chain of operations in `dtype`: at most twice the error of the same chain in plain eager PyTorch.

    Twice in the mean square, and three times at the worst element, with a few roundings besides. Not for a handful of
    numbers, which may come out exact in eager on one processor and not on another: see `running_error.py`.
    For float64 `exact` is eager itself, and 64 roundings of the largest value stand in for its error.
    """
    assert result.shape == exact.shape, f"{tuple(result.shape)} instead of {tuple(exact.shape)}"
    if result.numel() == 0:
        return Verdict(0.0, 0.0, 0, 0)
    unit = UNIT[dtype]
    error = (result.double() - exact).abs()
    eager_error = (eager.double() - exact).abs()
    if dtype == torch.float64:
        eager_error = 64 * unit * exact.abs().max().expand_as(exact)
    limit = (3 * eager_error.max() + 4 * unit * exact.abs().max()).expand_as(exact)
    rms = 2 * eager_error.square().mean().sqrt() + 2 * unit * exact.square().mean().sqrt()
    signs = ((result.double() * exact < 0) & (exact.abs() > limit)).sum()
    rows = exact.flatten(0, -2) if exact.dim() > 1 else exact[:, None]
    zero = (rows == 0).all(dim=1) != (result.reshape(rows.shape) == 0).all(dim=1)
    return Verdict(
        excess(result, exact, limit),
        (error.square().mean().sqrt() / (rms + torch.finfo(result.dtype).tiny)).nan_to_num(torch.inf).item(),
        int(signs),
        int(zero.sum()),
    )
