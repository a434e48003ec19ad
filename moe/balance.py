"""Keeping experts evenly loaded: losses, the correction bias and its once-per-step update, load reports.

A step's load counts every real token of the global batch once: in training only, in the MTP modules too, and never
again when activations are recomputed. Counts therefore travel in the backward pass: `attach` gives each router a leaf
tensor, and the routing weights pass through a function whose gradient for that leaf is the micro-batch's load. Autograd
sums over micro-batches, eval adds nothing, recomputation adds nothing, and a compiled graph sees an ordinary gradient
instead of a side effect. What counts is thus what `backward()` reaches: a second backward through the same graph counts
again, as its gradients do, and `torch.autograd.grad` for chosen parameters counts nothing.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import MoEConfig
from moe.global_batch import GlobalBatch
from moe.loss import Mean, Term
from moe.ops import Routing
from moe.ops.library import index_error
from moe.router import COUNTER_DTYPE, Router


def expert_load(expert_ids: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert.

    Args:
        expert_ids: int64 [..., T, K]; -1 is not counted.
        num_experts: E.
        token_mask: bool [..., T], True for real tokens; padding is not counted.

    Returns:
        int64 [..., E].

    Raises IndexError for an id that is neither -1 nor in [0, E) (on CPU; a device assertion on CUDA).
    """
    absent = expert_ids == -1
    counted = ~absent if token_mask is None else ~absent & token_mask.unsqueeze(-1)
    load = torch.zeros(*expert_ids.shape[:-2], num_experts, dtype=torch.int64, device=expert_ids.device)
    try:
        chosen = expert_ids.masked_fill(absent, 0).flatten(-2)
        return load.scatter_add_(-1, chosen, counted.to(torch.int64).flatten(-2))
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
    """sum_i f_i P_i with f_i = E / (K T) * count_i and P_i = mean over tokens of s_i / sum_j s_j; 1 when balanced.

    Args:
        scores: [B, S, E] unbiased, non-negative router scores; gradients flow through P only.
        expert_ids: int64 [B, S, K].
        token_mask: bool [B, S]; padding enters neither f, nor P, nor T.
        seq_aux: T is one sequence, and the losses of the sequences that have a token are averaged. Otherwise T is the
            whole batch, and the counts f are summed over the ranks of `batch`.
        batch: the global batch; None means that of the default group where torch.distributed runs.

    Returns:
        scalar in scores' dtype; 0 when no token is real.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20; global batch: arXiv 2501.11873.
    """
    num_experts, k = scores.shape[-1], expert_ids.shape[-1]
    if token_mask is None:
        token_mask = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
    load = expert_load(expert_ids, num_experts, token_mask)
    tokens = token_mask.sum(-1)
    # masked_fill, not a product: a padded row may hold NaN, and 0 * NaN is NaN.
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
    """Mean over real tokens of logsumexp(logits)^2, for logits [..., E]. Source: ST-MoE (arXiv 2202.08906), eq. 5."""
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
    """The losses of a layer's routing that have a coefficient, multiplied by it.

    Args:
        config: that of the layer.
        routing: of T = B * S tokens; without logits it has no z-loss. Padding has ids of -1.
        shape: (B, S).
        token_mask: bool [B, S], True for real tokens.
        tokens: int64 [B], real tokens of each sequence.
        batch: over which the balance loss without `seq_aux` is computed.
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
    """Over how many sequences or tokens each loss of a layer is a mean, for tokens [B], the real ones of each."""
    everything = tokens.sum()
    return {"balance": (tokens > 0).sum() if config.seq_aux else everything, "z": everything}


class _Inject(torch.autograd.Function):
    """The identity on y, whose backward also feeds `loss` (gradient `scale`) and `counter` (gradient `load`)."""

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
    y: Tensor, *, loss: Tensor | None, scale: float, counter: Tensor | None, load: Tensor | None
) -> Tensor:
    """y unchanged; when gradients flow through it, `loss` gets the gradient `scale` and `counter` gets `load`."""
    if not torch.is_grad_enabled() or (loss is None and counter is None):
        return y
    at = y if loss is None else loss
    return _Inject.apply(y, loss, torch.full((), scale, dtype=at.dtype, device=at.device), counter, load)


def routers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, router) of every `moe.router.Router` in the model, in order, MTP modules included."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield name, module


def set_loss_scale(model: nn.Module, scale: float) -> None:
    """Weight of the balance losses that enter through autograd in every `MoELayer` of `model`.

    The layer cannot see by what the caller multiplies the loss: with accumulation over n micro-batches (loss / n) pass
    1 / n, with a gradient scaler pass its scale. `moe.Transformer` called with labels adds the losses to `out.loss`
    itself and needs none of this; with or without labels, its `GlobalBatch.step` weighs micro-batches by what they
    count. The layers of a `Transformer` share one scale.
    """
    for module in model.modules():
        if isinstance(batch := getattr(module, "global_batch", None), GlobalBatch):
            batch.scale_loss(scale)


def _after_zero_grad(optimizer: Any, forget: Callable[[], None]) -> Callable[[], None]:
    """Call `forget` whenever `optimizer` clears gradients, for which torch has no hook; returns what ends that."""
    clear = optimizer.zero_grad

    @functools.wraps(clear)
    def zero_grad(*args: Any, **options: Any) -> None:
        clear(*args, **options)
        forget()

    def end() -> None:
        if optimizer.zero_grad is zero_grad:
            optimizer.zero_grad = clear

    optimizer.zero_grad = zero_grad
    return end


class Handle:
    """What `attach` returns: `remove()` ends the updates. A second call does nothing."""

    def __init__(self, attached: list[Any], hook: Any, end: Callable[[], None]) -> None:
        self._attached, self._hook, self._end = attached, hook, end

    def remove(self) -> None:
        self._hook.remove()
        self._end()
        for router in self._attached:
            router.load_counter.stop()
        self._attached = []


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, bias_update_speed: float = 0.001, group: Any = None
) -> Handle:
    """Update every correction bias once per step of `optimizer`: b_i += speed * sign(mean(load) - load_i).

    Works on any model that contains `moe.MoELayer`s and in any trainer (`optimizer` may be accelerate's): call it once,
    after the model is on its device and before the first forward (and before torch.compile), and attach to one
    optimizer only when there are several. The load of a step is everything that went backward since the last one,
    summed over `group` (None: the default group where torch.distributed runs). A step that is skipped counts nothing,
    as its gradients do: what `optimizer.zero_grad` clears is not counted, nor, while a router's weight is trained and
    not in a compiled graph, what `model.zero_grad()` or the caller sets to None. The global-batch loss of all routers,
    those without a correction bias too, sums over the same group, also after `handle.remove()`, which ends the updates.
    A step without any token leaves the biases alone. Change the speed by removing and attaching again. A copy of the
    model is not attached, and neither is a copy of a part that a wrapper makes, as PEFT does for modules_to_save: wrap
    first, then attach.

    Raises:
        ValueError: no router, or without a group none with a correction bias; routers that are attached already; a
            speed below 0 or not finite. Nothing is changed then.

    Source: arXiv 2408.15664; DeepSeek-V3 (arXiv 2412.19437), section 2.1.2 (speed 0.001, 0 at the end of training).
    """
    if not 0 <= bias_update_speed < math.inf:
        raise ValueError(f"bias_update_speed = {bias_update_speed}: expected a finite number from 0 up")
    found = [router for _, router in routers(model)]
    biased = [router for router in found if router.e_score_correction_bias is not None]
    if not biased and (group is None or not found):
        raise ValueError("attach: the model has no router with a correction bias (topk_method 'noaux_tc')")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if found[0].global_batch.lockstep and not any(hasattr(parameter, "device_mesh") for parameter in held):
        raise ValueError("attach: the optimizer holds none of the model's parameters; build it after parallelize")
    if any(router.counter is not None for router in biased):
        raise ValueError("attach: this model is attached already; call remove() on the earlier handle first")

    def update(stepped: Any, *_: Any) -> None:
        loads = [router.load_counter.take() for router in biased]
        if not loads:
            return
        flat = torch.cat([load.to(loads[0].device) for load in loads]).to(torch.int64)
        flat = biased[0].global_batch.sum(flat, "bias update")
        speed: Any = bias_update_speed
        # torch.amp.GradScaler calls a fused optimizer to skip a step itself, on the device, if this is not 0.
        if (found_inf := getattr(stepped, "found_inf", None)) is not None:
            speed = speed * (torch.as_tensor(found_inf, device=flat.device) == 0)
        for router, load in zip(biased, flat.split([len(load) for load in loads]), strict=True):
            router.move_bias(speed * torch.sign(load.double().mean() - load).float())

    def forget() -> None:
        for router in biased:
            router.load_counter.forget()

    # accelerate's optimizer has no hooks, and leaves out steps of the one inside, whose hooks see the real steps.
    real: Any = optimizer
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        real = getattr(optimizer, "optimizer", optimizer)
    handle = Handle(biased, real.register_step_post_hook(update), _after_zero_grad(real, forget))
    for router in found:
        router.global_batch.restrict(group)
    for router in biased:
        # FSDP1 gives optimizers flat parts, which have no gradient while a backward pass runs.
        trained = router.weight.ndim == 2 and any(router.weight is parameter for parameter in held)
        router.load_counter.start(router.num_experts, router.weight.device, router.weight if trained else None)
    return handle


@dataclass(frozen=True)
class LoadReport:
    """Expert load per layer with experts.

    Attributes:
        layers: names of the routers.
        load: int64 [layers, E] on the CPU: tokens that chose each expert.
    """

    layers: list[str]
    load: Tensor

    @property
    def max_vio(self) -> list[float]:
        """Per layer max(load) / mean(load) - 1: 0 is perfect balance, E / K - 1 the worst. 0 where nothing ran."""
        mean = self.load.double().mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
        vio = self.load.double().amax(-1) / mean - 1
        return torch.where(self.load.sum(-1) > 0, vio, 0.0).tolist()

    @property
    def dead_experts(self) -> list[int]:
        """Per layer, how many experts no token chose."""
        return (self.load == 0).sum(-1).tolist()

    def __str__(self) -> str:
        rows = zip(self.layers, self.max_vio, self.dead_experts, strict=True)
        return "\n".join(f"{name}: MaxVio {vio:.3f}, dead experts {dead}" for name, vio, dead in rows)
