"""Speculative decoding: MTP modules draft tokens, and one pass of the model verifies them. See `moe.generate`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.cache import Cache, LayerCache
from moe.model import Transformer, make_attention_mask
from moe.rope import rope_tables
from moe.uncast import Uncast

TRIAL = 8  # passes that a generation measures before it decides, without and with drafts


@dataclass
class Statistics:
    """Measurements of speculative decoding, summed over the generations that this object is passed to.

    Attributes:
        turned_off: generations with speculative="auto" that stopped drafting because it was not faster.
        passes: passes that verified drafts.
        tokens: new tokens of these passes, per sequence.
        drafted: tokens drafted for each sequence.
        accepted: drafts that became tokens. Sequences of a batch advance together, so a draft counts if it was accepted
            in every sequence that has not ended.
        seconds: time of all passes with drafts except the first, including drafting. (The first also runs the MTP
            modules on the prompt.)
        timed_tokens: new tokens of the passes that `seconds` includes, in all sequences.
        plain_seconds: time of the `TRIAL` passes without drafts that follow the prompt's pass, except the first.
        plain_tokens: new tokens of the passes that `plain_seconds` includes, in all sequences.
        logit_difference: largest difference between the logits of a pass for one token and of a pass that verifies
            drafts, over `TRIAL` positions.
        close_calls: (sequence, new token), both from 0, of greedy tokens whose logit exceeds the second largest by at
            most twice `logit_difference`, or twice the rounding error of the logit's dtype if that is larger. Plain
            decoding may choose another token there; after the first different token, the texts differ. The list is an
            estimate: where rounding changes the experts of a token, logits can differ by more than was measured at
            `TRIAL` positions.
    """

    turned_off: int = 0
    passes: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    timed_tokens: int = 0
    plain_seconds: float = 0.0
    plain_tokens: int = 0
    logit_difference: float = 0.0
    close_calls: list[tuple[int, int]] = field(default_factory=list)

    def add(self, **amounts: float) -> None:
        """Add to the attributes with these names."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)

    def widen(self, difference: float) -> None:
        """Raise `logit_difference` to this one, if it is larger."""
        self.logit_difference = max(self.logit_difference, difference)

    @property
    def acceptance(self) -> float:
        """Fraction of the drafts that were accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per sequence and pass with drafts; plain decoding has 1."""
        return self.tokens / max(self.passes, 1)

    @property
    def speed(self) -> float:
        """Tokens per second with drafts, in all sequences."""
        return self.timed_tokens / self.seconds if self.seconds else 0.0

    @property
    def plain_speed(self) -> float:
        """Tokens per second without drafts, in all sequences."""
        return self.plain_tokens / self.plain_seconds if self.plain_seconds else 0.0


@dataclass(frozen=True)
class Draft:
    """A drafted token of each sequence, int64 [B], and the probabilities [B, V] it was drawn from; None if greedy."""

    token: Tensor
    probabilities: Tensor | None


