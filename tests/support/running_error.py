"""Running error analysis of `moe_mlp`: how far each computed number may be from the exact one, by arithmetic alone.

`against_eager` (bound.py) measures the error of another implementation, which says little where there are few
numbers: they may be exact by luck on one processor. This bound adds every rounding at its worst, so that it holds for
every processor, instruction set, order of summation and number of threads. It is proportional to the length of a sum,
whereas errors grow with its square root: it is sharp for few and short sums, eager is sharper for many long ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.ops import SwiGLU
from tests.support.bound import UNIT, against_eager, excess
from tests.support.cases import Inputs

MANY = 64  # numbers, from which on their mean square says more about an implementation's error than luck does


@dataclass(frozen=True)
class Computed:
    """Exact values in float64 and, for each, a bound on the error of the computed value."""

    exact: Tensor
    error: Tensor

    @staticmethod
    def given(tensor: Tensor) -> "Computed":
        """An input: the exact and the computed result both start from it."""
        return Computed(tensor.double(), torch.zeros_like(tensor, dtype=torch.float64))

    @property
    def largest(self) -> Tensor:
        return self.exact.abs() + self.error

    @property
    def T(self) -> "Computed":
        return Computed(self.exact.T, self.error.T)

    def __getitem__(self, index: Any) -> "Computed":
        return Computed(self.exact[index], self.error[index])

    def put(self, index: Any, values: "Computed") -> None:
        self.exact[index], self.error[index] = values.exact, values.error

    def __add__(self, other: "Computed | float") -> "Computed":
        other = other if isinstance(other, Computed) else Computed.given(self.exact.new_tensor(other))
        return Computed(self.exact + other.exact, self.error + other.error)

    def __mul__(self, other: "Computed | float") -> "Computed":
        other = other if isinstance(other, Computed) else Computed.given(self.exact.new_tensor(other))
        return Computed(self.exact * other.exact, self.largest * other.error + self.error * other.exact.abs())

    def rounded(self, dtype: torch.dtype, times: int = 1) -> "Computed":
        """Adds `times` roundings to `dtype`; below its smallest normal number a rounding's error is absolute."""
        return Computed(self.exact, self.error + times * UNIT[dtype] * (self.largest + torch.finfo(dtype).tiny))

    def increasing(self, function: Callable[[Tensor], Tensor]) -> "Computed":
        """An increasing function, of which the values at the ends of an interval bound those inside."""
        exact = function(self.exact)
        low, high = function(self.exact - self.error), function(self.exact + self.error)
        return Computed(exact, torch.maximum(high - exact, exact - low))

    def within(self, low: float, high: float) -> "Computed":
        """1 between the limits and at them, else 0. A computed value near a limit may be on its other side."""
        near = torch.minimum((self.exact - low).abs(), (self.exact - high).abs()) <= self.error
        return Computed(((low <= self.exact) & (self.exact <= high)).double(), near.double())

    def sum(self, dim: int, dtype: torch.dtype) -> "Computed":
        """The sum over `dim`, accumulated in `dtype` in any order."""
        accumulation = 2 * self.exact.shape[dim] * UNIT[dtype] * self.largest.sum(dim)
        return Computed(self.exact.sum(dim), self.error.sum(dim) + accumulation)


def product(a: Computed, b: Computed, dtype: torch.dtype) -> Computed:
    """a @ b, accumulated in float32 or wider and rounded once to `dtype`: `product_limit` for operands with errors."""
    accumulation = 2 * a.exact.shape[1] * UNIT[torch.promote_types(dtype, torch.float32)] * (a.largest @ b.largest)
    error = a.largest @ b.error + a.error @ b.exact.abs()
    return Computed(a.exact @ b.exact, error + accumulation).rounded(dtype)


