"""Generation against transformers, against the definition of each sampling rule, and over ragged batches."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import moe
from moe.generation import _count, penalize, rank, sample, stream
from moe.model import Transformer
from moe.sampling import Sampling
from tests.support.models import GROUPED, SMALL


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


RULES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 2.5, "min_p": 0.2},  # min_p after the temperature: before it, others would be left
    {"temperature": 1.7, "top_k": 20, "top_p": 0.7},
    {"temperature": 0.6, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 30, "min_p": 0.03, "repetition_penalty": 0.7},
    {"repetition_penalty": 1.8},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1e-3, "top_p": 0.5, "min_p": 0.5},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules_and_their_order_are_those_of_transformers(rules: dict[str, Any]) -> None:
    """Logits of a ragged batch against the processors that transformers' generate builds."""
    transformers = pytest.importorskip("transformers")
    sampling = Sampling(**rules)
    torch.manual_seed(3)
    logits = 4 * torch.randn(5, 61)
    ids, mask = torch.randint(0, 61, (5, 9)), torch.ones(5, 9, dtype=torch.bool)
    for row in range(5):
        mask[row, : 2 * row] = False
    ids[3, 0] = ids[3, 8]  # padding that has the id of a real token
    config = transformers.GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
    )
    theirs = transformers.MixtralForCausalLM(tiny_mixtral(transformers))
    processors = theirs._get_logits_processor(config, 9, model_kwargs={}, device="cpu")
    assert len(processors) == sum(rules[name] != default for name, default in DEFAULTS.items() if name in rules)
    # Each row without its padding, to which older releases apply the penalty, too.
    expected = torch.cat([processors(ids[row, mask[row]][None], logits[row][None]) for row in range(5)])

    found = logits
    if sampling.repetition_penalty != 1:
        found = penalize(logits, _count(ids, mask, 61), sampling.repetition_penalty)
    if sampling.temperature == 0:
        torch.testing.assert_close(found, expected)
        return
    ranked, order = rank(found, sampling)
    found = torch.empty_like(ranked).scatter_(1, order, ranked)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found.softmax(1), expected.softmax(1))


DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def tiny_mixtral(transformers: Any) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.MixtralConfig(vocab_size=61, num_hidden_layers=1, num_local_experts=2, **sizes)


def test_a_penalty_counts_the_prompt_and_what_is_new() -> None:
    model = Transformer(SMALL).double().eval()
    prompts = [torch.randint(0, 61, (1, n)) for n in (2, 5)]
    expected = []
    for ids in prompts:
        for _ in range(30):
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
            for token in set(ids[0].tolist()):
                logits[0, token] = logits[0, token] * 1.5 if logits[0, token] < 0 else logits[0, token] / 1.5
            ids = torch.cat((ids, logits.argmax(1, keepdim=True)), 1)
        expected.append(ids[0, -30:])
    batch, mask = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    batch[0, 3:], batch[1] = prompts[0][0], prompts[1][0]
    found = moe.generate(model, batch, max_new_tokens=30, attention_mask=mask, repetition_penalty=1.5)
    assert torch.equal(found[:, 5:], torch.stack(expected))
    assert not torch.equal(found, moe.generate(model, batch, max_new_tokens=30, attention_mask=mask))


def test_rows_end_at_different_ids() -> None:
    model = Transformer(SMALL).double().eval()
    ids = torch.randint(0, 61, (3, 4))
    free = moe.generate(model, ids, max_new_tokens=12)[:, 4:]
    chosen = [int(free[0, 2]), int(free[1, 5])]
    ended = moe.generate(model, ids, max_new_tokens=12, eos_token_id=chosen)[:, 4:]
    for row, expected in zip(ended.tolist(), free.tolist(), strict=True):
        end = next((i for i, token in enumerate(expected) if token in chosen), len(expected))
        assert row == (expected[: end + 1] + [chosen[0]] * 12)[: len(row)]
    assert (ended == chosen[0]).any() and (ended == chosen[1]).any()


def test_a_text_ends_with_the_positions() -> None:
    model = Transformer(dataclasses.replace(SMALL, max_position_embeddings=12)).double().eval()
    ids = torch.randint(0, 61, (2, 9))
    exact = moe.generate(model, ids, max_new_tokens=3)
    assert exact.shape == (2, 12)
    with pytest.warns(
        UserWarning, match="^generation stopped after 3 of 4 new tokens: with a prompt of 9, all 12 positions"
    ):
        assert torch.equal(moe.generate(model, ids, max_new_tokens=4), exact)
    # Nothing to say where the texts ended by themselves.
    early = moe.generate(model, ids[:1], max_new_tokens=9, eos_token_id=int(exact[0, 10]))
    assert early.shape[1] <= 11
    for length in (12, 13, 40):
        with pytest.raises(ValueError, match=f"input_ids has {length} tokens: expected fewer than the model's 12 pos"):
            moe.generate(model, torch.zeros(1, length, dtype=torch.int64), max_new_tokens=1)
    assert moe.generate(model, ids.repeat(1, 2), max_new_tokens=0).shape == (2, 18)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (lambda v: v.index_fill(1, torch.tensor([7]), torch.nan), "contain NaN"),
        (lambda v: torch.full_like(v, -torch.inf), "are all -inf"),
        (lambda v: v.index_fill(1, torch.tensor([7]), torch.inf), "contain inf"),
    ],
)
def test_logits_that_are_not_numbers(temperature: float, bad: Any, found: str) -> None:
    model = Transformer(SMALL).eval()
    assert model.lm_head is not None
    calls = []

    def spoil(_: Any, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return torch.cat((output[:1], bad(output[1].clone())[None], output[2:])) if len(calls) == 3 else output

    model.lm_head.register_forward_hook(spoil)
    ids = torch.randint(0, 61, (3, 4))
    with pytest.raises(
        FloatingPointError, match=f"^step 3: the logits of sequence 1 {found}; expected finite numbers$"
    ):
        moe.generate(model, ids, max_new_tokens=5, temperature=temperature)
    # One that has ended no longer matters.
    calls.clear()
    first = int(moe.generate(model, ids, max_new_tokens=1)[1, 4])
    calls.clear()
    ended = moe.generate(model, ids, max_new_tokens=5, eos_token_id=first)
    assert ended.shape == (3, 9) and ended[1, 4:].tolist() == [first] * 5


def test_some_logits_may_be_excluded() -> None:
    model = Transformer(SMALL).eval()
    assert model.lm_head is not None
    model.lm_head.register_forward_hook(lambda _, inputs, output: output.index_fill(2, torch.arange(60), -torch.inf))
    ids = torch.randint(0, 61, (1, 4))
    for temperature in (0.0, 1.0):
        assert moe.generate(model, ids, max_new_tokens=3, temperature=temperature)[0, 4:].tolist() == [60] * 3


def test_generate_takes_our_models() -> None:
    with pytest.raises(TypeError, match=r"model is a Linear: expected a moe\.Transformer"):
        moe.generate(torch.nn.Linear(2, 2), torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=1)  # pyright: ignore[reportArgumentType]
