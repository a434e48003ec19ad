"""Commands that take or write folders: what they replace, which folders they find, and how they refuse others."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moe
from moe import CheckpointError
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format.auxiliary import write_auxiliary
from moe.cli.options import parse
from moe.cli.train import Args as TrainArgs
from moe.planning.footprint import Deployment, inference, stored
from tests.support.checkpoint_cases import V3, V3_MTP
from tests.support.command_line import fails_in_one_line, run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    moe.Transformer(V3).save(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITERS = {
    "convert": ("convert", ()),
    "cut": ("cut", ("--layers", "0-1", "--experts", "0,3,6,9", "--no-compare")),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("there", ["checkpoint", "other files", "a broken save"])
def test_what_is_there_is_not_replaced(capsys, saved, tmp_path, monkeypatch, writer, there) -> None:
    command, options = WRITERS[writer]
    out = tmp_path / "out"
    if there == "other files":
        out.mkdir()
        (out / "thesis.txt").write_text("ten years of work")
    else:
        moe.Transformer(moe.preset("tiny")).save(out)
    if there == "a broken save":
        out.rename(out.with_name(".out.previous"))
    before = contents(tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("the source is read")

    monkeypatch.setattr("moe.checkpoint.rewrite.find", never)
    line = fails_in_one_line(capsys, command, str(saved), "--out", str(out), *options)
    assert "exists and is not empty; expected a new or empty folder, or overwrite=True (--overwrite)" in line
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        cut(saved, out, layers=[0], experts=[0, 3, 6, 9]) if command == "cut" else convert(saved, out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_the_source_stays_as_it_is(capsys, saved, tmp_path, writer) -> None:
    command, options = WRITERS[writer]
    source = shutil.copytree(saved, tmp_path / "source")
    before = contents(source)
    inside = fails_in_one_line(capsys, command, str(source), "--out", str(source / "new"), *options)
    assert "new: inside the source, which must not change; expected a folder outside it" in inside
    assert "not a folder; expected the name of a folder" in fails_in_one_line(
        capsys, command, str(source), "--out", "", *options
    )
    assert "not a folder" in fails_in_one_line(capsys, command, "", "--out", str(tmp_path / "a"), *options)
    few = fails_in_one_line(
        capsys, command, str(source), "--out", str(tmp_path / "a"), *options, "--max-shard-size", "5"
    )
    assert "--max-shard-size: expected at least 1000 bytes, such as 5GB; found '5'" in few
    assert contents(source) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_overwrite_replaces_a_checkpoint_and_nothing_else(capsys, saved, tmp_path, writer) -> None:
    command, options = WRITERS[writer]
    out = tmp_path / "out"
    arguments = (command, str(saved), "--out", str(out), *options)
    out.mkdir()  # empty: nothing is lost
    assert run(capsys, *arguments)[0] == 0
    first = contents(out)
    moe.Transformer(moe.preset("tiny")).save(out)
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert contents(out) == first
    (out / "thesis.txt").write_text("ten years of work")
    line = fails_in_one_line(capsys, *arguments, "--overwrite")
    assert "holds other files; expected only the files of a checkpoint; found thesis.txt" in line
    assert contents(out) == first | {"thesis.txt": b"ten years of work"}


def test_convert_and_cut_print_what_they_made(capsys, saved, tmp_path) -> None:
    out = str(tmp_path / "wide")
    options = ("--dtype", "fp8", "--block-size", "8", "16")
    assert run(capsys, "convert", str(saved), "--out", out, *options) == (0, f"{out}\n", "")
    assert moe.load(out).norm.weight.dtype == torch.float32
    options = ("--layers", "0-1", "--experts", "0,3,6,9")
    status, printed, _ = run(capsys, "cut", str(saved), "--out", str(tmp_path / "part"), *options)
    assert status == 0 and json.loads(printed)["experts"] == [0, 3, 6, 9]


def test_what_appears_while_a_conversion_runs_is_not_replaced(saved, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"

    def late(folder: Path, files: Any) -> None:
        moe.Transformer(moe.preset("tiny")).save(out)
        write_auxiliary(folder, files)

    monkeypatch.setattr("moe.checkpoint.writing.atomic.locked", lambda target: contextlib.nullcontext(False))
    monkeypatch.setattr("moe.checkpoint.rewrite.write_auxiliary", late)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(saved, out)
    assert moe.load(out).config.hidden_size == moe.preset("tiny").hidden_size
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 made of fp32: what is not quantised stays fp32, with MTP modules that repeat embedding and head."""
    folder = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(0)
    moe.Transformer(V3_MTP).save(folder / "wide")
    convert(folder / "wide", folder / "fp8", dtype="fp8", block_size=(16, 8))
    return folder / "fp8"


