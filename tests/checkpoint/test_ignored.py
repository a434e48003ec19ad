"""Tensors that a model does not need: rotary tables, and MTP modules that are not wanted or not counted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe import CheckpointError, Transformer
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert, cut
from tests.support.checkpoint_cases import V3_MTP, as_kimi_k25, assert_same
from tests.support.quantised_checkpoints import GPT_OSS

CONFIG = dataclasses.replace(V3_MTP, num_nextn_predict_layers=1)
MTP = "model.layers.3."
INDEX = "model.safetensors.index.json"

Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Tensors, dict[str, Any]], Any]) -> None:
    """Change the tensors of a folder in one file, and its config.json."""
    tensors = load_file(folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    change(tensors, values)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Transformer(CONFIG, seed=1).save(tmp_path / "model")
    return tmp_path / "model"


# Buffers


@pytest.mark.parametrize("config", [dataclasses.replace(CONFIG, model_type="kimi_k2"), GPT_OSS], ids=["kimi", "gpt"])
def test_rotary_tables_are_ignored_and_reported_once(
    config: moe.ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Transformer(config, seed=1)
    model.save(tmp_path / "m")
    clean = read_summary(tmp_path / "m")
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    buffers: Tensors = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(i + 1).to(dtype)
        for i, dtype in zip(range(layers), (torch.bfloat16, torch.float32, torch.float64, torch.int8), strict=False)
    }
    buffers |= {
        "model.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(2, 3),
    }
    rewrite(tmp_path / "m", lambda tensors, values: tensors.update(buffers))
    loaded = moe.load(tmp_path / "m")
    assert_same(loaded, model)
    (warning,) = caplog.messages
    assert f"{len(buffers)} buffers, which the model computes itself, are ignored, such as model." in warning

    found = read_summary(tmp_path / "m")
    assert found.agrees and set(found.ignored) == set(buffers)
    assert found.tensors == clean.tensors + len(buffers) and found.parameters == clean.parameters
    from moe.cli import main

    assert main(["inspect", str(tmp_path / "m")]) == 0
    assert f"ignored: {found.ignored[0]}" in capsys.readouterr().out.replace("\n", " ")

    loaded.save(tmp_path / "saved")
    convert(tmp_path / "m", tmp_path / "converted", dtype="BF16", progress=False)
    experts = range(config.n_routed_experts)
    cut(tmp_path / "m", tmp_path / "cut", layers=[0, 1], experts=experts, compare=False, progress=False)
    for name in ("saved", "converted", "cut"):
        names = load_file(tmp_path / name / "model.safetensors")
        assert names and not [n for n in names if "rotary" in n], name


@pytest.mark.parametrize("kimi", [False, True])
def test_scales_of_a_quantised_cache_are_ignored_and_reported_once(
    kimi: bool, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In every place where vLLM looks for them, the MTP module included."""
    expected = moe.load(folder)
    if kimi:
        as_kimi_k25(folder)
        expected = moe.load(folder)
    places = ("k_scale", "v_scale", "kv_scale", "attn.k_scale", "attn.v_scale", "k_proj.k_scale", "v_proj.v_scale")
    prefix = "language_model." * kimi + "model.layers"
    scales: Tensors = {f"{prefix}.{i}.self_attn.{place}": torch.tensor(0.5) for i in range(4) for place in places}
    rewrite(folder, lambda tensors, values: tensors.update(scales))
    caplog.clear()
    model = moe.load(folder)
    assert_same(model, expected)
    message = f"28 scales of a quantised KV cache, which the model does not have, are ignored, such as {prefix}."
    assert [message in text for text in caplog.messages] == [False] * kimi + [True]
    assert set(read_summary(folder).ignored) >= scales.keys()
    model.save(tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if name.endswith("_scale")]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.4.self_attn.rotary_emb.inv_freq",  # the model has layers 0 to 2, and an MTP module
        "model.layers.00.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq.weight",
        "model.layers.0.rotary_emb.inv_freq",
        "layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.self_attn.k_proj.v_scale",
        "model.layers.0.self_attn.q_proj.input_scale",
        "model.layers.0.k_scale",
        "model.layers.4.self_attn.k_scale",
    ],
)
def test_nothing_else_is_ignored(name: str, folder: Path) -> None:
    rewrite(folder, lambda tensors, values: tensors.update({name: torch.rand(4)}))
    for call in (moe.load, lambda path: moe.load(path, mtp=False)):
        with pytest.raises(CheckpointError, match=f"{name}: unexpected; expected no such tensor"):
            call(folder)
    assert read_summary(folder).unexpected == (name,)


