"""`convert`: a checkpoint in another dtype or layout, tensor by tensor, without building a model.

Memory holds one tensor of the result, and one of the source if they differ. A stacked layout has all experts of a layer
in one tensor.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moe.checkpoint.cut import cut as cut
from moe.checkpoint.format.comparison import Plan, plan
from moe.checkpoint.format.config_json import as_written, render_config
from moe.checkpoint.format.dtypes import FLOATING, SAFETENSORS, Dtype, parse_dtype
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.family import Family
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.layout import Slot, fp8_names, layout, with_scales
from moe.checkpoint.format.quantized_formats import MAX_BLOCK, is_block_size
from moe.checkpoint.format.tensor_roles import check_scales
from moe.checkpoint.reading.load import pieces
from moe.checkpoint.reading.values import BIAS, DTYPES, STORED, Files, Piece, fill
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
from moe.checkpoint.writing.shards import Entry
from moe.config import ModelConfig
from moe.counts import parameter_shapes
from moe.errors import CheckpointError, ConfigError, did_you_mean
from moe.ops import quantize_blocks, quantize_mxfp4

logger = logging.getLogger("moe")


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
    """Rewrite the checkpoint `source` as `target`, atomically.

    Args:
        dtype: None keeps every tensor's dtype. "bf16", "fp16", "fp32" or "fp64" (or torch's dtype) dequantises and
            converts everything but the correction bias. "fp8" quantises the projections of attention, MLPs and experts
            in blocks of `block_size`, and reads the source twice, because scales precede codes. "mxfp4" selects the
            layout of that name. Tensors that do not change are copied byte for byte.
        block_size: rows and columns of an FP8 block.
        scale_fmt: "ue8m0" for FP8 scales that are powers of two.
        table: layout of the result, one of the family's: "experts" has a tensor per expert, "stacked" one per layer, as
            transformers has them in memory, "deepseek" the names and the single file of DeepSeek's inference code,
            "mxfp4" is for gpt-oss. Default: the layout of the source.
        mtp: False leaves out multi-token prediction modules and ignores their tensors. True raises if the layout has no
            names for them. None keeps them if the layout has names for them.
        overwrite: replace the checkpoint in `target`. Otherwise `target` must be new or empty. A folder that holds
            other files is never replaced.
        revision: branch, tag or commit of a source on the Hub, as in `moe.load`.
        max_shard_bytes: maximum bytes of tensor data in one file; a larger tensor has a file of its own.
        progress: whether to show a progress bar on stderr; None: if it is a terminal.

    Tokenizer files and the code that `auto_map` names are copied. If the layout changes, modelling code is left out
    with a warning, because it reads the old layout.

    Raises CheckpointError if `moe.load` would refuse the source or the result cannot express it, and ConfigError for
    an invalid argument.
    """
    if not is_block_size(block_size):
        raise ConfigError("block_size", block_size, f"two integers from 1 to {MAX_BLOCK}")
    if scale_fmt not in (None, "ue8m0"):
        raise ConfigError("scale_fmt", scale_fmt, "ue8m0 or None")
    kind = None if dtype is None else parse_dtype(dtype, "dtype", tuple(SAFETENSORS))
    if scale_fmt is not None and kind != "fp8":
        raise ConfigError("scale_fmt", scale_fmt, "None without dtype fp8")
    todo = plan_source(source, target, overwrite, revision, mtp=mtp is not False)
    family = family_of(as_written(todo.config, todo.folder).model_type, todo.folder)
    if kind == "mxfp4":
        if "mxfp4" not in family.tables or table not in (None, "mxfp4"):
            reason = f"the layout {table}" if table else family.model_type
            allowed = f"a dtype other than mxfp4, which {reason} does not have"
            raise ConfigError("dtype", dtype, allowed)
        table, kind = "mxfp4", None
    table = table or ("stacked" if todo.table == "mxfp4" and kind is not None else table_for(todo, family))
    if table not in family.tables:
        known = f"one of {', '.join(family.tables)}, the layouts of {family.model_type}"
        raise ConfigError("layout", table, known + did_you_mean(table, family.tables))
    if todo.config.num_nextn_predict_layers and not family.tables[table].mtp:
        if mtp:
            raise ConfigError("mtp", mtp, f"False (--no-mtp): the layout {table} has no names for MTP modules")
        logger.warning("the layout %s has no names for MTP modules: they are left out", table)
        todo = plan(todo.folder, mtp=False)
    check_source(todo)
    stored = SAFETENSORS[kind] if kind in FLOATING else kind
    config = as_written(todo.config, todo.folder)
    result = _Result(todo, config, family, table, stored, (block_size[0], block_size[1]), scale_fmt)
    entries = result.entries()
    values = render_config(config, Path(target) / CONFIG)
    values |= {"architectures": [family.architecture], **result.storage(entries)}
    write_result(
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


@dataclass
class _Result:
    """Tensors that `convert` writes, and how each is made."""

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
        self.source = names_by_key(todo)
        self.made: tuple[str, Tensor] | None = None  # scales of the last quantised tensor
        self.read: tuple[tuple[str, range], Tensor] | None = None  # the last parameter read
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
        """Return the keys of config.json that describe the files."""
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
        """Return the source tensor that holds the same part of the parameter, or None."""
        name = self.source.get((slot.parameter, hashable(slot.index), slot.repeat))
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
                    f"its dtype differs within {slot.name}, a single tensor in the layout {self.table}; specify a dtype"
                )
                expected = f"{first.dtype}, as {first.name} has"
                raise self.todo.error(info.name, problem, expected=expected, found=info.dtype)
        return first.dtype if first.dtype in DTYPES else "BF16"

    def value(self, files: Files, entry: Entry) -> Tensor:
        slot, same = self.slots[entry.name], self._same(self.slots[entry.name])
        made = self.dtype == "fp8" and (slot.scale_of is not None or entry.dtype == "F8_E4M3")
        if same is not None and same.dtype == entry.dtype and not made:
            tensor = read_raw(files, same)
            if slot.scale_of is not None:
                check_scales(same, tensor)
            return tensor
        if slot.scale_of is not None:
            if self.made is None or self.made[0] != entry.name:  # a file holds scales before codes
                self._quantise(files, self.slots[slot.scale_of])
            assert self.made is not None
            return self.made[1]
        if entry.dtype in ("F8_E4M3", "U8"):
            return self._quantise(files, slot)
        return self._values(files, slot, STORED[entry.dtype])

    def _quantise(self, files: Files, slot: Slot) -> Tensor:
        """Return the codes, and keep their scales in `made`."""
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
        """Return a parameter, or its part for `experts`, dequantised; gate and up projections share one read."""
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
