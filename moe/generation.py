"""Prefill, decode and sampling. The function is `moe.generate`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moe.cache import Cache
from moe.model import Transformer
from moe.ops.library import has_values


def generate(
    model: Transformer,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Tensor:
    """Continue each sequence: int64 [B, S] -> [B, S + new], new <= max_new_tokens.

    Args:
        input_ids: prompts; shorter ones are padded on the left with any id.
        attention_mask: [B, S], zero on that padding.
        temperature: 0 takes the most likely token (the lowest id among equals); else logits are divided by it.
        top_k: sample among the k most likely; 0 for all.
        top_p: sample among the smallest set of most likely tokens whose probability reaches top_p.
        seed: of the sampling, for repeatable text; None draws from the global generator.
        eos_token_id: an id, or several, that end a sequence; its later positions repeat the (first) id, and generation
            stops when all have ended. Not on a mesh, where every rank has to make equally many steps.

    Raises:
        ValueError: an empty prompt, a mask with padding on the right, or a sampling parameter out of range.
    """
    steps = stream(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        attention_mask=attention_mask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
    )
    return torch.cat((input_ids, *(step.unsqueeze(1) for step in steps)), dim=1)


def stream(
    model: Transformer,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """As `generate`, one step at a time: yields int64 [B], the next token of every sequence."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: expected [B, S] with S of 1 or more")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: expected 0 or more")
    if eos_token_id is not None and model.global_batch.lockstep:
        raise ValueError("eos_token_id: on a mesh other ranks' sequences end elsewhere; cut them after max_new_tokens")
    check_sampling(temperature, top_k, top_p)
    mask = None
    if attention_mask is not None:
        mask = attention_mask.bool()
        on_the_left = not has_values(mask) or bool((mask[:, :-1] <= mask[:, 1:]).all() and mask[:, -1].all())
        if mask.shape != input_ids.shape or not on_the_left:
            raise ValueError("attention_mask: expected the shape of input_ids, with padding on the left only")
    ends = (
        tuple(eos_token_id) if isinstance(eos_token_id, Sequence) else () if eos_token_id is None else (eos_token_id,)
    )
    return _steps(model, input_ids, max_new_tokens, mask, temperature, top_k, top_p, seed, ends)


@torch.inference_mode()
def _steps(
    model: Transformer,
    input_ids: Tensor,
    max_new_tokens: int,
    mask: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    ends: tuple[int, ...],
) -> Iterator[Tensor]:
    known = has_values(input_ids)
    generator = torch.Generator(input_ids.device).manual_seed(seed) if seed is not None and known else None
    cache = Cache(model.config)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    last = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    fed = input_ids
    for _ in range(max_new_tokens):
        with _eval_mode(model):
            logits = model(fed, attention_mask=mask, cache=cache, logits_to_keep=1).logits[:, -1]
        token = sample(logits, temperature, top_k, top_p, generator)
        if ends:
            token = token.masked_fill(ended, ends[0])
            ended = ended | torch.isin(token, last)
        yield token
        if ends and known and bool(ended.all()):
            return
        fed = token.unsqueeze(1)
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(fed, dtype=torch.bool)), dim=1)


@contextmanager
def _eval_mode(model: Transformer) -> Iterator[None]:
    """Eval mode for one forward pass, and then each module as it was: a stream may stay suspended for long."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a sampling parameter out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: expected a finite number from 0 up")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}: expected 0 (all) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: expected a number above 0, at most 1")


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token id [B] from logits [B, V]; see `generate`. Ties are decided by the lower id."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled = (logits.float() - logits.amax(dim=-1, keepdim=True).float()) / temperature  # no temperature overflows this
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = float("-inf")
    if top_p < 1:
        # In integers: sums of floating point differ with their order, and torch has no deterministic ones on a GPU.
        p = (ranked.softmax(dim=-1, dtype=torch.float64) * 2**52).long()
        before = p.cumsum(dim=-1) - p
        ranked = ranked.masked_fill(before >= math.ceil(top_p * 2**52), float("-inf"))  # 0 before the first: it stays
    drawn = torch.multinomial(ranked.softmax(dim=-1), 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)
