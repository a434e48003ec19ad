"""Training without experts: the run and what it says, bit-exact resuming, scoring, and ranks."""

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
from moe import ConfigError, ModelConfig
from moe.cli import main
from moe.presets import PRESETS
from moe.train.run import TextRun
from moe.train.settings import Settings
from moe.train.world import World

ROOT = Path(__file__).parents[2]
MICRO = ModelConfig(
    model_type="qwen3",
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qk_norm="head",
    intermediate_size=48,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
FEW = ("--steps", "4", "--batch-size", "4", "--seq-length", "16", "--warmup", "1", "--save-every", "1", "--keep", "9")


def command(text: Path, out: Path, *more: str) -> list[str]:
    config = out.parent / "dense.json"
    if not config.exists():
        config.write_text(json.dumps(MICRO.to_dict()))
    return ["train", "--config", str(config), "--data", str(text), *FEW, "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "run"
    assert main(command(text, out)) == 0
    return out


def records(run: Path) -> list[dict[str, Any]]:
    """The measurements of a run without its speed."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main([*words]) == status
    found = capsys.readouterr()
    return found.err if status else found.out + found.err


def test_a_run_says_nothing_of_experts(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    told = said(capsys, *command(text, out, "--eval-every", "2"))
    assert "after training" in told and "step 4/4  loss " in told
    assert "MaxVio" not in told and "dead experts" not in told
    plots = ["loss.png"] if "loss.png" in told else []  # without matplotlib there are none
    assert [path.name for path in out.glob("*.png")] == plots
    summary = json.loads((out / "summary.json").read_text())
    assert summary["load"] == [] and [Path(plot).name for plot in summary["plots"]] == plots
    assert summary["validation"]["after"]["nats_per_token"] < summary["validation"]["before"]["nats_per_token"]
    kinds = [(record["kind"], record.get("max_vio", record.get("load"))) for record in records(out)]
    assert kinds == [(kind, []) for kind in ("validation", *("train", "train", "validation") * 2)]
    model = moe.load(out / "checkpoint")
    assert model.config.model_type == "qwen3" and not model.config.has_experts
    for words in (["eval", str(out)], ["eval", str(out / "checkpoint"), "--data", str(text), "--quantize", "int8"]):
        scored = said(capsys, *words)
        assert "perplexity" in scored and "experts" not in scored
    assert json.loads(said(capsys, "eval", str(out), "--json"))["load"] == []
    assert said(capsys, "generate", str(out), "--prompt", "the", "--max-new-tokens", "3").startswith("the")
    for words in (["trace", str(out)], ["place", str(out), "--gpus", "1", "--physical-experts", "1"]):
        error = said(capsys, *words, status=2)
        assert error.startswith(f"moesmith {words[0]}: ") and error.count("\n") == 1 and "experts" in error


def test_a_resumed_run_is_bit_identical(run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    for name in ("states/step-000003", "states/step-000004", "checkpoint"):
        shutil.rmtree(cut / name)
    (cut / "summary.json").unlink()
    assert main(["train", "--resume", str(cut)]) == 0
    assert records(cut) == records(run)
    for file in ("states/step-000004/tensors.safetensors", "checkpoint/model.safetensors"):
        assert (cut / file).read_bytes() == (run / file).read_bytes()


def test_another_run_begins_with_its_weights(text: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "more"
    words = ["train", "--init", str(run), "--data", str(text), "--steps", "1", "--seq-length", "16", "--lr", "1e-9"]
    assert main([*words, "--out", str(out)]) == 0
    before, after = (load_file(folder / "checkpoint/model.safetensors") for folder in (run, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)


TASK = """
class Vowels:
    train = test = ["the", "a"]

    def reward(self, prompt, completion):
        return sum(letter in "aeiou" for letter in completion) / 9


vowels = Vowels()
"""


def test_it_is_fine_tuned_and_rewarded(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [json.dumps({"prompt": f"the {i}", "completion": " token"}) for i in range(20)]
    (tmp_path / "examples.jsonl").write_text("\n".join(examples))
    (tmp_path / "own.py").write_text(TASK)
    few = ("--steps", "2", "--batch-size", "2", "--seq-length", "32", "--warmup", "0")
    tuned, rewarded = tmp_path / "tuned", tmp_path / "rewarded"
    told = said(
        capsys, "sft", "--init", str(run), "--data", str(tmp_path / "examples.jsonl"), *few, "--out", str(tuned)
    )
    sampling = ("--task", f"{tmp_path / 'own.py'}:vowels", "--group-size", "2", "--accumulation", "1")
    sampling += ("--max-new-tokens", "4")
    told += said(capsys, "grpo", "--init", str(tuned), *sampling, *few, "--out", str(rewarded))
    assert told.count("after training") == 2 and "MaxVio" not in told and "dead experts" not in told
    steps = [record for record in records(rewarded) if record["kind"] == "train"]
    assert [(record["max_vio"], record["router_agreement"]) for record in steps] == [([], None)] * 2
    assert all(record["logprob_difference"] < 1e-4 for record in steps)
    for out in (tuned, rewarded):
        assert moe.load(out / "checkpoint").config.model_type == "qwen3"
        assert not (out / "load.png").exists()


def test_options_of_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    for settings, message in (
        (
            Settings(preset="micro", seq_length=16, bias_update_speed=0.1),
            "--bias-update-speed = 0.1: .* micro has no correction bias",
        ),
        (Settings(preset="micro", seq_length=16, ep=2), "--ep = 2: expected 1 for a model without experts"),
    ):
        with pytest.raises(ConfigError, match=message):
            TextRun(settings, tmp_path / "run").check(MICRO, World(), torch.device("cpu"))


def test_two_ranks_train_as_one_process(text: Path, run: Path, tmp_path: Path) -> None:
    """With AdamW, because the bf16 products of Muon amplify rounding differences of the gradient."""
    outs = tmp_path / "one", tmp_path / "two"
    assert main(command(text, outs[0], "--optimizer", "adamw")) == 0
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    words = [*launch, "-m", "moe", *command(text, outs[1], "--optimizer", "adamw")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    for one, two in zip(records(outs[0]), records(outs[1]), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (pytest.approx(value, rel=2e-4) if isinstance(value, float) else value), name
    start = moe.Transformer(moe.load(outs[0] / "checkpoint").config, seed=0)
    one, two = (moe.load(out / "checkpoint").state_dict() for out in outs)
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 0.02 * (tensor - start.state_dict()[name]).norm(), name
