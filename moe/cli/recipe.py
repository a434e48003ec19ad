"""`moesmith recipe`: DeepSeek-R1's recipe from pre-training to distillation."""

import json
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from moe.cli.options import Option
from moe.errors import ConfigError
from moe.recipes.countdown_settings import RecipeSettings

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Args(RecipeSettings):
    """Run DeepSeek-R1's recipe on the Countdown game: reach a target with + - * / from three numbers.

    A Mixture-of-Experts model is pre-trained on arithmetic (stage pretrain), fine-tuned on generated chains of thought
    (sft, the cold start), trained by reinforcement learning with accuracy rewards (grpo), and distilled into a dense
    student (distill). Three more stages are comparisons: rejection, which trains on the right completions by cross
    entropy instead of grpo; zero, which is grpo without a cold start, as in R1-Zero; and scratch, the student trained
    on the cold start.

    Each stage is a run in a folder of its own, which the other commands read. The same command continues an interrupted
    recipe.
    """

    recipe: Annotated[str, Option("RECIPE", positional=True)] = field(kw_only=True)
    """Recipe to run: countdown."""
    out: Path = Path("runs/countdown")
    """Folder of the recipe: texts, runs and models of each seed, summary.json and accuracy.png."""
    overwrite: bool = False
    """Delete an earlier recipe in --out and start over."""
    json: bool = False
    """Print one JSON object on standard output instead of a table; everything else goes to standard error."""

    def check(self) -> None:
        if self.recipe != "countdown":
            raise ConfigError("RECIPE", self.recipe, "countdown")
        super().check()


def run(args: Args) -> int:
    if "RANK" in os.environ:
        raise ConfigError("torchrun", os.environ["RANK"], "one process; torchrun runs train, sft, grpo and distill")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see moe.cli.running

    from rich.console import Console

    from moe.recipes.countdown_recipe import recipe
    from moe.train.lifecycle import Interrupted
    from moe.train.loop import NonFiniteError

    try:
        summary = recipe(args, args.out, overwrite=args.overwrite, console=Console(stderr=True))
    except Interrupted as stop:
        command = shlex.join(["moesmith", *(word for word in sys.argv[1:] if word != "--overwrite")])
        where = stop.state.parent.parent
        print(f"stopped after step {stop.step} of {where}, saved; continue with: {command}", file=sys.stderr)
        if args.json:
            print(json.dumps({"interrupted": signal.Signals(stop.signum).name, "step": stop.step, "resume": command}))
        return 128 + stop.signum
    except NonFiniteError as error:
        print(f"moesmith recipe: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        _show(Console(), summary)
    return 0


def _show(console: "Console", summary: dict[str, Any]) -> None:
    from moe.train.report import print_table, say

    rows = []
    for stage, found in summary["stages"].items():
        values = found["accuracy"]
        spread = "" if values["spread"] is None else f"{100 * values['spread']:.1f}"
        rows.append((stage, f"{100 * values['mean']:.1f}", spread, *(_number(found, name) for name in _NUMBERS)))
    seeds = len(summary["seeds"])
    print_table(
        console,
        f"accuracy on {summary['problems']} held-out problems, {seeds} {'seed' if seeds == 1 else 'seeds'}",
        ("stage", "mean %", "spread", *_NUMBERS.values()),
        rows,
    )
    say(console, f"summary  {summary['folder']}/summary.json")
    for plot in summary["plots"]:
        say(console, f"plot     {plot}")


_NUMBERS = {"seconds": "seconds", "sampled_tokens": "sampled tokens", "trained_tokens": "trained tokens"}


def _number(found: dict[str, Any], name: str) -> str:
    return f"{found[name]['mean']:,.0f}" if name in found else ""
