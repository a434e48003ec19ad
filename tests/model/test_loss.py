"""The language-model loss against torch's own cross entropy."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moe.loss import next_token_loss, taking_part, targets


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


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("outer", [lambda loss: loss, torch.exp], ids=["alone", "inside"])
def test_a_second_derivative_is_refused(outer, checkpointed):
    """For a leaf and for what precedes the logits, whether or not the outgoing gradient has a graph."""
    labels = torch.randint(9, (1, 4))
    hidden = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def value(logits: Tensor) -> Tensor:
        return outer(next_token_loss(logits, labels, 1, None, None).value)

    leaf = (hidden @ head).detach().requires_grad_()
    for leaves, logits in (((hidden, head), hidden @ head), ((leaf,), leaf)):
        loss = checkpoint(value, logits, use_reentrant=False) if checkpointed else value(logits)
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(grads, plain, strict=True))
        for grad in grads:
            for wanted in leaves:
                with pytest.raises(RuntimeError, match="next_token_loss: differentiable once, and this is a second"):
                    torch.autograd.grad(grad.square().sum(), wanted, retain_graph=True)


def test_logits_are_not_kept():
    """It saves log-probabilities, targets and one number."""
    logits, saved = torch.randn(2, 5, 9, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = next_token_loss(logits, torch.randint(9, (2, 5)), 1, None, None).value
    assert loss.requires_grad
    assert all(t.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr() for t in saved)
    assert sum(t.numel() for t in saved if t.is_floating_point()) <= logits.numel() + 5


def test_compiled():
    logits = torch.randn(1, 4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(9, (1, 4))
    eager = next_token_loss(logits, labels, 1, None, None).value
    compiled = torch.compile(next_token_loss, backend="aot_eager", fullgraph=True)(logits, labels, 1, None, None).value
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (eager, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("label", [-1, -99, -101, 11, 2**40])
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_label_out_of_range_is_named(label, ahead):
    """Labels that are left out may be anything: before the first target, and in another document."""
    logits, labels = torch.randn(2, 8 - (ahead - 1), 11), torch.randint(11, (2, 8))
    documents = torch.tensor([[0] * 8, [0] * 4 + [1] * 4])
    real = torch.ones(logits.shape[:2], dtype=torch.bool)
    real[0, 5] = False
    labels[0, ahead - 1] = labels[1, 4] = labels[0, 5 + ahead] = label
    labels[0, 4] = -100
    assert next_token_loss(logits, labels, ahead, documents, real).value.isfinite()
    labels[1, 3] = label
    with pytest.raises(IndexError, match=rf"^labels\[1, 3\] = {label}: expected 0 to 10, or -100$"):
        next_token_loss(logits, labels, ahead, documents, real)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_labels_without_data_are_not_read(device):
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        logits, labels = torch.randn(2, 5, 9, requires_grad=True), torch.randint(-1, 9, (2, 5))
        next_token_loss(logits, labels, 1, None, None).value.backward()
        assert logits.grad is not None and logits.grad.shape == logits.shape


def test_targets_are_those_of_the_loss():
    labels = torch.tensor([[5, 6, -100, 8, 9, 1], [3, 1, 4, 1, 5, 9]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 1, 1]])
    target, count = targets(labels, 1, 6, documents, None)
    assert target.tolist() == [[6, -100, 8, -100, 1, -100], [-100, -100, -100, 5, 9, -100]] and count == 5
    part = taking_part(2, labels.new_ones(2, 6).bool(), documents)
    assert part is not None
    assert part.tolist() == [[True, True, False, False], [False] * 3 + [True]], "the second row's begin in turns"
    target, count = targets(labels, 3, 4, documents, part)
    assert target.tolist() == [[8, -100, -100, -100], [-100] * 4] and count == 1
