"""`moesmith sft`: supervised fine-tuning on prompts and completions, or on messages."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.cli.running import RunArgs, run_command
from moe.recipes.sft_settings import SftSettings

if TYPE_CHECKING:
    from rich.console import Console

    from moe.recipes.sft import SftRun


@dataclass(frozen=True)
class Args(RunArgs, SftSettings):
    """Fine-tune a model on prompts and completions, or on messages, and save it as `moesmith train` does.

    Only completions are trained on: the text of "completion" and the end-of-text token after it, or the messages of the
    assistant. Examples are packed into rows. Each token attends to its own example only.

    Start from a checkpoint with --init, or from a new model with --preset or --config, and --tokenizer.
    """

    out: Path | None = None
    """Folder of the run: saved states, metrics, plots and checkpoint. Default: runs/MODEL-sft."""


def run(args: Args) -> int:
    def make(folder: Path) -> "SftRun":
        from moe.recipes.sft import SftRun

        return SftRun(args, folder)

    return run_command(make, args, args, show)


def show(console: "Console", summary: dict[str, Any]) -> None:
    """Print the summary of a run on examples."""
    from moe.train.report import print_completions

    prompt = summary["sample"]["prompt"]
    words = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    print_completions(console, summary, shlex.join(["moesmith", "generate", summary["checkpoint"], *words]))
