"""The Mixture-of-Experts layer: experts, shared experts, and the layer that routes tokens to them."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Self, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import balance, ops
from moe.config import MoEConfig
from moe.init import materialize
from moe.ops import Routing, SwiGLU
from moe.router import Router

P = ParamSpec("P")


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


def local_dispatcher(
    x: Tensor, routing: Routing, experts: Experts, shared: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """x [T, D] through its experts, plus shared(x): [T, D]. Every expert is here: no communication."""
    y = experts(x, routing.weights, routing.expert_ids)
    return y if shared is None else y + shared(x)


@dataclass(frozen=True)
class MoEStats:
    """What a MoE layer did with one input.

    Attributes:
        load: int64 [E], real tokens that chose each expert.
        balance_loss, z_loss: scalars, already multiplied by their coefficients; 0 where a coefficient is 0. They are
            means, the first over the sequences that have a real token (all real tokens without `seq_aux`), the second
            over real tokens.
        tokens: int64 [B], real tokens of each sequence.
    """

    load: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    tokens: Tensor

    @property
    def aux_loss(self) -> Tensor:
        return self.balance_loss + self.z_loss


@dataclass(frozen=True)
class _MoELayerArguments(MoEConfig):
    """The arguments of `MoELayer`."""

    _: KW_ONLY
    seed: int | None = None


def _takes(
    arguments: Callable[Concatenate[Any, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
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
        config = _MoELayerArguments(*sizes, **settings)
        self.hidden_size = config.hidden_size
        self.alpha, self.seq_aux, self.z_coef = config.aux_loss_alpha, config.seq_aux, config.router_z_loss_coef
        # Swapped by moe.parallel for one that reaches experts on other ranks, and computes `shared` meanwhile.
        self.dispatcher: Callable[..., Tensor] = local_dispatcher
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
        if x.ndim < 2 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [..., S, {self.hidden_size}]")
        shape = (math.prod(x.shape[:-2]), x.shape[-2])
        rows = x.reshape(shape[0] * shape[1], x.shape[-1])
        if token_mask is not None:
            if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
                found = f"{token_mask.dtype} {tuple(token_mask.shape)}"
                raise ValueError(f"token_mask is {found}: expected torch.bool {tuple(x.shape[:-1])}")
            token_mask = token_mask.reshape(shape)
            rows = rows.masked_fill(~token_mask.reshape(-1, 1), 0)

        logits = None
        if isinstance(routing, Routing):
            chosen = routing
        else:
            logits = self.gate.logits(rows)
            chosen = self.gate.route(logits) if routing is None else self.gate.replay(logits, routing)
        if token_mask is not None:
            ids = chosen.expert_ids.masked_fill(~token_mask.reshape(-1, 1), -1)
            chosen = Routing(chosen.weights, ids, chosen.scores)

        stats = self._stats(chosen, logits, shape, token_mask)
        if self.training:
            gate = self.gate
            loss = None if return_stats or not (self.alpha or self.z_coef) else stats.aux_loss
            # On the weights and not on y: y's gradient passes through them, and they are a D-th of its size.
            weights = balance.carry(
                chosen.weights, loss=loss, scale=gate.loss_scale, counter=gate.counter, load=stats.load
            )
            chosen = Routing(weights, chosen.expert_ids, chosen.scores)
        y = self.dispatcher(rows, chosen, self.experts, None if self.shared_experts is None else self._shared)
        y = y.view(x.shape)
        return (y, stats) if return_stats else y

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared_experts is not None
        y = self.shared_experts(x)
        return y if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * y

    def _stats(
        self, routing: Routing, logits: Tensor | None, shape: tuple[int, int], token_mask: Tensor | None
    ) -> MoEStats:
        ids = routing.expert_ids.view(*shape, routing.expert_ids.shape[1])
        zero = routing.scores.new_zeros(())
        loss, z = zero, zero
        if self.training and self.alpha:
            scores = routing.scores.view(*shape, self.gate.num_experts)
            loss = self.alpha * balance.balance_loss(
                scores, ids, token_mask, seq_aux=self.seq_aux, group=self.gate.group
            )
        if self.training and self.z_coef and logits is not None:
            z = self.z_coef * balance.z_loss(logits.view(*shape, self.gate.num_experts), token_mask)
        load = balance.expert_load(routing.expert_ids, self.gate.num_experts)
        tokens = load.new_full(shape[:1], shape[1]) if token_mask is None else token_mask.sum(-1)
        return MoEStats(load, loss, z, tokens)
