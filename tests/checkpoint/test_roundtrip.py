"""load and save: bit for bit, all or nothing."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

import moe
from moe import CheckpointError, ModelConfig, Transformer
from moe.checkpoint import read_summary, save
from moe.checkpoint.reading import load as reading
from moe.checkpoint.reading import values
from tests.support.checkpoint_cases import V2, V3, V3_MTP, YARN, assert_same, build, configs

State = dict[str, torch.Tensor]


def files(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[State], Any]) -> None:
    """Change the tensors of a folder that has one file."""
    tensors = files(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    build(V3_MTP).save(folder)
    return folder


@settings(deadline=None, derandomize=True, max_examples=25)
@given(configs("deepseek_v3") | configs("deepseek_v2"))
def test_random_configs_come_back(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> None:
    folder = tmp_path_factory.mktemp("random") / "model"
    model = build(config)
    model.save(folder)
    back = moe.load(folder)
    assert_same(model, back)
    assert not back.training
    heads = config.num_key_value_heads or config.num_attention_heads
    assert dataclasses.replace(back.config, extra={}) == dataclasses.replace(config, num_key_value_heads=heads)
    assert read_summary(folder).agrees


def test_names_and_values_in_the_files(saved: Path) -> None:
    model, tensors = build(V3_MTP).state_dict(), files(saved)
    hidden = V3.moe_intermediate_size
    gate_up = model["layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(tensors["model.layers.2.mlp.experts.11.gate_proj.weight"], gate_up[11, :hidden])
    assert torch.equal(tensors["model.layers.2.mlp.experts.11.up_proj.weight"], gate_up[11, hidden:])
    assert torch.equal(tensors["model.layers.4.shared_head.norm.weight"], model["mtp.1.norm.weight"])
    for layer in (3, 4):
        assert torch.equal(tensors[f"model.layers.{layer}.embed_tokens.weight"], model["embed_tokens.weight"])
        assert torch.equal(tensors[f"model.layers.{layer}.shared_head.head.weight"], model["lm_head.weight"])
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert saved.joinpath("model.safetensors").read_bytes()[8:].startswith(b'{"__metadata__":{"format":"pt"}')


def test_bfloat16_keeps_the_bias_in_fp32(tmp_path: Path) -> None:
    model = build(V3_MTP, dtype=torch.bfloat16)
    model.save(tmp_path / "m")
    dtypes = {name: t.dtype for name, t in files(tmp_path / "m").items()}
    bias = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert len(bias) == 4 and all(dtypes.pop(name) == torch.float32 for name in bias)
    assert set(dtypes.values()) == {torch.bfloat16}
    assert_same(model, moe.load(tmp_path / "m"))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_bias_that_has_left_fp32_comes_back_to_it(tmp_path: Path) -> None:
    model = build(V3)
    gate = model.get_submodule("layers.1.mlp.gate")
    gate.e_score_correction_bias = torch.full((V3.n_routed_experts,), 0.25, dtype=torch.bfloat16)
    model.save(tmp_path / "m")
    bias = files(tmp_path / "m")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and (bias == 0.25).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_conversion(saved: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CHUNK", 1000)  # every tensor in several pieces
    original, back = build(V3_MTP).state_dict(), moe.load(saved, dtype=dtype).state_dict()
    for name, tensor in original.items():
        expected = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        assert back[name].dtype == expected
        assert torch.equal(back[name], tensor.to(expected)), name


def test_a_bf16_bias_is_widened_and_a_wider_one_refused(saved: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    bias = moe.load(saved, dtype=torch.bfloat16).state_dict()["layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, files(saved)[name].float())
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(CheckpointError, match=f"{name}: dtype; expected F32 or F16 or BF16; found F64"):
        moe.load(saved)


def test_mixed_dtypes_within_a_parameter(saved: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    advice = "load with dtype=torch.float32, as config.json states; expected F32, as model.embed_tokens.weight has"
    with pytest.raises(CheckpointError, match=f"{name}: its dtype differs from most tensors, .*; {advice}"):
        moe.load(saved)
    hidden = V3.moe_intermediate_size
    part = moe.load(saved, dtype=torch.float32).state_dict()["layers.1.mlp.experts.gate_up_proj"][3, hidden:]
    assert torch.equal(part, files(saved)[name].float())


def test_parameters_of_different_dtypes_stay_so(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()}))
    state = moe.load(saved).state_dict()
    assert state["norm.weight"].dtype == torch.bfloat16
    assert state["lm_head.weight"].dtype == torch.float32


def test_an_unknown_dtype_argument(saved: Path) -> None:
    for dtype in (torch.int8, "float32", None):
        with pytest.raises(ValueError, match="dtype = "):
            moe.load(saved, dtype=dtype)  # pyright: ignore[reportArgumentType]


def test_shards(tmp_path: Path) -> None:
    whole, sharded, tiny = (tmp_path / name for name in ("whole", "sharded", "tiny"))
    model = build(V3_MTP)
    save(model, whole)
    save(model, sharded, max_shard_bytes=60_000)
    save(model, tiny, max_shard_bytes=1)
    shards = sorted(sharded.glob("*.safetensors"))
    assert 2 < len(shards) < 30
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 60_000 for shard in shards)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in files(whole).values())
    assert len(list(tiny.glob("*.safetensors"))) == len(files(whole))
    assert not (whole / "model.safetensors.index.json").exists()
    for folder in (sharded, tiny):
        assert_same(model, moe.load(folder))
        assert (folder / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    with pytest.raises(ValueError, match="max_shard_bytes = 0"):
        save(model, tmp_path / "no", max_shard_bytes=0)


def test_nothing_is_read_from_the_files_after_loading(saved: Path) -> None:
    model = moe.load(saved)
    for file in saved.glob("*.safetensors"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    assert_same(model, build(V3_MTP))


def test_loaded_parameters_train(saved: Path) -> None:
    model = moe.load(saved).train()
    ids = torch.arange(16).view(2, 8)
    model(ids, labels=ids).loss.backward()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert model.embed_tokens.weight.grad is not None


TIED = dataclasses.replace(V3_MTP, tie_word_embeddings=True)


def test_tied_embeddings(tmp_path: Path) -> None:
    model = build(TIED)
    model.save(tmp_path / "m")
    tensors = files(tmp_path / "m")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], embedding)
    rewrite(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert_same(model, moe.load(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda tensors: tensors["lm_head.weight"][3, 4].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs .* the values of model\.embed_tokens\.weight"):
        moe.load(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.layers.4.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_repeats_are_optional_but_never_different(saved: Path, name: str) -> None:
    rewrite(saved, lambda tensors: tensors[name][-1, -1].mul_(1 + 2**-20))
    with pytest.raises(CheckpointError, match=f"{name}: differs from the tensor that it repeats"):
        moe.load(saved)
    rewrite(saved, lambda tensors: tensors.pop(name))
    assert_same(moe.load(saved), build(V3_MTP))


def test_all_mtp_tensors_absent_is_no_module_and_a_note(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    mtp = ("model.layers.3.", "model.layers.4.")
    rewrite(saved, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(mtp)])
    with caplog.at_level(logging.WARNING, logger="moe"):
        model = moe.load(saved)
    assert len(model.mtp) == model.config.num_nextn_predict_layers == 0
    assert [record.name for record in caplog.records] == ["moe"]
    assert "no MTP modules" in caplog.text
    summary = read_summary(saved)
    assert summary.agrees and summary.config == model.config


def test_some_mtp_tensors_absent_is_an_error(saved: Path) -> None:
    rewrite(saved, lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.4.")])
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\.enorm\.weight: missing \(and 53 more\)"):
        moe.load(saved)


def test_a_tensor_without_values_is_no_surprise(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({"model.layers.1.mlp.nothing.weight": torch.zeros(0, 42)}))
    assert_same(moe.load(saved), build(V3_MTP))


WRONG: dict[str, tuple[Callable[[State], Any], str]] = {
    "a layer too many": (
        lambda t: t.update({"model.layers.9.input_layernorm.weight": torch.zeros(42)}),
        r"layers\.9\.input_layernorm\.weight: unexpected",
    ),
    "flattened": (
        lambda t: t.update({"model.norm.weight": torch.zeros(42, 1)}),
        r"model\.norm\.weight: shape; expected \[42\]; found \[42, 1\]",
    ),
    "experts that are not stored": (
        lambda t: [t.pop(name) for name in list(t) if ".experts.11." in name],
        r"model\.layers\.1\.mlp\.experts\.11\.gate_proj\.weight: missing \(and 11 more\)",
    ),
    "vocabulary padded": (
        lambda t: t.update({"lm_head.weight": torch.zeros(64, 42)}),
        r"lm_head\.weight: shape; expected \[61, 42\]; found \[64, 42\]",
    ),
    "fp8": (
        lambda t: t.update({"model.norm.weight": torch.ones(42).to(torch.float8_e4m3fn)}),
        r"model\.norm\.weight: dtype; .* found F8_E4M3",
    ),
    "an int8 repeat": (
        lambda t: t.update({"model.layers.3.embed_tokens.weight": torch.ones(61, 42, dtype=torch.int8)}),
        r"layers\.3\.embed_tokens\.weight: dtype",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit(saved: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG[case]
    rewrite(saved, change)
    # Everything is known from headers: nothing may be allocated or built.
    monkeypatch.setattr(reading, "Transformer", None)
    with pytest.raises(CheckpointError, match=message) as caught:
        moe.load(saved)
    assert caught.value.tensor is not None and str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "field"),
    [
        ({"quant_method": "awq"}, "quantization_config: AWQ is not supported; expected unquantised weights, FP8"),
        ({}, "quant_method; expected fp8, mxfp4 or the name of another method; found None"),
        ({"quant_method": 8}, "quant_method; expected fp8, mxfp4 or the name of another method; found 8"),
        ({"quant_method": "fp8"}, "quantization_config: FP8 without weight_block_size is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt; expected e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme"),
        ("fp8", "quantization_config; expected an object or null; found 'fp8'"),
    ],
)
def test_other_quantisations_are_refused(saved: Path, quantization: Any, field: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = quantization
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{field}"):
        moe.load(saved)


def test_a_file_that_shrinks_between_header_and_data(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved / "model.safetensors"
    plan = reading.plan

    def plan_and_truncate(folder: Path, **settings: Any) -> Any:
        todo = plan(folder, **settings)
        os.truncate(file, file.stat().st_size - 1)
        return todo

    monkeypatch.setattr(reading, "plan", plan_and_truncate)
    with pytest.raises(CheckpointError, match="shortened while it was read"):
        moe.load(saved)


def test_flipped_header_bits_never_load_as_something_else(saved: Path) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    expected = build(V3_MTP)
    refused = 0
    for at in range(0, header, header // 150):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 7
        file.write_bytes(flipped)
        try:
            model = moe.load(saved)
        except CheckpointError:
            refused += 1
        else:
            assert_same(model, expected)
    assert refused > 140


def test_config_values_that_we_do_not_use_come_back(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"eos_token_id": [1, 2], "auto_map": {"AutoConfig": "x/y--a.B"}, "pretraining_tp": 1}
    (saved / "config.json").write_text(json.dumps(config))
    moe.load(saved).save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == config


def test_a_model_that_the_family_cannot_express_writes_nothing(tmp_path: Path) -> None:
    model = Transformer(dataclasses.replace(V2, norm_topk_prob=True))
    with pytest.raises(CheckpointError, match="norm_topk_prob"):
        model.save(tmp_path / "m")
    half = Transformer(V2)
    half.add_module("norm", torch.nn.RMSNorm(7))
    with pytest.raises(CheckpointError, match=r"norm\.weight: the model is not the one of its config"):
        half.save(tmp_path / "m")
    with torch.device("meta"):
        empty = Transformer(V2)
    with pytest.raises(CheckpointError, match="no floating-point values; found the meta device"):
        empty.save(tmp_path / "m")
    unprintable = Transformer(dataclasses.replace(V2, extra={"a": object()}))
    with pytest.raises(CheckpointError, match="extra: not JSON"):
        unprintable.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_other_things(saved: Path, tmp_path: Path) -> None:
    model = build(V2)
    (saved / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds other files; expected .*; found notes\.txt"):
        model.save(saved)
    assert (saved / "notes.txt").read_text() == "precious"
    assert_same(moe.load(saved), build(V3_MTP))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        model.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new" / "parents" / "m"):
        model.save(target)
        assert_same(moe.load(target), model)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "empty")
    build(V3).save(link)
    assert link.is_symlink()
    assert_same(moe.load(tmp_path / "empty"), build(V3))


@pytest.mark.parametrize("same_inode", [False, True])
def test_a_save_during_a_load_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_inode: bool) -> None:
    """Headers of one checkpoint and bytes of another would be a third model that nobody trained. The folder of a later
    save can have the inode number of the one that was there first."""
    old, new, target = build(V3, seed=1), build(V3, seed=2), tmp_path / "model"
    save(old, target, max_shard_bytes=20_000)
    original, reads = reading.fill, []

    def swapped(*args: Any) -> Any:
        reads.append(args)
        if len(reads) == 10:
            save(new, tmp_path / "other" if same_inode else target, max_shard_bytes=20_000)
            for file in (tmp_path / "other").glob("*"):
                os.replace(file, target / file.name)
        return original(*args)

    monkeypatch.setattr(reading, "fill", swapped)
    with pytest.raises(CheckpointError, match="replaced by another checkpoint while it was read"):
        moe.load(target)
    assert len(reads) > 10
    assert_same(moe.load(target), new)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors.bak"])
def test_files_that_are_not_the_checkpoints_are_never_removed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "model"
    build(V3).save(target)
    (target / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds other files.*{name}"):
        build(V3, seed=1).save(target)
    assert (target / name).read_text() == "mine"
    (target / name).unlink()
    (target / "model.safetensors").rename(tmp_path / "weights")
    (target / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="holds other files"):
        build(V3, seed=1).save(target)


def test_tokenizer_files_in_the_folder_stay(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "tokenizer.json").write_text("theirs")
    (target / "vocab.json").write_text("theirs")
    model = build(V3)
    model.carried_files = {"vocab.json": b"the model's"}
    model.save(target)
    assert (target / "tokenizer.json").read_text() == "theirs"
    assert (target / "vocab.json").read_text() == "the model's"


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    with pytest.raises(CheckpointError, match=r"a mount point.*save to a folder in it"):
        build(V3).save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["mnt"]


def test_summary_of_a_sharded_folder(tmp_path: Path) -> None:
    model = build(dataclasses.replace(V3_MTP, rope_parameters=YARN), dtype=torch.bfloat16)
    save(model, tmp_path / "m", max_shard_bytes=50_000)
    summary = read_summary(tmp_path / "m")
    tensors = files(tmp_path / "m")
    assert summary.agrees and summary.model_type == "deepseek_v3"
    assert summary.config is not None and summary.config.rope_parameters == YARN
    assert summary.files == len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    assert summary.tensors == len(tensors)
    assert summary.bytes == sum(t.nbytes for t in tensors.values())
    assert summary.values == sum(t.numel() for t in tensors.values())
    assert summary.parameters == summary.values - 4 * V3.vocab_size * V3.hidden_size
    assert (summary.dtypes["F32"].tensors, summary.dtypes["F32"].values) == (4, 4 * V3.n_routed_experts)
    assert summary.dtypes["BF16"].bytes == 2 * summary.dtypes["BF16"].values


def test_summary_of_what_does_not_fit(saved: Path) -> None:
    wrong = "model.norm.weight"
    rewrite(saved, lambda t: t.update({wrong: torch.zeros(7), "new": torch.zeros(1)}) or t.pop("lm_head.weight"))
    summary = read_summary(saved)
    assert not summary.agrees
    assert (summary.missing, summary.unexpected, summary.misshaped) == (("lm_head.weight",), ("new",), (wrong,))


def test_summary_of_a_family_without_a_table(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "llama"}')
    summary = read_summary(saved)
    assert (summary.model_type, summary.config, summary.agrees) == ("llama", None, False)
    assert summary.tensors == len(files(saved))
