"""`cut`: a checkpoint with some layers and experts of another one."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.format.config_json import as_written, render_config
from moe.checkpoint.format.contents import Contents
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import CONFIG, CUT_RECORD
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.layout import TensorSpec, layout, with_scales
from moe.checkpoint.reading.load import load
from moe.checkpoint.reading.values import Files
from moe.checkpoint.rewrite import check_source, index_key, names_by_key, read_raw, read_source, table_for, write_result
from moe.checkpoint.writing.save import dtype_keys, update_module_list
from moe.checkpoint.writing.shards import Entry, as_json
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError

COMPARED_TOKENS = 32  # tokens


def cut(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    layers: Sequence[int],
    experts: Sequence[int] | None = None,
    compare: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a smaller checkpoint of some layers and some of their experts, reading only their bytes.

    Layers and experts keep their order and are renumbered; the router keeps the rows of those experts. All bytes of
    tensors are the source's, quantised or not. MTP modules are left out. The other arguments are those of `convert`.

    Args:
        layers: ascending numbers of the layers to keep.
        experts: ascending numbers of the experts to keep in each layer; None for all.
        compare: load the source and the result, if both fit into memory, and compare their logits on a fixed input.

    Returns:
        A record of what was kept, and of the comparison; it is also written as cut.json.

    Raises:
        ConfigError: a layer or an expert does not exist, or is given twice.
        CheckpointError: `convert` would refuse the source or the target; or routing is limited to groups, and the
            groups that are used do not have equally many of the experts.
    """
    layers, chosen = _numbers("layers", layers), None if experts is None else _numbers("experts", experts)
    contents = read_source(source, target, overwrite, revision, mtp=False)
    check_source(contents)
    experts = list(range(contents.config.n_routed_experts)) if chosen is None else chosen
    config = cut_config(as_written(contents.config, contents.folder), layers, experts, contents.folder)
    family = family_of(config.model_type, contents.folder)
    table = table_for(contents, family)
    specs = {name: spec for name, spec in layout(config, table).items() if spec.written}
    by_key = names_by_key(contents)
    takes: dict[str, tuple[TensorInfo, Sequence[int] | None]] = {}

    def origin(spec: TensorSpec) -> TensorInfo:
        parameter, index = spec.parameter, spec.index
        if parameter.startswith("layers."):
            _, layer, rest = parameter.split(".", 2)
            parameter = f"layers.{layers[int(layer)]}.{rest}"
        if index and isinstance(index[0], int):
            index = (experts[index[0]], *index[1:])
        return contents.tensors[by_key[parameter, index_key(index), spec.repeat]]

    specs = {n: s for n, s in specs.items() if not s.repeat}
    fp8 = [name for name, spec in specs.items() if origin(spec).dtype == "F8_E4M3"]
    if fp8:
        assert contents.quantization is not None and contents.quantization.block_size is not None
        specs = with_scales(specs, family.tables[table], contents.quantization.block_size, fp8)
    entries = []
    for name, spec in specs.items():
        info = origin(spec)
        rows = dataclasses.replace(info, shape=info.shape[1:]) if spec.is_row else info
        takes[name] = (rows, experts if _has_rows_of_experts(spec) else None)
        entries.append(Entry(name, info.dtype, spec.shape))

    values = render_config(config, Path(target) / CONFIG)
    values |= {"architectures": [family.architecture], **dtype_keys(entries, specs)}
    if contents.quantization is not None and contents.has_quantised_tensors:
        values["quantization_config"] = update_module_list(contents.quantization.raw, entries)

    def value(files: Files, entry: Entry) -> Tensor:
        info, rows = takes[entry.name]
        if rows is None:
            return read_raw(files, info)
        return torch.cat([files.read(info, range(row, row + 1)).clone() for row in rows]).view(entry.shape)

    record: dict[str, Any] = {
        "layers": list(layers),
        "experts": list(experts),
        "of_layers": contents.config.num_hidden_layers,
    }
    record |= {"of_experts": contents.config.n_routed_experts, "tensors": len(entries)}
    record |= {"bytes": sum(entry.nbytes for entry in entries), "model_type": config.model_type}

    def finish(folder: Path) -> None:
        if compare:
            record.update(_difference(contents, folder))
        (folder / CUT_RECORD).write_bytes(as_json(record))

    write_result(
        contents,
        target,
        entries,
        value,
        values,
        max_shard_bytes,
        progress,
        "cutting",
        table=table,
        overwrite=overwrite,
        finish=finish,
    )
    return record


