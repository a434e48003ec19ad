"""Hugging Face checkpoint folders in and out: strict, lossless, atomic.

    read_config(folder) -> ModelConfig            config.json alone; no torch
    read_summary(folder) -> CheckpointSummary     config.json and headers; no torch, no weights
    load(folder, device=, dtype=, mtp=) -> Transformer
    save(model, folder)
    interleave(model)                             rotary rows in the order that a save to DeepSeek's families needs
    convert.convert, convert.cut                  a checkpoint made of a checkpoint

Three packages, each of which imports only those before it:

    format     files, headers, config.json and names of tensors; no torch. `format.families` is the table of what is
               supported; everything else is the same for all families.
    reading    from a folder or the Hub into a model
    writing    from a model into a folder, atomically

What a configuration weighs is computed in `moe.planning.footprint`.
"""

from typing import TYPE_CHECKING

from moe.checkpoint.format.config_json import read_config
from moe.checkpoint.reading.summary import CheckpointSummary, read_summary
from moe.lazy import attributes

if TYPE_CHECKING:
    from moe.checkpoint.reading.load import load
    from moe.checkpoint.writing.rotary import interleave
    from moe.checkpoint.writing.save import save

__all__ = ["CheckpointSummary", "interleave", "load", "read_config", "read_summary", "save"]


# These need torch; `moesmith inspect` does not.
__getattr__ = attributes(
    globals(),
    {
        "load": "moe.checkpoint.reading.load",
        "interleave": "moe.checkpoint.writing.rotary",
        "save": "moe.checkpoint.writing.save",
    },
)
