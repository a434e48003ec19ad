"""Settings of `moesmith grpo`. Imports no torch, because the command line reads it first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from moe.recipes.task import FORMAT_WEIGHT
from moe.train.settings import ModelSettings, RunSettings

CLIP = {"token": (0.2, 0.28), "sequence": (3e-4, 4e-4)}  # those of DAPO and GSPO


# Not in `GrpoSettings` itself, so that --help shows them first; see `moe.train.settings.TextSettings`.
@dataclass(frozen=True)
class PolicySettings(ModelSettings):
    """Settings of the task, of sampling and of the loss."""

    init: Path | None = None
    """Model to train, with its tokenizer: a folder, a run, or a Hugging Face Hub name. A base model that was only
    pre-trained on text gives DeepSeek-R1-Zero's recipe, one after sft R1's. Required."""
    task: str = "countdown"
    """Task: countdown, or FILE.py:NAME, an object with lists of prompts `train` and `test` and a function
    reward(prompt, completion). The file is executed."""
    test_prompts: int | None = None
    """Number of held-out prompts to answer, the first ones. Default: all."""
    format_weight: float = FORMAT_WEIGHT
    """Weight of the format in the reward of countdown. Accuracy has weight 1."""
    group_size: int = 8
    """Completions sampled for each prompt. Their rewards are compared with each other."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature. The policy is the distribution at this temperature, in the loss too."""
    updates: int = 1
    """Optimizer updates per pass over the completions of a step; each uses an equal share of them."""
    passes: int = 1
    """Passes over the completions of a step."""
    algorithm: Literal["grpo", "rejection"] = "grpo"
    """Loss. grpo: policy gradient with group-normalised advantages. rejection: cross entropy on the right completions,
    repeated until they are as many as grpo trains on."""
    level: Literal["token", "sequence"] = "token"
    """Probability ratio. token: clipped per token, mean over all tokens of an update (as in DAPO). sequence: clipped
    per sequence, geometric mean over its tokens, mean over sequences (GSPO)."""
    clip_low: float | None = None
    """The ratio is clipped below 1 - this. Default: 0.2 per token, 0.0003 per sequence."""
    clip_high: float | None = None
    """The ratio is clipped above 1 + this. Default: 0.28 per token, 0.0004 per sequence."""
    kl: float = 0.0
    """Coefficient of the KL divergence from the initial model, of which a copy is kept; 0 for none."""
    advantage: Literal["normalized", "centered"] = "normalized"
    """Advantage of a completion. normalized: its reward minus the group's mean, divided by the standard deviation.
    centered: not divided, as in Dr. GRPO."""
    replay: Literal["on", "off"] = "on"
    """Train with the experts that were chosen while sampling. off: the router chooses again."""


@dataclass(frozen=True)
class GrpoSettings(RunSettings, PolicySettings):
    """Settings of `moesmith grpo`. Identical settings give bit-identical results on one machine."""

    kind: ClassVar[str] = "grpo"
    default_lr: ClassVar[Mapping[str, float]] = {"muon": 0.002, "adamw": 0.0004}

    steps: int = 100
    """Number of steps. Each samples batch size * accumulation * updates completions and trains on them."""
    batch_size: int = 64
    """Completions per forward pass of training, summed over all ranks."""
    accumulation: int = 4
    """Forward passes per optimizer update."""
    seq_length: int = 256
    """Longest prompt and completion together, in tokens."""
    lr: float | None = None
    """Peak learning rate. Default: 0.002 with muon (0.3 of it for the AdamW part), 0.0004 with adamw."""
    weight_decay: float = 0.0
    """Weight decay, applied to matrices only, not to norms or biases."""
    warmup: int = 5
    """Steps over which the learning rate rises from zero."""
    bias_update_speed: float = 0.0
    """Change of an expert's correction bias per update; 0 freezes it."""
    seed: int = 0
    """Random seed for the order of prompts and for sampling."""
    eval_every: int = 20
    """Answer the held-out prompts, with the most likely tokens, every N steps, and always before and after the run; 0
    disables the rest."""
    save_every: int = 20
    """Save a state every N steps, and always at the end or when interrupted; 0 disables the rest."""

    def check(self) -> None:
        super().check()
        self._require("init", self.init is not None, "a folder, a run or a Hub name")
        self._require("tokenizer", self.tokenizer is None, "no tokenizer but that of --init")
        self._require("compile", not self.compile, "no compilation, which would hide the routing")
        self._require("group_size", self.group_size >= 2, "2 or more")
        self._require("test_prompts", self.test_prompts is None or self.test_prompts >= 1, "1 or more")
        for name in ("max_new_tokens", "updates", "passes"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        self._require("temperature", 0 < self.temperature < math.inf, "a finite number above 0")
        for name in ("kl", "format_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")
        low, high = self.clip_range
        self._require("clip_low", 0 < low < 1, "a number above 0 and below 1")
        self._require("clip_high", 0 < high < math.inf, "a finite number above 0")
        whole = f"a multiple of the group size {self.group_size} in a step; found {self.completions} completions"
        self._require("batch_size", self.completions % self.group_size == 0, whole)

    @property
    def completions(self) -> int:
        """Completions per step, of all ranks."""
        return self.batch_size * self.accumulation * self.updates

    @property
    def clip_range(self) -> tuple[float, float]:
        """`clip_low` and `clip_high`, or the defaults of the level."""
        low, high = CLIP[self.level]
        return low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high

    @property
    def attention_masks(self) -> bool:
        return True

    def deciding(self) -> dict[str, Any]:
        values = super().deciding()
        file, colon, name = self.task.rpartition(":")
        return values | {"task": f"{Path(file).resolve()}:{name}" if colon else self.task}
