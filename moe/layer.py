"""Mixture-of-Experts layer: routed experts, shared experts, and the layer that routes tokens to them."""

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
from moe.errors import ConfigError
from moe.global_batch import GlobalBatch
from moe.init import materialize, skip_init
from moe.linear import Linear
from moe.loss import Term
from moe.ops import Routing, SwiGLU
from moe.ops.library import is_autocast_on
from moe.router import LoadCounter, Router
from moe.uncast import Uncast

_Arguments = ParamSpec("_Arguments")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_dtype(x: Tensor, weight: Tensor) -> None:
    if x.dtype != weight.dtype and not is_autocast_on(x.device.type):
        raise TypeError(f"x is {x.dtype}: expected {weight.dtype}, the dtype of the weights")


def _check_routing(routing: Any, tokens: int, experts: int, *, needs_scores: bool) -> None:
    """Raise TypeError or ValueError if `routing` does not route `tokens` tokens to `experts` experts."""
    whole = isinstance(routing, Routing)
    if not whole and not isinstance(routing, Tensor):
        found = type(routing).__name__
        raise TypeError(f"routing is a {found}: expected a moe.Routing, or a tensor of expert ids, int64 [T, K]")
    ids, weights, scores = (routing[1], routing[0], routing[2]) if whole else (routing, None, None)
    _check_part("expert_ids", ids, (torch.int64,), (tokens, None))
    if whole:
        _check_part("weights", weights, (torch.float32, torch.float64), tuple(ids.shape))
    if whole and needs_scores:
        _check_part("scores", scores, (torch.float32, torch.float64), (tokens, experts))


def _check_part(name: str, value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """Raise TypeError or ValueError if `value` is not a tensor of such a dtype and shape (None: any size)."""
    found = value.dtype if isinstance(value, Tensor) else type(value).__name__
    if found not in dtypes:
        raise TypeError(f"routing: {name} are {found}: expected a tensor of {' or '.join(map(str, dtypes))}")
    if len(value.shape) != len(shape) or any(b not in (a, None) for a, b in zip(value.shape, shape, strict=True)):
        sizes = ", ".join("K" if size is None else str(size) for size in shape)
        raise ValueError(f"routing: {name} have shape {tuple(value.shape)}: expected [{sizes}]")


class MLP(nn.Module):
    """Gated MLP, down(silu(gate x) * up x), for dense layers and for shared experts."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.gate_proj) is Linear:  # quantised, adapted and FSDP-wrapped modules handle dtypes themselves
            _check_dtype(x, self.gate_proj.weight)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All routed experts, stacked.

    Parameters are gate_up_proj [E, 2F, D] (gate rows first) and down_proj [E, D, F]; with `bias` also gate_up_proj_bias
    [E, 2F] and down_proj_bias [E, D].
    """

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

    def __call__(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        return super().__call__(x, weights, expert_ids, uncast=Uncast(weights))

    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor, uncast: Uncast | None = None) -> Tensor:
        """Apply `moe.ops.moe_mlp`: x [T, D], weights [T, K], expert_ids [T, K] -> [T, D].

        If a wrapper such as FSDP has cast the weights to half precision, they are taken from `uncast`, which `__call__`
        adds. A wrapper that casts before `__call__` rounds them.
        """
        if weights.dtype.itemsize < 4:
            weights = (weights if uncast is None else uncast.tensors[0].to(weights.device)).float()
        gate_up, down, gate_up_bias, down_bias = self.operands()
        _check_dtype(x, gate_up)
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
        """Return the parameters in the operator's order."""
        return self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias

    def extra_repr(self) -> str:
        experts, width, hidden = self.down_proj.shape
        return f"num_experts={experts}, width={width}, hidden={hidden}, bias={self.down_proj_bias is not None}"


class Dispatched(Protocol):
    """Tokens in transit to the ranks that have their experts."""

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what this rank's experts receive: rows [N, D], weights [N, K] and expert ids [N, K], -1 if absent."""
        ...


class Dispatcher(Protocol):
    """Moves tokens to experts and back. Other work may run between `dispatch` and `Dispatched.wait`."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        """Start sending x [T, D] to its experts."""
        ...

    def combine(self, y: Tensor, sent: Any) -> Tensor:
        """Sum the experts' outputs y [N, D] into the tokens of `sent`, [T, D]."""
        ...


@dataclass(frozen=True)
class _Local:
    rows: Tensor
    weights: Tensor
    expert_ids: Tensor

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.weights, self.expert_ids


class LocalDispatcher:
    """Dispatcher for a rank that has all experts: nothing is moved."""

    def dispatch(self, x: Tensor, routing: Routing) -> _Local:
        return _Local(x, routing.weights, routing.expert_ids)

    def combine(self, y: Tensor, sent: _Local) -> Tensor:
        return y


@dataclass(frozen=True)
class MoEStats:
    """Routing statistics of one forward pass of an MoE layer.

    Attributes:
        load: int64 [E], number of real tokens that chose each expert.
        tokens: int64 [B], number of real tokens of each sequence.
        terms: auxiliary losses of the routing, in training only; see `moe.balance.loss_terms`.
    """

    load: Tensor
    tokens: Tensor
    terms: tuple[Term, ...] = ()

    @property
    def balance_loss(self) -> Tensor:
        """Scalar balance loss, multiplied by its coefficient; 0 if that is 0. See `moe.balance.balance_loss`."""
        return self._sum("balance")

    @property
    def z_loss(self) -> Tensor:
        """Scalar z-loss, a mean over real tokens, multiplied by its coefficient; 0 if that is 0."""
        return self._sum("z")

    @property
    def aux_loss(self) -> Tensor:
        """Scalar sum of all terms."""
        return self._sum()

    def _sum(self, name: str | None = None) -> Tensor:
        means = [term.mean.value for term in self.terms if name is None or term.name == name]
        return torch.stack(means).sum() if means else torch.zeros((), device=self.load.device)


@dataclass(frozen=True)
class _MoELayerArguments(MoEConfig):
    """Arguments of `MoELayer`."""

    _: KW_ONLY
    seed: int | None = None


_MoELayerArguments.__init__.__qualname__ = "MoELayer.__init__"  # for Python's error about missing arguments


def _takes(
    arguments: Callable[Concatenate[Any, _Arguments], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _Arguments], None]]:
    """Give the decorated method the signature of `arguments`, for editors and `inspect`."""
    return wraps(arguments, assigned=(), updated=())  # pyright: ignore[reportReturnType]


