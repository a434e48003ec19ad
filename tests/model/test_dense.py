"""A model without experts: everything works on it, or says in one line that there are no experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moe
from moe import ConfigError, ModelConfig
from moe.checkpoint.convert import convert, cut
from moe.cli import main
from moe.config import EXPERT_FIELDS, MoEConfig
from tests.support.checkpoint_cases import BY_FAMILY, assert_same, build

DENSE = BY_FAMILY["qwen3"]
IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(DENSE).save(tmp_path / "dense")
    return tmp_path / "dense"


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main([*words]) == status
    found = capsys.readouterr()
    return found.err if status else found.out


def test_a_config_without_experts_is_plain() -> None:
    """It states no field of experts, and those that have defaults have no effect."""
    values = {name: value for name, value in DENSE.to_dict().items() if name not in EXPERT_FIELDS}
    assert ModelConfig.from_dict(values) == DENSE
    assert (DENSE.has_experts, DENSE.num_moe_layers) == (False, 0)
    for name, value in dict(scoring_func="softmax", aux_loss_alpha=0.1, n_group=2, decoder_sparse_step=2).items():
        model = moe.Transformer(ModelConfig.from_dict(values | {name: value}))
        assert_same(model, moe.Transformer(DENSE))
        out = model(IDS, labels=IDS)
        assert out.losses.keys() == {"ce"} and out.loss == out.losses["ce"]
    with pytest.raises(ConfigError, match="moe_intermediate_size = 0: expected an integer from 1"):
        moe.MoELayer.from_config(DENSE)
    with pytest.raises(ConfigError, match="moe_intermediate_size = 0: expected an integer from 1"):
        MoEConfig(8, 0, 0, 0)


def test_there_is_no_load_to_report_and_nothing_to_balance() -> None:
    model = build(DENSE)
    assert model(IDS, labels=IDS).load is None
    report = model.load_report(reset=True)
    assert (report.layers, report.load.numel(), report.max_vio, report.dead_experts, str(report)) == ([], 0, [], [], "")
    with pytest.raises(ValueError, match="attach: the model has no router"):
        moe.balance.attach(model, torch.optim.SGD(model.parameters()))


def test_there_are_no_experts_to_choose(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"experts = range\(0, 1\): expected None: no experts"):
        moe.load(folder, experts=range(1))
    with pytest.raises(ConfigError, match=r"experts = \[0\]: expected none, because the model has no experts"):
        cut(folder, tmp_path / "out", layers=[0], experts=[0])
    error = said(capsys, "trace", str(folder), "--data", str(folder / "config.json"), status=2)
    assert error.startswith("moesmith trace: ") and error.count("\n") == 1
    assert "no routing to record; expected a model with experts; found 3 dense layers" in error
    error = said(capsys, "convert", str(folder), "--out", str(tmp_path / "out"), "--layout", "stacked", status=2)
    assert error == "moesmith convert: --layout: expected one of dense, the layouts of qwen3; found 'stacked'\n"
    (tmp_path / "load.json").write_text('{"load": []}')
    error = said(capsys, "place", str(tmp_path / "load.json"), "--gpus", "1", "--physical-experts", "1", status=2)
    assert "expected a list of layers, each a list of the tokens of its experts; found []" in error


def test_layers_are_cut(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(said(capsys, "cut", str(folder), "--out", str(tmp_path / "cut"), "--layers", "0,2"))
    assert (record["layers"], record["experts"], record["of_experts"]) == ([0, 2], [], 0)
    whole, part = moe.load(folder).state_dict(), moe.load(tmp_path / "cut").state_dict()
    assert part.keys() == {name for name in whole if not name.startswith("layers.2.")}
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name.replace("layers.1.", "layers.2.")]), name


def test_fp8_files(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "fp8", dtype="fp8", block_size=(16, 16))
    kept, wide = moe.load(tmp_path / "fp8", dtype="keep"), moe.load(tmp_path / "fp8", dtype="fp32")
    exact = moe.load(folder)
    with torch.no_grad():
        found, expected, original = (model(IDS).logits for model in (kept, wide, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not torch.equal(expected, original)
    kept.save(tmp_path / "again")
    assert_same(moe.load(tmp_path / "again", dtype="keep"), moe.load(tmp_path / "fp8", dtype="keep"))


def test_inspect_shows_no_experts(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "inspect", "qwen3_0_6b")
    assert text.count("596,049,920") == 4  # total, twice activated, released
    assert not [line for line in text.splitlines() if line.startswith(EXPERT_FIELDS)]
    assert "expert" not in text and "qk_norm" in text
    facts = json.loads(said(capsys, "inspect", "qwen3_0_6b", "--json"))
    assert facts["parameters"]["routed_experts"] == facts["parameters"]["routers"] == 0


@pytest.mark.parametrize("words", [[], ["--gpus", "4"]])
def test_plans_of_one_gpu(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "plan", "qwen3_8b", *words)
    assert "16,381,470,720 bytes" in text and "expert" not in text
    facts = json.loads(said(capsys, "plan", "qwen3_8b", *words, "--json"))
    assert facts["inference"]["parts"]["other weights"] == 16_381_470_720
    assert facts["training"]["parts"]["parameters"] == 4 * 8_190_735_360 // (4 if words else 1)
    error = said(capsys, "plan", "qwen3_8b", "--gpus", "2", "--ep", "2", status=2)
    assert error == "moesmith plan: --ep: expected 1 for a model without experts; found 2\n"


def test_plans_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "qwen3_32b", "--gpu", "h100", "--gpus", "64", "--pp", "4", "--global-batch", "256")
    text = said(capsys, *words)
    assert "PP 4 x DP 16, EP 1\n" in text and "all-to-all bytes" not in text and "Speed: " in text
    facts: dict[str, Any] = json.loads(said(capsys, *words, "--json"))
    assert facts["step"]["parts"]["all-to-all"] == facts["all_to_all"]["ranks"] == 0
    error = said(capsys, *words, "--ep", "2", status=2)
    assert error == "moesmith plan: --ep: expected 1 for a model without experts; found 2\n"