def planned(capsys: Any, *arguments: str) -> dict[str, Any]:
    status, out, err = run(capsys, "plan", *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_plan_reports_what_the_files_have(capsys: Any, mixed: Path, tmp_path: Path) -> None:
    tensors = {name: t for file in mixed.glob("*.safetensors") for name, t in load_file(file).items()}
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    values = {kind: sum(t.numel() for t in tensors.values() if t.dtype == dtype) for kind, dtype in kinds.items()}
    facts = planned(capsys, str(mixed))
    assert facts["placement"]["dtype"] == "fp8" and facts["stored_from"] == "headers"
    assert facts["stored"]["values"] == values and facts["stored"]["tensors"] == len(tensors)
    assert facts["stored"]["bytes"] == sum(t.nbytes for t in tensors.values())
    assert planned(capsys, str(mixed), "--dtype", "fp8") == facts

    # Each of two GPUs holds half of the experts with their scales, and everything else but repeats.
    parts = planned(capsys, str(mixed), "--gpus", "2", "--ep", "2")["inference"]["parts"]
    repeats = ("embed_tokens.weight", "shared_head.head.weight")
    experts = sum(t.nbytes for name, t in tensors.items() if ".mlp.experts." in name)
    repeated = sum(t.nbytes for name, t in tensors.items() if ".layers." in name and name.endswith(repeats))
    assert repeated and parts["experts"] == experts // 2
    assert parts["other weights"] == facts["stored"]["bytes"] - experts - repeated

    assert "from the headers of its files" in " ".join(run(capsys, "plan", str(mixed))[1].split())


def test_plan_without_files_or_for_others_is_arithmetic(capsys: Any, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((mixed / "config.json").read_text())
    facts = planned(capsys, str(tmp_path))
    assert facts["stored_from"] == "config.json" and facts["placement"]["block_size"] == [16, 8]
    assert facts["stored"]["values"] == stored(V3_MTP, "fp8", (16, 8)).values
    assert (
        facts["inference"]["parts"]["experts"]
        == inference(V3_MTP, Deployment(1, 1, "fp8", 8192, (16, 8))).parts["experts"]
    )
    assert "computed from its configuration" in " ".join(run(capsys, "plan", str(tmp_path))[1].split())
    other = planned(capsys, str(mixed), "--dtype", "fp16")
    values = stored(V3_MTP, "fp16").values
    assert other["stored"]["values"] == values and set(values) == {"F16", "F32"}
    assert other["stored"]["bytes"] == 2 * values["F16"] + 4 * values["F32"]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"table": "stacked"}, "bf16"),
        ({"table": "stacked"}, "fp32"),
        ({"table": "stacked"}, "fp64"),
        ({"table": "deepseek"}, "bf16"),
        ({"table": "deepseek"}, "fp8"),
        ({"mtp": False}, "fp16"),
        ({}, "fp8"),
        ("no repeats", "bf16"),
    ],
)
def test_plan_for_another_dtype_is_what_convert_writes(
    capsys: Any, mixed: Path, tmp_path: Path, settings: Any, dtype: str
) -> None:
    """The plan keeps the layout of the files, and whether they repeat the embedding for MTP modules."""
    from safetensors.torch import save_file

    if settings == "no repeats":
        convert(mixed, tmp_path / "source", dtype="fp32")
        file = tmp_path / "source" / "model.safetensors"
        repeats = ("embed_tokens.weight", "head.weight")
        tensors = {n: t for n, t in load_file(file).items() if not (".layers." in n and n.endswith(repeats))}
        save_file(tensors, file)
    else:
        convert(mixed, tmp_path / "source", dtype="fp32", **settings)
    convert(tmp_path / "source", tmp_path / "out", dtype=dtype)
    expected, found = (planned(capsys, str(tmp_path / name), "--dtype", dtype) for name in ("out", "source"))
    assert expected["stored_from"] == "headers"
    assert found["stored"]["tensors"] == expected["stored"]["tensors"]
    if dtype != "fp8":  # convert leaves fp32 in what is not quantised
        assert (found["stored"], found["training"]) == (expected["stored"], expected["training"])
        assert found["inference"]["parts"] == expected["inference"]["parts"]


