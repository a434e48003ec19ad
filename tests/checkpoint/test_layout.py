"""The table of names: it tiles every parameter exactly, and it is the released one."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

import moe
from moe import CheckpointError, ModelConfig
from moe.checkpoint.format.layout import layout
from moe.counts import count_parameters, parameter_shapes
from tests.support.checkpoint_cases import V3, V3_MTP, configs


@settings(deadline=None, derandomize=True, max_examples=60)
@given(configs("deepseek_v3") | configs("deepseek_v2"))
def test_slots_tile_the_parameters(config: ModelConfig) -> None:
    shapes = parameter_shapes(config)
    filled = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    for name, slot in layout(config).items():
        assert slot.name == name
        assert filled[slot.parameter][slot.index].shape == slot.shape
        if not slot.repeat:
            filled[slot.parameter][slot.index] += 1
    for counts in filled.values():
        assert (counts == 1).all()


def test_where_one_expert_goes() -> None:
    slots = layout(V3_MTP)
    width, hidden = V3.hidden_size, V3.moe_intermediate_size
    experts = "model.layers.1.mlp.experts.7"
    gate, up, down = (slots[f"{experts}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    assert gate.parameter == up.parameter == "layers.1.mlp.experts.gate_up_proj"
    assert (gate.index, up.index) == ((7, slice(0, hidden)), (7, slice(hidden, 2 * hidden)))
    assert gate.shape == up.shape == (hidden, width)
    assert (down.parameter, down.index, down.shape) == ("layers.1.mlp.experts.down_proj", (7,), (width, hidden))


def test_where_mtp_goes() -> None:
    slots = layout(V3_MTP)
    second = {
        name.removeprefix("model.layers.4."): s for name, s in slots.items() if name.startswith("model.layers.4.")
    }
    assert second["enorm.weight"].parameter == "mtp.1.enorm.weight"
    assert second["shared_head.norm.weight"].parameter == "mtp.1.norm.weight"
    assert second["eh_proj.weight"].shape == (V3.hidden_size, 2 * V3.hidden_size)
    assert second["mlp.gate.e_score_correction_bias"].parameter == "mtp.1.block.mlp.gate.e_score_correction_bias"
    repeats = {name: s.parameter for name, s in second.items() if s.repeat}
    assert repeats == {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    assert "model.layers.5.enorm.weight" not in slots


def test_a_config_that_asks_for_billions_of_tensors() -> None:
    config = dataclasses.replace(V3, n_routed_experts=2**24, moe_intermediate_size=1, num_hidden_layers=100)
    with pytest.raises(CheckpointError, match="expected at most 262144; found 1660944384"):
        layout(config)


def test_the_released_deepseek_v3() -> None:
    config = moe.preset("deepseek_v3")
    slots = layout(config)
    values = sum(math.prod(slot.shape) for slot in slots.values())
    assert values == count_parameters(config).released == 684_489_845_504
    # FP8 files have a scale for each projection of attention, MLPs and experts, one for each block of 128 x 128.
    scaled = [s for s in slots.values() if s.name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in s.name]
    scaled = [slot for slot in scaled if "eh_proj" not in slot.name]
    assert len(slots) + len(scaled) == 91_991
    scales = sum(math.prod(-(-size // 128) for size in slot.shape) for slot in scaled)
    assert values + scales == 684_531_386_000
    kinds = Counter(slot.shape for slot in slots.values() if ".mlp.experts." in slot.name)
    assert kinds == {(2048, 7168): 59 * 256 * 2, (7168, 2048): 59 * 256}
