"""Steps common to `convert` and `cut`: checking the source, and writing the result tensor by tensor."""

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.format.carried import check_carried, read_carried, resolved, write_carried
from moe.checkpoint.format.comparison import Plan, plan
from moe.checkpoint.format.family import Family
from moe.checkpoint.format.folder import CONFIG, SINGLE
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.manifest import Manifest
from moe.checkpoint.reading.hub import find, from_cache
from moe.checkpoint.reading.load import check_dtypes
from moe.checkpoint.reading.progress import Progress
from moe.checkpoint.reading.values import STORED, Files, check_repeats
from moe.checkpoint.writing.atomic import check_target, replacing
from moe.checkpoint.writing.shards import Entry, config_bytes, divide, write_shards
from moe.errors import CheckpointError

DEEPSEEK_FILE = "model0-mp1.safetensors"  # the name that DeepSeek's inference code requires

Key = tuple[str, tuple[Any, ...], bool]


def table_for(todo: Plan, family: Family) -> str:
    """Return the layout of the source, or the family's first one if it does not have that layout."""
    return todo.table if todo.table in family.tables else next(iter(family.tables))


def plan_source(
    source: str | PathLike[str], target: str | PathLike[str], overwrite: bool, revision: str | None, *, mtp: bool
) -> Plan:
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
    with from_cache(source, revision):
        return plan(folder, mtp=mtp)


def check_source(todo: Plan) -> None:
    """Raise `CheckpointError` if `load` would refuse the tensors."""
    todo.check()
    check_dtypes(todo)
    check_repeats(todo)


def write_result(
    todo: Plan,
    target: str | PathLike[str],
    entries: Sequence[Entry],
    value: Callable[[Files, Entry], Tensor],
    config: Mapping[str, Any],
    max_shard_bytes: int,
    progress: bool | None,
    doing: str,
    *,
    table: str,
    overwrite: bool,
    finish: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write the folder `target` from `entries`, whose values `value` reads from the source."""
    config, carried = resolved(config, read_carried(todo.folder), same_layout=table == todo.table)
    check_carried(carried, Path(target))
    content, manifest = config_bytes(config, Path(target) / CONFIG), Manifest()
    single = DEEPSEEK_FILE if table == "deepseek" else SINGLE
    files = divide(entries, None if table == "deepseek" else max_shard_bytes, Path(target), single=single)
    with (
        replacing(target, manifest, overwrite=overwrite) as new,
        Progress(doing, sum(e.nbytes for e in entries), progress) as bar,
    ):
        with Files(Progress("", 0, False)) as source:
            write_shards(new, files, lambda entry: value(source, entry), manifest, wrote=bar.advance)
        write_carried(new, {**carried, CONFIG: content})
        finish(new)


def names_by_key(todo: Plan) -> dict[Key, str]:
    """Map each part of a parameter to the name of the file tensor that holds it."""
    return {
        (slot.parameter, hashable(slot.index), slot.repeat): name
        for name, slot in todo.slots.items()
        if name in todo.tensors
    }


def hashable(index: tuple[int | slice, ...]) -> tuple[Any, ...]:
    return tuple((i.start, i.stop) if isinstance(i, slice) else i for i in index)


def read_raw(files: Files, info: TensorInfo) -> Tensor:
    tensor = torch.empty(info.shape, dtype=STORED[info.dtype])
    if tensor.numel():
        files.read_into(info, 0, tensor)
    return tensor
