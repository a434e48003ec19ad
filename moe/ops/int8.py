"""Int8 weights with one scale per output row: quantisation, and products that read the codes.

The products are operators without a gradient, for inference on a CPU. Decoding one token reads each weight that it uses
once, so its time is that of reading them: one byte per weight instead of two.
"""

import math

import torch
from torch import Tensor

from moe.config import SwiGLU
from moe.ops.library import define, has_values
from moe.ops.matmul import product
from moe.ops.mlp import Products, mlp_by_expert
from moe.ops.permutation import count_slots

INT8_MAX = 127

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Up to this many rows, torch's operator is faster than converting the codes for a product.
_PACKED_ROWS = 16
# Codes that are converted at one time.
_CHUNK = 2**22


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weights [..., N, K] to (int8 codes [..., N, K], bfloat16 scale [..., N]), for `dequantize_int8`.

        scale = amax(|row|) / 127, at least 2^-126, rounded to bfloat16; 1 for a row of zeros
        code  = weight / scale, to the nearest integer, ties to even, from -127 to 127

    weight is float32, float64, bfloat16 or float16. The error of each element is at most scale / 2. The scale is
    rounded before the codes are computed, so that torch's operator, which requires it in the dtype of x, adds no error.
    Rows that are integers from -127 to 127 times a bfloat16, and contain +-127, are restored exactly. Besides the
    result, copies of at most 4 Mi elements or one row are in memory. The scales are read on the host once.

    Raises TypeError for other dtypes. Raises ValueError for fewer than two dimensions, and for NaN, infinity or values
    above bfloat16's range, with the row.
    """
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight: expected float32, float64, bfloat16 or float16; found {weight.dtype}")
    if weight.dim() < 2:
        raise ValueError(f"weight: expected [..., N, K]; found {tuple(weight.shape)}")
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.ones(weight.shape[:-1], dtype=torch.bfloat16, device=weight.device)
    if not weight.numel():
        return codes, scale
    width, wide = weight.shape[-1], torch.promote_types(weight.dtype, torch.float32)
    count = max(1, _CHUNK // width)
    matrices = weight.reshape(-1, width), codes.view(-1, width), scale.view(-1)
    for rows, code, factor in zip(*(matrix.split(count) for matrix in matrices), strict=True):
        rows = rows.to(wide)
        amax = rows.abs().amax(dim=1)
        factor.copy_(torch.where(amax == 0, 1.0, (amax / INT8_MAX).clamp_min(2.0**-126)))
        code.copy_((rows / factor[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX))
    bad = scale.isfinite().logical_not_()
    if has_values(bad) and bad.any():
        raise ValueError(f"weight{bad.nonzero()[0].tolist()}: NaN, infinity or too large; {int(bad.sum())} such rows")
    return codes, scale


def dequantize_int8(
    codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None
) -> Tensor:
    """Multiply int8 codes [..., N, K] by the bfloat16 scales [..., N] of their rows: [..., N, K].

    The products are exact in float32 and float64, and rounded once to bfloat16 or float16, where they may be infinite.
    If given, `out` [..., N, K], any strides, is filled and returned, and `dtype` is ignored. No gradient. Raises
    TypeError for wrong dtypes, ValueError for wrong shapes.
    """
    _check_codes(codes, scale)
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, float64, bfloat16 or float16; found {out.dtype}")
    return out.copy_(codes).mul_(scale.unsqueeze(-1))


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply x [..., K] by int8 weights: [..., N] in x's dtype, float32, float64, bfloat16 or float16.

        y = (x @ codes.T) * scale        codes int8 [N, K], scale bfloat16 [N]

    Sums accumulate in float32 or wider. They are rounded to x's dtype before and after the multiplication by the scale;
    for up to 16 rows in bfloat16, and in float16, only afterwards. In other cases the sum must not overflow before it
    is scaled. No gradient.

    Raises TypeError for wrong dtypes, ValueError for wrong shapes.
    """
    _check_codes(codes, scale)
    _check_dtype(x)
    if codes.dim() != 2 or x.dim() == 0 or x.shape[-1] != codes.shape[1]:
        raise ValueError(f"x: expected [..., K] for codes [N, K] = {list(codes.shape)}; found {tuple(x.shape)}")
    return _INT8_LINEAR(x, codes, scale)


