"""The router of a Mixture-of-Experts layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.config import RouterConfig
from moe.ops import Routing


class Router(nn.Module):
    """Scores, correction bias and top-k selection; see `moe.ops.route` for the contract of the selection.

    Logits are computed in promote_types(x.dtype, float32), with autocast off: F.linear under autocast would be bf16.
    The correction bias [E] is float32 whatever the module is cast to: released biases are 2 to 5 and their update is
    0.001, which bf16 cannot hold.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, hidden_size: int, config: RouterConfig) -> None:
        super().__init__()
        experts = self.num_experts = config.n_routed_experts
        self.selection = config.selection
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(experts)) if config.router_bias else None
        bias = torch.zeros(experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        # Set by balance.attach: a leaf whose gradient is the load of the step, and the group of the global batch.
        self.counter: Tensor | None = None
        self.group: Any = None
        # Set by moe.parallel: torch.distributed's, with a name for errors.
        self.all_reduce: Callable[..., None] | None = None
        self.loss_scale = 1.0

    def logits(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, E]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def route(self, logits: Tensor) -> Routing:
        return ops.route(logits, self.e_score_correction_bias, **self.selection)

    def replay(self, logits: Tensor, expert_ids: Tensor) -> Routing:
        """The routing that `expert_ids` [T, K] would give: weights from this router's own scores."""
        scores = logits.sigmoid() if self.selection["scoring_func"] == "sigmoid" else logits.softmax(-1)
        weights = scores.gather(-1, expert_ids.clamp_min(0)).masked_fill(expert_ids < 0, 0)
        if self.selection["norm_topk_prob"]:
            weights = weights / (weights.sum(-1, keepdim=True).clamp_min(self.selection["norm_min"]) + 1e-20)
        return Routing(weights * self.selection["routed_scaling_factor"], expert_ids, scores)

    def forward(self, x: Tensor) -> Routing:
        return self.route(self.logits(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        bias, counter = self.e_score_correction_bias, self.counter
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        if counter is not None and counter.device != self.weight.device:
            self.counter = counter.detach().to(self.weight.device).requires_grad_()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is a model of its own, and not attached to the optimizer of this one.
        return {**self.__dict__, "counter": None}
