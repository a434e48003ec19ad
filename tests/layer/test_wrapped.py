"""Modules that others put something around: hooks, adapters, wrappers, offloading. Nothing may change silently."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import moe
from moe import attention, balance
from moe.cache import Cache
from moe.errors import CheckpointError
from moe.router import LoadCounter
from moe.train.state import save_state

MLA = dict(kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
GQA = dict(num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)


def build(attention: dict[str, Any], **more: Any) -> moe.Transformer:
    settings: dict[str, Any] = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    settings |= dict(intermediate_size=24, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3)
    settings |= dict(first_k_dense_replace=1, aux_loss_alpha=0.1, router_z_loss_coef=0.01, initializer_range=0.2)
    return moe.Transformer(moe.ModelConfig(**settings | attention | more))


class Around(nn.Module):
    """What an adapter, a profiler or a quantiser is: a module that calls another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


class OneOfTwo(nn.Module):
    """As PEFT's modules_to_save: a copy is trained, and the original stays beside it."""

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
        model = build(MLA, num_nextn_predict_layers=1)
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
    model = build(attention, n_shared_experts=1, shared_expert_gate=True, **more).eval()
    ids = torch.tensor([[1, 2, 3], [9, 8, 7]])
    logits, text = model(ids).logits, moe.generate(model, ids, max_new_tokens=6)
    offload(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(moe.generate(model, ids, max_new_tokens=6), text)


class Adapter(nn.Module):
    """A low-rank adapter with a bias."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
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
    """Absorbed decoding of one token against all tokens at once, whose keys and values are expanded."""
    torch.manual_seed(0)
    model = build(MLA, max_position_embeddings=64).double().eval()
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
        model = build(MLA).double().eval()
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


def test_an_attached_copy_has_counters_and_a_scale_of_its_own() -> None:
    model = build(MLA)
    balance.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    balance.set_loss_scale(model, 0.25)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(router.counter is None for _, router in balance.routers(copied))
        assert {router.global_batch for _, router in balance.routers(copied)} == {copied.global_batch}
        assert copied.global_batch.loss_scale == 0.25
        balance.set_loss_scale(copied, 2.0)
        assert model.global_batch.loss_scale == 0.25


def test_the_loss_scale_reaches_a_model_whose_layers_were_replaced() -> None:
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradient(scale: float) -> Tensor:
        model = build(MLA).double()
        for i in range(len(model.layers)):
            model.layers[i] = copy.deepcopy(model.layers[i])
        balance.set_loss_scale(model, scale)
        (0 * model(ids).logits.sum()).backward()
        return next(router.weight.grad for _, router in balance.routers(model))

    assert gradient(1.0).abs().max() > 0
    torch.testing.assert_close(gradient(0.5), 0.5 * gradient(1.0), rtol=1e-12, atol=0)


def test_an_optimizer_inside_another_steps_the_bias() -> None:
    """As accelerate's: an Optimizer by its class, whose hooks are those of the one that it holds."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

        def step(self, closure: Any = None) -> Any:
            self.optimizer.step(closure)

    layer = moe.MoELayer(32, 16, 8, 2, seed=0)
    inner = torch.optim.SGD(layer.parameters(), lr=0.1)
    balance.attach(layer, Outer(inner))
    y, stats = layer(torch.randn(2, 9, 32), return_stats=True)
    y.sum().backward()
    inner.step()
    step = torch.sign(stats.load.double().mean() - stats.load).float()
    bias = layer.gate.e_score_correction_bias
    assert bias is not None and torch.equal(bias, 0.001 * step)


class Holder:
    """An optimizer of another library, without hooks, that holds others: as DeepSpeed's, apex's and schedule-free's."""

    param_groups: tuple[Any, ...] = ()

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_optimizer_within_wrappers_of_other_libraries_is_found(depth: int) -> None:
    layer = moe.MoELayer(32, 16, 8, 2, seed=0)
    inner: Any = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer: Any = inner
    for name in ("optimizer", "base", "_optim")[:depth]:
        optimizer = Holder(**{name: optimizer, "other": 3, f"same_{name}": optimizer})
    handle = balance.attach(layer, optimizer, bias_update_speed=0.5)
    layer(torch.randn(2, 9, 32)).sum().backward()
    inner.step()
    bias = layer.gate.e_score_correction_bias
    assert bias is not None and bias.abs().max() == 0.5
    handle.remove()


def sgd(layer: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(layer.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda layer: Holder(optimizer=Holder()), "found Holder, which holds 0"),
        (lambda layer: Holder(a=sgd(layer), b=sgd(layer)), "found Holder, which holds 2"),
        (lambda layer: [sgd(layer)], "found list, which holds 0"),
        (lambda layer: None, "found NoneType, which holds 0"),
    ],
)
def test_attach_that_fails_changes_nothing(optimizer: Any, message: str) -> None:
    layer = moe.MoELayer(32, 16, 8, 2, seed=0)
    with pytest.raises(ValueError, match=message):
        balance.attach(layer, optimizer(layer), group="a group")
    assert layer.gate.counter is None and layer.gate.global_batch.group is None
    balance.attach(layer, sgd(layer))


