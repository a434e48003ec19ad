"""Steps common to `convert` and `cut`: checking the source, and writing the result tensor by tensor."""

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.format.auxiliary import check_auxiliary, read_auxiliary, resolve_references, write_auxiliary
from moe.checkpoint.format.contents import Contents, read_contents
from moe.checkpoint.format.family import Family
from moe.checkpoint.format.folder import CONFIG, SINGLE
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.manifest import Manifest
from moe.checkpoint.reading.hub import explain_cache_misses, find
from moe.checkpoint.reading.load import check_dtypes
from moe.checkpoint.reading.progress import Progress
from moe.checkpoint.reading.values import TORCH_DTYPES, Files, check_repeats
from moe.checkpoint.writing.atomic import check_target, replacing
from moe.checkpoint.writing.shards import Entry, config_bytes, divide, write_shards
from moe.errors import CheckpointError

DEEPSEEK_FILE = "model0-mp1.safetensors"  # the name that DeepSeek's inference code requires

Key = tuple[str, tuple[Any, ...], bool]


def table_for(contents: Contents, family: Family) -> str:
    """Return the layout of the source, or the family's first one if it does not have that layout."""
    return contents.table if contents.table in family.tables else next(iter(family.tables))


def read_source(
    source: str | PathLike[str], target: str | PathLike[str], overwrite: bool, revision: str | None, *, mtp: bool
) -> Contents:
    """Read headers and config.json of the source, after checking that the target can be written or replaced."""
    same = "the source itself, which would be replaced"
    if os.path.realpath(source) == os.path.realpath(target):
        raise CheckpointError(target, same, expected="another folder")
    check_target(target, overwrite=overwrite)
    folder = find(source, revision)
    real = Path(os.path.realpath(folder))
    if real == Path(os.path.realpath(target)):  # a name of a folder elsewhere
        raise CheckpointError(target, same, expected="another folder")
    if Path(os.path.realpath(target)).is_relative_to(real):
        raise CheckpointError(target, "inside the source, which must not change", expected="a folder outside it")
    with explain_cache_misses(source, revision):
        return read_contents(folder, mtp=mtp)


def check_source(contents: Contents) -> None:
    """Raise `CheckpointError` if `load` would refuse the tensors."""
    contents.check()
    check_dtypes(contents)
    check_repeats(contents)


def write_result(
    contents: Contents,
    target: str | PathLike[str],
    entries: Sequence[Entry],
    value: Callable[[Files, Entry], Tensor],
    config: Mapping[str, Any],
    max_shard_bytes: int,
    progress: bool | None,
    description: str,
    *,
    table: str,
    overwrite: bool,
    finish: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write the folder `target` from `entries`, whose values `value` reads from the source."""
    copied = read_auxiliary(contents.folder)
    config, auxiliary = resolve_references(config, copied, same_layout=table == contents.table)
    check_auxiliary(auxiliary, Path(target))
    content, manifest = config_bytes(config, Path(target) / CONFIG), Manifest()
    single = DEEPSEEK_FILE if table == "deepseek" else SINGLE
    files = divide(entries, None if table == "deepseek" else max_shard_bytes, Path(target), single=single)
    with (
        replacing(target, manifest, overwrite=overwrite) as new,
        Progress(description, sum(e.nbytes for e in entries), progress) as bar,
    ):
        with Files(Progress("", 0, False)) as source:
            write_shards(new, files, lambda entry: value(source, entry), manifest, wrote=bar.advance)
        write_auxiliary(new, {**auxiliary, CONFIG: content})
        finish(new)


def names_by_key(contents: Contents) -> dict[Key, str]:
    """Map each part of a parameter to the name of the file tensor that holds it."""
    return {
        (spec.parameter, index_key(spec.index), spec.repeat): name
        for name, spec in contents.specs.items()
        if name in contents.tensors
    }


def index_key(index: tuple[int | slice, ...]) -> tuple[Any, ...]:
    return tuple((i.start, i.stop) if isinstance(i, slice) else i for i in index)


def read_raw(files: Files, info: TensorInfo) -> Tensor:
    tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    if tensor.numel():
        files.read_into(info, 0, tensor)
    return tensor
