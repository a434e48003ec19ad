"""The Mixture-of-Experts layer: experts, shared experts, and the layer that routes tokens to them."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import balance, ops
from moe.config import ModelConfig, ScoringFunc, TopkMethod
from moe.global_batch import GlobalBatch
from moe.init import materialize
from moe.loss import Term
from moe.ops import Routing
from moe.router import Router


class MLP(nn.Module):
    """down(silu(gate x) * up x): a dense layer, or the shared experts as one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All routed experts, stacked: gate_up_proj [E, 2F, D] (gate rows first) and down_proj [E, D, F], with `bias` also
    gate_up_proj_bias [E, 2F] and down_proj_bias [E, D]; the activation is `moe.ops.swiglu` with limit, alpha, beta."""

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        limit: float | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.limit, self.alpha, self.beta = limit, alpha, beta

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        gate_up, down, gate_up_bias, down_bias = self.operands()
        return ops.moe_mlp(
            x,
            gate_up,
            down,
            weights,
            expert_ids,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            swiglu_limit=self.limit,
            swiglu_alpha=self.alpha,
            swiglu_beta=self.beta,
        )

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The parameters as the operator takes them."""
        return self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias


class Dispatched(Protocol):
    """Tokens on their way to the ranks that have their experts."""

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """What arrives at this rank's experts: rows [N, D], weights [N, K] and expert ids [N, K], -1 for "not here"."""
        ...


class Dispatcher(Protocol):
    """How a layer reaches its experts. Other work may be done between `dispatch` and `Dispatched.wait`."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Start to move x [T, D] to its experts."""
        ...

    def combine(self, y: Tensor, sent: Any) -> Tensor:
        """y [N, D], what the experts made of the rows that arrived -> the sum of each token of `sent`, [T, D]."""
        ...


@dataclass(frozen=True)
class _Here:
    rows: Tensor
    weights: Tensor
    expert_ids: Tensor

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.weights, self.expert_ids


class LocalDispatcher:
    """Every expert is here: nothing moves."""

    def dispatch(self, x: Tensor, routing: Routing) -> _Here:
        return _Here(x, routing.weights, routing.expert_ids)

    def combine(self, y: Tensor, sent: _Here) -> Tensor:
        return y