def _difference(source: Contents, part: Path) -> dict[str, Any]:
    """Compare the logits of `part` and `source` on the token ids 0, 7919, 15838, ... modulo the vocabulary size."""
    ids = (torch.arange(COMPARED_TOKENS) * 7919 % source.config.vocab_size)[None]
    facts: dict[str, Any] = {"token_ids": ids[0].tolist()}
    with torch.no_grad():
        try:
            found, exact = (
                load(folder, mtp=False, progress=False)(ids).logits.double() for folder in (part, source.folder)
            )
        except CheckpointError as error:  # one of them does not fit into memory
            return facts | {"not_compared": str(error)}
    difference = float((found - exact).norm() / exact.norm())
    facts["relative_difference"] = difference if math.isfinite(difference) else None  # JSON has no NaN
    facts["same_first_choice"] = float((found.argmax(-1) == exact.argmax(-1)).double().mean())
    return facts


# Keys without a field whose lists have an entry per layer; other readers compare their lengths with num_hidden_layers.
_PER_LAYER = ("layer_types", "mlp_layer_types", "attn_type_list")


def cut_config(config: ModelConfig, layers: Sequence[int], experts: Sequence[int], folder: Path) -> ModelConfig:
    """Return the configuration of some layers and experts of `config`; `folder` is for messages."""
    _check_numbers("layers", layers, config.num_hidden_layers)
    dense = [not config.is_moe_layer(layer) for layer in layers]
    leading = next((i for i, d in enumerate(dense) if not d), len(dense))
    others = tuple(i for i, d in enumerate(dense) if d and i >= leading)
    types = config.layer_types
    extra = {
        key: [value[layer] for layer in layers]
        if key in _PER_LAYER and isinstance(value, list) and len(value) == config.num_hidden_layers
        else value
        for key, value in config.extra.items()
    }
    return dataclasses.replace(
        config,
        extra=extra,
        num_hidden_layers=len(layers),
        **_kept_experts(config, experts, folder),
        num_nextn_predict_layers=0,
        decoder_sparse_step=1,
        first_k_dense_replace=leading if config.first_k_dense_replace else 0,
        mlp_only_layers=others if config.first_k_dense_replace else tuple(i for i, d in enumerate(dense) if d),
        layer_types=None if types is None else tuple(types[layer] for layer in layers),
    )


def _kept_experts(config: ModelConfig, experts: Sequence[int], folder: Path) -> dict[str, int]:
    """Return the fields that the number of experts determines."""
    if not config.n_routed_experts:
        if experts:
            raise ConfigError("experts", list(experts), "none, because the model has no experts")
        return {}
    _check_numbers("experts", experts, config.n_routed_experts)
    size = config.n_routed_experts // config.n_group
    groups = [sum(expert // size == group for expert in experts) for group in range(config.n_group)]
    kept = [count for count in groups if count]
    if len(set(kept)) > 1:
        problem = "experts: routing is limited to groups, which must keep equal sizes"
        found = " ".join(map(str, groups))
        raise CheckpointError(folder, problem, expected="the same number of experts from every group used", found=found)
    topk_group = min(config.topk_group, len(kept))
    return {
        "n_routed_experts": len(experts),
        "n_group": len(kept),
        "topk_group": topk_group,
        "num_experts_per_tok": min(config.num_experts_per_tok, topk_group * kept[0]),
    }


def _check_numbers(name: str, chosen: Sequence[int], count: int) -> None:
    if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ConfigError(name, list(chosen), f"ascending numbers from 0 to {count - 1}, without repeats")


def _numbers(name: str, chosen: Any) -> list[int]:
    try:
        return [operator.index(number) for number in chosen]
    except TypeError:
        raise ConfigError(name, chosen, "a sequence of integers") from None


def _has_rows_of_experts(spec: TensorSpec) -> bool:
    """Whether the first axis of the file's tensor is that of experts."""
    return ".mlp.gate." in spec.parameter or (".mlp.experts." in spec.parameter and not spec.index)
