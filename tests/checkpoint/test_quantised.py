"""Checkpoints whose weights are FP8 in blocks or MXFP4: dequantised exactly, or kept byte for byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
import moe.parallel
from moe import CheckpointError, ConfigError, ModelConfig
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format.contents import read_contents
from moe.planning.footprint import dtype_of
from tests.support.checkpoint_cases import V2, V3_MTP, as_kimi_k25, assert_same, configure
from tests.support.quantised_checkpoints import BLOCK, Folders, bits, dequantised, is_quantised, make_fp8, make_mxfp4

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_fp8(tmp_path_factory.mktemp("fp8"), V3_MTP)


@pytest.fixture
def fp8(made: Folders, tmp_path: Path) -> Folders:
    """A copy to damage."""
    folders = Folders(tmp_path / "fp8", made.plain)
    folders.fp8.mkdir()
    (folders.fp8 / "config.json").write_bytes((made.fp8 / "config.json").read_bytes())
    folders.write(made.tensors())
    return folders


@pytest.mark.parametrize("config", [V3_MTP, V2], ids=["v3", "v2"])
def test_fp8_is_dequantised_exactly(tmp_path: Path, config: ModelConfig) -> None:
    folders = make_fp8(tmp_path, config)
    assert_same(moe.load(folders.fp8), moe.load(folders.plain))
    wide = moe.load(folders.fp8, dtype=torch.float32).state_dict()
    tensors = folders.tensors()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    codes, scale = tensors[name].double(), tensors[name + "_scale_inv"].double()
    full = scale.repeat_interleave(BLOCK[0], 0)[: codes.shape[0]].repeat_interleave(BLOCK[1], 1)[:, : codes.shape[1]]
    half = config.moe_intermediate_size
    assert torch.equal(wide["layers.1.mlp.experts.gate_up_proj"][3, half:], (codes * full).float())


def test_fp8_that_is_kept_computes_the_same(made: Folders) -> None:
    kept, plain = moe.load(made.fp8, dtype="keep"), moe.load(made.plain)
    experts = kept.state_dict()["layers.1.mlp.experts.gate_up_proj"]
    assert experts.dtype == torch.float8_e4m3fn
    scale = kept.state_dict()["layers.1.mlp.experts.gate_up_proj_scale_inv"]
    assert scale.shape == (12, 2 * 3, 3)  # 20 rows of gate and 20 of up are 3 blocks each, not 5 together
    assert kept.state_dict()["layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (3, 3)  # of 22 x 42
    with torch.no_grad():
        assert torch.equal(kept(IDS).logits, plain(IDS).logits)
    assert torch.equal(
        moe.generate(kept, IDS, max_new_tokens=3)[:, :9], moe.generate(plain, IDS, max_new_tokens=3)[:, :9]
    )
    with pytest.raises(TypeError, match=r"a cast from torch\.float8_e4m3fn"):
        kept.to(torch.bfloat16)


def test_fp8_that_is_kept_is_saved_byte_for_byte(made: Folders, tmp_path: Path) -> None:
    moe.load(made.fp8, dtype="keep").save(tmp_path / "again")
    before, after = made.tensors(), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(bits(tensor), bits(after[name])), name
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (made.fp8, tmp_path / "again"))
    assert one.items() <= two.items()
    assert_same(moe.load(tmp_path / "again"), moe.load(made.fp8))
    assert read_summary(tmp_path / "again").agrees
    # Dequantised, it is saved as what it is.
    moe.load(made.fp8).save(tmp_path / "wide")
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    assert_same(moe.load(tmp_path / "wide"), moe.load(made.plain))


def test_training_the_rest_leaves_fp8_as_it_is(made: Folders, tmp_path: Path) -> None:
    model = moe.load(made.fp8, dtype="keep").train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(is_quantised(n) for n in trained if "mlp.gate" not in n)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    moe.balance.attach(model, optimizer, bias_update_speed=0.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save(tmp_path / "trained")
    before, after = made.tensors(), load_file(tmp_path / "trained" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(bits(tensor), bits(after[name]))}
    assert changed and not any(is_quantised(name) or name.endswith("_scale_inv") for name in changed)
    assert "model.layers.1.mlp.gate.weight" in changed and "model.embed_tokens.weight" in changed


WEIGHT = "model.layers.1.mlp.experts.7.down_proj.weight"  # [42, 20]: 6 x 2 blocks
SCALE = WEIGHT + "_scale_inv"


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name].clone())

    return apply


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(scale: Tensor) -> Tensor:
        scale[1, 0] = value
        return scale

    return change


DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, str]] = {
    "scale missing": (lambda t: t.pop(SCALE), SCALE, "missing"),
    "weight missing": (lambda t: t.pop(WEIGHT), WEIGHT, "missing"),
    "scale transposed": (changed(SCALE, lambda s: s.t().contiguous()), SCALE, r"expected \[6, 2\]; found \[2, 6\]"),
    "scale of another block size": (changed(SCALE, lambda s: s[:5].contiguous()), SCALE, r"expected \[6, 2\]"),
    "scale zero": (changed(SCALE, with_value(0.0)), SCALE, "above 0"),
    "scale negative": (changed(SCALE, with_value(-1.0)), SCALE, "above 0"),
    "scale infinite": (changed(SCALE, with_value(float("inf"))), SCALE, "finite"),
    "scale NaN": (changed(SCALE, with_value(float("nan"))), SCALE, "finite"),
    "scale of the wrong dtype": (
        changed(SCALE, Tensor.double),
        SCALE,
        "expected F32 or BF16 or F16 or F8_E8M0; found F64",
    ),
    "weight not quantised but scaled": (changed(WEIGHT, Tensor.bfloat16), SCALE, "unexpected"),
    "weight in another FP8": (changed(WEIGHT, lambda w: w.float().to(torch.float8_e5m2)), "", "F8_E5M2|unexpected"),
    "router quantised": (
        changed("model.layers.1.mlp.gate.weight", lambda w: w.to(torch.int8)),
        "model.layers.1.mlp.gate.weight",
        "found I8",
    ),
}


@pytest.mark.parametrize("keep", [False, True], ids=["auto", "keep"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_fp8_is_refused(fp8: Folders, name: str, keep: bool) -> None:
    damage, tensor, message = DAMAGED[name]
    tensors = fp8.tensors()
    damage(tensors)
    fp8.write(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        moe.load(fp8.fp8, dtype="keep" if keep else "auto")
    if tensor:
        assert caught.value.tensor == tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_half_precision(fp8: Folders, tmp_path: Path, dtype: torch.dtype) -> None:
    """As in Qwen's releases: widened without loss, and saved as they were."""
    tensors = {n: t.to(dtype) if n.endswith("_scale_inv") else t for n, t in fp8.tensors().items()}
    fp8.write(tensors)
    exact = dequantised(tensors[WEIGHT], tensors[SCALE])
    assert torch.equal(moe.load(fp8.fp8).state_dict()["layers.1.mlp.experts.down_proj"][7], exact)
    kept = moe.load(fp8.fp8, dtype="keep")
    assert kept.state_dict()["layers.1.mlp.experts.down_proj_scale_inv"].dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(kept(IDS).logits, moe.load(fp8.fp8)(IDS).logits)
    kept.save(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert all(t.dtype == after[n].dtype and torch.equal(bits(t), bits(after[n])) for n, t in tensors.items())


def test_experts_that_are_quantised_in_part(fp8: Folders) -> None:
    tensors = fp8.tensors()
    for name in [n for n in tensors if ".experts." in n and n.endswith("down_proj.weight")]:
        tensors[name] = dequantised(tensors[name], tensors.pop(name + "_scale_inv"))
    fp8.write(tensors)
    assert moe.load(fp8.fp8).state_dict()["layers.1.mlp.experts.down_proj"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="only some tensors of these experts are quantised") as caught:
        moe.load(fp8.fp8, dtype="keep")
    assert caught.value.tensor == "layers.1.mlp.experts" and "down_proj_scale_inv" in caught.value.expected


def test_a_refused_cast_leaves_the_model_as_it_was(made: Folders) -> None:
    kept = moe.load(made.fp8, dtype="keep")
    with torch.no_grad():
        before = kept(IDS).logits
        for cast in (kept.float, kept.half, kept.bfloat16):
            with pytest.raises(TypeError, match="would destroy the quantised weights"):
                cast()
            assert torch.equal(kept(IDS).logits, before)


def test_a_summary_names_weights_without_scales(fp8: Folders) -> None:
    assert read_summary(fp8.fp8).agrees and read_summary(fp8.fp8).unscaled == ()
    fp8.write({name: tensor for name, tensor in fp8.tensors().items() if name != SCALE})
    summary = read_summary(fp8.fp8)
    assert (summary.missing, summary.unscaled, summary.agrees) == ((SCALE,), (WEIGHT,), False)


def test_fp8_that_config_json_does_not_declare_is_refused(fp8: Folders) -> None:
    configure(fp8.fp8, quantization_config=None)
    with pytest.raises(CheckpointError, match="unexpected"):
        moe.load(fp8.fp8)
    fp8.write({name: tensor for name, tensor in fp8.tensors().items() if not name.endswith("_scale_inv")})
    with pytest.raises(CheckpointError, match="dtype; expected F64 or F32 or F16 or BF16; found F8_E4M3"):
        moe.load(fp8.fp8)


def test_the_block_size_is_the_configs_and_not_guessed(fp8: Folders) -> None:
    raw = json.loads((fp8.fp8 / "config.json").read_text())["quantization_config"]
    configure(fp8.fp8, quantization_config=raw | {"weight_block_size": [16, 8]})
    with pytest.raises(CheckpointError, match="shape"):
        moe.load(fp8.fp8)


def test_mxfp4_is_dequantised_as_transformers_does(tmp_path: Path) -> None:
    folder, tensors = make_mxfp4(tmp_path)
    wide = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    save_file({n: t.contiguous() for n, t in wide.items()}, tmp_path / "wide" / "model.safetensors")
    assert_same(moe.load(folder), moe.load(tmp_path / "wide"))
    kept = moe.load(folder, dtype="keep")
    assert kept.state_dict()["layers.0.mlp.experts.gate_up_proj_blocks"].shape == (6, 128, 3, 16)
    with torch.no_grad():
        assert torch.equal(kept(IDS).logits, moe.load(folder)(IDS).logits)


def test_mxfp4_that_is_kept_is_saved_byte_for_byte(tmp_path: Path) -> None:
    folder, _ = make_mxfp4(tmp_path)
    moe.load(folder, dtype="keep").save(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(bits(t), bits(after[n])) and t.dtype == after[n].dtype for n, t in before.items())
    one, two = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert one.items() <= two.items()
    moe.load(folder).save(tmp_path / "wide_again")  # and dequantised, in the layout that has room for it
    assert_same(moe.load(tmp_path / "wide_again"), moe.load(folder))


def test_an_mxfp4_scale_of_nan_is_refused(tmp_path: Path) -> None:
    folder, _ = make_mxfp4(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][3, 5, 0] = 255
    save_file(tensors, folder / "model.safetensors")
    for dtype in ("auto", "keep"):
        with pytest.raises(CheckpointError, match="finite") as caught:
            moe.load(folder, dtype=dtype)
        assert caught.value.tensor == name


def test_experts_of_a_rank_are_its_part(made: Folders, tmp_path: Path) -> None:
    mxfp4, _ = make_mxfp4(tmp_path)
    for folder, part in ((made.fp8, range(4, 9)), (made.plain, range(1)), (mxfp4, range(2, 6))):
        for dtype in ("auto", "keep"):
            whole, mine = moe.load(folder, dtype=dtype), moe.load(folder, dtype=dtype, experts=part)
            for name, tensor in whole.state_dict().items():
                expected = tensor[part.start : part.stop] if ".mlp.experts." in name else tensor
                found = mine.state_dict()[name]
                assert found.dtype == expected.dtype and torch.equal(bits(found), bits(expected)), name
    # In files that a save writes scales stand before codes.
    moe.load(made.fp8, dtype="keep").save(tmp_path / "again")
    again, part = moe.load(tmp_path / "again", dtype="keep", experts=range(3, 5)), moe.load(made.fp8, dtype="keep")
    name = "layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(bits(again.state_dict()[name]), bits(part.state_dict()[name][3:5]))
    for wrong in (range(0), range(3, 13), range(0, 4, 2)):
        with pytest.raises(ValueError, match="experts = range"):
            moe.load(made.fp8, experts=wrong)


@pytest.mark.parametrize("spelling", ["keep", "KEEP"])
def test_quantised_tensors_are_not_divided_among_ranks(spelling: str) -> None:
    """Refused before a mesh or a folder is read."""
    nowhere: Any = None
    with pytest.raises(ConfigError, match=f"dtype = '{spelling}': expected auto or a floating dtype; quantised"):
        moe.parallel.load("nowhere", nowhere, dtype=spelling)
    with pytest.raises(ConfigError, match="dtype = 'int8': expected one of auto, keep, bf16"):
        moe.parallel.load("nowhere", nowhere, dtype="int8")


def test_a_quantization_config_above_plain_weights_is_not_written_again(made: Folders, tmp_path: Path) -> None:
    """A config.json that declares FP8 above plain weights, as dequantising by another program leaves it."""
    moe.load(made.fp8).save(tmp_path / "plain")
    config = tmp_path / "plain" / "config.json"
    stated = json.loads((made.fp8 / "config.json").read_text())["quantization_config"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": stated}))
    kept = moe.load(tmp_path / "plain", dtype="keep")
    assert_same(kept, moe.load(made.fp8))
    kept.save(tmp_path / "saved")
    convert(tmp_path / "plain", tmp_path / "converted")
    cut(tmp_path / "plain", tmp_path / "cut", layers=[0], experts=range(V3_MTP.n_routed_experts), compare=False)
    for name in ("saved", "converted", "cut"):
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text()), name
        assert read_summary(tmp_path / name).quantization is None
    assert dtype_of(read_contents(tmp_path / "plain")) == "bf16" and dtype_of(read_contents(made.fp8)) == "fp8"


@pytest.mark.parametrize("repeats", [True, False])
def test_a_kept_kimi_k25_is_written_under_the_names_of_deepseek_v3(fp8: Folders, tmp_path: Path, repeats: bool) -> None:
    """The list of modules that are not quantised, and whether the files of MTP modules repeat embeddings and heads."""
    written = fp8.tensors()
    endings = ("embed_tokens.weight", "head.weight")
    again = [name for name in written if name.startswith("model.layers.") and name.endswith(endings)]
    assert len(again) == 4
    if not repeats:
        written = {name: tensor for name, tensor in written.items() if name not in again}
        fp8.write(written)
    plain = [name.removesuffix(".weight") for name, t in written.items() if t.ndim == 2 and t.dtype == torch.bfloat16]
    plain = [name for name in plain if not name.endswith("embed_tokens")]
    as_kimi_k25(fp8.fp8)
    values = json.loads((fp8.fp8 / "config.json").read_text())
    stated = values["text_config"].pop("quantization_config")
    stated |= {"modules_to_not_convert": [f"language_model.{name}" for name in plain]}
    (fp8.fp8 / "config.json").write_text(json.dumps(values | {"quantization_config": stated}))
    model = moe.load(fp8.fp8, dtype="keep")
    model.save(tmp_path / "saved")
    convert(fp8.fp8, tmp_path / "converted")
    for name in ("saved", "converted"):
        assert load_file(tmp_path / name / "model.safetensors").keys() == written.keys(), name
        found = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert sorted(found.pop("modules_to_not_convert")) == sorted(plain)
        assert found.items() <= stated.items()
        assert_same(moe.load(tmp_path / name, dtype="keep"), model)
