"""Model configuration of a training run: a preset, file or checkpoint, with changes of single fields."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.checkpoint.format.config_json import parse_config, read_config
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import CONFIG, MAX_CONFIG_BYTES
from moe.checkpoint.format.strict_json import parse_json
from moe.checkpoint.reading.hub import find
from moe.config import ModelConfig, RopeParameters
from moe.errors import CheckpointError, ConfigError, did_you_mean
from moe.presets import preset
from moe.train.settings import DEFAULT_PRESET, RunSettings

# Keys that occur only in Hugging Face's files.
_HUGGING_FACE = ("architectures", "transformers_version")


def read_architecture(settings: RunSettings) -> ModelConfig:
    """Return the configuration given by --preset, --config or --init, with the changes of --set.

    Raises:
        ConfigError: an unknown preset or field, or an invalid configuration.
        CheckpointError: a file or folder that cannot be read.
    """
    if settings.init is not None:
        return read_config(find(settings.init, files=(CONFIG,)))
    config = preset(settings.preset or DEFAULT_PRESET) if settings.config is None else _read(settings.config)
    return apply_changes(config, settings.set)


def _read(path: Path) -> ModelConfig:
    """Read a config.json, the one in a folder, or a JSON object with fields of `ModelConfig`."""
    if path.is_dir():
        path = path / CONFIG
    values = parse_json(read_bounded(path, MAX_CONFIG_BYTES), path)
    if not isinstance(values, dict):
        raise CheckpointError(path, "not a configuration", expected="a JSON object", found=type(values).__name__)
    if path.name == CONFIG or any(key in values for key in _HUGGING_FACE):
        config = parse_config(values, path)
        # A new model uses neither the tokenizer nor the code of that checkpoint.
        extra = {k: v for k, v in config.extra.items() if k != "auto_map" and not k.endswith("_token_id")}
        return dataclasses.replace(config, extra=extra)
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error


def apply_changes(config: ModelConfig, changes: Sequence[str]) -> ModelConfig:
    """Apply each FIELD=VALUE of `changes` to `config` and validate the result. VALUE is JSON, otherwise a string.

    FIELD may be nested, such as rope_parameters.rope_theta.
    """
    values: dict[str, Any] = {}
    rope: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        outer, dot, inner = name.partition(".")
        known: Mapping[str, Any] = {f.name: f for f in dataclasses.fields(ModelConfig)}
        if dot and outer == "rope_parameters":
            known = {f"{outer}.{f.name}": f for f in dataclasses.fields(RopeParameters)}
        if not equals or name not in known:
            hint = did_you_mean(name, known) if equals else ""
            raise ConfigError("--set", change, f"FIELD=VALUE with a field of ModelConfig{hint}")
        target, key = (rope, inner) if dot else (values, name)
        if key in target:
            raise ConfigError("--set", change, f"{name} only once; found another value, {target[key]!r}")
        try:
            target[key] = json.loads(text)
        except ValueError:
            target[key] = text
    before = config.to_dict()
    if rope:
        values["rope_parameters"] = before["rope_parameters"] | rope
    try:
        return ModelConfig.from_dict(before | values)
    except ConfigError as error:
        raise ConfigError(f"--set {error.field}", error.value, error.allowed) from None
