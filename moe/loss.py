"""The language-model loss."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ops.library import differentiable_once


@dataclass(frozen=True)
class Mean:
    """A scalar, and an int64 scalar: over how many it is the mean. Ranks with unequal counts weigh theirs by it."""

    value: Tensor
    count: Tensor


@dataclass(frozen=True)
class Term:
    """One term of the loss, which is the sum of weight * mean over all terms.

    Terms of one name, of several layers for example, are reported as the sum of their means.
    """

    name: str
    mean: Mean
    weight: float = 1.0


def next_token_loss(
    logits: Tensor, labels: Tensor, ahead: int, document_ids: Tensor | None, token_mask: Tensor | None
) -> Mean:
    """Mean cross entropy, in fp32 at least, of logits [B, S', V] at i against labels [B, S] at i + ahead.

    Left out are targets of -100, beyond the end, or in another document, and positions i outside token_mask [B, S'];
    0 when none remains.
    """
    target = labels[:, ahead:]
    if document_ids is not None:
        target = target.masked_fill(document_ids[:, ahead:] != document_ids[:, : target.shape[1]], -100)
    # The targets are made as long as the logits: a shorter slice of the logits would cost a copy in the backward pass.
    target = F.pad(target, (0, logits.shape[1] - target.shape[1]), value=-100)
    if token_mask is not None:
        target = target.masked_fill(~token_mask, -100)
    total = _CrossEntropy.apply(logits.flatten(0, 1), target.flatten())
    count = (target != -100).sum()
    return Mean(total / count.clamp_min(1), count)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross entropy, in fp32 at least, of logits [T, V] and targets [T], -100 ignored.

    As `F.cross_entropy`, whose backward pass writes and reads [T, V] three times more. Differentiable once: a second
    differentiation raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.dtype = logits.dtype
        picked = log_p.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        total = -picked.masked_fill(target == -100, 0).sum()
        # log_p has no graph, nor are the logits kept: the result says that the gradient depends on them.
        ctx.save_for_backward(log_p, target, total)
        return total

    @staticmethod
    @differentiable_once("next_token_loss")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None]:
        """(softmax - one-hot) * grad, zero for ignored rows."""
        log_p, target, _ = saved
        p, at = log_p.exp(), target.clamp_min(0).unsqueeze(-1)
        p.scatter_(-1, at, p.gather(-1, at) - 1)
        p.mul_(grad.masked_fill(target == -100, 0).unsqueeze(-1))
        return p.to(ctx.dtype), None
