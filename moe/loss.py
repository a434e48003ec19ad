"""Language-model loss."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ops.library import differentiable_once, index_error

IGNORED = -100
"""Label of positions that are excluded from the loss."""


@dataclass(frozen=True)
class Mean:
    """Scalar mean and the int64 number of items that it averages. Ranks weight their means by this count."""

    value: Tensor
    count: Tensor


@dataclass(frozen=True)
class Term:
    """Term of the loss, which is the sum of weight * mean over all terms.

    Terms with the same name, such as those of several layers, are reported as the sum of their means.

    Attributes:
        depth: 0 in the model itself, k + 1 in its module mtp.k. Terms with the same name and depth share one count.
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


def valid_positions(depth: int, real: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Return bool [B, S - depth], True at i if tokens i to i + depth are real and of one document; None if all are.

    These tokens are the input of position i at this depth (see `Term`): mtp.k takes k + 1 more tokens than the model.
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
    """Return (target [B, length], number of predicted tokens): the label of i + ahead at position i, or -100.

    It is -100 past the end, in another document, and if position i is outside token_mask [B, length].
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
    """Compute the mean cross entropy, in fp32 or wider, of logits [B, S', V] at i against labels [B, S] at i + ahead.

    The mean is over the labels that `targets` keeps; 0 if there are none. Targets are as long as the logits, because
    slicing the logits would copy them in the backward pass. Raises IndexError if a kept label is outside [0, V) (on
    CPU; a device assertion on CUDA).
    """
    target, count = targets(labels, ahead, logits.shape[1], document_ids, token_mask)
    try:
        total = _CrossEntropy.apply(logits.flatten(0, 1), target.flatten())
    except (IndexError, RuntimeError) as error:
        aligned = F.pad(target, (ahead, 0), value=IGNORED)  # at the positions of the labels
        raise index_error("labels", aligned, logits.shape[-1], IGNORED, error) from None
    return Mean(total / count.clamp_min(1), count)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross entropy, in fp32 or wider, of logits [T, V] and targets [T], ignoring -100.

    The backward pass of `F.cross_entropy` reads and writes [T, V] three more times. Differentiable once: a second
    differentiation raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.dtype = logits.dtype
        ignored = target == IGNORED
        # Only ignored labels are replaced, so that torch rejects labels out of range on every device.
        picked = log_p.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
        total = -picked.masked_fill(ignored, 0).sum()
        # `total` connects the gradient to the logits, which are not saved; see `differentiable_once`.
        ctx.save_for_backward(log_p, target, total)
        return total

    @staticmethod
    @differentiable_once("next_token_loss")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, None]:
        """Return (softmax - one-hot) * grad, zero for ignored rows."""
        log_p, target, _ = saved
        ignored = target == IGNORED
        p, at = log_p.exp(), target.masked_fill(ignored, 0).unsqueeze(-1)
        p.scatter_(-1, at, p.gather(-1, at) - 1)
        p.mul_(grad.masked_fill(ignored, 0).unsqueeze(-1))
        return p.to(ctx.dtype), None
