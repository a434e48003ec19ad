"""Our GRPO loss against that of TRL's GRPOTrainer, on the same tensors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.recipes.grpo import advantages, clipped_loss, weighted_k3

trl = pytest.importorskip("trl")

CASES = [
    ("token", "dapo", 0.0, False),
    ("token", "dapo", 0.07, True),
    ("sequence", "grpo", 0.0, False),
]


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6, 2])[:, None]
    old, new, reference = (torch.randn(6, 7, generator=g, dtype=torch.float64) * 0.4 - 2 for _ in range(3))
    rewards = torch.tensor([[1.0, 0.0, 0.1], [0.0, 1.1, 1.1]])
    return {"mask": mask, "old": old, "new": new, "reference": reference, "advantages": advantages(rewards).flatten()}


@pytest.mark.parametrize(("level", "kind", "kl", "corrected"), CASES)
def test_the_loss_and_its_gradient(level: Any, kind: str, kl: float, corrected: bool) -> None:
    given = tensors()
    mask, old, reference = given["mask"], given["old"], given["reference"]

    def theirs(logprobs: Tensor) -> Tensor:
        arguments = SimpleNamespace(delta=None, use_bias_correction_kl=corrected, steps_per_generation=1)
        metrics: dict[str, dict[str, list[float]]] = {"train": {}}

        class Metrics(dict[str, list[float]]):
            def __missing__(self, name: str) -> list[float]:
                return self.setdefault(name, [])

        metrics["train"] = Metrics()
        accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
        this: Any = SimpleNamespace(
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=kl,
            loss_type=kind,
            epsilon_low=0.2,
            epsilon_high=0.28,
            args=arguments,
            use_vllm=False,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            accelerator=accelerator,
            _entropy_bonus_enabled=False,
            _metrics=metrics,
            _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(6, 7), None),
        )
        inputs = {
            "prompt_ids": torch.zeros(6, 2, dtype=torch.int64),
            "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
            "completion_ids": torch.zeros(6, 7, dtype=torch.int64),
            "completion_mask": mask.long(),
            "advantages": given["advantages"],
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        }
        return trl.GRPOTrainer._compute_loss(this, None, inputs)

    def ours(logprobs: Tensor) -> Tensor:
        loss, _ = clipped_loss(logprobs, old, given["advantages"], mask, level=level, low=0.2, high=0.28)
        if kl:
            loss = loss + kl * weighted_k3(logprobs, old, reference).masked_fill(~mask, 0)
        return loss.sum() / mask.sum() if level == "token" else (loss.sum(1) / mask.sum(1)).mean()

    found = []
    for loss in (theirs, ours):
        logprobs = given["new"].clone().requires_grad_()
        value = loss(logprobs)
        value.backward()
        found.append((value.detach(), logprobs.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


def test_the_advantages() -> None:
    """The formula of `_generate_and_score_completions`."""
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages(rewards), theirs)
