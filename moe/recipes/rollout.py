"""Sampled completions of prompts, with everything that reinforcement learning needs to train on them.

N sequences, P prompt positions, T completion positions, G completions per prompt.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.cache import Cache
from moe.errors import ConfigError
from moe.generation import check_finite, eval_mode
from moe.model import Transformer
from moe.ops import Routing
from moe.replay import Routes, recording

SHRINK = 8  # a batch is copied without its ended sequences once they are at least this part of it
_ONE = 2**52  # probability 1 as an integer


@dataclass(frozen=True, eq=False)
class Rollout:
    """Completions of one batch. Sequence i * G + g is completion g of prompt i.

    Prompts are padded on the left and completions on the right, so every completion begins at position P. A completion
    ends with an end-of-text token, which belongs to it, or at T without one; what follows is padding.

    Attributes:
        input_ids: int64 [N, P + T], 0 for padding.
        attention_mask: bool [N, P + T - 1], for `model(input_ids[:, :-1])`: True for the tokens that the model has
            read. These are the prompt and the completion without its last token, from which nothing is sampled.
        completion_mask: bool [N, T], True for sampled tokens: element t belongs to token input_ids[:, P + t], which is
            predicted at position P + t - 1.
        logprobs: log-probabilities of the sampled tokens, float32 or float64 [N, T], 0 for padding. They are those of
            the distribution that was sampled from, so the temperature is included.
        entropy: entropy of that distribution in nats, like `logprobs`.
        ended: bool [N], whether the completion ended with an end-of-text token.
        temperature: temperature of `logprobs`.
        routes: routing at the positions of input_ids[:, :-1], -1 where attention_mask is False; None if not recorded.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    ended: Tensor
    temperature: float
    routes: Routes | None

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.completion_mask.shape[1]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model that give the logits of all sampled tokens at its last T positions."""
        return {"input_ids": self.input_ids[:, :-1], "attention_mask": self.attention_mask}

    @property
    def lengths(self) -> Tensor:
        """Number of sampled tokens of each completion, the end-of-text token included, int64 [N]."""
        return self.completion_mask.sum(1)

    def completions(self) -> list[list[int]]:
        """Return the sampled tokens of each completion, without the end-of-text token."""
        ids = self.input_ids[:, self.prompt_length :].tolist()
        lengths = (self.lengths - self.ended.long()).tolist()
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]

    def select(self, rows: Tensor) -> "Rollout":
        """Return the sequences `rows` (int64 indices), without columns that are padding in all of them."""
        mask = self.attention_mask.index_select(0, rows)
        completion = self.completion_mask.index_select(0, rows)
        longest = max(int(completion.sum(1).max()), 1)
        start = self.prompt_length - int(mask[:, : self.prompt_length].sum(1).max())
        end = self.prompt_length + longest

        def part(values: Tensor) -> Tensor:
            return values.index_select(0, rows)[:, :longest]

        return Rollout(
            input_ids=self.input_ids.index_select(0, rows)[:, start:end],
            attention_mask=mask[:, start : end - 1],
            completion_mask=completion[:, :longest],
            logprobs=part(self.logprobs),
            entropy=part(self.entropy),
            ended=self.ended.index_select(0, rows),
            temperature=self.temperature,
            routes=None if self.routes is None else self.routes.select(rows, slice(start, end - 1)),
        )


def rollout(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_of_text: Sequence[int],
    group_size: int = 1,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
    first_prompt: int = 0,
    record: bool = True,
) -> Rollout:
    """Sample `group_size` completions of each prompt, in eval mode and without speculative decoding.

    Each prompt is read once, whatever the group size. Ended sequences leave the batch. The random numbers of a
    completion depend only on the seed, the number of its prompt and its place in the group, so other sequences do not
    change it, up to rounding.

    On a mesh, all ranks make this call, with equal `max_new_tokens`; they sample until the last of them is done.

    Args:
        prompts: token ids of each prompt, one or more.
        max_new_tokens: T is at most this, and at most the number of positions that the longest prompt leaves.
        end_of_text: ids that end a completion.
        temperature: divides the logits; 0 selects the most likely token, and log-probabilities are then those of
            temperature 1.
        seed: non-negative integers.
        first_prompt: number of prompts[0], if another rank samples completions of the earlier prompts.
        record: whether to record the routing of a model with experts.

    Raises:
        ConfigError: no prompt, an empty prompt, a prompt that fills all positions, a token outside the vocabulary, or a
            number that is out of range.
        FloatingPointError: logits contain NaN or inf, or are all -inf; the message gives step (from 1) and sequence.
    """
    positions, longest = model.config.max_position_embeddings, max(map(len, prompts), default=0)
    for name, value, ok, allowed in (
        ("prompts", len(prompts), len(prompts) > 0, "one or more"),
        ("prompts", "an empty one", all(map(len, prompts)), "one or more tokens in each"),
        ("prompts", f"{longest} tokens", longest < positions, f"less than the model's {positions} positions"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("group_size", group_size, group_size >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "a finite number of at least 0"),
    ):
        if not ok:
            raise ConfigError(name, value, allowed)
    device = next(model.parameters()).device
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts], dtype=torch.int64)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in prompts])
    if int(ids.max()) >= model.config.vocab_size or int(ids.min()) < 0:
        wrong = min(int(ids.min()), 0) or int(ids.max())
        raise ConfigError("prompts", f"token {wrong}", f"ids from 0 to {model.config.vocab_size - 1}")
    limit, lockstep = min(max_new_tokens, positions - longest), model.global_batch.lockstep
    if lockstep and limit < max_new_tokens:
        raise ConfigError("max_new_tokens", max_new_tokens, f"at most {limit} after {longest} prompt tokens, on a mesh")
    count = len(prompts) * group_size
    generators = (np.random.default_rng([*seed, first_prompt + i]) for i in range(len(prompts)))
    numbers = [generator.random((limit, group_size)).T for generator in generators]
    uniform = torch.from_numpy(np.concatenate(numbers)).to(device)
    ids, mask = ids.to(device), mask.to(device)
    origin = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    # Made outside inference mode, because autograd cannot save inference tensors.
    tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
    scores = [torch.zeros(count, limit, dtype=_wide(model), device=device) for _ in range(2)]
    read: list[tuple[Tensor, Routing]] = []  # rows and routing of each decoding pass
    # FSDP keeps the tensors of its first pass for later ones, in which autograd needs them.
    without_gradients = torch.no_grad() if lockstep else torch.inference_mode()
    with without_gradients, eval_mode(model), recording(model) if record else nullcontext({}) as found:
        cache = Cache(model.config)
        logits = model(ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits[:, -1].index_select(0, origin)
        names, prefilled = tuple(found), _stacked(found)
        cache.select(origin)
        seen, rows = mask.index_select(0, origin), torch.arange(count, device=device)
        ended = torch.zeros(count, dtype=torch.bool, device=device)
        ends = torch.tensor(list(end_of_text), dtype=torch.int64, device=device)
        length = 0
        for step in range(limit):
            length = step + 1
            check_finite(logits, ended, length)
            log_p = log_probabilities(logits, temperature)
            p = log_p.exp()
            chosen = log_p.argmax(-1) if temperature == 0 else draw(p, uniform[rows, step])
            tokens[rows, step] = chosen
            scores[0][rows, step] = log_p.gather(-1, chosen[:, None]).squeeze(-1)
            scores[1][rows, step] = torch.special.entr(p).sum(-1)
            ended = ended | torch.isin(chosen, ends)
            going = left = len(ended) - int(ended.sum())
            if lockstep:
                left = int(model.global_batch.sum(torch.tensor([going], device=device), "end of sampling"))
            if left == 0 or length == limit:
                break
            if 0 < going <= len(ended) * (1 - 1 / SHRINK):
                kept = (~ended).nonzero().squeeze(1)
                rows, seen, chosen, ended = (each.index_select(0, kept) for each in (rows, seen, chosen, ended))
                cache.select(kept)
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            logits = model(chosen[:, None], attention_mask=seen, cache=cache).logits[:, -1]
            if found:
                read.append((rows, _stacked(found)))
    tokens, scores = tokens[:, :length], [each[:, :length] for each in scores]
    over = torch.isin(tokens, ends)
    before = over.cumsum(1) - over.long()  # end-of-text tokens before each position
    completion = before == 0
    attention = torch.cat((mask.index_select(0, origin), (completion & ~over)[:, :-1]), 1)
    return Rollout(
        input_ids=torch.cat((ids.masked_fill(~mask, 0).index_select(0, origin), tokens.masked_fill(~completion, 0)), 1),
        attention_mask=attention,
        completion_mask=completion,
        logprobs=scores[0].masked_fill(~completion, 0),
        entropy=scores[1].masked_fill(~completion, 0),
        ended=(over & completion).any(1),
        temperature=temperature,
        routes=_routes(names, prefilled, read, origin, attention) if names else None,
    )


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities [..., V], in float32 or wider, at a temperature; 0 counts as 1."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature in (0, 1) else wide / temperature).log_softmax(-1)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw token ids [B] from probabilities [B, V], by float64 numbers [B] that are uniform in [0, 1).

    Token v is drawn if the number is between the sums of the probabilities before v and up to v.
    """
    # In integers, because torch has no deterministic floating-point cumsum on a GPU.
    total = (p.double() * _ONE).long().cumsum(-1)
    at = (uniform * total[:, -1]).long().minimum(total[:, -1] - 1)
    return (total <= at[:, None]).sum(-1)


