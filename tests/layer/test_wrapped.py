"""Modules with hooks, adapters, wrappers and offloading around them. Nothing may change silently."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import moe
from moe import attention, balance
from moe.cache import Cache
from moe.errors import CheckpointError
from moe.train.state import save_state
from tests.support.models import GQA, MLA, small_model


class Around(nn.Module):
    """A module that calls another one, like an adapter, a profiler or a quantiser."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


class OneOfTwo(nn.Module):
    """Like PEFT's modules_to_save: a copy is trained, and the original is kept."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original_module)})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.modules_to_save["default"](*args, **kwargs)


def same_module(module: nn.Module) -> nn.Module:
    return module


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "none": same_module,
    "around": Around,
    "checkpoint": checkpoint_wrapper,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "copied": OneOfTwo,
}


def test_a_layer_calls_its_modules() -> None:
    layer = moe.MoELayer(32, 16, 8, 2, n_shared_experts=1, shared_expert_gate=True, seed=0)
    called = {name: 0 for name, module in layer.named_modules() if name}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            called[name] += 1

        return hook

    for name, module in layer.named_modules():
        if name:
            module.register_forward_hook(count(name))
    layer(torch.randn(2, 5, 32))
    assert set(called.values()) == {1}, called


@pytest.mark.parametrize("given", ["nothing", "ids", "routing"])
def test_a_module_around_the_router(given: str) -> None:
    layer = moe.MoELayer(32, 16, 8, 2, seed=0, aux_loss_alpha=0.1, initializer_range=0.3)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]])
    routing: Any = None
    if given == "routing":
        with torch.no_grad():
            routing = layer.gate(x.flatten(0, 1))
        routing.weights.requires_grad_()
    elif given == "ids":
        routing = torch.arange(20).view(10, 2) % 8

    def run(layer: moe.MoELayer) -> tuple[Any, ...]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        handle = balance.attach(layer, optimizer)
        y, stats = layer(x, mask, routing, return_stats=True)
        (y.square().sum() + stats.aux_loss).backward()
        (router,) = [router for _, router in balance.routers(layer)]
        found = y.detach(), stats.load, stats.aux_loss.detach(), router.counter.grad.clone()
        handle.remove()
        return found

    expected = run(copy.deepcopy(layer))
    layer.gate = around = Around(layer.gate)  # pyright: ignore[reportAttributeAccessIssue]
    for found, exact in zip(run(layer), expected, strict=True):
        assert torch.equal(found, exact)
    assert around.calls == (given != "routing")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_a_wrapped_layer_of_a_model(wrapper: str) -> None:
    """Padding, losses, counts and reports are those of the plain model, each under its layer's name."""
    ids = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run(wrap: Callable[[nn.Module], Any]) -> dict[str, Any]:
        model = small_model(MLA, num_nextn_predict_layers=1)
        blocks: list[Any] = [*model.layers, model.mtp[0].block]
        for block in blocks:
            block.mlp = wrap(block.mlp)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        balance.attach(model, optimizer)
        out = model(ids, labels=ids, attention_mask=mask)
        (out.loss / 4).backward()
        active = [router for _, router in balance.routers(model) if router.counter.grad is not None]
        found = {"load": out.load, "loss": out.loss.detach(), **out.losses}
        found |= {f"counter {i}": router.counter.grad.clone() for i, router in enumerate(active)}
        found |= {f"gradient {i}": router.weight.grad for i, router in enumerate(active)}
        optimizer.step()
        found |= {f"bias {i}": router.e_score_correction_bias for i, router in enumerate(active)}
        report = model.load_report()
        return found | {"report": report.load, "names": report.layers}

    expected, found = run(same_module), run(WRAPPERS[wrapper])
    assert expected["names"] == ["layers.1.mlp.gate", "layers.2.mlp.gate", "mtp.0.block.mlp.gate"]
    assert found.pop("names") == expected.pop("names") and found.keys() == expected.keys()
    for name, exact in expected.items():
        assert torch.equal(found[name], exact), name


def offload(module: nn.Module) -> None:
    """Keep every parameter and buffer away from its module, except while that module is called."""
    for child in module.modules():
        away = {**child._parameters, **child._buffers}
        away = {name: tensor for name, tensor in away.items() if tensor is not None}
        if not away:
            continue

        def fetch(child: nn.Module, *_: Any, away: dict[str, Tensor] = away) -> None:
            for name, tensor in away.items():
                (child._parameters if name in child._parameters else child._buffers)[name] = tensor  # pyright: ignore

        def leave(child: nn.Module, *_: Any, away: dict[str, Tensor] = away) -> None:
            for name, tensor in away.items():
                empty = tensor.detach().to("meta")
                if name in child._parameters:
                    child._parameters[name] = nn.Parameter(empty, requires_grad=False)
                else:
                    child._buffers[name] = empty

        child.register_forward_pre_hook(fetch)
        child.register_forward_hook(leave)
        leave(child)