def moe_mlp_errors(i: Inputs, grad: Tensor, activation: SwiGLU = SwiGLU()) -> dict[str, Computed]:
    """`moe_mlp` and its gradients under the names y, x, gate_up, down, weights, gate_up_bias and down_bias.

    Every matrix that one product writes and another reads is rounded to the inputs' dtype, and so is each step of
    SwiGLU. Sums accumulate in float32 or wider. For float64 inputs the errors are doubled, because the exact values are
    computed in float64 as well.
    """
    dtype, wide = i.x.dtype, torch.promote_types(i.x.dtype, torch.float32)
    limit = torch.inf if activation.limit is None else activation.limit
    x, gate_up, down, weights, gate_up_bias, down_bias = map(Computed.given, i.differentiable)
    y_grad, width, hidden = Computed.given(grad), i.down.shape[1], i.down.shape[2]
    rows, grad_rows = (Computed.given(i.x.new_zeros(*i.expert_ids.shape, width)) for _ in range(2))
    names = ("gate_up", "down", "weights", "gate_up_bias", "down_bias")
    found = {name: Computed.given(torch.zeros_like(getattr(i, name))) for name in names}
    for e in range(len(i.gate_up)):
        here = (i.expert_ids == e).nonzero(as_tuple=True)
        token = here[0]
        weight, g = weights[(*here, None)], y_grad[token]
        pre = (product(x[token], gate_up[e].T, dtype) + gate_up_bias[e]).rounded(dtype)
        gate, up = pre[:, :hidden], pre[:, hidden:]
        gate_inside, up_inside = gate.within(-torch.inf, limit), up.within(-limit, limit)
        gate = gate.increasing(lambda t: t.clamp(max=limit))
        up = (up.increasing(lambda t: t.clamp(-limit, limit)) + activation.beta).rounded(dtype)
        scaled = gate if activation.alpha == 1 else (gate * activation.alpha).rounded(dtype)
        sigmoid = scaled.increasing(torch.sigmoid).rounded(dtype, 4)
        silu = (gate * sigmoid).rounded(dtype)
        act = (silu * up).rounded(dtype)
        row = (product(act, down[e].T, dtype) + down_bias[e]).rounded(dtype)
        rows.put(here, (row * weight).rounded(wide))

        grad_act = product(g, down[e], dtype)
        dots = (grad_act * act).rounded(wide).sum(1, wide) + (g * down_bias[e]).rounded(wide).sum(1, wide)
        found["weights"].put(here, dots.rounded(wide))
        grad_act = (grad_act * weight).rounded(dtype)
        slope = (sigmoid * (scaled * (sigmoid * -1 + 1) + 1)).rounded(dtype, 4)
        grad_gate = ((grad_act * up).rounded(dtype) * slope).rounded(dtype) * gate_inside
        grad_up = (grad_act * silu).rounded(dtype) * up_inside
        grad_pre = Computed(*(torch.cat([getattr(t, n) for t in (grad_gate, grad_up)], 1) for n in ("exact", "error")))
        grad_rows.put(here, product(grad_pre, gate_up[e], dtype))
        found["gate_up"].put(e, product(grad_pre.T, x[token], dtype))
        found["gate_up_bias"].put(e, grad_pre.sum(0, wide).rounded(dtype))
        found["down"].put(e, product(g.T, (act * weight).rounded(dtype), dtype))
        found["down_bias"].put(e, (g * weight).rounded(wide).sum(0, wide).rounded(dtype))
    found = {"y": rows.sum(1, wide).rounded(dtype), "x": grad_rows.sum(1, wide).rounded(dtype), **found}
    twice = 2 if dtype == torch.float64 else 1
    return {name: Computed(result.exact, twice * result.error) for name, result in found.items()}


def beyond(found: dict[str, Tensor], errors: dict[str, Computed]) -> dict[str, float]:
    """The results with an element beyond its error, and by what factor the worst of each is."""
    factors = {name: excess(result, errors[name].exact, errors[name].error) for name, result in found.items()}
    return {name: factor for name, factor in factors.items() if not factor <= 1}


def complaints(
    inputs: Inputs,
    found: dict[str, Tensor],
    errors: dict[str, Computed],
    exact: dict[str, Tensor],
    eager: Callable[[], dict[str, Tensor]],
) -> list[str]:
    """Lists the errors in results of `moe_mlp`, one line each; `exact` are those of another implementation in float64.

    No element may be beyond its running error. Where there are `MANY` slots and numbers, the error is at most twice
    that of eager, too.
    """
    of_others = {name: Computed(exact[name], errors[name].error) for name in found}
    lines = [f"{name}: {factor:.3g} times its running error" for name, factor in beyond(found, of_others).items()]
    many = [name for name in found if min(inputs.expert_ids.numel(), exact[name].numel()) >= MANY]
    theirs = eager() if many else {}
    for name, result in found.items():
        verdict = against_eager(result, theirs[name], exact[name], inputs.x.dtype) if name in many else None
        if verdict is not None and not verdict.right:
            lines.append(f"{name}: {verdict}")
    return lines