def int8_mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: SwiGLU,
) -> Tensor:
    """Compute `moe.ops.moe_mlp` of checked arguments with int8 weights, by the products of `int8_linear`.

    gate_up int8 [E, 2F, D] and down int8 [E, D, F] have bfloat16 scales [E, 2F] and [E, D]. No gradient.
    """
    _check_dtype(x)
    experts = gate_up, gate_up_scale, down, down_scale
    biases, settings = (gate_up_bias, down_bias), (activation.limit, activation.alpha, activation.beta)
    return _INT8_MLP(x, *experts, weights, expert_ids, *biases, *settings)


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16; found {x.dtype}")


def _check_codes(codes: Tensor, scale: Tensor) -> None:
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected int8; found {codes.dtype}")
    if scale.dtype != torch.bfloat16:
        raise TypeError(f"scale: expected bfloat16; found {scale.dtype}")
    if codes.dim() < 2 or scale.shape != codes.shape[:-1]:
        raise ValueError(f"scale: expected [..., N] for codes {list(codes.shape)}; found {tuple(scale.shape)}")


def _product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Compute `int8_linear` of x [T, K]."""
    if _can_pack(x, codes):
        return torch.ops.aten._weight_int8pack_mm.default(x, codes, scale)
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype  # unscaled sums may exceed float16
    count = max(1, _CHUNK // max(codes.shape[1], 1))
    y = torch.cat([product(x.to(wide), part.to(wide).t()) for part in codes.split(count)], dim=1)
    return y.mul_(scale).to(x.dtype)


def _can_pack(x: Tensor, codes: Tensor) -> bool:
    """Return whether torch's operator is fast and correct for these operands.

    In bfloat16 it reads whole vectors, aligned, without checks: 16 columns and, on ARM, 4 scales. Other operands crash
    or give wrong values. It indexes the codes with 32 bits. In float32 it is a scalar loop.
    """
    return (
        x.dtype == torch.bfloat16
        and 0 < x.shape[0] <= _PACKED_ROWS
        and codes.shape[0] % 4 == 0
        and codes.shape[1] % 16 == 0
        and 0 < codes.numel() < 2**31
        and x.is_contiguous()
        and codes.is_contiguous()
        and x.data_ptr() % 32 == 0
        and codes.data_ptr() % 16 == 0
    )


def _linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    shape = x.shape[:-1]
    return _product(x.reshape(math.prod(shape), x.shape[-1]), codes, scale).view(*shape, codes.shape[0])


def _linear_fake(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _linear_flops(x: Tensor, codes: Tensor, scale: Tensor) -> int:
    return 2 * x.numel() * codes.shape[0]


def _mlp(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    limit: float | None,
    alpha: float,
    beta: float,
) -> Tensor:
    experts = Products(
        len(gate_up),
        down.shape[2],
        lambda rows, expert: _product(rows, gate_up[expert], gate_up_scale[expert]),
        lambda rows, expert: _product(rows, down[expert], down_scale[expert]),
    )
    return mlp_by_expert(x, experts, weights, expert_ids, gate_up_bias, down_bias, limit, alpha, beta)


def _mlp_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _mlp_flops(x: Tensor, gate_up: Tensor, _: Tensor, down: Tensor, *rest: Tensor) -> int:
    expert_ids = rest[2]
    return 2 * count_slots(expert_ids) * (gate_up[0].numel() + down[0].numel())


_INT8_LINEAR = define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale) -> Tensor",
    kernel_module=None,
    cpu=_linear,
    fake=_linear_fake,
    flops=_linear_flops,
)
_INT8_MLP = define(
    "int8_mlp(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, Tensor weights, "
    "Tensor expert_ids, Tensor? gate_up_bias, Tensor? down_bias, float? limit, float alpha, float beta) -> Tensor",
    kernel_module=None,
    cpu=_mlp,
    fake=_mlp_fake,
    flops=_mlp_flops,
)
