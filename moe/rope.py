"""Rotary position embedding: plain and YaRN, interleaved or half layout.

Tables are computed from the config and the positions in every call, and shared by all layers. They are not cached in a
non-persistent buffer, which would be uninitialised after building on the meta device.
"""

import math

import torch
from torch import Tensor

from moe.config import RopeParameters
from moe.ops.library import cast


def mscale(factor: float, m: float) -> float:
    """Return 0.1 m ln(factor) + 1, or 1 if factor <= 1. Source: YaRN (arXiv 2309.00071), with DeepSeek's weight m."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def attention_factor(rope: RopeParameters) -> float:
    """Return the factor that multiplies cos and sin."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    assert rope.factor is not None  # validated
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor, 1.0)


def inverse_frequencies(rope: RopeParameters, dim: int, device: torch.device) -> Tensor:
    """Return rope_theta^(-2i/dim), fp32 [dim / 2]; with YaRN, blended with the same divided by `factor`.

    YaRN keeps frequencies that turn more than beta_fast times over the original length, interpolates those that turn
    less than beta_slow times, and ramps linearly between. As in Hugging Face, it applies at every length, and the fp32
    operations have the same order, because one ulp of a frequency is 0.01 rad at position 160,000.
    """
    wavelength = rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim)
    if rope.rope_type != "yarn":
        return 1.0 / wavelength
    assert rope.factor is not None and rope.original_max_position_embeddings is not None  # validated

    def dimension_with_turns(turns: float) -> float:
        length = rope.original_max_position_embeddings or 1
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_with_turns(rope.beta_fast), dimension_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * wavelength) * (1 - keep) + 1.0 / wavelength * keep


def rope_tables(
    rope: RopeParameters, dim: int, position_ids: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cos, sin [B, S, 1, dim / 2] (1 for heads) of position_ids [B, S], in promote_types(dtype, float32)."""
    frequencies = inverse_frequencies(rope, dim, position_ids.device)
    angle = position_ids[..., None, None] * cast(frequencies, torch.promote_types(dtype, torch.float32))
    factor = attention_factor(rope)
    return (angle.cos(), angle.sin()) if factor == 1.0 else (angle.cos() * factor, angle.sin() * factor)


def rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Return the argument `rotation` of `apply_rope`, for several calls with the same tables; empty if compiling."""
    return () if torch.compiler.is_compiling() else (torch.complex(cos, sin),)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, rotation: Tensor | None = None, *, interleave: bool) -> Tensor:
    """Rotate x [B, S, H, dim] by cos and sin [B, S, 1, dim / 2]; the result has x's shape and dtype.

    `interleave` pairs dimensions (2i, 2i + 1), otherwise (i, i + dim / 2). Computed in fp32 or wider. `rotation` is
    cos + i sin, computed if None.
    """
    if not interleave:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    pairs = cast(x, torch.promote_types(x.dtype, cos.dtype)).contiguous().view(*x.shape[:-1], cos.shape[-1], 2)
    if torch.compiler.is_compiling():  # Inductor generates no code for complex numbers
        a, b = pairs.unbind(-1)
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        rotation = torch.complex(cos, sin) if rotation is None else rotation
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
    return cast(rotated.flatten(-2), x.dtype)
