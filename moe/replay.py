"""Routing of a model, recorded in some forward passes and replayed in others.

Reinforcement learning generates token by token and trains on whole sequences. The two round differently, so a router
may select other experts at a near tie, and the probability ratio is then not 1 before the first update. Replaying the
rollout's experts in training (arXiv 2510.11370) removes this difference. The weights are computed from the router's
current scores, so the router learns.

Routers are only hooked, within a context manager. L layers, B sequences, S positions, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from moe.balance import routers
from moe.ops import Routing
from moe.router import Router


@dataclass(frozen=True, eq=False)
class Routes:
    """Recorded routing of a batch.

    Attributes:
        layers: names of the L routers, as in `moe.balance.routers`.
        expert_ids: int64 [L, B, S, K], -1 for padding.
        weights: routing weights, floating point [L, B, S, K].
    """

    layers: tuple[str, ...]
    expert_ids: Tensor
    weights: Tensor

    def select(self, rows: Tensor, positions: slice = slice(None)) -> "Routes":
        """Return the routes of the sequences `rows` (int64 indices) at `positions`."""
        ids, weights = (each.index_select(1, rows)[:, :, positions] for each in (self.expert_ids, self.weights))
        return Routes(self.layers, ids, weights)


@contextmanager
def observing(model: nn.Module, keep: Callable[[str, Router, Tensor, Routing], None]) -> Iterator[None]:
    """Call keep(name, router, x [T, D], routing) after each call of a router of `model` within the block."""
    with ExitStack() as stack:
        for name, router in routers(model):
            hook = lambda module, args, routing, name=name: keep(name, module, args[0], routing)  # noqa: E731
            stack.callback(router.register_forward_hook(hook).remove)
        yield


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Yield a dict that maps the name of each router to its last routing within the block.

    Names are in the order of `moe.balance.routers`. Routers that have not run, such as those of MTP modules, are
    missing. Routers see padding as any other token.
    """
    found: dict[str, Routing] = {}
    with observing(model, lambda name, _, x, routing: found.update({name: routing})):
        yield found


class Replay:
    """Context manager that replays recorded routing in the forward passes of a block, and measures its difference.

        with Replay(model) as replay:
            for batch, routes in batches:
                replay.use(routes)
                loss(model(**batch)).backward()

    The named routers get the recorded expert ids, and compute the weights from their current scores. All other routers
    are unchanged. The router's own selection is compared with the recorded ids; it is the selection for the replayed
    input of the layer, which other experts in earlier layers would change.

    With activation checkpointing, layers run again in the backward pass, with the routes that were used last. They are
    then counted once more, which does not change the results.

    Args:
        model: any model with `moe.router.Router` modules.
        compare_only: leave the routing as it is, and measure only.

    Within the block, a forward pass raises ValueError if no routes were given or if it has another number of tokens,
    and IndexError for an expert that a layer does not have (on CPU; a device assertion on CUDA).
    """

    def __init__(self, model: nn.Module, *, compare_only: bool = False) -> None:
        self._routers: dict[str, Router] = dict(routers(model))
        self._names: dict[nn.Module, str] = {router: name for name, router in self._routers.items()}
        self._model, self._replays, self._stack = model, not compare_only, ExitStack()
        self._recorded: dict[str, tuple[Tensor, Tensor]] = {}
        self._slots: Tensor | int = 0
        self._same: Tensor | int = 0
        self._largest: Tensor | None = None

    def use(self, routes: Routes) -> None:
        """Replay `routes` from now on. Raises ValueError if they name a router that the model does not have."""
        if unknown := [name for name in routes.layers if name not in self._routers]:
            raise ValueError(f"routes: expected routers of the model ({', '.join(self._routers)}); found {unknown[0]}")
        parts = zip(routes.layers, routes.expert_ids.flatten(1, 2), routes.weights.flatten(1, 2), strict=True)
        self._recorded = {name: (ids, weights) for name, ids, weights in parts}

    @property
    def slots(self) -> int:
        """Number of recorded expert ids that were compared, without padding."""
        return int(self._slots)

    @property
    def same(self) -> int:
        """Number of recorded expert ids that the routers select for the same token, whatever their order."""
        return int(self._same)

    @property
    def weight_difference(self) -> float:
        """Largest |difference| between a recorded weight and the one that the layer used for the same expert."""
        return 0.0 if self._largest is None else self._largest.item()

    def __enter__(self) -> Self:
        for router in self._routers.values() if self._replays else ():
            self._stack.callback(router.register_forward_pre_hook(self._replace).remove)
        self._stack.enter_context(observing(self._model, self._measure))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _given(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the recorded ids and weights [T, K] for the input x [T, D] of a router."""
        if not self._recorded:
            raise ValueError("routes: expected a call of `use` before the forward pass; found none")
        ids, weights = self._recorded[name]
        if len(x) != len(ids):
            raise ValueError(f"routes: {name} was recorded for {len(ids)} tokens; found {len(x)}")
        return ids, weights

    def _replace(self, router: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        name = self._names[router]
        replays = not self._recorded or name in self._recorded  # without any, `_given` raises
        return (args[0], self._given(name, args[0])[0]) if replays else None

    @torch.no_grad()
    def _measure(self, name: str, router: Router, x: Tensor, used: Routing) -> None:
        if name not in self._recorded:
            return
        ids, weights = self._given(name, x)
        own = used.expert_ids
        if self._replays:
            assert used.logits is not None
            own = router.route(used.logits).expert_ids
        real = ids >= 0
        self._slots = self._slots + real.sum()
        self._same = self._same + ((ids[:, :, None] == own[:, None, :]).any(-1) & real).sum()
        shared = (ids[:, :, None] == used.expert_ids[:, None, :]) & real[:, :, None]
        largest = (used.weights[:, None, :] - weights[:, :, None]).abs().masked_fill(~shared, 0).amax()
        self._largest = largest if self._largest is None else self._largest.maximum(largest)
