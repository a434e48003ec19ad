"""Converted and cut checkpoints: equal tensors stay the same byte for byte, the others change by definition."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe import CheckpointError, ConfigError
from moe.checkpoint import read_config, read_summary
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format.manifest import verify
from moe.checkpoint.rewrite import DEEPSEEK_FILE
from moe.ops import dequantize_blocks, quantize_blocks
from tests.support.checkpoint_cases import BY_FAMILY, V3, V3_MTP, assert_same, build
from tests.support.quantised_checkpoints import (
    BLOCK,
    GPT_OSS,
    Folders,
    bits,
    is_quantised,
    make_fp8,
    make_mxfp4,
    noisy,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_fp8(tmp_path_factory.mktemp("fp8"), V3_MTP)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(bits(tensor), bits(b[name])), name


@pytest.mark.parametrize("shard", [20_000, 10**9])
def test_resharding_changes_no_tensor(made: Folders, tmp_path: Path, shard: int) -> None:
    for source in (made.fp8, made.plain):
        out = tmp_path / source.name
        convert(source, out, max_shard_bytes=shard)
        assert_equal(tensors_of(source), tensors_of(out))
        files = sorted(out.glob("model*.safetensors"))
        assert (len(files) > 5) == (shard == 20_000) and read_summary(out).agrees and not verify(out).findings
        sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
        assert max(sizes) <= shard or all(
            len(load_file(f)) == 1 for f, n in zip(files, sizes, strict=True) if n > shard
        )
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
        assert before.items() <= after.items()


def test_fp8_to_bf16_is_the_dequantised_checkpoint(made: Folders, tmp_path: Path) -> None:
    convert(made.fp8, tmp_path / "wide", dtype="BF16")
    assert_equal(tensors_of(made.plain), tensors_of(tmp_path / "wide"))
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    convert(made.fp8, tmp_path / "single", dtype="F32")
    assert_same(moe.load(tmp_path / "single"), moe.load(made.fp8, dtype=torch.float32))


def test_bf16_to_fp8(made: Folders, tmp_path: Path) -> None:
    convert(made.plain, tmp_path / "fp8", dtype="fp8", block_size=BLOCK)
    source, out = tensors_of(made.plain), tensors_of(tmp_path / "fp8")
    assert {n for n in out if n.endswith("_scale_inv")} == {n + "_scale_inv" for n in source if is_quantised(n)}
    for name, tensor in source.items():
        if is_quantised(name):
            codes, scale = quantize_blocks(tensor, BLOCK)
            assert torch.equal(bits(out[name]), bits(codes)) and torch.equal(out[name + "_scale_inv"], scale), name
        else:
            assert torch.equal(bits(out[name]), bits(tensor)), name
    assert read_summary(tmp_path / "fp8").agrees
    found, exact = moe.load(tmp_path / "fp8"), moe.load(made.plain)
    for name, tensor in exact.state_dict().items():
        assert (found.state_dict()[name].float() - tensor.float()).norm() <= 0.04 * tensor.float().norm(), name
    convert(made.plain, tmp_path / "two", dtype="fp8", block_size=BLOCK, scale_fmt="ue8m0")
    scales = torch.cat([t.flatten() for n, t in tensors_of(tmp_path / "two").items() if n.endswith("_scale_inv")])
    assert (scales.frexp().mantissa == 0.5).all()
    config = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    assert config["weight_block_size"] == [*BLOCK] and config["scale_fmt"] == "ue8m0"


def test_quantising_again_in_other_blocks(made: Folders, tmp_path: Path) -> None:
    convert(made.fp8, tmp_path / "again", dtype="fp8", block_size=(16, 8))
    name = "model.layers.1.mlp.experts.2.gate_proj.weight"
    source, out = tensors_of(made.fp8), tensors_of(tmp_path / "again")
    wide = dequantize_blocks(source[name], source[name + "_scale_inv"], BLOCK, torch.float32)
    codes, scale = quantize_blocks(wide, (16, 8))
    assert torch.equal(bits(out[name]), bits(codes)) and torch.equal(out[name + "_scale_inv"], scale)


def test_without_mtp(made: Folders, tmp_path: Path) -> None:
    convert(made.fp8, tmp_path / "main", mtp=False)
    assert read_config(tmp_path / "main").num_nextn_predict_layers == 0
    beyond = tuple(f"model.layers.{V3_MTP.num_hidden_layers + k}." for k in range(2))
    kept = {name: t for name, t in tensors_of(made.fp8).items() if not name.startswith(beyond)}
    assert_equal(kept, tensors_of(tmp_path / "main"))


@pytest.mark.parametrize("quantised", [True, False], ids=["fp8", "bf16"])
def test_to_deepseeks_names_and_back(made: Folders, tmp_path: Path, quantised: bool) -> None:
    source = made.fp8 if quantised else made.plain
    convert(source, tmp_path / "main", mtp=False)
    convert(source, tmp_path / "official", table="deepseek", max_shard_bytes=1000)
    assert [path.name for path in (tmp_path / "official").glob("*.safetensors")] == [DEEPSEEK_FILE]
    ours, theirs = tensors_of(tmp_path / "main"), tensors_of(tmp_path / "official")
    assert {official_name(name) for name in ours} == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(bits(tensor), bits(theirs[official_name(name)])), name
    assert_same(moe.load(tmp_path / "official"), moe.load(tmp_path / "main"))
    convert(tmp_path / "official", tmp_path / "back", table="experts")
    assert_equal(ours, tensors_of(tmp_path / "back"))


def official_name(name: str) -> str:
    """The name that the conversion script of DeepSeek's inference code gives a tensor."""
    renamed = {
        "embed_tokens": "embed",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "wq",
        "q_a_proj": "wq_a",
        "q_a_layernorm": "q_norm",
        "q_b_proj": "wq_b",
        "kv_a_proj_with_mqa": "wkv_a",
        "kv_a_layernorm": "kv_norm",
        "kv_b_proj": "wkv_b",
        "o_proj": "wo",
        "gate_proj": "w1",
        "down_proj": "w2",
        "up_proj": "w3",
        "lm_head": "head",
    }
    name = name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
    name = name.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
    return ".".join(renamed.get(part, part) for part in name.split("."))


