"""A whole model on the CPU: only what is selected is prepared, and nothing wrong gets a time or a ratio."""

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import cpu, cpu_against, cpu_peers, cpu_work, report
from benchmarks.__main__ import main
from benchmarks.harness import ROOT, BadInput
from moe import Transformer, preset
from moe.counts import count_parameters
from moe.ops import moe_mlp
from moe.ops.int8 import int8_mlp
from moe.ops.packed import can_pack

SIZES = dataclasses.replace(cpu.SMALL, train=16, prefill=24, decode=3, short=7, batch_context=11, rounds=1)
WORK = ("train", "prefill", "decode", "short", "batch 3")


def test_small_run_prints_and_appends(capsys, tmp_path):
    file = tmp_path / "new" / "cpu.jsonl"
    assert main(["cpu", "--small", "--dtype", "fp32", "--json", str(file)]) == 0
    assert main(["cpu", "--small", "--variant", "plain", "int8", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    expected = [("fp32", work, "plain") for work in WORK]
    for dtype in ("fp32", "bf16"):
        expected += [(dtype, work, v) for work in WORK for v in ("plain", "int8") if (work, v) != ("train", "int8")]
    assert report.SMOKE_TEST in shown and shown.count(" right ") == len(expected)
    assert not any(word in shown for word in ("FLOP/s", "tokens/s", "ratio", "%", "disturbed"))
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["dtype"], r["work"], r["variant"]) for r in records] == expected
    for r in records:
        assert r["ratio"] == r["peer"]["median_s"] / r["ours"]["median_s"] and r["beside"] == "transformers"
        assert r["small"] is True and r["cores"] and r["disturbed"] in (False, True)
        assert r["backend"] in cpu_peers.BACKENDS and r["commit"] and r["versions"]["torch"] == torch.__version__


@pytest.fixture(scope="module")
def exact() -> tuple[Transformer, torch.Tensor, cpu_peers.Reference]:
    model = Transformer(dataclasses.replace(preset("tiny"), num_nextn_predict_layers=0, aux_loss_alpha=0.0))
    ids = torch.randint(2048, (1, SIZES.prefill + SIZES.decode), generator=torch.Generator().manual_seed(1))
    return model, ids, cpu_peers.reference(model, ids, SIZES)


@pytest.mark.parametrize(
    "wrong", ["layers.2.mlp.experts.down_proj", "norm.weight", "layers.0.self_attn.kv_b_proj.weight"]
)
def test_a_wrong_model_gets_no_ratio(exact, wrong):
    model, ids, reference = exact
    theirs = cpu_peers.peer(model)
    ours = Transformer(model.config)
    with torch.no_grad():
        ours.get_parameter(wrong).mul_(1 + 1e-4)
    for record in cpu.compare({"plain": cpu_work.Ours(ours)}, theirs, ids, reference, SIZES):
        assert "ratio" not in record and "ours" not in record
    assert all("ratio" in r for r in cpu.compare({"plain": cpu_work.Ours(model)}, theirs, ids, reference, SIZES))


def test_wrong_gradients_refuse_training_only(exact):
    model, ids, reference = exact

    class Doubled(cpu_work.Ours):
        def train(self, ids: torch.Tensor) -> None:
            super().train(ids)
            gate = self.model.get_parameter("layers.1.mlp.gate.weight")
            assert gate.grad is not None
            gate.grad *= 2

    records = cpu.compare({"plain": Doubled(model)}, cpu_peers.peer(model), ids, reference, SIZES)
    assert {r["work"]: "ratio" in r for r in records} == {work: work != "train" for work in WORK}


def test_what_is_acceptable():
    theirs = {"logits": 0.1, "logits, quartile": 0.2, "logits, largest": 0.5, "gradients": 0.2}
    assert cpu_peers.acceptable(theirs, theirs, torch.bfloat16)
    for name, error in theirs.items():
        assert cpu_peers.acceptable({name: 2 * error}, theirs, torch.bfloat16)
        for wrong in (2.01 * error, float("nan"), float("inf")):
            assert not cpu_peers.acceptable({**theirs, name: wrong}, theirs, torch.bfloat16)
    for name, most in (("logits", 64 * 2**-8), ("gradients", 128 * 2**-8)):  # whatever theirs is
        assert cpu_peers.acceptable({name: most}, {name: 1e9}, torch.bfloat16)
        assert not cpu_peers.acceptable({name: most * 1.01}, {name: 1e9}, torch.bfloat16)
        assert not cpu_peers.acceptable({name: most}, {name: 1e9}, torch.float32)


