"""Speculative decoding: tokens against plain decoding, drafts against MTP modules without caches, distributions."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe
from moe import generation, speculative
from moe.generation import _count, penalize, probabilities
from moe.model import Transformer
from moe.rope import rope_tables
from moe.sampling import Sampling
from moe.speculative import Draft, Drafter, Speculation, Statistics, measure_logit_difference, verify
from moe.uncast import Uncast
from tests.support.models import GROUPED, SMALL

WINDOWS = dataclasses.replace(
    GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 1 + ["sliding_attention"]
)
SINKS = dataclasses.replace(WINDOWS, attention_sinks=True, qk_norm="none")
CONFIGS = {
    "mla": SMALL,
    "mla, plain queries": dataclasses.replace(SMALL, q_lora_rank=None, rope_interleave=False),
    "grouped": GROUPED,
    "windows": WINDOWS,
    "sinks": SINKS,
}


def agreeing(config: moe.ModelConfig, modules: int, influence: float = 0.04, seed: int = 0) -> Transformer:
    """A float64 model whose MTP modules often predict its tokens: both depend mostly on the token before.

    The attention and MLPs of all blocks, and the hidden states that a module takes, have only some influence.
    """
    model = Transformer(dataclasses.replace(config, num_nextn_predict_layers=modules), seed=seed).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_(influence)
            if name.endswith("eh_proj.weight"):
                parameter[:, : config.hidden_size] = torch.eye(config.hidden_size)
                parameter[:, config.hidden_size :].mul_(influence)
    return model


def left_padded(lengths: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (len(lengths), max(lengths)))
    return ids, torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])


@pytest.mark.parametrize(
    ("name", "modules", "trial"), [*((name, 1 + 2 * (i % 2), 0) for i, name in enumerate(CONFIGS)), ("mla", 3, 8)]
)
def test_greedy_tokens_are_those_of_plain_decoding(
    name: str, modules: int, trial: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "TRIAL", trial)
    model = agreeing(CONFIGS[name], modules)
    statistics = Statistics()
    for lengths in ([6], [1], [2, 7, 4]):
        ids, mask = left_padded(lengths, 61)
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 24 + trial}
        plain = moe.generate(model, ids, speculative="off", **options)
        found = moe.generate(model, ids, speculative="on", statistics=statistics, **options)
        assert torch.equal(found, plain)
    assert 0 < statistics.accepted < statistics.drafted and not statistics.close_calls


@pytest.mark.parametrize("modules", [1, 2])
def test_ends_penalties_and_positions_are_those_of_plain_decoding(
    modules: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "TRIAL", 0)
    model = agreeing(dataclasses.replace(SMALL, max_position_embeddings=40), modules)
    ids, mask = left_padded([3, 6, 5], 61)
    free = moe.generate(model, ids, max_new_tokens=20, attention_mask=mask, speculative="off")[:, 6:]
    accepted = 0
    for ends in (
        int(free[0, 4]),
        [int(free[1, 9]), int(free[2, 2])],
        [int(free[0, 3]), int(free[1, 5]), int(free[2, 8])],
    ):
        for rows in ([0, 1, 2], [1]):
            for penalty in (1.0, 1.7):
                options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": ends, "repetition_penalty": penalty}
                options["attention_mask"] = mask[rows]
                statistics = Statistics()
                plain = moe.generate(model, ids[rows], speculative="off", **options)
                found = moe.generate(model, ids[rows], speculative="on", statistics=statistics, **options)
                assert torch.equal(found, plain)
                accepted += statistics.accepted
    assert accepted > 10
    for new in range(1, 7):  # a draft past the last token would be computed for nothing
        statistics = Statistics()
        found = moe.generate(model, ids, max_new_tokens=new, speculative="on", statistics=statistics)
        assert torch.equal(found, moe.generate(model, ids, max_new_tokens=new, speculative="off"))
        assert statistics.drafted <= max(new - 2, 0) * modules
    with pytest.warns(
        UserWarning, match=r"^generation stopped after 34 of 50 new tokens: with a prompt of 6, all 40 pos"
    ):
        found = moe.generate(model, ids, max_new_tokens=50, speculative="on")
    assert torch.equal(found, moe.generate(model, ids, max_new_tokens=34, speculative="off"))


def logits_without_cache(model: Transformer, ids: Tensor, mask: Tensor, drafts: list[Tensor]) -> Tensor:
    """Logits [B, V] of the next draft by MTP modules that run over whole sequences, one sequence at a time."""
    found = []
    for row, real in zip(torch.cat((ids, *drafts), dim=1), mask, strict=True):
        n = int(real.sum())
        tokens = row[ids.shape[1] - n :][None]  # without padding: rotary attention depends on distances alone
        h = model(tokens[:, : n - 1]).hidden
        for k in range(len(drafts) + 1):
            rope = Uncast(
                *rope_tables(model.config.rope_parameters, model.config.rope_dim, torch.arange(n - 1)[None], h.dtype)
            )
            h, _ = model.mtp[k](h, model.embed_tokens(tokens[:, k + 1 : n + k]), rope, None, None)
        found.append(model.head(h[:, -1]))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["mla", "windows"])
def test_drafts_are_those_of_modules_over_the_whole_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that keep what only accepted tokens decided, element by element, after acceptances and rejections."""
    monkeypatch.setattr(speculative, "TRIAL", 0)
    model = agreeing(CONFIGS[name], 3)
    rounds: list[tuple[Tensor, Tensor, list[Tensor], list[Draft]]] = []
    draft = Drafter.draft

    def record(self: Drafter, ids: Tensor, hidden: Tensor, mask: Tensor, count: int, choose: Callable) -> list[Draft]:
        logits: list[Tensor] = []

        def keep(found: Tensor) -> Draft:
            logits.append(found.clone())
            return choose(found)

        drafts = draft(self, ids, hidden, mask, count, keep)
        rounds.append((ids, mask, logits, drafts))
        return drafts

    monkeypatch.setattr(Drafter, "draft", record)
    statistics = Statistics()
    for lengths in ([1], [2, 6, 3]):
        rounds.clear()
        ids, mask = left_padded(lengths, 61)
        moe.generate(model, ids, max_new_tokens=20, attention_mask=mask, speculative="on", statistics=statistics)
        assert len(rounds) > 5
        for known, real, logits, drafts in rounds:
            tokens = [draft.token[:, None] for draft in drafts]
            for k, found in enumerate(logits):
                expected = logits_without_cache(model, known, real, tokens[:k])
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert 0 < statistics.accepted < statistics.drafted


