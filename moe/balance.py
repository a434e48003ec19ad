"""Load balancing: losses, the correction bias and its update once per step, load reports.

The load of a step counts every real token of the global batch once, in training only, MTP modules included. Counts are
accumulated in the backward pass: `attach` gives each router a leaf tensor, and the routing weights pass through a
function whose gradient for that leaf is the load of the micro-batch. Autograd sums over micro-batches. Eval mode and
recomputed activations add nothing, and a compiled graph sees an ordinary gradient instead of a side effect. As with
gradients, a second `backward()` through the same graph counts again; `torch.autograd.grad` for selected parameters
counts nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.global_batch import GlobalBatch
from moe.loss import Mean, Term
from moe.ops import Routing
from moe.ops.library import index_error
from moe.router import COUNTER_DTYPE, Router


def expert_load(expert_ids: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Count the tokens that chose each expert.

    Args:
        expert_ids: int64 [..., T, K]; -1 is not counted.
        num_experts: E, the number of experts.
        token_mask: bool [..., T], True for real tokens; padding is not counted.

    Returns:
        int64 [..., E].

    Raises IndexError for an id that is neither -1 nor in [0, E) (on CPU; a device assertion on CUDA).
    """
    chosen = (expert_ids + 1).flatten(-2)  # absent ones in column 0
    counted = torch.ones_like(chosen)
    if token_mask is not None:
        counted = token_mask.unsqueeze(-1).expand_as(expert_ids).flatten(-2).to(torch.int64)
    load = torch.zeros(*expert_ids.shape[:-2], 1 + num_experts, dtype=torch.int64, device=expert_ids.device)
    try:
        return load.scatter_add_(-1, chosen, counted)[..., 1:]
    except (IndexError, RuntimeError) as error:
        raise index_error("expert_ids", expert_ids, num_experts, -1, error) from None


def balance_loss(
    scores: Tensor,
    expert_ids: Tensor,
    token_mask: Tensor | None = None,
    *,
    seq_aux: bool = True,
    batch: GlobalBatch | None = None,
) -> Tensor:
    """Compute sum_i f_i P_i, with f_i = E / (K T) count_i and P_i = mean over tokens of s_i / sum_j s_j.

    Args:
        scores: [B, S, E] unbiased, non-negative router scores; gradients flow through P only.
        expert_ids: int64 [B, S, K].
        token_mask: bool [B, S], True for real tokens; padding is excluded from f, P and T.
        seq_aux: compute the loss per sequence and average over sequences with a real token. Otherwise T is the whole
            batch of this call, and counts and T of f are summed over the ranks of `batch`.
        batch: sums over the ranks; None for those of the default process group, if there is one.

    Returns:
        scalar in the dtype of `scores`; 1 if the load is balanced, 0 if there is no real token.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20; global batch: arXiv 2501.11873.
    """
    num_experts, k = scores.shape[-1], expert_ids.shape[-1]
    if token_mask is None:
        token_mask = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    load = expert_load(expert_ids, num_experts, token_mask)
    tokens = token_mask.sum(-1)
    # masked_fill, because padding may hold NaN and 0 * NaN is NaN.
    share = (scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)).masked_fill(~token_mask.unsqueeze(-1), 0).sum(-2)
    if not seq_aux:
        load, tokens, share = load.sum(0, keepdim=True), tokens.sum(0, keepdim=True), share.sum(0, keepdim=True)
    p = share / tokens.clamp_min(1).unsqueeze(-1)
    if not seq_aux:
        everywhere = (batch or GlobalBatch()).sum(torch.cat((load.flatten(), tokens)), "balance loss")
        load, tokens = everywhere[:-1].unsqueeze(0), everywhere[-1:]
    f = load.to(scores.dtype) * num_experts / (k * tokens.clamp_min(1)).unsqueeze(-1)
    return (f * p).sum() / (tokens > 0).sum().clamp_min(1)


