"""`python -m benchmarks COMMAND`."""

import argparse
import sys
from typing import NoReturn

from benchmarks import cpu, layer, load


class Parser(argparse.ArgumentParser):
    """Answers wrong arguments with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks",
        description="Timings beside peers, correctness first.",
        epilog="see that it works:  python -m benchmarks layer --small\n"
        "one model's layer:  python -m benchmarks layer --shape olmoe --op forward train decode",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, module, help_ in (
        ("layer", layer, "one MoE layer and its operations beside their peers, on a GPU or a CPU"),
        ("cpu", cpu, "a whole model beside transformers' on the CPU"),
        ("load", load, "loading a checkpoint beside other readers of the same files"),
    ):
        command = commands.add_parser(
            name, help=help_, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help(sys.stderr)
        return 2
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
