"""`load`: from a folder of safetensors straight into the parameters of a new model."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from moe.checkpoint.folder import CONFIG, locate, read_carried, read_config_values
from moe.checkpoint.header import TensorInfo
from moe.checkpoint.layout import Plan, Slot, plan
from moe.counts import parameter_shapes
from moe.errors import CheckpointError
from moe.model import Transformer

# safetensors names of the dtypes that weights may have
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_CHUNK = 64 * 2**20


def load(
    folder: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
) -> Transformer:
    """The model in a Hugging Face checkpoint folder, in eval mode.

    Everything that headers can tell is checked before anything is allocated. Bytes go straight into the final
    parameters; what is converted or sent to another device goes through one buffer of 64 MiB.

    Args:
        folder: config.json and safetensors; pickles are never read.
        device: where the parameters shall be.
        dtype: "auto" keeps each tensor as stored, and the parts of one parameter (all experts of a layer) must then be
            stored alike. A floating dtype converts everything but the router's correction bias, which is fp32 always
            (a bf16 or fp16 one is widened, exactly).

    Raises:
        CheckpointError: naming file, tensor, what was expected and what was found. A tensor is missing, unexpected or
            mis-shaped; or has a dtype that is not for weights; or a repeated embedding or head differs from the
            model's own; or the folder is quantised or of an unknown family, or malformed.
    """
    if dtype != "auto" and dtype not in DTYPES.values():
        raise ValueError(f"dtype = {dtype!r}: expected 'auto' or one of {', '.join(map(str, DTYPES.values()))}")
    path = locate(folder)
    identity = _identity(path)
    todo = plan(path)
    _refuse_quantised(path)
    todo.check()
    dtypes = _dtypes(todo, dtype)
    _check_repeats(todo)
    carried = read_carried(path)

    with torch.device("meta"):
        model = Transformer(todo.config)
    shapes = parameter_shapes(todo.config)
    state = {name: torch.empty(shapes[name], dtype=dtypes[name], device=device) for name in shapes}
    staging = torch.empty(0, dtype=torch.uint8)
    for file, tensors in _by_file(todo).items():
        with file.open("rb", buffering=0) as opened:
            for info, slot in tensors:
                staging = _read(opened, info, state[slot.parameter][slot.index], staging)
    if _identity(path) != identity:
        # A save swaps the whole folder: headers and bytes may be of two checkpoints.
        raise CheckpointError(path, "replaced by another checkpoint while it was read; load it again")
    model.load_state_dict(state, strict=True, assign=True)
    model.carried_files = carried
    return model.eval()


def _identity(folder: Path) -> tuple[int, ...]:
    """Of the checkpoint that stands there. The folder's inode number alone comes again with a later save's folder."""
    found, config = folder.stat(), folder / CONFIG
    return found.st_dev, found.st_ino, config.stat().st_mtime_ns if config.exists() else 0


def _refuse_quantised(folder: Path) -> None:
    values = read_config_values(folder)
    for key in ("quantization_config", "compression_config"):
        if values.get(key) is not None:
            raise CheckpointError(folder / CONFIG, f"{key}: quantised weights cannot be loaded yet", expected="null")


def _dtypes(todo: Plan, dtype: torch.dtype | Literal["auto"]) -> dict[str, torch.dtype]:
    """Parameter -> the dtype that it shall have."""
    stored: dict[str, TensorInfo] = {}
    for name, slot in todo.slots.items():
        info = todo.tensors.get(name)
        if info is None:
            continue
        is_bias = slot.parameter.endswith("e_score_correction_bias")
        allowed = [d for d in DTYPES if not (is_bias and d == "F64")]
        if info.dtype not in allowed:
            raise CheckpointError(info.path, "dtype", tensor=name, expected=" or ".join(allowed), found=info.dtype)
        if slot.repeat:
            continue
        first = stored.setdefault(slot.parameter, info)
        if dtype == "auto" and info.dtype != first.dtype:
            problem = f"dtype differs within {slot.parameter}; load with dtype=torch.float32 or another to convert"
            expected = f"{first.dtype}, as {first.name} has"
            raise CheckpointError(info.path, problem, tensor=name, expected=expected, found=info.dtype)
    dtypes = {name: DTYPES[info.dtype] if dtype == "auto" else dtype for name, info in stored.items()}
    return {n: torch.float32 if n.endswith("e_score_correction_bias") else d for n, d in dtypes.items()}


def _check_repeats(todo: Plan) -> None:
    """A repeat that is not bit-equal to the tensor that the model has would be lost without a word."""
    originals = {slot.parameter: name for name, slot in todo.slots.items() if not slot.repeat and not slot.index}
    for name, slot in todo.slots.items():
        if not slot.repeat or name not in todo.tensors:
            continue
        info, original = todo.tensors[name], todo.tensors[originals[slot.parameter]]
        equal = info.dtype == original.dtype and all(
            a == b for a, b in zip(_chunks(info), _chunks(original), strict=True)
        )
        if not equal:
            raise CheckpointError(
                info.path,
                "differs from the tensor that it repeats",
                tensor=name,
                expected=f"the bytes of {original.name}",
            )


def _chunks(info: TensorInfo) -> Iterator[bytes]:
    with info.path.open("rb") as file:
        file.seek(info.offset)
        for begin in range(0, info.nbytes, _CHUNK):
            chunk = file.read(min(_CHUNK, info.nbytes - begin))
            if not chunk:
                raise _shortened(info)
            yield chunk


def _by_file(todo: Plan) -> dict[Path, list[tuple[TensorInfo, Slot]]]:
    """The tensors to read, each file once and from front to back."""
    files: dict[Path, list[tuple[TensorInfo, Slot]]] = {}
    for name, info in todo.tensors.items():  # in the order of their bytes
        if name in todo.slots and not todo.slots[name].repeat:
            files.setdefault(info.path, []).append((info, todo.slots[name]))
    return files


def _read(file: BinaryIO, info: TensorInfo, destination: Tensor, staging: Tensor) -> Tensor:
    """Fill `destination`, a contiguous part of a parameter; returns the staging buffer, grown if it was needed."""
    file.seek(info.offset)
    stored = DTYPES[info.dtype]
    flat = destination.view(-1)
    if flat.is_cpu and flat.dtype == stored:
        _fill(file, info, flat.view(torch.uint8))
        return staging
    step = _CHUNK // stored.itemsize
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        nbytes = part.numel() * stored.itemsize
        if staging.numel() < nbytes:
            staging = torch.empty(nbytes, dtype=torch.uint8)
        _fill(file, info, staging[:nbytes])
        part.copy_(staging[:nbytes].view(stored))
    return staging


def _fill(file: BinaryIO, info: TensorInfo, buffer: Tensor) -> None:
    """Read as many bytes as the CPU tensor `buffer`, uint8, has room for."""
    view = buffer.numpy().data
    while view:
        count = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise _shortened(info)
        view = view[count:]


def _shortened(info: TensorInfo) -> CheckpointError:
    return CheckpointError(info.path, "the file was shortened while it was read", tensor=info.name)
