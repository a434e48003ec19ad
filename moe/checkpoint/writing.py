"""`save`: a model as a Hugging Face checkpoint folder, whole or not at all."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.checkpoint.atomic import replacing
from moe.checkpoint.config_json import render_config
from moe.checkpoint.families import family_of
from moe.checkpoint.folder import CARRIED, CONFIG, INDEX, SINGLE, read_carried
from moe.checkpoint.layout import Slot, layout
from moe.checkpoint.manifest import Manifest
from moe.checkpoint.reading import DTYPES
from moe.counts import parameter_shapes
from moe.errors import CheckpointError
from moe.model import Transformer


def save(model: Transformer, folder: str | PathLike[str], *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write `model` in Hugging Face layout, so that transformers and the engines load it.

    Tensors keep their dtypes; the correction bias is fp32. Shards hold at most `max_shard_bytes` of data each, or one
    tensor; the model is not copied.

    The folder is written beside its final place, synced, and renamed in one step. An existing checkpoint stays whole
    until the new one replaces it, whatever fails; of two processes that save to one folder at once, the second is
    refused. Tokenizer files and the like that are in the folder already stay, unless the model carries its own. A
    folder that holds anything but a checkpoint's files is refused, and so is a mount point, which nothing can be
    renamed over. `moesmith inspect --verify` compares a saved folder with its manifest.

    Raises `CheckpointError` before writing anything if the family's files cannot express the model, and for what the
    system answers: a full disk and the like.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes}: expected a positive number")
    target = Path(os.path.realpath(folder))
    state, slots = _checked_state(model, target)
    config = _config_bytes(model, state, target)
    for name in model.carried_files:
        if name not in CARRIED:
            raise CheckpointError(target, f"carried file {name!r}", expected=f"one of {', '.join(CARRIED)}")
    manifest = Manifest()
    with replacing(target, manifest) as new:
        _write_tensors(new, state, slots, max_shard_bytes, manifest)
        carried = {**(read_carried(target) if target.exists() else {}), **model.carried_files}
        for name, content in {**carried, CONFIG: config}.items():
            (new / name).write_bytes(content)


def _checked_state(model: Transformer, target: Path) -> tuple[dict[str, Tensor], list[Slot]]:
    """The model's tensors, and where they go in the files; refuses what a reader of the files would refuse."""
    slots = [slot for slot in layout(model.config).values() if slot.written]
    state: dict[str, Tensor] = dict(model.state_dict())
    shapes = parameter_shapes(model.config)
    for name in sorted(state.keys() | shapes.keys()):
        found = tuple(state[name].shape) if name in state else "no such tensor"
        expected = shapes.get(name, "no such tensor")
        if found != expected:
            raise CheckpointError(
                target, "the model is not the one of its config", tensor=name, expected=expected, found=found
            )
        tensor = state[name]
        if tensor.is_meta or tensor.dtype not in DTYPES.values():
            found = "the meta device" if tensor.is_meta else tensor.dtype
            raise CheckpointError(target, "no floating-point values", tensor=name, found=found)
        if name.endswith("e_score_correction_bias"):
            state[name] = tensor.float()
    return state, slots


def _config_bytes(model: Transformer, state: Mapping[str, Tensor], target: Path) -> bytes:
    sizes: dict[torch.dtype, int] = {}
    for tensor in state.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    # Readers take the one dtype named here for all, so it is that of most values.
    dtype = str(max(sizes, key=lambda d: sizes[d])).removeprefix("torch.")
    values = render_config(model.config, target / CONFIG)
    architecture = family_of(model.config.model_type, target).architecture
    values |= {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    try:
        return _json(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(target / CONFIG, f"extra: not JSON: {error}") from error


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_tensors(
    new: Path, state: Mapping[str, Tensor], slots: list[Slot], max_shard_bytes: int, manifest: Manifest
) -> None:
    shards = list(_shards(state, slots, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = new / (SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors")
        tensors = {}
        for slot in shard:
            tensor = state[slot.parameter][slot.index].cpu().contiguous()
            # The library refuses two names for one memory; slices that do not overlap pass without a copy.
            tensors[slot.name] = tensor.clone() if slot.repeat else tensor
        manifest.add({name: _bytes(tensor) for name, tensor in tensors.items()})
        save_file(tensors, file, metadata={"format": "pt"})
        del tensors
        weight_map |= dict.fromkeys((slot.name for slot in shard), file.name)
    if len(shards) > 1:
        total = sum(_nbytes(state, slot) for slot in slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (new / INDEX).write_bytes(_json(index))


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


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a buffer."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
