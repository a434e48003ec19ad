"""GRPO: formulas against hand-computed values, and one step of the trainer against the definition."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import moe
from moe.balance import routers
from moe.errors import ConfigError
from moe.recipes.grpo import GrpoTrainer, Samples, advantages, clipped_loss, weighted_k3
from moe.recipes.grpo_settings import GrpoSettings
from moe.recipes.rollout import Rollout, sampled_logprobs
from moe.recipes.task import Task
from moe.replay import Routes, observing
from moe.train.loop import NonFiniteError
from tests.support.models import SMALL
from tests.support.training import assert_same_state

END = 3
CONFIG = dataclasses.replace(SMALL, max_position_embeddings=64)
SETTINGS = GrpoSettings(
    init=Path("unused"),
    group_size=4,
    batch_size=8,
    accumulation=2,
    max_new_tokens=10,
    seq_length=24,
    steps=5,
    warmup=0,
    optimizer="adamw",
    lr=3e-3,
)


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(61)}, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return made


def share_of_small(_: str, completion: str) -> dict[str, float]:
    """Reward of completions with many tokens below 20; right if all are."""
    tokens = [int(word[1:]) for word in completion.split()]
    small = sum(token < 20 for token in tokens) / max(len(tokens), 1)
    return {"accuracy": float(small > 0.4), "share": small}


PROMPTS = tuple(f"t{5 + i} " * (1 + i % 3) for i in range(9))
TASK = Task("small tokens", PROMPTS[:6], PROMPTS[6:], share_of_small, {"accuracy": 1.0, "share": 0.5})


def trainer(
    task: Task = TASK, *, seed: int = 1, double: bool = False, config: Any = CONFIG, **changes: Any
) -> GrpoTrainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    model = moe.Transformer(config, seed=seed)
    reference = moe.Transformer(config, seed=1).requires_grad_(False) if settings.kl else None
    if double:
        model, reference = model.double(), None if reference is None else reference.double()
    return GrpoTrainer(model, task, tokenizer(), END, settings, reference=reference)


# Formulas


def test_advantages_by_hand() -> None:
    found = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]]))
    first, second = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (1.5 + 1e-4)  # deviations: sqrt(4 * 0.25 / 3), sqrt(6.75 / 3)
    expected = [[first, -first, -first, first], [2.25 * second, -0.75 * second, -0.75 * second, -0.75 * second]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    centered = advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), divide=False)
    assert centered.tolist() == [[0.5, -0.5, -0.5, 0.5]]


@pytest.mark.parametrize("divide", [True, False])
def test_equal_rewards_give_no_advantage_at_all(divide: bool) -> None:
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7], dtype=torch.float64)
    assert (rewards - rewards.mean(1, keepdim=True) != 0).any(), "the mean of equal numbers is rounded"
    assert (advantages(rewards, divide=divide) == 0).all()


def test_k3_by_hand() -> None:
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    expected = [0.5 + math.log(2) - 1, 0.0, 2 - math.log(2) - 1]
    for w in (1.0, 0.5):
        found = weighted_k3(p.log(), (p / w).log(), q.log())
        torch.testing.assert_close(found, w * torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_k3_of_a_token_that_has_become_improbable() -> None:
    """q overflows in float32, p_ref / p_old does not."""
    logprobs = torch.tensor([-120.0], requires_grad=True)
    found = weighted_k3(logprobs, torch.tensor([-2.0]), torch.tensor([-3.0]))
    found.sum().backward()
    torch.testing.assert_close(found.detach(), torch.tensor([math.exp(-1)]))
    assert logprobs.grad is not None and logprobs.grad.abs().item() < 1e-40


def test_the_weighted_k3_has_the_value_and_the_gradient_of_the_divergence() -> None:
    """Sums over the vocabulary, with tokens from the old policy."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=g).requires_grad_()
    old, reference = (torch.randn(6, dtype=torch.float64, generator=g).log_softmax(0) for _ in range(2))
    log_p = logits.log_softmax(0)
    exact = (log_p.exp() * (log_p - reference)).sum()
    estimate = (old.exp() * weighted_k3(log_p, old, reference)).sum()
    plain = (log_p.detach().exp() * ((reference - log_p).exp() - (reference - log_p) - 1)).sum()
    (a,), (b,), (c,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (exact, estimate, plain))
    torch.testing.assert_close(estimate, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-14)
    assert (c - a).abs().max() > 0.05, "without the weight, it has another gradient"


