"""`moesmith cut`: a small checkpoint of real weights, from some layers and experts of a large one."""

import json
from dataclasses import dataclass
from typing import Annotated

from moe.checkpoint.format.sizes import parse_size
from moe.cli.options import Option
from moe.cli.source import FOLDER
from moe.errors import ConfigError


@dataclass(frozen=True)
class Args:
    """Write a small checkpoint of some layers and experts, reading only their bytes.

    Prints a record, which is also saved in OUT as cut.json: the layers and experts that were kept, and how far the
    logits are from the source's. That comparison loads the whole source if it fits into memory; --no-compare skips it.
    """

    folder: Annotated[str, Option("FOLDER", positional=True, text=FOLDER)]
    out: Annotated[str, Option("OUT")]
    """Folder to write, new or empty."""
    layers: Annotated[str, Option("LIST")]
    """Layers to keep, for example 0,1,3 or 0-2,60."""
    experts: Annotated[str | None, Option("LIST")] = None
    """Experts to keep in each layer, for example 0-7. With group-limited routing, keep the same number from every group
    used. Default: all."""
    compare: bool = True
    """Compare the result with the source on a fixed input, if the source fits into memory."""
    overwrite: bool = False
    """Replace the checkpoint in OUT."""
    max_shard_size: Annotated[str, Option("SIZE")] = "5GB"
    """Maximum size of one file."""
    progress: bool | None = None
    """Show a progress bar on standard error. Default: on if that is a terminal."""


def run(args: Args) -> int:
    layers = parse_ranges(args.layers, "--layers")
    experts = None if args.experts is None else parse_ranges(args.experts, "--experts")
    limit = parse_size(args.max_shard_size, "--max-shard-size", least=1000)
    from moe.checkpoint.convert import cut

    record = cut(
        args.folder,
        args.out,
        layers=layers,
        experts=experts,
        compare=args.compare,
        overwrite=args.overwrite,
        max_shard_bytes=limit,
        progress=args.progress,
    )
    print(json.dumps(record))
    return 0


def parse_ranges(text: str, field: str) -> list[int]:
    """ "0-2,60" is [0, 1, 2, 60]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdecimal() and len(end) < 9 for end in ends):
            raise ConfigError(field, text, "numbers and ranges such as 0,1,3 or 0-7")
        numbers += range(int(ends[0]), int(ends[1]) + 1)
        if len(numbers) > 2**20:
            raise ConfigError(field, text, f"at most {2**20:,} numbers")
    return numbers
