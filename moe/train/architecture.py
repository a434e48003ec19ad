"""The model that a run trains: a preset, a configuration file or a checkpoint, and changes of single fields."""

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
from moe.train.settings import DEFAULT_PRESET, Settings

# Keys that only Hugging Face's files have.
_HUGGING_FACE = ("architectures", "transformers_version")


def read_architecture(settings: Settings) -> ModelConfig:
    """The configuration that --preset, --config or --init names, with the fields that --set changes.

    Raises:
        ConfigError: an unknown preset or field, or a configuration that makes no sense.
        CheckpointError: a file or folder that cannot be read.
    """
    if settings.init is not None:
        return read_config(find(settings.init, files=(CONFIG,)))
    config = preset(settings.preset or DEFAULT_PRESET) if settings.config is None else _read(settings.config)
    return changed(config, settings.set)


def check_experts(config: ModelConfig) -> None:
    """Raise ConfigError for a model without a layer that has experts."""
    if not config.num_moe_layers + config.num_nextn_predict_layers:
        layers = config.num_hidden_layers
        raise ConfigError("num_hidden_layers", layers, "a layer with experts; all are dense in this configuration")


def _read(path: Path) -> ModelConfig:
    """A config.json, that of a folder, or a JSON object of the fields of `ModelConfig`."""
    if path.is_dir():
        path = path / CONFIG
    values = parse_json(read_bounded(path, MAX_CONFIG_BYTES), path)
    if not isinstance(values, dict):
        raise CheckpointError(path, "not a configuration", expected="a JSON object", found=type(values).__name__)
    if path.name == CONFIG or any(key in values for key in _HUGGING_FACE):
        config = parse_config(values, path)
        # A new model has neither the tokenizer nor the code beside that file.
        extra = {k: v for k, v in config.extra.items() if k != "auto_map" and not k.endswith("_token_id")}
        return dataclasses.replace(config, extra=extra)
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error


def changed(config: ModelConfig, changes: Sequence[str]) -> ModelConfig:
    """`config` with each FIELD=VALUE of `changes`; a value is JSON, or else a string. All are checked together.

    FIELD may be that of an object in a field, such as rope_parameters.rope_theta.
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
            raise ConfigError("--set", change, f"{name} once; found {target[key]!r} before")
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
        raise ConfigError("--set", " ".join(changes), f"a configuration that makes sense; {error}") from None
