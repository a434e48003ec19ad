"""Calls of operators on the table of cases, and what eager PyTorch computes instead."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from moe import ops
from tests.support.cases import Inputs, RoutingCase


def eager_experts(i: Inputs, bias: bool = True) -> Tensor:
    """The computation of transformers' eager experts, extended by biases and ids of -1."""
    out = torch.zeros_like(i.x)
    for e in range(len(i.gate_up)):
        token, k = (i.expert_ids == e).nonzero(as_tuple=True)
        gate, up = (i.x[token] @ i.gate_up[e].T + (i.gate_up_bias[e] if bias else 0)).chunk(2, dim=-1)
        rows = (silu(gate) * up) @ i.down[e].T + (i.down_bias[e] if bias else 0)
        out = out.index_add(0, token, (rows * i.weights[token, k, None]).to(out.dtype))
    return out


def fused(i: Inputs, **settings: Any) -> Tensor:
    """`ops.moe_mlp` with biases."""
    biases: dict[str, Any] = {"gate_up_bias": i.gate_up_bias, "down_bias": i.down_bias}
    return ops.moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids, **biases, **settings)


def gradients(function: Callable[[Inputs], Tensor], inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """The result as "y", and the gradient of each differentiable input under its name."""
    leaves = inputs.leaves()
    result = function(leaves)
    names = ("x", "gate_up", "down", "weights", "gate_up_bias", "down_bias")
    grads = torch.autograd.grad(result, leaves.differentiable, grad.to(result.dtype), materialize_grads=True)
    return {"y": result.detach(), **dict(zip(names, grads, strict=True))}


def whole_layer(logits: Tensor, bias: Tensor | None, i: Inputs, routing_case: RoutingCase) -> Tensor:
    """Every public operator in one differentiable function."""
    routing = ops.route(logits, bias, **routing_case.settings)
    y = fused(replace(i, weights=routing.weights, expert_ids=routing.expert_ids))
    permuted = ops.permute(i.x, routing.expert_ids, i.gate_up.shape[0])
    hidden = ops.swiglu(ops.grouped_mm(permuted.rows, i.gate_up.mT, permuted.offsets), ops.SwiGLU(limit=2.0))
    rows = ops.grouped_mm(hidden, i.down.mT, permuted.offsets)
    return y + ops.unpermute(rows, permuted.position, routing.weights) + routing.scores.sum()


def digest(*tensors: Tensor) -> str:
    """A hash of all bytes."""
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()
