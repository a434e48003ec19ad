"""Quantisation format of a checkpoint, from config.json or a file beside it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from moe.checkpoint.format.families import FAMILIES
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import CONFIG, MAX_CONFIG_BYTES, member
from moe.checkpoint.format.strict_json import parse_json
from moe.errors import CheckpointError

MAX_BLOCK = 2**16

# Read only if config.json states no format; file -> its method if it does not name one.
QUANTIZATION_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_MARKS = {"bits", "w_bit", "quant_method"}
_KEYS = ("quantization_config", "compression_config")
_SUPPORTED = "unquantised weights, FP8 in blocks or MXFP4"


@dataclass(frozen=True)
class Quantization:
    """The quantisation format of a folder.

    Attributes:
        method: "fp8" for matrices of F8_E4M3 with a scale per block of `block_size`, "mxfp4" for `family.MXFP4`, or the
            method of a format that cannot be loaded.
        block_size: rows and columns of an FP8 block, or None.
        raw: the object in the file; a save of the same bytes writes it back.
        name: display name of the format, for example "modelopt NVFP4".
        error: why the format cannot be loaded, or None.
    """

    method: str
    block_size: tuple[int, int] | None
    raw: Mapping[str, Any]
    name: str
    error: CheckpointError | None = None

    def check(self) -> None:
        """Raise `error` if there is one."""
        if self.error is not None:
            raise self.error


def read_quantization(folder: Path, values: Mapping[str, Any]) -> Quantization | None:
    """Return the format of the weights in `folder`, with the object `values` in config.json; None if not quantised.

    It is read from quantization_config or compression_config in config.json, at the top or in text_config, otherwise
    from hf_quant_config.json (modelopt), quantize_config.json (GPTQ) or quant_config.json (AWQ). Never raises: a
    format that is malformed or not supported is returned with its `error`.
    """
    for place, raw in _stated(values):
        return _parse(folder / CONFIG, place, "", raw, values.get("model_type"))
    for path, method, raw in _files(folder):
        if isinstance(raw, CheckpointError):
            return Quantization(method, None, {}, method, raw)
        found = _parse(path, "", method, raw, values.get("model_type"))
        if found is not None:
            return found
    return None


def check_quantization(values: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` if the format in `values`, for a config.json, is unsupported; `path` is for messages."""
    for place, raw in _stated(values):
        found = _parse(path, place, "", raw, values.get("model_type"))
        if found is not None:
            found.check()
        return