@pytest.fixture(scope="module")
def in_bf16() -> tuple[Transformer, torch.Tensor, cpu_peers.Reference]:
    """One token of these is routed otherwise in bfloat16 than in float64."""
    model = Transformer(dataclasses.replace(preset("tiny"), num_nextn_predict_layers=0, aux_loss_alpha=0.0)).bfloat16()
    ids = torch.randint(2048, (1, SIZES.prefill + SIZES.decode), generator=torch.Generator().manual_seed(0))
    return model, ids, cpu_peers.reference(model, ids, SIZES)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        lambda x, up, down, w, ids, **settings: moe_mlp(x, up, down, w * 0, ids, **settings),
        lambda x, up, down, w, ids, **settings: moe_mlp(x, up, down, w * 0.5, ids, **settings),
        lambda x, up, down, w, ids, **settings: moe_mlp(x, up, down, w, (ids + 1) % len(up), **settings),
        lambda x, up, down, w, ids, **settings: moe_mlp(x, up.roll(up.shape[1] // 2, 1), down, w, ids, **settings),
    ],
    ids=["right", "no weights", "half the weights", "the next expert", "gate and up swapped"],
)
def test_a_wrong_layer_gets_no_ratio_in_bf16_either(in_bf16, wrong, monkeypatch):
    """Beside a token that is routed otherwise, whose error is as large as a wrong layer's."""
    model, ids, reference = in_bf16
    theirs = cpu_peers.peer(model)
    task = cpu_work.Task(theirs, ids, SIZES)
    assert cpu_peers.errors(task, "prefill", reference, SIZES)["logits, largest"] > 0.3
    if wrong is not None:
        monkeypatch.setattr("moe.ops.moe_mlp", wrong)
    found = {
        r["work"]: "ratio" in r for r in cpu.compare({"plain": cpu_work.Ours(model)}, theirs, ids, reference, SIZES)
    }
    assert found == dict.fromkeys(WORK, wrong is None)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        lambda x, up, su, down, sd, w, ids, *more: int8_mlp(x, up, su, down, sd, w * 0.5, ids, *more),
        lambda x, up, su, down, sd, w, ids, *more: int8_mlp(x, up, su, down, sd, w, (ids + 1) % len(up), *more),
        lambda x, up, su, down, sd, w, ids, *more: int8_mlp(x, up, su * torch.nan, down, sd, w, ids, *more),
    ],
    ids=["right", "half the weights", "the next expert", "NaN"],
)
def test_a_wrong_layer_gets_no_ratio_in_int8_either(in_bf16, wrong, monkeypatch):
    model, ids, reference = in_bf16
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ours = {"plain": cpu_work.Ours(model), "int8": cpu_work.Ours(cpu.variant_of(model, "int8"))}
    if wrong is not None:
        monkeypatch.setattr("moe.quantized.int8.int8_mlp", wrong)
    records = [*cpu.compare(ours, cpu_peers.peer(model), ids, reference, SIZES)]
    assert all(r["ratio"] > 0 for r in records if r["variant"] == "plain")
    found = {r["work"]: "ratio" in r for r in records if r["variant"] == "int8"}
    assert found == dict.fromkeys(WORK[1:], wrong is None)
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in before.items())


