"""Writing of safetensors files tensor by tensor, so that a file need not fit into memory.

The safetensors library requires all tensors of a file at once.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moe.checkpoint.format.folder import (
    INDEX,
    MANIFEST,
    MAX_CONFIG_BYTES,
    MAX_CONFIG_VALUES,
    MAX_INDEX_BYTES,
    MAX_INDEX_TENSORS,
    SINGLE,
)
from moe.checkpoint.format.header import DTYPE_BITS, MAX_HEADER_BYTES, MAX_TENSORS, check_name
from moe.checkpoint.format.manifest import MAX_MANIFEST_BYTES, Manifest, record_bytes
from moe.checkpoint.format.quantized_formats import check_quantization
from moe.checkpoint.format.strict_json import parse_as_python, parse_json
from moe.checkpoint.reading.values import TORCH_DTYPES
from moe.errors import CheckpointError, ConfigError

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_CHUNK = 64 * 2**20
_HEADER_FRAME = 64  # bytes around a header's entries: braces, the format, padding


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


def check_dense(tensors: Mapping[str, Any], target: Path) -> None:
    """Raise `CheckpointError` for tensors that are not dense arrays: quantised, sparse, packed or fake ones.

    DTensors are accepted, because their parts are read one by one.
    """
    for name, tensor in tensors.items():
        dense = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not dense and not hasattr(tensor, "device_mesh"):
            found = tensor.layout if type(tensor) is torch.Tensor else type(tensor).__name__
            problem = "not a dense tensor: dequantise the model, or replace the module, before saving it"
            raise CheckpointError(target, problem, tensor=name, expected="torch.Tensor", found=found)


def divide(
    entries: Sequence[Entry], max_shard_bytes: int | None, target: Path, *, single: str = SINGLE
) -> dict[str, list[Entry]]:
    """Divide tensors into files of at most `max_shard_bytes` of data: file name -> its entries in order.

    A larger tensor has a file of its own. A file also ends before its header exceeds a reader's limit. None makes one
    file. A single file is called `single`.

    Raises `CheckpointError` about `target` if a reader would refuse the files, their index or their manifest, and
    `ConfigError` if `max_shard_bytes` is not positive.
    """
    if max_shard_bytes is not None and not (isinstance(max_shard_bytes, int | float) and max_shard_bytes >= 1):
        raise ConfigError("max_shard_bytes", max_shard_bytes, "a positive number")
    whole = [list(entries)]
    shards = [_aligned(shard) for shard in (whole if max_shard_bytes is None else _shards(entries, max_shard_bytes))]
    files = dict(zip([single] if len(shards) == 1 else _names_of(len(shards)), shards, strict=True))
    _check_limits(files, target)
    return files


def _names_of(count: int) -> list[str]:
    width = max(5, len(str(count)))
    return [f"model-{i:0{width}}-of-{count:0{width}}.safetensors" for i in range(1, count + 1)]


def write_shards(
    folder: Path,
    files: Mapping[str, Sequence[Entry]],
    value: Callable[[Entry], Tensor],
    manifest: Manifest,
    *,
    wrote: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write the files that `divide` returned, and their index if there are several.

    `value` is called once for each tensor, in file order.
    """
    for file, shard in files.items():
        with (folder / file).open("wb") as out:
            _put(out, memoryview(_header(shard)))
            for entry in shard:
                data = _bytes(entry, value(entry))
                manifest.add({entry.name: data})
                for begin in range(0, len(data), _CHUNK):
                    part = data[begin : begin + _CHUNK]
                    _put(out, part)
                    wrote(len(part))
    if len(files) > 1:
        (folder / INDEX).write_bytes(_index(files))


def _index(files: Mapping[str, Sequence[Entry]]) -> bytes:
    total = sum(entry.nbytes for shard in files.values() for entry in shard)
    weight_map = {entry.name: file for file, shard in files.items() for entry in shard}
    return as_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _check_limits(files: Mapping[str, Sequence[Entry]], target: Path) -> None:
    def check(name: str, what: str, found: int, limit: int, instead: str) -> None:
        if found > limit:
            problem = f"{what}: more than a reader accepts; choose {instead}"
            raise CheckpointError(target / name, problem, expected=f"at most {limit}", found=found)

    for file, shard in files.items():
        instead = "a layout with several files"
        check(file, "tensors in one file", len(shard), MAX_TENSORS, instead)
        check(file, "bytes of the header", len(_header(shard)) - 8, MAX_HEADER_BYTES, instead)
        for entry in shard:
            check_name(entry.name, target / file)
    instead = "a layout that stacks experts"
    if len(files) > 1:
        check(INDEX, "tensors in the index", sum(map(len, files.values())), MAX_INDEX_TENSORS, instead)
        check(INDEX, "bytes of the index", len(_index(files)), MAX_INDEX_BYTES, instead)
    size = sum(record_bytes(entry.name, entry.shape) for shard in files.values() for entry in shard)
    check(MANIFEST, "bytes of the manifest", size, MAX_MANIFEST_BYTES, instead)


def _put(file: BinaryIO, part: memoryview) -> None:
    file.write(part)


def as_json(values: Any, indent: int | None = 2) -> bytes:
    return (json.dumps(values, indent=indent, sort_keys=True, allow_nan=False) + "\n").encode()


def config_bytes(values: Mapping[str, Any], path: Path) -> bytes:
    """Return the text of config.json; raises `CheckpointError` about `path` if its reader would refuse it."""
    try:
        content = as_json(values)
        if len(content) > MAX_CONFIG_BYTES:  # the original may have no line breaks
            content = as_json(values, indent=None)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"extra: not JSON: {error}") from error
    if len(content) > MAX_CONFIG_BYTES:
        expected = f"at most {MAX_CONFIG_BYTES} bytes"
        raise CheckpointError(path, "extra: more than a reader accepts", expected=expected, found=len(content))
    parse_json(content, path)
    parse_as_python(content, path, max_values=MAX_CONFIG_VALUES)
    check_quantization(values, path)
    return content


def _shards(entries: Sequence[Entry], max_shard_bytes: int) -> Iterator[list[Entry]]:
    digits = len(str(sum(entry.nbytes for entry in entries)))
    shard: list[Entry] = []
    size, header = 0, _HEADER_FRAME
    for entry in entries:
        mine = len(json.dumps({entry.name: _header_entry(entry, 10**digits, 10**digits)}))
        full = len(shard) == MAX_TENSORS or header + mine > MAX_HEADER_BYTES
        if shard and (full or size + entry.nbytes > max_shard_bytes):
            yield shard
            shard, size, header = [], 0, _HEADER_FRAME
        shard.append(entry)
        size += entry.nbytes
        header += mine
    yield shard


def _header_entry(entry: Entry, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}


def _aligned(shard: list[Entry]) -> list[Entry]:
    """Sort by dtype, widest first, as the library does, so that every tensor is aligned to its itemsize."""
    return sorted(shard, key=lambda entry: -DTYPE_BITS[entry.dtype])


def _header(shard: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in shard:
        header[entry.name] = _header_entry(entry, at, at + entry.nbytes)
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(entry: Entry, tensor: Tensor) -> memoryview:
    assert _NAMES[tensor.dtype] == entry.dtype and tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
