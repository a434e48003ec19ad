"""Options of `moesmith train` that choose the model, continue and extend runs, and log; and `moesmith eval`."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe.cli import main
from moe.presets import PRESETS
from moe.train.architecture import apply_changes
from moe.train.data import open_dataset
from moe.train.documents import read_files
from moe.train.loop import NonFiniteError, Trainer
from moe.train.run import train
from moe.train.schedule import learning_rate_factor
from moe.train.scoring import logits_difference, pack
from moe.train.settings import Settings
from moe.train.state import load_latest_state
from tests.support.training import MICRO, MICRO_SETTINGS, QUIET, assert_same_state

pytestmark = pytest.mark.usefixtures("micro")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without plots, and with a short sample."""
    monkeypatch.setattr("moe.train.run._plot", lambda *_: [])
    monkeypatch.setattr("moe.train.run.SAMPLE_NEW_TOKENS", 2)


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the micro preset."""
    folder, threads = tmp_path_factory.mktemp("runs") / "run", torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        torch.set_num_threads(1)
        train(dataclasses.replace(MICRO_SETTINGS, data=(text,), steps=2, save_every=1), folder, console=QUIET)
        torch.set_num_threads(threads)
    return folder


def options(text: Path, out: Path, *more: str) -> list[str]:
    few = ["--steps", "2", "--batch-size", "2", "--seq-length", "16", "--warmup", "1", "--optimizer", "adamw"]
    return ["train", "--data", str(text), *few, "--out", str(out), *more]


def said(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    """Standard error of a command. If it fails, the only line that does not describe the run."""
    assert main(argv) == status
    captured = capsys.readouterr()
    if not status:
        return captured.err
    lines = [line for line in captured.err.splitlines(keepends=True) if not line.startswith(("model: ", "data: "))]
    assert captured.out == "" and len(lines) == 1
    return lines[0]


def test_fields_are_set_on_top_of_a_preset(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    changes = ["--set", "num_hidden_layers=2", "--set", "aux_loss_alpha=0", "--set", "rope_parameters.rope_theta=5e3"]
    err = said(capsys, *options(text, out, "--preset", "micro", *changes))
    config = moe.load(out / "checkpoint").config
    assert (config.num_hidden_layers, config.aux_loss_alpha, config.rope_parameters.rope_theta) == (2, 0, 5000)
    assert config.hidden_size == MICRO.hidden_size
    counts = moe.counts.count_parameters(config)
    expected = f"model: micro num_hidden_layers=2 .*, {counts.with_mtp:,} parameters, {counts.activated:,} activated; "
    assert re.search(expected + f"cpu, fp32; {out}\n", err)
    assert "--set" in " ".join(Settings(set=("a=1", "b=2")).options())


def test_changes_are_json_or_strings_and_checked_together() -> None:
    changes = ["num_attention_heads=4", "mlp_only_layers=[1]", "scoring_func=softmax", "q_lora_rank=null"]
    both = apply_changes(MICRO, changes)
    assert (both.mlp_only_layers, both.scoring_func, both.q_lora_rank) == ((1,), "softmax", None)
    together = apply_changes(MICRO, ["n_group=4", "topk_group=2", "n_routed_experts=12"])  # each alone is invalid
    assert together.n_routed_experts == 12 and apply_changes(MICRO, []) == MICRO
    for changes, expected in (
        (["num_hidden_layer=2"], r"did you mean num_hidden_layers\?"),
        (["num_hidden_layers"], "FIELD=VALUE"),
        (["num_hidden_layers=two"], "num_hidden_layers = 'two': expected an integer"),
        (["tie_word_embeddings=True"], "tie_word_embeddings = 'True': expected true or false"),
        (["rms_norm_eps=NaN"], "rms_norm_eps = nan: expected a finite number"),
        (["n_group=3"], r"n_routed_experts = 8: expected a multiple of n_group \(3\)"),
        (["hidden_size=8", "hidden_size=16"], "hidden_size only once; found another value, 8"),
        (["rope_parameters.theta=3"], r"did you mean rope_parameters.rope_theta\?"),
        (["rope_parameters.factor=a"], "factor = 'a'"),
    ):
        with pytest.raises(moe.ConfigError, match=rf"^--set.*{expected}"):
            apply_changes(MICRO, changes)


def test_a_configuration_file_is_hugging_faces_or_ours(text: Path, tmp_path: Path, run: Path) -> None:
    ours = tmp_path / "small.json"
    ours.write_text(json.dumps({**MICRO.to_dict(), "num_hidden_layers": 2}))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    values = json.loads((run / "checkpoint" / "config.json").read_text())
    # Of a tokenizer and code that are not there.
    values |= {"pad_token_id": 10**5, "auto_map": {"AutoConfig": "configuration.Config"}, "mine": 1}
    (theirs / "config.json").write_text(json.dumps(values))
    for number, (path, layers, name) in enumerate(((ours, 2, "small"), (theirs, 3, "theirs"))):
        settings = dataclasses.replace(MICRO_SETTINGS, preset=None, config=path, data=(text,), steps=1)
        assert settings.name == name
        train(settings, tmp_path / str(number), console=QUIET)
        config = moe.load(tmp_path / str(number) / "checkpoint").config
        assert config.num_hidden_layers == layers and config.hidden_size == MICRO.hidden_size
        assert config.extra.get("pad_token_id") is None and "auto_map" not in config.extra
        assert config.extra.get("mine") == (1 if number else None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"hidden": 3}', r"hidden = 3: expected no such field; did you mean hidden_size\?"),
        ('{"hidden_size": 32}', "vocab_size = None: expected a value"),
        ("[]", "not a configuration; expected a JSON object; found list"),
        ("{", "not valid JSON"),
        ('{"architectures": [], "model_type": "llama"}', "llama"),
        (None, "No such file"),
    ],
)
def test_a_wrong_configuration_file_is_one_line(
    content: str | None, expected: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.json"
    if content is not None:
        file.write_text(content)
    assert re.search(
        f"{file}: .*{expected}", said(capsys, *options(text, tmp_path / "o", "--config", str(file)), status=2)
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data"], "train: --data: expected at least one value"),
        (["--validation-data"], "--validation-data: expected at least one value"),
        (["--data", "a", "--data", "b"], "--data: expected all values after one option"),
        (["--field", ""], "--field: expected the name of a field; found ''"),
        (["--preset", "tiny", "--config", "c.json"], "--config: .*found --preset and --config"),
        (["--preset", "tiny", "--init", "x"], "--init: .*found --preset and --init"),
        (["--init", "x", "--set", "hidden_size=3"], "--set: .*found --init and --set"),
        (["--init", "x"], "x: no such folder"),
        (["--log", "file"], "--log: expected one of tensorboard, wandb; found 'file'"),
        (["--resume", "nowhere"], "--resume: expected the folder of a run; found 'nowhere'"),
        (["--resume=nowhere", "--out", "x"], "no folder together with --out"),
    ],
)
def test_options_that_exclude_each_other(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(expected, said(capsys, "train", *words, status=2))
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_begins_with_the_weights_of_a_checkpoint(
    text: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "more"
    (run / "checkpoint" / "LICENSE").write_text("free")
    said(capsys, *options(text, out, "--init", str(run), "--lr", "1e-9", "--bias-update-speed", "0"))
    before, after = moe.load(run / "checkpoint"), moe.load(out / "checkpoint")
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert after.config == before.config
    names = {path.name for path in (run / "checkpoint").iterdir()}
    assert names == {path.name for path in (out / "checkpoint").iterdir()} and "LICENSE" in names
    ids = [json.loads((folder / "data" / "data.json").read_text())["end_of_text"] for folder in (run, out)]
    assert ids[0] == ids[1]
    states = [load_latest_state(folder / "states") for folder in (run, out)]
    assert states[0] is not None and states[1] is not None and states[1][1]["step"] == 2

    big = json.loads((run / "checkpoint" / "tokenizer.json").read_text())
    big["model"]["vocab"]["e"] = 5000
    (tmp_path / "big.json").write_text(json.dumps(big))
    more = ("--init", str(run), "--tokenizer", str(tmp_path / "big.json"))
    error = said(capsys, *options(text, tmp_path / "big", *more), status=2)
    size = before.config.vocab_size
    assert f"--tokenizer: expected a tokenizer of at most {size} tokens" in error
    shutil.copytree(run / "checkpoint", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    error = said(capsys, *options(text, tmp_path / "o", "--init", str(tmp_path / "mute")), status=2)
    assert "tokenizer.json" in error and not (tmp_path / "o").exists()


def test_a_run_is_extended_by_its_folder_alone(
    text: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    err = said(capsys, "train", "--resume", str(out), "--steps", "4", "--eval-every", "0")
    assert "resuming after step 2, with 4 steps instead of 2: the wsd schedule is recomputed for the new length" in err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["lr"] for record in records if record["kind"] == "train"}
    expected = {
        n: 0.01 * learning_rate_factor(n, steps=4 if n > 2 else 2, warmup=2, schedule="wsd") for n in (1, 2, 3, 4)
    }
    assert rates == pytest.approx(expected)
    settings = json.loads((out / "settings.json").read_text())
    assert settings == json.loads((run / "settings.json").read_text()) | {"steps": 4}
    assert "resuming after step 4 of 4" in said(capsys, "train", f"--resume={out}")  # it knows its new length
    assert "--steps: expected at least 4" in said(capsys, "train", "--resume", str(out), "--steps", "3", status=2)
    assert "seed 0 (now 1)" in said(capsys, "train", "--resume", str(out), "--seed", "1", status=2)
    assert json.loads((out / "settings.json").read_text())["steps"] == 4


@pytest.mark.parametrize("name", [".", "../here"])
def test_the_current_folder_is_the_folder_of_a_run(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], micro: None, monkeypatch: Any
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    inode = here.stat().st_ino
    monkeypatch.chdir(here)
    common = options(text, Path(name), "--preset", "micro")
    said(capsys, *common, "--tokenizer", "none.json", status=2)
    assert here.stat().st_ino == inode and not any(here.iterdir()), "a mistake leaves the folder, as empty as it was"
    assert "model: micro" in said(capsys, *common)
    assert "3 steps instead of 2" in said(capsys, "train", "--resume", name, "--steps", "3")
    assert "that is not the current one, with --overwrite" in said(capsys, *common, "--overwrite", status=2)
    assert json.loads((here / "summary.json").read_text())["steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    refused = said(capsys, *options(text, Path("/"), "--preset", "micro"), status=2)
    assert "--out: expected a folder below the root; found '/'" in refused


@pytest.mark.parametrize("option", ["--data", "--out", "--config", "--validation-data", "--tokenizer"])
def test_an_empty_word_is_no_path(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # to which an empty path would lead
    assert f"{option}: expected a path; found ''" in said(capsys, "train", option, "", status=2)
    assert not any(tmp_path.iterdir())


def test_a_longer_run_stopped_early_is_resumed_bit_for_bit_by_its_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(MICRO_SETTINGS, data=(text,), steps=4, save_every=2, keep=9)
    train(settings, tmp_path / "whole", console=QUIET)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for later in ("states/step-000004", "checkpoint"):
        shutil.rmtree(tmp_path / "again" / later)
    said(capsys, "train", "--resume", str(tmp_path / "again"), "--keep", "9")
    states = [load_latest_state(tmp_path / name / "states") for name in ("whole", "again")]
    assert states[0] is not None and states[1] is not None and states[0][1]["step"] == 4
    assert_same_state(states[0], states[1])


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_run_is_not_resumed_and_overwritten(
    by_folder: bool, run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    words = ["train", "--resume", str(run)] if by_folder else [*options(text, run, "--preset", "micro"), "--resume"]
    refused = said(capsys, *words, "--overwrite", status=2)
    assert "moesmith train: --overwrite: expected no --resume, which keeps the run\n" in refused
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_of_an_earlier_release_is_resumed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "model.json").unlink()
    values = json.loads((out / "settings.json").read_text())
    for name in ("config", "set", "init", "field", "validation_data", "compile"):
        del values[name]
    (out / "settings.json").write_text(json.dumps(values))
    assert "resuming after step 2 of 2" in said(capsys, "train", "--resume", str(out))


def test_ctrl_c_while_data_is_prepared_leaves_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe.train.data.train_tokenizer", interrupt)
    assert (
        said(capsys, *options(text, tmp_path / "run", "--preset", "micro"), status=130)
        == "moesmith train: interrupted\n"
    )
    assert not (tmp_path / "run").exists()


# Compilation: the model's own graph, traced without Inductor, which needs a C++ compiler.


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Node counts of the graphs that torch.compile makes; they run as they are."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compile_(self, backend=backend, **kwargs))
    return graphs


SMALL = dataclasses.replace(
    MICRO, num_hidden_layers=4, first_k_dense_replace=2, num_nextn_predict_layers=0, aux_loss_alpha=0.0
)


# torch.compile hides this warning of its own, unless warnings are errors.
NOT_A_LEAF = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@NOT_A_LEAF
def test_compiled_runs_trace_once_and_resume(
    text: Path, tmp_path: Path, traced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "micro", SMALL)
    settings = dataclasses.replace(
        MICRO_SETTINGS, data=(text,), steps=6, eval_every=2, save_every=3, activation_checkpointing=True, keep=9
    )
    plain = train(settings, tmp_path / "plain", console=QUIET)
    assert not traced
    compiled = train(dataclasses.replace(settings, compile=True), tmp_path / "run", console=QUIET)
    assert plain is not None and compiled is not None
    assert compiled["validation"]["after"] == pytest.approx(plain["validation"]["after"], rel=1e-3)
    assert len(traced) == 2, "a dense block, and one with experts: shared by layers, and traced once"
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "states" / "step-000006")
    again = train(dataclasses.replace(settings, compile=True), tmp_path / "again", resume=True, console=QUIET)
    assert again is not None and again["validation"] == compiled["validation"]
    states = [load_latest_state(tmp_path / name / "states") for name in ("plain", "run", "again")]
    assert states[0] is not None and states[1] is not None and states[2] is not None
    assert states[0][0].keys() == states[1][0].keys()
    assert_same_state(states[1], states[2])


@NOT_A_LEAF
def test_a_compiled_model_names_what_is_not_finite(dataset: Any, traced: list[int]) -> None:
    config = dataclasses.replace(SMALL, vocab_size=dataset.facts["vocab_size"])
    trainer = Trainer(moe.Transformer(config), dataset, dataclasses.replace(MICRO_SETTINGS, compile=True))
    trainer.model.layers[2].compile(dynamic=False)
    trainer.step()
    assert len(traced) == 1
    with torch.no_grad():
        trainer.model.get_parameter("layers.2.input_layernorm.weight").fill_(3e38)
    with pytest.raises(NonFiniteError, match=r"first in the output of layers\.2\.input_layernorm$"):
        trainer.step()
    assert len(traced) == 1


# Logs.


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_what_the_metrics_have(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    settings = dataclasses.replace(MICRO_SETTINGS, data=(text,), steps=3, save_every=2, keep=9, log="tensorboard")
    out = tmp_path / "run"
    train(settings, out, console=QUIET)
    shutil.rmtree(out / "states" / "step-000003")  # what it had logged after the state before is forgotten
    train(settings, out, resume=True, console=QUIET)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = scalars_of(out / "tensorboard")
    for kind, name in (("train", "ce"), ("train", "grad_norm"), ("train", "lr"), ("validation", "bits_per_byte")):
        expected = [(record["step"], record[name]) for record in records if record["kind"] == kind]
        assert [step for step, _ in found[f"{kind}/{name}"]] == [step for step, _ in expected]
        assert [value for _, value in found[f"{kind}/{name}"]] == pytest.approx([value for _, value in expected])
    assert {"train/max_vio/0", "train/max_vio/2", "train/mtp", "validation/nats_per_token"} <= found.keys()
    assert not any("step" in tag.split("/") or "load" in tag for tag in found)


class FakeRun:
    """Takes the place of wandb's run."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = False

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended = True

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_wandb_gets_the_same_and_continues_its_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inits: list[dict[str, Any]] = []
    fake = FakeRun()

    def init(**values: Any) -> FakeRun:
        inits.append(values)
        return fake

    wandb = types.SimpleNamespace(
        Error=type("Error", (Exception,), {}),
        Settings=lambda **values: values,
        init=init,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("moe.train.lifecycle.check_log", lambda name: None)
    settings = dataclasses.replace(MICRO_SETTINGS, data=(text,), steps=1, log="wandb")
    train(settings, tmp_path / "run", console=QUIET)
    train(dataclasses.replace(settings, steps=2), tmp_path / "run", resume=True, console=QUIET)
    assert inits[0]["id"] == inits[1]["id"] and inits[1]["resume"] == "allow" and fake.ended
    assert inits[0]["config"]["steps"] == 1 and inits[0]["dir"] == tmp_path / "run"
    assert [step for step, _ in fake.logged] == [0, 1, 1, 2, 2]
    assert (
        fake.logged[1][1].keys() >= {"train/ce", "train/max_vio/0"} and "validation/nats_per_token" in fake.logged[0][1]
    )

    def fail(**_: Any) -> None:
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(
        moe.ConfigError, match=r"--log = 'wandb': expected an account .*WANDB_MODE=offline; found api_key"
    ):
        train(settings, tmp_path / "other", console=QUIET)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "log"), ("wandb", "wandb")])
