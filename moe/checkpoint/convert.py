"""Checkpoints into other checkpoints, tensor by tensor: another dtype, another layout, fewer layers and experts.

Neither builds a model. Memory holds one tensor of the result (and of the source, if they differ): of a layout that
stacks all experts of a layer, that is all of them.
"""

import contextlib
import dataclasses
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe.checkpoint.atomic import check_target, replacing
from moe.checkpoint.carried import check_carried, read_carried, resolved, write_carried
from moe.checkpoint.config_json import as_written, render_config
from moe.checkpoint.dtypes import FLOATING, SAFETENSORS, Dtype, parse_dtype
from moe.checkpoint.families import Family, family_of
from moe.checkpoint.folder import CONFIG, RECEIPT, SINGLE
from moe.checkpoint.header import TensorInfo
from moe.checkpoint.hub import find, from_cache
from moe.checkpoint.layout import Plan, Slot, fp8_names, layout, plan, with_scales
from moe.checkpoint.manifest import Manifest
from moe.checkpoint.progress import Progress
from moe.checkpoint.quantization import MAX_BLOCK, is_block_size
from moe.checkpoint.reading import BIAS, DTYPES, STORED, Files, Piece, check_dtypes, check_repeats, fill, load, pieces
from moe.checkpoint.roles import check_scales
from moe.checkpoint.shards import Entry, as_json, config_bytes, divide, write_shards
from moe.checkpoint.writing import dtype_keys, listed_anew
from moe.config import ModelConfig
from moe.counts import parameter_shapes
from moe.errors import CheckpointError, ConfigError, did_you_mean
from moe.ops import quantize_blocks, quantize_mxfp4

logger = logging.getLogger("moe")

DEEPSEEK_FILE = "model0-mp1.safetensors"  # what DeepSeek's inference code opens
COMPARED = 32  # tokens

