"""What a model weighs on each GPU, beside published figures and sums made by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import moe
from moe import ConfigError
from moe.checkpoint import read_summary
from moe.checkpoint.format.sizes import parse_size
from moe.cli import main
from moe.counts import count_parameters
from moe.planning.footprint import Placement, inference, stored, training
from tests.support.checkpoint_cases import V3, V3_MTP, configure
from tests.support.quantised_checkpoints import BLOCK, make_fp8, make_mxfp4


def test_the_released_deepseek_v3() -> None:
    files = stored(moe.preset("deepseek_v3"), "fp8")
    assert (files.tensors, files.bytes) == (91_991, 688_574_839_360)
    assert files.values == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}


@pytest.mark.parametrize(("name", "gib"), [("gpt_oss_120b", 60.8), ("gpt_oss_20b", 12.8)])
def test_the_released_gpt_oss(name: str, gib: float) -> None:
    """Checkpoint sizes as its model card has them."""
    assert stored(moe.preset(name), "mxfp4").bytes / 2**30 == pytest.approx(gib, abs=0.05)
    with pytest.raises(ConfigError, match="dtype = 'fp8': expected bf16, fp16, fp32, fp64 or mxfp4 for gpt_oss"):
        stored(moe.preset(name), "fp8")
    with pytest.raises(ConfigError, match="dtype = 'mxfp4': expected fp8, bf16, fp16, fp32 or fp64 for deepseek_v3"):
        stored(V3, "mxfp4")


def test_what_is_planned_is_what_is_written(tmp_path: Path) -> None:
    folders = make_fp8(tmp_path, V3_MTP)
    for folder, planned in ((folders.fp8, stored(V3_MTP, "fp8", BLOCK)), (folders.plain, stored(V3_MTP, "bf16"))):
        found = read_summary(folder)
        assert (found.tensors, found.bytes) == (planned.tensors, planned.bytes)
        assert {name: totals.values for name, totals in found.dtypes.items()} == planned.values


def test_a_folder_is_planned_as_it_is_quantised(tmp_path: Path, capsys: Any) -> None:
    folders = make_fp8(tmp_path, V3)
    configure(folders.fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    for folder, dtype in ((folders.fp8, "fp8"), (folders.plain, "bf16"), (make_mxfp4(tmp_path)[0], "mxfp4")):
        assert json.loads(run(capsys, "plan", str(folder), "--json")[1])["placement"]["dtype"] == dtype


def test_inference_by_hand() -> None:
    """DeepSeek-V3 in bf16, EP 64: 4 experts of 58 layers and one MTP module, and everything else."""
    config = moe.preset("deepseek_v3")
    found = inference(config, Placement(64, 64, "bf16", 1000))
    assert found.experts == 4
    assert found.parts["experts"] == 59 * 4 * 44_040_192 * 2
    counts = count_parameters(config)
    biases = 59 * 256 * 2  # in fp32 they take two bytes more
    assert found.parts["other weights"] == (counts.with_mtp - 59 * 256 * 44_040_192) * 2 + biases
    assert found.parts["cache"] == 1000 * 70_272
    assert found.total == sum(found.parts.values())
    one = inference(config, Placement(1, 1, "fp8", 1000))
    repeats = 2 * 2 * 129_280 * 7168  # the files hold embedding and head once more
    assert one.parts["experts"] + one.parts["other weights"] == 688_574_839_360 - repeats


def test_training_by_hand() -> None:
    config = moe.preset("deepseek_v3")
    counts = count_parameters(config)
    found = training(config, Placement(128, 16, "bf16", 4096))
    experts = 59 * 256 * 44_040_192
    mine = 59 * 16 * 44_040_192 // 8 + -(-(counts.with_mtp - experts) // 128)
    assert found.parts["parameters"] == found.parts["gradients"] == 4 * mine == found.parts["optimizer"] // 2
    assert found.parts["saved activations"] == 62 * 4096 * 7168 * 2
    assert found.parts["logits"] == 2 * 4 * 4096 * 129_280
    # All GPUs together hold the model once, whatever the expert parallelism.
    for ep in (1, 8, 128):
        share = training(config, Placement(128, ep, "bf16", 1)).parts["parameters"] * 128
        assert share == pytest.approx(4 * counts.with_mtp, rel=1e-6)


def test_an_uneven_share_is_the_largest() -> None:
    config = dataclasses.replace(V3, n_group=1, topk_group=1)  # 12 experts over 8 GPUs: two on some
    assert inference(config, Placement(8, 8, "bf16", 1)).experts == 2


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ((6, 4, 1), "ep = 4: expected a divisor of the 6 GPUs"),
        ((16, 16, 1), "ep = 16: expected at most the 12 experts of a layer"),
        ((0, 1, 1), "gpus = 0: expected a positive integer"),
        ((1, 1, 0), "tokens = 0: expected a positive integer"),
    ],
)
def test_placements_that_cannot_be(placement: tuple[int, int, int], message: str) -> None:
    gpus, ep, tokens = placement
    for estimate in (inference, training):
        with pytest.raises(ConfigError, match=message):
            estimate(V3, Placement(gpus, ep, "bf16", tokens))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("4GiB", 2**32), ("1.5K", 1500), ("512", 512), ("80 gib", 80 * 2**30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "5iB", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_size(text, "--memory")


def run(capsys: Any, *args: str) -> tuple[int, str, str]:
    status = main(args)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(capsys: Any) -> None:
    status, out, _ = run(capsys, "plan", "deepseek_v3", "--gpus", "16", "--ep", "16", "--dtype", "fp8")
    assert status == 0 and "91,991 tensors, 688,574,839,360 bytes" in out
    assert "16 of 256" in out and "fits into 80.00 GiB" in out and "does not fit into 80.00 GiB" in out
    facts = json.loads(run(capsys, "plan", "mixtral_8x7b", "--json", "--memory", "100GiB")[1])
    assert facts["inference"]["fits"] and not facts["training"]["fits"]
    assert facts["inference"]["total"] == sum(facts["inference"]["parts"].values())
    status, _, err = run(capsys, "plan", "mixtral_8x7b", "--gpus", "16", "--ep", "16")
    assert (status, err.strip()) == (2, "moesmith: --ep = 16: expected at most the 8 experts of a layer")
    assert run(capsys, "plan", "no/such")[0] == 2
    assert "--memory = '80XB'" in run(capsys, "plan", "tiny", "--memory", "80XB")[2]
    assert "--memory = '80': expected at least 1MiB, with a unit" in run(capsys, "plan", "tiny", "--memory", "80")[2]
