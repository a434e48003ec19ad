"""The recipe: its stages run in order, each from the one before, and what is finished is not done again."""

import json
import os
from pathlib import Path

import pytest

from moe.checkpoint.writing.atomic import locked
from moe.cli import main
from moe.errors import ConfigError
from moe.recipes.countdown import Problem, score
from moe.recipes.countdown_recipe import write_texts
from moe.recipes.countdown_settings import NEEDS, STAGES, RecipeSettings
from moe.recipes.countdown_text import tokenizer

SMALL = ["--pretrain-steps", "2", "--sft-steps", "2", "--grpo-steps", "1", "--distill-steps", "2"]
SMALL += ["--completions", "8", "--group-size", "4", "--problems", "4"]


def test_stages_that_are_needed_are_added_in_order() -> None:
    for stages, expected in (
        (("grpo",), ("pretrain", "sft", "grpo")),
        (("scratch", "zero"), ("pretrain", "zero", "scratch")),
        (("distill", "rejection"), ("pretrain", "sft", "grpo", "distill", "rejection")),
        (STAGES, STAGES),
    ):
        assert RecipeSettings(stages=stages).complete_stages == expected
    assert set(NEEDS) == set(STAGES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["recipe", "countdown", "--stages", "grpo", "scratch", *SMALL]) == 0
    finally:
        os.chdir(before)
    return folder / "runs/countdown"


def test_each_stage_starts_from_the_one_that_it_needs(finished: Path) -> None:
    home = finished / "seed-0"
    started = {stage: json.loads((home / stage / "settings.json").read_text()) for stage in ("pretrain", "sft", "grpo")}
    assert started["pretrain"]["preset"] == "countdown-tiny" and started["pretrain"]["steps"] == 2
    assert Path(started["sft"]["init"]).samefile(home / "pretrain")
    assert Path(started["grpo"]["init"]).samefile(home / "sft")
    scratch = json.loads((home / "scratch/model.json").read_text())
    assert scratch["model_type"] == "qwen3"
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["stages"]) == ["pretrain", "sft", "grpo", "scratch"]
    for found in summary["stages"].values():
        assert found["accuracy"]["values"] == [found["accuracy"]["mean"]] and found["seconds"]["mean"] > 0


def test_texts_have_no_tags_before_the_cold_start_which_is_right(finished: Path) -> None:
    texts = finished / "seed-0/texts"
    assert "<" not in (texts / "arithmetic.jsonl").read_text()
    records = [json.loads(line) for line in (texts / "cold_start.jsonl").read_text().splitlines()]
    held_out = {json.loads(line)["prompt"] for line in (texts / "cold_start_held_out.jsonl").read_text().splitlines()}
    assert len(records) >= 20 and not held_out & {record["prompt"] for record in records}
    for record in records:
        numbers, target = record["prompt"].removeprefix("Numbers: ").split(" Target: ")
        problem = Problem(tuple(map(int, numbers.split())), int(target))
        assert score(problem, record["completion"]).accuracy == 1


def test_finished_stages_are_kept_and_others_may_be_added(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent.parent)
    weights = finished / "seed-0/grpo/checkpoint/model.safetensors"
    before = weights.stat().st_mtime_ns
    (finished / "seed-0/scratch/accuracy.json").write_text('{"accuracy": 0.25, "format": 0.5, "length": 3.0}')
    assert main(["recipe", "countdown", "--stages", "grpo", "scratch", *SMALL, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stages"]["scratch"]["accuracy"]["values"] == [0.25]
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--stages", "sft", "rest"], "--stages: expected some of pretrain, sft,"),
        (["--seeds", "1", "1"], "--seeds: expected different integers"),
        (["--problems", "501"], "--problems: expected an integer from 1 to 500; found 501"),
        (["--grpo-steps", "0"], "--grpo-steps: expected 1 or more; found 0"),
        (["--student", "tiny_dens"], "did you mean tiny_dense?"),
        (["--sft-lr", "nan"], "--sft-lr: expected a finite number above 0; found nan"),
        (["--group-size", "1"], "--group-size: expected 2 or more; found 1"),
        (["--completions", "18", "--group-size", "6"], "--completions: expected a multiple of 12,"),
        (["--completions", "0"], "--completions: expected a multiple of 8,"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["recipe", "countdown", "--out", str(tmp_path / "new"), *options]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("moesmith recipe: ") and says in line


def test_other_settings_and_other_folders_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "countdown", "--out", str(finished), *SMALL, "--grpo-steps", "3"]) == 2
    assert "a recipe with these settings, not --grpo-steps 1; or --overwrite" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["recipe", "countdown", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "a new or empty folder, or that of an earlier recipe" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ['{"name": "soup"}', "[]", "not JSON"])
def test_a_recipe_json_of_another_program_is_never_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "recipe.json").write_text(content)
    for more in ([], ["--overwrite"]):
        assert main(["recipe", "countdown", "--out", str(tmp_path), *more]) == 2
        assert "a new or empty folder, or that of an earlier recipe" in capsys.readouterr().err
    assert (tmp_path / "recipe.json").read_text() == content


def test_the_current_folder_is_not_deleted(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished / "seed-0")
    assert main(["recipe", "countdown", "--out", "..", *SMALL, "--overwrite"]) == 2
    assert "expected a folder that is not the current one, with --overwrite" in capsys.readouterr().err
    assert (finished / "summary.json").exists()


def test_a_folder_in_use_is_refused_and_kept(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(finished):
        assert main(["recipe", "countdown", "--out", str(finished), *SMALL, "--overwrite"]) == 2
    assert "another recipe is using this folder" in capsys.readouterr().err
    assert (finished / "summary.json").exists()


def test_an_interrupted_writing_of_texts_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, write = RecipeSettings(pretrain_steps=1, sft_steps=1, distill_steps=1), Path.write_text

    def stops(self: Path, text: str, **options: str) -> int:
        if not self.name.startswith("tokenizer.json"):
            return write(self, text, **options)
        write(self, text[:100], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stops)
        with pytest.raises(KeyboardInterrupt):
            write_texts(tmp_path, settings, 0)
    write_texts(tmp_path, settings, 0)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(tokenizer().to_str())


def test_an_error_of_a_stage_names_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ConfigError("--teacher", "grpo", "completions that are kept; found 3 rejected")

    monkeypatch.setattr("moe.recipes.countdown_recipe.run_in_folder", refuses)
    assert main(["recipe", "countdown", "--out", str(tmp_path / "new"), *SMALL]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    wanted = "stage pretrain of seed 0: --teacher: expected completions that are kept; found 3 rejected"
    assert line == f"moesmith recipe: {wanted}"


@pytest.mark.parametrize("kind", ["sft", "grpo", "distill"])
def test_the_help_names_the_default_folder(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    with pytest.raises(SystemExit):
        main([kind, "--help"])
    assert f"Default: runs/MODEL-{kind}." in " ".join(capsys.readouterr().out.split())