def sampled_logprobs(logits: Tensor, batch: Rollout) -> Tensor:
    """Return the log-probabilities [N, T] of the sampled tokens, 0 for padding, like `batch.logprobs`.

    Args:
        logits: [N, T, V], those of `model(**batch.inputs, logits_to_keep=T)`.
    """
    mask = batch.completion_mask
    sampled = batch.input_ids[:, batch.prompt_length :, None]
    log_p = log_probabilities(logits, batch.temperature).gather(-1, sampled).squeeze(-1)
    return log_p.masked_fill(~mask, 0)


def _wide(model: Transformer) -> torch.dtype:
    return torch.promote_types(model.embed_tokens.weight.dtype, torch.float32)


def _stacked(found: dict[str, Routing]) -> Any:
    """Return expert ids and weights of one pass, each [L, tokens, K]; None without routers."""
    if not found:
        return None
    return torch.stack([each.expert_ids for each in found.values()]), torch.stack([e.weights for e in found.values()])


def _routes(names: tuple[str, ...], prefilled: Any, read: list[Any], origin: Tensor, attention: Tensor) -> Routes:
    """Assemble the routing of the prompts and of each decoding pass."""
    parts: list[Tensor] = []
    prompts = int(origin[-1]) + 1
    for number, absent in ((0, -1), (1, 0)):
        whole = prefilled[number].unflatten(1, (prompts, -1)).index_select(1, origin)
        layers, count, length, k = whole.shape
        made = whole.new_full((layers, count, attention.shape[1], k), absent)
        made[:, :, :length] = whole
        for at, (rows, routing) in enumerate(read):
            made[:, rows, length + at] = routing[number]
        parts.append(made.masked_fill(~attention[None, :, :, None], absent))
    return Routes(names, *parts)
