"""`load`: safetensors files read directly into the parameters of a new model."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.format.auxiliary import read_auxiliary
from moe.checkpoint.format.contents import Contents, read_contents
from moe.checkpoint.format.dtypes import FLOATING, SAFETENSORS, parse_dtype
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.header import MAX_HEADER_BYTES, TensorInfo
from moe.checkpoint.format.layout import TensorSpec, layer_of
from moe.checkpoint.format.tensor_roles import allowed_dtypes, check_scales, needs_common_dtype
from moe.checkpoint.reading.hub import explain_cache_misses, find
from moe.checkpoint.reading.memory import check_fits
from moe.checkpoint.reading.progress import Progress
from moe.checkpoint.reading.values import (
    BIAS,
    SCALE_DTYPES,
    TORCH_DTYPES,
    WEIGHT_DTYPES,
    Files,
    Piece,
    check_repeats,
    fill,
)
from moe.counts import Shape, parameter_shapes
from moe.errors import CheckpointError, ConfigError
from moe.int8 import Quantization, check_kind, is_converted
from moe.int8 import quantize as quantize_model
from moe.layer import Experts
from moe.model import Transformer
from moe.ops import quantize_int8
from moe.quantized import FP8Experts, FP8Linear, Int8Experts, MXFP4Experts


@dataclass(frozen=True)
class Origin:
    """Facts about the folder that a model was loaded from, so that a save writes the same tensors.

    Attributes:
        table: layout of the files.
        omitted: repeats that the files did not have, by layer and name within it.
        narrow: correction bias or kept scales -> their dtype in the files, if it is not fp32.
        quantization: object in config.json, if quantised tensors were kept.
        block_size: block size of kept FP8 tensors.
    """

    table: str
    omitted: frozenset[tuple[int, str]]
    narrow: Mapping[str, torch.dtype]
    quantization: Mapping[str, Any] | None
    block_size: tuple[int, int] | None


def load(
    folder: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    *,
    revision: str | None = None,
    mtp: bool = True,
    experts: range | None = None,
    quantize: Quantization | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
    progress: bool | None = None,
) -> Transformer:
    """Load the model in a Hugging Face checkpoint folder, in eval mode.

    Headers are checked, and so is the device's free memory, before anything is allocated. Bytes are read directly into
    the final parameters; tensors that are converted or copied to another device pass through a buffer of 16 MiB, or of
    one expert if the files have its axes in another order.

    Args:
        folder: folder with config.json and safetensors files; pickles are never read. For a run of `moesmith train`,
            its checkpoint is loaded. If there is no such folder, "org/model" or "org/model@revision" is looked up
            with huggingface_hub, if installed: online, or in its cache if the Hub cannot be reached.
        device: device of the parameters. On "meta" no weights are read: parameters have only shapes and dtypes.
        dtype: "auto" keeps each tensor as stored. Norms, routers and sinks may have any dtype; all other tensors must
            have the same, and quantised ones (FP8 blocks, MXFP4) are dequantised to it. "keep" also keeps quantised
            tensors, frozen: each use dequantises them, and a save writes the same bytes. A floating dtype (torch's, or
            "bf16", "fp16", "fp32", "fp64") converts everything except the router's correction bias, which is always
            fp32 (a bf16 or fp16 one is widened exactly).
        revision: branch, tag or commit of a name on the Hub, instead of "@revision"; invalid for a folder.
        mtp: False leaves out multi-token prediction modules and ignores their tensors. Modules that config.json does
            not count are always left out, with a warning.
        experts: read and hold only these routed experts of each layer, the share of one rank; such a model requires a
            dispatcher for the other ones.
        quantize: "int8" converts weights while they are read, one tensor at a time; see `moe.quantize`. `dtype` is then
            the dtype of all other tensors, and the one in which the model computes; it cannot be "keep".
        max_header_bytes: maximum header size of a file, at most 100 MiB; released files are below the default, 16 MiB.
        progress: whether to show a progress bar on stderr; None: if it is a terminal.

    Raises:
        CheckpointError: names file, tensor, and what was expected and found. A tensor is missing, unexpected or
            mis-shaped; it has an unsupported dtype, or one that "auto" cannot combine with the others; a repeated
            embedding or head differs from the original; a weight to be quantised is not finite; the family or
            quantisation format is unknown; the model does not fit into memory; or a file is malformed.
        ConfigError: an argument has an invalid value.
    """
    device = usable_device(device)
    if quantize is not None:
        check_kind("quantize", quantize)
        if dtype == "keep":
            raise ConfigError("dtype", dtype, "'auto' or a floating dtype with quantize='int8'")
    source = examine(folder, dtype, revision=revision, mtp=mtp, experts=experts, max_header_bytes=max_header_bytes)
    contents, tensors = source.contents, _tensors(source, quantize)
    needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    check_fits(contents.folder, needed, device)
    auxiliary = read_auxiliary(contents.folder)

    with torch.device("meta"):
        model = Transformer(contents.config)
    if quantize is not None:
        quantize_model(model, quantize)
    state = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in tensors.items()}
    if device.type != "meta":
        check_repeats(contents)
        _read(source, state, progress)
    source.check_unchanged()
    _assign(model, state, contents)
    model.carried_files = auxiliary
    model.origin = source.origin()
    return model.eval()


def usable_device(device: Any) -> torch.device:
    """Return `device` as a torch.device; raises ConfigError if this machine does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError("device", device, f"a device of this machine ({reason})") from None


