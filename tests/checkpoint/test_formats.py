"""Quantisation formats: every command names the same one, and what cannot be loaded is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import moe
from moe import CheckpointError
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format.folder import MAX_CONFIG_BYTES
from moe.checkpoint.format.quantized_formats import read_quantization
from moe.cli import main
from tests.support.checkpoint_cases import V3, build, configure

SUPPORTED = "expected unquantised weights, FP8 in blocks or MXFP4"
# As Kimi-K2-Thinking and K2.5 have it.
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}
NVFP4 = {
    "producer": {"name": "modelopt", "version": "0.35.0"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["h"]},
}


def packed(form: str, kind: str, bits: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, **more}
    return PACKED | {"format": form, "config_groups": {"group_0": {"weights": weights}}}


IN_CONFIG: dict[str, tuple[Any, str]] = {
    "packed": (PACKED, "compressed-tensors pack-quantized INT4 in groups of 32"),
    "float": (packed("float-quantized", "float", 8), "compressed-tensors float-quantized FP8"),
    "nvfp4": (
        packed("nvfp4-pack-quantized", "float", 4, group_size=16),
        "compressed-tensors nvfp4-pack-quantized FP4 in groups of 16",
    ),
    "sparse": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "compressed-tensors sparse-24-bitmask",
    ),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "GPTQ INT4 in groups of 128"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "AWQ INT4 in groups of 64"),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes nf4",
    ),
    "old bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes INT8"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
    "modelopt by its key": ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, "modelopt FP8"),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fbgemm_fp8 FP8 with a scale per row"),
    "quark": ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, "quark fp4"),
    "per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, "FP8 without weight_block_size"),
    "unknown": ({"quant_method": "new-method", "bits": 3}, "new-method INT3"),
}
IN_FILES: dict[str, tuple[str, Any, str]] = {
    "nvfp4": ("hf_quant_config.json", NVFP4, "modelopt NVFP4"),
    "mixed": ("hf_quant_config.json", {"quantization": {"quant_algo": "MIXED_PRECISION"}}, "modelopt MIXED_PRECISION"),
    "by layer": (
        "hf_quant_config.json",
        {"quantization": {"quant_algo": None, "quantized_layers": {"model.layers.0": {"quant_algo": "FP8"}}}},
        "modelopt MIXED_PRECISION",
    ),
    "flat": ("hf_quant_config.json", {"quant_algo": "FP8_PB_WO"}, "modelopt FP8_PB_WO"),
    "gptq": ("quantize_config.json", {"bits": 4, "group_size": 128, "sym": True}, "GPTQ INT4 in groups of 128"),
    "awq": ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "AWQ INT4 in groups of 128"),
}
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON; expected JSON in UTF-8; found an empty file"),
    "truncated": (b'{"quantization": {', "not valid JSON"),
    "a list": (b"[]", "wrong JSON value; expected an object or null"),
    "a text inside": (b'{"quantization": "NVFP4"}', "quantization; expected an object or null; found 'NVFP4'"),
    "too large": (b" " * MAX_CONFIG_BYTES + b"{}", "file too large"),
    "a page": (b"<html>not found</html>", "not valid JSON; expected JSON in UTF-8; found a web page"),
}
# None of these says that weights are quantised.
PLAIN: dict[str, tuple[str, Any]] = {
    "null": ("hf_quant_config.json", None),
    "nothing": ("hf_quant_config.json", {}),
    "no algorithm": ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}),
    "KV cache": ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}),
    "no quantization": ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": None}),
    "another's": ("quant_config.json", {"backend": "x"}),
    "another's text": ("quantize_config.json", "x"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "plain"
    build(V3).bfloat16().save(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


def assert_refused(folder: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command but `inspect` refuses the folder before it reads a header, and `plan` names the format."""
    for weights in folder.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".away"))
    for enter in (
        lambda: moe.load(folder),
        lambda: moe.load(folder, dtype="keep"),
        lambda: convert(folder, folder.with_name("out"), dtype="BF16"),
        lambda: cut(folder, folder.with_name("out"), layers=[0], experts=[0], compare=False),
    ):
        with pytest.raises(CheckpointError) as caught:
            enter()
        assert caught.value.path == folder / file and str(caught.value).startswith(f"{folder / file}: {message}")
    for weights in folder.glob("*.away"):
        weights.rename(weights.with_suffix(".safetensors"))
    assert not folder.with_name("out").exists()
    assert main(["plan", str(folder)]) != 0
    out, err = capsys.readouterr()
    said, problem = " ".join(err.split()), message.partition(";")[0]
    assert out == "" and f"{folder / file}: {problem}" in said and "or --dtype to plan" in said