def _stated(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config.json that state a format, with their values."""
    for prefix, place in (("", values), ("text_config.", values.get("text_config"))):
        for key in _KEYS:
            if isinstance(place, dict) and place.get(key) is not None:
                yield prefix + key, place[key]


def _files(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """Yield the files beside config.json that state a format: path, default method, and content or error."""
    for name, method in QUANTIZATION_FILES.items():
        if not os.path.lexists(folder / name):
            continue
        try:
            raw = parse_json(read_bounded(member(folder, name), MAX_CONFIG_BYTES), folder / name)
        except CheckpointError as error:
            raw = error
        # The other two names are not reserved, so such a file must also have a typical key.
        if raw is not None and (method == "modelopt" or (isinstance(raw, dict) and raw.keys() & _MARKS)):
            yield folder / name, method, raw


def _parse(path: Path, key: str, method: str, raw: Any, model_type: Any) -> Quantization | None:
    name, values = method or "unknown", raw
    prefix = f"{key}." if key else ""

    def refused(problem: str, expected: str = _SUPPORTED, **found: Any) -> Quantization:
        error = CheckpointError(path, problem, expected=expected, **{k: repr(v)[:80] for k, v in found.items()})
        return Quantization(method, None, raw if isinstance(raw, dict) else {}, name, error)

    if method == "modelopt" and isinstance(raw, dict) and raw.get("quantization") is not None:
        raw = values = raw["quantization"]
        prefix, key = "quantization.", "quantization"
    if not isinstance(values, dict):
        return refused(f"invalid {key or 'JSON value'}", "an object or null", found=values)
    stated = values.get("quant_method")
    if stated is not None or not method:
        method = stated if isinstance(stated, str) else _unstated(values) if stated is None else ""
    if not method:
        return refused(f"invalid {prefix}quant_method", "fp8, mxfp4 or the name of another method", found=stated)
    if _holds_plain_weights(method, values):
        return None
    name = _name(method, values)
    what = f"{key}: {name} is not supported" if path.name == CONFIG else f"{name} is not supported"
    if method == "mxfp4":
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is not None and "mxfp4" not in family.tables:
            return refused(f"{what} for {model_type}", "unquantised weights or FP8 in blocks")
        return Quantization("mxfp4", None, raw, name)
    size = values.get("weight_block_size")
    if method != "fp8" or size is None:
        return refused(what)
    if not is_block_size(size):
        return refused(f"invalid {prefix}weight_block_size", f"two integers from 1 to {MAX_BLOCK}", found=size)
    for field, allowed, expected in (
        ("fmt", (None, "e4m3", "float8_e4m3fn"), "e4m3"),
        ("activation_scheme", (None, "dynamic"), "dynamic"),
        ("scale_fmt", (None, "float32", "ue8m0"), "ue8m0 or none"),
    ):
        if values.get(field) not in allowed:
            return refused(f"{prefix}{field} is not supported", expected, found=values[field])
    return Quantization("fp8", (size[0], size[1]), raw, name)


def _unstated(values: Mapping[str, Any]) -> str:
    """Return the method that other readers infer for an object without quant_method; "" if none."""
    if "quant_algo" in values:
        return "modelopt"
    bits = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
    return "bitsandbytes" if any(values.get(key) for key in bits) else ""


def _holds_plain_weights(method: str, raw: Mapping[str, Any]) -> bool:
    """Whether the weights are not quantised; the KV cache may be."""
    if method.startswith("modelopt"):
        return raw.get("quant_algo") in (None, "NO_QUANT") and not raw.get("quantized_layers")
    if method == "compressed-tensors":
        return not raw.get("config_groups") and not _sparsity(raw) and raw.get("format") in (None, "dense")
    return False


def _name(method: str, raw: Mapping[str, Any]) -> str:
    """Return the display name of a format. Values that are not words or numbers are left out."""
    match method:
        case "fp8":
            size = raw.get("weight_block_size")
            return f"FP8 in blocks of {size[0]} x {size[1]}" if _is_pair(size) else "FP8 without weight_block_size"
        case "mxfp4":
            return "MXFP4"
        case "compressed-tensors":
            return _join(method, raw.get("format"), *_weights(raw), _sparsity(raw))
        case "gptq" | "awq":
            group = raw.get("group_size", raw.get("q_group_size"))
            return _join(method.upper(), _bits(raw.get("bits", raw.get("w_bit"))), _groups(group))
        case "bitsandbytes":
            four = bool(raw.get("load_in_4bit") or raw.get("_load_in_4bit"))
            return _join(method, (raw.get("bnb_4bit_quant_type") or "INT4") if four else "INT8")
        case "fbgemm_fp8":
            return "fbgemm_fp8 FP8 with a scale per row"
        case "quark":
            whole = raw.get("global_quant_config")
            weight = whole.get("weight") if isinstance(whole, dict) else None
            return _join(method, weight.get("dtype") if isinstance(weight, dict) else None)
        case _ if method.startswith("modelopt"):
            return _join("modelopt", raw.get("quant_algo") or "MIXED_PRECISION")
        case _:
            return _join(_word(method) or repr(method)[:60], _bits(raw.get("bits")))


def _weights(raw: Mapping[str, Any]) -> list[str]:
    """Return the distinct kinds of weights in compressed-tensors' config_groups."""
    groups = raw.get("config_groups")
    kinds: list[str] = []
    for group in list(groups.values())[:8] if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            kind = {"int": "INT", "float": "FP"}.get(str(weights.get("type")), "")
            text = _join(f"{kind}{_word(weights.get('num_bits'))}", _groups(weights.get("group_size")))
            kinds += [text] if text not in kinds else []
    return kinds


def _sparsity(raw: Mapping[str, Any]) -> str | None:
    sparsity = raw.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, dict) else None
    return _word(form) if form not in (None, "dense") else None


def _bits(count: Any) -> str | None:
    return f"INT{count}" if type(count) is int else None


def _groups(size: Any) -> str | None:
    return f"in groups of {size}" if type(size) is int and size > 0 else None


def is_block_size(size: Any) -> bool:
    """Whether `size` is a pair of valid block sizes."""
    pair = isinstance(size, list | tuple) and len(size) == 2
    return pair and all(type(n) is int and 1 <= n <= MAX_BLOCK for n in size)


def _is_pair(size: Any) -> TypeGuard[list[Any]]:
    return isinstance(size, list) and len(size) == 2


def _word(value: Any) -> str:
    is_word = (isinstance(value, str) and value.isprintable()) or type(value) is int
    return str(value)[:60] if is_word else ""


def _join(*parts: Any) -> str:
    return " ".join(word for part in parts if (word := _word(part)))
