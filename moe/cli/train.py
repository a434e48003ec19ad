"""`moesmith train`: train a model on text, from a preset, and save it."""

import json
import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from moe.train.settings import Settings


@dataclass(frozen=True)
class Args(Settings):
    """Train a model on text and save it where transformers and `moesmith generate` can load it.

    The defaults train the tiny preset, a whole DeepSeek-V3 in small, in two minutes on two CPU cores. Runs compute on
    the CPU in fp32, and equal settings give equal bits.
    """

    out: Path | None = None
    """Folder of the run: saved states, metrics, plots, checkpoint. By default runs/PRESET."""
    resume: bool = False
    """Go on with the run in that folder; give the options that it began with."""
    overwrite: bool = False
    """Delete an earlier run in that folder and begin again."""
    json: bool = False
    """One JSON object on standard output instead of tables; everything else goes to standard error."""


def run(args: Args) -> int:
    # Read by OpenMP when torch is imported. By default its threads spin while they wait for each other: on two cores
    # that another process also uses, training ran four to eight times slower than with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from rich.console import Console

    from moe.train.loop import NonFiniteError
    from moe.train.report import print_summary
    from moe.train.run import Interrupted, train

    folder = args.out or Path("runs") / args.preset
    progress = Console(stderr=True)
    try:
        summary = train(args, folder, resume=args.resume, overwrite=args.overwrite, console=progress)
    except Interrupted as stop:
        command = shlex.join(["moesmith", "train", *args.options(), "--out", str(folder), "--resume"])
        print(f"stopped after step {stop.step}, saved; to go on: {command}", file=sys.stderr)
        if args.json:
            print(json.dumps({"interrupted": signal.Signals(stop.signum).name, "step": stop.step, "resume": command}))
        return 128 + stop.signum
    except NonFiniteError as error:
        print(f"moesmith: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        prompt = summary["sample"]["prompt"].split("\n")[0]
        command = shlex.join(["moesmith", "generate", summary["checkpoint"], "--prompt", prompt])
        print_summary(Console(), summary, command)
    return 0
