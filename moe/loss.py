"""The language-model loss."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ops.library import differentiable_once, index_error

IGNORED = -100
"""The label of a position that is not predicted."""


@dataclass(frozen=True)
class Mean:
    """A scalar, and an int64 scalar: over how many it is the mean. Ranks with unequal counts weigh theirs by it."""

    value: Tensor
    count: Tensor


@dataclass(frozen=True)
class Term:
    """One term of the loss, which is the sum of weight * mean over all terms.

    Terms of one name, of several layers for example, are reported as the sum of their means.

    Attributes:
        depth: 0 in the model itself, k + 1 in its module mtp.k. Terms of one name and depth have one count.
    """

    name: str
    mean: Mean
    weight: float = 1.0
    depth: int = 0

    @property
    def key(self) -> str:
        """Name of the term's count; see `moe.Transformer.loss_counts`."""
        return count_key(self.name, self.depth)


def count_key(name: str, depth: int) -> str:
    return f"{name}.{depth}"


def taking_part(depth: int, real: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """bool [B, S - depth], True at i if all tokens from i to i + depth are real and of one document; None for all.

    That is what a position sees at this depth (see `Term`): mtp.k sees k + 1 tokens more than the model.
    """
    mask = None if real is None else real.unfold(1, depth + 1, 1).all(-1)
    if document_ids is None or depth == 0:
        return mask
    seen = document_ids.unfold(1, depth + 1, 1)
    own = (seen == seen[..., :1]).all(-1)
    return own if mask is None else mask & own


def targets(
    labels: Tensor, ahead: int, length: int, document_ids: Tensor | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(target [B, length], how many are predicted): at i the label of i + ahead, -100 where nothing is predicted.

    Left out are labels of -100, beyond the end, or in another document, and positions i outside token_mask [B, length].
    """
    target = labels[:, ahead:]
    if document_ids is not None:
        target = target.masked_fill(document_ids[:, ahead:] != document_ids[:, : target.shape[1]], IGNORED)
    target = F.pad(target, (0, length - target.shape[1]), value=IGNORED)
    if token_mask is not None:
        target = target.masked_fill(~token_mask, IGNORED)
    return target, (target != IGNORED).sum()


def next_token_loss(
    logits: Tensor, labels: Tensor, ahead: int, document_ids: Tensor | None, token_mask: Tensor | None
) -> Mean:
    """Mean cross entropy, in fp32 at least, of logits [B, S', V] at i against labels [B, S] at i + ahead.

    Over what `targets` predicts, as many positions as there are logits (a shorter slice of the logits would cost a copy
    in the backward pass); 0 when nothing is predicted. A label that is predicted and neither -100 nor in [0, V) raises
    IndexError (on CPU; a device assertion on CUDA).
    """
    target, count = targets(labels, ahead, logits.shape[1], document_ids, token_mask)
    try:
        total = _CrossEntropy.apply(logits.flatten(0, 1), target.flatten())
    except (IndexError, RuntimeError) as error:
        whole = F.pad(target, (ahead, 0), value=IGNORED)  # at the places that the labels have
        raise index_error("labels", whole, logits.shape[-1], IGNORED, error) from None
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
        ignored = target == IGNORED
        # Nothing else is replaced: torch refuses a label out of range, on every device.
        picked = log_p.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
        total = -picked.masked_fill(ignored, 0).sum()
        # log_p has no graph, nor are the logits kept: the result says that the gradient depends on them.
        ctx.save_for_backward(log_p, target, total)
        return total

    @staticmethod
    @differentiable_once("next_token_loss")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None]:
        """(softmax - one-hot) * grad, zero for ignored rows."""
        log_p, target, _ = saved
        ignored = target == IGNORED
        p, at = log_p.exp(), target.masked_fill(ignored, 0).unsqueeze(-1)
        p.scatter_(-1, at, p.gather(-1, at) - 1)
        p.mul_(grad.masked_fill(ignored, 0).unsqueeze(-1))
        return p.to(ctx.dtype), None
