"""config.json <-> `ModelConfig`. Whatever is not understood is kept; whatever would be misunderstood is refused."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from moe.checkpoint.families import Family, family_of
from moe.checkpoint.folder import CONFIG, locate, read_config_values
from moe.config import ModelConfig, RopeParameters
from moe.errors import CheckpointError, ConfigError

# These describe the files and not the model: a save writes its own.
STORAGE_KEYS = ("architectures", "dtype", "torch_dtype", "quantization_config", "compression_config")

# What null means, where it means something other than None.
_NULL = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0, "mlp_only_layers": (), "aux_loss_alpha": 0.0}


def read_config(folder: str | PathLike[str]) -> ModelConfig:
    """The configuration in the folder's config.json, MTP modules as it states them. Opens no other file."""
    path = locate(folder)
    return parse_config(read_config_values(path), path / CONFIG)


def parse_config(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """The object of a config.json as a `ModelConfig`; `path` is for messages.

    `extra` gets every key that has no field, and every key that says the same in another way than `render_config`
    would: an older form of RoPE, a null.
    """
    values = _language_model(values, path)
    config = _understand(values, path)
    plain = _render(config)
    dropped = {*STORAGE_KEYS, *family_of(config.model_type, path).left_out_keys}
    extra = {
        key: value for key, value in values.items() if key not in dropped and not (key in plain and plain[key] == value)
    }
    return dataclasses.replace(config, extra=extra)


def _language_model(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The language model's object in a config.json that has more than that, with what stands outside for the whole."""
    family = family_of(values.get("model_type"), path)
    if family.text is None:
        return values
    inner = values.get(family.text)
    if not isinstance(inner, dict):
        raise CheckpointError(path, family.text, expected="an object", found=repr(inner)[:80])
    if inner.get("model_type") not in (None, "deepseek_v3", "kimi_k2"):
        problem = f"{family.text}.model_type"
        raise CheckpointError(path, problem, expected="deepseek_v3 or kimi_k2", found=repr(inner["model_type"])[:80])
    outside = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {**inner, **{key: values[key] for key in outside if key in values}, "model_type": family.model_type}


def as_written(config: ModelConfig, path: Path) -> ModelConfig:
    """The config in the family whose files a save writes; `path` is for messages."""
    written_as = family_of(config.model_type, path).written_as
    return dataclasses.replace(config, model_type=written_as) if written_as else config


def render_config(config: ModelConfig, path: Path) -> dict[str, Any]:
    """The object for config.json, without `STORAGE_KEYS`; `path` is for messages.

    RoPE is written in the older form too, because a reader that does not know the newer one would compute with its
    defaults and say nothing. A key from `extra` stands as it was read, as long as the whole still means `config`. A
    config that would come back as another one is refused: the family's readers cannot express it.
    """
    config = as_written(config, path)
    values = _render(config)
    wanted, found = _canonical(config), _canonical(_understand(values, path))
    for f in dataclasses.fields(ModelConfig):
        mine, back = getattr(wanted, f.name), getattr(found, f.name)
        if mine != back:
            raise CheckpointError(path, f"{f.name}: {config.model_type} cannot express it", expected=back, found=mine)
    family = family_of(config.model_type, path)
    ours = {key for name in family.keys for key in family.keys_of(name)} | {
        k for form in family.forms for k in form.keys
    }
    for key, value in config.extra.items():
        if key in STORAGE_KEYS:
            continue
        candidate = {**values, key: value}
        if key in family.derived:
            candidate[key] = family.derived[key](config)
        try:
            agrees = _canonical(_understand(candidate, path)) == wanted
        except CheckpointError:
            if key not in values and key not in ours:
                raise
            agrees = False  # the field has changed since the key was read
        if agrees:
            values = candidate
    return values


def _canonical(config: ModelConfig) -> ModelConfig:
    """Two configs that differ only in spelling have the same canonical form."""
    heads = None if config.is_mla else config.num_key_value_heads or config.num_attention_heads
    rope = config.rope_parameters
    if rope.rope_type == "default":
        rope = RopeParameters(rope_theta=rope.rope_theta, partial_rotary_factor=rope.partial_rotary_factor)
    types = tuple(config.is_sliding_layer(i) for i in range(config.num_hidden_layers))
    dense = [i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i)]
    leading = next((n for n, i in enumerate(dense) if i != n), len(dense))
    return dataclasses.replace(
        config,
        num_key_value_heads=heads,
        head_dim=None if config.is_mla else config.qk_head_dim,
        rope_parameters=rope,
        attention_output_bias=config.output_bias,
        first_k_dense_replace=leading,
        mlp_only_layers=tuple(dense[leading:]),
        decoder_sparse_step=1,
        sliding_window=config.sliding_window if any(types) else None,
        layer_types=tuple("sliding_attention" if s else "full_attention" for s in types) if any(types) else None,
        extra={},
    )


def _understand(values: Mapping[str, Any], path: Path) -> ModelConfig:
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
            raise CheckpointError(path, f"{key}: {family.model_type} needs a value", found=found)
        if given:
            fields[name] = _NULL.get(name) if given[key] is None else given[key]
        elif name in family.absent:
            fields[name] = family.absent[name]
    try:
        for form in family.forms:
            fields |= form.read(values)
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error
    for name, allowed in family.allowed.items():
        value = fields.get(name, allowed[0])
        if not _is_one_of(value, allowed):
            expected = " or ".join(map(str, allowed))
            problem = f"{family.keys_of(name)[0]}: readers of {family.model_type} do not agree on it"
            raise CheckpointError(path, problem, expected=expected, found=repr(value)[:80])
    dense, layers = fields.get("first_k_dense_replace"), fields["num_hidden_layers"]
    if type(dense) is int and type(layers) is int:
        fields["first_k_dense_replace"] = min(dense, layers)  # more than all is all, to every reader
    only = fields.get("mlp_only_layers")
    if isinstance(only, list) and type(layers) is int:  # readers look for each layer in the list, not the other way
        fields["mlp_only_layers"] = [i for i in only if type(i) is not int or i < layers]
    if fields["topk_method"] == "greedy":
        fields |= {"n_group": 1, "topk_group": 1}  # files carry numbers here that no reader looks at
    try:
        config = ModelConfig.from_dict({**fields, "rope_parameters": _understand_rope(family, values, path)})
    except ConfigError as error:
        raise CheckpointError(path, str(error)) from error
    for key, derive in family.derived.items():
        if values.get(key) is not None and values[key] != derive(config):
            problem = f"{key} disagrees with the sizes that it repeats"
            raise CheckpointError(path, problem, expected=derive(config), found=repr(values[key])[:80])
    return config


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether it is equal to one of them. To Python true is 1 and false is 0; in a config.json they are mistakes."""
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def _understand_rope(family: Family, values: Mapping[str, Any], path: Path) -> RopeParameters:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (older); what is there must agree."""
    outside = {"rope_theta": values.get("rope_theta")}
    if values.get("original_max_position_embeddings") is not None:  # transformers lets this one win
        outside["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if "partial_rotary_factor" not in family.fixed:
        outside["partial_rotary_factor"] = values.get("partial_rotary_factor")
        rotary, head = values.get("rotary_dim"), values.get("head_dim", family.absent.get("head_dim"))
        if type(rotary) is int and type(head) is int and head > 0 and outside["partial_rotary_factor"] is None:
            outside["partial_rotary_factor"] = rotary / head
    length = values.get("max_position_embeddings", family.absent.get("max_position_embeddings"))
    found: dict[str, RopeParameters] = {}
    for key in ("rope_parameters", "rope_scaling"):
        form = values.get(key) or {}
        if not isinstance(form, dict):
            raise CheckpointError(path, key, expected="an object or null", found=repr(form)[:80])
        if form:
            found[key] = _rope(family, key, form, outside, length, path)
    if len(set(found.values())) > 1:
        raise CheckpointError(path, "rope_parameters and rope_scaling disagree", found=" and ".join(map(str, found)))
    default = {name: value for name, value in family.rope.items() if outside.get(name) is None}
    return next(iter(found.values()), None) or _rope(family, "rope_theta", default, outside, length, path)


def _rope(
    family: Family, key: str, form: Mapping[str, Any], outside: Mapping[str, Any], length: Any, path: Path
) -> RopeParameters:
    """`length` is max_position_embeddings, which stands in for a missing original one."""
    known = {f.name for f in dataclasses.fields(RopeParameters)}
    fields: dict[str, Any] = {}
    for name, value in [*form.items(), *outside.items()]:
        name = "rope_type" if name == "type" else name
        if value is None or (name == "partial_rotary_factor" and value == 1 and name in family.fixed):
            continue
        if name not in known:
            raise CheckpointError(path, f"{key}.{name} is not supported", found=repr(value)[:80])
        if fields.setdefault(name, value) != value:
            raise CheckpointError(path, f"{key}: {name} is given twice", expected=fields[name], found=value)
    if fields.get("rope_type") == "yarn" and family.yarn_from_length:
        fields.setdefault("original_max_position_embeddings", length)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in family.rope:
            fields.setdefault(name, family.rope[name])
    if fields.get("rope_type", "default") == "default" and fields.get("factor", 1) != 1:
        raise CheckpointError(path, f"{key}: factor without a rope_type that has one", found=fields["factor"])
    return RopeParameters(**fields)


def _render(config: ModelConfig) -> dict[str, Any]:
    family = family_of(config.model_type, CONFIG)
    values = {family.keys_of(name)[0]: getattr(config, name) for name in family.keys}
    if config.num_key_value_heads is None:
        values["num_key_value_heads"] = config.num_attention_heads
    if "mlp_only_layers" in values:
        values["mlp_only_layers"] = list(config.mlp_only_layers)
    if "head_dim" in values:  # transformers' defaults differ from family to family
        values["head_dim"] = config.qk_head_dim
    for form in family.forms:
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
        del rope["truncate"]  # the default, and older readers warn about a key that they do not know
    values["rope_parameters"] = {**rope, "rope_theta": theta}
    values["rope_theta"] = theta
    values["rope_scaling"] = None if rope["rope_type"] == "default" else {**rope, "type": rope["rope_type"]}
    return {**values, "model_type": family.model_type}
