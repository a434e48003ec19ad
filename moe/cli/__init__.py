"""The command line: `moesmith COMMAND`, which is `python -m moe COMMAND`.

Each command is a module here with `Args`, a dataclass that tyro reads, and `run(args) -> exit status`. A module imports
torch inside `run` only, so that help and wrong arguments answer at once.

Exit status: 0 done, 2 the user's mistake (one line on stderr; tyro's own message for what is no option or no number),
130 interrupted, 1 silently on a broken pipe. A bug of ours shows its traceback.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from moe import __version__
from moe.errors import ConfigError, did_you_mean
from moe.train.launcher import MISTAKES, said_once, shown

COMMANDS = {
    "train": "train a preset, a configuration or a checkpoint on text",
    "eval": "score a model on text: perplexity, bits per byte, expert load",
    "generate": "continue prompts with a model",
    "inspect": "configuration and counts; --verify: check that bytes are unchanged",
    "plan": "what each GPU would hold of a model, and whether it fits",
    "place": "which GPU holds which experts, from the loads that a run recorded",
    "convert": "rewrite a checkpoint in another dtype or layout",
    "cut": "small checkpoint of some layers and experts of a large one",
    "doctor": "what this machine has, and which kernels run on it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. tyro leaves by SystemExit: 0 after --help, 2 for wrong arguments."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    args: Any = None
    try:
        if name in ("-h", "--help"):
            print(_help())
        elif name == "--version":
            print(f"moesmith {__version__}")
        elif not name:
            print(_help(), file=sys.stderr)
            return 2
        elif name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
            return _fail(f"no command {name!r}{hint}")
        else:
            from moe.cli.options import parse  # so that other modules of this package can be used without tyro

            command = importlib.import_module(f"moe.cli.{name}")
            with (
                said_once(SystemExit, ConfigError),
                redirect_stdout(shown(sys.stdout)),
                redirect_stderr(shown(sys.stderr)),
            ):
                args = parse(command.Args, name, rest)
            status = command.run(args)
            sys.stdout.flush()  # here, where a reader that went away is expected
            return status
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich does
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except MISTAKES as error:
        if args is None:
            return _fail(str(error))
        from moe.cli.options import in_options

        return _fail(in_options(error, args))
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"moesmith: {' '.join(message.split())}", file=sys.stderr)
    return status


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return f"""usage: moesmith COMMAND [OPTIONS]

Mixture-of-Experts transformers: build, train, load and run them.

{commands}

moesmith COMMAND --help lists the options of a command.
moesmith --version prints the version."""
