"""`python -m benchmarks COMMAND`."""

import argparse
import importlib
import sys
from typing import NoReturn

COMMANDS = {
    "layer": "one MoE layer and its operations, on a GPU or a CPU",
    "cpu": "a whole model on the CPU, compared with transformers",
    "load": "loading a checkpoint, compared with other readers",
    "parallel": "packing, bytes and scaling of expert parallelism",
    "qualify": "tests and benchmarks on a machine with a GPU, in stages",
}


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message} (--help lists the options)\n")


def main(argv: list[str] | None = None) -> int:
    """Exit status of a command; 2 for bad input and 130 after Ctrl-C, each with one line."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


def _main(argv: list[str] | None) -> int:
    from benchmarks.harness import BadInput  # takes seconds, during which Ctrl-C may come as well

    given = sys.argv[1:] if argv is None else argv

    parser = Parser(
        prog="python -m benchmarks",
        description="Compare moesmith with other libraries (peers). Only correct results are timed.",
        epilog="smoke test:\n  python -m benchmarks layer --small\n"
        "one model's layer:\n  python -m benchmarks layer --shape olmoe --op forward train decode",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, help_ in COMMANDS.items():
        command = commands.add_parser(name, help=help_, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:  # only this module, because another's imports may fail here
            module = importlib.import_module(f"benchmarks.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run, name=name)
    args = parser.parse_args(given)
    if "run" not in args:
        parser.print_help(sys.stderr)
        return 2
    try:
        return args.run(args)
    except BadInput as error:
        print(f"benchmarks {args.name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
