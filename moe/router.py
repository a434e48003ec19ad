"""The router of a Mixture-of-Experts layer."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.config import RouterConfig
from moe.global_batch import GlobalBatch
from moe.ops import Routing

COUNTER_DTYPE = torch.float64  # gradients must be floating point; counts are exact up to 2^53


class LoadCounter:
    """What a router counts, and for which global batch. A copy counts nothing yet, and so does what is unpickled.

    Attributes:
        batch: the global batch.
        leaf: float64 [E], whose gradient is the load of the step; None if nothing is counted.
    """

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch
        self.leaf: Tensor | None = None

    def join(self, batch: GlobalBatch) -> None:
        self.batch = batch

    def start(self, num_experts: int, device: torch.device) -> None:
        self.leaf = torch.zeros(num_experts, dtype=COUNTER_DTYPE, device=device, requires_grad=True)

    def stop(self) -> None:
        self.leaf = None

    def move(self, device: torch.device) -> None:
        self.batch.move(device)
        if self.leaf is not None and self.leaf.device != device:
            self.leaf = self.leaf.detach().to(device).requires_grad_()

    @torch.no_grad()
    def take(self) -> Tensor:
        """float64 [E]: the tokens counted since the last call."""
        assert self.leaf is not None
        load = self.leaf.grad if self.leaf.grad is not None else torch.zeros_like(self.leaf)
        self.leaf.grad = None
        return load

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadCounter":
        return LoadCounter(copy.deepcopy(self.batch, memo))

    def __reduce__(self) -> Any:
        return LoadCounter, (self.batch,)


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
        self.load_counter = LoadCounter(GlobalBatch())

    @property
    def global_batch(self) -> GlobalBatch:
        """The global batch, which the routers of a model share; `join` changes it."""
        return self.load_counter.batch

    @property
    def counter(self) -> Tensor | None:
        """float64 [E], whose gradient is the load of the step; None unless `moe.balance.attach` has been called."""
        return self.load_counter.leaf

    def join(self, batch: GlobalBatch) -> None:
        self.load_counter.join(batch)

    @torch.no_grad()
    def move_bias(self, step: Tensor) -> None:
        """Add float32 [E] to the correction bias."""
        assert self.e_score_correction_bias is not None
        self.e_score_correction_bias += step.to(self.e_score_correction_bias.device)

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

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        """x [T, D] -> its routing, with the logits; `expert_ids` [T, K] replace the selection."""
        logits = self.logits(x)
        routing = self.route(logits) if expert_ids is None else self.replay(logits, expert_ids)
        return routing._replace(logits=logits, counter=self.load_counter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        self.load_counter.move(self.weight.device)
        return self
