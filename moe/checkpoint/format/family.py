"""Classes that describe a family of checkpoints; `families.py` has the definitions.

A name table maps each tensor of the model to the tensors of the files that fill it:

    "norm.weight": "model.norm.weight"                 one to one
    "gate_up": ("gate.weight", "up.weight")            file tensors concatenated along the rows
    "experts": "experts.{expert}.weight"               a file tensor for each slice along the first dimension
    "experts": Reordered("experts", "e d f two", "e two f d")      axes in another order
    "experts": MXFP4("experts")                        experts_blocks and experts_scales
    "bias": Row("bias")                                a vector in the model, a matrix of one row in the files

One table serves loading and saving: every tensor of the model has exactly one entry, which covers it without overlap. A
family has a table for each layout of its files, which is recognised by their names. `layout.py` expands a table for a
configuration.

`keys` maps the fields of a configuration one to one; other correspondences are `Conversion`s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe.config import ModelConfig


@dataclass(frozen=True)
class Reordered:
    """A file tensor with the axes `file`, which are `model` in the model, both in einops' notation.

    "two" is the axis of the gate and up halves; the sizes of the other axes are the model's.
    """

    name: str
    file: str
    model: str


@dataclass(frozen=True)
class MXFP4:
    """Two uint8 file tensors: `name`_blocks [E, rows, columns / 32, 16] and `name`_scales [E, rows, columns / 32].

    If `interleaved`, gate and up rows alternate in the files.
    """

    name: str
    interleaved: bool = False


@dataclass(frozen=True)
class Row:
    """A file tensor [1, N] that is [N] in the model."""

    name: str


Names = Mapping[str, str | tuple[str, ...] | Reordered | MXFP4 | Row]


@dataclass(frozen=True)
class Table:
    """Tensor names of one layout.

    Attributes:
        top: names outside the layers.
        layer_prefix: prefix of the names in `block`, `mtp` and `mtp_repeats`; MTP modules are numbered after the last
            layer.
        block: names within a layer.
        mtp: names of an MTP module outside its block.
        mtp_repeats: copies of other tensors in each MTP module, as in DeepSeek's files: tensor of the model -> name.
        scale: suffix of a tensor in FP8 blocks, and the suffix of its scales.
    """

    top: Names
    layer_prefix: str
    block: Names
    mtp: Names = field(default_factory=dict)
    mtp_repeats: Mapping[str, str] = field(default_factory=dict)
    scale: tuple[str, str] = (".weight", ".weight_scale_inv")


@dataclass(frozen=True)
class Conversion:
    """Fields and keys of config.json that do not correspond one to one.

    Attributes:
        keys: keys that `read` reads and `write` writes.
        read: the object of config.json -> fields; other fields keep their defaults. Raises `ConfigError` if it cannot
            compute a value; values are validated later.
        write: the inverse of `read`.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


# Rotary tables, which older code registered as persistent buffers, per layer or once. Kimi-K2's and Moonlight's files
# hold inv_freq. transformers and vLLM skip them in every family.
ROPE_BUFFERS = tuple(
    f"{owner}.rotary_emb.{kind}"
    for owner in ("model.layers.{layer}.self_attn", "model")
    for kind in ("inv_freq", "cos_cached", "sin_cached")
)

# Scales of an FP8 KV cache in calibrated files, by the names that vLLM reads. The cache here is not quantised.
CACHE_SCALES = tuple(
    f"model.layers.{{layer}}.self_attn.{name}"
    for name in ("k_scale", "v_scale", "kv_scale", "attn.k_scale", "attn.v_scale", "k_proj.k_scale", "v_proj.v_scale")
)
BUFFERS = (*ROPE_BUFFERS, *CACHE_SCALES)


@dataclass(frozen=True)
class Rule:
    """A constraint on a field. If it does not hold, an engine silently computes something else, so a save raises.

    Attributes:
        field: name in `ModelConfig`, or "rope_parameters.NAME".
        holds: returns whether a config satisfies the constraint.
        expected: values that satisfy it, as text.
        reason: what an engine does with other values.
    """

    field: str
    holds: Callable[[ModelConfig], bool]
    expected: str
    reason: str


@dataclass(frozen=True)
class Family:
    """Tensor names and configuration keys of one `model_type`.

    Attributes:
        architecture: class in transformers.
        tables: layouts of the files by name; a new checkpoint has the first.
        keys: fields of `ModelConfig` -> their keys in config.json; any of several is read, the first is written.
        required: fields that a file must give, not null.
        defaults: fields -> default if the file does not give them, the same as in transformers.
        implied: fields without a key -> their value in this family.
        allowed: fields -> values that can be read; with others, the family's own code and transformers compute
            different functions.
        rules: constraints on saved configurations; reading has none, because transformers follows the file.
        fixed: keys without a field -> values that leave the model's function unchanged; the first is written, unless it
            is None.
        own: keys that are never copied from the original file, because engines read them where transformers does not:
            vLLM takes null for a number of groups, and llama.cpp limits routing to groups in every family.
        derived: keys that are computed from fields -> the function. transformers writes and uses them.
        conversions: see `Conversion`.
        yarn_from_length: whether every reader replaces a missing original length of YaRN by max_position_embeddings.
        rope: default `rope_parameters`; also the default rope_theta and partial_rotary_factor of incomplete ones.
        buffers: names of tensors in some files that the model computes itself or does not need, with {layer} for the
            layer's number. They are ignored in any shape and dtype, and never written.
        left_out: prefixes of tensors that the model does not have, such as a vision tower's. They are not read.
        left_out_keys: keys of config.json that describe only these parts. They are not kept.
        text: key of the language model's object in a multimodal config.json.
        text_types: accepted values of model_type in that object.
        written_as: family whose files a save writes, if not this one.
        without_code: model_type that is written if the files include no code for the configuration, because
            transformers does not know this one.
    """

    model_type: str
    architecture: str
    tables: Mapping[str, Table]
    keys: Mapping[str, str | tuple[str, ...]]
    required: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    own: tuple[str, ...] = ("n_group", "topk_group")
    derived: Mapping[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    conversions: tuple[Conversion, ...] = ()
    yarn_from_length: bool = True
    rope: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[str, ...] = BUFFERS
    left_out: tuple[str, ...] = ()
    left_out_keys: tuple[str, ...] = ()
    text: str | None = None
    text_types: tuple[str, ...] = ()
    written_as: str | None = None
    without_code: str | None = None

    def language_model(self, values: Any) -> Any:
        """Return the language model's object in config.json, or `values` if there is none."""
        inner = values.get(self.text or "")
        return inner if isinstance(inner, dict) else values

    def keys_of(self, name: str) -> tuple[str, ...]:
        keys = self.keys[name]
        return (keys,) if isinstance(keys, str) else keys


def setting(config: ModelConfig, field: str) -> Any:
    """Return the value of a field of `ModelConfig`, or of "rope_parameters.NAME"."""
    for name in field.split("."):
        config = getattr(config, name)
    return config
