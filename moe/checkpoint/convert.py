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
from moe.checkpoint.format.config_json import as_written, render_config
from moe.checkpoint.format.contents import Contents, read_contents
from moe.checkpoint.format.dtypes import FLOATING, SAFETENSORS, Dtype, parse_dtype
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.family import Family
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.header import TensorInfo
from moe.checkpoint.format.layout import TensorSpec, fp8_names, layout, with_scales
from moe.checkpoint.format.quantized_formats import MAX_BLOCK, is_block_size
from moe.checkpoint.format.tensor_roles import check_scales
from moe.checkpoint.reading.load import pieces
from moe.checkpoint.reading.values import BIAS, TORCH_DTYPES, WEIGHT_DTYPES, Files, Piece, fill
from moe.checkpoint.rewrite import check_source, index_key, names_by_key, read_raw, read_source, table_for, write_result
from moe.checkpoint.writing.save import dtype_keys, update_module_list
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
    contents = read_source(source, target, overwrite, revision, mtp=mtp is not False)
    family = family_of(as_written(contents.config, contents.folder).model_type, contents.folder)
    if kind == "mxfp4":
        if "mxfp4" not in family.tables or table not in (None, "mxfp4"):
            reason = f"the layout {table}" if table else family.model_type
            allowed = f"a dtype other than mxfp4, which {reason} does not have"
            raise ConfigError("dtype", dtype, allowed)
        table, kind = "mxfp4", None
    table = table or ("stacked" if contents.table == "mxfp4" and kind is not None else table_for(contents, family))
    if table not in family.tables:
        known = f"one of {', '.join(family.tables)}, the layouts of {family.model_type}"
        raise ConfigError("layout", table, known + did_you_mean(table, family.tables))
    if contents.config.num_nextn_predict_layers and not family.tables[table].mtp:
        if mtp:
            raise ConfigError("mtp", mtp, f"False (--no-mtp): the layout {table} has no names for MTP modules")
        logger.warning("the layout %s has no names for MTP modules: they are left out", table)
        contents = read_contents(contents.folder, mtp=False)
    check_source(contents)
    stored = SAFETENSORS[kind] if kind in FLOATING else kind
    config = as_written(contents.config, contents.folder)
    result = _Result(contents, config, family, table, stored, (block_size[0], block_size[1]), scale_fmt)
    entries = result.entries()
    values = render_config(config, Path(target) / CONFIG)
    values |= {"architectures": [family.architecture], **result.storage(entries)}
    write_result(
        contents,
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

    contents: Contents
    config: ModelConfig
    family: Family
    table: str
    dtype: str | None
    block_size: tuple[int, int]
    scale_fmt: Literal["ue8m0"] | None

    def __post_init__(self) -> None:
        contents = self.contents
        self.names = self.family.tables[self.table]
        self.source = names_by_key(contents)
        self.made: tuple[str, Tensor] | None = None  # scales of the last quantised tensor
        self.read: tuple[tuple[str, range], Tensor] | None = None  # the last parameter read
        self.pieces: dict[str, list[Piece]] = {}
        specs = layout(self.config, self.table)
        repeats = any(spec.repeat and name in contents.tensors for name, spec in contents.specs.items())
        specs = {name: spec for name, spec in specs.items() if spec.written and (repeats or not spec.repeat)}
        quantization = contents.quantization
        stacked = any(".mlp.experts." in spec.parameter and not spec.index for spec in specs.values())
        if stacked and self.dtype == "fp8":
            raise ConfigError("dtype", "fp8", f"bf16, fp16 or fp32: the layout {self.table} cannot hold experts in FP8")
        if stacked and self.dtype is None and quantization is not None and self.table != contents.table:
            raise ConfigError(
                "dtype", None, f"a dtype such as bf16: the layout {self.table} cannot hold quantised experts"
            )
        if self.dtype == "fp8":
            specs = with_scales(specs, self.names, self.block_size, fp8_names(specs))
        elif self.dtype is None and quantization is not None and quantization.block_size is not None:
            self.block_size = quantization.block_size
            kept = [
                name
                for name, spec in specs.items()
                if (info := self._same(spec)) is not None and info.dtype == "F8_E4M3"
            ]
            specs = with_scales(specs, self.names, self.block_size, kept)
        self.specs = specs

    def entries(self) -> list[Entry]:
        return [Entry(name, self._dtype_of(spec), spec.shape) for name, spec in self.specs.items()]

    def storage(self, entries: list[Entry]) -> dict[str, Any]:
        """Return the keys of config.json that describe the files."""
        keys: dict[str, Any] = dtype_keys(entries, self.specs)
        if any(entry.dtype == "F8_E4M3" for entry in entries):
            raw: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
            raw |= {"weight_block_size": list(self.block_size)}
            raw |= {"scale_fmt": self.scale_fmt} if self.scale_fmt else {}
            raw |= {"modules_to_not_convert": []}
            kept = self.contents.quantization if self.dtype is None else None
            keys["quantization_config"] = update_module_list(kept.raw if kept else raw, entries)
        elif self.table == "mxfp4":
            kept = self.contents.quantization
            keys["quantization_config"] = dict(kept.raw) if kept else {"quant_method": "mxfp4"}
        return keys

    def _same(self, spec: TensorSpec) -> TensorInfo | None:
        """Return the source tensor that holds the same part of the parameter, or None."""
        name = self.source.get((spec.parameter, index_key(spec.index), spec.repeat))
        if name is None or self.contents.specs[name].axes != spec.axes:
            return None
        return self.contents.tensors[name]

    def _dtype_of(self, spec: TensorSpec) -> str:
        same = self._same(spec)
        if spec.parameter.endswith(("_blocks", "_scales")):
            return "U8"
        if spec.parameter.endswith(BIAS):
            return same.dtype if same else "F32"
        if self.dtype == "fp8":
            if spec.scale_of is not None:
                return "F32"
            scaled = self.specs.get(spec.name.removesuffix(self.names.scale[0]) + self.names.scale[1])
            if scaled is not None and scaled.scale_of == spec.name:
                return "F8_E4M3"
            return same.dtype if same and same.dtype in WEIGHT_DTYPES else "BF16"
        if self.dtype is not None:
            return self.dtype
        if same is not None:
            return same.dtype
        first, *others = (p.info for p in self._pieces(spec.parameter))
        for info in others:
            if info.dtype != first.dtype:
                problem = (
                    f"its dtype differs within {spec.name}, a single tensor in the layout {self.table}; specify a dtype"
                )
                expected = f"{first.dtype}, as {first.name} has"
                raise self.contents.error(info.name, problem, expected=expected, found=info.dtype)
        return first.dtype if first.dtype in WEIGHT_DTYPES else "BF16"

    def value(self, files: Files, entry: Entry) -> Tensor:
        spec, same = self.specs[entry.name], self._same(self.specs[entry.name])
        made = self.dtype == "fp8" and (spec.scale_of is not None or entry.dtype == "F8_E4M3")
        if same is not None and same.dtype == entry.dtype and not made:
            tensor = read_raw(files, same)
            if spec.scale_of is not None:
                check_scales(same, tensor)
            return tensor
        if spec.scale_of is not None:
            if self.made is None or self.made[0] != entry.name:  # a file holds scales before codes
                self._quantise(files, self.specs[spec.scale_of])
            assert self.made is not None
            return self.made[1]
        if entry.dtype in ("F8_E4M3", "U8"):
            return self._quantise(files, spec)
        return self._values(files, spec, TORCH_DTYPES[entry.dtype])

    def _quantise(self, files: Files, spec: TensorSpec) -> Tensor:
        """Return the codes, and keep their scales in `made`."""
        if spec.parameter.endswith("_blocks"):
            parameter = spec.parameter.removesuffix("_blocks")
            whole = self._whole(files, parameter, torch.float32)
            with self._about(spec):
                blocks, scales = quantize_mxfp4(whole)
            scale_spec = self.specs[spec.name.removesuffix("_blocks") + "_scales"]
            self.made = (scale_spec.name, scale_spec.stored(scales))
            return spec.stored(blocks)
        values = self._values(files, spec, torch.float32)
        with self._about(spec):
            codes, scale = quantize_blocks(values, self.block_size, scale_fmt=self.scale_fmt)
        self.made = (spec.name.removesuffix(self.names.scale[0]) + self.names.scale[1], scale)
        return codes

    @contextlib.contextmanager
    def _about(self, spec: TensorSpec) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # NaN or infinity
            raise CheckpointError(self.contents.folder, f"cannot be quantised: {error}", tensor=spec.name) from error

    def _values(self, files: Files, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
        if spec.index and isinstance(spec.index[0], int):
            one = self._whole(files, spec.parameter, dtype, range(spec.index[0], spec.index[0] + 1))
            return dataclasses.replace(spec, index=(0, *spec.index[1:])).stored(one)
        return spec.stored(self._whole(files, spec.parameter, dtype))

    def _whole(self, files: Files, parameter: str, dtype: torch.dtype, experts: range | None = None) -> Tensor:
        """Return a parameter, or its part for `experts`, dequantised; gate and up projections share one read."""
        experts = range(self.contents.config.n_routed_experts) if experts is None else experts
        if self.read is not None and self.read[0] == (f"{parameter} {dtype}", experts):
            return self.read[1]
        shape = parameter_shapes(self.contents.config)[parameter]
        if ".mlp.experts." in parameter:
            shape = (len(experts), *shape[1:])
        self.read = None
        whole = torch.empty(shape, dtype=dtype)
        for piece in self._pieces(parameter):
            mine = piece.for_experts(experts)
            if mine is not None:
                fill(files, mine, whole[mine.index], self.contents)
        self.read = (f"{parameter} {dtype}", experts), whole
        return whole

    def _pieces(self, parameter: str) -> list[Piece]:
        if not self.pieces:
            for piece in pieces(self.contents, keep=False):
                self.pieces.setdefault(piece.parameter, []).append(piece)
        return self.pieces[parameter]
