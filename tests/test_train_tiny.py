"""The run that the README shows, `train --preset tiny`: its figures, and that its parts do their work.

One run, shared by the tests here; it takes most of their time.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe
from moe.train.data import evaluation_batches, open_dataset
from moe.train.settings import Settings

WINDOW = Settings().seq_length


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    argv = [sys.executable, "-W", "error", "-m", "moe", "train", "--preset", "tiny", "--json", "--out", str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(summary: dict[str, Any]) -> moe.Transformer:
    return moe.load(summary["checkpoint"])


@torch.no_grad()
def nats_per_token(model: moe.Transformer, folder: str) -> float:
    dataset = open_dataset(Path(folder) / "data")
    total, count = 0.0, 0
    for ids in evaluation_batches(dataset.validation, WINDOW, 16):
        total += model(ids, labels=ids).losses["ce"].item() * (ids.numel() - len(ids))
        count += ids.numel() - len(ids)
    return total / count


def test_the_preset_has_every_part_of_deepseek_v3() -> None:
    config = moe.preset("tiny")
    assert config.is_mla and config.q_lora_rank and config.kv_lora_rank
    assert config.first_k_dense_replace == 1 and config.n_shared_experts == 1 and config.num_nextn_predict_layers == 1
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    assert 1 < config.topk_group < config.n_group


def test_it_beats_the_bigram_and_two_bits(summary: dict[str, Any]) -> None:
    scores = {key: summary["validation"][key]["bits_per_byte"] for key in ("before", "after", "unigram", "bigram")}
    assert scores["after"] <= 2.0, scores
    assert scores["after"] < scores["bigram"] < scores["unigram"] < scores["before"], scores


def test_the_saved_model_has_the_reported_loss(summary: dict[str, Any], model: moe.Transformer) -> None:
    reported = summary["validation"]["after"]["nats_per_token"]
    assert nats_per_token(model, summary["folder"]) == pytest.approx(reported, rel=1e-5)


def test_experts_are_evenly_loaded(summary: dict[str, Any]) -> None:
    rows = summary["load"]
    assert [row["layer"] for row in rows] == ["layers.1.mlp", "layers.2.mlp", "mtp.0.block.mlp"]
    for row in rows:
        assert row["dead_experts"] == 0 and min(row["tokens"]) > 0, row
        assert row["max_vio"] < 1, row


def random_experts(model: moe.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def replay(router: Any) -> Callable[[Tensor], moe.Routing]:
        def route(logits: Tensor) -> moe.Routing:
            ids = torch.rand(logits.shape, generator=generator).topk(model.config.num_experts_per_tok).indices
            return router.replay(logits, ids)

        return route

    for _, router in moe.balance.routers(model):
        monkeypatch.setattr(router, "route", replay(router))


def no_attention(model: moe.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.layers:
        attention = layer.self_attn
        assert isinstance(attention, nn.Module)
        monkeypatch.setattr(attention, "forward", lambda x, *_: torch.zeros_like(x))


@pytest.mark.parametrize("ablate", [random_experts, no_attention])
def test_routing_and_attention_are_each_worth_a_fifth_of_a_nat(
    summary: dict[str, Any], model: moe.Transformer, monkeypatch: pytest.MonkeyPatch, ablate: Callable[..., None]
) -> None:
    ablate(model, monkeypatch)
    cost = nats_per_token(model, summary["folder"]) - summary["validation"]["after"]["nats_per_token"]
    print(f"{ablate.__name__}: {cost:.3f} nats/token")
    assert cost >= 0.2


def test_transformers_loads_model_and_tokenizer(summary: dict[str, Any], model: moe.Transformer) -> None:
    text = 'The "with" statement is used to wrap the execution of a block\n   with methods, as in déjà vu.'
    tokenizer = AutoTokenizer.from_pretrained(summary["checkpoint"])
    dataset = open_dataset(Path(summary["folder"]) / "data")
    ids = tokenizer(text).input_ids
    assert ids == dataset.tokenizer.encode(text).ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == dataset.end_of_text
    theirs = AutoModelForCausalLM.from_pretrained(summary["checkpoint"]).eval()
    with torch.no_grad():
        expected, found = theirs(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_plots_are_pictures(summary: dict[str, Any]) -> None:
    from matplotlib.image import imread

    assert [Path(file).name for file in summary["plots"]] == ["loss.png", "load.png"]
    for file in summary["plots"]:
        picture = imread(file)
        assert picture.shape[0] > 200 and picture.shape[1] > 500
        assert len({tuple(color) for color in picture[::4, ::4, :3].reshape(-1, 3).tolist()}) > 20


def test_the_sample_is_text_that_goes_on(summary: dict[str, Any]) -> None:
    sample = summary["sample"]
    assert sample["text"].startswith(sample["prompt"]) and len(sample["text"]) > len(sample["prompt"])
