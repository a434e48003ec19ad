"""Names on the Hugging Face Hub: in its cache, at a revision, offline, and what its answers become. No network."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from huggingface_hub import constants, utils
from safetensors import safe_open
from tokenizers import Tokenizer, models

import moe
from moe import CheckpointError, ConfigError
from moe.checkpoint import read_summary
from moe.checkpoint.convert import convert
from moe.checkpoint.reading import hub
from moe.train.settings import Settings
from moe.train.tokenizer import find_tokenizer, load_tokenizer
from tests.support.checkpoint_cases import V3, assert_same
from tests.support.command_line import fails_in_one_line, run

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Revision -> its folder; they differ in the width of experts."""
    folder = tmp_path_factory.mktemp("saved")
    for number, revision in enumerate(COMMITS):
        torch.manual_seed(number)
        size = V3.moe_intermediate_size + 8 * number
        moe.Transformer(moe.ModelConfig.from_dict(V3.to_dict() | {"moe_intermediate_size": size})).save(
            folder / revision
        )
    return {revision: folder / revision for revision in COMMITS}


@pytest.fixture
def cache(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with both revisions of org/model. The working folder is empty."""
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in saved[revision].iterdir():
            blob = repository / "blobs" / f"{revision}-{path.name}"
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return repository


def width(model: Any) -> int:
    return model.config.moe_intermediate_size


def test_a_revision_is_the_one_that_is_loaded(cache: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    old, new = V3.moe_intermediate_size + 8, V3.moe_intermediate_size
    assert width(moe.load("org/model")) == width(moe.load("org/model@main")) == new
    for name, revision in (("org/model@v1", None), ("org/model", "v1"), ("org/model@v1", "v1"), (str(cache), "v1")):
        assert width(moe.load(name, revision=revision)) == old
    assert width(moe.load(f"org/model@{COMMITS['v1']}")) == width(read_summary("org/model", "v1")) == old
    convert("org/model", tmp_path / "out", revision="v1")
    assert width(moe.load(tmp_path / "out")) == old
    for name in ("org/model", cache):
        assert_same(moe.load(name), moe.load(saved["main"]))
    offline = r"the Hub is offline .HF_HUB_OFFLINE is set., and its cache does not have"
    with pytest.raises(CheckpointError, match=offline):
        moe.load("org/other")


def test_revisions_that_cannot_be(cache: Path, saved: dict[str, Path]) -> None:
    for name, revision, message in (
        ("org/model@v1", "main", "revision = 'main': expected v1, as org/model@v1 has it"),
        (saved["main"], "main", "a folder, which has no revisions; expected no revision; found main"),
        (cache, "v2", "no such revision in the cache; expected main, v1; found v2"),
        (cache, "../../../here", "leads out of the checkpoint"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=message):
            moe.load(name, revision=revision)
    Path("org/model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no such folder, but one without the revision; expected org/model"):
        moe.load("org/model@v1")


def test_every_command_takes_a_name(cache: Path, capsys: Any, tmp_path: Path) -> None:
    status, out, err = run(capsys, "inspect", "org/model@v1", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["stored"]["folder"] == str(cache / "snapshots" / COMMITS["v1"])
    facts = json.loads(run(capsys, "plan", "org/model@v1", "--json")[1])
    assert facts["stored_from"] == "headers" and facts["stored"]["bytes"] == json.loads(out)["stored"]["bytes"]
    status, out, _ = run(capsys, "inspect", "org/model", "--verify")
    assert status == 0 and "every byte is as it was saved" in out
    layers = ("--layers", "0-1", "--experts", "0,3,6,9", "--no-compare")
    for command, options in (("convert", ()), ("cut", layers)):
        assert run(capsys, command, "org/model@v1", "--out", str(tmp_path / command), *options)[0] == 0
        assert width(moe.load(tmp_path / command)) == V3.moe_intermediate_size + 8


def test_a_cache_that_lacks_a_file(cache: Path, capsys: Any, tmp_path: Path) -> None:
    """The state after an interrupted download. Offline, it is unknown whether the model has the file."""
    offline = "moesmith: org/model@v1: the Hub is offline (HF_HUB_OFFLINE is set), and its cache has no"
    line = fails_in_one_line(capsys, "generate", "org/model@v1", "--prompt", "a")
    assert line.startswith(f"{offline} tokenizer.json; text needs the tokenizer that the model was trained with; exp")
    snapshot, out = cache / "snapshots" / COMMITS["v1"], ("--out", str(tmp_path / "out"))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(snapshot / "tokenizer.json"))
    commands = (
        ("generate", "org/model@v1", "--prompt", "a"),
        ("convert", "org/model@v1", *out),
        ("cut", "org/model@v1", *out, "--layers", "0", "--experts", "0"),
    )
    (snapshot / "model.safetensors").unlink()
    for command in commands:
        line = fails_in_one_line(capsys, *command)
        assert line == f"{offline} model.safetensors; expected a model that is in the cache, or a connection\n"

    convert(hub.find("org/model"), tmp_path / "shards", max_shard_bytes=2**16)
    for path in (tmp_path / "shards").iterdir():
        (snapshot / path.name).unlink(missing_ok=True)
        (snapshot / path.name).write_bytes(path.read_bytes())
    assert run(capsys, *commands[0], "--max-new-tokens", "1")[0] == 0
    second = next(snapshot.glob("model-00002-of-*"))
    second.unlink()
    for command in commands:
        assert fails_in_one_line(capsys, *command).startswith(f"{offline} {second.name}; expected")
    line = fails_in_one_line(capsys, "inspect", "org/model@v1")
    assert f"but not all of its weights: {OFFLINE}" in line
    assert json.loads(run(capsys, "plan", "org/model@v1", "--json")[1])["stored_from"] == "config.json"
    with pytest.raises(CheckpointError, match=f"org/model@v1: the Hub is offline .*no {second.name}; expected"):
        moe.load("org/model", revision="v1")
    (snapshot / "config.json").unlink()
    for command in (*commands[1:], ("inspect", "org/model@v1"), ("plan", "org/model@v1")):
        assert fails_in_one_line(capsys, *command).startswith(f"{offline} config.json; expected")
    line = fails_in_one_line(capsys, "convert", str(snapshot), *out)
    assert line.startswith(f"moesmith: {snapshot / 'config.json'}: No such file; expected config.json and")


def answer(kind: type[Exception]) -> Exception:
    if issubclass(kind, utils.HfHubHTTPError):
        return kind("said by the Hub\nat length", response=SimpleNamespace(headers={}, request=None))  # pyright: ignore
    return kind("said by the library\nat length")


OFFLINE = "the Hub is offline (HF_HUB_OFFLINE is set), and its cache does not have all of this model"
ANSWERS = {
    utils.RepositoryNotFoundError: "no such folder, and no such model on the Hub; expected another name",
    utils.GatedRepoError: "access to this model on the Hub is restricted; expected its terms accepted on its page",
    utils.RevisionNotFoundError: "the model on the Hub has no such revision; expected a branch, tag or commit of it; "
    "found v3",
    utils.LocalEntryNotFoundError: OFFLINE,
    utils.OfflineModeIsEnabled: OFFLINE,
    utils.HFValidationError: "not a valid name on the Hub",
    TimeoutError: "huggingface_hub failed: TimeoutError('said by the library\\nat length')",
}


@pytest.mark.parametrize("kind", ANSWERS, ids=lambda kind: kind.__name__)
def test_what_the_hub_answers_is_one_line(kind: type[Exception], monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise answer(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    for command in (("convert", "org/model@v3", "--out", "out"), ("generate", "org/model@v3", "--prompt", "a")):
        line = fails_in_one_line(capsys, *command)
        assert line.startswith("moesmith: org/model@v3: ") and ANSWERS[kind] in line
    for command in ("inspect", "plan"):
        assert ANSWERS[kind].split("; expected")[0] in fails_in_one_line(capsys, command, "org/model@v3")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_answers_with_an_error_is_not_called_offline(monkeypatch: Any, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise utils.LocalEntryNotFoundError("nothing cached") from answer(utils.HfHubHTTPError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"the Hub answers with an error .said by the Hub., and its cache does not"
    ):
        moe.load("org/model")


def test_without_huggingface_hub(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    line = fails_in_one_line(capsys, "convert", "org/model", "--out", "out")
    assert "huggingface_hub, which would look it up, is not installed; expected pip install huggingface_hub" in line
    with pytest.raises(CheckpointError, match=r"no such folder$"):
        moe.load("./org/some/model")


def test_inspect_and_plan_read_headers_from_the_hub(cache: Path, capsys: Any, monkeypatch: Any) -> None:
    """A cache with config.json alone, as the first of these commands leaves it."""
    whole = json.loads(run(capsys, "inspect", "org/model", "--json")[1])
    snapshot = cache / "snapshots" / COMMITS["main"]
    weights = Path(os.path.realpath(snapshot / "model.safetensors"))
    local = json.loads(run(capsys, "plan", str(cache), "--json")[1])
    (snapshot / "model.safetensors").unlink()

    facts = json.loads(run(capsys, "plan", "org/model", "--json")[1])
    assert (facts["stored_from"], facts["stored"]["tensors"]) == ("config.json", whole["stored"]["tensors"])
    line = fails_in_one_line(capsys, "inspect", "org/model")
    assert f"its configuration is in the cache, but not its weights: {OFFLINE}" in line

    def metadata(name: str, *, revision: str) -> utils.SafetensorsRepoMetadata:
        assert (name, revision) == ("org/model", COMMITS["main"])
        tensors, begin = {}, 0
        with safe_open(weights, "pt") as file:
            for key in file.offset_keys():
                part = file.get_slice(key)
                size = file.get_tensor(key).nbytes
                offsets = (begin, begin := begin + size)
                tensors[key] = utils.TensorInfo(part.get_dtype(), part.get_shape(), offsets)
        parsed = {"model.safetensors": utils.SafetensorsFileMetadata({}, tensors)}
        return utils.SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, "model.safetensors"), parsed)

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    assert json.loads(run(capsys, "inspect", "org/model", "--json")[1]) == whole
    planned = json.loads(run(capsys, "plan", "org/model", "--json")[1])
    assert planned["stored_from"] == "headers" and planned == local | {"model": "org/model"}

    wrong: list[tuple[Any, ...]] = [("\x1b[2J", "BF16", [2], (0, 4)), ("a", "\x1b[2J", [2], (0, 4))]
    for key, *entry in [*wrong, ("a", "BF16", [-2], (0, 4)), ("a", "BF16", [3], (0, 4)), ("a", "BF16", [2], (4, 0))]:
        parsed = {"model.safetensors": utils.SafetensorsFileMetadata({}, {key: utils.TensorInfo(*entry)})}
        found = utils.SafetensorsRepoMetadata(None, False, {key: "model.safetensors"}, parsed)
        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", mock.Mock(return_value=found))
        assert "\x1b" not in fails_in_one_line(capsys, "inspect", "org/model")


def test_a_local_folder_takes_precedence_over_the_hub(cache: Path, saved: dict[str, Path], capsys: Any) -> None:
    Path("org").mkdir()
    Path("org/model").symlink_to(saved["v1"])
    assert hub.find("org/model") == Path("org/model") and not hub.is_name("org/model")
    assert json.loads(run(capsys, "inspect", "org/model", "--json")[1])["stored"]["folder"] == "org/model"
    Path("org/model").unlink()
    Path("org/model").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        moe.load("org/model")
    Path("org/model").rmdir()
    assert hub.is_name("org/model") and not hub.is_name("./org/model") and not hub.is_name("tiny")


def test_a_misspelt_folder_is_named_beside_the_hubs_answer(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny").mkdir(parents=True)
    for name, meant in (("runs/tniy", "runs/tiny"), ("rums/tiny", "runs/tiny"), ("./run/tiny", "runs/tiny")):
        assert f"; did you mean {meant}?" in fails_in_one_line(capsys, "generate", name, "--prompt", "a")
    assert "did you mean" not in fails_in_one_line(capsys, "generate", "runs/deepseek", "--prompt", "a")


def test_the_tokenizer_of_a_training_run(cache: Path, tmp_path: Path, capsys: Any) -> None:
    snapshot = cache / "snapshots" / COMMITS["v1"]
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    words.save(str(snapshot / "tokenizer.json"))
    for path in (Path("org/model@v1"), snapshot, snapshot / "tokenizer.json"):
        assert find_tokenizer(path) == snapshot / "tokenizer.json"
        assert load_tokenizer(find_tokenizer(path))[1] == "<eos>"
    assert Settings(tokenizer=Path("org/model@v1")).deciding()["tokenizer"] == "org/model@v1"
    assert Settings(tokenizer=Path("words/words.json/x")).deciding()["tokenizer"] == str(
        Path.cwd() / "words/words.json/x"
    )
    for name, message in (
        ("org/other", "the Hub is offline"),
        ("org/model", "No such file"),
        ("words.json", "No such file"),
    ):
        line = fails_in_one_line(capsys, "train", "--out", "run", "--tokenizer", name)
        assert "--tokenizer = " in line and "expected a readable tokenizer.json; " in line and message in line
