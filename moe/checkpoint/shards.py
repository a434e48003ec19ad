"""Writing tensors to safetensors files one after the other, so that no file has to fit into memory.

The safetensors library wants all tensors of a file at once. The files are the same: its readers are what the tests use.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moe.checkpoint.folder import INDEX, SINGLE
from moe.checkpoint.header import DTYPE_BITS
from moe.checkpoint.manifest import Manifest
from moe.checkpoint.reading import STORED

_NAMES = {dtype: name for name, dtype in STORED.items()}
_CHUNK = 64 * 2**20


@dataclass(frozen=True)
class Entry:
    """A tensor to be written; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def entry_of(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Entry:
    return Entry(name, _NAMES[tensor.dtype], shape)


def write_shards(
    folder: Path,
    entries: Sequence[Entry],
    value: Callable[[Entry], Tensor],
    max_shard_bytes: int,
    manifest: Manifest,
    *,
    single: str = SINGLE,
    wrote: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write the entries to shards of at most `max_shard_bytes` of data (or one tensor) and an index.

    What one file holds goes to `single`, without an index. `value` is asked for each tensor once, in the order in which
    they stand in the files.
    """
    shards = [_aligned(shard) for shard in _shards(entries, max_shard_bytes)]
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = single if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            _put(out, memoryview(_header(shard)))
            for entry in shard:
                data = _bytes(entry, value(entry))
                manifest.add({entry.name: data})
                for begin in range(0, len(data), _CHUNK):
                    part = data[begin : begin + _CHUNK]
                    _put(out, part)
                    wrote(len(part))
        weight_map |= dict.fromkeys((entry.name for entry in shard), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
        (folder / INDEX).write_bytes(as_json(index))


def _put(file: BinaryIO, part: memoryview) -> None:
    file.write(part)


def as_json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _shards(entries: Sequence[Entry], max_shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.nbytes
    yield shard


def _aligned(shard: list[Entry]) -> list[Entry]:
    """Wide dtypes first, as the library has it: every tensor starts at a multiple of its itemsize."""
    return sorted(shard, key=lambda entry: -DTYPE_BITS[entry.dtype])


def _header(shard: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in shard:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(entry: Entry, tensor: Tensor) -> memoryview:
    assert _NAMES[tensor.dtype] == entry.dtype and tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
