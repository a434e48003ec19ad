"""Group relative policy optimization (GRPO) of a model on a task, with its variants DAPO, Dr. GRPO and GSPO.

One step samples a group of completions for each of some prompts, and then trains on them in one or several updates:

    A_i    = (r_i - mean(r)) / (std(r) + 1e-4)                  per group of G rewards; std divides by G - 1
    w_it   = exp(log p(o_it) - log p_old(o_it))                 p_old: the rollout's, at the sampling temperature
    loss   = - mean_it min(w_it A_i, clip(w_it, 1 - low, 1 + high) A_i) + kl * mean_it w_it k3_it
    k3_it  = q - log q - 1,  q = p_ref(o_it) / p(o_it)

`--level token` averages over all tokens of an update, as DAPO does. `--level sequence` is GSPO: w_i is the geometric
mean of the w_it of a sequence, clipped once, and the loss averages over sequences. Balance losses of the model are
added, as in all training.

k3 (Schulman, http://joschu.net/blog/kl-approx.html) is an unbiased estimate of KL(p || p_ref) for tokens sampled from
p, but its gradient is that of KL(p_ref || p). Multiplied by w, as in DeepSeek-V3.2 (arXiv 2512.02556), the value is
unbiased for tokens sampled from p_old, and so is the gradient, w log(p / p_ref) grad log p, for given earlier tokens.

The rollout's probabilities are p_old, so nothing is computed twice. This requires that the model computes the same
probabilities in both: the report of a step has the largest difference before its first update.

Sources: GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071, routing replay 2510.11370.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from moe.balance import LoadReport
from moe.errors import ConfigError
from moe.model import Transformer
from moe.recipes.answers import complete, encode_prompt, score_completions
from moe.recipes.grpo_settings import GrpoSettings
from moe.recipes.rollout import Rollout, rollout, sampled_logprobs
from moe.recipes.task import Task
from moe.replay import Replay
from moe.train.loop import BaseTrainer, NonFiniteError, Update
from moe.train.world import World

STD_EPS = 1e-4


def advantages(rewards: Tensor, *, divide: bool = True) -> Tensor:
    """Compute (r - mean) / (std + 1e-4) in each group of rewards [prompts, G], in float64; without `divide`, r - mean.

    The standard deviation divides by G - 1. Advantages are exactly 0 in a group of equal rewards.
    """
    rewards = rewards.double()
    centered = rewards - rewards.mean(1, keepdim=True)
    found = centered / (rewards.std(1, keepdim=True) + STD_EPS) if divide else centered
    # The mean of equal numbers may be rounded to another one.
    return found.masked_fill((rewards == rewards[:, :1]).all(1, keepdim=True), 0)


def weighted_k3(logprobs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """Compute w k3 = w (q - log q - 1) per token, w = p / p_old, q = p_ref / p, from log-probabilities of one shape.

    As p_ref / p_old - w (log q + 1), because q itself overflows for a token that has become very improbable.
    """
    return (reference - old).exp() - (logprobs - old).exp() * (reference - logprobs + 1)


def clipped_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence"],
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """Compute -min(w A, clip(w, 1 - low, 1 + high) A) for each token.

    Args:
        logprobs, old: log-probabilities [N, T] of the sampled tokens in the trained model and in the rollout.
        advantages: [N].
        mask: bool [N, T]; other tokens have no influence.
        level: "token": w is the ratio of each token; "sequence": the geometric mean of a sequence's ratios.

    Returns:
        the loss [N, T] and whether clipping removed the gradient, bool [N, T]; both 0 outside the mask.
    """
    log_w = (logprobs - old).masked_fill(~mask, 0)
    if level == "sequence":
        log_w = (log_w.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)).expand_as(log_w)
    w, a = log_w.exp(), advantages.to(log_w.dtype)[:, None]
    loss = -torch.minimum(w * a, w.clamp(1 - low, 1 + high) * a)
    clipped = ((w < 1 - low) & (a < 0)) | ((w > 1 + high) & (a > 0))
    return loss.masked_fill(~mask, 0), clipped & mask


@dataclass(frozen=True, eq=False)
class Samples:
    """Completions to train on.

    Attributes:
        rollout: N completions.
        advantages: float64 [N].
        reference: log-probabilities in the reference model, [N, T], 0 for padding; None without one.
        chosen: bool [N]; other completions have no influence on the loss.
    """

    rollout: Rollout
    advantages: Tensor
    reference: Tensor | None
    chosen: Tensor

    @property
    def mask(self) -> Tensor:
        """Tokens to train on, bool [N, T]."""
        return self.rollout.completion_mask & self.chosen[:, None]

    def select(self, rows: Tensor) -> "Samples":
        """Return the completions `rows` (int64 indices), without columns of padding."""
        part = self.rollout.select(rows)
        reference = self.reference
        if reference is not None:
            reference = reference.index_select(0, rows)[:, : part.completion_mask.shape[1]]
        return Samples(part, self.advantages.index_select(0, rows), reference, self.chosen.index_select(0, rows))


@dataclass(frozen=True)
class PolicyLoss:
    """Loss of a micro-batch, see `moe.train.loop.BatchLoss`; `losses` are policy, kl (if used) and clipped share."""

    loss: Tensor
    losses: dict[str, Tensor]
    load: Tensor | None


@dataclass(frozen=True)
class GrpoReport:
    """Report of a step or an evaluation: values for metrics.jsonl, the most important of which are displayed."""

    measured: Mapping[str, Any]
    shown: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        return dict(self.measured)

    def text(self) -> str:
        found = ((name, self.measured[name]) for name in self.shown if self.measured.get(name) is not None)
        return "  ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in found)


class GrpoTrainer(BaseTrainer):
    """Trainer of one model on a task. See the module for the algorithm, and `GrpoSettings` for its choices.

    On a mesh each rank samples and trains on the completions of its share of the prompts. Advantages need no
    communication, because a group is on one rank. Losses are those of a single process, up to the order of sums, unless
    a pass has several updates, for each of which a rank uses a part of its own completions. MTP modules are not run, so
    they do not learn.

    Args:
        model: the policy.
        task: prompts and rewards.
        tokenizer, end_of_text: the model's tokenizer, and the id that ends a completion.
        settings: of the run.
        reference: model of the same vocabulary, for the KL divergence; required if `settings.kl` is above 0.

    Raises ConfigError if a prompt and the longest completion exceed `settings.seq_length`, and for a number of
    completions that the ranks cannot share.
    """

    settings: GrpoSettings

    def __init__(
        self,
        model: Transformer,
        task: Task,
        tokenizer: Tokenizer,
        end_of_text: int,
        settings: GrpoSettings,
        *,
        reference: Transformer | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__(model, settings, world=world)
        self.task, self.tokenizer, self.end_of_text, self.reference = task, tokenizer, end_of_text, reference
        if (settings.kl > 0) != (reference is not None):
            raise ConfigError("--kl", settings.kl, "0 without a reference model, above 0 with one")
        if settings.completions % (settings.group_size * self.world.size):
            allowed = f"whole groups of {settings.group_size} completions on each of {self.world.size} ranks"
            raise ConfigError("--batch-size", settings.batch_size, f"{allowed}; found {settings.completions} in all")
        longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in (*task.train, *task.test))
        if longest + settings.max_new_tokens > settings.seq_length:
            allowed = f"at most {settings.seq_length - longest}: --seq-length, without the longest prompt ({longest})"
            raise ConfigError("--max-new-tokens", settings.max_new_tokens, allowed)

    def step(self) -> GrpoReport:
        """Sample completions and train on them. Raises `NonFiniteError` before the parameters of an update change."""
        started = time.perf_counter()
        lr = self.begin_step()
        samples, measured = self.sample()
        sampled = time.perf_counter()
        done: list[Update] = []
        differences: list[Tensor] = []
        slots = same = trained = 0
        largest = 0.0
        for rows in self._shares(samples):
            parts = self._micro_batches(samples, rows)
            with self._replaying(samples.rollout) as replay:
                loss = partial(self._loss, replay=replay, differences=None if done else differences)
                done.append(self.update(parts, loss, self._counts))
            trained += sum(int(part.mask.sum()) for part in parts)
            if replay is not None and len(done) == 1:
                slots, same, largest = replay.slots, replay.same, replay.weight_difference
        self.step_number += 1
        sums = self._sum({"slots": slots, "same": same, "trained_tokens": trained})
        furthest = torch.stack(differences).amax().item() if differences else 0.0
        most = self.world.gather((furthest, largest))
        layers = self.model.config.num_moe_layers  # without MTP modules, which have not run
        load = LoadReport(self.layer_names[:layers], sum((each.load for each in done), self._no_load())[:layers])
        names = {name for each in done for name in each.losses}
        seconds = time.perf_counter() - started
        measured |= {name: fmean(each.losses[name] for each in done) for name in sorted(names)}
        measured |= {
            "logprob_difference": max(each[0] for each in most) if done else None,
            "router_agreement": sums["same"] / sums["slots"] if sums["slots"] else None,
            "weight_difference": max(each[1] for each in most) if sums["slots"] else None,
            "grad_norm": fmean(each.grad_norm for each in done) if done else 0.0,
            "lr": lr,
            "max_vio": load.max_vio,
            "dead_experts": load.dead_experts,
            "trained_tokens": int(sums["trained_tokens"]),
            "tokens_per_second": measured["sampled_tokens"] / seconds,
            "sampling_share": (sampled - started) / seconds,
        }
        return GrpoReport(measured, (*self.task.weights, "length", "logprob_difference", "tokens_per_second"))

    def sample(self) -> tuple[Samples, dict[str, Any]]:
        """Sample the completions of the next step, this rank's share, and measure those of all ranks."""
        settings, number = self.settings, self.step_number + 1
        each = settings.completions // settings.group_size // self.world.size
        first = self.world.rank * each
        prompts = [self.task.train[i] for i in self._order(number)[first : first + each]]
        try:
            with self._autocast():
                batch = rollout(
                    self.model,
                    [encode_prompt(self.tokenizer, prompt) for prompt in prompts],
                    max_new_tokens=settings.max_new_tokens,
                    end_of_text=(self.end_of_text,),
                    group_size=settings.group_size,
                    temperature=settings.temperature,
                    seed=(1, settings.seed, number),
                    first_prompt=first,
                )
        except FloatingPointError as error:
            raise NonFiniteError(number, "sampled distribution", str(error)) from None
        repeated = [prompt for prompt in prompts for _ in range(settings.group_size)]
        with self.world.together():
            scores = score_completions(self.task, repeated, [batch], self.tokenizer)
        rewards = torch.tensor(scores["reward"], dtype=torch.float64).view(each, -1)
        advantage = advantages(rewards, divide=settings.advantage == "normalized").flatten().to(self.device)
        chosen = torch.ones(len(advantage), dtype=torch.bool, device=self.device)
        if settings.algorithm == "rejection":
            chosen = torch.tensor(scores[self.task.goal], device=self.device) >= 1
        equal = (rewards == rewards[:, :1]).all(1)
        sums = {name: sum(values) for name, values in scores.items()}
        sums |= {"count": len(chosen), "entropy": batch.entropy.sum().item(), "equal_groups": int(equal.sum())}
        sums = self._sum(sums)
        count, tokens = sums.pop("count"), sums["length"]
        measured = {name: value / count for name, value in sums.items()}
        measured["entropy"] = sums["entropy"] / tokens
        measured["equal_groups"] = sums["equal_groups"] * settings.group_size / count
        measured["sampled_tokens"] = int(tokens)
        return Samples(batch, advantage, self._reference_logprobs(batch), chosen), measured

    def evaluate(self) -> GrpoReport:
        """Answer the held-out prompts with the most likely tokens. Raises `NonFiniteError`."""
        settings, prompts = self.settings, self.task.test
        each = -(-len(prompts) // self.world.size)
        mine = prompts[self.world.rank * each : (self.world.rank + 1) * each]
        padded = (*mine, *prompts[: each - len(mine)])  # all ranks make equally many calls of the model
        try:
            with self._autocast():
                batches = complete(
                    self.model,
                    padded,
                    self.tokenizer,
                    self.end_of_text,
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=settings.completions // self.world.size,
                )
        except FloatingPointError as error:
            raise NonFiniteError(self.step_number, "held-out distribution", str(error)) from None
        with self.world.together():
            scores = score_completions(self.task, padded, batches, self.tokenizer)
        sums = self._sum({name: sum(values[: len(mine)]) for name, values in scores.items()})
        measured = {"prompts": len(prompts), **{name: value / len(prompts) for name, value in sums.items()}}
        return GrpoReport(measured, (*self.task.weights, "reward", "length"))

    def _order(self, number: int) -> list[int]:
        """Return the prompts of a step, for all ranks: each epoch is a permutation that depends on the seed."""
        count, total = self.settings.completions // self.settings.group_size, len(self.task.train)
        places = range((number - 1) * count, number * count)
        epochs = {place // total for place in places}
        orders = {epoch: np.random.default_rng([0, self.settings.seed, epoch]).permutation(total) for epoch in epochs}
        return [int(orders[place // total][place % total]) for place in places]

    def _shares(self, samples: Samples) -> list[Tensor]:
        """Return the rows of each update of the step; none if no rank has anything to train on."""
        settings, count = self.settings, len(samples.chosen)
        found = samples.chosen.nonzero().squeeze(1)
        if not self._sum({"chosen": len(found)})["chosen"]:
            return []
        # Without a completion to train on, this rank runs the model on others, because the other ranks wait for it.
        rows = found.repeat(-(-count // len(found)))[:count] if len(found) else torch.arange(count, device=self.device)
        return [*rows.chunk(settings.updates)] * settings.passes

    def _micro_batches(self, samples: Samples, rows: Tensor) -> list[Samples]:
        """Divide completions into micro-batches of similar lengths."""
        lengths = samples.rollout.attention_mask.sum(1).index_select(0, rows)
        ordered = rows.index_select(0, lengths.argsort(stable=True))
        return [samples.select(some) for some in ordered.chunk(self.settings.accumulation)]

    def _replaying(self, batch: Rollout) -> "nullcontext[None] | Replay":
        if batch.routes is None:
            return nullcontext()
        return Replay(self.model, compare_only=self.settings.replay == "off")

    def _loss(self, part: Samples, *, replay: Replay | None, differences: list[Tensor] | None) -> PolicyLoss:
        """Compute this micro-batch's share of the loss; the largest difference of log-probabilities is appended."""
        settings, batch, mask = self.settings, part.rollout, part.mask
        if replay is not None and batch.routes is not None:
            replay.use(batch.routes)
        with self._autocast():
            out = self.model(**batch.inputs, logits_to_keep=mask.shape[1])
        logprobs = sampled_logprobs(out.logits, batch)
        if differences is not None:
            differences.append((logprobs.detach() - batch.logprobs).abs().amax())
        means: dict[str, Tensor] = {}
        if settings.algorithm == "rejection":
            total = means["ce"] = self._mean_over(-logprobs, mask)
        else:
            low, high = settings.clip_range
            loss, clipped = clipped_loss(
                logprobs, batch.logprobs, part.advantages, mask, level=settings.level, low=low, high=high
            )
            total = means["policy"] = self._mean_over(loss, mask)
            means["clipped"] = self._mean_over(clipped.to(loss.dtype), mask)
            if part.reference is not None:
                means["kl"] = self._mean_over(weighted_k3(logprobs, batch.logprobs, part.reference), mask)
                total = total + settings.kl * means["kl"]
        keys, count = ["policy.0"] * (1 + len(means)), self._count(part)
        total, *weighed = self.model.global_batch.weigh([total, *means.values()], [count] * len(keys), keys)
        losses = {name: mean.detach() for name, mean in zip(means, weighed, strict=True)}
        load = None if out.load is None else F.pad(out.load, (0, 0, 0, len(self.layer_names) - len(out.load)))
        return PolicyLoss(total, losses, load)

    def _mean_over(self, values: Tensor, mask: Tensor) -> Tensor:
        """Average values [N, T] over the tokens in `mask`, or over sequences with such tokens the means over those."""
        values = values.masked_fill(~mask, 0)
        if self.settings.level == "token":
            return values.sum() / mask.sum().clamp_min(1)
        return (values.sum(1) / mask.sum(1).clamp_min(1)).sum() / mask.any(1).sum().clamp_min(1)

    def _count(self, part: Samples) -> Tensor:
        """Count what `_mean_over` averages over."""
        return part.mask.sum() if self.settings.level == "token" else part.mask.any(1).sum()

    def _counts(self, part: Samples) -> dict[str, Tensor]:
        return {**self.model.loss_counts(**part.rollout.inputs), "policy.0": self._count(part)}

    @torch.no_grad()
    def _reference_logprobs(self, batch: Rollout) -> Tensor | None:
        """Compute the reference model's log-probabilities; it routes on its own."""
        if self.reference is None:
            return None
        found = torch.zeros_like(batch.logprobs)
        chunks = self.settings.accumulation * self.settings.updates
        for rows in torch.arange(len(found), device=self.device).chunk(chunks):
            part = batch.select(rows)
            width = part.completion_mask.shape[1]
            with self._autocast():
                out = self.reference(**part.inputs, logits_to_keep=width)
            found[rows, :width] = sampled_logprobs(out.logits, part).to(found.dtype)
        return found

    def _sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers over the ranks."""
        total = self.world.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))
