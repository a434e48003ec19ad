"""Models that commands accept: presets, folders, runs of `moesmith train`, and names on the Hugging Face Hub."""

from moe.checkpoint.format.folder import NO_FOLDER
from moe.errors import CheckpointError, ConfigError, did_you_mean
from moe.presets import PRESETS

_FOLDER = (
    "heckpoint folder, run folder of `moesmith train`, or Hugging Face Hub name (ORG/MODEL or ORG/MODEL@REVISION)."
)
FOLDER = f"C{_FOLDER}"
MODEL = f"Preset (tiny, deepseek_v3, ...), c{_FOLDER} Write ./tiny for a folder that has a preset's name."


def unknown(error: CheckpointError, model: str, argument: str) -> CheckpointError | ConfigError:
    """The error to raise for `error`; it also lists the presets if `model` was not found."""
    if not error.problem.startswith(NO_FOLDER):
        return error
    wanted = "" if error.expected is None else f"; expected {error.expected}"
    presets = f"one of the presets {', '.join(PRESETS)}{did_you_mean(model, PRESETS)}"
    return ConfigError(argument, model, f"a folder ({error.problem}{wanted}), or {presets}")
