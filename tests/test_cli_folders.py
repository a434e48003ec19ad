"""Commands that take or write folders: what they replace, which folders they find, and what they say of others."""

import contextlib
from pathlib import Path

import pytest
import torch

import moe
from moe import CheckpointError
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.shards import as_json
from tests.checkpoint_cases import V3
from tests.test_cli import fails_in_one_line, run


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

    monkeypatch.setattr("moe.checkpoint.convert.find", never)
    line = fails_in_one_line(capsys, command, str(saved), "--out", str(out), *options)
    assert "exists and is not empty; expected a new or empty folder, or overwrite=True (--overwrite)" in line
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        cut(saved, out, layers=[0], experts=[0, 3, 6, 9]) if command == "cut" else convert(saved, out)
    assert contents(tmp_path) == before


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
    assert "holds other files; expected a checkpoint or nothing; found thesis.txt" in line
    assert contents(out) == first | {"thesis.txt": b"ten years of work"}


def test_what_appears_while_a_conversion_runs_is_not_replaced(saved, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"

    def late(values: object) -> bytes:
        moe.Transformer(moe.preset("tiny")).save(out)
        return as_json(values)

    monkeypatch.setattr("moe.checkpoint.atomic.locked", lambda target: contextlib.nullcontext(False))
    monkeypatch.setattr("moe.checkpoint.convert.as_json", late)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(saved, out)
    assert moe.load(out).config.hidden_size == moe.preset("tiny").hidden_size
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
