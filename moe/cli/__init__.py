"""The command line: `moesmith COMMAND`, which is `python -m moe COMMAND`.

Each command is a module here with a dataclass `Args` (see `moe.cli.options`) and `run(args) -> exit status`. A module
imports torch only inside `run`, so that help and usage errors appear at once.

Exit status: 0 success, 2 a user's mistake (one line on stderr), 130 interrupted, 1 silently on a broken pipe. A bug of
ours shows its traceback.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from moe import __version__
from moe.cli.options import UsageError, in_options, parse
from moe.errors import ConfigError, did_you_mean, one_line
from moe.train.launcher import MISTAKES, reported_once, shown

COMMANDS = {
    "train": "train a preset, a configuration or a checkpoint on text",
    "sft": "fine-tune a model on prompts and completions, or messages",
    "distill": "train a student on the logits or completions of a teacher",
    "grpo": "train a model on a task by reinforcement learning",
    "recipe": "run DeepSeek-R1's recipe, from pre-training to distillation",
    "eval": "score a model on text, or on a task",
    "trace": "record the experts of each token; compute balance and cache hits",
    "generate": "continue prompts with a model, or chat with it",
    "inspect": "print configuration and parameter counts, or verify the files",
    "plan": "estimate memory per GPU, and the cost of a training run",
    "place": "assign experts to GPUs, based on the loads that a run recorded",
    "convert": "rewrite a checkpoint in another dtype or layout",
    "cut": "write a small checkpoint of some layers and experts",
    "doctor": "print hardware, packages, and the implementation of each operator",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; --help leaves by SystemExit."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    program, args = "moesmith", None
    try:
        if name in ("-h", "--help"):
            print(_help())
        elif name == "--version":
            print(f"moesmith {__version__}")
        elif not name:
            print(_help(), file=sys.stderr)
            return 2
        elif name not in COMMANDS:
            expected = f"COMMAND: expected one of {', '.join(COMMANDS)}; found {one_line(repr(name))}"
            return _fail(program, f"{expected}{did_you_mean(name, COMMANDS)}")
        else:
            program = f"moesmith {name}"
            command = importlib.import_module(f"moe.cli.{name}")
            with (
                reported_once(SystemExit, ConfigError, UsageError),
                redirect_stdout(shown(sys.stdout)),
                redirect_stderr(shown(sys.stderr)),
            ):
                args = parse(command.Args, name, rest)
            status = command.run(args)
            sys.stdout.flush()  # here, where a closed pipe is expected
            return status
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich does
    except KeyboardInterrupt:
        return _fail(program, "interrupted", status=130)
    except (*MISTAKES, UsageError) as error:
        return _fail(program, in_options(error, args))
    return 0


def _fail(program: str, message: str, status: int = 2) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return f"""usage: moesmith COMMAND [OPTIONS]

Mixture-of-Experts transformers: build, train, load and run them.

{commands}

moesmith COMMAND --help lists the options of a command.
moesmith --version prints the version."""
