"""Names of the dtypes of weights, for the command line and the library. Needs no torch."""

from typing import Any, Literal

from moe.errors import ConfigError, did_you_mean

Dtype = Literal["bf16", "fp16", "fp32", "fp64", "fp8", "mxfp4"]

# Name -> safetensors' name; for fp8 and mxfp4, that of the quantised tensors.
SAFETENSORS: dict[str, str] = {
    "bf16": "BF16",
    "fp16": "F16",
    "fp32": "F32",
    "fp64": "F64",
    "fp8": "F8_E4M3",
    "mxfp4": "U8",
}
FLOATING = ("bf16", "fp16", "fp32", "fp64")

# Other accepted spellings: torch's dtypes as text, and safetensors' names.
ALIASES: dict[str, str] = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.float64": "fp64",
    "torch.float8_e4m3fn": "fp8",
    **{name.lower(): dtype for dtype, name in SAFETENSORS.items() if dtype != "mxfp4"},
}


def parse_dtype(value: Any, field: str, allowed: tuple[str, ...]) -> str:
    """Return the name in `allowed` for `value`: that name, a torch dtype, or safetensors' name, in any case.

    Raises ConfigError about `field` for anything else.
    """
    text = str(value).lower()
    name = ALIASES.get(text, text)
    if name not in allowed:
        hint = "" if name in SAFETENSORS else did_you_mean(text.removeprefix("torch."), allowed)
        raise ConfigError(field, value, f"one of {', '.join(allowed)}{hint}")
    return name
