"""Generation against transformers, against the definition of each sampling rule, and over ragged batches."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import moe
from moe.generation import sample, stream
from moe.model import Transformer
from moe.sampling import Sampling
from tests.test_model import GROUPED, SMALL


def greedy_without_cache(model: Transformer, ids: Tensor, steps: int) -> tuple[Tensor, float]:
    """The plain definition, and the smallest gap between the two best logits on the way."""
    gap = float("inf")
    for _ in range(steps):
        with torch.no_grad():
            best = model(ids).logits[:, -1].topk(2)
        gap = min(gap, (best.values[:, 0] - best.values[:, 1]).min().item())
        ids = torch.cat((ids, best.indices[:, :1]), 1)
    return ids, gap


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, q_lora_rank=None), GROUPED])
def test_greedy_is_the_definition_token_for_token(config: moe.ModelConfig) -> None:
    model = Transformer(config).double().eval()
    ids = torch.randint(0, 61, (3, 7))
    expected, gap = greedy_without_cache(model, ids, 24)
    assert gap > 1e-9  # far above float64's rounding here: a tie would decide nothing
    assert torch.equal(moe.generate(model, ids, max_new_tokens=24), expected)
    assert len(expected.unique()) > 5


def test_ragged_prompts_give_what_each_gives_alone() -> None:
    model = Transformer(SMALL).double().eval()
    prompts = [torch.randint(0, 61, (1, n)) for n in (3, 9, 1, 6)]
    alone = [moe.generate(model, p, max_new_tokens=12)[0, p.shape[1] :] for p in prompts]
    batch, mask = torch.zeros(4, 9, dtype=torch.int64), torch.zeros(4, 9, dtype=torch.int64)
    for row, p in enumerate(prompts):
        batch[row, 9 - p.shape[1] :], mask[row, 9 - p.shape[1] :] = p, 1
    together = moe.generate(model, batch, max_new_tokens=12, attention_mask=mask)
    assert torch.equal(together[:, 9:], torch.stack(alone))


def test_a_prompt_fed_in_one_go_or_streamed() -> None:
    model = Transformer(SMALL).eval()
    ids = torch.randint(0, 61, (2, 5))
    whole = moe.generate(model, ids, max_new_tokens=6, temperature=0.8, top_k=9, top_p=0.9, seed=5)
    steps = list(stream(model, ids, Sampling(0.8, 9, 0.9), max_new_tokens=6, seed=5))
    assert torch.equal(whole[:, 5:], torch.stack(steps, 1))
    assert torch.equal(whole[:, :5], ids)
    other = moe.generate(model, ids, max_new_tokens=6, temperature=0.8, top_k=9, top_p=0.9, seed=6)
    assert not torch.equal(whole, other)
    assert torch.equal(moe.generate(model, ids, max_new_tokens=0), ids)


def test_eos_ends_a_sequence_and_then_the_batch() -> None:
    model = Transformer(SMALL).double().eval()
    ids = torch.randint(0, 61, (2, 4))
    free = moe.generate(model, ids, max_new_tokens=10)
    eos = int(free[0, 6])
    ended = moe.generate(model, ids, max_new_tokens=10, eos_token_id=eos)
    first = (free[0, 4:] == eos).nonzero()[0].item() + 4
    assert torch.equal(ended[0, : first + 1], free[0, : first + 1])
    assert (ended[0, first:] == eos).all()
    alone = moe.generate(model, ids[:1], max_new_tokens=10, eos_token_id=eos)
    assert alone.shape[1] == first + 1  # nothing is computed once all have ended


def test_any_of_several_ids_ends_a_sequence() -> None:
    model = Transformer(SMALL).double().eval()
    ids = torch.randint(0, 61, (1, 4))
    free = moe.generate(model, ids, max_new_tokens=10)
    drawn = free[0, 4:].tolist()
    other = next(i for i in range(61) if i not in drawn)
    ended = moe.generate(model, ids, max_new_tokens=10, eos_token_id=[other, drawn[5]])
    assert torch.equal(ended, free[:, : 4 + drawn.index(drawn[5]) + 1])
    assert torch.equal(moe.generate(model, ids, max_new_tokens=10, eos_token_id=[]), free)
    two = moe.generate(model, ids.repeat(2, 1), max_new_tokens=10, eos_token_id=[other, drawn[5]])
    assert torch.equal(two[0], two[1]) and torch.equal(two[:1], ended)


def test_an_ended_row_stays_ended_while_others_go_on() -> None:
    model = Transformer(SMALL).double().eval()
    ids = torch.randint(0, 61, (6, 4))
    free = moe.generate(model, ids, max_new_tokens=14)
    # An id that one row draws early, then follows with another, while some other row draws none.
    for eos in range(61):
        hits = free[:, 4:] == eos
        ended_early = hits[:, :6].any(1) & ((hits.cumsum(1) > 0) & ~hits).any(1)
        if ended_early.any() and not hits.any(1).all():
            break
    else:
        pytest.fail("no such id: change the prompts")
    ended = moe.generate(model, ids, max_new_tokens=14, eos_token_id=eos)
    assert ended.shape == free.shape
    after = (free[:, 4:] == eos).cumsum(1) > 0
    assert torch.equal(ended[:, 4:], free[:, 4:].masked_fill(after, eos))


def test_training_mode_is_as_it_was_between_steps_and_after() -> None:
    model = Transformer(SMALL).train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    ids = torch.zeros(1, 2, dtype=torch.int64)
    steps = [stream(model, ids, Sampling(), max_new_tokens=3) for _ in range(2)]
    for _ in range(3):
        for step in steps:  # two streams at once
            next(step)
            assert [module.training for module in model.modules()] == before


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, Sampling(1e-39), None).item() == 1


def distribution(logits: Tensor, **options: Any) -> Tensor:
    """Observed frequencies of 20,000 draws."""
    sampling = Sampling(**{"temperature": 1.0, **options})
    draws = sample(logits.expand(20_000, -1), sampling, torch.Generator().manual_seed(0))
    return draws.bincount(minlength=logits.shape[0]) / 20_000


def test_sampling_follows_its_rules() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = p.log()
    assert (distribution(logits) - p).abs().max() < 0.015
    sharp = p.square() / p.square().sum()
    assert (distribution(logits, temperature=0.5) - sharp).abs().max() < 0.015
    assert (distribution(logits, top_k=2) - torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65).abs().max() < 0.015
    # 0.4 + 0.25 < 0.7 <= 0.4 + 0.25 + 0.2
    assert (distribution(logits, top_p=0.7) - torch.tensor([0, 0.4, 0, 0.25, 0.2]) / 0.85).abs().max() < 0.015
    assert distribution(logits, top_p=1e-6)[1] == 1
    assert distribution(logits, top_k=1)[1] == 1
    ties = torch.tensor([0.0, 1.0, 1.0])
    assert distribution(ties, top_k=1)[1] == 1  # the lower id among equals
    assert sample(ties[None], Sampling(), None).item() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"min_p": 1.1}, "min_p = 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding on the left only"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padding on the left only"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "padding on the left only"),
    ],
)
def test_bad_requests_are_refused(options: dict, message: str) -> None:
    model = Transformer(SMALL)
    with pytest.raises(ValueError, match=message):
        moe.generate(model, torch.zeros(1, 3, dtype=torch.int64), **{"max_new_tokens": 1, **options})
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 0\)"):
        moe.generate(model, torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=1)