def assert_named(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    summary = read_summary(folder)
    assert (summary.quantization, summary.loadable) == (name, False)
    assert summary.tensors == sum(totals.tensors for totals in summary.dtypes.values()) > 50
    assert main(["inspect", str(folder)]) == 0
    assert f"quantisation: {name}, a format that cannot be loaded" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", str(folder), "--dtype", "bf16"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"holds {name} files, which cannot be loaded; planned for bf16" in said


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "text_config"])
@pytest.mark.parametrize("case", IN_CONFIG)
def test_formats_in_the_config(folder: Path, key: str, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    raw, name = IN_CONFIG[case]
    nested = key == "text_config"
    configure(folder, **{key: {"quantization_config": raw} if nested else raw})
    where = "text_config.quantization_config" if nested else key
    if key == "quantization_config":  # the rest is the same for all places
        assert_refused(folder, "config.json", f"{where}: {name} is not supported; {SUPPORTED}", capsys)
        assert_named(folder, name, capsys)
    with pytest.raises(CheckpointError, match=rf"config\.json: {where}: {name} is not supported"):
        moe.load(folder)


@pytest.mark.parametrize("case", IN_FILES)
def test_formats_in_another_file(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, raw, name = IN_FILES[case]
    (folder / file).write_text(json.dumps(raw))
    assert_refused(folder, file, f"{name} is not supported; {SUPPORTED}", capsys)
    assert_named(folder, name, capsys)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_named(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = MALFORMED[case]
    (folder / "hf_quant_config.json").write_bytes(content)
    assert_refused(folder, "hf_quant_config.json", message, capsys)
    assert_named(folder, "modelopt", capsys)


def test_a_file_that_leads_out_of_the_folder_is_not_read(folder: Path) -> None:
    (folder.parent / "outside.json").write_text("{}")
    (folder / "hf_quant_config.json").symlink_to(folder.parent / "outside.json")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: a symbolic link that leads out"):
        moe.load(folder)


@pytest.mark.parametrize("case", PLAIN)
def test_files_that_state_no_format(folder: Path, case: str) -> None:
    file, raw = PLAIN[case]
    (folder / file).write_text(json.dumps(raw))
    assert read_summary(folder).quantization is None
    moe.load(folder)
    convert(folder, folder.with_name("out"), dtype="F32", progress=False)
    assert not (folder.with_name("out") / file).exists()


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense", "kv_cache_scheme": {"a": 1}},
    ],
    ids=["modelopt", "compressed-tensors"],
)
def test_a_quantised_cache_is_no_quantised_weight(folder: Path, raw: Any) -> None:
    configure(folder, quantization_config=raw)
    (folder / "hf_quant_config.json").write_text(json.dumps(NVFP4))  # config.json decides
    assert read_summary(folder).quantization is None
    moe.load(folder)


def test_the_config_decides_between_two_statements(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "fp8", dtype="fp8", block_size=(8, 16), progress=False)
    (tmp_path / "fp8" / "hf_quant_config.json").write_text(json.dumps(NVFP4))
    summary = read_summary(tmp_path / "fp8")
    assert (summary.quantization, summary.loadable, summary.agrees) == ("FP8 in blocks of 8 x 16", True, True)
    moe.load(tmp_path / "fp8", dtype="keep")


def test_mxfp4_of_a_family_without_a_layout_for_it(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="quantization_config: MXFP4 is not supported for deepseek_v3"):
        moe.load(folder)


ODD = (None, True, 0, -1, 1.5, "", "x\ny" * 100, [], [1, [2]], {}, {"a": {}}, [None, None])


def test_odd_values_never_raise_and_name_one_line(tmp_path: Path) -> None:
    keys = ("quant_method", "quant_algo", "bits", "w_bit", "group_size", "config_groups", "format", "sparsity_config")
    keys += ("weight_block_size", "fmt", "activation_scheme", "scale_fmt", "global_quant_config", "quantization")
    keys += ("quantized_layers", "load_in_4bit", "bnb_4bit_quant_type")
    methods = ("fp8", "mxfp4", "gptq", "awq", "modelopt", "modelopt_fp4", "compressed-tensors", "bitsandbytes", "quark")
    for method in (*methods, *ODD):
        for key in keys:
            for odd in ODD:
                raw = {"quant_method": method, key: odd, "config_groups": {"g": {"weights": odd}, "h": odd}}
                if key == "config_groups":
                    raw[key] = odd
                for values in ({"quantization_config": raw}, {"text_config": odd, "compression_config": odd}):
                    found = read_quantization(tmp_path, values)
                    if found is not None:
                        assert found.name.isprintable() and 0 < len(found.name) < 200
                        assert found.error is None or str(found.error).isprintable()
                (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": raw}))
    for raw in ODD:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": raw, "producer": raw}))
        assert (read_quantization(tmp_path, {}) is None) == (raw is None or isinstance(raw, dict))
