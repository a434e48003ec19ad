"""Where the time of a call goes, by kind of operator."""

import re
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# Matrix products, also of oneDNN and of int8 weights. Those of decode attention are among them.
_PRODUCTS = re.compile(
    r"::(mm|mv|addmm|addmv|bmm|baddbmm|dot|_grouped_mm|_int_mm|_weight_int8pack_mm|mkldnn_linear|_linear_pointwise)$"
)
_ATTENTION = re.compile("scaled_dot_product|softmax")
PARTS = ("products", "attention", "other operators", "outside operators")


def kind_of(operator: str) -> str:
    """Return the part to which the time of an operator, without the operators that it calls, belongs."""
    if _PRODUCTS.search(operator):
        return "products"
    return "attention" if _ATTENTION.search(operator) else "other operators"


def parts(call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Return the fraction of `seconds`, the duration of the call, that each of `PARTS` takes.

    "attention" is fused attention and softmax. What no operator accounts for is outside: Python, NumPy, and the
    dispatch of operators. The call is profiled once. Profiling delays small operators, so the fractions of a call of
    many small operators are too high, except for the last.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    times: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for event in found.key_averages():
        if "::" in event.key:
            times[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    total = max(seconds, sum(times.values()))
    times["outside operators"] = total - sum(times.values())
    return {part: time / total for part, time in times.items()}
