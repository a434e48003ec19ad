"""`moesmith trace`: what it writes, what it answers, and what it refuses."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe
from moe.balance import routers
from moe.cli import main
from moe.presets import PRESETS
from moe.trace import Trace
from moe.train.run import train
from tests.support.training import MICRO, MICRO_SETTINGS, QUIET

pytestmark = pytest.mark.usefixtures("micro")
PLOTS = {"load.png", "balance.png", "co-activation.png"} if importlib.util.find_spec("matplotlib") else set()


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the micro preset."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", MICRO)
        patch.setattr("moe.train.run._plot", lambda *_: [])
        train(dataclasses.replace(MICRO_SETTINGS, data=(text,), steps=2), folder, console=QUIET)
    return folder


def traced(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["trace", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["trace", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    return err


def test_the_text_held_out_is_traced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    found = traced(capsys, str(run), "--tokens", "100", "--out", str(out), "--batch-size", str(10**30))
    assert {path.name for path in out.iterdir()} == {"trace.json", "trace.npz"} | PLOTS
    assert list(out.parent.iterdir()) == [out]  # no temporary folder is left
    assert json.loads((out / "trace.json").read_text()) == found
    trace = Trace.read(out / "trace.npz")
    assert (found["tokens"], found["windows"], found["experts"], found["experts_per_token"]) == (100, 7, 8, 2)
    assert trace.starts.tolist() == [0, 16, 32, 48, 64, 80, 96] and trace.expert_bytes == found["expert_bytes"]

    validation = np.fromfile(run / "data" / "validation.bin", dtype=np.uint16)[:100].astype(np.int64)
    model = moe.load(run).eval()
    chosen: dict[str, list[Any]] = {name.removesuffix(".gate"): [] for name, _ in routers(model)}
    for name, router in routers(model):
        router.register_forward_hook(
            lambda _, __, routing, name=name: chosen[name.removesuffix(".gate")].extend(routing.expert_ids.tolist())
        )
    with torch.no_grad():
        for start in range(0, 100, 16):
            model(torch.from_numpy(validation[start : start + 16])[None])
    assert [row["layer"] for row in found["layers"]] == ["layers.1.mlp", "layers.2.mlp", "mtp.0.block.mlp"]
    assert sum(found["layers"][2]["tokens"]) == 2 * (100 - 7) == 2 * trace.routed[2].sum()
    for ids, row in zip(trace.expert_ids[:2], found["layers"], strict=False):
        assert ids.tolist() == chosen[row["layer"]]
        assert row["tokens"] == [sum(e in token for token in chosen[row["layer"]]) for e in range(8)]
        assert row["max_vio"] == pytest.approx(max(row["tokens"]) / 25 - 1)
        beyond = []
        for pair in row["pairs"]:
            a, b = pair["experts"]
            together = sum({a, b} <= set(token) for token in chosen[row["layer"]])
            predicted = row["tokens"][a] * row["tokens"][b] / 100 * (8 / (2 * 7))
            assert pair["tokens"] == together and pair["lift"] == pytest.approx(together / predicted)
            beyond.append(together - predicted)
        assert len(beyond) == 3 and beyond == sorted(beyond, reverse=True) and beyond[-1] > 0


def test_questions_about_a_record_need_no_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--ep", "2", "3", "--replicas", "0", "2", "--cache-experts", "1", "8"]
    out = str(tmp_path / "out")
    found = traced(capsys, str(run), "--out", out, *asked)
    again = traced(capsys, out, *asked)
    assert again == found | {"folder": out}
    assert traced(capsys, out)["ep"] == []
    assert [(each["gpus"], each["replicas"], each["report"]["physical_experts"]) for each in found["ep"]] == [
        (2, 0, 8),
        (2, 2, 12),
        (3, 0, 9),
        (3, 2, 15),
    ]
    trace = Trace.read(tmp_path / "out" / "trace.npz")
    for each in found["ep"]:
        report = trace.placed(each["gpus"], each["replicas"])
        assert each["report"] == dataclasses.asdict(report)
        assert each["overall"]["after"] == report.overall(report.after)
        assert (each["overall"]["before"] is None) == (each["gpus"] == 3)
    cached = {(each["experts"], each["policy"]): each for each in found["cache"]}
    assert set(cached) == {(size, policy) for size in (1, 8) for policy in ("lru", "frequency", "oracle")}
    for (size, policy), each in cached.items():
        assert each["bytes_per_token"] == each["misses_per_token"] * found["expert_bytes"]
        assert each["hit_rate"] == (1 if size == 8 else pytest.approx(sum(each["hits"]) / each["requests"] / 2))
        assert each["hit_rate"] <= cached[size, "oracle"]["hit_rate"], policy

    assert main(["trace", out, *asked]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[1:])) <= 80 and "trace.json" not in shown  # nothing is written
    words = shown.split()
    monkeypatch.setenv("COLUMNS", "40")  # too few for the tables, which stay complete
    assert main(["trace", out, *asked]) == 0
    narrow = capsys.readouterr().out
    assert {each for each in words if each not in narrow and not each.startswith("─")} == {"mtp.0.block.mlp"}
    assert "mtp.0.block." in narrow  # continued on the next line
    for each in (
        "layers.1.mlp",
        "mtp.0.block.mlp",
        "near ties",
        "all 2 layers",
        "experts per GPU",
        "oracle",
        "100.00%",
        "Results: second half",
    ):
        assert each in shown
    assert main(["trace", out, "--out", str(tmp_path / "copy")]) == 0
    assert f"record       {tmp_path / 'copy' / 'trace.npz'}, trace.json" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"trace.json", "trace.npz"} | PLOTS


def test_a_forced_imbalance_shows(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = moe.load(run)
    for _, router in routers(model):
        router.move_bias(torch.tensor([0.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]))  # two of a group
    model.save(tmp_path / "forced")
    asked = ["--data", str(text), "--ep", "2", "--cache-experts", "2", "--seq-length", "32", "--tokens", "2000"]
    even = traced(capsys, str(run / "checkpoint"), "--out", str(tmp_path / "a"), *asked)
    forced = traced(capsys, str(tmp_path / "forced"), "--out", str(tmp_path / "b"), *asked)
    for before, after in zip(even["layers"], forced["layers"], strict=True):
        assert before["max_vio"] < 2 < after["max_vio"] == 3
        assert before["dead_experts"] < 3 and after["dead_experts"] == 6
        tokens = 2000 if before["layer"] != "mtp.0.block.mlp" else 2000 - 63  # those that have a next token
        assert after["tokens"] == [0, tokens, tokens, 0, 0, 0, 0, 0] and after["pairs"][0]["experts"] == [1, 2]
        assert before["near_ties"] > 0 == after["near_ties"]
    assert even["ep"][0]["overall"]["before"] < 1.5 < forced["ep"][0]["overall"]["before"] == 2
    assert forced["ep"][0]["overall"]["after"] == 1
    assert all(a["hit_rate"] < b["hit_rate"] == 1 for a, b in zip(even["cache"], forced["cache"], strict=True))
    for name in PLOTS:
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


def test_only_a_trace_is_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = [str(run), "--tokens", "9"]
    traced(capsys, *few)  # in the default folder
    out = Path("traces/run")
    first = (out / "trace.json").read_bytes()
    assert "--out: expected a new folder, or --overwrite to replace the trace" in refused(capsys, *few)
    assert traced(capsys, str(run), "--tokens", "8", "--overwrite")["tokens"] == 8
    assert (out / "trace.json").read_bytes() != first and [*Path("traces").iterdir()] == [out]
    (out / "notes.txt").write_text("mine")
    assert "--out: expected a new or empty folder, or a trace" in refused(capsys, *few, "--overwrite")
    Path("file").touch()
    assert "--out: expected a new or empty folder" in refused(capsys, *few, "--out", "file", "--overwrite")
    assert "--out: expected a new or empty folder" in refused(capsys, *few, "--out", str(run), "--overwrite")

    Path("empty").mkdir()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "trace.npz")

    with monkeypatch.context() as patch:
        patch.setattr(Trace, "save", fail)
        assert "trace.npz: No space left on device" in refused(capsys, *few, "--out", "new/out")
    assert not Path("new").exists()
    traced(capsys, *few, "--out", "empty")
    assert (Path("empty") / "trace.npz").exists()


def test_without_matplotlib_one_line_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["trace", str(run), "--tokens", "20", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == 'plots        none: matplotlib is not installed; pip install -e ".[plot]"'
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"trace.json", "trace.npz"}


def test_an_out_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(moe, "load", too_late)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    before = sorted(Path().iterdir())
    for out, expected in (
        ("file/out", "file/out: Not a directory"),
        ("file/deeper/out", "Not a directory"),
        ("new/" + 300 * "x", "File name too long"),
        (300 * "x", "File name too long"),
        ("loop/out", ""),
        ("/proc/out", "/proc/"),
    ):
        error = refused(capsys, str(run), "--out", out)
        assert "--out: expected a folder that can be written" in error and expected in error, out
    assert sorted(Path().iterdir()) == before

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr("os.mkdir", refuse)
        error = refused(capsys, str(run), "--out", "new")
    assert "--out: expected a folder that can be written; found" in error and "new: Permission denied" in error
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        Path("mine").mkdir()
        assert "--out: expected a folder that may be replaced" in refused(capsys, str(run), "--out", "mine")


def test_an_interruption_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for where in ("moe.trace.record", "moe.trace.Trace.save", "moe.cli.trace._plot"):
        with monkeypatch.context() as patch:
            patch.setattr(where, interrupt)
            assert main(["trace", str(run), "--tokens", "20", "--out", str(tmp_path / "a" / "b")]) == 130
        assert capsys.readouterr() == ("", "moesmith trace: interrupted\n")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [0, 1], ids=["dense", "one layer"])
def test_models_with_few_experts(
    layers: int, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    """Dense models are refused before the text is read; a single expert, which is K = E, is traced."""
    settings = {"num_nextn_predict_layers": 0, "first_k_dense_replace": 3 - layers, "n_group": 1}
    config = dataclasses.replace(MICRO, n_routed_experts=1, num_experts_per_tok=1, **settings)
    moe.Transformer(config).save(tmp_path / "few")
    shutil.copy(run / "checkpoint" / "tokenizer.json", tmp_path / "few")
    words = [str(tmp_path / "few"), "--out", str(tmp_path / "out")]
    if not layers:
        error = refused(capsys, *words, "--data", "nowhere")
        assert "few: no routing to record; expected a model with experts; found 3 dense layers" in error
        return
    found = traced(capsys, *words, "--data", str(text), "--tokens", "40", "--ep", "1", "--cache-experts", "1")
    (row,) = found["layers"]
    assert (row["tokens"], row["near_ties"], row["pairs"], row["max_vio"]) == ([40], 0, [], 0)
    assert found["ep"][0]["overall"] == {"before": 1, "after": 1, "bound": 1}
    assert all(each["hit_rate"] == 1 for each in found["cache"])
    assert not (tmp_path / "out" / "co-activation.png").exists()


def test_what_is_refused(run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    traced(capsys, str(run), "--tokens", "20", "--out", out)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "trace.npz").write_bytes(b"PK\x03\x04")
    model = moe.load(run)
    with torch.no_grad():
        next(routers(model))[1].weight[3] = float("nan")
    model.save(tmp_path / "sick")
    for words, expected in (
        ([str(run), "--tokens", "1"], "--tokens: expected 2 or more; found 1"),
        ([str(run), "--ep", "0"], "--ep: expected 1 or more; found 0"),
        ([str(run), "--ep", "2", "--replicas", "-1"], "--replicas: expected 0 or more; found -1"),
        ([str(run), "--replicas", "1"], "--replicas: expected none without --ep; found 1"),
        ([str(run), "--cache-experts", "0"], "--cache-experts: expected 1 or more; found 0"),
        ([out, "--cache-experts", "9"], "--cache-experts: expected at most the 8 experts of a layer; found 9"),
        ([out, "--ep", "2", "--replicas", "5"], "--replicas: expected at most 4, with which each GPU holds all"),
        ([out, "--data", "x"], "--data: expected no such option, because"),
        ([out, "--tokens", "5"], "--tokens: expected no such option, because"),
        ([str(damaged)], "trace.npz: expected a file that moesmith trace wrote; found"),
        ([str(run / "checkpoint")], "--data: expected files or folders"),
        ([str(run), "--seq-length", "99"], "--seq-length: expected at most the model's 64 positions; found 99"),
        (
            [str(tmp_path / "sick"), "--data", str(text)],
            "sick: the scores of layers.1.mlp.gate are not finite",
        ),
        # Refused before anything is recorded, which may take long.
        (
            [str(tmp_path / "sick"), "--data", str(text), "--cache-experts", "9"],
            "--cache-experts: expected at most the 8 experts of a layer; found 9",
        ),
        (
            [str(tmp_path / "sick"), "--data", str(text), "--ep", "8", "2", "--replicas", "0", "7"],
            "--replicas: expected at most 4, with which each GPU holds all",
        ),
        (
            [str(tmp_path / "sick"), "--data", str(text), "--ep", "2", "100000"],
            "--ep: expected at most the 8 experts of a layer; found 100000",
        ),
        ([out, "--ep", "100000"], "--ep: expected at most the 8 experts of a layer; found 100000"),
    ):
        assert expected in refused(capsys, *words, "--out", str(tmp_path / "new")), words
    assert not (tmp_path / "new").exists()
