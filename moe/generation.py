"""Text generation: prefill, decode and sampling. The public function is `moe.generate`."""

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.cache import Cache
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.model import Transformer, check_input_ids
from moe.ops.library import has_values
from moe.sampling import Sampling, Speculative
from moe.speculative import TRIAL, Draft, Speculation, Statistics, verify


def generate(
    model: Transformer,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    speculative: Speculative = "auto",
    statistics: Statistics | None = None,
) -> Tensor:
    """Continue each sequence: int64 [B, S] -> [B, S + new], new <= max_new_tokens.

    Generation stops at the model's last position (`max_position_embeddings`), prompt and padding included. It warns
    if that is before max_new_tokens and before all sequences have ended.

    Args:
        input_ids: prompts, padded on the left with any id to equal length.
        attention_mask: [B, S], zero for padding.
        temperature: divides the logits; 0 selects the most likely token (the lowest id among equals).
        top_k: sample from the k most likely tokens; 0 for all.
        top_p: sample from the smallest set of most likely tokens whose total probability is at least top_p.
        min_p: sample from tokens that are at least min_p times as likely as the most likely one; 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that are already in the sequence
            or its prompt, before all other rules; 1 for none.
        seed: random seed of sampling, for reproducible output; None uses the global generator.
        eos_token_id: one or several ids that end a sequence; later positions repeat the (first) id, and generation
            stops when all sequences have ended. Not supported on a mesh, where ranks must run equally many steps.
        speculative: "on" drafts tokens with the MTP modules, one per module, and verifies them in one pass, after eight
            passes without drafts. Greedy tokens are those of plain decoding, up to rounding (see
            `moe.speculative.Statistics.close_calls`). Sampled tokens have the same distribution, but use other random
            numbers. Sequences of a batch advance together, by the drafts that all of them accept. "off" is plain
            decoding. "auto" times the first passes of each generation without and with drafts, and continues the faster
            way. It is plain decoding without MTP modules, for fewer than 64 new tokens, for sampling with a seed (whose
            tokens must not depend on time), and in a distributed job.
        statistics: a `moe.speculative.Statistics`, to which the measurements of speculative decoding are added.

    Raises:
        ValueError: an empty prompt, a prompt that fills all positions, a mask with padding on the right, or a parameter
            out of range (ConfigError), such as "on" for a model without MTP modules.
        FloatingPointError: logits contain NaN or inf, or are all -inf; the message gives step (from 1) and sequence.
    """
    steps = stream(
        model,
        input_ids,
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        max_new_tokens=max_new_tokens,
        attention_mask=attention_mask,
        seed=seed,
        eos_token_id=eos_token_id,
        speculative=speculative,
        statistics=statistics,
    )
    return torch.cat((input_ids, *(step.unsqueeze(1) for step in steps)), dim=1)


def stream(
    model: Transformer,
    input_ids: Tensor,
    sampling: Sampling,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    speculative: Speculative = "auto",
    statistics: Statistics | None = None,
) -> Iterator[Tensor]:
    """Run `generate` one step at a time: yield int64 [B], the next token of every sequence."""
    if not isinstance(getattr(model, "config", None), ModelConfig):
        raise TypeError(f"model is a {type(model).__name__}: expected a moe.Transformer")
    check_input_ids(input_ids)
    if input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [B, S] with S of 1 or more")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: expected 0 or more")
    length, positions = input_ids.shape[1], model.config.max_position_embeddings
    if max_new_tokens and length >= positions:
        expected = f"fewer than the model's {positions} positions (max_position_embeddings)"
        raise ValueError(f"input_ids has {length} tokens: expected {expected}")
    if eos_token_id is not None and model.global_batch.lockstep:
        raise ValueError("eos_token_id: not supported on a mesh; expected None, and truncation after generation")
    mask = None
    if attention_mask is not None:
        mask = attention_mask.bool()
        on_the_left = not has_values(mask) or bool((mask[:, :-1] <= mask[:, 1:]).all() and mask[:, -1].all())
        if mask.shape != input_ids.shape or not on_the_left:
            raise ValueError("attention_mask: expected the shape of input_ids, with padding on the left only")
    ends = (
        tuple(eos_token_id) if isinstance(eos_token_id, Sequence) else () if eos_token_id is None else (eos_token_id,)
    )
    speculation = None
    if _speculates(model, input_ids, sampling, min(max_new_tokens, positions - length), seed, speculative):
        statistics = Statistics() if statistics is None else statistics
        speculation = Speculation(model, statistics, auto=speculative == "auto")
    return _steps(model, input_ids, sampling, max_new_tokens, mask, seed, ends, speculation)


