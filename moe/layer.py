"""The Mixture-of-Experts layer: experts, shared experts, and the layer that routes tokens to them."""

import math
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import balance, ops
from moe.config import MoEConfig
from moe.global_batch import GlobalBatch
from moe.init import materialize
from moe.loss import Term
from moe.ops import Routing, SwiGLU
from moe.ops.permutation import check_ids
from moe.router import LoadCounter, Router

_Arguments = ParamSpec("_Arguments")


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
    gate_up_proj_bias [E, 2F] and down_proj_bias [E, D]; `activation` is that of `moe.ops.swiglu`."""

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        activation: SwiGLU = SwiGLU(),
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.activation = activation

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
            activation=self.activation,
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


@dataclass(frozen=True)
class _MoELayerArguments(MoEConfig):
    """The arguments of `MoELayer`."""

    _: KW_ONLY
    seed: int | None = None


def _takes(
    arguments: Callable[Concatenate[Any, _Arguments], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _Arguments], None]]:
    """Decorator of a method that passes its arguments on, which gives it their signature for editors and `inspect`."""
    return wraps(arguments, assigned=(), updated=())  # pyright: ignore[reportReturnType]


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer for any model: y = sum_k w_k expert_k(x) + shared(x).

    In training, the balance losses enter through autograd: y is unchanged, and its backward pass also feeds them
    (see `moe.balance.set_loss_scale` for accumulation and gradient scalers). With `return_stats` they are returned
    instead, for the caller to add to the loss. The correction bias changes only under `moe.balance.attach`.

    Args:
        hidden_size, moe_intermediate_size: D and F.
        n_routed_experts, num_experts_per_tok: E and K.
        keywords but seed: see `moe.config.MoEConfig`, which inherits from `ExpertsConfig` and `RouterConfig`.
        seed: see `initialize`; without a seed, each layer draws one from torch's generator.

    Raises:
        ConfigError: from the same checks as `ModelConfig`, and for a keyword that does not exist.
    """

    @_takes(_MoELayerArguments.__init__)
    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__()
        _MoELayerArguments.check_names(settings)
        self.config = config = _MoELayerArguments(*sizes, **settings)
        self.dispatcher: Dispatcher = LocalDispatcher()
        with torch.device("meta"):
            self.gate = Router(config.hidden_size, config)
            self.experts = Experts(
                config.n_routed_experts,
                config.hidden_size,
                config.moe_intermediate_size,
                bias=config.expert_bias,
                activation=config.activation,
            )
            self.shared_experts = MLP(config.hidden_size, config.shared_width) if config.shared_width else None
            self.shared_expert_gate = (
                nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
            )
        materialize(self, std=config.initializer_range, seed=config.seed)

    @classmethod
    def from_config(cls, config: MoEConfig, *, seed: int | None = None) -> Self:
        """The layer of a config, which may be a `ModelConfig`."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(MoEConfig)}, seed=seed)

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
        rows, padding = x.reshape(shape[0] * shape[1], width), None
        if token_mask is not None:
            if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
                found = f"{token_mask.dtype} {tuple(token_mask.shape)}"
                raise ValueError(f"token_mask is {found}: expected torch.bool {tuple(x.shape[:-1])}")
            token_mask = token_mask.reshape(shape)
            padding = ~token_mask.reshape(-1, 1)
            rows = rows.masked_fill(padding, 0)

        if isinstance(routing, Routing):
            check_ids(rows, routing.expert_ids)
            routing = routing._replace(logits=None, counter=None)
        else:
            routing = self.gate(rows) if routing is None else self.gate(rows, routing)
            if not isinstance(routing, Routing):
                raise TypeError(f"gate: expected it to return a Routing, found {type(routing).__name__}")
        counter: LoadCounter = routing.counter or self._router().load_counter
        if padding is not None:
            routing = routing._replace(expert_ids=routing.expert_ids.masked_fill(padding, -1))
        stats = self._stats(routing, counter.batch, shape, token_mask)
        if self.training:
            self._warn_of_idle_router()
            # On the weights and not on y: y's gradient passes through them, and they are a D-th of its size.
            weights = balance.inject_gradients(
                routing.weights,
                loss=None if return_stats or not stats.terms else stats.aux_loss,
                scale=counter.batch.loss_scale,
                counter=counter.leaf,
                load=stats.load,
            )
            routing = routing._replace(weights=weights)

        sent = self.dispatcher.dispatch(rows, routing)
        shared = None if self.shared_experts is None else self._shared(rows)  # while tokens travel
        y = self.dispatcher.combine(self.experts(*sent.wait()), sent)
        y = y if shared is None else y + shared
        if padding is not None:  # an adapter or a hook may have added something
            y = y.masked_fill(padding, 0)
        y = y.view(x.shape)
        return (y, stats) if return_stats else y

    def divide(self, experts: nn.Module, dispatcher: Dispatcher) -> None:
        """Hold only `experts`, and reach the others through `dispatcher`."""
        self.register_module("experts", experts)
        self.dispatcher = dispatcher

    def _warn_of_idle_router(self) -> None:
        reason = self.config.idle_router
        if reason is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.gate.parameters()):
            warnings.warn(f"the router does not learn: {reason}", stacklevel=2)

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