def test_plan_takes_another_layout_where_that_of_the_files_cannot_hold_the_dtype(
    capsys: Any, saved: Path, tmp_path: Path
) -> None:
    convert(saved, tmp_path / "stacked", table="stacked")
    assert (
        planned(capsys, str(tmp_path / "stacked"), "--dtype", "fp8")["stored"]
        == (planned(capsys, str(saved), "--dtype", "fp8")["stored"])
    )


def test_plan_of_plain_files_names_their_dtype(capsys: Any, saved: Path, tmp_path: Path) -> None:
    facts = planned(capsys, str(saved))
    assert facts["placement"]["dtype"] == "fp32" and set(facts["stored"]["values"]) == {"F32"}
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    assert planned(capsys, str(tmp_path))["stored"] == facts["stored"]  # config.json names the dtype, too
    assert planned(capsys, "tiny")["placement"]["dtype"] == "bf16"


def test_plan_counts_no_missing_tensors(capsys: Any, saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(saved / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    facts = planned(capsys, str(tmp_path))
    assert facts["stored"]["tensors"] == len(tensors)
    assert "2 tensors missing from the files are not counted" in facts["inference"]["assumptions"]


@pytest.mark.parametrize("spelling", ["fp16", "F16", torch.float16])
def test_spellings_of_a_dtype(saved: Path, tmp_path: Path, spelling: Any) -> None:
    convert(saved, tmp_path / "out", dtype=spelling)
    assert set(read_summary(tmp_path / "out").dtypes) == {"F16", "F32"}  # correction biases stay
    assert moe.load(saved, dtype=spelling).norm.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("convert", "--out", "never", "--dtype", "pf8"),
            "--dtype: expected one of bf16, fp16, fp32, fp64, fp8, mxfp4; found 'pf8'; did you mean fp8?",
        ),
        (
            ("convert", "--out", "never", "--dtype", "mxfp4"),
            "moesmith convert: --dtype: expected a dtype other than mxfp4, which deepseek_v3 does not have; found 'mx",
        ),
        (
            ("convert", "--out", "never", "--layout", "stackd"),
            "moesmith convert: --layout: expected one of experts, stacked, deepseek, the layouts of deepseek_v3; "
            "found 'stackd'; did you mean stacked?",
        ),
        (("plan", "--dtype", "int4"), "expected one of bf16, fp16, fp32, fp64, fp8, mxfp4"),
        (
            ("plan", "--gpu", "H-100"),
            "--gpu: expected one of a100, h100, h800, h200, b200, mi300x; found 'H-100'; did you mean h100?",
        ),
    ],
)
def test_unknown_names(
    capsys: Any, saved: Path, monkeypatch: Any, tmp_path: Path, arguments: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    assert message in fails_in_one_line(capsys, command, str(saved), *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (
            ("generate", "x", "--prompt", "a", "--dtype", "bf61"),
            "--dtype: expected one of auto, bf16, fp16, fp32, fp64; found 'bf61'; did you mean bf16?",
        ),
        (
            ("generate", "x", "--prompt", "a", "--dtype", "fp8"),
            "--dtype: expected one of auto, bf16, fp16, fp32, fp64; found 'fp8'",
        ),
        (
            ("train", "--optimizer", "muno"),
            "--optimizer: expected one of adamw, muon; found 'muno'; did you mean muon?",
        ),
        (
            ("train", "--schedule", "cosin"),
            "--schedule: expected one of cosine, wsd; found 'cosin'; did you mean cosine?",
        ),
        (("train", "--dtype", "bf61"), "--dtype: expected one of fp32, bf16; found 'bf61'; did you mean bf16?"),
        (
            ("convert", "x", "--out", "y", "--scale-fmt", "UE8M"),
            "--scale-fmt: expected one of ue8m0; found 'UE8M'; did you mean ue8m0?",
        ),
        (
            ("plan", "tiny", "--sharding", "fspd"),
            "--sharding: expected one of zero1, fsdp; found 'fspd'; did you mean fsdp?",
        ),
    ],
)
def test_unknown_choices(capsys: Any, arguments: Any, hint: str) -> None:
    assert fails_in_one_line(capsys, *arguments) == f"moesmith {arguments[0]}: {hint}\n"


