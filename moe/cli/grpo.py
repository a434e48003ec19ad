"""`moesmith grpo`: train a model on a task by reinforcement learning."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.cli.running import RunArgs, run_command
from moe.recipes.grpo_settings import GrpoSettings

if TYPE_CHECKING:
    from rich.console import Console

    from moe.recipes.grpo_run import GrpoRun


@dataclass(frozen=True)
class Args(RunArgs, GrpoSettings):
    """Train a model on a task by reinforcement learning with group-normalised rewards (GRPO).

    Each step samples a group of completions for each of some prompts, scores them with the task's reward, and raises
    the probability of those that are better than the mean of their group. Countdown is built in; --task FILE.py:NAME
    takes your own prompts and reward. The experts that are chosen while sampling are used in training, too.

    Under torchrun (torchrun --nproc-per-node N -m moe grpo ...), N processes train one model, each on its share of the
    prompts.
    """

    out: Path | None = None
    """Folder of the run: saved states, metrics, plots and checkpoint. Default: runs/MODEL-grpo."""


def run(args: Args) -> int:
    def make(folder: Path) -> "GrpoRun":
        from moe.recipes.grpo_run import GrpoRun

        return GrpoRun(args, folder)

    return run_command(make, args, args, _show)


def _show(console: "Console", summary: dict[str, Any]) -> None:
    from moe.train.report import print_policy_summary

    print_policy_summary(console, summary)