def z_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Average logsumexp(logits)^2 over real tokens, for logits [..., E]. Source: ST-MoE (arXiv 2202.08906), eq. 5."""
    z = logits.logsumexp(-1).square()
    if token_mask is None:
        return z.mean() if z.numel() else z.sum()
    return z.masked_fill(~token_mask, 0).sum() / token_mask.sum().clamp_min(1)


def loss_terms(
    config: MoEConfig,
    routing: Routing,
    shape: tuple[int, int],
    token_mask: Tensor | None,
    tokens: Tensor,
    batch: GlobalBatch,
) -> tuple[Term, ...]:
    """Compute the auxiliary losses of a layer's routing that have a non-zero coefficient, multiplied by it.

    Args:
        config: configuration of the layer.
        routing: routing of T = B * S tokens; without logits there is no z-loss. Padding has ids of -1.
        shape: (B, S).
        token_mask: bool [B, S], True for real tokens.
        tokens: int64 [B], number of real tokens of each sequence.
        batch: sums over the ranks, for the balance loss without `seq_aux`.
    """
    terms, counts = [], loss_counts(config, tokens)
    if config.aux_loss_alpha:
        scores, ids = routing.scores.unflatten(0, shape), routing.expert_ids.unflatten(0, shape)
        loss = balance_loss(scores, ids, token_mask, seq_aux=config.seq_aux, batch=batch)
        terms.append(Term("balance", Mean(config.aux_loss_alpha * loss, counts["balance"])))
    if config.router_z_loss_coef and routing.logits is not None:
        loss = z_loss(routing.logits.unflatten(0, shape), token_mask)
        terms.append(Term("z", Mean(config.router_z_loss_coef * loss, counts["z"])))
    return tuple(terms)


def loss_counts(config: MoEConfig, tokens: Tensor) -> dict[str, Tensor]:
    """Return the number of sequences or tokens that each loss averages over, for real tokens [B] of each sequence."""
    everything = tokens.sum()
    return {"balance": (tokens > 0).sum() if config.seq_aux else everything, "z": everything}


class _Inject(torch.autograd.Function):
    """Identity on y, whose backward also gives `loss` the gradient `scale` and `counter` the gradient `load`."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, loss: Tensor | None, scale: Tensor, counter: Tensor | None, load: Tensor
    ) -> Tensor:
        ctx.has_loss, ctx.has_counter = loss is not None, counter is not None
        ctx.save_for_backward(scale, load)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, load = ctx.saved_tensors
        grad_counter = load.to(COUNTER_DTYPE) if ctx.has_counter else None
        return grads[0], scale if ctx.has_loss else None, None, grad_counter, None


def inject_gradients(
    y: Tensor, *, loss: Tensor | None, scale: Tensor, counter: Tensor | None, load: Tensor | None
) -> Tensor:
    """Return y; its backward pass also gives `loss` the gradient `scale` and `counter` the gradient `load`."""
    if not torch.is_grad_enabled() or (loss is None and counter is None):
        return y
    if torch.compiler.is_exporting():
        raise ValueError("torch.export drops the backward pass that balance losses and counts need; export in eval()")
    at = y if loss is None else loss
    return _Inject.apply(y, loss, scale.to(at.device, at.dtype, copy=True), counter, load)


def routers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, router) for every `moe.router.Router` in the model, in order, MTP modules included."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield name, module