@dataclass(frozen=True)
class MoEStats:
    """What a MoE layer did with one input.

    Attributes:
        load: int64 [E], real tokens that chose each expert.
        tokens: int64 [B], real tokens of each sequence.
        terms: the losses of the routing, in training only; see `moe.balance.loss_terms`.
    """

    load: Tensor
    tokens: Tensor
    terms: tuple[Term, ...] = ()

    @property
    def balance_loss(self) -> Tensor:
        """Scalar, multiplied by its coefficient: a mean over the sequences that have a real token, without `seq_aux`
        over all real tokens; 0 if the coefficient is 0."""
        return self._sum("balance")

    @property
    def z_loss(self) -> Tensor:
        """Scalar, multiplied by its coefficient: a mean over real tokens; 0 if the coefficient is 0."""
        return self._sum("z")

    @property
    def aux_loss(self) -> Tensor:
        """Scalar: the sum of all terms."""
        return self._sum()

    def _sum(self, name: str | None = None) -> Tensor:
        means = [term.mean.value for term in self.terms if name is None or term.name == name]
        return torch.stack(means).sum() if means else torch.zeros((), device=self.load.device)


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer for any model: y = sum_k w_k expert_k(x) + shared(x).

    In training, the balance losses enter through autograd: y is unchanged, and its backward pass also feeds them
    (see `moe.balance.set_loss_scale` for accumulation and gradient scalers). With `return_stats` they are returned
    instead, for the caller to add to the loss. The correction bias changes only under `moe.balance.attach`.

    Args:
        hidden_size, moe_intermediate_size: D and F.
        n_routed_experts, num_experts_per_tok: E and K.
        n_shared_experts: width of the always-on expert in units of F; 0 for none.
        shared_expert_intermediate_size, shared_expert_gate, expert_bias, swiglu_limit, swiglu_alpha, swiglu_beta,
        scoring_func, topk_method, n_group, topk_group, norm_topk_prob, routed_scaling_factor, router_bias,
        moe_norm_min: see `ModelConfig`.
        aux_loss_alpha, seq_aux, router_z_loss_coef: coefficients of the losses of `moe.balance`.
        initializer_range, seed: see `initialize`; without a seed, each layer draws one from torch's generator.

    Raises:
        ConfigError: from the same checks as `ModelConfig`.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        *,
        n_shared_experts: int = 0,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        expert_bias: bool = False,
        swiglu_limit: float | None = None,
        swiglu_alpha: float = 1.0,
        swiglu_beta: float = 0.0,
        scoring_func: ScoringFunc = "sigmoid",
        topk_method: TopkMethod = "noaux_tc",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        router_bias: bool = False,
        moe_norm_min: float = 0.0,
        aux_loss_alpha: float = 0.0,
        seq_aux: bool = True,
        router_z_loss_coef: float = 0.0,
        initializer_range: float = 0.02,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        config = ModelConfig(  # the same checks, with the same words
            vocab_size=1,
            hidden_size=hidden_size,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=2,
            intermediate_size=1,
            moe_intermediate_size=moe_intermediate_size,
            n_routed_experts=n_routed_experts,
            num_experts_per_tok=num_experts_per_tok,
            n_shared_experts=n_shared_experts,
            shared_expert_intermediate_size=shared_expert_intermediate_size,
            shared_expert_gate=shared_expert_gate,
            expert_bias=expert_bias,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
            swiglu_beta=swiglu_beta,
            scoring_func=scoring_func,
            topk_method=topk_method,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
            router_bias=router_bias,
            moe_norm_min=moe_norm_min,
            aux_loss_alpha=aux_loss_alpha,
            seq_aux=seq_aux,
            router_z_loss_coef=router_z_loss_coef,
            initializer_range=initializer_range,
        )
        self.config = config
        self.dispatcher: Dispatcher = LocalDispatcher()
        with torch.device("meta"):
            self.gate = Router(
                hidden_size,
                n_routed_experts,
                num_experts_per_tok,
                scoring_func=scoring_func,
                topk_method=topk_method,
                n_group=n_group,
                topk_group=topk_group,
                norm_topk_prob=norm_topk_prob,
                routed_scaling_factor=routed_scaling_factor,
                router_bias=router_bias,
                moe_norm_min=moe_norm_min,
            )
            self.experts = Experts(
                n_routed_experts,
                hidden_size,
                moe_intermediate_size,
                bias=expert_bias,
                limit=swiglu_limit,
                alpha=swiglu_alpha,
                beta=swiglu_beta,
            )
            self.shared_experts = MLP(hidden_size, config.shared_width) if config.shared_width else None
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False) if shared_expert_gate else None
        materialize(self, std=initializer_range, seed=seed)

    @overload
    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        routing: Routing | Tensor | None = None,
        return_stats: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        routing: Routing | Tensor | None = None,
        *,
        return_stats: Literal[True],
    ) -> tuple[Tensor, MoEStats]: ...

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        routing: Routing | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, MoEStats]:
        """x [..., S, D] -> y of the same shape, in x's dtype or autocast's; with `return_stats`, (y, MoEStats).

        Args:
            x: the last but one dimension is the sequence; [T, D] is one sequence.
            token_mask: bool [..., S], True for real tokens. Padding reaches no expert, no count and no loss, whatever
                its values (NaN too), and its output is zero.
            routing: replaces the router. A `Routing` is used as it is, and has no z-loss; int64 expert ids [T, K] are
                replayed with weights from this router's scores.
        """
        width = self.config.hidden_size
        if x.ndim < 2 or x.shape[-1] != width:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., S, {width}]")
        shape = (math.prod(x.shape[:-2]), x.shape[-2])
        rows = x.reshape(shape[0] * shape[1], width)
        if token_mask is not None:
            if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
                found = f"{token_mask.dtype} {tuple(token_mask.shape)}"
                raise ValueError(f"token_mask is {found}: expected torch.bool {tuple(x.shape[:-1])}")
            token_mask = token_mask.reshape(shape)
            rows = rows.masked_fill(~token_mask.reshape(-1, 1), 0)

        if isinstance(routing, Routing):
            routing, router = routing._replace(logits=None), self._router()
        else:
            routing = self.gate(rows) if routing is None else self.gate(rows, routing)
            assert isinstance(routing, Routing)
            router = routing.router
        if token_mask is not None:
            routing = routing._replace(expert_ids=routing.expert_ids.masked_fill(~token_mask.reshape(-1, 1), -1))
        stats = self._stats(routing, router.global_batch, shape, token_mask)
        if self.training:
            # On the weights and not on y: y's gradient passes through them, and they are a D-th of its size.
            weights = balance.inject_gradients(
                routing.weights,
                loss=None if return_stats or not stats.terms else stats.aux_loss,
                scale=router.global_batch.loss_scale,
                counter=router.counter,
                load=stats.load,
            )
            routing = routing._replace(weights=weights)

        sent = self.dispatcher.dispatch(rows, routing)
        shared = None if self.shared_experts is None else self._shared(rows)  # while tokens travel
        y = self.dispatcher.combine(self.experts(*sent.wait()), sent)
        y = (y if shared is None else y + shared).view(x.shape)
        return (y, stats) if return_stats else y

    def divide(self, experts: nn.Module, dispatcher: Dispatcher) -> None:
        """Hold only `experts`, and reach the others through `dispatcher`."""
        self.register_module("experts", experts)
        self.dispatcher = dispatcher

    def _router(self) -> Router:
        """The router, whatever is around it. PEFT puts the copy that is used behind the original."""
        *_, router = (module for module in self.gate.modules() if isinstance(module, Router))
        return router

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared_experts is not None
        y = self.shared_experts(x)
        return y if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * y

    def _stats(
        self, routing: Routing, batch: GlobalBatch, shape: tuple[int, int], token_mask: Tensor | None
    ) -> MoEStats:
        load = balance.expert_load(routing.expert_ids, self.config.n_routed_experts)
        tokens = load.new_full(shape[:1], shape[1]) if token_mask is None else token_mask.sum(-1)
        if not self.training:
            return MoEStats(load, tokens)
        return MoEStats(load, tokens, balance.loss_terms(self.config, routing, shape, token_mask, tokens, batch))