def _tensors(source: "Source", quantize: str | None) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and dtype of each tensor of the model."""
    tensors: dict[str, tuple[Shape, torch.dtype]] = {}
    for name, shape in source.shapes.items():
        is_int8 = quantize is not None and is_converted(name)
        tensors[name] = shape, torch.int8 if is_int8 else source.dtypes[name]
        if is_int8:
            tensors[f"{name}_scale"] = shape[:-1], torch.bfloat16
    return tensors


def _read(source: "Source", state: Mapping[str, Tensor], progress: bool | None) -> None:
    """Fill the parameters from the files."""
    total = sum(piece.row_bytes * len(piece.rows) for piece in source.pieces)
    with Progress("loading", total, progress) as bar, Files(bar) as files:
        for piece in source.pieces:
            destination = state[piece.parameter][piece.index]
            if destination.dtype == torch.int8:
                weight = torch.empty_like(destination, dtype=source.dtypes[piece.parameter])
                fill(files, piece, weight, source.contents)
                _quantize_into(destination, state[f"{piece.parameter}_scale"][piece.index], weight, piece, source)
                continue
            fill(files, piece, destination, source.contents)
            if piece.spec.scale_of is not None:
                check_scales(piece.info, destination)


def _quantize_into(codes: Tensor, scale: Tensor, weight: Tensor, piece: Piece, source: "Source") -> None:
    try:
        for destination, values in zip((codes, scale), quantize_int8(weight), strict=True):
            destination.copy_(values)
    except ValueError as error:
        problem = "int8 cannot hold its values"
        raise source.contents.error(piece.info.name, problem, expected="finite values", found=error) from None


@dataclass(frozen=True)
class Source:
    """A checkpoint whose headers are valid, the pieces to read, and the parameters that they fill.

    Attributes:
        dtypes, shapes: dtypes and shapes of the parameters, by name.
        identity: identifies the checkpoint that was examined.
        kept: whether quantised tensors are read as stored.
    """

    contents: Contents
    pieces: list[Piece]
    dtypes: dict[str, torch.dtype]
    shapes: dict[str, Shape]
    identity: tuple[int, ...]
    kept: bool

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a save has replaced the folder since; call it after reading."""
        if _identity(self.contents.folder) != self.identity:
            problem = "replaced by another checkpoint while it was read; load it again"
            raise CheckpointError(self.contents.folder, problem)

    def origin(self) -> Origin:
        return _origin(self.contents, kept=self.kept)


