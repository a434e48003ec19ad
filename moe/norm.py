"""Root-mean-square normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or wider and rounded once.

    The output has x's dtype. Under autocast with an fp32 weight and bf16 activations it is fp32; torch's module would
    warn there and skip its fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == weight.dtype:
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        y = F.rms_norm(x.to(dtype), self.normalized_shape, weight.to(dtype), self.eps)
        if y.dtype == x.dtype:
            return y
        device = x.device.type  # some types, such as "meta", have no autocast
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return y if autocast else y.to(x.dtype)