@pytest.mark.parametrize(("attention", "more"), [(MLA, {}), (GQA, {}), (GQA, {"qk_norm": "head"})])
@torch.no_grad()
def test_offloaded_parameters_come_back_where_they_are_used(attention: dict[str, Any], more: dict[str, Any]) -> None:
    model = small_model(attention, n_shared_experts=1, shared_expert_gate=True, **more).eval()
    ids = torch.tensor([[1, 2, 3], [9, 8, 7]])
    logits, text = model(ids).logits, moe.generate(model, ids, max_new_tokens=6)
    offload(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(moe.generate(model, ids, max_new_tokens=6), text)


class Adapter(nn.Module):
    """A low-rank adapter with a bias. Like PEFT's, it also shows the weight of the layer that it wraps."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight
        self.a = nn.Linear(inner.in_features, 2, bias=False, dtype=inner.weight.dtype)
        self.b = nn.Linear(2, inner.out_features, dtype=inner.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.b(self.a(x))


class Int8(nn.Module):
    """A linear layer whose weight is rounded to integers, one scale for each row."""

    codes: Tensor
    scale: Tensor

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        scale = inner.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (inner.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.to(x.dtype)) * self.scale.mT


@pytest.mark.parametrize("around", [Adapter, Int8])
@torch.no_grad()
def test_decoding_includes_what_is_around_the_latent(around: Callable[[nn.Linear], nn.Module]) -> None:
    """Absorbed decoding, token by token, against all tokens at once with expanded keys and values."""
    torch.manual_seed(0)
    model = small_model(MLA, max_position_embeddings=64).double().eval()
    for block in model.layers:
        latent: Any = block.self_attn
        latent.kv_b_proj = around(latent.kv_b_proj)
    ids = torch.randint(0, 61, (2, 20))
    expected = model(ids).logits
    cache = Cache(model.config)
    model(ids[:, :10], cache=cache)
    for at in range(10, 20):
        found = model(ids[:, at : at + 1], cache=cache).logits
        torch.testing.assert_close(found[:, 0], expected[:, at], rtol=1e-10, atol=1e-10)


def test_a_decoding_step_with_gradients_reaches_the_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """After steps without gradients, against the same step with expanded keys and values."""
    ids = torch.randint(0, 61, (2, 10), generator=torch.Generator().manual_seed(0))

    def gradient() -> Tensor:
        model = small_model(MLA).double().eval()
        cache = Cache(model.config)
        with torch.no_grad():
            model(ids[:, :8], cache=cache)
            model(ids[:, 8:9], cache=cache)
        model(ids[:, 9:], cache=cache).logits.square().sum().backward()
        latent: Any = model.layers[1].self_attn
        return latent.kv_b_proj.weight.grad

    found = gradient()
    monkeypatch.setattr(attention.MLA, "_absorbing_is_cheaper", lambda *_: False)
    torch.testing.assert_close(found, gradient(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("around", ["mlp", "block", "mtp"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_a_reentrant_checkpoint_loses_the_balance_loss_and_is_refused(around: str, with_labels: bool) -> None:
    if around == "mtp" and not with_labels:
        return  # MTP modules run with labels only
    ids = torch.randint(0, 61, (2, 8))
    model: Any = small_model(MLA, num_nextn_predict_layers=1)
    wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    if around == "mlp":
        model.layers[1].mlp = wrap(model.layers[1].mlp)
    elif around == "block":
        model.layers[1] = wrap(model.layers[1])
    else:
        model.mtp[0] = wrap(model.mtp[0])
    with pytest.raises(ValueError, match="checkpoint it with use_reentrant=False"):
        model(ids, labels=ids if with_labels else None)


def test_layers_below_what_is_trained_may_be_frozen() -> None:
    """Their balance losses have no gradient; those of the other layers have the same as in the whole model."""
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradient(*, freeze: bool) -> Tensor:
        model = small_model(MLA).double()
        for part in (model.embed_tokens, *model.layers[:2]):
            part.requires_grad_(not freeze)
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        router: Any = list(balance.routers(model))[-1][1]
        assert all((r.weight.grad is None) == freeze for _, r in list(balance.routers(model))[:-1])
        return router.weight.grad

    torch.testing.assert_close(gradient(freeze=True), gradient(freeze=False), rtol=1e-12, atol=1e-15)


@torch.no_grad()
def test_a_cache_forgets_old_weights_with_its_tokens() -> None:
    model = small_model(MLA).double().eval()
    ids = torch.randint(0, 61, (2, 8))
    cache = Cache(model.config)
    for i in range(8):
        model(ids[:, i : i + 1], cache=cache)
    cache.truncate(0)
    for block in model.layers:
        latent: Any = block.self_attn
        latent.kv_b_proj.weight.mul_(1.5)
    found = [model(ids[:, i : i + 1], cache=cache).logits for i in range(8)][-1]
    torch.testing.assert_close(found[:, 0], model(ids).logits[:, -1], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_decoding_under_autocast_and_then_without() -> None:
    model = small_model(MLA).eval()
    ids = torch.randint(0, 61, (1, 8))
    cache = Cache(model.config)
    model(ids[:, :6], cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, 6:7], cache=cache)
    found = model(ids[:, 7:8], cache=cache).logits[:, 0]
    torch.testing.assert_close(found, model(ids).logits[:, -1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("hook", ["outputs", "inputs", "affine"])
@torch.no_grad()
def test_decoding_includes_a_hook_on_the_latent(hook: str) -> None:
    """One that is not linear rules absorption out."""
    torch.manual_seed(0)
    model = small_model(MLA).double().eval()
    for block in model.layers:
        latent: Any = block.self_attn
        if hook == "inputs":
            latent.kv_b_proj.register_forward_pre_hook(lambda _, args: (args[0].clamp(-0.3, 0.3),))
        else:
            change = (lambda y: y.clamp(-0.3, 0.3)) if hook == "outputs" else (lambda y: 2 * y + 1)
            latent.kv_b_proj.register_forward_hook(lambda _, args, y, change=change: change(y))
    ids = torch.randint(0, 61, (2, 12))
    cache = Cache(model.config)
    found = [model(ids[:, at : at + 1], cache=cache).logits for at in range(12)][-1]
    torch.testing.assert_close(found[:, 0], model(ids).logits[:, -1], rtol=1e-9, atol=1e-9)


def test_padding_stays_zero_when_something_adds_to_it() -> None:
    layer = moe.MoELayer(32, 16, 8, 2, n_shared_experts=1, seed=0)
    assert layer.shared_experts is not None
    for module in (layer.experts, layer.shared_experts):
        module.register_forward_hook(lambda _, args, y: torch.add(y, 1))  # pyright: ignore
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[5], [3]])
    y = layer(torch.randn(2, 5, 32), mask)
    assert y[~mask].abs().max() == 0 and y[mask].abs().min() > 0


def test_a_gate_must_return_a_routing() -> None:
    layer = moe.MoELayer(32, 16, 8, 2, seed=0)
    layer.gate = nn.Linear(32, 8)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="gate: expected it to return a Routing, found Tensor"):
        layer(torch.randn(2, 5, 32))


def test_a_routing_holds_no_module() -> None:
    """Code that moves a module's outputs must not move the router."""
    routing = moe.MoELayer(32, 16, 8, 2, seed=0).gate(torch.randn(5, 32))
    assert not any(hasattr(part, "to") for part in routing if not isinstance(part, Tensor))


class Packed(Tensor):
    """A tensor whose values are elsewhere, as quantisers put in the place of a weight."""


CHANGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "subclass": (lambda weight: weight.as_subclass(Packed), "Packed"),
    "sparse": (lambda weight: weight.to_sparse(), "torch.sparse_coo"),
    "fake": (lambda weight: FakeTensorMode().from_tensor(weight), "FakeTensor"),
    "no tensor": (lambda weight: (weight, 1.0), "tuple"),
}


@pytest.mark.parametrize("how", list(CHANGES))
def test_a_tensor_that_is_not_dense_is_refused_before_anything_is_written(how: str, tmp_path: Path) -> None:
    change, found = CHANGES[how]
    model, name = small_model(MLA), "layers.1.self_attn.o_proj.weight"
    whole = model.state_dict()
    given = {**whole, name: change(whole[name])}
    message = f"{name}: not a dense tensor: dequantise the model, .*; expected torch.Tensor; found {found}$"
    model.state_dict = lambda: given  # pyright: ignore[reportAttributeAccessIssue]
    for save in (model.save, partial(moe.save, model), partial(save_state, tensors=given, values={"step": 1}, keep=1)):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