class MoELayer(nn.Module):
    """Mixture-of-Experts feed-forward layer for any model: y = sum_k w_k expert_k(x) + shared(x).

    In training, the balance losses enter through autograd: y is unchanged, and its backward pass also adds their
    gradients (see `moe.balance.set_loss_scale` for accumulation and gradient scalers). With `return_stats` they are
    returned instead, and the caller adds them to the loss. Only `moe.balance.attach` updates the correction bias.

    Args:
        hidden_size: D, the width of tokens.
        moe_intermediate_size: F, the width of each routed expert.
        n_routed_experts: E, the number of routed experts.
        num_experts_per_tok: K, the number of routed experts per token.
        n_shared_experts: number of experts that every token uses; one MLP of n_shared_experts * moe_intermediate_size.
        shared_expert_intermediate_size: overrides the width of that MLP; requires n_shared_experts = 1.
        shared_expert_gate: multiply the output of that MLP by the sigmoid of a linear function of the token.
        expert_bias: biases in the projections of routed experts.
        swiglu_limit, swiglu_alpha, swiglu_beta: the activation of routed experts is
            u * sigmoid(swiglu_alpha * u) * (v + swiglu_beta). u is the gate half, clamped to at most swiglu_limit; v is
            the up half, clamped to swiglu_limit on both sides. A swiglu_limit of None means no clamping. The default is
            silu(u) * v.
        scoring_func: expert scores are the "sigmoid" or the "softmax" of the router's logits.
        topk_method: selection of experts. "noaux_tc": highest score plus correction bias; the bias balances the load
            and does not enter the weights, see `moe.balance.attach`. "group_limited_greedy" and "greedy": highest
            score, with and without groups.
        n_group: number of groups of consecutive experts, all of equal size.
        topk_group: number of groups from which a token's experts are selected, those of the highest group score: the
            sum of the group's two best experts for "noaux_tc", otherwise its best expert.
        norm_topk_prob: divide a token's weights, which are the scores of its experts, by their sum.
        routed_scaling_factor: multiplies the weights after normalisation.
        router_bias: add a bias to the router's logits.
        moe_norm_min: lower limit of the sum by which weights are divided.
        aux_loss_alpha: coefficient of the balance loss, `moe.balance.balance_loss`; 0 for none.
        seq_aux: compute the balance loss per sequence; otherwise per micro-batch, with expert counts of all ranks.
        router_z_loss_coef: coefficient of the mean squared logsumexp of the router's logits; 0 for none.
        initializer_range: standard deviation of initial weights. Initial biases are 0.
        seed: random seed of the initial weights, see `moe.init.initialize`; None draws one from torch's generator.

    Raises:
        ConfigError: an invalid value, as for `ModelConfig`, or an unknown keyword.
    """

    @_takes(_MoELayerArguments.__init__)
    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__()
        _MoELayerArguments.check_names(settings)
        self.config = config = _MoELayerArguments(*sizes, **settings)
        self.dispatcher: Dispatcher = LocalDispatcher()
        with skip_init():
            self.gate = Router(config.hidden_size, config)
            self.experts = Experts(
                config.n_routed_experts,
                config.hidden_size,
                config.moe_intermediate_size,
                bias=config.expert_bias,
                activation=config.activation,
            )
            self.shared_experts = MLP(config.hidden_size, config.shared_width) if config.shared_width else None
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        materialize(self, std=config.initializer_range, seed=config.seed)

    @classmethod
    def from_config(cls, config: MoEConfig, *, seed: int | None = None) -> Self:
        """Build the layer from a config, which may be a `ModelConfig`."""
        if not isinstance(config, MoEConfig):
            raise ConfigError("config", config, "a moe.config.MoEConfig or moe.ModelConfig, such as moe.preset('tiny')")
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
        """Map x [..., S, D] to y of the same shape, in x's dtype or autocast's; with `return_stats` to (y, MoEStats).

        Args:
            x: tokens; the second-to-last dimension is the sequence, and [T, D] is one sequence.
            token_mask: bool [..., S], True for real tokens. Padding, NaN included, does not affect experts, counts or
                losses, and its output is zero.
            routing: replaces the router's selection. A `Routing` is used unchanged, without a z-loss; int64 expert ids
                [T, K] are used with weights from this router's scores.
        """
        width = self.config.hidden_size
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            found = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise TypeError(f"x is {found}: expected a tensor of float32, float64, bfloat16 or float16")
        if x.ndim < 2 or x.shape[-1] != width:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., S, {width}]")
        shape = (math.prod(x.shape[:-2]), x.shape[-2])
        rows, padding = x.reshape(shape[0] * shape[1], width), None
        if token_mask is not None:
            if not isinstance(token_mask, Tensor):
                raise TypeError(f"token_mask is a {type(token_mask).__name__}: expected a tensor, torch.bool")
            if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
                found = f"{token_mask.dtype} {tuple(token_mask.shape)}"
                raise ValueError(f"token_mask is {found}: expected torch.bool {tuple(x.shape[:-1])}")
            token_mask = token_mask.reshape(shape)
            padding = ~token_mask.reshape(-1, 1)
            rows = rows.masked_fill(padding, 0)

        if routing is not None:
            needs_scores = self.training and self.config.aux_loss_alpha > 0
            _check_routing(routing, len(rows), self.config.n_routed_experts, needs_scores=needs_scores)
        if isinstance(routing, Routing):
            routing = routing._replace(logits=None, counter=None)
        else:
            routing = self.gate(rows) if routing is None else self.gate(rows, routing)
            if not isinstance(routing, Routing):
                raise TypeError(f"gate: expected a Routing as its result; found {type(routing).__name__}")
        counter: LoadCounter = routing.counter or self._router().load_counter
        if padding is not None:
            routing = routing._replace(expert_ids=routing.expert_ids.masked_fill(padding, -1))
        stats = self._stats(routing, counter.batch, shape, token_mask)
        if self.training:
            self._warn_of_idle_router()
            # Injected into the weights, not y, because y's gradient passes through them and they are smaller.
            weights = balance.inject_gradients(
                routing.weights,
                loss=None if return_stats or not stats.terms else stats.aux_loss,
                scale=counter.batch.scale,
                counter=counter.leaf,
                load=stats.load,
            )
            routing = routing._replace(weights=weights)

        sent = self.dispatcher.dispatch(rows, routing)
        shared = None if self.shared_experts is None else self._shared(rows)  # overlaps communication
        y = self.dispatcher.combine(self.experts(*sent.wait()), sent)
        y = y if shared is None else y + shared
        if padding is not None:  # adapters and hooks may have changed it
            y = y.masked_fill(padding, 0)
        # Not a view, because a view made without gradients cannot be modified in place later.
        y = torch.ops.aten._unsafe_view.default(y, x.shape)
        return (y, stats) if return_stats else y

    def extra_repr(self) -> str:
        sizes = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
        return ", ".join(f"{name}={getattr(self.config, name)}" for name in sizes)

    def divide(self, experts: nn.Module, dispatcher: Dispatcher) -> None:
        """Replace the experts by `experts`, this rank's part, and reach the others through `dispatcher`."""
        self.register_module("experts", experts)
        self.dispatcher = dispatcher

    def _warn_of_idle_router(self) -> None:
        reason = self.config.idle_router
        if reason is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.gate.parameters()):
            warnings.warn(f"the router does not learn: {reason}", stacklevel=2)

    def _router(self) -> Router:
        """Return the router inside any wrappers. PEFT registers the copy in use after the original."""
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
