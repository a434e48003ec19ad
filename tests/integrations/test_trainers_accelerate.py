"""accelerate around models of ours, against plain loops."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")

import moe
from moe import balance
from moe.output import Output

accelerate: Any = pytest.importorskip("accelerate")
CONFIG: Any = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
CONFIG |= dict(moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, aux_loss_alpha=0.02)
IDS = torch.randint(0, 61, (4, 2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """accelerate's settings are those of a process."""
    yield
    for state in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, state)._reset_state()


def build() -> moe.Transformer:
    return moe.Transformer(moe.ModelConfig(**CONFIG)).train()


def equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, tensor), exact in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, exact), name


@pytest.mark.parametrize("when", ["before", "after"])
def test_attach_before_and_after_prepare(when: str) -> None:
    """With accumulation, during which accelerate skips steps."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, alone = build(), build()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if when == "before":
        handle = balance.attach(model, optimizer, bias_update_speed=0.25)
        prepared, optimizer = accelerator.prepare(model, optimizer)
    else:
        prepared, optimizer = accelerator.prepare(model, optimizer)
        handle = balance.attach(prepared, optimizer, bias_update_speed=0.25)
    for ids in IDS:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    plain = torch.optim.AdamW(alone.parameters(), lr=0.01)
    balance.attach(alone, plain, bias_update_speed=0.25)
    for pair in IDS.split(2):
        for ids in pair:
            (alone(ids, labels=ids).loss / 2).backward()  # pyright: ignore[reportOptionalOperand]
        plain.step()
        plain.zero_grad()
    equal(model, alone)
    assert all(load.sum() == 4 * 2 * 10 * 2 for load in handle.loads().values())
    handle.remove()
    optimizer.step()


def test_outputs_under_mixed_precision_are_float32() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = build()
    prepared = accelerator.prepare(model)
    out = prepared(IDS[0], labels=IDS[0])
    assert type(out) is Output and out.logits.dtype == out.hidden.dtype == torch.float32 and out["loss"] is out.loss
    with torch.autocast("cpu", torch.bfloat16):
        expected = build()(IDS[0], labels=IDS[0])
    assert expected.logits.dtype == torch.bfloat16 and torch.equal(out.logits, expected.logits.float())
    assert torch.equal(out.load, expected.load)  # pyright: ignore[reportArgumentType]
    accelerator.backward(out.loss)


def test_a_saved_state_comes_back(tmp_path: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = build()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    balance.attach(prepared, optimizer, bias_update_speed=0.25)

    def step() -> None:
        accelerator.backward(prepared(IDS[0], labels=IDS[0]).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(str(tmp_path))
    step()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.load_state(str(tmp_path))
    step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
