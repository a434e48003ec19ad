"""`interleave`: rotary projections reordered for engines, which expect interleaved pairs in DeepSeek's families."""

import torch
from torch import nn

from moe.attention import MLA
from moe.errors import ConfigError
from moe.linear import Linear
from moe.model import Transformer


@torch.no_grad()
def interleave(model: Transformer) -> None:
    """Set `rope_interleave` to True in place, without changing the model's function.

    Of the d rotary rows of a head, rows i and i + d / 2 become rows 2 i and 2 i + 1. The state of an optimizer is not
    reordered. A model that is already interleaved is unchanged.

    Raises ConfigError, before any change, for a model without MLA, and for projections that are quantised, have
    adapters, or are on a mesh.
    """
    if model.config.rope_interleave:
        return
    if not model.config.is_mla:
        raise ConfigError("rope_interleave", False, "a model with MLA")
    layers = [module for module in model.modules() if isinstance(module, MLA)]
    projections: list[tuple[nn.Linear, int, int]] = []  # with heads, and rotary rows per head
    for layer in layers:
        queries = layer.q_b_proj if layer.compresses_q else layer.q_proj
        projections += [(queries, layer.heads, layer.rope), (layer.kv_a_proj_with_mqa, 1, layer.rope)]
    for projection, _, _ in projections:
        if type(projection) is not Linear or hasattr(projection.weight, "device_mesh"):
            raise ConfigError("rope_interleave", False, "nn.Linear projections, as moe.load creates by default")
    for projection, heads, rotary in projections:
        for part in projection.parameters():
            rows = part.view(heads, projection.out_features // heads, -1)[:, -rotary:]
            rows.copy_(torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2))
    model.interleave_rope()
