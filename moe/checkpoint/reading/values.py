"""Reading of values into parameters: dtypes, rows, scales and the order of axes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor

from moe.checkpoint.format.contents import Contents
from moe.checkpoint.format.files import open_regular, read_exactly
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.layout import TensorSpec
from moe.checkpoint.format.tensor_roles import check_scales
from moe.checkpoint.reading.progress import Progress
from moe.errors import CheckpointError
from moe.ops import dequantize_blocks, dequantize_mxfp4

# safetensors name -> torch dtype, of weights
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALE_DTYPES = {**{d: WEIGHT_DTYPES[d] for d in ("F32", "BF16", "F16")}, "F8_E8M0": torch.float8_e8m0fnu}
TORCH_DTYPES = WEIGHT_DTYPES | SCALE_DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}

BIAS = "e_score_correction_bias"  # fp32 in every model

_CHUNK = 16 * 2**20


@dataclass(frozen=True)
class Piece:
    """A tensor of the files and the part of a parameter that it fills.

    Attributes:
        rows: range of the tensor's first dimension that is read.
        scale: scales with which a quantised tensor is dequantised; None if its bytes are copied.
    """

    info: TensorInfo
    spec: TensorSpec
    parameter: str
    index: tuple[int | slice, ...]
    rows: range
    scale: TensorInfo | None

    def for_experts(self, experts: range) -> "Piece | None":
        """Return the part that fills a parameter of only these experts, or None."""
        if ".mlp.experts." not in self.parameter:
            return self
        if not self.index:
            return self if experts == self.rows else replace(self, rows=experts)
        if self.index[0] not in experts:
            return None
        if experts.start == 0:
            return self
        return replace(self, index=(int(self.index[0]) - experts.start, *self.index[1:]))  # pyright: ignore

    @property
    def row_bytes(self) -> int:
        return self.info.nbytes // max(self.info.shape[0] if self.info.shape else 1, 1)


def check_repeats(contents: Contents) -> None:
    """Raise `CheckpointError` for a repeat that differs from its original, whose values would be lost silently."""
    originals = {spec.parameter: name for name, spec in contents.specs.items() if not spec.repeat and not spec.index}
    for name, spec in contents.specs.items():
        if not spec.repeat or name not in contents.tensors or spec.parameter not in originals:
            continue
        info, original = contents.tensors[name], contents.tensors[originals[spec.parameter]]
        same_dtype = info.dtype == original.dtype
        if not all(
            a == b if same_dtype else torch.equal(_as_float64(info, a), _as_float64(original, b))
            for a, b in zip(_chunks(info), _chunks(original), strict=True)
        ):
            problem, expected = "differs from the tensor that it repeats", f"the values of {original.name}"
            raise contents.error(name, problem, expected=expected)


def _chunks(info: TensorInfo) -> Iterator[bytes]:
    """Yield the tensor's bytes in chunks of equally many values for every dtype."""
    file, _ = open_regular(info.path)
    with file:
        file.seek(info.offset)
        for begin in range(0, info.numel, _CHUNK // 8):
            count = min(_CHUNK // 8, info.numel - begin)
            yield read_exactly(file, count * info.nbytes // info.numel, info.path)


def _as_float64(info: TensorInfo, values: bytes) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=TORCH_DTYPES[info.dtype]).double()


class Files:
    """Reader of parts of tensors, which keeps two files open, for weights and scales, and one buffer."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.open: dict[Path, BinaryIO] = {}
        self.staging = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.open.values():
            file.close()

    def read_into(self, info: TensorInfo, begin: int, buffer: Tensor) -> None:
        """Fill the contiguous CPU tensor `buffer` with the tensor's bytes, starting at `begin`."""
        file = self._file(info.path)
        file.seek(info.offset + begin)
        view = buffer.view(-1).view(torch.uint8).numpy().data
        while view:
            count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise CheckpointError(info.path, "the file was truncated while it was read", tensor=info.name)
            view = view[count:]
            self.bar.advance(count)

    def read(self, info: TensorInfo, rows: range) -> Tensor:
        """Read some of the tensor's rows into the buffer; the result is valid until the next call."""
        row = info.nbytes // max(info.shape[0], 1)
        if self.staging.numel() < row * len(rows):
            self.staging = torch.empty(row * len(rows), dtype=torch.uint8)
        part = self.staging[: row * len(rows)].view(TORCH_DTYPES[info.dtype]).view(len(rows), *info.shape[1:])
        self.read_into(info, rows.start * row, part)
        return part

    def _file(self, path: Path) -> BinaryIO:
        if path not in self.open:
            while len(self.open) > 1:
                self.open.pop(next(iter(self.open))).close()
            self.open[path], _ = open_regular(path)
        return self.open[path]


def fill(files: Files, piece: Piece, destination: Tensor, contents: Contents) -> None:
    """Fill `destination`, a contiguous part of a parameter; raises `CheckpointError` if float16 cannot hold a value."""
    _fill(files, piece, destination, contents)
    if destination.dtype == torch.float16 and piece.info.dtype != "F16" and not destination.isfinite().all():
        raise contents.error(
            piece.info.name, "a value that float16 cannot hold", expected="at most 65504", found="inf or NaN"
        )


def _fill(files: Files, piece: Piece, destination: Tensor, contents: Contents) -> None:
    info, spec = piece.info, piece.spec
    if piece.scale is None and spec.axes is None:
        if destination.is_cpu and destination.dtype == TORCH_DTYPES[info.dtype]:
            if destination.numel():
                files.read_into(info, piece.rows.start * piece.row_bytes, destination)
            return
        flat = destination.view(len(piece.rows), -1) if info.shape else destination.view(1, 1)
        for begin, rows in _steps(piece, 1):
            flat[begin : begin + len(rows)].copy_(files.read(_as_matrix(info), rows).view(len(rows), -1))
    elif spec.axes is not None:
        _fill_reordered(files, piece, destination)
    else:
        assert contents.quantization is not None and contents.quantization.block_size is not None
        _fill_from_blocks(files, piece, destination, contents.quantization.block_size)


def _as_matrix(info: TensorInfo) -> TensorInfo:
    return info if info.shape else TensorInfo(info.name, info.path, info.dtype, (1,), info.offset, info.nbytes)


def _steps(piece: Piece, multiple: int) -> Iterator[tuple[int, range]]:
    """Yield chunks as (first row of the destination, rows of the tensor), multiples of `multiple` except the last."""
    count = max(_CHUNK // max(piece.row_bytes * multiple, 1), 1) * multiple
    for begin in range(0, len(piece.rows), count):
        yield begin, piece.rows[begin : begin + count]


def _fill_from_blocks(files: Files, piece: Piece, destination: Tensor, block_size: tuple[int, int]) -> None:
    assert piece.scale is not None
    scale = torch.empty(piece.scale.shape, dtype=TORCH_DTYPES[piece.scale.dtype])
    files.read_into(piece.scale, 0, scale)
    check_scales(piece.scale, scale)
    for begin, rows in _steps(piece, block_size[0]):
        blocks = scale[begin // block_size[0] : -(-(begin + len(rows)) // block_size[0])]
        codes = files.read(piece.info, rows).to(destination.device)
        blocks = blocks if blocks.dtype == torch.float8_e8m0fnu else blocks.float()
        dequantize_blocks(codes, blocks.to(destination.device), block_size, out=destination[begin : begin + len(rows)])


def _fill_reordered(files: Files, piece: Piece, destination: Tensor) -> None:
    """Fill expert by expert, which is the first axis in file and model."""
    spec = piece.spec
    assert spec.axes is not None
    split, axes = spec.split[1:], [axis - 1 for axis in spec.axes[1:]]
    for place, expert in enumerate(piece.rows):
        values = files.read(piece.info, range(expert, expert + 1))[0].to(destination.device)
        if piece.scale is not None:
            scales = torch.empty(piece.scale.shape[1:], dtype=torch.uint8)
            files.read_into(piece.scale, expert * scales.numel(), scales)
            check_scales(piece.scale, scales)
            values = dequantize_mxfp4(values, scales.to(destination.device), destination.dtype)
            values, order = values.view(*split[:-2], values.shape[-1]), axes[:-1]
        else:
            values, order = values.view(split), axes
        values = values.permute(order)
        destination[place].view(values.shape).copy_(values)
