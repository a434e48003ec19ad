"""The warning about training a bias-balanced layer without `moe.balance.attach`, and when there is none."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moe import router
from moe.balance import attach
from moe.layer import MoELayer


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process that has not yet warned of training without `attach`."""
    watch = router._Watch()
    monkeypatch.setattr(router, "_watch", watch)
    yield watch
    if watch.hook is not None:
        watch.hook.remove()


def small_layer(**settings: Any) -> MoELayer:
    return MoELayer(8, 4, 4, 2, **settings)


def train(model: Any, optimizer: torch.optim.Optimizer, called: Any = None) -> list[str]:
    """The warnings of three training steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y = (model if called is None else called)(torch.randn(5, 8))
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_training_without_attach_warns_once(watched: Any, options: dict[str, Any]) -> None:
    model = torch.nn.Sequential(small_layer(), small_layer())
    (message,) = train(model, torch.optim.AdamW(model.parameters(), **options))
    assert "moe.balance.attach(model, optimizer)" in message and "bias_update_speed=0" in message
    other = small_layer()
    assert train(other, torch.optim.SGD(other.parameters(), lr=0.1)) == []  # once is enough
    assert watched.has_warned


def test_other_training_does_not_warn(watched: Any) -> None:
    def prepared(how: str) -> tuple[Any, torch.optim.Optimizer, Any]:
        layer = small_layer(topk_method="greedy" if how == "no bias" else "noaux_tc").train(how != "eval")
        if how == "frozen router":
            layer.gate.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad])
        if how == "router in no optimizer":
            optimizer = torch.optim.AdamW(layer.experts.parameters())
        if how in ("attached", "removed", "speed 0"):
            handle = attach(layer, optimizer, bias_update_speed=0.0 if how == "speed 0" else 0.001)
            if how == "removed":
                handle.remove()
        compiled = how == "compiled"
        return layer, optimizer, torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else None

    ways = ["attached", "removed", "speed 0", "eval", "no bias", "frozen router", "router in no optimizer", "compiled"]
    for how in ways:
        assert train(*prepared(how)) == [], how
    layer = small_layer()
    layer(torch.randn(5, 8))  # before attach: a forward pass alone is no training
    optimizer = torch.optim.AdamW(layer.parameters())
    attach(layer, optimizer)
    assert train(layer, optimizer) == []
    assert not watched.has_warned
    # A copy is not attached, and is a mistake of its own.
    copied = copy.deepcopy(layer)
    assert len(train(copied, torch.optim.AdamW(copied.parameters()))) == 1


def test_watching_costs_no_graph_break_and_no_recompilation(watched: Any) -> None:
    torch._dynamo.reset()
    layer = small_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    assert train(layer, optimizer, torch.compile(layer, fullgraph=True, backend=counter)) == []
    attach(layer, optimizer)
    assert counter.frame_count == 1
    assert not watched.routers and watched.hook is None
