"""Reading and writing of Hugging Face checkpoint folders: strict, lossless and atomic.

    read_config(folder) -> ModelConfig            config.json alone; no torch
    read_summary(folder) -> CheckpointSummary     config.json and headers; no torch, no weights
    load(folder, device=, dtype=, mtp=) -> Transformer
    save(model, folder)
    interleave(model)                             reorder rotary rows, which DeepSeek's families require
    convert.convert, convert.cut                  derive a checkpoint from another one
    chat.ChatTemplate                             messages as the text that a model was trained on

Three packages, each of which imports only those before it:

    format     files, headers, config.json and tensor names; no torch. `format.families` defines the supported
               families; all other code is common to them.
    reading    from a folder or the Hub into a model
    writing    from a model into a folder, atomically
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
