"""The language-model loss against torch's own cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.loss import next_token_loss


def definition(logits: Tensor, labels: Tensor, ahead: int, documents: Tensor | None, real: Tensor | None) -> Tensor:
    """A loop over positions."""
    losses = []
    for b in range(labels.shape[0]):
        for i in range(labels.shape[1] - ahead):
            same = documents is None or documents[b, i] == documents[b, i + ahead]
            if same and (real is None or real[b, i]) and labels[b, i + ahead] != -100:
                losses.append(F.cross_entropy(logits[b, i], labels[b, i + ahead]))
    return torch.stack(losses).mean() if losses else logits.sum() * 0


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient(ahead, masked):
    torch.manual_seed(0)
    logits = torch.randn(2, 8 - (ahead - 1), 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (2, 8))
    documents, real = None, None
    if masked:
        labels[0, 3] = -100
        documents = torch.tensor([[0] * 5 + [1] * 3, [0] * 8])
        real = torch.arange(logits.shape[1]).expand(2, -1) < torch.tensor([[7], [5]])
    found = next_token_loss(logits, labels, ahead, documents, real).value
    expected = definition(logits, labels, ahead, documents, real)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    (found_grad,) = torch.autograd.grad(3 * found, logits)
    (expected_grad,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-13, atol=1e-16)


def test_nothing_to_predict_is_zero():
    logits = torch.randn(1, 1, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.tensor([[3]]), 1, None, None).value
    loss.backward()
    assert loss == 0 and logits.grad is not None and not logits.grad.any()


def test_half_precision_computes_in_float32_and_gives_its_gradient_back():
    logits = torch.randn(1, 6, 1000, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(1000, (1, 6))
    loss = next_token_loss(logits, labels, 1, None, None).value
    wide = logits.detach().float().requires_grad_()
    expected = next_token_loss(wide, labels, 1, None, None).value
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits)
    (wide_grad,) = torch.autograd.grad(expected, wide)
    assert torch.equal(grad, wide_grad.bfloat16())


def test_twice_backward_gives_the_same():
    logits = torch.randn(1, 4, 9, requires_grad=True)
    loss = next_token_loss(logits, torch.randint(9, (1, 4)), 1, None, None).value
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_compiled():
    logits = torch.randn(1, 4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(9, (1, 4))
    eager = next_token_loss(logits, labels, 1, None, None).value
    compiled = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True)(logits, labels, 1, None, None).value
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (eager, compiled)]
    torch.testing.assert_close(*grads)