def test_unknown_model_types_and_presets(capsys: Any, saved: Path, tmp_path: Path) -> None:
    values = json.loads((saved / "config.json").read_text())
    for written, meant in (("deepseek-v3", "deepseek_v3"), ("DeepSeek_V3", "deepseek_v3"), ("mixtrall", "mixtral")):
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": written}))
        assert f"; did you mean {meant}?; found {written}" in fails_in_one_line(capsys, "plan", str(tmp_path))
    for command in ("inspect", "plan"):
        line = fails_in_one_line(capsys, command, "deepseek-v3")
        assert "expected a folder (no such folder), or one of the presets tiny, " in line
        assert line.endswith("; found 'deepseek-v3'; did you mean deepseek_v3?\n")


def test_a_run_folder_stands_for_its_checkpoint(capsys: Any, saved: Path, tmp_path: Path) -> None:
    for name in ("settings.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    before = fails_in_one_line(capsys, "inspect", str(tmp_path))
    assert "a run of moesmith train without a checkpoint; expected a finished run" in before
    convert(saved, tmp_path / "checkpoint")
    facts = json.loads(run(capsys, "inspect", str(tmp_path), "--json")[1])
    assert facts["stored"]["folder"] == str(tmp_path / "checkpoint")
    assert planned(capsys, str(tmp_path))["stored"]["bytes"] == facts["stored"]["bytes"]
    assert "every byte is unchanged since it was saved" in run(capsys, "inspect", str(tmp_path), "--verify")[1]
    assert moe.load(tmp_path).config == moe.load(saved).config
    convert(tmp_path, tmp_path.with_name("again"))
    assert "checkpoint/tokenizer.json: no such file" in fails_in_one_line(
        capsys, "generate", str(tmp_path), "--prompt", "a"
    )
    with pytest.raises(CheckpointError, match="holds other files"):  # a run is no place for a checkpoint
        moe.load(saved).save(tmp_path)
    with pytest.raises(CheckpointError, match="the source itself"):
        convert(tmp_path, tmp_path / "checkpoint", overwrite=True)
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    assert json.loads(run(capsys, "plan", str(tmp_path), "--json")[1])["stored_from"] == "config.json"


def test_on_and_off_options(capsys: Any, mixed: Path, tmp_path: Path) -> None:
    assert run(capsys, "convert", str(mixed), "--out", str(tmp_path / "a"), "--no-mtp", "--no-progress")[2] == ""
    assert read_summary(tmp_path / "a").config.num_nextn_predict_layers == 0  # pyright: ignore[reportOptionalMemberAccess]
    status, _, err = run(capsys, "convert", str(mixed), "--out", str(tmp_path / "b"), "--mtp", "--progress")
    assert status == 0 and "converting" in err
    assert read_summary(tmp_path / "b").config.num_nextn_predict_layers == 2  # pyright: ignore[reportOptionalMemberAccess]
    options = ("--out", str(tmp_path / "c"), "--layout", "deepseek", "--mtp")
    assert "moesmith convert: --mtp: expected False (--no-mtp): the layout deepseek" in fails_in_one_line(
        capsys, "convert", str(mixed), *options
    )


def test_paths_that_are_not_folders_are_refused(capsys: Any, saved: Path, tmp_path: Path) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("text")
    nothing = tmp_path / "nothing"
    for place, message in (
        (empty, "config.json: No such file"),
        (file, "not a folder"),
        (nothing, "no such folder"),
    ):
        for command, *options in (
            ("inspect",),
            ("plan",),
            ("generate", "--prompt", "a"),
            ("convert", "--out", str(tmp_path / "out")),
            ("cut", "--out", str(tmp_path / "out"), "--layers", "0", "--experts", "0"),
        ):
            said = fails_in_one_line(capsys, command, str(place), *options)
            assert message in said or (command == "generate" and "tokenizer.json: no such file" in said)
    assert "not a folder" in fails_in_one_line(capsys, "convert", str(saved), "--out", str(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_an_interrupted_conversion_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from moe.checkpoint import convert
from moe.checkpoint.writing import shards
from moe.cli import main
real = convert.read_raw
def raw(files, info):
    if info.name == "model.norm.weight":
        os.kill(os.getpid(), signal.SIGINT)
    return real(files, info)
convert.read_raw = raw
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["convert", *sys.argv[1:]]))
"""
    command = [sys.executable, "-c", code, str(saved), "--out", str(tmp_path / "new" / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "moesmith convert: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_torchs_names_of_dtypes_on_the_command_line(capsys: Any, saved: Path, tmp_path: Path) -> None:
    assert run(capsys, "convert", str(saved), "--out", str(tmp_path / "out"), "--dtype", "bfloat16")[0] == 0
    assert planned(capsys, str(tmp_path / "out"))["placement"]["dtype"] == "bf16"
    assert planned(capsys, str(saved), "--dtype", "float64")["placement"]["dtype"] == "fp64"
    facts = planned(capsys, "tiny", "--gpu", "h100", "--moments", "bfloat16", "--dispatch", "float8_e4m3fn")
    assert (facts["training"]["moments"], facts["training"]["dispatch"]) == ("bf16", "fp8")
    for word, name in (("float32", "fp32"), ("BF16", "bf16")):
        args = parse(TrainArgs, "train", ["--dtype", word])
        assert args.dtype == args.deciding()["dtype"] == name  # what settings.json has, so that a run can be resumed


def test_a_foreign_settings_file_does_not_make_a_run(capsys: Any, tmp_path: Path) -> None:
    for content in ('{"editor.tabSize": 4}', "[]", "not JSON"):
        (tmp_path / "settings.json").write_text(content)
        line = fails_in_one_line(capsys, "train", "--out", str(tmp_path), "--overwrite")
        assert "expected a new or empty folder, or that of an earlier run" in line
        assert (tmp_path / "settings.json").read_text() == content


def test_a_folder_that_may_not_be_read(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    lstat = os.lstat

    def refuse(path: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path / "locked")):
            raise PermissionError(13, "Permission denied", str(path))
        return lstat(path, **more)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "lstat", refuse)
    for command, *options in (("inspect",), ("plan",), ("generate", "--prompt", "a"), ("inspect", "--verify")):
        line = fails_in_one_line(capsys, command, str(tmp_path / "locked"), *options)
        assert f"{tmp_path / 'locked'}: cannot be read: Permission denied" in line


def test_the_receipt_of_a_cut_is_json(capsys: Any, tmp_path: Path) -> None:
    """A model of zeros has no relative difference."""
    model = moe.Transformer(V3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save(tmp_path / "zeros")
    options = ("--out", str(tmp_path / "part"), "--layers", "0-1", "--experts", "0,3,6,9")
    status, out, _ = run(capsys, "cut", str(tmp_path / "zeros"), *options)

    def refuse(word: str) -> None:
        raise ValueError(word)

    assert status == 0 and json.loads(out, parse_constant=refuse)["relative_difference"] is None
    assert json.loads((tmp_path / "part" / "cut.json").read_text(), parse_constant=refuse) == json.loads(out)


@pytest.mark.parametrize("name", ["[red]b[/x]", "a\nb\x1b[31m", "c\udcff"])
def test_odd_names_and_values_are_shown_as_text(capsys: Any, saved: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    convert(saved, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"note [/x]": "\ud800 [red]x[/red] \x1b[31m"}))
    for command in ("inspect", "plan"):
        status, out, err = run(capsys, command, str(folder))
        assert (status, err) == (0, "") and not any(c == "\x1b" or 0xD800 <= ord(c) < 0xE000 for c in out)
        assert json.loads(run(capsys, command, str(folder), "--json")[1])["model"] == str(folder)
    assert "[red]x[/red]" in run(capsys, "inspect", str(folder))[1]


def test_inspect_prints_json_of_any_config(capsys: Any, saved: Path, tmp_path: Path) -> None:
    values = json.loads((saved / "config.json").read_text()) | {"note": [float("nan"), {"x": float("-inf")}, 1.5]}
    convert(saved, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))

    def refuse(word: str) -> None:
        raise ValueError(word)

    facts = json.loads(run(capsys, "inspect", str(tmp_path / "out"), "--json")[1], parse_constant=refuse)
    assert facts["stored"]["tensors"] == facts["stored"]["dtypes"]["F32"]["tensors"]


def test_an_option_is_named_only_by_commands_that_have_it(capsys: Any, mixed: Path, tmp_path: Path) -> None:
    """The file of the MTP modules is not there."""
    from safetensors.torch import save_file

    convert(mixed, tmp_path / "odd", dtype="fp32", max_shard_bytes=2**14)
    index = json.loads((tmp_path / "odd" / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / "odd" / index[f"model.layers.{V3_MTP.num_hidden_layers + 1}.enorm.weight"]).unlink()
    out = ("--out", str(tmp_path / "out"))
    advice = "; mtp=False (--no-mtp) leaves multi-token prediction out"
    for command, *options in (("inspect",), ("plan",), ("convert", *out)):
        line = fails_in_one_line(capsys, command, str(tmp_path / "odd"), *options)
        assert "No such file" in line and (advice in line) == (command == "convert")
        assert ("mtp" in line) == (command == "convert")

    words = tmp_path / "words"
    convert(mixed, words, dtype="bf16", mtp=False)
    tensors = load_file(words / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].float()}, words / "model.safetensors")
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(words / "tokenizer.json"))
    line = fails_in_one_line(capsys, "generate", str(words), "--prompt", "a")
    assert "; load with --dtype bfloat16, as config.json states, or --dtype float32; expected BF16" in line
    options = ("--prompt", "a", "--max-new-tokens", "2", "--json")
    for dtype in ("bfloat16", "float32"):
        assert run(capsys, "generate", str(words), *options, "--dtype", dtype)[0] == 0


def test_generate_without_mtp_modules(capsys: Any, mixed: Path, tmp_path: Path) -> None:
    """An MTP module whose embedding is not the model's."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    convert(mixed, tmp_path / "odd", dtype="fp32")
    file = tmp_path / "odd" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.{V3_MTP.num_hidden_layers}.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, file)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "odd" / "tokenizer.json"))
    command = ("generate", str(tmp_path / "odd"), "--prompt", "a", "--max-new-tokens", "2", "--json")
    line = fails_in_one_line(capsys, *command)
    assert name in line and "; --speculative off leaves multi-token prediction out" in line
    status, out, _ = run(capsys, *command, "--speculative", "off")
    assert status == 0 and len(json.loads(out)["token_ids"]) == 2
