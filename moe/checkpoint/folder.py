"""A checkpoint folder: which files hold its tensors, and where each tensor is."""

from os import PathLike
from pathlib import Path
from typing import Any

from moe.checkpoint.header import TensorInfo, read_bounded, read_header
from moe.checkpoint.strict_json import parse_json
from moe.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "moesmith.manifest.json"  # of what a save wrote; loading does not read it, nor do other programs

MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_CARRIED_BYTES = 64 * 2**20

# Files that belong to a model but are not read here: they travel with it from load to save.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def previous_folder(folder: Path) -> Path:
    """Where `save` moves an old checkpoint for the moment in which it cannot swap two folders in one step."""
    return folder.with_name(f".{folder.name}.previous")


def locate(folder: str | PathLike[str]) -> Path:
    """`folder` as a path; or, where a save died between its two renames, the checkpoint that it had put aside."""
    path = Path(folder)
    if not path.exists() and previous_folder(path).is_dir():
        return previous_folder(path)
    if not path.is_dir():
        raise CheckpointError(path, "not a folder" if path.exists() else "no such folder")
    return path


def read_config_values(folder: Path) -> dict[str, Any]:
    """The object in config.json, as it stands there."""
    path = folder / CONFIG
    values = parse_json(read_bounded(path, MAX_CONFIG_BYTES), path)
    if not isinstance(values, dict):
        raise CheckpointError(path, "wrong JSON value", expected="an object", found=type(values).__name__)
    return values


def read_carried(folder: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer files and the like."""
    return {name: read_bounded(folder / name, MAX_CARRIED_BYTES) for name in CARRIED if (folder / name).exists()}


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder, from headers alone.

    With an index, its files hold exactly the tensors that it lists for them. Without one, all `model*.safetensors`
    count. A tensor in two files is refused.
    """
    index = folder / INDEX
    weight_map = _read_index(index) if index.exists() else None
    if weight_map is not None:
        files = sorted({folder / name for name in weight_map.values()})
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(folder, "no tensors", expected=f"{SINGLE}, or {INDEX}", found=_what_is_there(folder))
    if weight_map is not None and (folder / SINGLE).exists() and folder / SINGLE not in files:
        raise CheckpointError(index, f"ambiguous: {SINGLE} lies beside it and it does not list that file")

    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(file, "in two files", tensor=name, found=f"also in {tensors[name].path.name}")
            if weight_map is not None and weight_map.get(name) != file.name:
                expected = weight_map.get(name, "no such tensor")
                raise CheckpointError(file, "the index disagrees", tensor=name, expected=expected, found=file.name)
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(folder / file, "missing: the index lists it for this file", tensor=name)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name. A file name is bare: nothing outside the folder can be named."""
    index = parse_json(read_bounded(path, MAX_INDEX_BYTES), path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(path, "no weight_map", expected="an object with tensor names and file names")
    for name, file in weight_map.items():
        bare = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0")
        if not bare:
            raise CheckpointError(
                path, "file name", tensor=name, expected="a .safetensors file in this folder", found=repr(file)[:200]
            )
    return weight_map


def _what_is_there(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        return f"{pickles[0]}, a pickle: it can run code and is never read; convert it to safetensors first"
    return "none of these"