def test_a_log_that_is_not_installed_is_one_line(
    name: str,
    extra: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    error = said(capsys, *options(text, tmp_path / "run", "--log", name), status=2)
    assert "--log: expected the package" in error and f'pip install -e ".[{extra}]"' in error
    assert not (tmp_path / "run").exists()


# moesmith eval.


def evaluated(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["eval", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_text_held_out_is_scored_as_in_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    found = evaluated(capsys, str(run))
    for name in ("nats_per_token", "bits_per_byte"):
        assert found[name] == summary["validation"]["after"][name]
    assert found["load"] == summary["load"]
    assert (found["tokens"], found["documents"]) == (
        summary["validation"]["tokens"],
        summary["validation"]["documents"],
    )
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{found['tokens']:,} tokens of {found['documents']:,} documents, in windows of 16" in out
    assert f"{found['perplexity']:,.4f}" in out and "layers.1.mlp" in out


@pytest.mark.parametrize("document_mask", [False, True])
def test_eval_equals_a_trainers_evaluation_and_transformers(
    document_mask: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    file = tmp_path / "x.jsonl"
    texts = ["the model has a gate", "an expert of the layer\n\nin two paragraphs", "gate router loss " * 20]
    file.write_text("".join(json.dumps({"words": each}) + "\n" for each in texts))
    mask = ["--document-mask"] if document_mask else []
    argv = [str(run / "checkpoint"), "--data", str(file), "--field", "words", "--seq-length", "12", "--batch-size", "3"]
    found = evaluated(capsys, *argv, *mask)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "checkpoint")
    end = tokenizer.eos_token_id
    packed = [end, *(token for each in texts for token in (*tokenizer(each, add_special_tokens=False).input_ids, end))]
    assert (found["documents"] == 3 and found["bytes"] == sum(len(each.encode()) for each in texts)) or document_mask
    if not document_mask:
        nats, tokens = 0.0, 0
        for start in range(0, len(packed) - 1, 11):
            window = torch.tensor([packed[start : start + 12]])
            count = window.shape[1] - 1
            nats += theirs(input_ids=window, labels=window).loss.item() * count
            tokens += count
        assert found["tokens"] == tokens == len(packed) - 1
        assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-4)

    model = moe.load(run / "checkpoint")
    ours = pack(read_files([file], "words"), tokenizer.backend_tokenizer, end)
    settings = Settings(seq_length=12, batch_size=3, document_mask=document_mask)
    expected = Trainer(model, ours, settings).evaluate()
    assert found["tokens"] == expected.tokens and found["nats_per_token"] == expected.nats_per_token
    assert [row["tokens"] for row in found["load"]] == expected.load.tolist()


def test_eval_in_int8_prints_the_error_beside_that_of_bf16(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, str(run), "--quantize", "int8")
    exact, bf16, int8 = found["precisions"]
    assert [row["weights"] for row in (exact, bf16, int8)] == ["fp32", "bf16", "int8"]
    assert [row["dtype"] for row in (exact, bf16, int8)] == ["float32", "bfloat16", "float32"]
    plain = evaluated(capsys, str(run), "--dtype", "fp32")
    assert exact["nats_per_token"] == plain["nats_per_token"]
    assert int8["nats_per_token"] == found["nats_per_token"] != plain["nats_per_token"]
    assert bf16["nats_per_token"] == evaluated(capsys, str(run), "--dtype", "bf16")["nats_per_token"]
    assert (exact["logits_error"], exact["kl_divergence"], exact["top1_agreement"]) == (0, 0, 1)

    ids = torch.from_numpy(open_dataset(run / "data").validation[:16].astype("int64"))[None]
    models = {
        "fp32": moe.load(run),
        "bf16": moe.load(run, dtype="bf16"),
        "int8": moe.quantize(moe.load(run), "int8"),
    }
    with torch.no_grad():
        logits = {name: model(ids).logits[0].double() for name, model in models.items()}
    log_p = logits["fp32"].log_softmax(-1)
    for row, (name, model) in zip((exact, bf16, int8), models.items(), strict=True):
        assert row["bytes"] == sum(tensor.nbytes for tensor in model.state_dict().values())
        error = (logits[name] - logits["fp32"]).norm() / logits["fp32"].norm()
        assert row["logits_error"] == pytest.approx(error.item(), rel=1e-6)
        divergence = torch.nn.functional.kl_div(logits[name].log_softmax(-1), log_p, reduction="sum", log_target=True)
        assert row["kl_divergence"] == pytest.approx(divergence.item() / 16, rel=1e-6, abs=1e-15)
        same = (logits[name].argmax(-1) == logits["fp32"].argmax(-1)).double().mean().item()
        assert row["top1_agreement"] == same
    assert 0 < int8["logits_error"] < 0.1 and 0 < bf16["logits_error"] < 0.1
    assert int8["bytes"] < bf16["bytes"] < exact["bytes"]

    assert main(["eval", str(run), "--quantize", "int8", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "error of the logits against fp32" in out and re.search(r"int8 +bfloat16 +[\d,]+", out)


def test_the_difference_of_logits_by_hand() -> None:
    exact = torch.tensor([[0.0, 2.0], [1.0, -2.0]])
    found = logits_difference(exact, torch.tensor([[0.0, 2.0], [-2.0, 2.0]]))
    assert found["top1_agreement"] == 0.5 and found["logits_error"] == pytest.approx(5 / 3)
    p, q = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(4))
    expected = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert found["kl_divergence"] == pytest.approx(expected)
    assert logits_difference(exact * 0, exact * 0)["logits_error"] == 0


def test_eval_refuses_in_one_line(text: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mute, endless, none, short = (tmp_path / name for name in ("mute", "endless", "none.txt", "short.txt"))
    for folder in (mute, endless):
        shutil.copytree(run / "checkpoint", folder)
    (mute / "tokenizer.json").unlink()
    (endless / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    none.write_text(" \n")
    short.write_text("a")
    for words, expected in (
        ([str(run), "--data"], "--data: expected at least one value"),
        ([str(run / "checkpoint")], "--data: expected files or folders"),
        ([str(run), "--data", str(tmp_path / "nowhere")], "--data: expected an existing file or folder; found"),
        ([str(run), "--data", str(none)], f"--data: {none}: expected documents; found none"),
        ([str(run), "--data", str(short)], "--data: expected text of 4 tokens or more; found 3"),
        ([str(run), "--data", str(text), "--field", ""], "--field: expected the name of a field; found ''"),
        (
            [str(run), "--data", str(text), "--seq-length", "99"],
            "at most the model's 64 positions; found 99",
        ),
        ([str(run), "--seq-length", "3"], "--seq-length: expected 4 or more; found 3"),
        ([str(run), "--dtype", "int8"], "--dtype"),
        ([str(run), "--quantize", "int4"], "--quantize: expected one of int8; found 'int4'"),
        ([str(run), "--device", "abacus"], "--device: expected a device of this machine"),
        ([str(mute), "--data", str(text)], "tokenizer.json: no such file"),
        ([str(endless), "--data", str(text)], "tokenizer.json: expected a tokenizer with an end-of-text token"),
        ([str(tmp_path / "nothing"), "--data", str(text)], "no such folder"),
    ):
        assert expected in said(capsys, "eval", *words, status=2), words


def test_what_is_not_finite_has_no_score(
    text: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moe.load(run)
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    model.save(tmp_path / "sick")
    problem = "the validation loss is not finite; first in the parameter norm.weight"
    assert f"sick: {problem}" in said(capsys, "eval", str(tmp_path / "sick"), "--data", str(text), status=2)
    assert main(options(text, tmp_path / "out", "--init", str(tmp_path / "sick"))) == 2
    assert f"step 0: {problem}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").read_text()
