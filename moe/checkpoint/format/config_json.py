"""config.json <-> `ModelConfig`. Unknown keys are kept; values that would be misread are refused."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from moe.checkpoint.format.families import FAMILIES, family_of
from moe.checkpoint.format.family import Family, setting
from moe.checkpoint.format.folder import CONFIG, locate, read_config_values
from moe.checkpoint.format.strict_json import ambiguity, last_values
from moe.config import EXPERT_FIELDS, ModelConfig, RopeParameters
from moe.errors import CheckpointError, ConfigError

logger = logging.getLogger("moe")

# Keys that describe the files and not the model; a save writes its own.
STORAGE_KEYS = ("architectures", "dtype", "torch_dtype", "quantization_config", "compression_config")

# Keys that determine RoPE in every family.
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings", "rotary_dim")
_ROPE_KEYS += ("partial_rotary_factor", "head_dim", "max_position_embeddings")

# Meaning of null, where it is not None.
_NULL = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0, "mlp_only_layers": (), "aux_loss_alpha": 0.0}
_NULL |= {"num_nextn_predict_layers": 0}

# Fields for which null means that the key is absent: they have no None.
_NULL_IS_ABSENT = ("scoring_func", "topk_method")


def read_config(folder: str | PathLike[str]) -> ModelConfig:
    """Return the configuration in the folder's config.json, with the MTP modules it states. Opens no other file."""
    path = locate(folder)
    return parse_config(read_config_values(path), path / CONFIG)


