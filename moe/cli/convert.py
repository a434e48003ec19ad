"""`moesmith convert`: a checkpoint in another dtype or layout, tensor by tensor."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from moe.checkpoint.sizes import parse_size
from moe.errors import ConfigError

_DTYPES = {"fp8": "fp8", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Args:
    """Write a checkpoint again: dequantised, quantised, in other shards, or with other names.

    What is the same in both is copied byte for byte. The source is only read; OUT appears whole or not at all.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A checkpoint folder, or a name on the Hugging Face Hub."""
    out: str
    """The folder to write."""
    dtype: Literal["fp8", "bf16", "fp16", "fp32"] | None = None
    """fp8 quantises projections of attention, MLPs and experts in blocks; by default every tensor stays as it is."""
    block_size: tuple[int, int] | None = None
    """Rows and columns of an FP8 block; by default 128 128."""
    scale_fmt: Literal["ue8m0"] | None = None
    """ue8m0: FP8 scales that are powers of two, as in DeepSeek-V3.1."""
    layout: str | None = None
    """experts (each alone), stacked (as transformers has them in memory), deepseek (names of its inference code, in one
    file), mxfp4 (gpt-oss); by default that of the source."""
    mtp: bool | None = None
    """Multi-token prediction modules; by default they are kept where the layout has names for them."""
    overwrite: bool = False
    """Replace a checkpoint that is in OUT already."""
    max_shard_size: str = "5GB"
    """Of data in one file."""
    progress: bool | None = None
    """A bar on stderr; by default if that is a terminal."""


def run(args: Args) -> int:
    limit = parse_size(args.max_shard_size, "--max-shard-size")
    if args.block_size is not None and args.dtype != "fp8":
        raise ConfigError("--block-size", args.block_size, "none without --dtype fp8")
    from moe.checkpoint.convert import convert

    convert(
        args.folder,
        args.out,
        dtype=_DTYPES[args.dtype] if args.dtype else None,
        block_size=args.block_size or (128, 128),
        scale_fmt=args.scale_fmt,
        table=args.layout,
        mtp=args.mtp,
        overwrite=args.overwrite,
        max_shard_bytes=limit,
        progress=args.progress,
    )
    print(args.out)
    return 0