def test_attach_without_memory_for_the_counters_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(MLA)
    optimizer = sgd(model)
    start, last = LoadCounter.start, [router for _, router in balance.routers(model)][-1].load_counter

    def fails(self: LoadCounter, *args: Any) -> None:
        if self is last:
            raise MemoryError
        start(self, *args)

    monkeypatch.setattr(LoadCounter, "start", fails)
    with pytest.raises(MemoryError):
        balance.attach(model, optimizer)
    monkeypatch.undo()
    assert all(router.counter is None for _, router in balance.routers(model))
    model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is attached
        optimizer.step()  # no hook is left that would take counts
    balance.attach(model, optimizer)


def test_a_group_without_this_rank_is_refused(one_rank: Any) -> None:
    layer = moe.MoELayer(32, 16, 8, 2, topk_method="greedy")
    with pytest.raises(ValueError, match="this rank is not in the group"):
        balance.attach(layer, sgd(layer), group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    handle = balance.attach(layer, sgd(layer), group=one_rank)
    assert layer.gate.global_batch.group is one_rank
    handle.remove()


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """The group of a job with one process."""
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.new_group([0])
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_attach_beside_data_parallelism(when: str, one_rank: Any) -> None:
    """DDP sees the tensors of an Output, and nothing of the counters."""
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))

    def run(*, parallel: bool) -> moe.Transformer:
        model = build(MLA, num_nextn_predict_layers=1)
        optimizer = sgd(model)
        if when == "before":
            balance.attach(model, optimizer)
        wrapped: Any = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if parallel else model
        if when == "after":
            balance.attach(wrapped, optimizer)
        for _ in range(2):
            wrapped(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    found, expected = run(parallel=True).state_dict(), run(parallel=False).state_dict()
    assert found.keys() == expected.keys() == build(MLA, num_nextn_predict_layers=1).state_dict().keys()
    for name, exact in expected.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_an_attached_model(use_buffers: bool) -> None:
    """Begun amid an accumulation. The correction bias is averaged, or follows the model's, and gets no updates."""
    model = build(MLA)
    optimizer = sgd(model)
    balance.attach(model, optimizer, bias_update_speed=0.25)
    ids = torch.randint(0, 61, (3, 2, 8), generator=torch.Generator().manual_seed(0))
    model(ids[0]).logits.sum().backward()
    average = AveragedModel(model, avg_fn=lambda old, new, _: (old + new) / 2, use_buffers=use_buffers)
    seen = []
    for batch in ids:
        model(batch, labels=batch).loss.backward()  # pyright: ignore[reportOptionalMemberAccess]
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append(copy.deepcopy(model.state_dict()))
    parameters = dict(model.named_parameters())
    for name, tensor in average.module.state_dict().items():
        a, b, c = (state[name] for state in seen)
        averaged = ((a + b) / 2 + c) / 2 if name in parameters or use_buffers else c
        assert torch.equal(tensor, averaged), name
    assert all(router.counter is None for _, router in balance.routers(average))
    biases = [router.e_score_correction_bias for _, router in balance.routers(model)]
    assert all(bias.abs().max() > 0 for bias in biases)
    assert pickle.loads(pickle.dumps(average.module)).state_dict().keys() == model.state_dict().keys()


def test_a_closure_that_runs_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """LBFGS: what its closures sent backward is one step."""
    layer = moe.MoELayer(32, 16, 8, 2, seed=0)
    layer.gate.requires_grad_(False)  # so that each evaluation routes alike
    optimizer = torch.optim.LBFGS([p for p in layer.parameters() if p.requires_grad], max_iter=4, lr=1e-3)
    handle = balance.attach(layer, optimizer)
    x, loads = torch.randn(2, 9, 32), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        y, stats = layer(x, return_stats=True)
        loads.append(stats.load)
        loss = 1000 * y.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert len(loads) > 1
    assert torch.equal(handle.loads()["gate"], torch.stack(loads).sum(0))
    bias = layer.gate.e_score_correction_bias
    assert bias is not None
    assert torch.equal(bias, 0.001 * torch.sign(loads[0].double().mean() - loads[0]).float())


def test_loads_are_counted_without_updates() -> None:
    """With a speed of 0, for routers without a correction bias too."""
    layer = moe.MoELayer(32, 16, 8, 2, topk_method="greedy", seed=0)
    optimizer = sgd(layer)
    with pytest.raises(ValueError, match="no router with a correction bias"):
        balance.attach(layer, optimizer)
    handle = balance.attach(layer, optimizer, bias_update_speed=0)
    assert handle.loads() == {}
    loads = []
    for _ in range(3):
        y, stats = layer(torch.randn(2, 9, 32), return_stats=True)
        y.sum().backward()
        optimizer.step()
        loads.append(stats.load)
    assert torch.equal(handle.loads(reset=True)["gate"], torch.stack(loads).sum(0)) and handle.loads() == {}
    handle.remove()
    assert layer.gate.counter is None


@pytest.mark.parametrize("of", ["layer", "model"])
def test_another_loss_scale_compiles_nothing_anew(of: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    module: Any = build(MLA, aux_loss_alpha=1.0, num_hidden_layers=1, first_k_dense_replace=0).double()
    module = module if of == "model" else module.layers[0].mlp
    given = ids if of == "model" else x
    balance.attach(module, sgd(module))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if of == "layer" else "eager")

    def gradient(run: Any, scale: Any) -> Tensor:
        balance.set_loss_scale(module, scale)
        module.zero_grad()
        out = run(given)
        (0 * (out.logits if of == "model" else out).sum()).backward()
        return next(router.weight.grad.clone() for _, router in balance.routers(module))

    gradient(compiled, 1.0)
    gradient(compiled, 1.0)  # a model has a report only now
    graphs = counters["stats"]["unique_graphs"]
    for scale in (0.5, 1 / 3, 1024.0, 7, torch.tensor(3.5)):
        found = gradient(compiled, scale)
        torch.testing.assert_close(found, gradient(module, float(scale)), rtol=1e-12, atol=0)
        assert found.abs().max() > 0
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_a_scale_set_after_the_forward_pass_is_for_the_next() -> None:
    layer = moe.MoELayer(32, 16, 8, 2, aux_loss_alpha=0.5, seed=0).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    def gradient(later: float) -> Tensor:
        layer.zero_grad()
        balance.set_loss_scale(layer, 1.0)
        y = layer(x)
        balance.set_loss_scale(layer, later)
        y.sum().backward()
        grad = layer.gate.weight.grad
        assert grad is not None
        return grad.clone()

    assert torch.equal(gradient(9.0), gradient(1.0))


@pytest.mark.parametrize("around", ["mlp", "block", "mtp"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_a_reentrant_checkpoint_loses_the_balance_loss_and_is_refused(around: str, with_labels: bool) -> None:
    if around == "mtp" and not with_labels:
        return  # MTP modules run with labels only
    ids = torch.randint(0, 61, (2, 8))
    model: Any = build(MLA, num_nextn_predict_layers=1)
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
    """Their balance losses have no gradient, rightly; those of the others have the same as in the whole model."""
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradient(*, freeze: bool) -> Tensor:
        model = build(MLA).double()
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
    model = build(MLA).double().eval()
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
    model = build(MLA).eval()
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
    model = build(MLA).double().eval()
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
    """What moves the outputs of a module must not move the router."""
    routing = moe.MoELayer(32, 16, 8, 2, seed=0).gate(torch.randn(5, 32))
    assert not any(hasattr(part, "to") for part in routing if not isinstance(part, Tensor))


class Packed(Tensor):
    """What quantisers put in the place of a weight: a tensor whose values are elsewhere."""


CHANGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "subclass": (lambda weight: weight.as_subclass(Packed), "Packed"),
    "sparse": (lambda weight: weight.to_sparse(), "torch.sparse_coo"),
    "fake": (lambda weight: FakeTensorMode().from_tensor(weight), "FakeTensor"),
    "no tensor": (lambda weight: (weight, 1.0), "tuple"),
}


@pytest.mark.parametrize("how", list(CHANGES))
def test_a_tensor_that_is_not_dense_is_refused_before_anything_is_written(how: str, tmp_path: Path) -> None:
    change, found = CHANGES[how]
    model, name = build(MLA), "layers.1.self_attn.o_proj.weight"
    whole = model.state_dict()
    given = {**whole, name: change(whole[name])}
    message = f"{name}: not a dense tensor: dequantise the model, .*; expected torch.Tensor; found {found}$"
    model.state_dict = lambda: given  # pyright: ignore[reportAttributeAccessIssue]
    for save in (model.save, partial(moe.save, model), partial(save_state, tensors=given, values={"step": 1}, keep=1)):
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
