"""Settings of `moesmith recipe countdown`. Imports no torch, because the command line reads them first."""

import math
from dataclasses import dataclass

from moe.errors import ConfigError
from moe.presets import preset

STAGES = ("pretrain", "sft", "grpo", "distill", "rejection", "zero", "scratch")
DEFAULT_STAGES = STAGES[:4]
NEEDS = {
    "pretrain": (),
    "sft": ("pretrain",),
    "grpo": ("sft",),
    "distill": ("grpo",),
    "rejection": ("sft",),
    "zero": ("pretrain",),
    "scratch": (),
}


@dataclass(frozen=True)
class RecipeSettings:
    """Settings of the recipe. Identical settings give bit-identical results on one machine."""

    preset: str = "countdown-tiny"
    """Preset of the model, a name from `moe.presets`."""
    student: str = "countdown-student"
    """Preset of the student of distill and scratch."""
    stages: tuple[str, ...] = DEFAULT_STAGES
    """Stages: some of pretrain, sft, grpo, distill, rejection, zero and scratch. Stages that they need are added."""
    seeds: tuple[int, ...] = (0,)
    """Random seeds. Each gives its own texts and models; the held-out problems are the same."""
    pretrain_steps: int = 800
    """Steps of pretrain."""
    sft_steps: int = 2600
    """Steps of sft."""
    grpo_steps: int = 60
    """Steps of grpo, rejection and zero."""
    distill_steps: int = 1200
    """Steps of distill and scratch."""
    traces: int = 4000
    """Problems for which the teacher of distill samples a completion; the right ones are kept."""
    group_size: int = 8
    """Completions of each problem in a step of grpo, rejection and zero."""
    completions: int = 256
    """Completions of a step of grpo, rejection and zero, trained on in two updates."""
    sft_lr: float = 0.02
    """Peak learning rate of sft."""
    grpo_lr: float = 0.002
    """Peak learning rate of grpo, rejection and zero."""
    student_lr: float = 0.02
    """Peak learning rate of distill and scratch."""
    problems: int = 500
    """Held-out problems on which models are scored, 1 to 500."""

    def check(self) -> None:
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages:
            raise ConfigError("--stages", " ".join(unknown) or None, f"some of {', '.join(STAGES)}")
        for name in ("preset", "student"):
            try:
                preset(getattr(self, name))
            except ConfigError as error:
                raise ConfigError(f"--{name}", getattr(self, name), error.allowed) from None
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(0 <= s < 2**31 for s in self.seeds):
            raise ConfigError("--seeds", " ".join(map(str, self.seeds)), "different integers from 0 to 2^31 - 1")
        for name in ("pretrain_steps", "sft_steps", "grpo_steps", "distill_steps", "traces"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}", getattr(self, name), "1 or more")
        for name in ("sft_lr", "grpo_lr", "student_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')}", getattr(self, name), "a finite number above 0")
        if self.group_size < 2:
            raise ConfigError("--group-size", self.group_size, "2 or more")
        whole = math.lcm(self.group_size, 4)  # two updates of two forward passes
        if self.completions < 1 or self.completions % whole:
            raise ConfigError("--completions", self.completions, f"a multiple of {whole}, for --group-size and updates")
        if not 1 <= self.problems <= 500:
            raise ConfigError("--problems", self.problems, "an integer from 1 to 500")

    @property
    def complete_stages(self) -> tuple[str, ...]:
        """`stages` and those that they need, in order."""
        wanted = set(self.stages)
        while missing := {need for stage in wanted for need in NEEDS[stage]} - wanted:
            wanted |= missing
        return tuple(stage for stage in STAGES if stage in wanted)
