"""The breakdown of time by kind of operator, on operators as torch names them."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.cpu_profile import PARTS, kind_of, parts

A, B = torch.rand(8, 8), torch.rand(8, 8)
BF16 = torch.rand(64, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: A @ B, "products"),
        (lambda: A @ B[0], "products"),
        (lambda: A[None] @ B[None], "products"),
        (lambda: F.linear(A, B, A[0]), "products"),
        (lambda: torch.ops.aten._weight_int8pack_mm(BF16, torch.ones(64, 64, dtype=torch.int8), BF16[0]), "products"),
        (lambda: torch.ops.mkldnn._linear_pointwise(BF16, BF16, None, "none", [], ""), "products"),
        (lambda: F.scaled_dot_product_attention(A[None, None], B[None, None], B[None, None]), "attention"),
        (lambda: A.softmax(-1), "attention"),
        (lambda: A * B, "other operators"),
        (lambda: A.argsort(), "other operators"),
    ],
)
def test_kinds_of_operators(call, kind):
    """The kind is that of one of the operators, and no other kind of interest occurs."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    kinds = {kind_of(event.key) for event in found.key_averages() if "::" in event.key}
    assert kinds - {"other operators"} == {kind} - {"other operators"}


def test_parts_are_fractions_of_the_duration():
    slow = parts(lambda: A @ B, 1000.0)
    assert tuple(slow) == PARTS and sum(slow.values()) == pytest.approx(1)
    assert 0 < slow["products"] < 0.01 and slow["outside operators"] > 0.99
    fast = parts(lambda: A @ B, 0.0)  # profiling made it slower than it is
    assert sum(fast.values()) == pytest.approx(1) and fast["outside operators"] == 0 < fast["products"]
