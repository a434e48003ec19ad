"""Every family: what is saved comes back in each of its layouts, and a cut of it is a model.

For families whose files hold more than the model: what is left out, and what a save then writes.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe
from moe import CheckpointError
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format.families import FAMILIES
from moe.config import ModelConfig
from tests.support.checkpoint_cases import BY_FAMILY, as_kimi_k25, assert_same, build

WRITTEN = [name for name, family in FAMILIES.items() if family.written_as is None]
each_family = pytest.mark.parametrize("name", WRITTEN)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def plain(config: ModelConfig) -> ModelConfig:
    """The config without fields that two files may spell differently."""
    heads = config.num_key_value_heads or config.num_attention_heads
    return dataclasses.replace(config, num_key_value_heads=heads, extra={})


def test_no_family_is_left_out() -> None:
    assert BY_FAMILY.keys() == FAMILIES.keys()


@each_family
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = build(BY_FAMILY[name], dtype=torch.bfloat16)
    model.save(tmp_path / "m")
    back = moe.load(tmp_path / "m")
    assert_same(back, model)
    written = FAMILIES[name].written_as or FAMILIES[name].without_code or name
    assert plain(back.config) == dataclasses.replace(plain(model.config), model_type=written)
    back.save(tmp_path / "again")
    for file in (tmp_path / "m").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert read_summary(tmp_path / "m").agrees


def test_kimi_k2_without_its_code_is_a_deepseek_v3(tmp_path: Path) -> None:
    """transformers does not know the name kimi_k2; a release brings the code of its configuration."""
    import transformers

    code = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    model = build(dataclasses.replace(BY_FAMILY["kimi_k2"], extra=code))
    model.carried_files["configuration_deepseek.py"] = b"from transformers import DeepseekV3Config\n"
    model.save(tmp_path / "with")
    convert(tmp_path / "with", tmp_path / "converted", dtype="F32")
    convert(tmp_path / "with", tmp_path / "stacked", table="stacked")
    model.carried_files.clear()
    model.save(tmp_path / "without")
    found = {f.name: json.loads((f / "config.json").read_text())["model_type"] for f in tmp_path.iterdir()}
    ours = {"with": "kimi_k2", "converted": "kimi_k2"}
    assert found == ours | {"stacked": "deepseek_v3", "without": "deepseek_v3"}
    for name in ("stacked", "without"):
        assert type(transformers.AutoConfig.from_pretrained(tmp_path / name)).__name__ == "DeepseekV3Config"
        assert_same(moe.load(tmp_path / name), model)


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
    layers, experts = [0, 2] if config.layer_types is None else [0, 1], [0, 2, 5, 7, 9, 11]
    for table in FAMILIES[name].tables:
        if table == "mxfp4":
            continue
        convert(tmp_path / "m", tmp_path / table, table=table)
        if table == "experts" and config.n_group > 1:
            experts = [0, 2, 3, 5, 6, 8, 9, 11]
        kept = experts if config.has_experts else None
        cut(tmp_path / table, tmp_path / f"{table}.cut", layers=layers, experts=kept, compare=False)
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


def mtp_of_ernie(hidden: int) -> dict[str, torch.Tensor]:
    """The names that ERNIE-4.5-21B-A3B has beside its layers."""
    block = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    block += ["input_layernorm", "post_attention_layernorm"]
    names = [f"mtp_block.0.{name}" for name in block] + ["mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_linear_proj.0"]
    return {f"model.{name}.weight": torch.ones(hidden, 2) for name in names}


def add(folder: Path, more: dict[str, torch.Tensor], **config: Any) -> None:
    save_file(tensors(folder) | more, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))


def test_ernies_mtp_is_left_out_and_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(BY_FAMILY["ernie4_5_moe"])
    model.save(tmp_path / "m")
    names = tensors(tmp_path / "m").keys()
    add(tmp_path / "m", mtp_of_ernie(model.config.hidden_size), num_nextn_predict_layers=1)
    with caplog.at_level(logging.WARNING, logger="moe"):
        back = moe.load(tmp_path / "m")
    assert_same(back, model)
    assert [record.name for record in caplog.records] == ["moe"]
    assert "12 tensors of parts that the model does not have are ignored, such as model.mtp_block.0" in caplog.text
    assert read_summary(tmp_path / "m").agrees
    back.save(tmp_path / "saved")
    convert(tmp_path / "m", tmp_path / "converted", dtype="BF16")
    cut(tmp_path / "m", tmp_path / "cut", layers=[0, 1], experts=[0, 1, 2], compare=False)
    assert tensors(tmp_path / "saved").keys() == tensors(tmp_path / "converted").keys() == names
    for written in ("saved", "converted", "cut"):  # of no module that is not there
        assert "num_nextn_predict_layers" not in json.loads((tmp_path / written / "config.json").read_text())
    add(tmp_path / "m", {"model.mtp_head.0.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"model\.mtp_head\.0\.weight: unexpected"):
        moe.load(tmp_path / "m")


@pytest.fixture
def kimi(tmp_path: Path) -> Path:
    """A kimi_k25 folder with the tensors of BY_FAMILY["kimi_k25"]."""
    build(BY_FAMILY["kimi_k25"]).save(tmp_path / "kimi")
    as_kimi_k25(tmp_path / "kimi")
    return tmp_path / "kimi"


def test_kimi_k25_is_its_language_model(kimi: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moe"):
        model = moe.load(kimi)
    assert_same(model, build(BY_FAMILY["kimi_k25"]))
    assert plain(model.config) == plain(BY_FAMILY["kimi_k25"])
    assert (
        "2 tensors of parts that the model does not have are ignored, such as mm_projector.proj.0.bias" in caplog.text
    )
    assert len(caplog.records) == 1
    summary = read_summary(kimi)
    assert (summary.model_type, summary.agrees) == ("kimi_k25", True)


@pytest.mark.parametrize(
    "write",
    [
        lambda source, target: moe.load(source).save(target),
        lambda source, target: convert(source, target),
        lambda source, target: cut(source, target, layers=[0, 1, 2], experts=range(12), compare=True),
    ],
    ids=["save", "convert", "cut"],
)
def test_kimi_k25_is_written_as_deepseek_v3(kimi: Path, tmp_path: Path, write: Callable[[Path, Path], Any]) -> None:
    write(kimi, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("deepseek_v3", ["DeepseekV3ForCausalLM"])
    assert not {"text_config", "vision_config", "media_placeholder_token_id", "auto_map"} & config.keys()
    prefix = "language_model."
    expected = {n.removeprefix(prefix): t for n, t in tensors(kimi).items() if n.startswith(prefix)}
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert_same(moe.load(tmp_path / "out"), build(BY_FAMILY["kimi_k25"]))


def test_another_tower_is_not_left_out(kimi: Path) -> None:
    add(kimi, {"audio_tower.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"audio_tower\.weight: unexpected"):
        moe.load(kimi)


def test_int4_of_kimi_k25_is_refused_by_name(kimi: Path, tmp_path: Path) -> None:
    config = json.loads((kimi / "config.json").read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    config["text_config"]["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (kimi / "config.json").write_text(json.dumps(config))
    message = r"config\.json: text_config\.quantization_config: compressed-tensors pack-quantized INT4 .* not supported"
    with pytest.raises(CheckpointError, match=message):
        moe.load(kimi)
    with pytest.raises(CheckpointError, match=message):
        convert(kimi, tmp_path / "out")
