"""Sampled completions against one pass over each sequence alone, in float64."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe
from moe.errors import ConfigError
from moe.recipes import rollout as module
from moe.recipes.rollout import Rollout, draw, rollout, sampled_logprobs
from moe.replay import recording
from tests.support.models import GROUPED, SMALL, noisy

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [7, 7]]
ENDS = (3, 40)


@pytest.fixture(params=[SMALL, GROUPED], ids=["mla", "gqa"], scope="module")
def model(request: Any) -> moe.Transformer:
    return noisy(request.param).double()


def sampled(model: moe.Transformer, **changes: Any) -> Rollout:
    settings: dict[str, Any] = dict(max_new_tokens=12, end_of_text=ENDS, group_size=3, temperature=1.3, seed=(1, 2))
    return rollout(model, PROMPTS, **settings | changes)


def real_tokens(found: Rollout, row: int) -> list[int]:
    """Prompt and completion of a sequence, without padding."""
    group = len(found.input_ids) // len(PROMPTS)
    completion = found.input_ids[row, found.prompt_length :][found.completion_mask[row]]
    return [*PROMPTS[row // group], *completion.tolist()]


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_scores_are_those_of_each_sequence_alone(model: moe.Transformer, temperature: float) -> None:
    found = sampled(model, temperature=temperature)
    lengths = set(found.lengths.tolist())
    assert len(lengths) > 3 and found.ended.any() and not found.ended.all()
    assert found.prompt_length == 5 and found.input_ids.shape[1] == 5 + max(lengths)
    assert found.routes is not None and found.routes.layers == ("layers.1.mlp.gate", "layers.2.mlp.gate")
    for row in range(12):
        tokens, new = real_tokens(found, row), int(found.lengths[row])
        prompt = len(tokens) - new
        with torch.no_grad(), recording(model) as alone:
            log_p = (model(torch.tensor([tokens])[:, :-1]).logits[0] / temperature).log_softmax(-1)
        expected = torch.stack([log_p[prompt - 1 + t, tokens[prompt + t]] for t in range(new)])
        torch.testing.assert_close(found.logprobs[row, :new], expected, rtol=1e-9, atol=1e-9)
        entropy = -(log_p.exp() * log_p).sum(-1)[prompt - 1 :]
        torch.testing.assert_close(found.entropy[row, :new], entropy, rtol=1e-9, atol=1e-9)
        mask = found.attention_mask[row]
        assert mask.tolist() == [False] * (5 - prompt) + [True] * (len(tokens) - 1) + [False] * (len(mask) - 4 - new)
        for layer, routing in enumerate(alone.values()):
            assert torch.equal(found.routes.expert_ids[layer, row][mask], routing.expert_ids)
            torch.testing.assert_close(found.routes.weights[layer, row][mask], routing.weights, rtol=1e-9, atol=1e-9)
            assert (found.routes.expert_ids[layer, row][~mask] == -1).all()
            assert (found.routes.weights[layer, row][~mask] == 0).all()


def test_everything_after_the_end_is_padding(model: moe.Transformer) -> None:
    found = sampled(model)
    ids = found.input_ids[:, found.prompt_length :]
    for row, (tokens, length) in enumerate(zip(ids.tolist(), found.lengths.tolist(), strict=True)):
        assert found.completion_mask[row].tolist() == [True] * length + [False] * (ids.shape[1] - length)
        ended = tokens[length - 1] in ENDS
        assert ended == bool(found.ended[row]) and (ended or length == 12)
        assert not set(tokens[: length - 1]) & set(ENDS) and set(tokens[length:]) <= {0}
        assert found.completions()[row] == tokens[: length - ended]
        for scores in (found.logprobs, found.entropy):
            assert (scores[row, length:] == 0).all() and (scores[row, :length] != 0).all()


def test_ended_sequences_leave_without_changing_the_others(
    model: moe.Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    with recording(model):
        hook = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        left = sampled(model)
        hook.remove()
    assert sizes[0] == len(PROMPTS) and sizes[1] <= 12 and sizes[-1] == int((left.lengths == 12).sum())
    monkeypatch.setattr(module, "SHRINK", 1e-9)  # never
    stayed = sampled(model)
    assert torch.equal(left.input_ids, stayed.input_ids) and torch.equal(left.attention_mask, stayed.attention_mask)
    torch.testing.assert_close(left.logprobs, stayed.logprobs, rtol=1e-9, atol=1e-9)
    assert left.routes is not None and stayed.routes is not None
    assert torch.equal(left.routes.expert_ids, stayed.routes.expert_ids)


def test_sampling_depends_on_the_seed_and_on_the_number_of_the_prompt(model: moe.Transformer) -> None:
    first, again, other = sampled(model), sampled(model), sampled(model, seed=(1, 3))
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.input_ids[:, :8], other.input_ids[:, :8])
    group = [real_tokens(first, row) for row in range(6, 9)]
    assert len({tuple(tokens) for tokens in group}) == 3
    later = rollout(
        model,
        PROMPTS[2:],
        max_new_tokens=12,
        end_of_text=ENDS,
        group_size=3,
        temperature=1.3,
        seed=(1, 2),
        first_prompt=2,
    )
    assert torch.equal(later.input_ids[:3, -later.lengths.max() :][:, 0], first.input_ids[6:9, 5])
    assert later.completions() == first.completions()[6:]


def test_greedy_completions_are_those_of_generate(model: moe.Transformer) -> None:
    found = rollout(model, PROMPTS, max_new_tokens=12, end_of_text=ENDS, temperature=0, record=False)
    assert found.routes is None
    for row, prompt in enumerate(PROMPTS):
        whole = moe.generate(model, torch.tensor([prompt]), max_new_tokens=12, eos_token_id=ENDS, speculative="off")
        assert real_tokens(found, row) == whole[0].tolist()


def test_random_numbers_choose_tokens_by_their_probabilities() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(200, 9, generator=g, dtype=torch.float64).pow(4)
    p[:, 4] = 0
    p /= p.sum(1, keepdim=True)
    uniform = torch.rand(200, generator=g, dtype=torch.float64)
    expected = [
        np.searchsorted(row.cumsum(0), u, side="right") for row, u in zip(p.numpy(), uniform.numpy(), strict=True)
    ]
    assert draw(p, uniform).tolist() == expected
    edges = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 4, dtype=torch.float64)
    numbers = torch.tensor([0.0, 0.5 - 2**-52, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(edges, numbers).tolist() == [1, 1, 3, 3]


def test_a_part_has_the_same_scores_and_no_empty_columns(model: moe.Transformer) -> None:
    found = sampled(model)
    rows = torch.tensor(sorted(range(3, 6), key=lambda row: -int(found.lengths[row])))  # of the shortest prompt
    part = found.select(rows)
    longest = int(found.lengths[rows].max())
    assert part.prompt_length == 1 and part.input_ids.shape == (3, 1 + longest)
    assert torch.equal(part.lengths, found.lengths[rows]) and part.completions() == [
        found.completions()[i] for i in rows
    ]
    for whole in (found, part):
        with torch.no_grad():
            logits = model(**whole.inputs, logits_to_keep=whole.completion_mask.shape[1]).logits
        torch.testing.assert_close(sampled_logprobs(logits, whole), whole.logprobs, rtol=1e-9, atol=1e-9)
    assert part.routes is not None and part.routes.expert_ids.shape[1:3] == part.attention_mask.shape
    assert torch.equal(part.routes.expert_ids[0] >= 0, part.attention_mask[:, :, None].expand(-1, -1, 3))


def test_the_results_can_be_trained_on_and_the_mode_is_restored(model: moe.Transformer) -> None:
    model.train()
    model.layers[1].eval()
    found = sampled(model)
    assert model.training and not model.layers[1].training
    tensors: list[Tensor] = [found.input_ids, found.attention_mask, found.logprobs, found.entropy]
    assert found.routes is not None
    assert not any(tensor.is_inference() for tensor in (*tensors, found.routes.expert_ids, found.routes.weights))
    logits = model(**found.inputs, logits_to_keep=found.completion_mask.shape[1]).logits
    sampled_logprobs(logits, found).sum().backward()
    model.zero_grad()


def test_completions_end_at_the_last_position() -> None:
    model = noisy(dataclasses.replace(SMALL, max_position_embeddings=8)).double()
    found = rollout(model, PROMPTS, max_new_tokens=12, end_of_text=())
    assert found.lengths.tolist() == [3] * 4 and not found.ended.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts = 0: expected one or more"),
        ({"prompts": [[1], []]}, "prompts = 'an empty one': expected one or more tokens in each"),
        ({"prompts": [[1] * 8]}, "prompts = '8 tokens': expected less than the model's 8 positions"),
        ({"prompts": [[1, 61]]}, "prompts = 'token 61': expected ids from 0 to 60"),
        ({"prompts": [[1, -1]]}, "prompts = 'token -1': expected ids from 0 to 60"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: expected 1 or more"),
        ({"group_size": 0}, "group_size = 0: expected 1 or more"),
        ({"temperature": -1.0}, "temperature = -1.0: expected a finite number of at least 0"),
        ({"temperature": float("inf")}, "temperature = inf: expected a finite number of at least 0"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    model = moe.Transformer(dataclasses.replace(SMALL, max_position_embeddings=8))
    arguments: dict[str, Any] = dict(prompts=[[1]], max_new_tokens=2, end_of_text=(0,)) | changes
    with pytest.raises(ConfigError) as caught:
        rollout(model, arguments.pop("prompts"), **arguments)
    assert str(caught.value) == message


def test_logits_that_are_not_finite() -> None:
    model = moe.Transformer(SMALL)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: the logits of sequence 0 contain NaN"):
        rollout(model, PROMPTS, max_new_tokens=2, end_of_text=(0,))
