"""The run that the documentation shows, `train --preset tiny`: its output, and that its parts do their work.

One run, shared by the tests here; it takes most of their time.
"""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe
from moe.train.data import evaluation_batches, open_dataset
from moe.train.report import print_summary
from moe.train.settings import Settings
from tests.conftest import ROOT

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
def nats_of_windows(model: moe.Transformer, folder: str) -> tuple[Tensor, Tensor]:
    """The loss of each window of the validation text, summed over the tokens it predicts, and their number."""
    sums, counts = [], []
    for ids in evaluation_batches(open_dataset(Path(folder) / "data").validation, WINDOW, 16):
        each = cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").double()
        sums.append(each.sum(dim=1))
        counts.append(torch.full_like(sums[-1], each.shape[1]))
    return torch.cat(sums), torch.cat(counts)


@pytest.fixture(scope="module")
def plain(summary: dict[str, Any], model: moe.Transformer) -> tuple[Tensor, Tensor]:
    return nats_of_windows(model, summary["folder"])


def test_it_beats_the_bigram_and_two_bits(summary: dict[str, Any]) -> None:
    scores = {key: summary["validation"][key]["bits_per_byte"] for key in ("before", "after", "unigram", "bigram")}
    assert scores["after"] <= 2.0, scores
    assert scores["after"] < scores["bigram"] < scores["unigram"] < scores["before"], scores


def test_the_saved_model_has_the_reported_loss(summary: dict[str, Any], plain: tuple[Tensor, Tensor]) -> None:
    reported = summary["validation"]["after"]["nats_per_token"]
    assert (plain[0].sum() / plain[1].sum()).item() == pytest.approx(reported, rel=1e-5)


def test_experts_are_evenly_loaded(summary: dict[str, Any]) -> None:
    rows = summary["load"]
    assert [row["layer"] for row in rows] == ["layers.1.mlp", "layers.2.mlp", "mtp.0.block.mlp"]
    for row in rows:
        assert row["dead_experts"] == 0 and min(row["tokens"]) > 0, row
        assert row["max_vio"] < 1, row


def route_to(model: moe.Transformer, monkeypatch: pytest.MonkeyPatch, scores: Callable[..., Tensor]) -> None:
    """Every token through the experts of the highest `scores(route, logits)`, with the router's weights for them."""

    def replay(router: Any) -> Callable[[Tensor], moe.Routing]:
        top_k = model.config.num_experts_per_tok
        chosen = router.route
        return lambda logits: router.replay(logits, scores(chosen, logits).topk(top_k).indices)

    for _, router in moe.balance.routers(model):
        monkeypatch.setattr(router, "route", replay(router))


def random_experts(model: moe.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    route_to(model, monkeypatch, lambda _, logits: torch.rand(logits.shape, generator=generator))


def other_experts(model: moe.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random experts, none of which the router would have chosen."""
    generator = torch.Generator().manual_seed(0)

    def scores(route: Callable[[Tensor], moe.Routing], logits: Tensor) -> Tensor:
        return torch.rand(logits.shape, generator=generator).scatter(1, route(logits).expert_ids, -1.0)

    route_to(model, monkeypatch, scores)


def no_attention(model: moe.Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.layers:
        attention = layer.self_attn
        assert isinstance(attention, nn.Module)
        monkeypatch.setattr(attention, "forward", lambda x, *_: torch.zeros_like(x))


@pytest.mark.parametrize(
    ("ablate", "least"),
    # Random experts cost 0.23, and 0.02 where experts stay interchangeable (see ADAM_SHARE in moe/train/optimizer.py).
    [(random_experts, 0.1), (other_experts, 0.2), (no_attention, 0.2)],
)
def test_routing_and_attention_each_lower_the_loss(
    summary: dict[str, Any],
    model: moe.Transformer,
    plain: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    ablate: Callable[..., None],
    least: float,
) -> None:
    ablate(model, monkeypatch)
    sums, counts = nats_of_windows(model, summary["folder"])
    cost = ((sums - plain[0]).sum() / counts.sum()).item()
    # One text is a sample: the cost minus five standard errors, over windows, must still be enough.
    error = ((sums - plain[0]) / counts).std().item() / len(counts) ** 0.5
    print(f"{ablate.__name__}: {cost:.3f} nats/token, standard error {error:.3f}")
    assert cost - 5 * error >= least


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


def test_the_documentation_shows_this_output(summary: dict[str, Any]) -> None:
    """Its words; and the losses within what another processor changes. The sample's words are the processor's own."""
    page = (ROOT / "docs" / "training.md").read_text()
    shown = page.partition("\n```text\n")[2].partition("```\n")[0]
    stream = io.StringIO()
    renamed = json.loads(json.dumps(summary).replace(summary["folder"], "runs/tiny"))
    print_summary(Console(file=stream, width=80), renamed, None)
    printed = stream.getvalue()
    shown, _, command = shown.rstrip("\n").rpartition("\ntry ")
    program = ["moesmith", "generate", "runs/tiny/checkpoint", "--prompt", summary["sample"]["prompt"].splitlines()[0]]
    assert shlex.split(command)[:5] == program

    def words(text: str) -> list[str]:
        before, prompt, rest = text.partition(summary["sample"]["prompt"])
        after = rest.rpartition("\n\n")[2]
        return re.sub(r"[\d.,]*\d|[━─]+", "#", before + prompt + after).split()

    def losses(text: str) -> list[float]:
        rows = re.findall(r"^\W*(?:before|unigram|bigram|after)\b[^\d\n]*([\d.]+)\D+([\d.]+)\D*$", text, re.MULTILINE)
        return [float(number) for row in rows for number in row]

    assert words(printed) == words(shown)
    assert len(losses(shown)) == 8 and losses(printed)[:6] == pytest.approx(losses(shown)[:6], rel=1e-3)
    assert losses(printed) == pytest.approx(losses(shown), rel=0.03)
