"""How a family of checkpoints is described; `families.py` has the descriptions.

A name table maps each tensor of the model to the tensors of the files that fill it:

    "norm.weight": "model.norm.weight"                 one to one
    "gate_up": ("gate.weight", "up.weight")            the files' tensors stand one after the other along the rows
    "experts": "experts.{expert}.weight"               one file tensor for each slice along the first dimension
    "experts": Reordered("experts", "e d f two", "e two f d")      one, with its axes in another order
    "experts": MXFP4("experts")                        one, as experts_blocks and experts_scales
    "bias": Row("bias")                                one, a vector in the model and a matrix of one row in the files

The table reads and writes: every tensor of the model has exactly one entry, and entries tile what they fill. A family
has several where its files come in several layouts; the names in the files decide. `layout.py` expands a table for a
configuration.

A configuration maps key by key, by `keys`; what one key does not say alone has a `Form`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe.config import ModelConfig


@dataclass(frozen=True)
class Reordered:
    """A file tensor `name` whose axes, as einops names them, are `file` where the model's are `model`.

    "two" is the gate and the up half, an axis on its own in both; other axes are told by the model's sizes.
    """

    name: str
    file: str
    model: str


@dataclass(frozen=True)
class MXFP4:
    """`name`_blocks [E, rows, columns / 32, 16] and `name`_scales [E, rows, columns / 32], uint8; in the files gate and
    up rows stand in turn if `interleaved`."""

    name: str
    interleaved: bool = False


@dataclass(frozen=True)
class Row:
    """`name` [1, N], where the model has [N]."""

    name: str


Names = Mapping[str, str | tuple[str, ...] | Reordered | MXFP4 | Row]


@dataclass(frozen=True)
class Table:
    """The names of one layout.

    Attributes:
        top: names of what stands outside the layers.
        layer_prefix: of the names in `block`, `mtp` and `mtp_repeats` in the files; MTP modules count on from the last
            layer.
        block: names within a layer.
        mtp: names of an MTP module outside its block.
        mtp_repeats: what each MTP module's layer holds again, as written by DeepSeek: tensor of the model -> name.
        scale: what the name of a tensor in FP8 blocks ends in, and what its scale's name ends in instead.
    """

    top: Names
    layer_prefix: str
    block: Names
    mtp: Names = field(default_factory=dict)
    mtp_repeats: Mapping[str, str] = field(default_factory=dict)
    scale: tuple[str, str] = (".weight", ".weight_scale_inv")


@dataclass(frozen=True)
class Form:
    """Fields and keys that correspond in another way than one to one.

    Attributes:
        keys: all that `read` looks at and `write` writes.
        read: the object of config.json -> fields; a field that is not there keeps its default. What is no value of a
            field is a `ConfigError`; other values are not checked.
        write: the inverse.
    """

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


# Rotary tables, which older code registered as persistent buffers, in each layer or once for all. Kimi-K2's and
# Moonlight's files hold inv_freq. transformers and vLLM skip them in every family.
ROPE_BUFFERS = tuple(
    f"{owner}.rotary_emb.{kind}"
    for owner in ("model.layers.{layer}.self_attn", "model")
    for kind in ("inv_freq", "cos_cached", "sin_cached")
)

# Scales of a KV cache in FP8, which calibrated files hold: vLLM's names in compressed-tensors' and ModelOpt's files,
# and the older one for both. The cache here is not quantised.
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
        holds: whether a config satisfies the constraint.
        expected: the values that satisfy it.
        reason: which engine does what with other values.
    """

    field: str
    holds: Callable[[ModelConfig], bool]
    expected: str
    reason: str


@dataclass(frozen=True)
class Family:
    """How one `model_type` names its tensors and its configuration.

    Attributes:
        architecture: the class in transformers.
        tables: the layouts of its files by name; the first is that of a new checkpoint.
        keys: fields of `ModelConfig` -> their keys in config.json; of several, the first is written and any is read.
        required: fields that a file must give and that are not null.
        absent: fields -> value where the file does not give them, which is what transformers assumes.
        implied: fields without a key -> their value in this family.
        allowed: fields -> the values that can be read: with others, the family's own code and transformers compute
            different functions.
        rules: constraints on what is saved. Reading has none of them: transformers computes as the file says.
        fixed: keys that no field holds -> the values that leave the model's function as it is; the first is
            written, unless it is None.
        own: keys that are written as the model has them, or not at all, however the file spelled them, because engines
            read them where transformers does not: vLLM takes null for a number of groups, and llama.cpp limits routing
            to groups in every family.
        derived: keys that repeat what fields say -> how. transformers writes them, and computes with what it reads.
        forms: see `Form`.
        yarn_from_length: whether YaRN's missing original length is max_position_embeddings to every reader.
        rope: `rope_parameters` where the file has none. Its rope_theta and partial_rotary_factor stand in, too, where
            the file's rope_parameters lack them.
        buffers: names of tensors, {layer} for each layer's, that some files hold and the model computes itself, or has
            no use for. They are ignored in any shape and dtype, and never written.
        left_out: beginnings of the names of tensors that files hold and the model does not have, such as a vision
            tower's. They are not read.
        left_out_keys: keys of config.json that are true of these parts alone. They are not kept.
        text: key of config.json that holds the language model's object, if the whole is more than that.
        text_types: values that model_type can have in that object.
        written_as: the family whose files a save writes, if not this one.
        without_code: model_type that is written if no code for the configuration travels with the files, because
            transformers does not know this one by itself.
    """

    model_type: str
    architecture: str
    tables: Mapping[str, Table]
    keys: Mapping[str, str | tuple[str, ...]]
    required: tuple[str, ...]
    absent: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    own: tuple[str, ...] = ("n_group", "topk_group")
    derived: Mapping[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    forms: tuple[Form, ...] = ()
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
        """The language model's object in config.json, or `values` if they hold none in its place."""
        inner = values.get(self.text or "")
        return inner if isinstance(inner, dict) else values

    def keys_of(self, name: str) -> tuple[str, ...]:
        keys = self.keys[name]
        return (keys,) if isinstance(keys, str) else keys


def setting(config: ModelConfig, field: str) -> Any:
    """The value of a field of `ModelConfig`, or of "rope_parameters.NAME"."""
    for name in field.split("."):
        config = getattr(config, name)
    return config
