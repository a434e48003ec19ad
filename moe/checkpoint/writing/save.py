"""`save`: a model written atomically as a Hugging Face checkpoint folder."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.format.auxiliary import check_auxiliary, read_auxiliary, resolve_references, write_auxiliary
from moe.checkpoint.format.config_json import as_written, render_config
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.layout import TensorSpec, layer_of, layout, with_scales
from moe.checkpoint.format.manifest import Manifest
from moe.checkpoint.format.tensor_roles import needs_common_dtype
from moe.checkpoint.reading.load import Origin
from moe.checkpoint.reading.values import BIAS, TORCH_DTYPES, WEIGHT_DTYPES
from moe.checkpoint.writing.atomic import replacing
from moe.checkpoint.writing.shards import Entry, check_dense, config_bytes, divide, entry_of, write_shards
from moe.counts import parameter_shapes
from moe.errors import CheckpointError
from moe.model import Transformer

MAX_SHARD_BYTES = 5 * 2**30


def save(model: Transformer, folder: str | PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model` in Hugging Face layout, which transformers and the engines load.

    Tensors keep their dtypes; the correction bias is fp32. Shards hold at most `max_shard_bytes` of data each; a larger
    tensor has a shard of its own. The model is not copied.

    The folder is written beside its final place, synced, and renamed atomically, so an existing checkpoint is intact
    until the new one replaces it. If another process is saving to the folder, the call is refused. Auxiliary files in
    the folder, such as a tokenizer, are kept unless `model.carried_files` replaces them. Entries of `auto_map` whose
    files are missing are left out with a warning. `moesmith inspect --verify` checks a saved folder.

    Raises `CheckpointError`, before writing anything, if there are `config.family_problems()` (it states the first), if
    a tensor is not dense (such as torchao's quantised ones), or if the folder is a mount point or holds anything but a
    checkpoint's files. System errors while writing, such as a full disk, also raise `CheckpointError`.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise CheckpointError(folder, "the model is on a mesh", expected="moe.parallel.export, called on every rank")
    save_through(lambda name, tensor: tensor, model, folder, max_shard_bytes=max_shard_bytes)


def save_through(
    view: Callable[[str, Tensor], Any],
    model: Transformer,
    folder: str | PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save a model whose parameters' values are `view(name, parameter)`, which is called in file order.

    Only shape and dtype of the parameter itself are used, except for correction biases.
    """
    target = Path(os.path.realpath(folder))
    values = render_config(model.config, target / CONFIG)
    state, specs = _checked_state(model, target)
    check_auxiliary(model.carried_files, target)
    entries = [entry_of(name, state[spec.parameter], spec.shape) for name, spec in specs.items()]
    config = _config_values(values, model, entries, specs, target)
    files, manifest = divide(entries, max_shard_bytes, target), Manifest()

    def value(entry: Entry) -> Tensor:
        spec = specs[entry.name]
        return spec.stored(view(spec.parameter, state[spec.parameter]))

    with replacing(target, manifest) as new:
        auxiliary = {**(read_auxiliary(target) if target.exists() else {}), **model.carried_files}
        config, auxiliary = resolve_references(config, auxiliary)
        check_auxiliary(auxiliary, target)
        write_shards(new, files, value, manifest)
        write_auxiliary(new, {**auxiliary, CONFIG: config_bytes(config, target / CONFIG)})


