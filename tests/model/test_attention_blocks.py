"""The CPU's causal attention in blocks against torch's."""

import pytest
import torch
import torch.nn.functional as F

from moe.attention import QUERY_BLOCK, attend


@pytest.mark.parametrize("length", [2, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 5])
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