def test_to_the_stacked_layout_and_back(made: Folders, tmp_path: Path) -> None:
    convert(made.plain, tmp_path / "stacked", table="stacked")
    out = tensors_of(tmp_path / "stacked")
    assert out["model.layers.1.mlp.experts.gate_up_proj"].shape == (12, 40, 42)
    assert_same(moe.load(tmp_path / "stacked"), moe.load(made.plain))
    convert(tmp_path / "stacked", tmp_path / "back", table="experts")
    assert_equal(tensors_of(made.plain), tensors_of(tmp_path / "back"))
    convert(made.fp8, tmp_path / "wide", table="stacked", dtype="BF16")
    assert_same(moe.load(tmp_path / "wide"), moe.load(made.plain))


def test_mxfp4(tmp_path: Path) -> None:
    folder, _ = make_mxfp4(tmp_path)
    convert(folder, tmp_path / "same")
    assert_equal(tensors_of(folder), tensors_of(tmp_path / "same"))
    convert(folder, tmp_path / "wide2", dtype="BF16")
    assert_same(moe.load(tmp_path / "wide2"), moe.load(folder))
    # What is dequantised has a code for every value: quantised again, it is the same.
    convert(tmp_path / "wide2", tmp_path / "again", table="mxfp4")
    assert_same(moe.load(tmp_path / "again"), moe.load(folder))
    assert read_summary(tmp_path / "again").agrees


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"table": "mxfp4"}, "layout = 'mxfp4': expected one of experts, stacked, deepseek"),
        ({"max_shard_bytes": 0}, "max_shard_bytes = 0: expected a positive number"),
        ({"block_size": (0, 16), "dtype": "fp8"}, "block_size = .0, 16.: expected two integers from 1 to 65536"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt = 'ue8m0': expected None without dtype fp8"),
        ({"scale_fmt": "ue4", "dtype": "fp8"}, "scale_fmt = 'ue4': expected ue8m0 or None"),
        ({"block_size": 8, "dtype": "fp8"}, "block_size = 8: expected two integers from 1 to 65536"),
        ({"block_size": (8,), "dtype": "fp8"}, "block_size = .8,.: expected two integers"),
        ({"block_size": (8, 1.5)}, "block_size = .8, 1.5.: expected two integers"),
        ({"max_shard_bytes": "5GB"}, "max_shard_bytes = '5GB': expected a positive number"),
        ({"max_shard_bytes": math.nan}, "max_shard_bytes = nan: expected a positive number"),
        ({"dtype": 8}, "dtype = 8: expected one of bf16, fp16"),
        ({"table": "stacked", "dtype": "fp8"}, "the layout stacked cannot hold experts in FP8"),
        ({"table": "deepseek", "mtp": True}, "mtp = True: expected False .--no-mtp.: the layout deepseek has no"),
    ],
)
def test_conversions_that_make_no_sense(made: Folders, tmp_path: Path, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        convert(made.plain, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_quantised_experts_are_stacked_only_with_an_explicit_dtype(made: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype = None: expected a dtype such as bf16: the layout stacked"):
        convert(made.fp8, tmp_path / "out", table="stacked")
    mxfp4, _ = make_mxfp4(tmp_path)
    for settings in ({"dtype": "fp8"}, {"dtype": "fp8", "table": "mxfp4"}, {"table": "stacked"}):
        with pytest.raises(ConfigError, match="dtype = "):
            convert(mxfp4, tmp_path / "out", **settings)  # pyright: ignore[reportArgumentType]


def test_the_source_is_never_replaced(made: Folders, tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(made.fp8, source)
    (tmp_path / "link").symlink_to(source)
    before = tensors_of(source)
    for target in (source, tmp_path / "link", str(source) + "/"):
        for call in (lambda out: convert(source, out), lambda out: cut(source, out, layers=[0], experts=[0, 3, 6, 9])):
            with pytest.raises(CheckpointError, match="the source itself"):
                call(target)
    assert_equal(before, tensors_of(source))


def test_a_repeat_that_differs_is_not_converted(made: Folders, tmp_path: Path) -> None:
    convert(made.plain, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.4.shared_head.head.weight"
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="differs from the tensor that it repeats") as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert caught.value.tensor == name and "mtp=False (--no-mtp) leaves" in str(caught.value)
    convert(tmp_path / "source", tmp_path / "out", mtp=False)
    assert moe.load(tmp_path / "out").config.num_nextn_predict_layers == 0


def test_a_source_that_does_not_load_is_not_converted(made: Folders, tmp_path: Path) -> None:
    convert(made.fp8, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("quantised", [True, False], ids=["fp8", "bf16"])
def test_cut(made: Folders, tmp_path: Path, quantised: bool) -> None:
    source = made.fp8 if quantised else made.plain
    experts = [0, 2, 3, 4]  # groups of three: two of the first, two of the second, none of the others
    record = cut(source, tmp_path / "part", layers=[0, 2], experts=experts)
    config = read_config(tmp_path / "part")
    assert (config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok) == (2, 4, 3)
    assert (config.n_group, config.topk_group, config.first_k_dense_replace) == (2, 2, 1)
    before, after = tensors_of(source), tensors_of(tmp_path / "part")
    names = {0: 0, 2: 1}
    expected = {}
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) not in names:
                continue
            parts[2] = str(names[int(parts[2])])
            if ".mlp.experts." in name:
                if int(parts[5]) not in experts:
                    continue
                parts[5] = str(experts.index(int(parts[5])))
            if ".mlp.gate." in name:
                tensor = tensor[experts]
        expected[".".join(parts)] = tensor
    assert_equal(expected, after)
    assert read_summary(tmp_path / "part").agrees and not verify(tmp_path / "part").findings
    assert record == json.loads((tmp_path / "part" / "cut.json").read_text())
    assert record["layers"] == [0, 2] and record["experts"] == experts
    assert record["bytes"] == sum(t.nbytes for t in after.values())
    whole, part = moe.load(source), moe.load(tmp_path / "part")
    ids = torch.tensor([record["token_ids"]])
    with torch.no_grad():
        exact = whole(ids).logits.double()
        difference = (part(ids).logits.double() - exact).norm() / exact.norm()
    assert record["relative_difference"] == pytest.approx(difference.item()) and difference > 0.1


def test_cutting_nothing_off_is_the_same_model(made: Folders, tmp_path: Path) -> None:
    record = cut(made.fp8, tmp_path / "all", layers=range(3), experts=range(12))
    assert record["relative_difference"] == 0 and record["same_first_choice"] == 1
    folder, _ = make_mxfp4(tmp_path)
    assert cut(folder, tmp_path / "all4", layers=[0, 1], experts=range(6))["relative_difference"] == 0
    part = cut(folder, tmp_path / "some4", layers=[0], experts=[1, 4])
    assert part["of_experts"] == 6 and read_config(tmp_path / "some4").layer_types == ("sliding_attention",)
    kept = tensors_of(tmp_path / "some4")["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    whole = tensors_of(folder)["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    assert torch.equal(kept, whole[[1, 4]])
    with pytest.raises(CheckpointError, match=r"layer_types: vLLM and llama\.cpp use a window in every other layer"):
        cut(folder, tmp_path / "full4", layers=[1], experts=[1, 4])


def test_a_cut_reads_only_what_it_keeps(tmp_path: Path) -> None:
    config = dataclasses.replace(V3, moe_intermediate_size=4096, num_hidden_layers=3)
    noisy(config).save(tmp_path / "whole")
    before = read_bytes()
    cut(tmp_path / "whole", tmp_path / "part", layers=[0, 1], experts=[0, 3, 6, 9], compare=False)
    read = read_bytes() - before
    kept = read_summary(tmp_path / "part").bytes
    assert kept < 0.3 * read_summary(tmp_path / "whole").bytes
    # The manifest reads nothing but headers; what else is read is them and config.json.
    assert read < 1.1 * kept + 2**20


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def test_a_rank_reads_only_its_experts(tmp_path: Path) -> None:
    config = dataclasses.replace(V3, moe_intermediate_size=4096, num_hidden_layers=3)
    noisy(config).save(tmp_path / "whole")
    summary = read_summary(tmp_path / "whole")
    before = read_bytes()
    moe.load(tmp_path / "whole", experts=range(3, 6))
    read = read_bytes() - before
    experts = 2 * 12 * 3 * 4096 * config.hidden_size * 2
    assert read < 1.02 * (summary.bytes - experts * 9 // 12) + 2**20


@pytest.mark.parametrize(
    ("layers", "experts", "error"),
    [
        ([0, 3], [0], r"layers = \[0, 3\]: expected ascending numbers from 0 to 2"),
        ([1, 0], [0], r"layers = \[1, 0\]: expected ascending numbers from 0 to 2, without repeats"),
        ([], [0], r"layers = \[\]: expected ascending numbers"),
        ("0-3", [0], "layers = '0-3': expected a sequence of integers"),
        ([0], [], r"experts = \[\]: expected ascending numbers"),
        ([0], [5, 5], "without repeats"),
        ([0], [0.5], r"experts = \[0\.5\]: expected a sequence of integers"),
        ([0], 3, "experts = 3: expected a sequence of integers"),
        ([0, 1], [0, 1, 3], "the same number of experts from every group used; found 2 1 0 0"),
    ],
)
def test_cuts_that_make_no_sense(made: Folders, tmp_path: Path, layers: Any, experts: Any, error: str) -> None:
    for source in (made.fp8, made.plain):
        with pytest.raises((ConfigError, CheckpointError), match=error):
            cut(source, tmp_path / "part", layers=layers, experts=experts)
    assert not list(tmp_path.iterdir())


def test_integers_of_any_kind_choose_what_is_cut_out(made: Folders, tmp_path: Path) -> None:
    layers: Any = torch.tensor([0, 1])
    record = cut(made.plain, tmp_path / "out", layers=layers, experts=range(12), compare=False)
    assert record["layers"] == [0, 1]


@pytest.mark.parametrize("large", ["whole", "part"])
def test_what_does_not_fit_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: str) -> None:
    """The record says so, and the result is written nevertheless."""
    noisy(GPT_OSS).save(tmp_path / "whole")
    from moe.checkpoint import cut as module

    original = module.load

    def load(folder: Any, **settings: Any) -> moe.Transformer:
        if (Path(folder).name == "whole") == (large == "whole"):
            raise CheckpointError(folder, "the model does not fit into memory")
        return original(folder, **settings)

    monkeypatch.setattr(module, "load", load)
    record = cut(tmp_path / "whole", tmp_path / "part", layers=[0], experts=[0, 1])
    assert "does not fit" in record["not_compared"] and "relative_difference" not in record


def test_a_cut_counts_what_config_json_repeats_for_layers_and_experts(tmp_path: Path) -> None:
    """Other lists stay as they are, even those with one item for each layer."""
    config = BY_FAMILY["qwen3_moe"]
    layers = config.num_hidden_layers
    extra = {
        "layer_types": ["full_attention"] * layers,
        "eos_token_id": list(range(layers)),
        "attn_type_list": [1] * layers,
    }
    build(dataclasses.replace(config, extra=extra)).save(tmp_path / "m")
    cut(tmp_path / "m", tmp_path / "cut", layers=[0], experts=[0, 1], compare=False, progress=False)
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (written["layer_types"], written["attn_type_list"]) == (["full_attention"], [1])
    assert written["eos_token_id"] == list(range(layers))
    build(dataclasses.replace(BY_FAMILY["gpt_oss"], extra={"experts_per_token": 3})).save(tmp_path / "oss")
    cut(tmp_path / "oss", tmp_path / "few", layers=[0, 1], experts=[0, 1], compare=False, progress=False)
    written = json.loads((tmp_path / "few" / "config.json").read_text())
    assert written["experts_per_token"] == written["num_experts_per_tok"] == 2
