"""Every family the same: what is saved comes back, in each of its layouts, and a cut of it is a model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moe
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.families import FAMILIES
from moe.config import ModelConfig
from tests.checkpoint_cases import BY_FAMILY, assert_same, build

each_family = pytest.mark.parametrize("name", BY_FAMILY)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def plain(config: ModelConfig) -> ModelConfig:
    """Without what two files can spell differently."""
    heads = config.num_key_value_heads or config.num_attention_heads
    return dataclasses.replace(config, num_key_value_heads=heads, layer_types=None, extra={})


def test_no_family_is_left_out() -> None:
    assert BY_FAMILY.keys() == FAMILIES.keys()


@each_family
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = build(BY_FAMILY[name], dtype=torch.bfloat16)
    model.save(tmp_path / "m")
    back = moe.load(tmp_path / "m")
    assert_same(back, model)
    assert plain(back.config) == plain(model.config)
    back.save(tmp_path / "again")
    for file in (tmp_path / "m").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert read_summary(tmp_path / "m").agrees


@each_family
def test_every_layout_holds_the_same_model(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(BY_FAMILY[name], num_nextn_predict_layers=0)  # not every layout has names for it
    model = build(config, dtype=torch.bfloat16)
    model.save(tmp_path / "m")
    first, *others = FAMILIES[name].tables
    for table in others:
        if table == "mxfp4":  # of other values
            continue
        convert(tmp_path / "m", tmp_path / table, table=table)
        assert_same(moe.load(tmp_path / table), model)
        assert tensors(tmp_path / table).keys() != tensors(tmp_path / "m").keys()
        convert(tmp_path / table, tmp_path / f"{table}.back", table=first)
        for file in (tmp_path / "m").glob("*.safetensors"):
            assert (tmp_path / f"{table}.back" / file.name).read_bytes() == file.read_bytes()


@each_family
def test_a_cut_of_every_layout(name: str, tmp_path: Path) -> None:
    """Two layers and some experts: each tensor is the model's, or the rows of those experts."""
    config = dataclasses.replace(BY_FAMILY[name], num_nextn_predict_layers=0)
    model = build(config)
    model.save(tmp_path / "m")
    layers, experts = [0, 2], [0, 2, 5, 7, 9, 11]
    for table in FAMILIES[name].tables:
        if table == "mxfp4":
            continue
        convert(tmp_path / "m", tmp_path / table, table=table)
        if table == "experts" and config.n_group > 1:
            experts = [0, 2, 3, 5, 6, 8, 9, 11]
        cut(tmp_path / table, tmp_path / f"{table}.cut", layers=layers, experts=experts, compare=False)
        part, whole = moe.load(tmp_path / f"{table}.cut").state_dict(), model.state_dict()
        for parameter, found in part.items():
            mine = parameter
            if parameter.startswith("layers."):
                _, layer, rest = parameter.split(".", 2)
                mine = f"layers.{layers[int(layer)]}.{rest}"
            expected = whole[mine]
            if ".mlp.experts." in mine or ".mlp.gate." in mine:
                expected = expected[experts]
            assert torch.equal(found, expected), parameter


def test_ernies_correction_bias_is_a_row_in_the_files(tmp_path: Path) -> None:
    model = build(BY_FAMILY["ernie4_5_moe"])
    model.save(tmp_path / "m")
    bias = tensors(tmp_path / "m")["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    mine = model.state_dict()["layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.shape == (1, len(mine)) and bias.dtype == torch.float32
    assert torch.equal(bias[0], mine)
