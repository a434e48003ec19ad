"""`save`: a model as a Hugging Face checkpoint folder, whole or not at all."""

import ctypes
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.checkpoint.config_json import render_config
from moe.checkpoint.families import family_of
from moe.checkpoint.folder import CARRIED, CONFIG, INDEX, SINGLE, previous_folder, read_carried
from moe.checkpoint.layout import Slot, layout, with_scales
from moe.checkpoint.reading import BIAS, DTYPES, STORED, Origin
from moe.counts import parameter_shapes
from moe.errors import CheckpointError
from moe.model import Transformer

# The names of weights: adapters and the like, which also end in .safetensors, are somebody's own.
_TENSORS = re.compile(r"model(-\d{5,6}-of-\d{5,6})?\.safetensors")


def save(model: Transformer, folder: str | PathLike[str], *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write `model` in Hugging Face layout, so that transformers and the engines load it.

    Tensors keep their dtypes; the correction bias is fp32. Shards hold at most `max_shard_bytes` of data each, or one
    tensor; the model is not copied.

    The folder is written beside its final place, synced, and renamed in one step. An existing checkpoint stays whole
    until the new one replaces it, whatever fails; two processes must not save to one folder at once. Tokenizer files
    and the like that are in the folder already stay, unless the model carries its own. A folder that holds anything
    but a checkpoint's files is refused, and so is a mount point, which nothing can be renamed over.

    Raises `CheckpointError` before writing anything if the family's files cannot express the model.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes}: expected a positive number")
    target = Path(os.path.realpath(folder))
    _recover(target)
    _check_replaceable(target)
    state, slots = _checked_state(model, target)
    config = _config_bytes(model, state, target)
    carried = {**(read_carried(target) if target.exists() else {}), **model.carried_files}
    for name in carried:
        if name not in CARRIED:
            raise CheckpointError(target, f"carried file {name!r}", expected=f"one of {', '.join(CARRIED)}")

    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        _write_tensors(new, state, slots, max_shard_bytes)
        for name, content in carried.items():
            _write(new / name, content)
        _write(new / CONFIG, config)  # last: a folder without it is no checkpoint
        _sync(new)
        _replace(target, new)
        _sync(target.parent)
    finally:
        # What is left there is the old checkpoint, or what has been written until an error.
        shutil.rmtree(new, ignore_errors=True)


def _checked_state(model: Transformer, target: Path) -> tuple[dict[str, Tensor], list[Slot]]:
    """The model's tensors, and where they go in the files; refuses what a reader of the files would refuse."""
    state: dict[str, Tensor] = dict(model.state_dict())
    origin: Origin | None = model.origin
    slots = {n: slot for n, slot in layout(model.config, origin and origin.table).items() if slot.written}
    if origin is not None:
        slots = {name: slot for name, slot in slots.items() if name not in origin.omitted}
        if origin.block_size is not None:
            family = family_of(model.config.model_type, target)
            kept = [n for n, slot in slots.items() if state[slot.parameter].dtype == torch.float8_e4m3fn]
            slots = with_scales(slots, family.tables[origin.table], origin.block_size, kept)
    shapes = parameter_shapes(model.config) | {
        slot.parameter: tuple(state[slot.parameter].shape)
        for slot in slots.values()
        if slot.parameter.endswith(("_scale_inv", "_blocks", "_scales")) and slot.parameter in state
    }
    shapes = {name: shape for name, shape in shapes.items() if name in {slot.parameter for slot in slots.values()}}
    for name in sorted(state.keys() | shapes.keys()):
        found = tuple(state[name].shape) if name in state else "no such tensor"
        expected = shapes.get(name, "no such tensor")
        if found != expected:
            raise CheckpointError(
                target, "the model is not the one of its config", tensor=name, expected=expected, found=found
            )
        tensor = state[name]
        if tensor.is_meta or tensor.dtype not in STORED.values():
            found = "the meta device" if tensor.is_meta else tensor.dtype
            raise CheckpointError(target, "no floating-point values", tensor=name, found=found)
        if name.endswith(BIAS):
            state[name] = _as_stored(tensor.float(), origin.biases.get(name) if origin else None)
    return state, list(slots.values())


def _as_stored(bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In the dtype of the files that it came from, as long as that holds every value: bf16 holds no update of 0.001."""
    return bias.to(dtype) if dtype is not None and torch.equal(bias.to(dtype).float(), bias) else bias


def _config_bytes(model: Transformer, state: Mapping[str, Tensor], target: Path) -> bytes:
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.dtype in DTYPES.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    # Readers take the one dtype named here for all, so it is that of most values; of quantised ones, what they become.
    quantization = model.origin.quantization if model.origin else None
    dtype = torch.bfloat16 if quantization else max(sizes, key=lambda d: sizes[d])
    named = str(dtype).removeprefix("torch.")
    values = render_config(model.config, target / CONFIG)
    architecture = family_of(model.config.model_type, target).architecture
    values |= {"architectures": [architecture], "dtype": named, "torch_dtype": named}
    if quantization:
        values["quantization_config"] = dict(quantization)
    try:
        return _json(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(target / CONFIG, f"extra: not JSON: {error}") from error


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_tensors(new: Path, state: Mapping[str, Tensor], slots: list[Slot], max_shard_bytes: int) -> None:
    shards = list(_shards(state, slots, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = new / (SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors")
        tensors = {}
        for slot in shard:
            tensor = slot.stored(state[slot.parameter]).contiguous()
            # The library refuses two names for one memory; slices that do not overlap pass without a copy.
            tensors[slot.name] = tensor.clone() if slot.repeat else tensor
        save_file(tensors, file, metadata={"format": "pt"})
        del tensors
        # The library makes files that only their owner can read; the folder has the mode that the user wants.
        file.chmod(new.stat().st_mode & 0o666)
        _sync(file)
        weight_map |= dict.fromkeys((slot.name for slot in shard), file.name)
    if len(shards) > 1:
        total = sum(_nbytes(state, slot) for slot in slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(new / INDEX, _json(index))


def _shards(state: Mapping[str, Tensor], slots: list[Slot], max_shard_bytes: int) -> Iterator[list[Slot]]:
    shard: list[Slot] = []
    size = 0
    for slot in slots:
        nbytes = _nbytes(state, slot)
        if shard and size + nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(slot)
        size += nbytes
    yield shard


def _nbytes(state: Mapping[str, Tensor], slot: Slot) -> int:
    return math.prod(slot.shape) * state[slot.parameter].element_size()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk, not only in the cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _recover(target: Path) -> None:
    """Finish what a save that died between two renames, or before removing the old checkpoint, has left."""
    previous = previous_folder(target)
    if not previous.exists():
        return
    if (target / CONFIG).exists():
        shutil.rmtree(previous)
        return
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # somebody made the folder anew; the checkpoint is still the one put aside
    if target.exists():
        raise CheckpointError(target, "in the way of the checkpoint that a broken save has left", found=str(previous))
    os.rename(previous, target)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(target, "not a folder")
    if target.is_mount():
        raise CheckpointError(target, "a mount point, which cannot be replaced in one step; save to a folder in it")
    known = {CONFIG, INDEX, *CARRIED}
    foreign = sorted(
        p.name for p in target.iterdir() if not p.is_file() or (p.name not in known and not _TENSORS.fullmatch(p.name))
    )
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise CheckpointError(
            target,
            "the folder would be replaced but holds other files",
            expected="a checkpoint or nothing",
            found=shown,
        )


def _replace(target: Path, new: Path) -> None:
    """Put the folder `new` in the place of `target`. Afterwards `new` is the old checkpoint, or nothing."""
    if not target.exists():
        os.rename(new, target)
        return
    if _swap(target, new):
        return
    previous = previous_folder(target)
    os.rename(target, previous)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(previous, target)
        raise
    shutil.rmtree(previous)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