Key = tuple[str, tuple[Any, ...], bool]


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    dtype: Dtype | str | torch.dtype | None = None,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: Literal["ue8m0"] | None = None,
    table: str | None = None,
    mtp: bool | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    progress: bool | None = None,
) -> None:
    """Write the checkpoint `source` again as `target`, atomically.

    Args:
        dtype: "bf16", "fp16", "fp32" or "fp64" (or torch's dtype) dequantises and converts all but the correction bias;
            "fp8" quantises the projections of attention, MLPs and experts, each expert alone, in blocks of
            `block_size`, with scales that are powers of two for scale_fmt "ue8m0", and reads the source twice, because
            scales precede codes; "mxfp4" is the layout of that name. None leaves every tensor as it is. What is equal
            in both is copied byte for byte.
        table: the layout of the result, one of the family's: "experts" each alone, "stacked" as transformers has them
            in memory, "deepseek" with the names and in the one file of DeepSeek's inference code, "mxfp4" for gpt-oss.
        mtp: False leaves multi-token prediction modules out and does not look at their tensors; True keeps what there
            is, or refuses a layout without names for them; None keeps what the layout has names for.
        overwrite: replace a checkpoint that is in `target` already. Without it only a new or empty folder is written
            to. A folder that holds anything but a checkpoint's files is never replaced.
        revision: that of `moe.load`, for a source on the Hub.
        max_shard_bytes: of data in a file, or one tensor.

    Tokenizer files and the code that `auto_map` names are copied. For another layout, code that reads the old one is
    left out, and a warning says so.

    Raises CheckpointError for a source that `moe.load` would refuse, and for what the result cannot express.
    """
    if not is_block_size(block_size):
        raise ConfigError("block_size", block_size, f"two numbers from 1 to {MAX_BLOCK}")
    if scale_fmt not in (None, "ue8m0"):
        raise ConfigError("scale_fmt", scale_fmt, "ue8m0 or None")
    kind = None if dtype is None else parse_dtype(dtype, "dtype", tuple(SAFETENSORS))
    if scale_fmt is not None and kind != "fp8":
        raise ConfigError("scale_fmt", scale_fmt, "none without dtype fp8")
    todo = _plan(source, target, overwrite, revision, mtp=mtp is not False)
    family = family_of(as_written(todo.config, todo.folder).model_type, todo.folder)
    if kind == "mxfp4":
        if "mxfp4" not in family.tables or table not in (None, "mxfp4"):
            allowed = "another for this layout" if table else f"another: {family.model_type} has no layout for it"
            raise ConfigError("dtype", dtype, allowed)
        table, kind = "mxfp4", None
    table = table or ("stacked" if todo.table == "mxfp4" and kind is not None else _table(todo, family))
    if table not in family.tables:
        known = f"one of {', '.join(family.tables)}, the layouts of {family.model_type}"
        raise ConfigError("layout", table, known + did_you_mean(table, family.tables))
    if todo.config.num_nextn_predict_layers and not family.tables[table].mtp:
        if mtp:
            raise ConfigError("mtp", mtp, f"False (--no-mtp): the layout {table} has no names for MTP modules")
        logger.warning("the layout %s has no names for MTP modules: they are left out", table)
        todo = plan(todo.folder, mtp=False)
    _check(todo)
    stored = SAFETENSORS[kind] if kind in FLOATING else kind
    config = as_written(todo.config, todo.folder)
    result = _Result(todo, config, family, table, stored, (block_size[0], block_size[1]), scale_fmt)
    entries = result.entries()
    values = render_config(config, Path(target) / CONFIG)
    values |= {"architectures": [family.architecture], **result.storage(entries)}
    _write(
        todo,
        target,
        entries,
        result.value,
        values,
        max_shard_bytes,
        progress,
        "converting",
        table=table,
        overwrite=overwrite,
    )


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
    """Write a smaller checkpoint of some layers and some experts of each of them, reading only their bytes.

    Layers and experts keep their order and are counted anew; the router keeps the rows of those experts. Every byte is
    one of the source, quantised or not. MTP modules are left out, whatever the source has of them. Returns the receipt,
    which is also in the folder as cut.json: what was kept, and with `compare` how far the result's logits are from the
    source's on a fixed input, for which the whole source is loaded, if it fits into memory. `overwrite` and `revision`
    are those of `convert`.

    Raises ConfigError for layers and experts that are not there or twice; CheckpointError where the family cannot
    express the result: experts in groups must be as many in each group that has any.
    """
    layers, experts = _numbers("layers", layers), _numbers("experts", experts)
    todo = _plan(source, target, overwrite, revision, mtp=False)
    _check(todo)
    config = cut_config(as_written(todo.config, todo.folder), layers, experts, todo.folder)
    family = family_of(config.model_type, todo.folder)
    table = _table(todo, family)
    slots = {name: slot for name, slot in layout(config, table).items() if slot.written}
    by_key = _by_key(todo)
    takes: dict[str, tuple[TensorInfo, Sequence[int] | None]] = {}

    def origin(slot: Slot) -> TensorInfo:
        parameter, index = slot.parameter, slot.index
        if parameter.startswith("layers."):
            _, layer, rest = parameter.split(".", 2)
            parameter = f"layers.{layers[int(layer)]}.{rest}"
        if index and isinstance(index[0], int):
            index = (experts[index[0]], *index[1:])
        return todo.tensors[by_key[parameter, _hashable(index), slot.repeat]]

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
            return _raw(files, info)
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

    _write(
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


def _table(todo: Plan, family: Family) -> str:
    """The layout of the source, or if the result's family does not have it, the first."""
    return todo.table if todo.table in family.tables else next(iter(family.tables))


def _difference(source: Plan, part: Path) -> dict[str, Any]:
    """The logits of the part against the source's, on token ids 0, 7919, 15838 ... modulo the vocabulary."""
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
    facts["relative_difference"] = difference if math.isfinite(difference) else None  # which JSON cannot hold
    facts["same_first_choice"] = float((found.argmax(-1) == exact.argmax(-1)).double().mean())
    return facts


def _plan(
    source: str | PathLike[str], target: str | PathLike[str], overwrite: bool, revision: str | None, *, mtp: bool
) -> Plan:
    """The plan of the source. Before anything is read, raises if the target cannot be written or replaced."""
    same = "the source itself, which would be replaced"
    if os.path.realpath(source) == os.path.realpath(target):
        raise CheckpointError(target, same, expected="another folder")
    check_target(target, overwrite=overwrite)
    folder = find(source, revision)
    real = Path(os.path.realpath(folder))
    if real == Path(os.path.realpath(target)):  # a name of a folder elsewhere
        raise CheckpointError(target, same, expected="another folder")
    if Path(os.path.realpath(target)).is_relative_to(real):
        raise CheckpointError(target, "inside the source, which is only read", expected="a folder outside it")
    with from_cache(source, revision):
        return plan(folder, mtp=mtp)


def _check(todo: Plan) -> None:
    """Be as strict as `load`."""
    todo.check()
    check_dtypes(todo)
    check_repeats(todo)


# Lists with an entry for each layer that no field holds, and that other readers compare with the number of layers.
_PER_LAYER = ("layer_types", "mlp_layer_types", "attn_type_list")


def cut_config(config: ModelConfig, layers: Sequence[int], experts: Sequence[int], folder: Path) -> ModelConfig:
    """The configuration of some layers and experts of `config`. `folder` is for messages."""
    for name, chosen, count in (
        ("layers", layers, config.num_hidden_layers),
        ("experts", experts, config.n_routed_experts),
    ):
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
            raise ConfigError(name, list(chosen), f"ascending numbers from 0 to {count - 1}, none twice")
    size = config.n_routed_experts // config.n_group
    groups = [sum(expert // size == group for expert in experts) for group in range(config.n_group)]
    kept = [count for count in groups if count]
    if len(set(kept)) > 1:
        problem = "experts: routing is limited to groups, which must stay equal"
        found = " ".join(map(str, groups))
        raise CheckpointError(folder, problem, expected="as many experts of each group that has any", found=found)
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
    """Whether the first axis of the file's tensor counts experts: the router's, and stacked ones."""
    return ".mlp.gate." in slot.parameter or (".mlp.experts." in slot.parameter and not slot.index)


def _write(
    todo: Plan,
    target: str | PathLike[str],
    entries: Sequence[Entry],
    value: Callable[[Files, Entry], Tensor],
    config: Mapping[str, Any],
    max_shard_bytes: int,
    progress: bool | None,
    doing: str,
    *,
    table: str,
    overwrite: bool,
    finish: Callable[[Path], object] = lambda folder: None,
) -> None:
    config, carried = resolved(config, read_carried(todo.folder), same_layout=table == todo.table)
    check_carried(carried, Path(target))
    content, manifest = config_bytes(config, Path(target) / CONFIG), Manifest()
    single = DEEPSEEK_FILE if table == "deepseek" else SINGLE
    files = divide(entries, None if table == "deepseek" else max_shard_bytes, Path(target), single=single)
    with (
        replacing(target, manifest, overwrite=overwrite) as new,
        Progress(doing, sum(e.nbytes for e in entries), progress) as bar,
    ):
        with Files(Progress("", 0, False)) as source:
            write_shards(new, files, lambda entry: value(source, entry), manifest, wrote=bar.advance)
        write_carried(new, {**carried, CONFIG: content})
        finish(new)


def _by_key(todo: Plan) -> dict[Key, str]:
    """What a file tensor fills -> its name."""
    return {
        (slot.parameter, _hashable(slot.index), slot.repeat): name
        for name, slot in todo.slots.items()
        if name in todo.tensors
    }


def _hashable(index: tuple[int | slice, ...]) -> tuple[Any, ...]:
    return tuple((i.start, i.stop) if isinstance(i, slice) else i for i in index)


def _raw(files: Files, info: TensorInfo) -> Tensor:
    tensor = torch.empty(info.shape, dtype=STORED[info.dtype])
    if tensor.numel():
        files.read_into(info, 0, tensor)
    return tensor


@dataclass
class _Result:
    """What `convert` writes, and how each tensor comes about."""

    todo: Plan
    config: ModelConfig
    family: Family
    table: str
    dtype: str | None
    block_size: tuple[int, int]
    scale_fmt: Literal["ue8m0"] | None

    def __post_init__(self) -> None:
        todo = self.todo
        self.names = self.family.tables[self.table]
        self.source = _by_key(todo)
        self.made: tuple[str, Tensor] | None = None  # scales, made with the tensor that they belong to
        self.read: tuple[tuple[str, range], Tensor] | None = None  # the parameter that was read last
        self.pieces: dict[str, list[Piece]] = {}
        slots = layout(self.config, self.table)
        repeats = any(slot.repeat and name in todo.tensors for name, slot in todo.slots.items())
        slots = {name: slot for name, slot in slots.items() if slot.written and (repeats or not slot.repeat)}
        quantization = todo.quantization
        stacked = any(".mlp.experts." in slot.parameter and not slot.index for slot in slots.values())
        if stacked and self.dtype == "fp8":
            raise ConfigError("dtype", "fp8", f"bf16, fp16 or fp32: the layout {self.table} cannot hold experts in FP8")
        if stacked and self.dtype is None and quantization is not None and self.table != todo.table:
            raise ConfigError(
                "dtype", None, f"a dtype such as bf16: the layout {self.table} cannot hold quantised experts"
            )
        if self.dtype == "fp8":
            slots = with_scales(slots, self.names, self.block_size, fp8_names(slots))
        elif self.dtype is None and quantization is not None and quantization.block_size is not None:
            self.block_size = quantization.block_size
            kept = [
                name
                for name, slot in slots.items()
                if (info := self._same(slot)) is not None and info.dtype == "F8_E4M3"
            ]
            slots = with_scales(slots, self.names, self.block_size, kept)
        self.slots = slots

    def entries(self) -> list[Entry]:
        return [Entry(name, self._dtype_of(slot), slot.shape) for name, slot in self.slots.items()]

    def storage(self, entries: list[Entry]) -> dict[str, Any]:
        """The keys of config.json that describe the files."""
        keys: dict[str, Any] = dtype_keys(entries, self.slots)
        if any(entry.dtype == "F8_E4M3" for entry in entries):
            raw: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            raw |= {"weight_block_size": list(self.block_size)}
            raw |= {"scale_fmt": self.scale_fmt} if self.scale_fmt else {}
            raw |= {"modules_to_not_convert": []}
            kept = self.todo.quantization if self.dtype is None else None
            keys["quantization_config"] = listed_anew(kept.raw if kept else raw, entries)
        elif self.table == "mxfp4":
            kept = self.todo.quantization
            keys["quantization_config"] = dict(kept.raw) if kept else {"quant_method": "mxfp4"}
        return keys

    def _same(self, slot: Slot) -> TensorInfo | None:
        """The tensor of the source that fills exactly the same."""
        name = self.source.get((slot.parameter, _hashable(slot.index), slot.repeat))
        if name is None or self.todo.slots[name].axes != slot.axes:
            return None
        return self.todo.tensors[name]

    def _dtype_of(self, slot: Slot) -> str:
        same = self._same(slot)
        if slot.parameter.endswith(("_blocks", "_scales")):
            return "U8"
        if slot.parameter.endswith(BIAS):
            return same.dtype if same else "F32"
        if self.dtype == "fp8":
            if slot.scale_of is not None:
                return "F32"
            scaled = self.slots.get(slot.name.removesuffix(self.names.scale[0]) + self.names.scale[1])
            if scaled is not None and scaled.scale_of == slot.name:
                return "F8_E4M3"
            return same.dtype if same and same.dtype in DTYPES else "BF16"
        if self.dtype is not None:
            return self.dtype
        if same is not None:
            return same.dtype
        first, *others = (p.info for p in self._pieces(slot.parameter))
        for info in others:
            if info.dtype != first.dtype:
                problem = (
                    f"its dtype differs within {slot.name}, a single tensor in the layout {self.table}; choose a dtype"
                )
                expected = f"{first.dtype}, as {first.name} has"
                raise self.todo.error(info.name, problem, expected=expected, found=info.dtype)
        return first.dtype if first.dtype in DTYPES else "BF16"

    def value(self, files: Files, entry: Entry) -> Tensor:
        slot, same = self.slots[entry.name], self._same(self.slots[entry.name])
        made = self.dtype == "fp8" and (slot.scale_of is not None or entry.dtype == "F8_E4M3")
        if same is not None and same.dtype == entry.dtype and not made:
            tensor = _raw(files, same)
            if slot.scale_of is not None:
                check_scales(same, tensor)
            return tensor
        if slot.scale_of is not None:
            if self.made is None or self.made[0] != entry.name:  # wide dtypes come first in a file, scales before codes
                self._quantise(files, self.slots[slot.scale_of])
            assert self.made is not None
            return self.made[1]
        if entry.dtype in ("F8_E4M3", "U8"):
            return self._quantise(files, slot)
        return self._values(files, slot, STORED[entry.dtype])

    def _quantise(self, files: Files, slot: Slot) -> Tensor:
        """The codes; their scales are kept for the next call."""
        if slot.parameter.endswith("_blocks"):
            parameter = slot.parameter.removesuffix("_blocks")
            whole = self._whole(files, parameter, torch.float32)
            with self._about(slot):
                blocks, scales = quantize_mxfp4(whole)
            scale_slot = self.slots[slot.name.removesuffix("_blocks") + "_scales"]
            self.made = (scale_slot.name, scale_slot.stored(scales))
            return slot.stored(blocks)
        values = self._values(files, slot, torch.float32)
        with self._about(slot):
            codes, scale = quantize_blocks(values, self.block_size, scale_fmt=self.scale_fmt)
        self.made = (slot.name.removesuffix(self.names.scale[0]) + self.names.scale[1], scale)
        return codes

    @contextlib.contextmanager
    def _about(self, slot: Slot) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # NaN or infinity
            raise CheckpointError(self.todo.folder, f"cannot be quantised: {error}", tensor=slot.name) from error

    def _values(self, files: Files, slot: Slot, dtype: torch.dtype) -> Tensor:
        if slot.index and isinstance(slot.index[0], int):
            one = self._whole(files, slot.parameter, dtype, range(slot.index[0], slot.index[0] + 1))
            return dataclasses.replace(slot, index=(0, *slot.index[1:])).stored(one)
        return slot.stored(self._whole(files, slot.parameter, dtype))

    def _whole(self, files: Files, parameter: str, dtype: torch.dtype, experts: range | None = None) -> Tensor:
        """A parameter, or of some experts, dequantised; the last one is remembered, for gate and up come in turn."""
        experts = range(self.todo.config.n_routed_experts) if experts is None else experts
        if self.read is not None and self.read[0] == (f"{parameter} {dtype}", experts):
            return self.read[1]
        shape = parameter_shapes(self.todo.config)[parameter]
        if ".mlp.experts." in parameter:
            shape = (len(experts), *shape[1:])
        self.read = None
        whole = torch.empty(shape, dtype=dtype)
        for piece in self._pieces(parameter):
            mine = piece.of(experts)
            if mine is not None:
                fill(files, mine, whole[mine.index], self.todo)
        self.read = (f"{parameter} {dtype}", experts), whole
        return whole

    def _pieces(self, parameter: str) -> list[Piece]:
        if not self.pieces:
            for piece in pieces(self.todo, keep=False):
                self.pieces.setdefault(piece.parameter, []).append(piece)
        return self.pieces[parameter]