def verify(draft: Draft, p: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return tokens [B] with probabilities p [B, V]: the draft where it is accepted, and another token elsewhere.

    A draft x drawn from q is accepted with probability min(1, p(x) / q(x)); otherwise a token is drawn from
    max(p - q, 0), normalised. Source: Leviathan et al. (arXiv 2211.17192), section 2.3.
    """
    q = draft.probabilities
    assert q is not None
    drafted = draft.token.unsqueeze(1)
    u = torch.rand(drafted.shape, generator=generator, dtype=p.dtype, device=p.device)
    accepted = u * q.gather(1, drafted) < p.gather(1, drafted)
    rest = (p - q).clamp_min(0)
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, p)  # p = q: never rejected, but multinomial needs a sum
    return torch.where(accepted, drafted, torch.multinomial(rest, 1, generator=generator)).squeeze(1)


class Drafter:
    """Drafts tokens with the MTP modules; each has its own attention cache, like a layer of the model.

    Module k at position i depends on tokens up to i + k + 1. So of n known tokens, its first n - 1 - k positions are
    final. The other k depend on drafts, and are computed again from the accepted tokens in the next round.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.caches = [LayerCache.of(model.config) for _ in model.mtp]
        self.final = [0 for _ in model.mtp]
        self.inputs: list[Tensor | None] = [None for _ in model.mtp]  # of final positions of the module before

    def draft(
        self, ids: Tensor, hidden: Tensor, mask: Tensor | None, count: int, choose: Callable[[Tensor], Draft]
    ) -> list[Draft]:
        """Draft up to `count` tokens, at most one per module.

        Args:
            ids: known tokens [B, n].
            hidden: the model's `Output.hidden` [B, new, D] at the positions up to n - 2 that were not in earlier calls.
            mask: bool [B, n], False for padding.
            choose: called with the logits [B, V] of each draft.
        """
        config, n, h = self.model.config, ids.shape[1], hidden
        real = None if mask is None else mask[:, : n - 1]
        drafts: list[Draft] = []
        for k, module in enumerate(self.model.mtp[:count]):
            held, start = self.inputs[k], self.final[k]
            h = h if held is None else torch.cat((held, h), dim=1)
            self.final[k] = max(n - 1 - k, 0)
            self.inputs[k] = h[:, self.final[k] - start : max(n - k, 0) - start]
            positions = torch.arange(start, n - 1, device=ids.device).expand(len(ids), -1)
            rope = Uncast(*rope_tables(config.rope_parameters, config.rope_dim, positions, h.dtype))
            attention = make_attention_mask(n - 1 - start, start, real, None, ids.device)
            embedding = self.model.embed_tokens(ids[:, start + k + 1 :])
            token_mask = None if real is None else real[:, start:]
            h, _ = module(h, embedding, rope, attention, token_mask, self.caches[k], start)
            drafts.append(choose(self.model.head(h[:, -1:])[:, -1]))
            ids = torch.cat((ids, drafts[-1].token.unsqueeze(1)), dim=1)
        return drafts


class Speculation:
    """Speculative decoding of one generation: `TRIAL` passes without drafts, then passes with them.

    The trial measures the speed of plain decoding, and the difference of logits that rounding causes. With `auto`,
    drafting ends after `TRIAL` timed passes if it is not faster.
    """

    def __init__(self, model: Transformer, statistics: Statistics, *, auto: bool) -> None:
        self.model, self.statistics, self.auto = model, statistics, auto
        self.drafter: Drafter | None = None
        self.hidden: list[Tensor] = []  # of positions that the drafter has not had
        self.logits: list[Tensor] = []  # of the passes of the trial
        self.on, self.has_prompt, self.passes = True, False, 0
        self.eps = 0.0  # of the dtype of logits

    def draft(
        self, ids: Tensor, mask: Tensor | None, cache: Cache, count: int, choose: Callable[[Tensor], Draft]
    ) -> list[Draft]:
        """Draft up to `count` tokens after `ids` [B, n], whose last token is not in the cache; none in the trial."""
        if not self.on or not self.hidden or len(self.logits) < TRIAL:
            return []
        if self.drafter is None:
            self.drafter = Drafter(self.model)
            if self.logits:
                size, logits = 1 + len(self.model.mtp), torch.stack(self.logits, dim=1)
                self.statistics.widen(measure_logit_difference(self.model, cache, ids, logits, mask, size))
        hidden, self.hidden = torch.cat(self.hidden, dim=1), []
        return self.drafter.draft(ids, hidden, mask, count, choose)

    def record(self, hidden: Tensor, logits: Tensor, drafted: int, accepted: int, new: int, seconds: float) -> None:
        """Count a pass that gave `new` tokens, of which `accepted` were drafted.

        Args:
            hidden: [B, new, D], or [B, S, D] of the prompt.
            logits: [B, drafted + 1, V].
        """
        statistics, tokens = self.statistics, new * len(hidden)
        if self.on:
            self.hidden.append(hidden)
        if not self.has_prompt:
            self.has_prompt, self.eps = True, torch.finfo(logits.dtype).eps
        elif drafted:
            self.passes += 1
            statistics.add(passes=1, tokens=new, drafted=drafted, accepted=accepted)
            if self.passes > 1:
                statistics.add(seconds=seconds, timed_tokens=tokens)
            if self.auto and self.passes == TRIAL + 1 and statistics.speed <= statistics.plain_speed:
                statistics.add(turned_off=1)
                self.on, self.drafter, self.hidden = False, None, []
        elif len(self.logits) < TRIAL:
            if self.logits:
                statistics.add(plain_seconds=seconds, plain_tokens=tokens)
            self.logits.append(logits[:, -1])

    def note_close_calls(self, logits: Tensor, ended: Tensor, step: int, scale: float) -> None:
        """Record sequences whose best two logits [B, V] are closer than the logits of two passes can differ.

        The repetition penalty, already applied, multiplies a difference by at most `scale`.
        """
        if self.drafter is None and self.on:  # all passes so far were those of plain decoding
            return
        best = logits.topk(min(2, logits.shape[1]), dim=1).values
        first, second = best[:, 0].double(), best[:, -1].double()
        difference = (self.eps * first.abs()).clamp_min(self.statistics.logit_difference) * scale
        close = first - second <= 2 * difference
        rows = (close & ~ended).nonzero().flatten().tolist()
        self.statistics.close_calls.extend((row, step) for row in rows)


def measure_logit_difference(
    model: Transformer, cache: Cache, ids: Tensor, logits: Tensor, mask: Tensor | None, size: int
) -> float:
    """Return the largest difference of logits between passes for one token and passes for `size` tokens.

    Args:
        cache: holds all tokens before the last of `ids`; its last entries are computed again.
        ids: known tokens [B, n].
        logits: [B, m, V], found by passes for one token at positions n - 1 - m to n - 2.
        mask: bool [B, n], False for padding.
    """
    end, difference = ids.shape[1] - 1, 0.0
    cache.truncate(end - logits.shape[1])
    for expected in logits.split(size, dim=1):
        start, stop = cache.length, cache.length + expected.shape[1]
        found = model(ids[:, start:stop], attention_mask=None if mask is None else mask[:, :stop], cache=cache).logits
        both = torch.where(found == expected, 0, found.double() - expected.double())  # -inf where a token is excluded
        difference = max(difference, both.abs().nan_to_num(0.0).max().item())
    return difference
