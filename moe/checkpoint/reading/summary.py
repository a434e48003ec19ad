"""Summary of a checkpoint folder from config.json and headers, without reading weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from moe.checkpoint.format.contents import read_contents
from moe.checkpoint.format.families import FAMILIES
from moe.checkpoint.format.folder import INDEX, read_config_values, read_tensors
from moe.checkpoint.format.quantized_formats import read_quantization
from moe.checkpoint.reading.hub import CONFIGS, explain_cache_misses, find, headers_on_hub
from moe.config import ModelConfig
from moe.counts import count_parameters


@dataclass(frozen=True)
class DtypeTotals:
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """Summary of a checkpoint folder; for an unknown family, the fields from `config` to `ignored` are None or empty.

    Attributes:
        model_type: value in config.json.
        files: number of files that hold tensors.
        tensors, values, bytes: totals of the files.
        dtypes: safetensors name of a dtype -> its share of these totals.
        config: configuration, without MTP modules if the files hold none of their tensors.
        parameters: number of values in the files that fill the model, without repeated embeddings and heads.
        expected_parameters: the same, computed from `config`.
        missing, unexpected, misshaped: names of tensors in the files.
        unscaled: names of quantised tensors whose scales are missing.
        ignored: names of tensors that `moe.load` skips, such as rotary tables and MTP modules that config.json does not
            count.
        quantization: display name of the format, for example "modelopt NVFP4"; None if not quantised.
        loadable: whether `moe.load` supports that format.
    """

    folder: str
    model_type: Any
    files: int
    tensors: int
    values: int
    bytes: int
    dtypes: Mapping[str, DtypeTotals]
    config: ModelConfig | None = None
    parameters: int | None = None
    expected_parameters: int | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    quantization: str | None = None
    loadable: bool = True

    @property
    def agrees(self) -> bool:
        """Whether the files hold exactly the tensors that config.json requires, apart from ignored ones."""
        complete = self.config is not None and not (self.missing or self.unexpected or self.misshaped)
        return complete and self.parameters == self.expected_parameters


def read_summary(folder: str | PathLike[str], revision: str | None = None) -> CheckpointSummary:
    """Summarise a folder of safetensors files with a config.json, or a model on the Hub without downloading weights.

    `folder` and `revision` are those of `moe.load`. Raises `CheckpointError` for a malformed file, and for an invalid
    configuration of a known family; tensors that do not match the configuration are listed in the result.
    """
    path = find(folder, revision, files=(*CONFIGS, INDEX))
    with explain_cache_misses(folder, revision):
        values = read_config_values(path)
    headers = headers_on_hub(path, folder, revision)
    model_type, quantization = values.get("model_type"), read_quantization(path, values)
    is_known = isinstance(model_type, str) and model_type in FAMILIES
    known = read_contents(path, any_quantization=True, headers=headers) if is_known else None
    tensors = known.tensors if known else headers or read_tensors(path)
    dtypes: dict[str, DtypeTotals] = {}
    for tensor in tensors.values():
        so_far = dtypes.get(tensor.dtype, DtypeTotals(0, 0, 0))
        dtypes[tensor.dtype] = DtypeTotals(
            so_far.tensors + 1, so_far.values + tensor.numel, so_far.bytes + tensor.nbytes
        )
    fit: dict[str, Any] = {}
    if known:
        owned = {name: spec for name, spec in known.specs.items() if not spec.repeat and spec.scale_of is None}
        fit = dict(
            config=known.config,
            parameters=sum(t.numel * owned[name].values_each for name, t in tensors.items() if name in owned),
            expected_parameters=count_parameters(known.config).with_mtp,
            missing=known.missing,
            unexpected=known.unexpected,
            misshaped=known.misshaped,
            ignored=known.ignored,
            unscaled=tuple(owner for name in known.missing if (owner := known.specs[name].scale_of) in tensors),
        )
    return CheckpointSummary(
        folder=str(path),
        model_type=model_type,
        files=len({tensor.path for tensor in tensors.values()}),
        tensors=len(tensors),
        values=sum(totals.values for totals in dtypes.values()),
        bytes=sum(totals.bytes for totals in dtypes.values()),
        dtypes=dtypes,
        quantization=None if quantization is None else quantization.name,
        loadable=quantization is None or quantization.error is None,
        **fit,
    )
