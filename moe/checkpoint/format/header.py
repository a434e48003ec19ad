"""Strict reading of the header of a safetensors file; the data are not read.

A file is an 8-byte little-endian length, that many bytes of JSON, and the data:

    {"__metadata__": {"format": "pt"}, NAME: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, …}

with offsets from the start of the data. The safetensors library accepts every header that is accepted here.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint.format.files import open_regular, read_exactly, recognise
from moe.checkpoint.format.strict_json import CHARACTERS, KEY, NEXT, Scanner
from moe.errors import CheckpointError, ConfigError

MAX_HEADER_BYTES = 16 * 2**20
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8

LARGEST_MAX_HEADER_BYTES = 100 * 2**20
_LIBRARY_MAX_HEADER_BYTES = 100_000_000
# Header bytes required per tensor, which bounds memory. Entries of released files have more (Kimi-K2 in FP8 as one
# file: 139,583 entries of 112 bytes).
_BYTES_PER_TENSOR = 100
MAX_TENSORS = MAX_HEADER_BYTES // _BYTES_PER_TENSOR  # in one file

METADATA = "__metadata__"

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
    """Dtype, shape and location of a tensor: `nbytes` bytes at `offset` in the file `path`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, TensorInfo]:
    """Return the `TensorInfo` of every tensor in the file, by name, in the order of their bytes.

    Raises CheckpointError for a malformed header, one larger than `max_header_bytes`, and one with more than a tensor
    per 100 bytes of that limit. Raises ConfigError if `max_header_bytes` exceeds 100 MiB.
    """
    if not (isinstance(max_header_bytes, int) and 2 <= max_header_bytes <= LARGEST_MAX_HEADER_BYTES):
        allowed = f"2 to {LARGEST_MAX_HEADER_BYTES}"
        raise ConfigError("max_header_bytes", max_header_bytes, allowed)
    file, size = open_regular(path)
    with file:
        head = read_exactly(file, min(size, 512), path)
        if size < 8:
            found = recognise(head) or f"{size} bytes"
            raise CheckpointError(path, "truncated before the header", expected="a length of 8 bytes", found=found)
        length = int.from_bytes(head[:8], "little")
        limit = min(max_header_bytes, _LIBRARY_MAX_HEADER_BYTES)
        if length > min(limit, size - 8):
            allowed = f"at most {limit}, and {size - 8} bytes follow"
            found = recognise(head) or length
            raise CheckpointError(path, "not a safetensors file: header length", expected=allowed, found=found)
        if not length or head[8:9] != b"{":
            found = recognise(head) or (repr(head[8 : min(16, 8 + length)]) if length else "a length of 0")
            raise CheckpointError(path, "not a safetensors file: header", expected="'{' first", found=found)
        file.seek(8)
        tensors = _read(Scanner(file, length, path), 8 + length, max_header_bytes // _BYTES_PER_TENSOR)
    return _in_order(tensors, path, 8 + length, size)


def _read(scan: Scanner, start: int, limit: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    has_metadata = False
    going = scan.object()
    while going:
        name = scan.key()
        if name == METADATA:
            if has_metadata:
                raise CheckpointError(scan.path, f"{METADATA} twice in the header", expected="one", found="two")
            has_metadata = True
            _skip_metadata(scan)
        else:
            check_name(name, scan.path)
            tensor = _tensor(name, scan, start)
            if name in tensors:
                raise CheckpointError(scan.path, "twice in the header", tensor=name, expected="one", found="two")
            if len(tensors) == limit:
                expected = f"at most {limit}"
                raise CheckpointError(
                    scan.path, "too many tensors in one file", tensor=name, expected=expected, found="more"
                )
            tensors[name] = tensor
        going = scan.more()
    scan.end()
    return tensors


def _in_order(tensors: dict[str, TensorInfo], path: Path, start: int, size: int) -> dict[str, TensorInfo]:
    end = start
    ordered = sorted(tensors.values(), key=_extent)
    for tensor in ordered:
        if tensor.offset + tensor.nbytes > size:
            problem, found = "truncated, or offsets that lead beyond the file", tensor.offset + tensor.nbytes - start
            raise CheckpointError(path, problem, tensor=tensor.name, expected=f"at most {size - start}", found=found)
    for tensor in ordered:
        if tensor.offset != end:
            problem = "data overlaps another tensor's" if tensor.offset < end else "unused bytes before the data"
            raise CheckpointError(
                path, problem, tensor=tensor.name, expected=f"offset {end - start}", found=tensor.offset - start
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(path, "trailing bytes", expected=f"{end} bytes according to the header", found=size)
    return {tensor.name: tensor for tensor in ordered}


def _extent(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.offset, tensor.nbytes


def _skip_metadata(scan: Scanner) -> None:
    """Skip `__metadata__`: null or an object of strings, as the safetensors library accepts."""

    def fail(found: str) -> CheckpointError:
        return CheckpointError(scan.path, f"invalid {METADATA}", expected="null, or an object of strings", found=found)

    if scan.take(_NULL):
        return
    if not scan.rest().startswith("{"):
        raise fail(scan.rest())
    going = scan.object()
    while going:
        while found := scan.take(_TEXT):  # fast path; the code below is for long strings
            if found[3] == b"}":
                return
        key = scan.key()
        if not scan.skip_string():
            raise fail(f"{key[:80]!r}: {scan.rest()}")
        going = scan.more()


def check_name(name: str, path: Path) -> None:
    """Raise `CheckpointError` about `path` if `name` is not a valid tensor name."""
    length = len(name.encode("utf-8"))
    if not name or length > MAX_NAME_BYTES or not name.isprintable():
        found = "an empty name" if not name else f"{length} bytes" if name.isprintable() else repr(name[:80])
        expected = f"1 to {MAX_NAME_BYTES} bytes of printable characters"
        raise CheckpointError(path, "invalid tensor name", tensor=name, expected=expected, found=found)


_TEXT = re.compile(KEY + rb'"(' + CHARACTERS + rb')"' + NEXT)
_NULL = re.compile(rb"null")


def _tensor(name: str, scan: Scanner, start: int) -> TensorInfo:
    try:
        entry = scan.value()
    except CheckpointError as error:
        problem, found = f"invalid entry: {error.__cause__}", repr(scan.rest())[:200]
        expected = "dtype, shape and data_offsets"
        raise CheckpointError(scan.path, problem, tensor=name, expected=expected, found=found) from error
    return parse_entry(name, entry, scan.path, start)


def parse_entry(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    """Convert a tensor's entry in the header of `path`, whose data begin at byte `start`."""

    def fail(problem: str, expected: Any, found: Any) -> CheckpointError:
        return CheckpointError(path, problem, tensor=name, expected=expected, found=repr(found)[:200])

    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise fail("invalid entry", "dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail("unknown dtype", f"one of {', '.join(DTYPE_BITS)}", dtype)
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) >= 2**63:
        raise fail("invalid shape", f"at most {MAX_DIMENSIONS} sizes with a product below 2^63", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("invalid data_offsets", "[begin, end]", offsets)
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if 8 * (end - begin) != bits:
        raise fail("wrong number of bytes", f"{-(-bits // 8)} bytes for {dtype} {shape}", end - begin)
    return TensorInfo(name, path, sys.intern(dtype), tuple(shape), start + begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all([type(item) is int and item >= 0 for item in value])