def steps_and_logits(model: Transformer, ids: Tensor, new: int, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens, and the logits [new, V] that decided them."""
    found: list[Tensor] = []
    forward = Transformer.forward

    def record(self: Transformer, input_ids: Tensor, **options: Any) -> Any:
        out = forward(self, input_ids, **options)
        start = options["cache"].length - out.logits.shape[1] + 1 - ids.shape[1]  # of the first token they decide
        del found[start:]
        found.extend(out.logits[0])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformer, "forward", record)
        tokens = moe.generate(model, ids, max_new_tokens=new, **options)[0, ids.shape[1] :]
    return tokens, torch.stack(found[:new]).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_differ_only_where_the_best_two_logits_are_close(dtype: torch.dtype) -> None:
    """Up to the first difference, both ways have the same text, and there the logits decide. Positions are printed."""
    accepted = 0
    for seed in range(4):
        model = agreeing(GROUPED, 1, influence=0.1 + 0.2 * (seed % 2), seed=seed).to(dtype)
        ids, statistics = torch.randint(0, 61, (1, 5)), Statistics()
        plain, logits = steps_and_logits(model, ids, 60, speculative="off")
        found, others = steps_and_logits(model, ids, 60, speculative="on", statistics=statistics)
        assert torch.equal(logits.argmax(-1), plain) and torch.equal(others.argmax(-1), found)
        accepted += statistics.accepted
        for first in (plain != found).nonzero().flatten().tolist()[:1]:
            best, difference = logits[first].topk(2).values, (logits[first] - others[first]).abs().max()
            print(f"{dtype}, seed {seed}: token {first}, gap {best[0] - best[1]:.2e}, difference {difference:.2e}")
            assert best[0] - best[1] <= 2 * difference
    assert accepted


def test_the_difference_of_logits_is_the_largest_one() -> None:
    model, (ids, mask) = agreeing(SMALL, 1), left_padded([12, 9], 61)
    cache = moe.cache.Cache(model.config)
    with torch.no_grad():
        logits = model(ids[:, :11], attention_mask=mask[:, :11], cache=cache).logits[:, 3:]
        options = {"mask": mask.bool(), "size": 3}
        assert measure_logit_difference(model, cache, ids, logits, **options) < 1e-12
        assert cache.length == 11
        logits[1, 7, 5] += 0.25
        logits[0, 0, 2] -= 0.125
        assert measure_logit_difference(model, cache, ids, logits, **options) == pytest.approx(0.25)


def test_what_is_a_close_call() -> None:
    """A lead of at most twice the measured difference, or twice the rounding of a logit that is larger."""
    statistics = Statistics()
    speculation = Speculation(agreeing(SMALL, 1), statistics, auto=False)
    rows = torch.tensor([[3.0, 1.0, 2.8125], [3.0, 1.0, 2.75], [1.0, 1.0, 1.0], [64.0, 65.0, 0.0]]).bfloat16()
    logits, ended = F.pad(rows, (0, 58), value=-9.0), torch.tensor([False, False, True, False])
    speculation.note_close_calls(logits, ended, 0, 1.0)
    assert not statistics.close_calls  # so far, all passes were those of plain decoding
    for _ in range(9):
        hidden = torch.zeros(4, 1, 24, dtype=torch.float64)
        speculation.record(hidden, logits[:, None], drafted=0, accepted=0, new=1, seconds=0.0)
    cache, ids = moe.cache.Cache(speculation.model.config), torch.zeros(4, 10, dtype=torch.int64)
    speculation.model(ids[:, :9], cache=cache)
    speculation.draft(ids, None, cache, 1, lambda found: Draft(found.argmax(dim=-1), None))
    assert statistics.logit_difference > 1  # these logits are not the model's
    for difference, scale, expected in ((0.1, 1.0, [0, 3]), (0.1, 1.3, [0, 1, 3]), (0.0, 1.0, [3])):
        statistics.close_calls.clear()
        statistics.logit_difference = difference
        speculation.note_close_calls(logits, ended, 7, scale)
        assert statistics.close_calls == [(row, 7) for row in expected]


def test_the_rejection_rule_keeps_the_distribution() -> None:
    """Frequencies of 400,000 tokens, for drafts from a distribution that lacks some tokens and prefers others."""
    p = torch.tensor([0.35, 0.0, 0.05, 0.4, 0.2])
    q = torch.tensor([0.1, 0.3, 0.0, 0.45, 0.15])
    generator = torch.Generator().manual_seed(0)
    n = 400_000
    drafted = torch.multinomial(q, n, replacement=True, generator=generator)
    draft = Draft(drafted, q.expand(n, -1))
    found = verify(draft, p.expand(n, -1), generator)
    observed = found.bincount(minlength=5) / n
    assert observed[1] == 0 and (observed - p).abs().max() < 0.005
    assert (found == drafted).double().mean().item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=0.005)
    same = verify(Draft(drafted, q.expand(n, -1)), q.expand(n, -1), generator)
    assert torch.equal(same, drafted)


RULES = ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.5})
NEW = 4  # tokens of a sample: one from the prompt, two drafts, and one more
SHORT = dataclasses.replace(SMALL, vocab_size=3, hidden_size=3, num_hidden_layers=1, num_nextn_predict_layers=2)


class Guess(torch.nn.Module):
    """An MTP module that passes the embedding of the last token to the head."""

    def forward(self, h: Tensor, embedding: Tensor, *_: Any) -> tuple[Tensor, None]:
        return embedding, None


class Chain(Transformer):
    """A Markov chain of three tokens; its MTP modules predict the next token by other probabilities."""

    def __init__(self) -> None:
        super().__init__(SHORT)
        assert self.lm_head is not None
        draw = torch.Generator().manual_seed(1)
        self.table = 1.5 * torch.randn(3, 3, generator=draw)
        self.embed_tokens.weight.data = torch.eye(3)
        self.lm_head.weight.data = (self.table + 3 * torch.randn(3, 3, generator=draw)).T
        self.mtp = torch.nn.ModuleList([Guess(), Guess()])

    def forward(self, input_ids: Tensor, *, cache: Any = None, logits_to_keep: int = 0, **_: Any) -> moe.output.Output:
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return moe.output.Output(
            logits=self.table[input_ids[:, -logits_to_keep:]], hidden=torch.zeros(*input_ids.shape, 3)
        )


def exact_distribution(model: Transformer, prompt: Tensor, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of each continuation, from the logits of every prefix."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NEW):
        ids = torch.tensor([[*prompt[0].tolist(), *prefix] for prefix in known])
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        if sampling.repetition_penalty != 1:
            logits = penalize(logits, _count(ids, None, 3), sampling.repetition_penalty)
        p = probabilities(logits, sampling).tolist()
        known = {
            (*prefix, token): before * p[row][token]
            for row, (prefix, before) in enumerate(known.items())
            for token in range(3)
        }
    return known


def surprise(model: Transformer, rules: dict[str, float], batch: int, samples: int) -> float:
    """Chi-square of sampled continuations, in standard deviations above its mean."""
    prompt = torch.tensor([[0, 2, 1]])
    expected = exact_distribution(model, prompt, Sampling(**rules))  # pyright: ignore[reportArgumentType]
    counts: Counter[tuple[int, ...]] = Counter()
    statistics = Statistics()
    for seed in range(samples // batch):
        options: dict[str, Any] = {"max_new_tokens": NEW, "seed": seed, "statistics": statistics, **rules}
        rows = moe.generate(model, prompt.repeat(batch, 1), speculative="on", **options)
        counts.update(tuple(row) for row in rows[:, 3:].tolist())
    total = sum(counts.values())
    assert statistics.passes > samples // batch / 2
    assert all(expected[outcome] > 0 for outcome in counts)
    frequent = {outcome: p for outcome, p in expected.items() if p * total >= 5}
    rest = max(1 - sum(frequent.values()), 0.0)
    cells = [(counts[outcome], p * total) for outcome, p in frequent.items()]
    if rest * total >= 5:
        cells.append((total - sum(counts[outcome] for outcome in frequent), rest * total))
    freedom = len(cells) - 1
    assert freedom >= 10
    return (sum((n - m) ** 2 / m for n, m in cells) - freedom) / math.sqrt(2 * freedom)


def always_accept(draft: Draft, p: Tensor, generator: torch.Generator) -> Tensor:
    return draft.token


def resample_from_p(draft: Draft, p: Tensor, generator: torch.Generator) -> Tensor:
    """The rejection rule, except that a rejected draft is replaced by a token from p."""
    assert draft.probabilities is not None
    x = draft.token[:, None]
    u = torch.rand(x.shape, generator=generator)
    accepted = u * draft.probabilities.gather(1, x) < p.gather(1, x)
    return torch.where(accepted, x, torch.multinomial(p, 1, generator=generator))[:, 0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_samples_have_the_distribution_of_the_model(
    rules: dict[str, float], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "TRIAL", 0)
    assert abs(surprise(Chain(), rules, batch, 900)) < 4


def test_samples_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "TRIAL", 0)
    model = Transformer(dataclasses.replace(SHORT, hidden_size=24, initializer_range=0.5), seed=4).eval()
    assert abs(surprise(model, RULES[0], 1, 300)) < 4


@pytest.mark.parametrize("wrong", [always_accept, resample_from_p])
def test_a_wrong_rule_has_another_distribution(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "TRIAL", 0)
    monkeypatch.setattr(generation, "verify", wrong)
    assert surprise(Chain(), RULES[1], 1, 600) > 8


def test_sampling_with_a_seed_is_reproducible_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = agreeing(dataclasses.replace(SMALL, num_hidden_layers=1), 1)
    ids = torch.randint(0, 61, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 64, "temperature": 0.9, "seed": 4}
    first, second = (moe.generate(model, ids, speculative="on", **options) for _ in range(2))
    assert torch.equal(first, second)
    statistics = Statistics()
    auto = moe.generate(model, ids, statistics=statistics, **options)
    assert torch.equal(auto, moe.generate(model, ids, speculative="off", **options)) and statistics == Statistics()


def test_drafts_that_are_accepted_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which each module repeats it, so that all drafts are accepted, up to the one that ends the text."""
    monkeypatch.setattr(speculative, "TRIAL", 0)
    model = agreeing(SMALL, 3, influence=0.0)
    ids = torch.randint(0, 61, (1, 5))
    plain = moe.generate(model, ids, max_new_tokens=21, speculative="off")
    statistics = Statistics()
    assert torch.equal(moe.generate(model, ids, max_new_tokens=21, speculative="on", statistics=statistics), plain)
    assert (statistics.passes, statistics.drafted, statistics.accepted, statistics.tokens) == (5, 15, 15, 20)
    new = plain[0, 5:].tolist()
    end = next(token for token in new if 1 <= new.index(token) % 4 < 3)
    passes, last = 1 + new.index(end) // 4, (new.index(end) - 1) % 4
    statistics = Statistics()
    options: dict[str, Any] = {"max_new_tokens": 21, "eos_token_id": end, "statistics": statistics}
    assert moe.generate(model, ids, speculative="on", **options).tolist() == [plain[0, : 6 + new.index(end)].tolist()]
    assert (statistics.passes, statistics.accepted) == (passes, 3 * (passes - 1) + last + 1)


@pytest.mark.parametrize("faster", [False, True])
def test_drafting_continues_only_if_it_is_faster(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock by which a pass takes its number of tokens to the power of 0.1 or 2."""
    model, now, forward = agreeing(SMALL, 1), [0.0], Transformer.forward

    def timed(self: Transformer, input_ids: Tensor, **options: Any) -> Any:
        now[0] += input_ids.shape[1] ** (0.1 if faster else 2.0)
        return forward(self, input_ids, **options)

    monkeypatch.setattr(Transformer, "forward", timed)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    ids, statistics = torch.randint(0, 61, (1, 5)), Statistics()
    found = moe.generate(model, ids, max_new_tokens=100, statistics=statistics)
    assert torch.equal(found, moe.generate(model, ids, max_new_tokens=100, speculative="off"))
    assert statistics.turned_off == (not faster) == (statistics.passes == 9) and statistics.passes >= 9
    assert statistics.plain_speed == pytest.approx(1)
    assert (statistics.speed > 1) == faster and 1 < statistics.tokens_per_pass < 2
    short = Statistics()
    moe.generate(model, ids, max_new_tokens=63, statistics=short)
    assert short == Statistics()


def test_unusable_drafts_change_nothing() -> None:
    model = agreeing(SMALL, 1)
    ids = torch.randint(0, 61, (2, 5))
    plain = moe.generate(model, ids, max_new_tokens=30, speculative="off")
    model.get_submodule("mtp.0.norm").get_parameter("weight").data.fill_(math.nan)
    assert torch.equal(moe.generate(model, ids, max_new_tokens=30, speculative="on"), plain)
    assert moe.generate(model, ids, max_new_tokens=30, speculative="on", temperature=0.8).shape == (2, 35)


def test_what_is_refused() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(moe.ConfigError, match=r"^speculative = 'on': expected a model with multi-token .* found none$"):
        moe.generate(Transformer(SMALL), ids, max_new_tokens=2, speculative="on")
    model = agreeing(dataclasses.replace(SMALL, num_hidden_layers=1), 1)
    with pytest.raises(moe.ConfigError, match=r"^speculative = 'yes': expected one of auto, on, off$"):
        moe.generate(model, ids, max_new_tokens=2, speculative="yes")  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        empty = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(moe.ConfigError, match=r"^speculative = 'on': expected 'off' for tensors without values"):
        moe.generate(model.to("meta"), empty, max_new_tokens=2, speculative="on")
    assert moe.generate(model, empty, max_new_tokens=64).shape == (1, 67)