RATIOS = [[1.5, 0.5, 1.1, 7.0], [1.5, 0.5, 1.1, 7.0]]


def test_clipping_per_token_by_hand() -> None:
    logprobs = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True, True, False]] * 2)
    loss, clipped = clipped_loss(
        logprobs, torch.zeros_like(logprobs), torch.tensor([2.0, -1.0]), mask, level="token", low=0.2, high=0.28
    )
    # A = 2: min(3, 2.56), min(1, 1.6), 2.2; A = -1: min(-1.5, -1.28), min(-0.5, -0.8), -1.1
    expected = [[-2.56, -1.0, -2.2, 0.0], [1.5, 0.8, 1.1, 0.0]]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert clipped.tolist() == [[True, False, False, False], [False, True, False, False]]
    loss.sum().backward()
    # d(w A) / d log w = w A where it is not clipped
    gradient = torch.tensor([[0.0, -1.0, -2.2, 0.0], [1.5, 0.0, 1.1, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-12, atol=1e-15)


def test_clipping_per_sequence_by_hand() -> None:
    logprobs = torch.tensor([[1.5, 0.5, 1.1, 7.0], [2.0, 8.0, 1.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    loss, clipped = clipped_loss(
        logprobs, torch.zeros_like(logprobs), torch.tensor([2.0, 1.0]), mask, level="sequence", low=0.1, high=0.1
    )
    first = (1.5 * 0.5 * 1.1) ** (1 / 3)  # 0.938; the second, 4, is clipped
    expected = [[-2 * first] * 3 + [0.0], [-1.1] * 2 + [0.0] * 2]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert clipped.tolist() == [[False] * 4, [True, True, False, False]]
    loss.mean(1).sum().backward()
    gradient = torch.tensor([[-2 * first / 4] * 3 + [0.0], [0.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-12, atol=1e-15)


def a_batch(model: nn.Module, seed: int = 0) -> Samples:
    """Three sequences of four tokens and one of two, with prompts of one to three tokens, and old log-probabilities."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 61, (4, 7), generator=g)
    completion = torch.tensor([[True] * 4] * 3 + [[True, True, False, False]])
    prompts = torch.tensor([[True] * 3, [False, True, True], [False, False, True], [True] * 3])
    read = torch.cat((prompts, completion[:, 1:]), 1)
    names = tuple(name for name, _ in routers(model))
    experts = torch.rand(len(names), 4, 6, 8, generator=g).argsort(-1)[..., :3].masked_fill(~read[:, :, None], -1)
    old = torch.rand(4, 4, generator=g, dtype=torch.float64).mul(0.3).sub(4.2).masked_fill(~completion, 0)
    batch = Rollout(
        input_ids=ids.masked_fill(~torch.cat((prompts, completion), 1), 0),
        attention_mask=read,
        completion_mask=completion,
        logprobs=old,
        entropy=torch.zeros(4, 4),
        ended=torch.tensor([False, False, False, True]),
        temperature=0.7,
        routes=Routes(names, experts, torch.zeros(experts.shape, dtype=torch.float64)),
    )
    reference = torch.rand(4, 4, generator=g, dtype=torch.float64).sub(4.3).masked_fill(~completion, 0)
    chosen = torch.ones(4, dtype=torch.bool)
    return Samples(batch, torch.tensor([1.0, -0.5, 0.7, -1.2], dtype=torch.float64), reference, chosen)


def padded(samples: Samples, left: int, right: int) -> Samples:
    batch = samples.rollout

    def wider(values: Tensor, *, value: Any = 0, sides: tuple[int, int] = (left, right), inner: int = 0) -> Tensor:
        return nn.functional.pad(values, (*(0, 0) * inner, *sides), value=value)

    assert batch.routes is not None and samples.reference is not None
    after = (0, right)
    return dataclasses.replace(
        samples,
        reference=wider(samples.reference, sides=after),
        rollout=dataclasses.replace(
            batch,
            input_ids=wider(batch.input_ids, value=17),
            attention_mask=wider(batch.attention_mask),
            completion_mask=wider(batch.completion_mask, sides=after),
            logprobs=wider(batch.logprobs, sides=after),
            entropy=wider(batch.entropy, sides=after),
            routes=Routes(
                batch.routes.layers,
                wider(batch.routes.expert_ids, value=-1, inner=1),
                wider(batch.routes.weights, inner=1),
            ),
        ),
    )


def update(made: GrpoTrainer, parts: list[Samples]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one update, which changes no parameter."""
    made.begin_step()
    for optimizer in made.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    with made._replaying(parts[0].rollout) as replay:
        found = made.update(parts, lambda part: made._loss(part, replay=replay, differences=None), made._counts)
    return found.losses, {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])


@LEVELS
def test_the_loss_of_an_update_by_the_definition(level: Any) -> None:
    made = trainer(double=True, level=level, kl=0.1, clip=1e9, replay="off", clip_low=0.05, clip_high=0.1)
    samples = a_batch(made.model)
    losses, gradients = update(made, [samples.select(torch.tensor([2, 0])), samples.select(torch.tensor([3, 1]))])
    model, batch, reference = made.model, samples.rollout, samples.reference
    assert reference is not None
    model.zero_grad()
    total, policies, divergences, cut = [], [], [], []
    for row in range(4):
        real = torch.cat((batch.attention_mask[row, :3], batch.completion_mask[row]))
        ids, prompt, new = batch.input_ids[row][real], int(real[:3].sum()), int(batch.completion_mask[row].sum())
        log_p = (model(ids[None, :-1]).logits[0] / 0.7).log_softmax(-1)
        log_p = torch.stack([log_p[prompt - 1 + t, ids[prompt + t]] for t in range(new)])
        log_w, a = log_p - batch.logprobs[row, :new], samples.advantages[row]
        w = log_w.exp() if level == "token" else log_w.mean().exp().expand(new)
        policy = -torch.min(w * a, w.clamp(0.95, 1.1) * a)
        q = (reference[row, :new] - log_p).exp()
        divergence = log_w.exp() * (q - q.log() - 1)
        outside = (w > 1.1) if a > 0 else (w < 0.95)
        for parts, values in zip((policies, divergences, cut), (policy, divergence, outside.double()), strict=True):
            parts.append(values if level == "token" else values.mean()[None])
        total.append(policies[-1] + 0.1 * divergences[-1])
    torch.cat(total).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(gradients, expected)
    for name, parts in (("policy", policies), ("kl", divergences), ("clipped", cut)):
        assert losses[name] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-9), name
    assert 0 < losses["clipped"] < 1


@LEVELS
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (1, 4)])
def test_padding_changes_nothing(level: Any, left: int, right: int) -> None:
    made = trainer(double=True, level=level, kl=0.1, config=dataclasses.replace(CONFIG, aux_loss_alpha=0.1))
    samples = a_batch(made.model)
    losses, gradients = update(made, [samples])
    others, found = update(made, [padded(samples, left, right)])
    assert others == pytest.approx(losses, rel=1e-9)
    assert_close(found, gradients)


@LEVELS
def test_a_masked_token_contributes_nothing(level: Any) -> None:
    made = trainer(double=True, level=level)
    samples = a_batch(made.model)
    batch, mask = samples.rollout, samples.rollout.completion_mask
    logits = torch.randn(4, 4, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(logits: Tensor, batch: Rollout) -> Tensor:
        values, _ = clipped_loss(
            sampled_logprobs(logits, batch),
            batch.logprobs,
            samples.advantages,
            mask,
            level=level,
            low=0.999999,
            high=1e9,
        )
        return made._mean_over(values, mask)

    first = loss(logits, batch)
    first.backward()
    assert logits.grad is not None and (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).any(-1).all()
    changed = batch.input_ids.clone()
    changed[:, 3:][~mask] = 59
    other = torch.where(mask[:, :, None], logits, 100 * logits)
    assert torch.equal(loss(other, dataclasses.replace(batch, input_ids=changed)), first)


def test_a_completion_that_is_not_chosen_contributes_nothing() -> None:
    made = trainer(double=True, kl=0.1)
    samples = a_batch(made.model)
    some = dataclasses.replace(samples, chosen=torch.tensor([True, False, True, True]))
    losses, gradients = update(made, [some])
    others, found = update(made, [samples.select(torch.tensor([0, 2, 3]))])
    assert others == pytest.approx(losses, rel=1e-9)
    assert_close(found, gradients)


def test_replayed_experts_and_routers_learn() -> None:
    made = trainer(double=True)
    samples = a_batch(made.model)
    used: dict[str, Tensor] = {}
    with observing(made.model, lambda name, _, x, routing: used.update({name: routing.expert_ids})):
        _, gradients = update(made, [samples])
    assert samples.rollout.routes is not None
    for layer, name in enumerate(samples.rollout.routes.layers):
        assert torch.equal(used[name], samples.rollout.routes.expert_ids[layer].flatten(0, 1))
        assert (gradients[f"{name}.weight"] != 0).any(1).all()
        assert (gradients[f"{name.removesuffix('.gate')}.experts.down_proj"] != 0).flatten(1).any(1).all()


# Steps


def changed_parameters(made: GrpoTrainer, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])]


def copied(made: GrpoTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_equal_rewards_move_no_parameter(optimizer: Any) -> None:
    made = trainer(
        dataclasses.replace(TASK, parts=lambda *_: {"accuracy": 0.3, "share": 0.1}), optimizer=optimizer, updates=2
    )
    before = copied(made)
    report = made.step().values()
    assert changed_parameters(made, before) == [] and report["grad_norm"] == 0
    assert report["equal_groups"] == 1 and report["reward"] == pytest.approx(0.35)


@pytest.mark.parametrize("replay", ["on", "off"])
def test_what_a_step_reports(replay: Any) -> None:
    made = trainer(replay=replay, updates=2, passes=2, kl=0.01, temperature=0.8)
    before = copied(made)
    shown = made.step()
    report = shown.values()
    changed = changed_parameters(made, before)
    assert "embed_tokens.weight" in changed and not any("correction_bias" in name for name in changed)
    assert report["logprob_difference"] <= 1e-4 and report["weight_difference"] <= 1e-4
    assert report["router_agreement"] >= 0.99
    assert report["trained_tokens"] == 2 * report["sampled_tokens"] == 2 * 32 * report["length"]
    assert 0 < report["accuracy"] < 1 and report["reward"] == pytest.approx(report["accuracy"] + 0.5 * report["share"])
    assert 0 < report["entropy"] <= math.log(61) and report["kl"] > 0 and 0 <= report["clipped"] < 1
    assert len(report["max_vio"]) == len(report["dead_experts"]) == 2 and report["lr"] == SETTINGS.lr
    assert 0 < report["sampling_share"] < 1 and report["tokens_per_second"] > 0
    assert shown.text().startswith("accuracy 0.") and made.step_number == 1
    scores = made.evaluate().values()
    assert scores["prompts"] == 3 and {"accuracy", "share", "reward", "length", "ended"} < scores.keys()


def test_the_experts_of_the_rollout_are_used_in_every_update() -> None:
    made = trainer(updates=2, activation_checkpointing=True)
    used: list[Tensor] = []
    parts: list[Samples] = []
    micro_batches = made._micro_batches

    def kept(samples: Samples, rows: Tensor) -> list[Samples]:
        parts.extend(found := micro_batches(samples, rows))
        return found

    made._micro_batches = kept
    samples = made.sample
    made.sample = lambda: (used.clear(), samples(), used.clear())[1]  # pyright: ignore
    with observing(made.model, lambda name, _, x, routing: used.append(routing.expert_ids)):
        made.step()
    # Two layers forwards, and backwards again, for each of four micro-batches.
    assert len(used) == 16 and len(parts) == 4
    for number, part in enumerate(parts):
        assert part.rollout.routes is not None
        first, second = (ids.flatten(0, 1) for ids in part.rollout.routes.expert_ids)
        for found, expected in zip(used[4 * number :], (first, second, second, first), strict=False):
            assert torch.equal(found, expected)


def test_the_correction_bias_moves_on_request() -> None:
    made = trainer(bias_update_speed=0.01)
    before = copied(made)
    made.step()
    changed = [name for name in changed_parameters(made, before) if "correction_bias" in name]
    assert changed == [f"layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]


def test_balance_losses_are_kept() -> None:
    task = dataclasses.replace(TASK, parts=lambda *_: {"accuracy": 0.0, "share": 0.0})
    made = trainer(task, config=dataclasses.replace(CONFIG, aux_loss_alpha=0.1))
    before = copied(made)
    made.step()
    assert "layers.1.mlp.gate.weight" in changed_parameters(made, before)


@pytest.mark.parametrize("changes", [{"algorithm": "rejection"}, {"level": "sequence", "kl": 0.1, "updates": 2}])
def test_a_run_is_repeatable_and_resumes_bit_exactly(changes: dict[str, Any]) -> None:
    whole, half, rest = trainer(**changes), trainer(**changes), trainer(seed=2, **changes)
    reports = [whole.step().values() for _ in range(3)]
    again = [half.step().values() for _ in range(2)]
    rest.load_state(*half.state())
    again.append(rest.step().values())
    assert_same_state(whole.state(), rest.state())
    for a, b in zip(reports, again, strict=True):
        clock = {"tokens_per_second", "sampling_share"}
        assert {k: v for k, v in a.items() if k not in clock} == {k: v for k, v in b.items() if k not in clock}


def test_rejection_trains_on_the_right_completions_only() -> None:
    made = trainer(double=True, algorithm="rejection", clip=1e9)
    samples, measured = made.sample()
    right = samples.chosen.nonzero().squeeze(1)
    assert 0 < len(right) < 16 and len(right) == round(16 * measured["accuracy"])
    (rows,) = made._shares(samples)
    assert len(rows) == 16 and rows.tolist() == [right[i % len(right)] for i in range(16)]
    losses, gradients = update(made, made._micro_batches(samples, rows))
    made.model.zero_grad()
    part = samples.select(rows).rollout
    logits = made.model(**part.inputs, logits_to_keep=part.completion_mask.shape[1]).logits
    expected = -sampled_logprobs(logits, part).sum() / part.completion_mask.sum()
    assert losses == {"ce": pytest.approx(expected.item(), rel=1e-9)}
    expected.backward()
    for name in ("embed_tokens.weight", "layers.2.mlp.experts.down_proj"):
        parameter = made.model.get_parameter(name)
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_rejection_without_a_right_completion_trains_nothing() -> None:
    task = dataclasses.replace(TASK, parts=lambda *_: {"accuracy": 0.0, "share": 0.5})
    made = trainer(task, algorithm="rejection")
    before = copied(made)
    report = made.step().values()
    assert changed_parameters(made, before) == [] and report["trained_tokens"] == 0 and made.step_number == 1


@pytest.mark.parametrize("algorithm", ["grpo", "rejection"])
def test_the_reward_rises(algorithm: Any) -> None:
    made = trainer(steps=9, lr=1e-2, batch_size=32, algorithm=algorithm)
    rewards = [made.step().values()["reward"] for _ in range(9)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_prompts_come_in_a_new_order_in_each_epoch() -> None:
    made = trainer()
    steps = [made._order(number) for number in range(1, 7)]  # four prompts of six in each step
    flat = [number for order in steps for number in order]
    epochs = [flat[6 * i : 6 * i + 6] for i in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


def test_a_model_without_experts() -> None:
    dense = dataclasses.replace(CONFIG, first_k_dense_replace=3)
    made = trainer(config=dense)
    report = made.step().values()
    assert report["router_agreement"] is None and report["max_vio"] == [] and report["logprob_difference"] <= 1e-4


def test_logits_that_are_not_finite_end_the_run() -> None:
    made = trainer()
    with torch.no_grad():
        made.model.norm.weight.fill_(float("nan"))
    for call in (made.step, made.evaluate):
        run: Callable[[], Any] = call
        with pytest.raises(
            NonFiniteError, match="distribution is not finite; step 1: the logits of sequence 0 contain"
        ):
            run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "--group-size = 1: expected 2 or more"),
        (
            {"group_size": 3},
            "--batch-size = 8: expected a multiple of the group size 3 in a step; found 16 completions",
        ),
        ({"temperature": 0.0}, "--temperature = 0.0: expected a finite number above 0"),
        ({"kl": -1.0}, "--kl = -1.0: expected a finite number of at least 0"),
        ({"clip_low": 1.0}, "--clip-low = 1.0: expected a number above 0 and below 1"),
        ({"clip_high": 0.0}, "--clip-high = 0.0: expected a finite number above 0"),
        ({"compile": True}, "--compile = True: expected no compilation, which would hide the routing"),
        ({"init": None}, "--init = None: expected a folder, a run or a Hub name"),
        (
            {"max_new_tokens": 22},
            "--max-new-tokens = 22: expected at most 21: --seq-length, without the longest prompt (3)",
        ),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(**changes)
    assert str(caught.value) == message


def test_a_reference_model_is_required_for_its_divergence() -> None:
    settings = dataclasses.replace(SETTINGS, kl=0.1)
    with pytest.raises(ConfigError, match=r"--kl = 0\.1: expected 0 without a reference model"):
        GrpoTrainer(moe.Transformer(CONFIG), TASK, tokenizer(), END, settings)
