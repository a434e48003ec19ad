"""Contents of a checkpoint folder: its tensors, compared with those that its configuration requires."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from moe.checkpoint.format.config_json import parse_config
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.family import MXFP4, Family, Reordered, Row, Table
from moe.checkpoint.format.folder import CONFIG, locate, read_config_values, read_tensors
from moe.checkpoint.format.header import MAX_HEADER_BYTES, TensorInfo
from moe.checkpoint.format.layout import TensorSpec, layer_of, layout, mtp_prefix, with_scales
from moe.checkpoint.format.quantized_formats import Quantization, read_quantization
from moe.checkpoint.format.tensor_roles import check_experts
from moe.config import ModelConfig
from moe.errors import CheckpointError

logger = logging.getLogger("moe")

WITHOUT_MTP = "; mtp=False (--no-mtp) leaves multi-token prediction out"


@dataclass(frozen=True)
class Contents:
    """Tensors and configuration of a checkpoint folder, from config.json and headers.

    Attributes:
        config: configuration, without MTP modules if the files hold none of their tensors or the caller excludes them.
        table: name of the files' layout in the family.
        quantization: quantisation format of the files, or None.
        dtype: dtype of the weights that config.json states, or None.
        tensors: all tensors in the files, by name.
        specs: tensors that the configuration requires, by name.
        missing, unexpected, misshaped: names of tensors that differ; repeats are never missing.
        ignored: names of tensors that are not read: buffers, parts that the model does not have, and MTP modules that
            `config` does not have.
    """

    folder: Path
    config: ModelConfig
    table: str
    quantization: Quantization | None
    dtype: str | None
    tensors: dict[str, TensorInfo]
    specs: dict[str, TensorSpec]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def has_quantised_tensors(self) -> bool:
        """Whether the files hold any; tools that dequantise may leave quantization_config in config.json."""
        return any(spec.scale_of in self.tensors for name, spec in self.specs.items() if name in self.tensors)

    def check(self) -> None:
        """Raise `CheckpointError` for the first tensor that is missing, unexpected or mis-shaped, MTP modules last."""
        found = [
            (name, problem, names)
            for names, problem in (
                (self.missing, "missing"),
                (self.unexpected, "unexpected"),
                (self.misshaped, "wrong shape"),
            )
            for name in names
        ]
        for name, problem, names in sorted(found, key=lambda one: self.is_mtp(one[0])):
            info = self.tensors.get(name)
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise self.error(
                name,
                problem + more,
                expected=list(self.specs[name].shape) if name in self.specs else "no such tensor",
                found=list(info.shape) if info else "no such tensor",
            )

    def error(self, name: str, problem: str, *, expected: Any, found: Any = None) -> CheckpointError:
        """Return an error about a tensor, with advice if it belongs to an MTP module."""
        if self.is_mtp(name):
            problem += WITHOUT_MTP
        path = self.tensors[name].path if name in self.tensors else self.folder
        return CheckpointError(path, problem, tensor=name, expected=expected, found=found)

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor belongs to one of the MTP modules of `config`."""
        table = family_of(self.config.model_type, self.folder).tables[self.table]
        first = self.config.num_hidden_layers
        return first <= layer_of(table, name)[0] < first + self.config.num_nextn_predict_layers


def read_contents(
    folder: str | PathLike[str],
    *,
    mtp: bool = True,
    max_header_bytes: int = MAX_HEADER_BYTES,
    any_quantization: bool = False,
    headers: dict[str, TensorInfo] | None = None,
) -> Contents:
    """Read config.json and the headers of `folder`, and compare them.

    Args:
        mtp: False removes the MTP modules from the configuration and ignores their tensors.
        any_quantization: accept quantisation formats that cannot be loaded; otherwise they raise `CheckpointError`.
        headers: the tensors of the files, if their headers have been read before.
    """
    path = locate(folder)
    values = read_config_values(path)
    family = family_of(values.get("model_type"), path / CONFIG)
    of_model = family.language_model(values)
    stated = _stated_modules(family, of_model)
    if not mtp and "num_nextn_predict_layers" in family.keys:
        of_model |= {family.keys_of("num_nextn_predict_layers")[0]: 0}
    config = parse_config(values, path / CONFIG)
    quantization = read_quantization(path, values)
    if quantization is not None and not any_quantization:
        quantization.check()
    tensors = _read_tensors(path, family, config, max_header_bytes) if headers is None else headers
    table = _table_of(family, tensors)
    names = family.tables[table]
    config = _with_mtp_of_files(names, config, tensors)
    left_out = [name for name in tensors if name.startswith(family.left_out)]
    if left_out:
        problem = "%s: %d tensors of parts that the model does not have are ignored, such as %s"
        logger.warning(problem, path, len(left_out), left_out[0])
    if "{expert}" in str(names.block.get("mlp.experts.down_proj")):
        modules = config.num_moe_layers + config.num_nextn_predict_layers
        check_experts(config.n_routed_experts * modules, tensors, path / CONFIG)
    specs = layout(config, table, path / CONFIG)
    if quantization is not None and quantization.block_size is not None:
        fp8 = (n for n, info in tensors.items() if info.dtype == "F8_E4M3" and n in specs and len(specs[n].shape) == 2)
        specs = with_scales(specs, names, quantization.block_size, fp8)
    buffers, modules = _ignored(family, names, config, stated, [name for name in tensors if name not in specs])
    ignored = {*buffers, *modules, *left_out}
    scales = [name for name in buffers if name.endswith("_scale")]
    tables = [name for name in buffers if name not in scales]
    for what, skipped in (
        ("buffers, which the model computes itself,", tables),
        ("scales of a quantised KV cache, which the model does not have,", scales),
    ):
        if skipped:
            logger.warning("%s: %d %s are ignored, such as %s", path, len(skipped), what, skipped[0])
    if modules and mtp:
        count = config.num_nextn_predict_layers
        problem = "%s: num_nextn_predict_layers is %d; %d tensors of other MTP modules are ignored, such as %s"
        logger.warning(problem, path, count, len(modules), modules[0])
    return Contents(
        folder=path,
        config=config,
        table=table,
        quantization=quantization,
        dtype=stated_dtype(values) or stated_dtype(of_model),
        tensors=tensors,
        specs=specs,
        missing=tuple(name for name, spec in specs.items() if name not in tensors and _is_needed(spec, tensors)),
        # An empty tensor is harmless: transformers writes shared experts of width 0.
        unexpected=tuple(n for n, info in tensors.items() if n not in specs and n not in ignored and info.numel),
        misshaped=tuple(name for name in tensors if name in specs and tensors[name].shape != specs[name].shape),
        ignored=(*buffers, *modules, *left_out),
    )


