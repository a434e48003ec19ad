"""Export and load a model on a mesh as a Hugging Face folder. No rank ever holds the whole model."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.checkpoint.format.auxiliary import read_auxiliary
from moe.checkpoint.format.dtypes import FLOATING, parse_dtype
from moe.checkpoint.format.header import MAX_HEADER_BYTES
from moe.checkpoint.reading.load import Source, examine
from moe.checkpoint.reading.memory import check_fits
from moe.checkpoint.reading.progress import Progress
from moe.checkpoint.reading.values import Files, Piece, check_repeats, fill
from moe.checkpoint.writing.save import MAX_SHARD_BYTES, save_through
from moe.errors import CheckpointError, ConfigError
from moe.model import Transformer
from moe.parallel.apply import ParallelConfig, parallelize
from moe.parallel.mesh import Mesh, group_timeout
from moe.parallel.shared_errors import as_checkpoint_error, raise_together
from moe.parallel.tensor_parts import mesh_of, region

_Region = tuple[slice, ...]


def export(model: Transformer, folder: str | PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a parallel model to a folder, with the same bytes as `moe.save` of the whole model.

    A collective call; rank 0 writes. It receives one tensor of the files at a time, which is one projection of one
    expert in most families, and all experts of a layer if the family stacks them. Nothing else is in memory in addition
    to the model. Under HSDP, each part is sent by the first rank that holds it.

    Raises:
        CheckpointError: on all ranks, the error of `moe.save` on rank 0.
    """
    # A separate gloo group, because the tensors sent are on the CPU.
    group: Any = dist.new_group(backend="gloo", timeout=group_timeout(mesh_of(model).device_type))
    try:
        if dist.get_rank() == 0:
            _export_from_rank_0(model, folder, max_shard_bytes, group)
        else:
            _serve_parts(model, group)
    finally:
        dist.destroy_process_group(group)


def _export_from_rank_0(model: Transformer, folder: str | PathLike[str], max_shard_bytes: int, group: Any) -> None:
    """Save the model, requesting parts from the other ranks, and send them the outcome."""
    parts = _Parts(group)

    class View:
        def __init__(self, name: str, tensor: Tensor) -> None:
            self.name, self.tensor = name, tensor

        def __getitem__(self, index: tuple[int | slice, ...]) -> Tensor:
            if not isinstance(self.tensor, DTensor):
                return self.tensor[index]
            dist.broadcast_object_list([(self.name, index)], src=0, group=group)
            return parts.collect(self.name, self.tensor, index)

    outcome: CheckpointError | None = None
    try:
        with as_checkpoint_error(folder):
            save_through(View, model, folder, max_shard_bytes=max_shard_bytes)
    except CheckpointError as error:
        outcome = error
    dist.broadcast_object_list([outcome], src=0, group=group)
    if outcome is not None:
        raise outcome


def _serve_parts(model: Transformer, group: Any) -> None:
    """Send rank 0 the parts that it requests."""
    parts, state = _Parts(group), model.state_dict()
    while True:
        request: list[Any] = [None]
        dist.broadcast_object_list(request, src=0, group=group)
        match request[0]:
            case None:
                return
            case CheckpointError() as error:
                raise error
            case name, index:
                parts.contribute(name, state[name], index)


class _Parts:
    """Sends parts of DTensors to rank 0, which calls `collect` while the others call `contribute`."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.known: dict[str, list[tuple[int, _Region]]] = {}

    def collect(self, name: str, tensor: DTensor, index: tuple[int | slice, ...]) -> Tensor:
        """Assemble `tensor[index]` on the CPU."""
        wanted, local = _bounds(index, tensor.shape), tensor.to_local().detach()
        out = torch.empty([s.stop - s.start for s in wanted], dtype=tensor.dtype)
        for rank, held in self.holders(name, tensor):
            common = _common(held, wanted)
            if common is None:
                continue
            place = out[_within(common, wanted)]
            if rank == 0:
                place.copy_(local[_within(common, held)])
                continue
            received = place if place.is_contiguous() else torch.empty(place.shape, dtype=place.dtype)
            dist.recv(_bytes(received), src=rank, group=self.group)
            if received is not place:
                place.copy_(received)
        return out[tuple(0 if isinstance(i, int) else slice(None) for i in index)]

    def contribute(self, name: str, tensor: DTensor, index: tuple[int | slice, ...]) -> None:
        """Send this rank's part of `tensor[index]`."""
        wanted, me = _bounds(index, tensor.shape), dist.get_rank()
        for rank, held in self.holders(name, tensor):
            common = _common(held, wanted)
            if common is not None and rank == me:
                part = tensor.to_local().detach()[_within(common, held)]
                dist.send(_bytes(part.cpu().contiguous()), dst=0, group=self.group)

    def holders(self, name: str, tensor: DTensor) -> list[tuple[int, _Region]]:
        """Each part of a tensor once: the first rank that holds it, and its slices."""
        if name not in self.known:
            found: dict[tuple[tuple[int, int], ...], tuple[int, _Region]] = {}
            for coordinate in itertools.product(*map(range, tensor.device_mesh.shape)):
                rank, held = int(tensor.device_mesh.mesh[coordinate]), region(tensor, coordinate)
                key = tuple((s.start, s.stop) for s in held)
                if key not in found or rank < found[key][0]:
                    found[key] = rank, held
            self.known[name] = list(found.values())
        return self.known[name]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _bounds(index: Sequence[int | slice], shape: Sequence[int]) -> _Region:
    """Normalize an index to one slice with bounds per dimension."""
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    pairs = zip(index, shape, strict=True)
    return tuple(slice(i, i + 1) if isinstance(i, int) else slice(*i.indices(size)[:2]) for i, size in pairs)


