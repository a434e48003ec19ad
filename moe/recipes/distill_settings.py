"""Settings of `moesmith distill`. Imports no torch, because the command line reads them first."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from moe.recipes.sft_settings import SftSettings
from moe.train.settings import ModelSettings


# Apart, so that --help shows these first; see `moe.train.settings.TextSettings`.
@dataclass(frozen=True)
class TeacherSettings(ModelSettings):
    """Settings of the teacher."""

    teacher: Path | None = None
    """Model to distill, which is not changed: a folder, a run, or a Hugging Face Hub name. Required."""
    by: Literal["logits", "traces"] = "logits"
    """Way of distillation. logits: train on the completions of --data and on the teacher's probabilities of each of
    their tokens. traces: train on completions that the teacher samples for the prompts of --data or --task."""
    kl_weight: float = 0.5
    """Weight of the KL divergence of the student from the teacher, by logits; the cross entropy has the rest. With 0,
    the run equals that of `moesmith sft`."""
    kl_temperature: float = 1.0
    """Divisor of the logits of both models in the KL divergence, which is multiplied by its square."""
    task: str | None = None
    """Task whose training prompts are used by traces, and whose reward selects completions: countdown, or FILE.py:NAME,
    as in `moesmith grpo`. A completion is kept if the first part of its reward is 1 or more."""
    prompts: int | None = None
    """Number of prompts, by traces: the first ones. Default: all."""
    samples: int = 1
    """Completions that the teacher samples for each prompt, by traces."""
    max_new_tokens: int = 128
    """Longest completion in tokens, by traces. Completions that do not end by then are dropped."""
    temperature: float = 1.0
    """Sampling temperature, by traces; 0 always selects the most likely token."""


@dataclass(frozen=True)
class DistillSettings(SftSettings, TeacherSettings):
    """Settings of `moesmith distill`. Identical settings give bit-identical results on one machine."""

    kind: ClassVar[str] = "distill"

    tokenizer: Path | None = None
    """Tokenizer: a tokenizer.json, or a folder or Hub name that has one. Default: that of --init, otherwise the
    teacher's."""

    @property
    def tokenizer_path(self) -> Path | None:
        return super().tokenizer_path or self.teacher

    def check(self) -> None:
        self._require("teacher", self.teacher is not None, "a folder, a run or a Hub name")
        super().check()
        self._require("kl_weight", 0 <= self.kl_weight <= 1, "a number from 0 to 1")
        self._require("kl_temperature", 0 < self.kl_temperature < math.inf, "a finite number above 0")
        self._require("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0")
        self._require("prompts", self.prompts is None or self.prompts >= 1, "1 or more")
        for name in ("samples", "max_new_tokens"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        options = {
            "logits": ("kl_weight", "kl_temperature"),
            "traces": ("task", "prompts", "samples", "max_new_tokens", "temperature"),
        }
        for by, names in options.items():
            for name in names:
                unchanged = getattr(self, name) == getattr(TeacherSettings, name)
                self._require(name, by == self.by or unchanged, f"this option only with --by {by}")

    def _check_data(self) -> None:
        if self.by == "traces":
            self._require("data", self.task is not None or self.data is not None, "files of prompts, or --task")
        if self.task is None:
            super()._check_data()
        else:
            self._require("data", self.data is None, "no files together with --task")
