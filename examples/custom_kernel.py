"""Benchmark your own MoE kernel against those of moesmith and other libraries.

    python -m benchmarks layer --small --shape olmoe --op forward train --peer examples/custom_kernel.py:sorted_experts

The function receives a `LayerInputs` and returns y [T, D]. For `--op train`, y must be differentiable in x, gate_up,
down and weights. Its result is compared with float64 first; a function that fails this check is not timed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import LayerInputs


def sorted_experts(inputs: LayerInputs) -> Tensor:
    """Replace this body with a call to your kernel.

    Inputs are x [T, D], gate_up [E, 2F, D] with the gate rows first, down [E, D, F], weights [T, K] in float32 and
    expert_ids [T, K] in int64.
    """
    tokens, top_k = inputs.expert_ids.shape
    order = inputs.expert_ids.flatten().argsort(stable=True)  # routed rows, sorted by expert
    counts = torch.bincount(inputs.expert_ids.flatten(), minlength=len(inputs.down)).tolist()
    rows = inputs.x.index_select(0, order // top_k)  # [T * K, D]
    outputs = []
    for expert, of_expert in enumerate(rows.split(counts)):
        gate, up = F.linear(of_expert, inputs.gate_up[expert]).chunk(2, dim=1)
        outputs.append(F.linear(F.silu(gate) * up, inputs.down[expert]))
    slots = torch.cat(outputs).index_select(0, order.argsort()).unflatten(0, (tokens, top_k))
    return (slots * inputs.weights[..., None].to(slots.dtype)).sum(1)
