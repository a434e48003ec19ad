"""The CPU's causal attention in blocks against torch's."""

import pytest
import torch
import torch.nn.functional as F

from moe.attention import HALF_BLOCK, WIDE_BLOCK, attend
from tests.support.bound import against_eager


@pytest.mark.parametrize("length", [2, WIDE_BLOCK - 1, WIDE_BLOCK, WIDE_BLOCK + 1, 2 * WIDE_BLOCK + 5])
def test_value_and_gradients(length):
    torch.manual_seed(0)
    q, k = (torch.randn(2, length, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, length, 3, 6, dtype=torch.float64, requires_grad=True)
    found = attend(q, k, v, None, 0.3)
    by_head = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], is_causal=True, scale=0.3)
    expected = expected.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    weight = torch.randn_like(expected)
    for mine, other in zip(
        *(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("prefers_float32", [False, True], ids=["as they are", "in float32"])
@pytest.mark.parametrize("length", [2, HALF_BLOCK - 1, HALF_BLOCK + 1, 2 * HALF_BLOCK + 5])
def test_half_precision(length, prefers_float32, monkeypatch):
    """Whichever precision the processor multiplies in, the error is at most twice the definition's in bfloat16."""
    monkeypatch.setattr("moe.attention.prefers_float32", lambda x: prefers_float32 and x.dtype == torch.bfloat16)
    torch.manual_seed(0)
    q, k = (torch.randn(2, length, 3, 8).bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(2, length, 3, 6).bfloat16().requires_grad_()
    grad = torch.randn(2, length, 18).bfloat16()

    def definition(q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) * 0.3
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v).flatten(2)

    def results(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(dtype))]

    found = results(lambda q, k, v: attend(q, k, v, None, 0.3), torch.bfloat16)
    eager, exact = results(definition, torch.bfloat16), results(definition, torch.float64)
    for mine, plain, right in zip(found, eager, exact, strict=True):
        verdict = against_eager(mine, plain, right, torch.bfloat16)
        assert verdict.right, verdict
    with torch.no_grad():
        assert attend(q, k, v, None, 0.3).equal(found[0])


def test_long_sequences_keep_no_probabilities_for_training():
    """Beyond 1,024 tokens a training pass goes through the fused kernel, whose memory is linear in the length."""
    q = torch.randn(1, 1025, 1, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend(q, q, q, None, 0.3)
    assert sum(saved) < 20 * q.numel()


def test_later_tokens_change_nothing():
    q, k, v = (torch.randn(1, 300, 2, 8) for _ in range(3))
    before = attend(q, k, v, None, 0.3)
    k[:, 200:], v[:, 200:] = 1e4, 1e4
    assert torch.equal(attend(q, k, v, None, 0.3)[:, :200], before[:, :200])
