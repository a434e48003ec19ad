"""`moesmith train`: train a model on text and save it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.cli.options import option
from moe.cli.running import RunArgs, run_command
from moe.train.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from moe.train.run import TextRun


@dataclass(frozen=True)
class Args(RunArgs, Settings):
    """Train a model on text and save it in a format that transformers and `moesmith generate` can load.

    The defaults train the tiny preset, a complete DeepSeek-V3 in miniature, in two minutes on two CPU cores. Training
    runs on the CPU in fp32 by default; identical settings give bit-identical results.

    Under torchrun (torchrun --nproc-per-node N -m moe train ...), N processes train one model, each on a part of every
    batch.
    """


def run(args: Args) -> int:
    def make(folder: Path) -> "TextRun":
        from moe.train.run import TextRun

        return TextRun(args, folder)

    return run_command(make, args, args, _show)


def _show(console: "Console", summary: dict[str, Any]) -> None:
    from moe.train.report import print_summary

    print_summary(console, summary, _generate(summary["checkpoint"], summary["sample"]["prompt"]))


def _generate(checkpoint: str, text: str) -> str | None:
    """The command that continues the first line of `text`, sampled as in the summary; None if all lines are empty."""
    from moe.train.run import SAMPLING

    line = next((line for line in text.splitlines() if line.strip() not in ("", "-")), None)  # - is standard input
    if line is None:
        return None
    prompt = [f"--prompt={line}"] if line.startswith("-") else ["--prompt", line]
    rules = [word for name, value in SAMPLING.items() for word in (option(name), str(value))]
    return shlex.join(["moesmith", "generate", checkpoint, *prompt, *rules])