def parse_config(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """Convert the object of a config.json to a `ModelConfig`; `path` is for messages.

    `extra` holds every key without a field, and every key in a form that `render_config` would not write, such as an
    older form of RoPE. Unused keys may hold what only Python's parser accepts: the last of two values counts, and one
    with NaN or Infinity is left out with a warning, because strict JSON cannot hold it.
    """
    values = _language_model(values, path)
    family = family_of(values["model_type"], path)
    read = {*_keys_read(family), "quantization_config", "compression_config"}
    for key, value in values.items():
        if key in read and (found := ambiguity(value)) is not None:
            raise CheckpointError(path, f"{key} is ambiguous", expected="one value, and finite numbers", found=found)
    config = _parse_fields(values, path)
    plain = _render(config)
    extra: dict[str, Any] = {}
    for key, value in values.items():
        if key in STORAGE_KEYS or key in family.left_out_keys or (key in plain and plain[key] == value):
            continue
        extra[key] = last_values(value)
        if (found := ambiguity(extra[key])) is not None:
            logger.warning("%s: %s is left out, because it contains %s", path, key, found)
            del extra[key]
    return dataclasses.replace(config, extra=extra)


def _language_model(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Return the language model's object of a multimodal config.json, with the keys that apply to both."""
    family = family_of(values.get("model_type"), path)
    if family.text is None:
        return values
    inner = values.get(family.text)
    if not isinstance(inner, dict):
        raise CheckpointError(path, f"invalid {family.text}", expected="an object", found=repr(inner)[:80])
    if inner.get("model_type") not in (None, *family.text_types):
        problem, expected = f"unknown {family.text}.model_type", " or ".join(family.text_types)
        raise CheckpointError(path, problem, expected=expected, found=repr(inner["model_type"])[:80])
    outside = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**inner, **{key: values[key] for key in outside if key in values}, "model_type": family.model_type}


def _keys_read(family: Family) -> set[str]:
    """Return the keys of config.json that determine what a model of `family` computes."""
    keys = {key for name in family.keys for key in family.keys_of(name)}
    return keys.union(family.fixed, family.derived, _ROPE_KEYS, *(form.keys for form in family.conversions))


def as_written(config: ModelConfig, path: Path) -> ModelConfig:
    """Return the config in the family whose files a save writes; `path` is for messages."""
    written_as = family_of(config.model_type, path).written_as
    return dataclasses.replace(config, model_type=written_as) if written_as else config


def render_config(config: ModelConfig, path: Path) -> dict[str, Any]:
    """Return the object for config.json, without `STORAGE_KEYS`; `path` is for messages.

    RoPE is also written in the older form, because readers that do not know the newer one would silently use their
    defaults. A key from `extra` is written as it was read if the result still means `config` and every engine reads
    that form alike. Raises CheckpointError for the first of `family_problems`.
    """
    config = as_written(config, path)
    family = family_of(config.model_type, path)
    for problem in _problems(config, family, path):
        raise problem
    values, wanted = _render(config), _canonical(config)
    ours = {key for name in family.keys for key in family.keys_of(name)} | {
        k for form in family.conversions for k in form.keys
    }
    own = {*family.own, *(key for key, harmless in family.fixed.items() if harmless[0] is not None)}
    known = {*_keys_read(family), "model_type"}
    for key, value in config.extra.items():
        if key in STORAGE_KEYS or key in own:
            continue
        if key not in known:
            values[key] = value
            continue
        candidate = {**values, key: value}
        if key in family.derived:
            candidate[key] = family.derived[key](config)
        try:
            agrees = _canonical(_parse_fields(candidate, path)) == wanted
        except CheckpointError:
            if key not in values and key not in ours:
                raise
            agrees = False  # the field has changed since the key was read
        if agrees:
            values = candidate
    return values


def family_problems(config: ModelConfig) -> tuple[str, ...]:
    """List why files of the config's family cannot express it, one line each; see `ModelConfig.family_problems`."""
    path = Path(CONFIG)
    if config.model_type not in FAMILIES:
        return (f"unknown model_type; expected one of {', '.join(FAMILIES)}; found {config.model_type}",)
    config = as_written(config, path)
    family = FAMILIES[config.model_type]
    found: list[Exception] = list(_problems(config, family, path))
    if not found:
        try:
            json.dumps(render_config(config, path), allow_nan=False)
        except CheckpointError as error:
            found = [error]
        except (TypeError, ValueError) as error:
            found = [ValueError(f"extra: not JSON: {error}")]
    return tuple(str(error).removeprefix(f"{path}: ") for error in found)


def _problems(config: ModelConfig, family: Family, path: Path) -> Iterator[CheckpointError]:
    """Yield an error for each setting that the family's files cannot express or an engine would misread."""
    plain = _normalized(config, family)
    if error := _wrong_experts(config, family, path):
        yield error
        return
    for rule in family.rules:
        if not rule.holds(plain):
            found = setting(plain, rule.field)
            yield CheckpointError(path, f"{rule.field}: {rule.reason}", expected=rule.expected, found=str(found))
    try:
        read_back = _canonical(_parse_fields(_render(config), path))
    except CheckpointError as error:
        yield error
        return
    wanted = _canonical(config)
    for f in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(wanted, f.name), getattr(read_back, f.name)
        if ours != theirs:
            name = f.name if f.name != "mlp_only_layers" else _name_of_dense_layers(plain, family)
            problem = f"{name}: {config.model_type} cannot express it"
            yield CheckpointError(path, problem, expected=str(theirs), found=str(ours))


def _wrong_experts(config: ModelConfig, family: Family, path: Path) -> CheckpointError | None:
    """Return an error if the family has experts and the model has none, or the reverse."""
    name, found = "n_routed_experts", config.n_routed_experts
    if name in family.keys and not found:
        problem = f"{family.keys_of(name)[0]}: {family.model_type} is a family with experts"
        return CheckpointError(path, problem, expected="1 or more", found=0)
    if name not in family.keys and config.has_experts:
        problem = f"{name}: {family.model_type} is a family without experts"
        return CheckpointError(path, problem, expected=0, found=found)
    return None


# Fields that determine which layers are dense, with their neutral values.
_LAYERS = {"first_k_dense_replace": 0, "mlp_only_layers": (), "decoder_sparse_step": 1}


def _name_of_dense_layers(config: ModelConfig, family: Family) -> str:
    used = [name for name, neutral in _LAYERS.items() if getattr(config, name) != neutral]
    return next((name for name in used if name not in family.keys), "mlp_only_layers")


def _dense_layers(config: ModelConfig) -> tuple[int, ...]:
    return tuple(i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i))


