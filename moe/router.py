"""Router of a Mixture-of-Experts layer."""

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe import ops
from moe.config import RouterConfig
from moe.global_batch import GlobalBatch
from moe.ops import Routing
from moe.ops.library import cast, check_device, index_error, without_autocast
from moe.ops.permutation import check_ids

COUNTER_DTYPE = torch.float64  # gradients must be floating point; counts are exact up to 2^53


class LoadCounter:
    """Load count of a router, and its global batch. Copies and unpickled counters are not started.

    Attributes:
        batch: the global batch.
        leaf: float64 [E], whose gradient is the load of the step; None if counting is off.
        weight: the router's weight, whose gradient arrives after the count of the same backward pass. While it has no
            gradient, any earlier count belongs to a skipped step and is dropped. None if skipped steps cannot be
            detected, because the optimizer does not hold the weight or keeps its gradient elsewhere.
        ever_counted: whether counting was ever started.
    """

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch
        self.leaf: Tensor | None = None
        self.weight: Tensor | None = None
        self.ever_counted = False

    def join(self, batch: GlobalBatch) -> None:
        self.batch = batch

    def start(self, num_experts: int, device: torch.device, weight: Tensor | None) -> None:
        self.weight, self.ever_counted = weight, True
        self._count_in(torch.zeros(num_experts, dtype=COUNTER_DTYPE, device=device))

    def _count_in(self, leaf: Tensor) -> None:
        self.leaf = leaf.requires_grad_()
        this = weakref.ref(self)  # Python cannot free cycles through the hooks of a tensor

        def before_counting(_: Tensor) -> None:
            counter = this()
            if counter is not None:
                counter._before_counting()

        self.leaf.register_hook(before_counting)

    def _before_counting(self) -> None:
        if self.weight is not None and self.weight.requires_grad and self.weight.grad is None:
            self.reset()

    def stop(self) -> None:
        self.leaf = self.weight = None

    def move(self, device: torch.device) -> None:
        self.batch.move(device)
        if self.leaf is not None and self.leaf.device != device:
            self._count_in(torch.zeros_like(self.leaf, device=device))  # meta has no values to copy

    def reset(self) -> None:
        """Drop the count since the last `take`."""
        if self.leaf is not None:
            self.leaf.grad = None

    @torch.no_grad()
    def take(self) -> Tensor:
        """Return float64 [E], the tokens counted since the last call, and reset the count."""
        assert self.leaf is not None
        if self.leaf.grad is None:
            return torch.zeros_like(self.leaf)
        load = self.leaf.grad
        if self.weight is not None and self.weight.grad is None:
            self.weight = None  # the trainer keeps gradients elsewhere
        self.reset()
        return load

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadCounter":
        return LoadCounter(copy.deepcopy(self.batch, memo))

    def __reduce__(self) -> Any:
        return LoadCounter, (self.batch,)


class _Watch:
    """Warns once per process if an optimizer trains a router whose correction bias is never updated.

    It hooks the steps of torch's optimizers, because a forward pass cannot know whether a step follows.
    """

    def __init__(self) -> None:
        self.routers: WeakSet[Router] = WeakSet()
        self.hook: Any = None
        self.has_warned = False

    def add(self, router: "Router") -> None:
        if self.has_warned:
            return
        self.routers.add(router)
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self._look)

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(router.weight) in held and not router.load_counter.ever_counted for router in self.routers):
            self.hook.remove()
            self.has_warned = True
            warnings.warn(
                "experts are trained without balancing: the correction bias (topk_method 'noaux_tc') is updated only "
                "by moe.balance.attach(model, optimizer); attach with bias_update_speed=0 to keep it unchanged",
                stacklevel=3,
            )


_watch = _Watch()


class Router(nn.Module):
    """Router: scores, correction bias and top-k selection by `moe.ops.route`.

    Logits are computed in promote_types(x.dtype, float32) with autocast off. The correction bias [E] stays float32 even
    if the module is cast, because released biases are 2 to 5 and updates are 0.001, which bf16 cannot represent.
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
        """Global batch, shared by the routers of a model and set by `join`."""
        return self.load_counter.batch

    @property
    def counter(self) -> Tensor | None:
        """Tensor float64 [E], whose gradient is the load of the step; None unless `moe.balance.attach` was called."""
        return self.load_counter.leaf

    def join(self, batch: GlobalBatch) -> None:
        self.load_counter.join(batch)

    def keep_bias_float32(self) -> None:
        """Restore float32 if other code assigned or cast the correction bias without `_apply`."""
        bias = self.e_score_correction_bias
        if bias is not None and bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.float()

    @torch.no_grad()
    def move_bias(self, step: Tensor) -> None:
        """Add `step`, float32 [E], to the correction bias."""
        self.keep_bias_float32()
        assert self.e_score_correction_bias is not None
        self.e_score_correction_bias += step.to(self.e_score_correction_bias.device)

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits [T, E] of x [T, D]."""
        check_device("Router", self.weight, x)
        dtype, bias = torch.promote_types(x.dtype, torch.float32), self.bias
        with without_autocast(x.device.type):
            return F.linear(cast(x, dtype), cast(self.weight, dtype), bias if bias is None else cast(bias, dtype))

    def route(self, logits: Tensor) -> Routing:
        self.keep_bias_float32()
        return ops.route(logits, self.e_score_correction_bias, **self.selection)

    def replay(self, logits: Tensor, expert_ids: Tensor) -> Routing:
        """Return the routing for given `expert_ids` int64 [T, K], with weights from this router's scores.

        Raises ValueError for a wrong shape, TypeError for a wrong dtype, and IndexError for an id that is neither -1
        (absent) nor in [0, E) (on CPU; a device assertion on CUDA).
        """
        check_ids(logits, expert_ids)
        scores = logits.sigmoid() if self.selection["scoring_func"] == "sigmoid" else logits.softmax(-1)
        absent = expert_ids == -1
        try:
            weights = scores.gather(-1, expert_ids.masked_fill(absent, 0)).masked_fill(absent, 0)
        except (IndexError, RuntimeError) as error:
            raise index_error("expert_ids", expert_ids, self.num_experts, -1, error) from None
        if self.selection["norm_topk_prob"]:
            weights = weights / (weights.sum(-1, keepdim=True).clamp_min(self.selection["norm_min"]) + 1e-20)
        return Routing(weights * self.selection["routed_scaling_factor"], expert_ids, scores)

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Routing:
        """Route x [T, D]; `expert_ids` [T, K], if given, replace the selection. The result includes the logits."""
        logits = self.logits(x)
        if self._trains_unattached() and not torch.compiler.is_compiling():
            _watch.add(self)
        routing = self.route(logits) if expert_ids is None else self.replay(logits, expert_ids)
        return routing._replace(logits=logits, counter=self.load_counter)

    def _trains_unattached(self) -> bool:
        """Return whether this looks like training without a prior `moe.balance.attach`."""
        learns = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        return learns and self.e_score_correction_bias is not None and not self.load_counter.ever_counted

    def extra_repr(self) -> str:
        rules = ", ".join(
            f"{name}={self.selection[name]}" for name in ("top_k", "scoring_func", "n_group", "topk_group")
        )
        balanced = self.e_score_correction_bias is not None
        return f"num_experts={self.num_experts}, width={self.weight.shape[-1]}, {rules}, correction_bias={balanced}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.keep_bias_float32()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        self.load_counter.move(self.weight.device)
        return self
