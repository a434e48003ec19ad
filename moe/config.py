"""What a model is: one frozen dataclass with Hugging Face's field names. No torch here.

A `ModelConfig` cannot exist in a state that makes no sense: `validate()` runs when it is made (also by
`dataclasses.replace`) and names the field, the value and what is allowed.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from moe.errors import ConfigError, did_you_mean

ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "group_limited_greedy", "greedy"]
RopeType = Literal["default", "yarn"]
QkNorm = Literal["none", "head", "whole"]
LayerType = Literal["full_attention", "sliding_attention"]

MAX_SIZE = 2**24  # any single dimension; far above every released model, far below int32 overflow in a product of two
MAX_PARAMETERS = 2**46  # a hundred times the largest released model


@dataclass(frozen=True)
class RopeParameters:
    """Rotary embedding, in the form of Hugging Face's `rope_parameters`.

    rope_type "yarn" is always on when configured (DeepSeek's own code applies it only past the original length).
    attention_factor multiplies cos and sin; None derives it from factor, mscale and mscale_all_dim.
    mscale_all_dim also raises the softmax scale of MLA by (0.1 * mscale_all_dim * ln(factor) + 1)^2.
    partial_rotary_factor is the share of a head's dimensions, the first ones, that rotate (grouped-query attention).
    """

    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_types(self, "rope_parameters.")
        self._require("rope_theta", self.rope_theta > 1, "a number above 1")
        self._require("partial_rotary_factor", 0 < self.partial_rotary_factor <= 1, "a number above 0, at most 1")
        for name in ("beta_fast", "beta_slow"):
            self._require(name, getattr(self, name) > 0, "a number above 0")
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "None or a number from 0 up")
        if self.rope_type == "yarn":
            self._require(
                "factor", self.factor is not None and self.factor >= 1, "a number from 1 up for rope_type 'yarn'"
            )
            original = self.original_max_position_embeddings
            self._require(
                "original_max_position_embeddings",
                original is not None and 1 <= original <= MAX_SIZE * 64,
                "a positive length for rope_type 'yarn'",
            )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"rope_parameters.{name}", getattr(self, name), allowed)


@dataclass(frozen=True)
class ModelConfig:
    """A transformer with Mixture-of-Experts layers.

    Attention is MLA when `kv_lora_rank` is a number and grouped-query attention when it is None.
    MLA uses q_lora_rank (None: no compression of q), qk_nope_head_dim, qk_rope_head_dim and v_head_dim;
    grouped-query attention uses num_key_value_heads, head_dim, qk_norm ("head": each query and key head is normalised;
    "whole": all heads of a token together), attention_sinks (a learnt logit for each head that takes attention and
    gives nothing) and sliding_window: a query sees that many tokens, itself included, in the layers that `layer_types`
    calls "sliding_attention" (None: in all). attention_bias is of the projections of q, k and v;
    attention_output_bias of the output's (None: as attention_bias). rope_interleave rotates pairs (2i, 2i + 1) of a
    head's dimensions instead of (i, i + half); None becomes True with MLA and False without, as in released models.

    MLP. Layer i has experts if i >= first_k_dense_replace, it is not in mlp_only_layers and i + 1 is a multiple of
    decoder_sparse_step. The shared expert has the width n_shared_experts * moe_intermediate_size, or
    shared_expert_intermediate_size; with shared_expert_gate its output is multiplied by a sigmoid of the token.
    router_bias and expert_bias add biases to their projections; swiglu_limit, swiglu_alpha and swiglu_beta are those of
    `moe.ops.swiglu`, for routed experts.

    Routing. `topk_method` decides selection as in DeepSeek's configs:

    - "noaux_tc": a correction bias is added for selection only; a group's score is the sum of its two best experts.
    - "group_limited_greedy": no bias; a group's score is its best expert.
    - "greedy": no bias, no groups.

    With norm_topk_prob, a token's weights are divided by their sum, or by moe_norm_min if the sum is smaller.

    Losses. `aux_loss_alpha` scales the balance loss, per sequence when `seq_aux`, else over the whole batch;
    `router_z_loss_coef` scales the mean squared logsumexp of the router's logits; `mtp_loss_weight` is the lambda of
    multi-token prediction. `model_type` is Hugging Face's and decides the checkpoint layout only. `extra` holds values
    of a config.json that nothing here reads; they are written back on save.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0

    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: QkNorm = "none"
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_sinks: bool = False
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    rope_interleave: bool | None = None
    max_position_embeddings: int = 4096

    scoring_func: ScoringFunc = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    moe_norm_min: float = 0.0

    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    router_z_loss_coef: float = 0.0
    mtp_loss_weight: float = 0.3

    model_type: str = "deepseek_v3"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mlp_only_layers", "layer_types"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rope_interleave is None:
            object.__setattr__(self, "rope_interleave", self.is_mla)
        self.validate()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """A config from plain values. A field that does not exist is refused, with the nearest name that does."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(str(name), values[name], f"no such field{did_you_mean(name, known)}")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise ConfigError(name, None, "a value: the field is required")
        values = dict(values)
        rope = values.get("rope_parameters")
        if isinstance(rope, Mapping):
            names = {f.name for f in dataclasses.fields(RopeParameters)}
            for name in rope:
                if name not in names:
                    raise ConfigError(f"rope_parameters.{name}", rope[name], f"one of the fields {sorted(names)}")
            values["rope_parameters"] = RopeParameters(**rope)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that `from_dict(to_dict())` equals the config."""
        return dataclasses.asdict(self)

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        if self.is_mla:
            return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """How many of a head's dimensions rotate."""
        if self.is_mla:
            return self.qk_rope_head_dim or 0
        return int(self.qk_head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared expert; 0 for none."""
        if self.shared_expert_intermediate_size is not None:
            return self.shared_expert_intermediate_size
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, without those of the MTP modules."""
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    def is_moe_layer(self, index: int) -> bool:
        dense = index < self.first_k_dense_replace or index in self.mlp_only_layers
        return not dense and (index + 1) % self.decoder_sparse_step == 0

    def is_sliding_layer(self, index: int) -> bool:
        if self.sliding_window is None:
            return False
        return self.layer_types is None or self.layer_types[index] == "sliding_attention"

    def family_problems(self) -> tuple[str, ...]:
        """Why checkpoint files of `model_type` cannot express this config, one line for each reason; empty if they can.

        Every valid config builds and trains. A save refuses a config whose files would lack something, or would mean
        something else in transformers, vLLM, SGLang or llama.cpp. Fields without effect are ignored.
        """
        import moe  # the lazy package: families of files are built on configs, and not the reverse

        return moe.family_problems(self)

    def validate(self) -> None:
        """Raise `ConfigError` for the first field that makes no sense. Allocates nothing."""
        _check_types(self, "")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes += ("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
        sizes += ("decoder_sparse_step",)
        optional = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "num_key_value_heads", "head_dim")
        optional += ("sliding_window", "shared_expert_intermediate_size")
        for name in sizes:
            self._require(name, 1 <= getattr(self, name) <= MAX_SIZE, f"an integer from 1 to {MAX_SIZE}")
        for name in optional:
            value = getattr(self, name)
            self._require(name, value is None or 1 <= value <= MAX_SIZE, f"None or an integer from 1 to {MAX_SIZE}")
        for name in ("n_shared_experts", "num_nextn_predict_layers"):
            self._require(name, 0 <= getattr(self, name) <= 1024, "an integer from 0 to 1024")
        self._require("num_hidden_layers", self.num_hidden_layers <= 10_000, "at most 10000 layers")
        limit = MAX_SIZE * 64
        self._require(
            "max_position_embeddings", 1 <= self.max_position_embeddings <= limit, f"an integer from 1 to {limit}"
        )

        self._validate_attention()
        self._validate_routing()

        for name in ("rms_norm_eps", "initializer_range"):
            self._require(name, 0 < getattr(self, name) < 1, "a number between 0 and 1")
        for name in ("aux_loss_alpha", "router_z_loss_coef", "mtp_loss_weight", "moe_norm_min"):
            self._require(name, getattr(self, name) >= 0, "a number from 0 up")
        # Products, not the exact count: this guard must not depend on code that the config feeds.
        for name, values in (
            ("vocab_size", self.vocab_size),
            ("intermediate_size", 3 * self.num_hidden_layers * self.intermediate_size),
            ("n_routed_experts", 3 * self.num_hidden_layers * self.moe_intermediate_size * self.n_routed_experts),
        ):
            count = values * self.hidden_size
            self._require(
                name, count <= MAX_PARAMETERS, f"a size that makes at most 2^46 parameters; it makes {count:.3g}"
            )

    def _validate_attention(self) -> None:
        if self.is_mla:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                self._require(name, getattr(self, name) is not None, "a size, because kv_lora_rank asks for MLA")
            nope = self.qk_nope_head_dim
            self._require(
                "qk_nope_head_dim", nope is not None and 0 <= nope <= MAX_SIZE, f"an integer from 0 to {MAX_SIZE}"
            )
            heads = self.num_key_value_heads
            same = heads is None or heads == self.num_attention_heads
            self._require(
                "num_key_value_heads", same, f"None or num_attention_heads ({self.num_attention_heads}) with MLA"
            )
            self._require(
                "head_dim", self.head_dim is None, "None with MLA (qk_nope_head_dim and qk_rope_head_dim decide)"
            )
            self._require("qk_norm", self.qk_norm == "none", "'none' with MLA (its latents are normalised)")
            self._require("attention_sinks", not self.attention_sinks, "False with MLA")
            self._require("sliding_window", self.sliding_window is None, "None with MLA")
            partial = self.rope_parameters.partial_rotary_factor
            if partial != 1:
                raise ConfigError("rope_parameters.partial_rotary_factor", partial, "1 with MLA")
        else:
            for name in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                self._require(name, getattr(self, name) is None, "None without kv_lora_rank (grouped-query attention)")
            kv_heads = self.num_key_value_heads or self.num_attention_heads
            divides = self.num_attention_heads % kv_heads == 0
            self._require(
                "num_key_value_heads", divides, f"a divisor of num_attention_heads ({self.num_attention_heads})"
            )
            fits = self.head_dim is not None or self.hidden_size % self.num_attention_heads == 0
            self._require(
                "hidden_size", fits, f"a multiple of num_attention_heads ({self.num_attention_heads}), or a head_dim"
            )
        name = "qk_rope_head_dim" if self.is_mla else ("head_dim" if self.head_dim is not None else "hidden_size")
        even = self.rope_dim % 2 == 0 and self.rope_dim > 0
        self._require(name, even, f"an even rotary dimension; it is {self.rope_dim}")
        types, layers = self.layer_types, self.num_hidden_layers
        self._require(
            "layer_types", types is None or len(types) == layers, f"None or {layers} entries, one for each layer"
        )
        slides = types is None or "sliding_attention" not in types or self.sliding_window is not None
        self._require("sliding_window", slides, "a size, because layer_types has sliding_attention")

    def _validate_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        self._require(
            "num_experts_per_tok", self.num_experts_per_tok <= experts, f"at most n_routed_experts ({experts})"
        )
        self._require("n_routed_experts", experts % groups == 0, f"a multiple of n_group ({groups})")
        self._require("topk_group", self.topk_group <= groups, f"at most n_group ({groups})")
        if self.topk_method == "greedy":
            self._require("n_group", groups == 1, "1 with topk_method 'greedy', which has no groups")
        reachable = self.topk_group * (experts // groups)
        self._require(
            "num_experts_per_tok",
            self.num_experts_per_tok <= reachable,
            f"at most {reachable}, the experts in topk_group ({self.topk_group}) of {groups} groups",
        )
        dense = self.first_k_dense_replace
        layers = self.num_hidden_layers
        self._require(
            "first_k_dense_replace", 0 <= dense <= layers, f"an integer from 0 to num_hidden_layers ({layers})"
        )
        inside = all(0 <= i < layers for i in self.mlp_only_layers) and len(set(self.mlp_only_layers)) == len(
            self.mlp_only_layers
        )
        self._require("mlp_only_layers", inside, f"distinct layers from 0 to {layers - 1}")
        self._require("routed_scaling_factor", self.routed_scaling_factor > 0, "a number above 0")
        self._require("swiglu_limit", self.swiglu_limit is None or self.swiglu_limit > 0, "None or a number above 0")
        if self.shared_expert_intermediate_size is not None:
            self._require("n_shared_experts", self.n_shared_experts == 1, "1 with shared_expert_intermediate_size")
        self._require(
            "shared_expert_gate", self.shared_width > 0 or not self.shared_expert_gate, "False without shared experts"
        )

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(name, getattr(self, name), allowed)


def _check_types(config: Any, prefix: str) -> None:
    """Every field holds a value of its annotated type. bool is not int; int passes for float; floats are finite."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        choices = get_args(f.type)
        if get_origin(f.type) is Literal:
            if not isinstance(value, str) or value not in choices:
                raise ConfigError(prefix + f.name, value, f"one of {', '.join(choices)}")
            continue
        if value is None and type(None) in choices:
            continue
        if f.name == "mlp_only_layers":
            if not isinstance(value, tuple) or not all(type(i) is int for i in value):
                raise ConfigError(prefix + f.name, value, "a list of integers")
            continue
        if f.name == "layer_types":
            if not isinstance(value, tuple) or not all(kind in get_args(LayerType) for kind in value):
                raise ConfigError(prefix + f.name, value, f"None or a list of {' and '.join(get_args(LayerType))}")
            continue
        kinds = [c for c in choices if c is not type(None)] if type(None) in choices else [f.type]
        kind = kinds[0]
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(prefix + f.name, value, "true or false")
        if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(prefix + f.name, value, "an integer")
        if kind is float and not _is_finite(value):
            raise ConfigError(prefix + f.name, value, "a finite number")
        if kind is str and not isinstance(value, str):
            raise ConfigError(prefix + f.name, value, "a string")
        if kind is RopeParameters and not isinstance(value, RopeParameters):
            raise ConfigError(prefix + f.name, value, "a RopeParameters")
        if f.name == "extra" and not isinstance(value, Mapping):
            raise ConfigError(prefix + f.name, value, "a mapping")


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
