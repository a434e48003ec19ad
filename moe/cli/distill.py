"""`moesmith distill`: train a student on the logits or the completions of a teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe.cli.running import RunArgs, run_command
from moe.cli.sft import show
from moe.recipes.distill_settings import DistillSettings

if TYPE_CHECKING:
    from moe.recipes.distill import DistillRun


@dataclass(frozen=True)
class Args(RunArgs, DistillSettings):
    """Distill a teacher into a student, a model of any architecture, and save it as `moesmith train` does.

    By logits, the student learns the teacher's probabilities of every token of the given completions. Both models must
    have the same tokenizer. By traces, the teacher samples completions, a reward selects some, and the student is
    fine-tuned on them.

    The student is a checkpoint (--init), or a new model (--preset or --config).
    """

    out: Path | None = None
    """Folder of the run: saved states, metrics, plots and checkpoint. Default: runs/MODEL-distill."""


def run(args: Args) -> int:
    def make(folder: Path) -> "DistillRun":
        from moe.recipes.distill import DistillRun

        return DistillRun(args, folder)

    return run_command(make, args, args, show)
