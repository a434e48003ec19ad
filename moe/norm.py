"""RMS normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 at least, rounded to the output once.

    The output has x's dtype, whatever the weight's. Under autocast, where the weight is fp32 and activations are bf16,
    it is fp32: torch's module would leave its fused kernel with a warning.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