def examine(
    folder: str | PathLike[str],
    dtype: torch.dtype | str,
    *,
    revision: str | None = None,
    mtp: bool = True,
    experts: range | None = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> Source:
    """Check the headers of a checkpoint, and return what `load` with these arguments reads."""
    kind = parse_dtype(dtype, "dtype", ("auto", "keep", *FLOATING))
    wanted = WEIGHT_DTYPES[SAFETENSORS[kind]] if kind in FLOATING else None
    path = find(folder, revision)
    identity = _identity(path)
    with explain_cache_misses(folder, revision):
        contents = read_contents(path, mtp=mtp, max_header_bytes=max_header_bytes)
    contents.check()
    check_dtypes(contents)
    if kind == "keep":
        _check_kept(contents)
    mine = _experts(contents, experts)
    found = [part for piece in pieces(contents, keep=kind == "keep") if (part := piece.for_experts(mine)) is not None]
    return Source(
        contents, found, _dtypes(contents, found, wanted), _shapes(contents, found, experts), identity, kind == "keep"
    )


def _identity(folder: Path) -> tuple[int, ...]:
    """Return an identity of the current checkpoint; the folder's inode number alone may be reused by a later save."""
    found, config = folder.stat(), folder / CONFIG
    return found.st_dev, found.st_ino, config.stat().st_mtime_ns if config.exists() else 0


def _experts(contents: Contents, experts: range | None) -> range:
    count = contents.config.n_routed_experts
    if experts is None:
        return range(count)
    if not isinstance(experts, range) or experts.step != 1 or not 0 <= experts.start < experts.stop <= count:
        expected = f"a non-empty range within the {count} experts, with step 1" if count else "None: no experts"
        raise ConfigError("experts", experts, expected)
    return experts


def pieces(contents: Contents, *, keep: bool) -> Iterator[Piece]:
    """Yield the pieces of all experts in file order; `keep` leaves quantised tensors as stored."""
    tensors = contents.tensors
    scales = {spec.scale_of: tensors[name] for name, spec in contents.specs.items() if spec.scale_of in tensors}
    for name, info in tensors.items():
        spec = contents.specs.get(name)
        if spec is None or spec.repeat or (spec.scale_of is not None and not keep):
            continue
        if spec.is_row:
            info = replace(info, shape=info.shape[1:])
        scale = None if keep else scales.get(name)
        parameter = spec.parameter
        if scale is not None and spec.axes is not None:
            parameter = parameter.removesuffix("_blocks")
        yield Piece(info, spec, parameter, spec.index, range(info.shape[0] if info.shape else 1), scale)


def _check_kept(contents: Contents) -> None:
    """Raise `CheckpointError` for a parameter that is partly quantised or has scales of different formats."""
    first: dict[str, TensorInfo] = {}
    for piece in pieces(contents, keep=True):
        info, before = piece.info, first.setdefault(piece.parameter, piece.info)
        if info.dtype != before.dtype and {info.dtype, before.dtype} & {"F8_E4M3", "F8_E8M0"}:
            problem = f"its dtype differs within {piece.parameter}, which cannot be kept; load with dtype='auto'"
            raise contents.error(info.name, problem, expected=f"{before.dtype}, as {before.name} has", found=info.dtype)


def _dtypes(contents: Contents, pieces: list[Piece], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter: `dtype`, or that of the files."""
    common = _common_dtype(contents) if dtype is None else dtype
    result: dict[str, torch.dtype] = {}
    for piece in pieces:
        stored = piece.info.dtype
        if _is_widened(piece.spec) and stored != "F8_E8M0":
            result[piece.parameter] = torch.float32
        elif dtype is not None or piece.scale is not None:
            result[piece.parameter] = common
        else:
            result[piece.parameter] = TORCH_DTYPES[stored]
    return result


def _common_dtype(contents: Contents) -> torch.dtype:
    """Return the common dtype of all tensors that are multiplied with activations, except quantised ones.

    Raises `CheckpointError` if there are several. Considers all experts, so that all ranks agree.
    """
    found: dict[str, list[str]] = {}
    for name, spec in contents.specs.items():
        info = contents.tensors.get(name)
        if info is not None and info.dtype in WEIGHT_DTYPES and not spec.repeat and needs_common_dtype(spec.parameter):
            found.setdefault(info.dtype, []).append(name)
    most = max(found, key=lambda kind: sum(contents.tensors[name].numel for name in found[kind]))
    others = sorted((name for kind in found if kind != most for name in found[kind]), key=contents.is_mtp)
    if others:
        widest = str(reduce(torch.promote_types, (WEIGHT_DTYPES[kind] for kind in found)))
        stated = f"torch.{contents.dtype}"
        advice = f"{stated}, as config.json states" if contents.dtype else widest
        advice += f", or dtype={widest}" * (contents.dtype is not None and stated != widest)
        more = f" and {len(others) - 1} more differ" if len(others) > 1 else " differs"
        problem = f"its dtype{more} from most tensors, but the model needs a common one; load with dtype={advice}"
        expected = f"{most}, as {found[most][0]} has"
        raise contents.error(others[0], problem, expected=expected, found=contents.tensors[others[0]].dtype)
    return WEIGHT_DTYPES[most]


def check_dtypes(contents: Contents) -> None:
    """Raise `CheckpointError` for a dtype that the tensor's role does not allow."""
    scaled = {spec.scale_of for spec in contents.specs.values()}
    for name, spec in contents.specs.items():
        info = contents.tensors.get(name)
        if info is None:
            continue
        if spec.parameter.endswith(("_blocks", "_scales")):
            allowed = ("U8",)
        elif spec.scale_of is not None:
            allowed = tuple(SCALE_DTYPES)
        else:
            allowed = allowed_dtypes(spec.parameter, quantised=("F8_E4M3",) if name in scaled else ())
        if info.dtype not in allowed:
            raise contents.error(name, "unsupported dtype", expected=" or ".join(allowed), found=info.dtype)


def _shapes(contents: Contents, pieces: list[Piece], experts: range | None) -> dict[str, Shape]:
    """Return the shape of each parameter that the pieces fill."""
    known = parameter_shapes(contents.config)
    shapes: dict[str, Shape] = {}
    for piece in pieces:
        name = piece.parameter
        if name in known:
            shapes[name] = known[name]
            if experts is not None and ".mlp.experts." in name:
                shapes[name] = (len(experts), *known[name][1:])
        else:  # kept scales and blocks: the extent of their pieces
            inner = (len(piece.rows), *piece.info.shape[1:])
            shapes[name] = _reach(shapes.get(name, ()), piece.index, inner)
    return shapes


def _reach(so_far: Shape, index: tuple[int | slice, ...], inner: Shape) -> Shape:
    """Return the smallest shape that contains `so_far` and `inner` at `index`."""
    ends = [i.stop if isinstance(i, slice) else i + 1 for i in index]
    slices = sum(isinstance(i, slice) for i in index)
    reach = (*ends, *inner[slices:])
    return tuple(map(max, so_far, reach)) if so_far else reach


def _assign(model: Transformer, state: dict[str, Tensor], contents: Contents) -> None:
    """Assign parameters to a model on the meta device, and replace the modules of quantised ones."""
    for name in state:
        parent, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(parent)
        biases = {f"{kind}_bias": state.get(f"{parent}.{kind}_proj_bias") for kind in ("gate_up", "down")}
        if leaf == "weight_scale_inv":
            assert contents.quantization is not None and contents.quantization.block_size is not None
            made = FP8Linear.from_parts(
                state[f"{parent}.weight"],
                state[name],
                state.get(f"{parent}.bias"),
                block_size=contents.quantization.block_size,
            )
        elif leaf in ("gate_up_proj_scale_inv", "gate_up_proj_scales"):
            made = _quantized_experts(module, parent, state, biases, contents)
        elif leaf == "gate_up_proj" and isinstance(module, Experts | Int8Experts):
            if len(state[name]) == contents.config.n_routed_experts:
                continue
            (count, twice, width), bias = state[name].shape, module.gate_up_proj_bias is not None
            with torch.device("meta"):
                made = type(module)(count, width, twice // 2, bias=bias, activation=module.activation)
        else:
            continue
        model.set_submodule(parent, made)
    model.load_state_dict(state, strict=True, assign=True)


def _quantized_experts(
    module: Experts, parent: str, state: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], contents: Contents
) -> FP8Experts | MXFP4Experts:
    block_size = contents.quantization.block_size if contents.quantization else None
    kind = FP8Experts if block_size is not None else MXFP4Experts
    parts = [state.get(f"{parent}.{name}") for name in kind.quantized]
    lacking = [f"{parent}.{name}" for name, part in zip(kind.quantized, parts, strict=True) if part is None]
    if lacking:
        problem = "only some tensors of these experts are quantised, which cannot be kept; load with dtype='auto'"
        raise CheckpointError(contents.folder, problem, tensor=parent, expected=" and ".join(lacking), found="none")
    settings = {"activation": module.activation} | ({} if block_size is None else {"block_size": block_size})
    return kind.from_parts(*parts, **biases, **settings)  # pyright: ignore[reportArgumentType]


def _is_widened(spec: TensorSpec) -> bool:
    """Whether the parameter is fp32 in every model, whatever the files have."""
    return spec.parameter.endswith((BIAS, "_scale_inv"))


def _origin(contents: Contents, *, kept: bool) -> Origin:
    narrow = {
        spec.parameter: TORCH_DTYPES[contents.tensors[name].dtype]
        for name, spec in contents.specs.items()
        if name in contents.tensors and contents.tensors[name].dtype in ("BF16", "F16") and _is_widened(spec)
    }
    quantization = contents.quantization if kept and contents.has_quantised_tensors else None
    table = contents.table
    names = family_of(contents.config.model_type, contents.folder).tables[table]
    omitted = (layer_of(names, n) for n, spec in contents.specs.items() if spec.repeat and n not in contents.tensors)
    if table == "mxfp4" and not kept:
        table = "stacked"
    return Origin(
        table=table,
        omitted=frozenset(omitted),
        narrow=narrow,
        quantization=quantization.raw if quantization else None,
        block_size=quantization.block_size if quantization else None,
    )
