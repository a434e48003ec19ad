"""The header of one safetensors file, read strictly: nothing else in the file is touched, nothing is guessed.

A file is an 8-byte little-endian length, that many bytes of JSON, and the data:

    {"__metadata__": {"format": "pt"}, NAME: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …}

with offsets from the start of the data. The safetensors library accepts everything that is accepted here.
"""

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint.strict_json import parse_json
from moe.errors import CheckpointError

MAX_HEADER_BYTES = 16 * 2**20
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are: `nbytes` bytes at `offset` of the file `path`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    size = _regular_size(path)
    if size > limit:
        raise CheckpointError(path, "file too large", expected=f"at most {limit} bytes", found=size)
    return path.read_bytes()


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> `TensorInfo` for every tensor of the file, in the order of their bytes."""
    size = _regular_size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(path, "truncated before the header", expected="8 bytes of length", found=len(prefix))
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            allowed = f"at most {MAX_HEADER_BYTES}, and {size - 8} bytes follow"
            raise CheckpointError(path, "not a safetensors file: header length", expected=allowed, found=length)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(path, "not a safetensors file: header", expected="'{' first", found=repr(text[:8]))
    header = parse_json(text, path)
    _check_metadata(header.pop("__metadata__", {}), path)
    start = 8 + length
    tensors = sorted((_tensor(name, entry, path, start) for name, entry in header.items()), key=_extent)
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            problem = "data overlaps another tensor's" if tensor.offset < end else "unused bytes before the data"
            raise CheckpointError(
                path, problem, tensor=tensor.name, expected=f"offset {end - start}", found=tensor.offset - start
            )
        end += tensor.nbytes
    if end != size:
        problem = "truncated" if end > size else "trailing bytes"
        raise CheckpointError(path, problem, expected=f"{end} bytes by its header", found=size)
    return {tensor.name: tensor for tensor in tensors}


def _regular_size(path: Path) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(path, error.strerror or "cannot be read") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(path, "not a regular file")
    return status.st_size


def _extent(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.offset, tensor.nbytes


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "__metadata__", expected="an object of strings")


def _tensor(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    def fail(problem: str, expected: Any, found: Any) -> CheckpointError:
        shown = repr(found)
        return CheckpointError(
            path, problem, tensor=name, expected=expected, found=shown if len(shown) < 200 else shown[:200] + "…"
        )

    encoded = name.encode("utf-8", "surrogatepass")
    if not encoded or len(encoded) > MAX_NAME_BYTES or not name.isprintable():
        shown = repr(name[:40])
        raise CheckpointError(path, "tensor name", expected=f"1 to {MAX_NAME_BYTES} printable characters", found=shown)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("entry", "exactly dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail("dtype", f"one of {', '.join(DTYPE_BITS)}", dtype)
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**63:
        raise fail("shape", f"at most {MAX_DIMENSIONS} sizes with a product below 2^63", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets", "[begin, end]", offsets)
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if 8 * (end - begin) != bits:
        raise fail("data_offsets", f"{-(-bits // 8)} bytes for {dtype} {shape}", end - begin)
    return TensorInfo(name, path, dtype, tuple(shape), start + begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
