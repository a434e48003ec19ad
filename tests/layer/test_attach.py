"""`moe.balance.attach` beside other optimizers, copies, averages, data parallelism and loss scales."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

import moe
from moe import balance
from moe.router import LoadCounter
from tests.support.models import MLA, small_model


def test_an_attached_copy_has_counters_and_a_scale_of_its_own() -> None:
    model = small_model(MLA)
    balance.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    balance.set_loss_scale(model, 0.25)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(router.counter is None for _, router in balance.routers(copied))
        assert {router.global_batch for _, router in balance.routers(copied)} == {copied.global_batch}
        assert copied.global_batch.loss_scale == 0.25
        balance.set_loss_scale(copied, 2.0)
        assert model.global_batch.loss_scale == 0.25


def test_an_attached_model_is_freed_while_its_graph_is_alive() -> None:
    """And so is its global batch, which holds a process group. DistributedDataParallel keeps graphs of its own."""
    model = small_model(MLA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = balance.attach(model, optimizer)
    logits = model(torch.randint(0, 61, (2, 8))).logits
    router = next(router for _, router in balance.routers(model))
    held = [weakref.ref(each) for each in (model, model.global_batch, router, router.load_counter)]
    del model, optimizer, handle, router
    gc.collect()
    assert [each() for each in held] == [None] * len(held) and logits.requires_grad


def test_the_loss_scale_reaches_a_model_whose_layers_were_replaced() -> None:
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradient(scale: float) -> Tensor:
        model = small_model(MLA).double()
        for i in range(len(model.layers)):
            model.layers[i] = copy.deepcopy(model.layers[i])
        balance.set_loss_scale(model, scale)
        (0 * model(ids).logits.sum()).backward()
        return next(router.weight.grad for _, router in balance.routers(model))

    assert gradient(1.0).abs().max() > 0
    torch.testing.assert_close(gradient(0.5), 0.5 * gradient(1.0), rtol=1e-12, atol=0)


def test_an_optimizer_inside_another_steps_the_bias() -> None:
    """Like accelerate's: it is an Optimizer whose hooks are those of the optimizer that it holds."""

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
    """An optimizer without hooks that holds others, like those of DeepSpeed, apex and schedule-free."""

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
    model = small_model(MLA)
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
    """DDP sees the tensors of an Output and none of the counters."""
    ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(0))

    def run(*, parallel: bool) -> moe.Transformer:
        model = small_model(MLA, num_nextn_predict_layers=1)
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
    assert found.keys() == expected.keys() == small_model(MLA, num_nextn_predict_layers=1).state_dict().keys()
    for name, exact in expected.items():
        assert torch.equal(found[name], exact), name


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_an_attached_model(use_buffers: bool) -> None:
    """Started in the middle of an accumulation. The correction bias is averaged or copied, and gets no updates."""
    model = small_model(MLA)
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
    """LBFGS: all backward passes of its closures are one step."""
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
    """With a speed of 0, also for routers without a correction bias."""
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
    module: Any = small_model(MLA, aux_loss_alpha=1.0, num_hidden_layers=1, first_k_dense_replace=0).double()
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