def test_an_index_may_be_wrong_about_buffers(folder: Path) -> None:
    convert(folder, folder.with_name("shards"), max_shard_bytes=100_000, progress=False)
    index = folder.with_name("shards") / INDEX
    values = json.loads(index.read_text())
    values["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "model-00001-of-00009.safetensors"
    values["weight_map"]["model.layers.1.self_attn.rotary_emb.inv_freq"] = "rotary.safetensors"
    index.write_text(json.dumps(values))
    assert_same(moe.load(index.parent), moe.load(folder))


# MTP modules


def tuned(tensors: Tensors, values: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 0.25


def longer(tensors: Tensors, values: dict[str, Any]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(2, 42)])
    values["vocab_size"] += 2


def pieces_missing(tensors: Tensors, values: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.startswith(MTP) and not n.endswith("hnorm.weight")]:
        del tensors[name]


def too_many_pieces(tensors: Tensors, values: dict[str, Any]) -> None:
    tensors[MTP + "adapter.weight"] = torch.ones(3)
    tensors[MTP + "mlp.gate.weight"] = torch.ones(1, 1).to(torch.int8)


def more_stated(tensors: Tensors, values: dict[str, Any]) -> None:
    values["num_nextn_predict_layers"] = 4


def another_dtype(tensors: Tensors, values: dict[str, Any]) -> None:
    tensors.update({name: t.to(torch.int8) for name, t in tensors.items() if name.startswith(MTP)})


def none_stated(tensors: Tensors, values: dict[str, Any]) -> None:
    values["num_nextn_predict_layers"] = 0


def null_stated(tensors: Tensors, values: dict[str, Any]) -> None:
    values["num_nextn_predict_layers"] = None


def none_stated_and_tuned(tensors: Tensors, values: dict[str, Any]) -> None:
    none_stated(tensors, values)
    tuned(tensors, values)


def a_second_one(tensors: Tensors, values: dict[str, Any]) -> None:
    tensors.update({n.replace(MTP, "model.layers.4."): t + 1 for n, t in tensors.items() if n.startswith(MTP)})


BROKEN = (tuned, longer, pieces_missing, too_many_pieces, more_stated, another_dtype)
UNCOUNTED = (none_stated, null_stated, none_stated_and_tuned, a_second_one)


@pytest.mark.parametrize("change", (*BROKEN, *UNCOUNTED))
def test_without_mtp_its_tensors_are_not_read(change: Any, folder: Path, tmp_path: Path) -> None:
    rewrite(folder, change)
    before = load_file(folder / "model.safetensors")
    plain = moe.load(folder, mtp=False)
    assert plain.config.num_nextn_predict_layers == 0 and len(plain.mtp) == 0
    assert torch.equal(plain.embed_tokens.weight, before["model.embed_tokens.weight"])
    plain.save(tmp_path / "saved")
    convert(folder, tmp_path / "converted", mtp=False, progress=False)
    convert(folder, tmp_path / "official", table="deepseek", progress=False)  # it has no names for MTP modules
    cut(folder, tmp_path / "cut", layers=[0, 1, 2], experts=range(12), compare=False, progress=False)
    for name in ("saved", "converted", "official", "cut"):
        assert not json.loads((tmp_path / name / "config.json").read_text())["num_nextn_predict_layers"]
        assert_same(moe.load(tmp_path / name), plain)


@pytest.mark.parametrize("stated", [-1, 2000, "1", 1.5])
def test_without_mtp_any_number_of_modules_may_be_stated(stated: Any, folder: Path) -> None:
    plain = moe.load(folder, mtp=False)
    rewrite(folder, lambda tensors, values: values.update(num_nextn_predict_layers=stated))
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers = "):
        moe.load(folder)
    assert_same(moe.load(folder, mtp=False), plain)
    record = cut(folder, folder.with_name("cut"), layers=[0, 1, 2], experts=range(12), progress=False)
    assert record["relative_difference"] == 0


@pytest.mark.parametrize("change", BROKEN)
def test_an_error_about_an_mtp_module_says_how_to_do_without(change: Any, folder: Path, tmp_path: Path) -> None:
    rewrite(folder, change)
    for call in (moe.load, lambda path: convert(path, tmp_path / "out", progress=False)):
        with pytest.raises(CheckpointError, match=r"model\.layers\.[3-6]\..*; mtp=False \(--no-mtp\) leaves"):
            call(folder)
    rewrite(folder, lambda tensors, values: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r": model\.norm\.weight: missing(?!.*mtp)"):  # the model comes first
        moe.load(folder)


@pytest.mark.parametrize("change", UNCOUNTED)
def test_modules_that_config_json_does_not_count_are_left_out(
    change: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, change)
    values = json.loads((folder / "config.json").read_text())
    model = moe.load(folder)
    assert len(model.mtp) == (values["num_nextn_predict_layers"] or 0)
    (warning,) = caplog.messages
    count = sum(name.startswith(MTP) for name in tensors)
    assert f"is {len(model.mtp)}; {count} tensors of other MTP modules are ignored, such as model.layers." in warning
    summary = read_summary(folder)
    assert summary.agrees and len(summary.ignored) == count


def test_layers_that_are_no_mtp_modules_are_never_left_out(folder: Path) -> None:
    """A num_hidden_layers that is too small would cut the model."""
    rewrite(folder, lambda tensors, values: values.update(num_hidden_layers=2, num_nextn_predict_layers=0))
    for mtp in (True, False):
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*: unexpected(?!.*mtp)"):
            moe.load(folder, mtp=mtp)


def test_a_shard_of_an_mtp_module_need_not_be_there(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards", max_shard_bytes=20_000, progress=False)
    weight_map = json.loads((tmp_path / "shards" / INDEX).read_text())["weight_map"]
    others = {file for name, file in weight_map.items() if not name.startswith(MTP)}
    first, second, *_ = sorted(set(weight_map.values()) - others)
    (tmp_path / "shards" / first).unlink()
    (tmp_path / "shards" / second).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"No such file; mtp=False \(--no-mtp\) leaves .*; expected a file"):
        moe.load(tmp_path / "shards")
    assert_same(moe.load(tmp_path / "shards", mtp=False), moe.load(folder, mtp=False))
    file = weight_map["model.layers.2.input_layernorm.weight"]
    (tmp_path / "shards" / file).unlink()
    for mtp in (True, False):
        with pytest.raises(CheckpointError, match=f"{file}: No such file; expected a file"):
            moe.load(tmp_path / "shards", mtp=mtp)