def _speculates(
    model: Transformer, input_ids: Tensor, sampling: Sampling, new: int, seed: int | None, speculative: Speculative
) -> bool:
    """Return whether drafts are to be tried; raise ConfigError if they are requested and impossible."""
    if speculative not in get_args(Speculative):
        raise ConfigError("speculative", speculative, f"one of {', '.join(get_args(Speculative))}")
    if speculative == "off":
        return False
    expected = (
        "a model with multi-token prediction modules; found none"
        if not model.mtp
        else "'off' on a mesh, where ranks must run equally many passes"
        if model.global_batch.lockstep
        else "'off' for tensors without values"
        if not has_values(input_ids)
        else None
    )
    if speculative == "on":
        if expected is not None:
            raise ConfigError("speculative", speculative, expected)
        return True
    # Sampled tokens must not depend on time if they have a seed, and ranks of a job must not decide differently.
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return expected is None and alone and new >= 8 * TRIAL and (sampling.temperature == 0 or seed is None)


@torch.inference_mode()
def _steps(
    model: Transformer,
    input_ids: Tensor,
    sampling: Sampling,
    max_new_tokens: int,
    mask: Tensor | None,
    seed: int | None,
    ends: tuple[int, ...],
    speculation: Speculation | None,
) -> Iterator[Tensor]:
    """Run the model once per token, or per drafted tokens and the one after them. Without drafts, this is decoding."""
    known = has_values(input_ids)
    generator = torch.Generator(input_ids.device).manual_seed(seed) if seed is not None and known else None
    cache = Cache(model.config)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    last = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    penalty = sampling.repetition_penalty
    seen = _count(input_ids, mask, model.config.vocab_size) if penalty != 1 else None
    length, room = input_ids.shape[1], model.config.max_position_embeddings - input_ids.shape[1]
    limit = min(max_new_tokens, room)
    ids, finished = input_ids, False
    while not finished and ids.shape[1] - length < limit:
        left, drafts = limit - (ids.shape[1] - length), []
        begin = time.perf_counter()
        with eval_mode(model):
            if speculation is not None:
                guessed = None if seen is None else seen.clone()
                choose = partial(_draft, sampling=sampling, guessed=guessed, generator=generator)
                drafts = speculation.draft(ids, mask, cache, left - 1, choose)
            fed = torch.cat((ids[:, cache.length :], *(draft.token.unsqueeze(1) for draft in drafts)), dim=1)
            out = model(
                fed,
                attention_mask=None if mask is None else F.pad(mask, (0, len(drafts)), value=True),
                cache=cache,
                logits_to_keep=len(drafts) + 1,
            )
        tokens, accepted = [], 0
        for i in range(len(drafts) + 1):
            logits, step = out.logits[:, i], ids.shape[1] - length + i
            if seen is not None:
                logits = penalize(logits, seen, penalty)
            if known:
                check_finite(logits, ended, step + 1)
            if speculation is not None and sampling.temperature == 0:
                speculation.note_close_calls(logits, ended, step, max(penalty, 1 / penalty))
            if i < len(drafts) and sampling.temperature > 0:
                token = verify(drafts[i], probabilities(logits, sampling), generator)
            else:
                token = sample(logits, sampling, generator)
            if ends:
                token = token.masked_fill(ended, ends[0])
                ended = ended | torch.isin(token, last)
            tokens.append(token)
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), 1)
            finished = bool(ends) and known and bool(ended.all())
            if i < len(drafts):
                if not bool(((token == drafts[i].token) | ended).all()):
                    break
                accepted += 1
            if finished:
                break
        cache.truncate(ids.shape[1] + len(tokens) - 1)
        ids = torch.cat((ids, torch.stack(tokens, dim=1)), dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, len(tokens)), value=True)
        if speculation is not None:
            kept = fed.shape[1] - len(drafts) + len(tokens) - 1
            seconds = time.perf_counter() - begin
            speculation.record(out.hidden[:, :kept], out.logits, len(drafts), accepted, len(tokens), seconds)
        yield from tokens
    if max_new_tokens > max(room, 0) and not finished:
        problem = f"generation stopped after {room} of {max_new_tokens} new tokens"
        positions = model.config.max_position_embeddings
        warnings.warn(f"{problem}: with a prompt of {length}, all {positions} positions are used", stacklevel=3)


