"""`moesmith convert`: rewrite a checkpoint in another dtype or layout, tensor by tensor."""

from dataclasses import dataclass
from typing import Annotated, Literal

from moe.checkpoint.format.sizes import parse_size
from moe.cli.options import DTYPES, Option, dtype_option, option, read_dtype
from moe.cli.source import FOLDER
from moe.errors import ConfigError


@dataclass(frozen=True)
class Args:
    """Rewrite a checkpoint in another dtype, in other shards, or with other tensor names.

    Unchanged tensors are copied byte for byte. The source is only read; OUT appears complete or not at all.
    """

    folder: Annotated[str, Option("FOLDER", positional=True, text=FOLDER)]
    out: Annotated[str, Option("OUT")]
    """Folder to write, new or empty."""
    dtype: Annotated[str | None, dtype_option(DTYPES)] = None
    """Dtype of the result. fp8 quantises the projections of attention, MLPs and experts in blocks; mxfp4 quantises
    experts (gpt-oss). Default: unchanged."""
    block_size: Annotated[tuple[int, int] | None, Option("ROWS COLUMNS")] = None
    """Size of an FP8 block. Default: 128 128."""
    scale_fmt: Literal["ue8m0"] | None = None
    """Format of FP8 scales. ue8m0: powers of two, as in DeepSeek-V3.1. Default: any fp32 number."""
    layout: Annotated[str | None, Option("{experts,stacked,deepseek,mxfp4}")] = None
    """Names and shapes of the tensors. experts: each expert in its own tensors; stacked: all experts of a layer in one
    tensor, as transformers holds them in memory; deepseek: one file, with the names of DeepSeek's inference code;
    mxfp4: gpt-oss. Default: that of the source."""
    mtp: bool | None = None
    """Keep multi-token prediction modules; --no-mtp ignores their tensors. Default: keep them if the layout has names
    for them."""
    overwrite: bool = False
    """Replace the checkpoint in OUT."""
    max_shard_size: Annotated[str, Option("SIZE")] = "5GB"
    """Maximum size of one file."""
    progress: bool | None = None
    """Show a progress bar on standard error. Default: on if that is a terminal."""


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
