"""`python -m benchmarks COMMAND`."""

import argparse
import sys

from benchmarks import cpu


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Timings beside peers, correctness first."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("cpu", help="a whole model beside transformers' on the CPU", description=cpu.__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    cpu.add_arguments(command)
    command.set_defaults(run=cpu.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
