"""The benchmarks run, and print no ratio for a wrong model."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import cpu
from benchmarks.__main__ import main
from benchmarks.harness import interleave
from moe import Transformer, preset
from moe.counts import count_parameters

SIZES = dataclasses.replace(cpu.SMALL, train=16, prefill=24, decode=3, rounds=1)


def test_small_run_prints_and_appends(capsys, tmp_path):
    file = tmp_path / "new" / "cpu.jsonl"
    for _ in range(2):
        assert main(["cpu", "--small", "--dtype", "fp32", "--json", str(file)]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["work"] for r in records] == ["train", "prefill", "decode"] * 2
    for r in records:
        assert r["ratio"] == r["peer"]["median_s"] / r["ours"]["median_s"]
        assert r["backend"] in cpu.BACKENDS and r["commit"] and r["versions"]["torch"] == torch.__version__


@pytest.fixture(scope="module")
def exact() -> tuple[Transformer, torch.Tensor, cpu.Reference]:
    model = Transformer(dataclasses.replace(preset("tiny"), num_nextn_predict_layers=0, aux_loss_alpha=0.0))
    ids = torch.randint(2048, (1, SIZES.prefill + SIZES.decode), generator=torch.Generator().manual_seed(1))
    return model, ids, cpu.reference(model, ids, SIZES)


@pytest.mark.parametrize(
    "wrong", ["layers.2.mlp.experts.down_proj", "norm.weight", "layers.0.self_attn.kv_b_proj.weight"]
)
def test_a_wrong_model_gets_no_ratio(exact, wrong):
    model, ids, reference = exact
    theirs = cpu.peer(model, torch.float32)
    ours = Transformer(model.config)
    with torch.no_grad():
        ours.get_parameter(wrong).mul_(1 + 1e-4)
    for record in cpu.compare(cpu.Ours(ours), theirs, ids, reference, SIZES):
        assert "ratio" not in record and "ours" not in record
    assert all("ratio" in r for r in cpu.compare(cpu.Ours(model), theirs, ids, reference, SIZES))


def test_wrong_gradients_refuse_training_only(exact):
    model, ids, reference = exact

    class Doubled(cpu.Ours):
        def train(self, ids: torch.Tensor) -> None:
            super().train(ids)
            gate = self.model.get_parameter("layers.1.mlp.gate.weight")
            assert gate.grad is not None
            gate.grad *= 2

    records = cpu.compare(Doubled(model), cpu.peer(model, torch.float32), ids, reference, SIZES)
    assert {r["work"]: "ratio" in r for r in records} == {"train": False, "prefill": True, "decode": True}


def test_nan_is_not_acceptable():
    assert not cpu.acceptable((float("nan"),), (1.0,))
    assert cpu.acceptable((2.0, 0.5), (1.0, 1.0)) and not cpu.acceptable((2.1, 0.5), (1.0, 1.0))


def test_limits_count_what_the_docstring_says():
    config = preset("bench_400m")
    sizes = cpu.Sizes(train=10, prefill=20, decode=2)
    at_limit = cpu.limits(config, sizes, itemsize=2, matmul=1.0, read=1.0)
    counts = count_parameters(config)
    active = counts.activated - 2 * 32000 * 1024
    attention, head = 16 * (96 + 64) * 4, 2 * 32000 * 1024
    assert at_limit["prefill"] == 2 * active * 20 + attention * 20**2 + head
    assert at_limit["train"] == 3 * (2 * active * 10 + attention * 10**2 + head * 10)
    assert at_limit["decode"] == 2 * 2 * (active + 32000 * 1024 + (256 + 32) * 4 * 21)


def test_interleaving_alternates_and_drops_the_first_round():
    calls: list[str] = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]