@contextmanager
def eval_mode(model: Transformer) -> Iterator[None]:
    """Set eval mode for one forward pass, then restore each module, because a stream may be suspended between steps."""
    modules: list[nn.Module] = [model]
    for module in modules:  # `model.modules()` takes four times as long, for every token
        modules += [child for child in module._modules.values() if child is not None]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_finite(logits: Tensor, ended: Tensor, step: int) -> None:
    """Raise FloatingPointError if logits [B, V] are unusable (see `generate`) in a row that has not ended."""
    largest = logits.amax(dim=-1)  # propagates NaN
    if all(map(math.isfinite, largest.tolist())):
        return
    bad = ~largest.isfinite() & ~ended
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        values = logits[row]
        has_nan, has_inf = bool(values.isnan().any()), bool((values > 0).any())
        found = "contain NaN" if has_nan else "contain inf" if has_inf else "are all -inf"
        raise FloatingPointError(f"step {step}: the logits of sequence {row} {found}; expected finite numbers")


def _count(input_ids: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
    """Count each token in each sequence, without padding: int64 [B, V]."""
    counted = torch.ones_like(input_ids) if mask is None else mask.long()
    return input_ids.new_zeros(len(input_ids), vocabulary).scatter_add_(1, input_ids, counted)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty to logits [B, V] of tokens whose count in `seen` [B, V] is not 0; see `Sampling`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(seen > 0, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Sample token ids [B] from logits [B, V], without the repetition penalty; see `Sampling`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    ranked, ids = rank(logits, sampling)
    drawn = torch.multinomial(ranked.softmax(dim=-1), 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities [B, V] of token ids from which `sample` draws, at a temperature above 0."""
    ranked, ids = rank(logits, sampling)
    return torch.zeros_like(ranked).scatter_(1, ids, ranked.softmax(dim=-1))


def _draft(logits: Tensor, *, sampling: Sampling, guessed: Tensor | None, generator: torch.Generator | None) -> Draft:
    """Choose drafts from an MTP module's logits [B, V], and count them in `guessed` [B, V], for `penalize`."""
    if guessed is not None:
        logits = penalize(logits, guessed, sampling.repetition_penalty)
    if sampling.temperature == 0:
        draft = Draft(logits.argmax(dim=-1), None)
    else:
        usable = logits.amax(dim=-1, keepdim=True).isfinite()
        q = probabilities(logits.masked_fill(~usable, 0.0), sampling)  # any q is exact, so a uniform one is, too
        draft = Draft(torch.multinomial(q, 1, generator=generator).squeeze(1), q)
    if guessed is not None:
        guessed.scatter_(1, draft.token.unsqueeze(1), 1)
    return draft


def rank(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return (logits to sample from, token ids), both [B, V], sorted by logit descending, then id ascending.

    The logits are divided by the temperature, shifted, and -inf for tokens that a rule excludes.
    """
    shifted = logits.float() - logits.amax(dim=-1, keepdim=True).float()
    ranked, ids = (shifted / sampling.temperature).sort(dim=-1, descending=True, stable=True)  # nothing overflows
    if sampling.top_k:
        ranked[:, sampling.top_k :] = float("-inf")
    if sampling.top_p < 1:
        # In integers, because torch has no deterministic floating-point cumsum on a GPU.
        p = (ranked.softmax(dim=-1, dtype=torch.float64) * 2**52).long()
        before = p.cumsum(dim=-1) - p
        excluded = before >= math.ceil(sampling.top_p * 2**52)
        ranked = ranked.masked_fill(excluded, float("-inf"))  # the first token is never excluded
    if sampling.min_p:
        p = ranked.softmax(dim=-1)
        ranked = ranked.masked_fill(p < sampling.min_p * p[:, :1], float("-inf"))
    return ranked, ids