def _normalized(config: ModelConfig, family: Family) -> ModelConfig:
    """Return an equivalent config, in the form in which the family's files express it."""
    layers = config.num_hidden_layers
    dense = _dense_layers(config)
    leading = next((i for i, layer in enumerate(dense) if i != layer), len(dense))
    ways: tuple[dict[str, Any], ...] = (
        {},
        *({name: getattr(config, name)} for name in _LAYERS),
        {"first_k_dense_replace": leading},
    )
    for way in ways:
        same = dataclasses.replace(config, **{**_LAYERS, **way})
        if family.keys.keys() >= way.keys() and _dense_layers(same) == dense:
            config = same
            break

    changes: dict[str, Any] = {}
    if not any(config.is_sliding_layer(i) for i in range(layers)):
        changes |= {"sliding_window": None, "layer_types": None}
    if config.rope_parameters.rope_type == "default":
        rope = config.rope_parameters
        changes["rope_parameters"] = RopeParameters(
            rope_theta=rope.rope_theta, partial_rotary_factor=rope.partial_rotary_factor
        )
    else:
        changes["rope_parameters"] = _without_idle_factor(config.rope_parameters)
    if config.rope_dim == 2:  # one pair
        changes["rope_interleave"] = config.is_mla
    if not dense and family.keys["intermediate_size"] == family.keys.get("moe_intermediate_size"):
        changes["intermediate_size"] = config.moe_intermediate_size
    if config.topk_group == config.n_group and "n_group" not in family.keys:
        changes |= {"n_group": 1, "topk_group": 1}
        if config.topk_method == "group_limited_greedy":
            changes["topk_method"] = "greedy"
    if config.shared_width:
        changes |= {"n_shared_experts": 1, "shared_expert_intermediate_size": config.shared_width}
        count, rest = divmod(config.shared_width, config.moe_intermediate_size)
        if "shared_expert_intermediate_size" not in family.keys and not rest and count <= 1024:
            changes |= {"n_shared_experts": count, "shared_expert_intermediate_size": None}
    if not config.norm_topk_prob:
        changes["moe_norm_min"] = _usual("moe_norm_min", config, family)
    if len(dense) == layers and not config.num_nextn_predict_layers:
        changes |= {name: _usual(name, config, family) for name in _OF_EXPERTS}
        if changes["topk_method"] != config.topk_method:
            changes |= {"n_group": 1, "topk_group": 1}
    if not config.has_experts and "n_routed_experts" not in family.keys:
        neutral = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
        changes |= _LAYERS | {name: neutral[name] for name in (*EXPERT_FIELDS, "mtp_loss_weight")}
    return dataclasses.replace(config, **changes)


def _without_idle_factor(rope: RopeParameters) -> RopeParameters:
    """Remove an attention factor of 1 if it equals the quotient of mscale and mscale_all_dim."""
    idle = rope.attention_factor == 1 and bool(rope.mscale) and rope.mscale == rope.mscale_all_dim
    return dataclasses.replace(rope, attention_factor=None) if idle else rope


# Fields without effect in a model without experts.
_OF_EXPERTS = (
    *("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor", "router_bias", "expert_bias"),
    *("swiglu_limit", "swiglu_alpha", "swiglu_beta", "aux_loss_alpha", "router_z_loss_coef"),
    "moe_norm_min",
)


def _usual(name: str, config: ModelConfig, family: Family) -> Any:
    """Return a value for a field without effect: the config's, if the family's files can express it."""
    value = getattr(config, name)
    if name in family.keys:
        allowed = family.allowed.get(name, (value,))
        return value if value in allowed else allowed[0]
    default = next(f.default for f in dataclasses.fields(ModelConfig) if f.name == name)
    return family.implied.get(name, default)