def _checked_state(model: Transformer, target: Path) -> tuple[dict[str, Tensor], dict[str, TensorSpec]]:
    """Return the model's tensors and those of the files; raises `CheckpointError` if a reader would refuse them."""
    state: dict[str, Tensor] = dict(model.state_dict())
    check_dense(state, target)
    for name, tensor in state.items():
        if tensor.dtype == torch.int8:
            problem = "int8 weights cannot be saved; save the model before it is quantised"
            raise CheckpointError(target, problem, tensor=name, expected="a floating-point dtype", found=tensor.dtype)
    origin: Origin | None = model.origin
    config = as_written(model.config, target)
    family = family_of(config.model_type, target)
    table = origin.table if origin is not None and origin.table in family.tables else next(iter(family.tables))
    specs = {n: spec for n, spec in layout(config, table).items() if spec.written}
    if origin is not None:
        names = family.tables[table]
        specs = {n: spec for n, spec in specs.items() if not spec.repeat or layer_of(names, n) not in origin.omitted}
        if origin.block_size is not None:
            kept = [n for n, spec in specs.items() if state[spec.parameter].dtype == torch.float8_e4m3fn]
            specs = with_scales(specs, family.tables[table], origin.block_size, kept)
    shapes = parameter_shapes(model.config) | {
        spec.parameter: tuple(state[spec.parameter].shape)
        for spec in specs.values()
        if spec.parameter.endswith(("_scale_inv", "_blocks", "_scales")) and spec.parameter in state
    }
    shapes = {name: shape for name, shape in shapes.items() if name in {spec.parameter for spec in specs.values()}}
    for name in sorted(state.keys() | shapes.keys()):
        found = tuple(state[name].shape) if name in state else "no such tensor"
        expected = shapes.get(name, "no such tensor")
        if found != expected:
            raise CheckpointError(
                target, "the model does not match its config", tensor=name, expected=expected, found=found
            )
        tensor = state[name]
        if tensor.is_meta or tensor.dtype not in TORCH_DTYPES.values():
            found = "the meta device" if tensor.is_meta else tensor.dtype
            raise CheckpointError(target, "has no floating-point values", tensor=name, found=found)
        if name.endswith(BIAS):
            state[name] = tensor.float()
        if origin is not None and name in origin.narrow:
            state[name] = _as_stored(state[name], origin.narrow[name])
    return state, specs


def _as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to the original file's dtype if that is exact; bf16 cannot hold an update of 0.001."""
    return tensor.to(dtype) if torch.equal(tensor.to(dtype).float(), tensor) else tensor


def _config_values(
    values: Mapping[str, Any],
    model: Transformer,
    entries: Sequence[Entry],
    specs: Mapping[str, TensorSpec],
    target: Path,
) -> dict[str, Any]:
    quantization = model.origin.quantization if model.origin else None
    if model.origin is None:  # otherwise transformers assumes the ids of the released tokenizer
        values = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **values}
    architecture = family_of(values["model_type"], target).architecture
    values = {**values, "architectures": [architecture], **dtype_keys(entries, specs)}
    if quantization:
        renamed = values["model_type"] != model.config.model_type
        values["quantization_config"] = update_module_list(quantization, entries) if renamed else dict(quantization)
    config_bytes(values, target / CONFIG)
    return values


def dtype_keys(entries: Iterable[Entry], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return the keys of config.json that state a dtype: that of most values that need a common dtype.

    Readers convert all tensors to it.
    """
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.dtype in WEIGHT_DTYPES and needs_common_dtype(specs[entry.name].parameter):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    return dict.fromkeys(
        ("dtype", "torch_dtype"), str(WEIGHT_DTYPES[max(sizes, key=sizes.__getitem__)])[len("torch.") :]
    )


def update_module_list(raw: Mapping[str, Any], entries: Iterable[Entry]) -> dict[str, Any]:
    """Return the `quantization_config` `raw` with its list of unquantised modules, if any, updated to `entries`.

    vLLM and transformers create an FP8 layer for every matrix that the list does not name.
    """
    plain = [
        entry.name.removesuffix(".weight")
        for entry in entries
        if entry.name.endswith(".weight") and len(entry.shape) == 2 and entry.dtype in WEIGHT_DTYPES
    ]
    plain = [name for name in plain if not name.endswith("embed_tokens")]
    return {key: plain if key in ("modules_to_not_convert", "ignored_layers") else raw[key] for key in raw}
