"""A model's output as a dataclass, a mapping and a pytree."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch.nn.parallel.distributed import _find_tensors
from torch.utils import _pytree as pytree

import moe
from moe.output import Output


def make() -> Output:
    return Output(logits=torch.ones(2, 3), hidden=torch.zeros(2), loss=torch.tensor(4.0), losses={"ce": torch.ones(())})


def test_names_and_positions() -> None:
    out = make()
    assert dataclasses.is_dataclass(out) and isinstance(out, dict)
    assert list(out) == ["loss", "logits", "hidden", "losses"] and "load" not in out and out.load is None
    assert out["loss"] is out[0] is out.loss and out[1:3] == (out.logits, out.hidden)
    assert dict(out) == {name: getattr(out, name) for name in out}
    without = dataclasses.replace(out, loss=None)
    assert list(without) == ["logits", "hidden", "losses"] and without[0] is out.logits
    assert Output(logits=out.logits, hidden=out.hidden).losses == {}


def test_it_does_not_change() -> None:
    out: Any = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.loss = None
    changes = [
        lambda: out.__setitem__("loss", 1),
        lambda: out.__delitem__("loss"),
        lambda: out.__ior__({"loss": 1}),
        lambda: out.pop("loss"),
        lambda: out.setdefault("load", 1),
        lambda: out.update(loss=1),
        out.popitem,
        out.clear,
    ]
    for change in changes:
        with pytest.raises(TypeError, match="does not change"):
            change()
    for wrong in ({"logits": 1}, {**out, "more": 1}):
        with pytest.raises(TypeError, match="expected loss, logits, hidden, losses, load, found"):
            Output(wrong)


def test_libraries_make_outputs_of_mappings_and_pairs() -> None:
    """accelerate, transformers and DataParallel: to cast, to move, to detach, to gather."""
    out = make()
    for again in (Output({**out}), Output(out.items()), copy.copy(out), copy.deepcopy(out)):
        assert type(again) is Output and list(again) == list(out) and torch.equal(again.logits, out.logits)
    assert pickle.loads(pickle.dumps(out)).losses == out.losses


def test_torch_sees_its_tensors() -> None:
    out = make()
    assert [id(leaf) for leaf in pytree.tree_leaves(out)] == [id(t) for t in (*out[:3], out.losses["ce"])]
    assert {id(tensor) for tensor in _find_tensors(out)} == {id(leaf) for leaf in pytree.tree_leaves(out)}
    for doubled in (pytree.tree_map(lambda t: 2 * t, out), pytree.tree_map_with_path(lambda _, t: 2 * t, out)):
        assert type(doubled) is Output and doubled.loss == 8 and doubled.losses["ce"] == 2 and doubled.load is None


def test_a_compiled_model_returns_one() -> None:
    torch._dynamo.reset()
    settings: dict[str, Any] = dict(vocab_size=19, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    settings |= dict(intermediate_size=8, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2)
    model = moe.Transformer(moe.ModelConfig(**settings)).train()
    ids = torch.tensor([[1, 2, 3]])
    out = torch.compile(model, fullgraph=True, backend="eager")(ids, labels=ids)
    assert type(out) is Output and list(out) == list(model(ids, labels=ids))
    assert out.loss is not None and out["loss"] is out.loss
    out.loss.backward()
