"""How the weights of a quantised checkpoint are stored, as config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import CheckpointError

MAX_BLOCK = 2**16


@dataclass(frozen=True)
class Quantization:
    """method "fp8": matrices of F8_E4M3 with an F32 scale for each block of `block_size`; "mxfp4": `families.MXFP4`.

    `raw` is the object in config.json, which a save of the same bytes writes again.
    """

    method: str
    block_size: tuple[int, int] | None
    raw: Mapping[str, Any]


def parse_quantization(values: Mapping[str, Any], path: Path) -> Quantization | None:
    """From the object of a config.json; None if its weights are not quantised. `path` is for messages."""
    if values.get("compression_config") is not None:
        raise CheckpointError(path, "compression_config: not supported", expected="null, or quantization_config")
    raw = values.get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise CheckpointError(path, "quantization_config", expected="an object or null", found=type(raw).__name__)

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            found = repr(raw.get(key))[:80]
            raise CheckpointError(path, f"quantization_config.{key}", expected=expected, found=found)

    method = raw.get("quant_method")
    check("quant_method", method in ("fp8", "mxfp4"), "fp8 or mxfp4")
    if method == "mxfp4":
        return Quantization("mxfp4", None, raw)
    size = raw.get("weight_block_size")
    is_size = isinstance(size, list) and len(size) == 2 and all(type(n) is int and 1 <= n <= MAX_BLOCK for n in size)
    check("weight_block_size", is_size, f"two sizes from 1 to {MAX_BLOCK}; FP8 is read in blocks")
    check("fmt", raw.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn"), "e4m3")
    check("activation_scheme", raw.get("activation_scheme", "dynamic") == "dynamic", "dynamic")
    check("scale_fmt", raw.get("scale_fmt") in (None, "float32", "ue8m0"), "ue8m0 or none")
    assert isinstance(size, list)
    return Quantization("fp8", (size[0], size[1]), raw)