@pytest.mark.skipif(not can_pack(), reason="oneDNN packs bfloat16 only with AVX-512 or AVX-NE-CONVERT")
def test_packed_models_are_timed_in_bf16_and_noted_in_fp32(capsys):
    assert main(["cpu", "--small", "--work", "train", "short", "--variant", "plain", "packed"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert sum(" packed " in line and " right " in line for line in shown) == 1
    assert sum(line.startswith("packed fp32 is left out: ") for line in shown) == 1
    assert main(["cpu", "--small", "--work", "short", "--variant", "packed", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out.startswith("packed fp32 is left out: ")


def test_the_largest_error_is_compared_with_that_of_earlier_work_too(exact, monkeypatch):
    """Which model routes a token otherwise is chance, so few tokens may show it on our side only."""
    model, ids, reference = exact
    peers, ours = {"train": 0.01, "prefill": 0.2}, {"short": 0.3}

    def errors(task, work, *_):
        mine = isinstance(task.side, cpu_work.Ours)
        found = ours.get(work, 0.01) if mine else peers.get(work, 0.01)
        return {"logits": 1e-7, "logits, largest": found}

    monkeypatch.setattr(cpu, "errors", errors)
    theirs = cpu_peers.peer(model)

    def right() -> dict[str, bool]:
        records = cpu.compare({"plain": cpu_work.Ours(model)}, theirs, ids, reference, SIZES)
        return {record["work"]: "ratio" in record for record in records}

    assert all(right().values())
    ours["short"] = 0.5
    assert [work for work, ok in right().items() if not ok] == ["short"]
    ours |= {"short": 0.01, "train": 0.3}  # before the peer has shown it
    assert [work for work, ok in right().items() if not ok] == ["train"]


def test_only_selected_work_is_prepared(exact, monkeypatch):
    model, ids, whole = exact
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for side in (cpu_work.Ours, cpu_peers.Theirs):
        monkeypatch.setattr(side, "train", None)
    for kinds, judged in {("batch",): 0, ("short",): 10}.items():
        sizes = dataclasses.replace(SIZES, kinds=kinds)
        found = cpu_peers.reference(model, ids, sizes)
        assert not found.gradients and found.batch.numel() == ("batch" in kinds) * whole.batch.numel()
        assert judged == sizes.judged == (found.logits.shape[1] if found.logits.numel() else 0)
        if judged:
            assert (found.logits - whole.logits[:, :judged]).abs().max() < 1e-5  # the router computes in float32
        records = [*cpu.compare({"plain": cpu_work.Ours(model)}, cpu_peers.peer(model), ids, found, sizes)]
        assert [r["work"] for r in records] == [work for work in WORK if work.split()[0] in kinds]
        assert all(r["ratio"] > 0 for r in records)
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) and t.dtype == after[name].dtype for name, t in state.items())


def test_the_peer_has_a_copy_of_the_weights_and_rotates_in_float32(in_bf16):
    model, _, _ = in_bf16
    theirs = cpu_peers.peer(model).model
    weight, own = theirs.get_parameter("model.layers.1.mlp.experts.down_proj"), model.state_dict()
    assert torch.equal(weight, own["layers.1.mlp.experts.down_proj"]) and weight.dtype == torch.bfloat16
    pointers = {t.data_ptr() for t in own.values()}
    assert not any(p.data_ptr() in pointers for p in (*theirs.parameters(), *theirs.buffers()))
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    kinds = {name: buffer.dtype for name, buffer in theirs.named_buffers()}
    assert len(kinds) > 2 and set(kinds.values()) == {torch.float32}


def test_limits_count_what_the_docstring_says():
    config = preset("bench_400m")
    sizes = cpu_work.Sizes(train=10, prefill=20, decode=2, short=5, batches=(3,), batch_context=7)
    at_limit = cpu.limits(config, sizes, itemsize=2, matmul=1.0, read=1.0)
    counts = count_parameters(config)
    active = counts.activated - 2 * 32000 * 1024
    attention, head = 16 * (96 + 64) * 4, 2 * 32000 * 1024
    assert at_limit["prefill"] == 2 * active * 20 + attention * 20**2 + head
    assert at_limit["train"] == 3 * (2 * active * 10 + attention * 10**2 + head * 10)
    at_limit = cpu.limits(config, sizes, itemsize=2, matmul=1e30, read=1.0)  # reading takes longer than products
    assert at_limit["decode"] == 2 * 2 * (active + 32000 * 1024 + (256 + 32) * 4 * 21)
    assert at_limit["short"] == 2 * 2 * (active + 32000 * 1024 + (256 + 32) * 4 * 6)
    experts = 3 * 64 * 3 * 1024 * 512  # three layers of 64 experts, of which a token uses 6
    used = active - experts * 6 / 64 + experts * (1 - (58 / 64) ** 3)
    assert at_limit["batch 3"] == pytest.approx(2 * 2 * (used + 32000 * 1024 + 3 * (256 + 32) * 4 * 8), rel=1e-12)
    stored = cpu.limits(config, sizes, itemsize=2, matmul=1e30, read=1.0, stored=(6400, 7))
    assert stored["short"] == pytest.approx(2 * (7 + 600 + 2 * (256 + 32) * 4 * 6), rel=1e-12)
    slow = cpu.limits(config, sizes, itemsize=2, matmul=1.0, read=1e30)
    assert slow["batch 3"] == 2 * 3 * (2 * (active + 32000 * 1024) + 2 * attention * 7)


def test_bytes_of_a_model_by_hand():
    config = dataclasses.replace(preset("tiny"), num_nextn_predict_layers=0)
    experts, embedding = 2 * 8 * 3 * 128 * 160, 2048 * 128
    total = count_parameters(config).total
    assert cpu.stored_bytes(Transformer(config)) == (4 * experts, 4 * (total - experts))  # tied
    untied = Transformer(dataclasses.replace(config, tie_word_embeddings=False))
    assert cpu.stored_bytes(untied) == (4 * experts, 4 * (total - experts))
    found = cpu.stored_bytes(cpu.variant_of(untied, "int8"))
    assert found[0] == experts + 2 * 2 * 8 * (2 * 160 + 128)  # scales in bfloat16
    assert embedding < found[1] < 4 * (total - experts) / 2


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "Transformer", None)
    monkeypatch.setattr(cpu, "available_memory", lambda: 20 * 10**9)
    assert main(["cpu", "--preset", "bench_1500m"]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err == (
        "benchmarks cpu: --preset bench_1500m: not enough memory; expected about 33.5 GB; found 20.0 GB available; "
        "--work prefill decode short batch needs 15.4 GB\n"
    )
    sizes = dataclasses.replace(cpu_work.Sizes(), kinds=cpu_work.KINDS[1:])
    cpu.check_memory("bench_1500m", ["fp32", "bf16"], sizes, ["plain"], others=0)
    monkeypatch.setattr(cpu, "available_memory", lambda: None)
    cpu.check_memory("bench_1500m", ["fp32"], cpu_work.Sizes(), ["plain"], others=0)


def test_available_memory(monkeypatch):
    found = cpu.available_memory()
    assert found is None or 10**6 < found < 10**15
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 9 kB\nMemAvailable:     70 kB\n")
    assert cpu.available_memory() == 71680
    monkeypatch.setattr(Path, "read_text", lambda _: "nothing\n")
    assert cpu.available_memory() is None


class Other:
    """Stands for the process of another commit: the same model, with logits that are `factor` times as large."""

    cpu, kinds = 0.0, cpu_work.KINDS

    def __init__(self, name: str, model: Transformer, ids: torch.Tensor, sizes: Any, factor: float) -> None:
        self.name, self.task, self.factor = name, cpu_work.Task(cpu_work.Ours(model), ids, sizes), factor
        self.gradients = self.task.gradients

    def logits(self, work: str) -> torch.Tensor:
        return self.factor * self.task.logits(work)

    def call(self, work: str) -> Any:
        return lambda: 1e-3


def test_another_commit_is_checked_as_this_one(exact):
    model, ids, reference = exact
    sizes = dataclasses.replace(SIZES, kinds=("train", "short"))
    others: Any = [Other("right", model, ids, sizes, 1.0), Other("bad", model, ids, sizes, 1.001)]
    others[1].kinds = ("short",)
    records = [*cpu.compare({"plain": cpu_work.Ours(model)}, cpu_peers.peer(model), ids, reference, sizes, others)]
    rows = [("train", "transformers"), ("train", "right")]
    assert [(r["work"], r["beside"]) for r in records] == rows + [
        ("short", n) for n in ("transformers", "right", "bad")
    ]
    for r in records:
        assert ("ratio" in r) == (r["beside"] != "bad") and r.get("wrong") == (None if "ratio" in r else "bad")
        if r["beside"] != "transformers":
            difference = 0 if r["beside"] == "right" else 1e-3
            assert r["difference"]["logits"] == pytest.approx(difference, abs=1e-6) and "backend" not in r
    assert all(r["ratio"] == 1e-3 / r["ours"]["median_s"] for r in records if r["beside"] == "right")


def test_a_model_that_llama_cpp_refuses_is_left_out(capsys, monkeypatch):
    def refused(*_: Any) -> Any:
        raise RuntimeError("ValueError: no such\nmodel")

    monkeypatch.setattr(cpu, "find", lambda _: None)
    monkeypatch.setattr(cpu, "LlamaCpp", refused)
    assert main(["cpu", "--small", "--work", "short", "--dtype", "fp32", "--llama", "converter.py"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "llama.cpp fp32 is left out: ValueError: no such model" in shown
    assert sum(line.startswith("short plain ") and " right " in line for line in shown) == 1


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, in which nothing must remain."""
    if cpu_against.run_git("rev-parse", "--git-dir").returncode:
        pytest.skip("not a clone")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not [*tmp_path.glob("moesmith-against-*")]
    assert str(tmp_path) not in cpu_against.run_git("worktree", "list").stdout


def test_against_the_commit_itself(temporary, capsys):
    file = temporary / "out.jsonl"
    words = ["--small", "--dtype", "fp32", "--work", "train", "batch", "--against", "HEAD", "--json", str(file)]
    assert main(["cpu", *words]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    head = cpu_against.resolve("HEAD")[:8]
    assert [r["beside"] for r in records] == ["transformers", head] * 2
    assert all(r["ratio"] > 0 and r["small"] for r in records)
    assert all(r["difference"]["logits"] < 1e-5 for r in records[1::2])
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert sum(line.startswith(f"batch 3 plain {head} right") for line in shown) == 1
    assert any(line.startswith(f"fp32: logits of {head} differ from ours by at most ") for line in shown)


def test_a_process_that_ends_is_one_line(temporary, monkeypatch):
    model, ids = Transformer(preset("tiny")), torch.zeros(1, 1, dtype=torch.int64)
    repository = temporary / "repository"
    repository.mkdir()
    (repository / "torch.py").write_text("raise ImportError('not today')\n")
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*settings, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_against, "ROOT", repository)
        commit, said = cpu_against.resolve("HEAD"), r"build: .* ended with exit status 1: ImportError: not today$"
        with pytest.raises(BadInput, match=said), cpu_against.other_commit(commit) as other:
            other.build(model, "fp32", ids, SIZES)
        assert len(cpu_against.run_git("worktree", "list").stdout.splitlines()) == 1


def test_ctrl_c_leaves_no_process_and_no_folder(temporary, monkeypatch, capsys):
    started: list[Any] = []

    def interrupted(*args: Any, **_: Any) -> Any:
        started.append(args[4])
        assert started[0].process.poll() is None and [*temporary.glob("moesmith-against-*/tree/moe")]
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "measure", interrupted)
    assert main(["cpu", "--small", "--against", "HEAD"]) == 130
    assert started[0].process.poll() is not None
    assert capsys.readouterr().err == "benchmarks: interrupted\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "tinny"], "--preset: preset = 'tinny': expected one of tiny, "),
        (["--preset", "mixtral_8x7b"], "--preset mixtral_8x7b: wrong family; expected deepseek_v3; found mixtral"),
        (["--work", "trian"], "argument --work: invalid choice: 'trian' (choose from "),
        (["--variant", "int4"], "argument --variant: invalid choice: 'int4' (choose from "),
        (["--work", "train", "--variant", "int8"], "--work train: only plain is trained; expected --variant plain; "),
        (["--against", "no-such"], f"--against: unknown commit; expected a commit of {ROOT}; found no-such"),
        (["--llama", "/no/file.py"], "--llama: expected convert_hf_to_gguf.py of llama.cpp; found /no/file.py"),
        (["--llama", __file__], "--llama: expected a folder named conversion beside it; found none"),
        (["--against", ""], "--against: unknown commit; "),
        (["--small", "--json", "/proc/none.jsonl"], "--json /proc/none.jsonl: "),
        (["--small", "--json", "/proc"], "--json /proc: Is a directory"),
    ],
)
def test_bad_input_of_cpu_is_one_line(capsys, monkeypatch, options, says):
    monkeypatch.setattr(cpu, "Transformer", None)  # nothing is built
    with contextlib.suppress(SystemExit):
        assert main(["cpu", *options]) == 2
    shown = capsys.readouterr()
    assert f"benchmarks cpu: {says}" in shown.err and shown.err.count("\n") == 1 and not shown.out