def _common(a: _Region, b: _Region) -> _Region | None:
    """Intersection of two regions; None if it is empty."""
    both = tuple(slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True))
    return both if all(s.start < s.stop for s in both) else None


def _within(part: _Region, whole: _Region) -> _Region:
    """Slices of `part` relative to `whole`, which contains it."""
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, whole, strict=True))


def load(
    folder: str | PathLike[str],
    mesh: Mesh,
    config: ParallelConfig | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    mtp: bool = True,
    max_header_bytes: int = MAX_HEADER_BYTES,
    progress: bool | None = None,
) -> Transformer:
    """Load a model from a Hugging Face folder and parallelize it on `mesh`; returns it in eval mode.

    The values equal those of `moe.load`, bit for bit. A collective call; all ranks must see the folder. Each rank reads
    only its own bytes of each tensor, directly into its parameters. Tensors that are quantised, or stored in a
    different order, are converted one tensor, or one expert of a stacked tensor, at a time.

    Args:
        folder, revision, mtp: as for `moe.load`; a name on the Hub is downloaded once, into a cache that ranks share.
        dtype: as for `moe.load`, but not "keep". To train in lower precision with `config.param_dtype`, load as
            torch.float32.
        max_header_bytes: maximum size of one file's header.
        progress: show a progress bar of rank 0 on stderr; None: only if it is a terminal.

    Raises:
        CheckpointError: on all ranks, if any rank cannot read its part, or as for `moe.load`.
        ConfigError: dtype is "keep" or not a dtype.
        ParallelError: the mesh does not fit the model.
    """
    if parse_dtype(dtype, "dtype", ("auto", "keep", *FLOATING)) == "keep":
        raise ConfigError("dtype", dtype, "auto or a floating dtype; quantised tensors cannot be divided")
    with raise_together(folder):
        source = examine(folder, dtype, revision=revision, mtp=mtp, max_header_bytes=max_header_bytes)
    contents = source.contents
    with torch.device("meta"):
        model = Transformer(contents.config)
        state = {name: torch.empty(shape, dtype=source.dtypes[name]) for name, shape in source.shapes.items()}
    model.load_state_dict(state, assign=True)
    parallelize(model, mesh, config)
    with raise_together(folder):
        parts: dict[str, Any] = {name: (tensor, _held(tensor)) for name, tensor in model.state_dict().items()}
        needed = sum(_size(held) * tensor.dtype.itemsize for tensor, held in parts.values())
        check_fits(contents.folder, needed, mesh.device)
        check_repeats(contents)
        model.carried_files = read_auxiliary(contents.folder)
        model.to_empty(device=mesh.device)
        _fill(model, source, False if dist.get_rank() else progress)
        source.check_unchanged()
    model.origin = source.origin()
    return model.eval()


def _held(tensor: Tensor) -> _Region:
    """Slices of a tensor that this rank holds."""
    return region(tensor) if isinstance(tensor, DTensor) else _bounds((), tensor.shape)


def _size(where: _Region) -> int:
    return math.prod(s.stop - s.start for s in where)


def _fill(model: Transformer, source: Source, progress: bool | None) -> None:
    """Read this rank's parts of all parameters."""
    state: dict[str, Any] = model.state_dict()
    reads = [
        (read, there, _held(state[piece.parameter]))
        for piece in source.pieces
        for read, there in _reads(piece, source.shapes[piece.parameter], _held(state[piece.parameter]))
    ]
    total = sum(read.row_bytes * len(read.rows) for read, _, _ in reads)
    with Progress("loading", total, progress) as bar, Files(bar) as files:
        for read, there, held in reads:
            tensor = state[read.parameter]
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            common = _common(there, held)
            assert common is not None
            place = local[_within(common, held)]
            direct = common == there and place.is_contiguous()
            buffer = place if direct else local.new_empty([s.stop - s.start for s in there])
            fill(files, read, buffer.view(buffer.shape[_stacked(read) :]), source.contents)
            if not direct:
                place.copy_(buffer[_within(common, there)])


def _reads(piece: Piece, shape: Sequence[int], held: _Region) -> Iterator[tuple[Piece, _Region]]:
    """The rows of a piece that a rank reads, and their slices of the parameter."""
    there, at = _bounds(piece.index, shape), _stacked(piece)
    common = _common(there, held)
    if common is None:
        return
    first = there[at].start
    rows = range(common[at].start - first, common[at].stop - first)
    parts = [rows]
    if len(there) - at == 3:  # one expert at a time: its matrix may be sharded or stored in a different order
        parts = [range(row, row + 1) for row in rows]
    elif piece.scale is not None:
        parts = [piece.rows]  # blocks of rows share their scales
    for part in parts:
        yield replace(piece, rows=part), (*there[:at], slice(first + part.start, first + part.stop), *there[at + 1 :])


def _stacked(piece: Piece) -> int:
    """Number of parameter dimensions that the stored tensor lacks: 1 for the tensor of a single expert."""
    return sum(isinstance(i, int) for i in piece.index)