def stated_dtype(values: Mapping[str, Any]) -> str | None:
    """Return the dtype of weights that an object of config.json states, by torch's name; None if it states none."""
    stated = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    return stated if stated in ("bfloat16", "float16", "float32", "float64") else None


def _read_tensors(path: Path, family: Family, config: ModelConfig, max_header_bytes: int) -> dict[str, TensorInfo]:
    """Call `read_tensors`; an error advises mtp=False if the files can be read without MTP modules."""

    def read(config: ModelConfig) -> dict[str, TensorInfo]:
        return read_tensors(path, max_header_bytes=max_header_bytes, optional=_may_be_ignored(family, config))

    try:
        return read(config)
    except CheckpointError as error:
        if not config.num_nextn_predict_layers:
            raise
        try:
            read(dataclasses.replace(config, num_nextn_predict_layers=0))
        except CheckpointError:
            raise error from None
        raise CheckpointError(
            error.path, error.problem + WITHOUT_MTP, tensor=error.tensor, expected=error.expected, found=error.found
        ) from None


def _stated_modules(family: Family, values: Mapping[str, Any]) -> int:
    """Return the number of MTP modules in config.json; 0 if the value is not a valid count."""
    name = "num_nextn_predict_layers"
    stated = values.get(name, family.defaults.get(name)) if name in family.keys else 0
    return stated if type(stated) is int and 0 < stated < 2**16 else 0


def _may_be_ignored(family: Family, config: ModelConfig) -> Callable[[str], bool]:
    """Return a test of names: whether a tensor is a buffer, left out, or in a layer after those of `config`."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    buffers = _buffers(family, layers)
    tables = [table for table in family.tables.values() if table.mtp]

    def may_be_ignored(name: str) -> bool:
        skipped = name in buffers or name.startswith(family.left_out)
        return skipped or any(layer_of(table, name)[0] >= layers for table in tables)

    return may_be_ignored


def _buffers(family: Family, layers: int) -> set[str]:
    return {name.format(layer=layer) for name in family.buffers for layer in range(layers)}


def _ignored(
    family: Family, table: Table, config: ModelConfig, stated: int, surplus: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Return the names in `surplus` of buffers, and of tensors in MTP modules that `config` does not have.

    A layer after the others is an MTP module if config.json counts it as one, or if it holds tensors that only MTP
    modules have. Otherwise a num_hidden_layers that is too small would truncate a model silently.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    known = _buffers(family, layers)
    buffers = [name for name in surplus if name in known]
    after: dict[int, list[str]] = {}
    for name in surplus:
        if table.mtp and (layer := layer_of(table, name)[0]) >= layers:
            after.setdefault(layer, []).append(name)
    marks = {*table.mtp.values(), *table.mtp_repeats.values()}
    end = config.num_hidden_layers + stated
    modules = [
        name
        for layer, names in after.items()
        if layer < end or any(layer_of(table, name)[1] in marks for name in names)
        for name in names
    ]
    return buffers, modules


def _is_needed(spec: TensorSpec, tensors: Mapping[str, TensorInfo]) -> bool:
    return not spec.repeat or spec.scale_of in tensors


def _table_of(family: Family, tensors: Mapping[str, TensorInfo]) -> str:
    """Return the layout that has most of the files' kinds of names, so that a damaged checkpoint has a layout, too."""
    found = {_NUMBER.sub("#", name) for name in tensors}
    return max(family.tables, key=lambda name: len(found & _kinds(family.tables[name])))


_NUMBER = re.compile(r"\d+", re.ASCII)


def _kinds(table: Table) -> set[str]:
    """Return the names of a layout, with "#" for every number."""
    kinds: set[str] = set()
    for prefix, names in (("", table.top), (table.layer_prefix, table.block), (table.layer_prefix, table.mtp)):
        for entry in names.values():
            match entry:
                case MXFP4():
                    found = (entry.name + "_blocks", entry.name + "_scales")
                case Reordered() | Row():
                    found = (entry.name,)
                case str():
                    found = (entry,)
                case _:
                    found = entry
            kinds |= {_NUMBER.sub("#", (prefix + name).format(layer="#", expert="#")) for name in found}
    return kinds


def _with_mtp_of_files(table: Table, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    """Remove the MTP modules if the files hold none: transformers writes num_nextn_predict_layers: 1 without them."""
    modules = config.num_nextn_predict_layers
    if not modules:
        return config
    prefixes = tuple(mtp_prefix(table, config, k) for k in range(modules))
    if any(name.startswith(prefixes) for name in tensors):
        return config
    logger.warning(
        "config.json has num_nextn_predict_layers %d, but the files hold no MTP modules: none are loaded", modules
    )
    return dataclasses.replace(config, num_nextn_predict_layers=0)