def set_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Set the factor of balance losses that enter through autograd, in every `MoELayer` of `model`.

    The layer cannot see the factor by which the caller multiplies the loss. When accumulating n micro-batches
    (loss / n) pass 1 / n; with a gradient scaler pass its scale. `moe.Transformer` does not need this if called with
    labels, because it adds the losses to `out.loss`; its `GlobalBatch.step` weights micro-batches by their counts. The
    layers of a `Transformer` share one scale. Changing it does not recompile.
    """
    for module in model.modules():
        if isinstance(batch := getattr(module, "global_batch", None), GlobalBatch):
            batch.scale_loss(scale)


class Handle:
    """Handle returned by `attach`. `remove()` ends updates and counting; a second call does nothing."""

    def __init__(self, attached: dict[str, Any], hook: Any) -> None:
        self._attached, self._hook = attached, hook
        self._loads: dict[str, Tensor] = {}

    def add(self, loads: dict[str, Tensor]) -> None:
        """Add the loads of a step."""
        self._loads = {name: self._loads[name] + load if name in self._loads else load for name, load in loads.items()}

    def loads(self, *, reset: bool = False) -> dict[str, Tensor]:
        """Return router name -> int64 [E], the tokens that chose each expert in all steps since the last reset.

        Counts are summed over the ranks of the group. The dict is empty before the first step.
        """
        loads = self._loads
        if reset:
            self._loads = {}
        return loads

    def remove(self) -> None:
        self._hook.remove()
        for router in self._attached.values():
            router.load_counter.stop()
        self._attached = {}


def _with_hooks(optimizer: Any) -> Any:
    """Return `optimizer`, or the one inside a wrapper such as accelerate's, which has no hooks and may skip steps."""
    if hasattr(optimizer, "_optimizer_step_post_hooks"):
        return optimizer
    held = getattr(optimizer, "__dict__", {}).values()
    within = {id(value): value for value in held if hasattr(value, "param_groups")}
    if len(within) != 1:
        expected = "a torch.optim.Optimizer, or an object that holds one"
        found = f"{type(optimizer).__name__}, which holds {len(within)}"
        raise ValueError(f"attach: the optimizer has no step hooks; expected {expected}; found {found}")
    return _with_hooks(*within.values())


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, bias_update_speed: float = 0.001, group: Any = None
) -> Handle:
    """Update every correction bias once per step of `optimizer`: b_i += speed * sign(mean(load) - load_i).

    Works with any model that contains a `moe.MoELayer` and with any trainer. Call it once, after the model is on its
    device and before the first forward pass; with several optimizers, attach to one of them. `optimizer` may be a
    wrapper of one optimizer, such as accelerate's, before or after `prepare`.

    The load of a step is the load of all backward passes since the previous step, summed over `group` (None: the
    default process group, if there is one). A skipped step is not counted: setting gradients to None, as zero_grad
    does, begins a new step. Skipped steps are detected by the gradient of the router's weight, so the weight must be
    trained, and the model must not be compiled as a whole; gradients zeroed in place are not detected. A step without
    tokens leaves the biases unchanged.

    The balance loss without `seq_aux` sums over the same group in all routers, even after `handle.remove()`. To change
    the speed, remove and attach again. With a speed of 0 loads are only counted; see `Handle.loads`. Copies of a model
    or module are not attached. Wrap first, then attach, because wrappers may copy modules (PEFT's modules_to_save).

    Raises:
        ValueError: the model has no router; `group` is None and the speed is above 0, but no router has a correction
            bias; the model is already attached; the speed is negative or not finite; `group` does not contain this
            rank; the optimizer has no step hooks and does not wrap exactly one that has. Nothing is changed then.

    Source: arXiv 2408.15664; DeepSeek-V3 (arXiv 2412.19437), section 2.1.2 (speed 0.001, 0 at the end of training).
    """
    if not 0 <= bias_update_speed < math.inf:
        raise ValueError(f"bias_update_speed = {bias_update_speed}: expected a finite number of at least 0")
    found = dict(routers(model))
    biased = [router for router in found.values() if router.e_score_correction_bias is not None]
    if not found or not (biased or group is not None or bias_update_speed == 0):
        raise ValueError("attach: the model has no router with a correction bias (topk_method 'noaux_tc')")
    real = _with_hooks(optimizer)
    first = next(iter(found.values()))
    held = [parameter for group in real.param_groups for parameter in group["params"]]
    if first.global_batch.lockstep and not any(hasattr(parameter, "device_mesh") for parameter in held):
        raise ValueError("attach: the optimizer holds none of the model's parameters; build it after parallelize")
    if any(router.counter is not None for router in found.values()):
        raise ValueError("attach: the model is already attached; call remove() on the earlier handle first")
    if group is not None and dist.is_available() and dist.is_initialized() and dist.get_rank(group) < 0:
        raise ValueError("attach: this rank is not in the group; expected a group that contains it")

    def update(stepped: Any, *_: Any) -> None:
        loads = [router.load_counter.take() for router in found.values()]
        flat = torch.cat([load.to(loads[0].device) for load in loads]).to(torch.int64)
        flat = first.global_batch.sum(flat, "bias update")
        taken: Any = 1
        # torch.amp.GradScaler lets a fused optimizer skip the step itself, on the device, if found_inf is not 0.
        if (found_inf := getattr(stepped, "found_inf", None)) is not None:
            taken = (torch.as_tensor(found_inf, device=flat.device) == 0).to(torch.int64)
        totals = (taken * flat).split([len(load) for load in loads])
        handle.add(dict(zip(found, totals, strict=True)))
        for router, load in zip(found.values(), totals, strict=True):
            if router.e_score_correction_bias is not None:
                router.move_bias(bias_update_speed * torch.sign(load.double().mean() - load).float())

    handle = Handle(found, real.register_step_post_hook(update))
    try:
        for router in found.values():
            # FSDP1 gives optimizers flat shards, which have no gradient during the backward pass.
            trained = router.weight.ndim == 2 and any(router.weight is parameter for parameter in held)
            router.load_counter.start(router.num_experts, router.weight.device, router.weight if trained else None)
    except BaseException:  # such as out of memory
        handle.remove()
        raise
    for router in found.values():
        router.global_batch.restrict(group)
    return handle


@dataclass(frozen=True)
class LoadReport:
    """Expert load of each MoE layer.

    Attributes:
        layers: names of the routers.
        load: int64 [layers, E] on the CPU: tokens that chose each expert. Empty, of any shape, without experts.
    """

    layers: list[str]
    load: Tensor

    @property
    def max_vio(self) -> list[float]:
        """max(load) / mean(load) - 1 per layer: 0 is perfect balance, E / K - 1 the worst. 0 if no token was routed."""
        if not self.load.numel():  # torch has no maximum over an empty dimension
            return []
        mean = self.load.double().mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
        vio = self.load.double().amax(-1) / mean - 1
        return torch.where(self.load.sum(-1) > 0, vio, 0.0).tolist()

    @property
    def dead_experts(self) -> list[int]:
        """Number of experts per layer that no token chose."""
        return (self.load == 0).sum(-1).tolist() if self.load.numel() else []

    def __str__(self) -> str:
        rows = zip(self.layers, self.max_vio, self.dead_experts, strict=True)
        return "\n".join(f"{name}: MaxVio {vio:.3f}, dead experts {dead}" for name, vio, dead in rows)
