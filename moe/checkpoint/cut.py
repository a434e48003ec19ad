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

from moe.checkpoint.format.comparison import Plan
from moe.checkpoint.format.config_json import as_written, render_config
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import CONFIG, RECEIPT
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.layout import Slot, layout, with_scales
from moe.checkpoint.reading.load import load
from moe.checkpoint.reading.values import Files
from moe.checkpoint.rewrite import (
    check_source,
    hashable,
    names_by_key,
    plan_source,
    read_raw,
    table_for,
    write_result,
)
from moe.checkpoint.writing.save import dtype_keys, listed_anew
from moe.checkpoint.writing.shards import Entry, as_json
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError

COMPARED = 32  # tokens


def cut(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    layers: Sequence[int],
    experts: Sequence[int],
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
        experts: ascending numbers of the experts to keep in each layer.
        compare: load the source and the result, if both fit into memory, and compare their logits on a fixed input.

    Returns:
        A record of what was kept, and of the comparison; it is also written as cut.json.

    Raises:
        ConfigError: a layer or an expert does not exist, or is given twice.
        CheckpointError: `convert` would refuse the source or the target; or routing is limited to groups, and the
            groups that are used do not have equally many of the experts.
    """
    layers, experts = _numbers("layers", layers), _numbers("experts", experts)
    todo = plan_source(source, target, overwrite, revision, mtp=False)
    check_source(todo)
    config = cut_config(as_written(todo.config, todo.folder), layers, experts, todo.folder)
    family = family_of(config.model_type, todo.folder)
    table = table_for(todo, family)
    slots = {name: slot for name, slot in layout(config, table).items() if slot.written}
    by_key = names_by_key(todo)
    takes: dict[str, tuple[TensorInfo, Sequence[int] | None]] = {}

    def origin(slot: Slot) -> TensorInfo:
        parameter, index = slot.parameter, slot.index
        if parameter.startswith("layers."):
            _, layer, rest = parameter.split(".", 2)
            parameter = f"layers.{layers[int(layer)]}.{rest}"
        if index and isinstance(index[0], int):
            index = (experts[index[0]], *index[1:])
        return todo.tensors[by_key[parameter, hashable(index), slot.repeat]]

    slots = {n: s for n, s in slots.items() if not s.repeat}
    fp8 = [name for name, slot in slots.items() if origin(slot).dtype == "F8_E4M3"]
    if fp8:
        assert todo.quantization is not None and todo.quantization.block_size is not None
        slots = with_scales(slots, family.tables[table], todo.quantization.block_size, fp8)
    entries = []
    for name, slot in slots.items():
        info = origin(slot)
        rows = dataclasses.replace(info, shape=info.shape[1:]) if slot.is_row else info
        takes[name] = (rows, experts if _has_rows_of_experts(slot) else None)
        entries.append(Entry(name, info.dtype, slot.shape))

    values = render_config(config, Path(target) / CONFIG)
    values |= {"architectures": [family.architecture], **dtype_keys(entries, slots)}
    if todo.quantization is not None and todo.has_quantised_tensors:
        values["quantization_config"] = listed_anew(todo.quantization.raw, entries)

    def value(files: Files, entry: Entry) -> Tensor:
        info, rows = takes[entry.name]
        if rows is None:
            return read_raw(files, info)
        return torch.cat([files.read(info, range(row, row + 1)).clone() for row in rows]).view(entry.shape)

    receipt: dict[str, Any] = {
        "layers": list(layers),
        "experts": list(experts),
        "of_layers": todo.config.num_hidden_layers,
    }
    receipt |= {"of_experts": todo.config.n_routed_experts, "tensors": len(entries)}
    receipt |= {"bytes": sum(entry.nbytes for entry in entries), "model_type": config.model_type}

    def finish(folder: Path) -> None:
        if compare:
            receipt.update(_difference(todo, folder))
        (folder / RECEIPT).write_bytes(as_json(receipt))

    write_result(
        todo,
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
    return receipt


def _difference(source: Plan, part: Path) -> dict[str, Any]:
    """Compare the logits of `part` and `source` on the token ids 0, 7919, 15838, ... modulo the vocabulary size."""
    ids = (torch.arange(COMPARED) * 7919 % source.config.vocab_size)[None]
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
    for name, chosen, count in (
        ("layers", layers, config.num_hidden_layers),
        ("experts", experts, config.n_routed_experts),
    ):
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
            raise ConfigError(name, list(chosen), f"ascending numbers from 0 to {count - 1}, without repeats")
    size = config.n_routed_experts // config.n_group
    groups = [sum(expert // size == group for expert in experts) for group in range(config.n_group)]
    kept = [count for count in groups if count]
    if len(set(kept)) > 1:
        problem = "experts: routing is limited to groups, which must keep equal sizes"
        found = " ".join(map(str, groups))
        raise CheckpointError(folder, problem, expected="the same number of experts from every group used", found=found)
    topk_group = min(config.topk_group, len(kept))
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
        n_routed_experts=len(experts),
        n_group=len(kept),
        topk_group=topk_group,
        num_experts_per_tok=min(config.num_experts_per_tok, topk_group * kept[0]),
        num_nextn_predict_layers=0,
        decoder_sparse_step=1,
        first_k_dense_replace=leading if config.first_k_dense_replace else 0,
        mlp_only_layers=others if config.first_k_dense_replace else tuple(i for i, d in enumerate(dense) if d),
        layer_types=None if types is None else tuple(types[layer] for layer in layers),
    )


def _numbers(name: str, chosen: Any) -> list[int]:
    try:
        return [operator.index(number) for number in chosen]
    except TypeError:
        raise ConfigError(name, chosen, "a sequence of integers") from None


def _has_rows_of_experts(slot: Slot) -> bool:
    """Whether the first axis of the file's tensor is that of experts."""
    return ".mlp.gate." in slot.parameter or (".mlp.experts." in slot.parameter and not slot.index)