def _canonical(config: ModelConfig) -> ModelConfig:
    """Return a form that is equal for two configs that differ only in spelling or in fields without effect."""
    config = _normalized(config, family_of(config.model_type, CONFIG))
    heads = None if config.is_mla else config.num_key_value_heads or config.num_attention_heads
    types = tuple(config.is_sliding_layer(i) for i in range(config.num_hidden_layers))
    return dataclasses.replace(
        config,
        num_key_value_heads=heads,
        head_dim=None if config.is_mla else config.qk_head_dim,
        attention_output_bias=config.output_bias,
        **{**_LAYERS, "mlp_only_layers": _dense_layers(config)},
        layer_types=tuple("sliding_attention" if s else "full_attention" for s in types) if any(types) else None,
        extra={},
    )


def _parse_fields(values: Mapping[str, Any], path: Path) -> ModelConfig:
    family = family_of(values.get("model_type"), path)
    for key, harmless in family.fixed.items():
        if key in values and not _is_one_of(values[key], harmless):
            raise CheckpointError(path, f"{key} is not supported", expected=harmless[0], found=repr(values[key])[:80])
    fields: dict[str, Any] = {"model_type": family.model_type, **family.implied}
    for name in family.keys:
        given = {key: values[key] for key in family.keys_of(name) if key in values}
        key = next(iter(given), family.keys_of(name)[0])
        if len({repr(value) for value in given.values()}) > 1:
            raise CheckpointError(path, f"{' and '.join(given)} disagree", found=repr(given)[:80])
        if name in family.required and given.get(key) is None:
            found = "null" if given else "no such key"
            raise CheckpointError(path, f"{key}: {family.model_type} requires a value", found=found)
        if given and not (given[key] is None and name in _NULL_IS_ABSENT):
            fields[name] = _NULL.get(name) if given[key] is None else given[key]
        elif name in family.defaults:
            fields[name] = family.defaults[name]
    try:
        for form in family.conversions:
            fields |= form.read(values)
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error
    for name, allowed in family.allowed.items():
        value = fields.get(name, allowed[0])
        if not _is_one_of(value, allowed):
            expected = " or ".join(map(str, allowed))
            problem = f"{family.keys_of(name)[0]}: readers of {family.model_type} interpret this value differently"
            raise CheckpointError(path, problem, expected=expected, found=repr(value)[:80])
    dense, layers = fields.get("first_k_dense_replace"), fields["num_hidden_layers"]
    if type(dense) is int and type(layers) is int:
        fields["first_k_dense_replace"] = min(dense, layers)  # as every reader does
    only = fields.get("mlp_only_layers")
    if isinstance(only, list) and type(layers) is int:  # every reader ignores larger numbers
        fields["mlp_only_layers"] = [i for i in only if type(i) is not int or i < layers]
    if fields.get("topk_method") == "greedy":
        fields |= {"n_group": 1, "topk_group": 1}  # readers ignore the groups that files state
    try:
        config = ModelConfig.from_dict({**fields, "rope_parameters": _parse_rope(family, values, path)})
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error
    if error := _wrong_experts(config, family, path):
        raise error
    for key, derive in family.derived.items():
        if values.get(key) is not None and values[key] != derive(config):
            problem = f"{key} disagrees with the sizes from which it is derived"
            raise CheckpointError(path, problem, expected=derive(config), found=repr(values[key])[:80])
    return config


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether `value` equals one of `allowed`, where true is not 1 and false is not 0."""
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def _parse_rope(family: Family, values: Mapping[str, Any], path: Path) -> RopeParameters:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (older), which must agree."""
    outside = {"rope_theta": values.get("rope_theta")}
    if values.get("original_max_position_embeddings") is not None:  # it has precedence in transformers
        outside["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if "partial_rotary_factor" not in family.fixed:
        outside["partial_rotary_factor"] = values.get("partial_rotary_factor")
        rotary, head = values.get("rotary_dim"), values.get("head_dim", family.defaults.get("head_dim"))
        if type(rotary) is int and type(head) is int and head > 0 and outside["partial_rotary_factor"] is None:
            outside["partial_rotary_factor"] = rotary / head
    length = values.get("max_position_embeddings", family.defaults.get("max_position_embeddings"))
    found: dict[str, RopeParameters] = {}
    for key in ("rope_parameters", "rope_scaling"):
        form = values.get(key) or {}
        if not isinstance(form, dict):
            raise CheckpointError(path, f"invalid {key}", expected="an object or null", found=repr(form)[:80])
        if form:
            found[key] = _rope(family, key, form, outside, length, path)
    if len(set(found.values())) > 1:
        raise CheckpointError(path, "rope_parameters and rope_scaling disagree", found=" and ".join(map(str, found)))
    default = {name: value for name, value in family.rope.items() if outside.get(name) is None}
    return next(iter(found.values()), None) or _rope(family, "rope_theta", default, outside, length, path)


def _rope(
    family: Family, key: str, form: Mapping[str, Any], outside: Mapping[str, Any], length: Any, path: Path
) -> RopeParameters:
    """Build the parameters from `form`, and the keys `outside` it. `length` is max_position_embeddings."""
    known = {f.name for f in dataclasses.fields(RopeParameters)}
    fields: dict[str, Any] = {}
    for name, value in [*form.items(), *outside.items()]:
        name = "rope_type" if name == "type" else name
        if value is None or (name == "partial_rotary_factor" and value == 1 and name in family.fixed):
            continue
        if name == "attn_factor" and value == 1:  # a key of vLLM, which multiplies its attention factor by it
            continue
        if name not in known or name in family.fixed:
            raise CheckpointError(path, f"{key}.{name} is not supported", found=repr(value)[:80])
        if fields.setdefault(name, value) != value:
            raise CheckpointError(path, f"{key}: {name} has two values", expected=fields[name], found=value)
    if fields.get("rope_type") == "yarn" and family.yarn_from_length:
        fields.setdefault("original_max_position_embeddings", length)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in family.rope:
            fields.setdefault(name, family.rope[name])
    if fields.get("rope_type", "default") == "default" and fields.get("factor", 1) != 1:
        raise CheckpointError(path, f"{key}: factor without a rope_type that uses it", found=fields["factor"])
    return _without_idle_factor(RopeParameters(**fields))


def _render(config: ModelConfig) -> dict[str, Any]:
    family = family_of(config.model_type, CONFIG)
    config = _normalized(config, family)
    values = {family.keys_of(name)[0]: getattr(config, name) for name in family.keys}
    if config.num_key_value_heads is None:
        values["num_key_value_heads"] = config.num_attention_heads
    if "mlp_only_layers" in values:
        values["mlp_only_layers"] = list(config.mlp_only_layers)
    if "head_dim" in values:  # transformers' defaults differ from family to family
        values["head_dim"] = config.qk_head_dim
    for form in family.conversions:
        values |= form.write(config)
    values |= {key: harmless[0] for key, harmless in family.fixed.items() if harmless[0] is not None}
    rope = {name: value for name, value in dataclasses.asdict(config.rope_parameters).items() if value is not None}
    theta = rope.pop("rope_theta")
    if rope["rope_type"] == "default":
        rope = {"rope_type": "default", "partial_rotary_factor": rope["partial_rotary_factor"]}
    if rope["partial_rotary_factor"] == family.rope.get("partial_rotary_factor", 1.0) == 1.0:
        del rope["partial_rotary_factor"]
    else:
        values["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("truncate"):
        del rope["truncate"]  # the default; older readers warn about unknown keys
    values["rope_parameters"] = {**rope, "rope_theta": theta}
    values["rope_theta"] = theta
    values["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope["rope_type"]}
    return {**values, "model_type": family.model_type}
