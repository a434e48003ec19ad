"""`moesmith convert`: a checkpoint in another dtype or layout, tensor by tensor."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from moe.checkpoint.format.sizes import parse_size
from moe.cli.options import DTYPES, UNSET, dtype_option, option, read_dtype
from moe.cli.source import FOLDER
from moe.errors import ConfigError


@dataclass(frozen=True)
class Args:
    """Rewrite a checkpoint: dequantised, quantised, in other shards, or with other names.

    Unchanged tensors are copied byte for byte. The source is only read; OUT appears whole or not at all.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help=FOLDER)]
    out: Annotated[str, tyro.conf.arg(metavar="OUT")]
    """Folder to write, new or empty."""
    dtype: Annotated[str | None, dtype_option(DTYPES)] = None
    """Dtype of the result; default: unchanged. fp8 quantises the projections of attention, MLPs and experts in blocks.
    mxfp4 quantises experts (gpt-oss)."""
    block_size: Annotated[tuple[int, int] | None, UNSET, tyro.conf.arg(metavar="ROWS COLUMNS")] = None
    """Size of an FP8 block; default: 128 128."""
    scale_fmt: Annotated[Literal["ue8m0"] | None, UNSET] = None
    """ue8m0: FP8 scales that are powers of two, as in DeepSeek-V3.1."""
    layout: Annotated[str | None, UNSET, tyro.conf.arg(metavar="{experts,stacked,deepseek,mxfp4}")] = None
    """Names and shapes of the tensors; default: those of the source. experts: each expert alone.
    stacked: all experts of a layer in one tensor, as transformers has them in memory.
    deepseek: one file, with the names of DeepSeek's inference code. mxfp4: gpt-oss."""
    mtp: Annotated[bool | None, UNSET] = None
    """Keep multi-token prediction modules; default: if the layout has names for them.
    --no-mtp does not look at their tensors."""
    overwrite: bool = False
    """Replace the checkpoint in OUT."""
    max_shard_size: Annotated[str, tyro.conf.arg(metavar="SIZE")] = "5GB"
    """Maximum size of one file."""
    progress: Annotated[bool | None, UNSET] = None
    """Progress bar on stderr; default: if stderr is a terminal."""


def run(args: Args) -> int:
    limit = parse_size(args.max_shard_size, "--max-shard-size", least=1000)
    dtype = None if args.dtype is None else read_dtype(args.dtype, DTYPES)
    for name in ("block_size", "scale_fmt"):
        if getattr(args, name) is not None and dtype != "fp8":
            raise ConfigError(option(name), getattr(args, name), "none without --dtype fp8")
    from moe.checkpoint.convert import convert

    convert(
        args.folder,
        args.out,
        dtype=dtype,
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
