"""Model configuration: frozen dataclasses with Hugging Face's field names. This module does not import torch.

`ModelConfig` inherits the settings of MoE layers from `MoEConfig`, which inherits those of the router and the experts.
`validate()` runs on creation (also by `dataclasses.replace`), so an invalid configuration cannot exist. Its error
states the field, the value and the allowed values.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from moe.errors import ConfigError, did_you_mean

ScoringFunc = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "group_limited_greedy", "greedy"]
RopeType = Literal["default", "yarn"]
QkNorm = Literal["none", "head", "whole"]
LayerType = Literal["full_attention", "sliding_attention"]

MAX_SIZE = 2**24  # any single dimension; far above every released model, far below int32 overflow in a product of two
MAX_LENGTH = MAX_SIZE * 64  # in positions
MAX_PARAMETERS = 2**46  # a hundred times the largest released model


@dataclass(frozen=True)
class _Settings:
    """Base of the dataclasses of this module: validation on creation, and conversion to and from plain values."""

    where: ClassVar[str] = ""  # prefix of field names in errors

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError` for the first invalid field. Allocates nothing."""
        for f in dataclasses.fields(self):
            value, optional = getattr(self, f.name), isinstance(f.type, UnionType)
            kind = get_args(f.type)[0] if optional else f.type
            if not _is_a(kind, value) and not (value is None and optional):
                # Looked up only here, because torch.compile may trace the creation of a SwiGLU and cannot hash a type.
                raise ConfigError(
                    self.where + f.name, value, _ALLOWED.get(kind) or f"one of {', '.join(get_args(kind))}"
                )

    @classmethod
    def check_names(cls, values: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for the first name that is not a field, with the closest field name."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{cls.where}{name}", values[name], f"no such field{did_you_mean(name, known)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create a config from plain values. Raises `ConfigError` for an unknown field or a missing required one."""
        cls.check_names(values)
        for f in dataclasses.fields(cls):
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in values:
                raise ConfigError(cls.where + f.name, None, "a value: the field is required")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, such that `from_dict(to_dict())` equals the original."""
        return dataclasses.asdict(self)

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(self.where + name, getattr(self, name), allowed)

    def _require_sizes(self, *names: str, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            ok = (optional and value is None) or 1 <= value <= MAX_SIZE
            self._require(name, ok, f"{'None or ' if optional else ''}an integer from 1 to {MAX_SIZE}")


@dataclass(frozen=True)
class RopeParameters(_Settings):
    """Rotary embedding parameters, in the form of Hugging Face's `rope_parameters`.

    rope_type "yarn" applies at every length (DeepSeek's own code applies it only past the original length).
    attention_factor multiplies cos and sin; None derives it from factor, mscale and mscale_all_dim.
    mscale_all_dim also multiplies the softmax scale of MLA by (0.1 * mscale_all_dim * ln(factor) + 1)^2.
    partial_rotary_factor is the fraction of a head's dimensions that rotate, from the first (grouped-query attention).
    The fields between rope_type and partial_rotary_factor are YaRN's.
    """

    where = "rope_parameters."

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

    def validate(self) -> None:
        super().validate()
        self._require("rope_theta", self.rope_theta > 1, "a number above 1")
        self._require("partial_rotary_factor", 0 < self.partial_rotary_factor <= 1, "a number above 0, at most 1")
        for name in ("beta_fast", "beta_slow"):
            self._require(name, getattr(self, name) > 0, "a number above 0")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "None or a number of at least 0")
        factor = self.attention_factor
        self._require("attention_factor", factor is None or factor > 0, "None or a number above 0")
        if self.rope_type == "default":
            self._require("factor", self.factor in (None, 1), "None for rope_type 'default'")
        else:
            self._require(
                "factor", self.factor is not None and self.factor >= 1, "a number of at least 1 for rope_type 'yarn'"
            )
            original = self.original_max_position_embeddings
            self._require(
                "original_max_position_embeddings",
                original is not None and 1 <= original <= MAX_LENGTH,
                "a positive length for rope_type 'yarn'",
            )


@dataclass(frozen=True)
class SwiGLU(_Settings):
    """Gated activation of experts, defined by `moe.ops.swiglu`. The default is silu(gate) * up.

    limit (None: no clamping) bounds the gate half from above and the up half on both sides. alpha multiplies the gate
    inside the sigmoid. beta is added to the up half. Raises ConfigError, a ValueError, if limit is not positive or a
    value is not finite.
    """

    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def validate(self) -> None:
        super().validate()
        self._require("limit", self.limit is None or self.limit > 0, "a positive number, or None for no clamping")


@dataclass(frozen=True)
class ExpertsConfig(_Settings):
    """Experts of a Mixture-of-Experts layer. `moe.MoELayer` documents each field."""

    hidden_size: int
    moe_intermediate_size: int
    _: KW_ONLY
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    swiglu_beta: float = 0.0

    @property
    def activation(self) -> SwiGLU:
        """Activation of routed experts."""
        return SwiGLU(self.swiglu_limit, self.swiglu_alpha, self.swiglu_beta)

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared expert; 0 if there is none."""
        width = self.shared_expert_intermediate_size
        return self.n_shared_experts * self.moe_intermediate_size if width is None else width

    def validate(self) -> None:
        super().validate()
        self._require_sizes("hidden_size", "moe_intermediate_size")
        self._require_sizes("shared_expert_intermediate_size", optional=True)
        self._require("n_shared_experts", 0 <= self.n_shared_experts <= 1024, "an integer from 0 to 1024")
        self._require("swiglu_limit", self.swiglu_limit is None or self.swiglu_limit > 0, "None or a number above 0")
        if self.shared_expert_intermediate_size is not None:
            self._require("n_shared_experts", self.n_shared_experts == 1, "1 with shared_expert_intermediate_size")
        self._require(
            "shared_expert_gate", self.shared_width > 0 or not self.shared_expert_gate, "False without shared experts"
        )


@dataclass(frozen=True)
class RouterConfig(_Settings):
    """Router of a Mixture-of-Experts layer. `moe.MoELayer` documents each field."""

    n_routed_experts: int
    num_experts_per_tok: int
    _: KW_ONLY
    scoring_func: ScoringFunc = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = False
    moe_norm_min: float = 0.0

    @property
    def selection(self) -> dict[str, Any]:
        """Keyword arguments of `moe.ops.route`."""
        return {
            "top_k": self.num_experts_per_tok,
            "scoring_func": self.scoring_func,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "group_score": "top2" if self.topk_method == "noaux_tc" else "max",
            "norm_topk_prob": self.norm_topk_prob,
            "routed_scaling_factor": self.routed_scaling_factor,
            "norm_min": self.moe_norm_min,
        }

    @property
    def idle_router(self) -> str | None:
        """Reason why the model's loss cannot train the router; None if it can.

        Such configurations are valid, because checkpoints may have them. An uncompiled layer warns in training.
        """
        if self.norm_topk_prob and self.num_experts_per_tok == 1 and self.moe_norm_min < 0.5:
            remedy = "norm_topk_prob=False or a larger num_experts_per_tok"
            return f"norm_topk_prob with num_experts_per_tok = 1: the only weight is w / w = 1; use {remedy}"
        if self.scoring_func == "softmax" and self.n_routed_experts == 1:
            return "scoring_func 'softmax' with n_routed_experts = 1: the score is 1; use 'sigmoid' or more experts"
        return None

    def validate(self) -> None:
        super().validate()
        self._require_sizes("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
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
        self._require("routed_scaling_factor", self.routed_scaling_factor > 0, "a number above 0")
        self._require("moe_norm_min", self.moe_norm_min >= 0, "a number of at least 0")


@dataclass(frozen=True)
class MoEConfig(RouterConfig, ExpertsConfig):
    """Mixture-of-Experts layer: router, experts and losses. `moe.MoELayer` documents each field."""

    _: KW_ONLY
    aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    router_z_loss_coef: float = 0.0
    initializer_range: float = 0.02

    def validate(self) -> None:
        super().validate()
        for name in ("aux_loss_alpha", "router_z_loss_coef"):
            self._require(name, getattr(self, name) >= 0, "a number of at least 0")
        self._require("initializer_range", 0 < self.initializer_range < 1, "a number between 0 and 1")
        self._limit_parameters("n_routed_experts", 3 * self.moe_intermediate_size * self.n_routed_experts)

    def _limit_parameters(self, name: str, rows: int) -> None:
        # Not the exact count, because this check must not depend on code that takes a config.
        count = rows * self.hidden_size
        self._require(name, count <= MAX_PARAMETERS, f"a size with at most 2^46 parameters; found {count:.3g}")


_EXPERT_SIZES = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")  # 0 in a model without experts
EXPERT_FIELDS = tuple(
    f.name for f in dataclasses.fields(MoEConfig) if f.name not in ("hidden_size", "initializer_range")
)  # without effect in a model without experts


@dataclass(frozen=True, kw_only=True)
class ModelConfig(MoEConfig):
    """Transformer, with or without Mixture-of-Experts layers.

    A model without experts has none of n_routed_experts, num_experts_per_tok and moe_intermediate_size, and the other
    fields of its routers and experts have no effect.

    `moe.MoELayer` documents the fields of these layers: hidden_size, moe_intermediate_size, n_routed_experts,
    num_experts_per_tok, n_shared_experts, shared_expert_intermediate_size, shared_expert_gate, expert_bias,
    swiglu_limit, swiglu_alpha, swiglu_beta, scoring_func, topk_method, n_group, topk_group, norm_topk_prob,
    routed_scaling_factor, router_bias, moe_norm_min, aux_loss_alpha, seq_aux, router_z_loss_coef and initializer_range.
    hidden_size (D) and initializer_range apply to the whole model.

    Attributes:
        vocab_size: V, the vocabulary size.
        num_hidden_layers: L, the number of layers without MTP modules.
        num_attention_heads: H, the number of query heads.
        intermediate_size: MLP width of layers without experts.
        first_k_dense_replace: number of layers without experts at the beginning.
        mlp_only_layers: indices of further layers without experts.
        decoder_sparse_step: each remaining layer i has experts if i + 1 is a multiple of this.
        kv_lora_rank: C, the latent rank of MLA; None for grouped-query attention.
        q_lora_rank: MLA: rank of the compressed queries; None for uncompressed queries.
        qk_nope_head_dim, qk_rope_head_dim: MLA: number of dimensions of a query or key head without and with rotation.
        v_head_dim: MLA: number of dimensions of a value head.
        num_key_value_heads: grouped-query attention: number of key and value heads; None for num_attention_heads.
        head_dim: grouped-query attention: number of dimensions of a head; None for hidden_size / num_attention_heads.
        qk_norm: grouped-query attention: RMS norms on each query and key head ("head"), across all heads of a token
            ("whole"), or "none".
        attention_bias: biases in the projections of queries, keys and values.
        attention_output_bias: bias in the output projection; None for the value of attention_bias.
        attention_sinks: learned logit for each head that takes part in the softmax but has no value.
        sliding_window: number of tokens that a query attends to, itself included; None for all.
        layer_types: "full_attention" or "sliding_attention" for each layer; None applies sliding_window to all layers.
        rope_parameters: rotary embedding; see `RopeParameters`.
        rope_interleave: rotate pairs (2i, 2i + 1) of a head's dimensions instead of (i, i + half). None becomes True
            with MLA and False without, as in released models.
        max_position_embeddings: maximum sequence length. `moe.generate` stops there.
        num_nextn_predict_layers: number of multi-token prediction (MTP) modules.
        mtp_loss_weight: lambda, the weight of the MTP loss.
        tie_word_embeddings: use the embedding as the head.
        rms_norm_eps: added to the mean square in RMS norms.
        model_type: Hugging Face's model type; affects the layout of checkpoints only.
        extra: values of config.json that this library does not use; they are written back on save.
    """

    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0

    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    first_k_dense_replace: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1

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

    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float = 0.3
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6

    model_type: str = "deepseek_v3"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("mlp_only_layers", "layer_types"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rope_interleave is None:
            object.__setattr__(self, "rope_interleave", self.is_mla)
        super().__post_init__()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        rope = values.get("rope_parameters")
        if isinstance(rope, Mapping):
            values = {**values, "rope_parameters": RopeParameters.from_dict(rope)}
        return super().from_dict(values)

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
        """Number of dimensions of a head that rotate."""
        rotary = self.qk_rope_head_dim or 0
        return rotary if self.is_mla else int(self.qk_head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with routed experts, MTP modules excluded."""
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    @property
    def has_experts(self) -> bool:
        """Whether a layer or an MTP module has routed experts."""
        return self.num_moe_layers + self.num_nextn_predict_layers > 0

    def is_moe_layer(self, index: int) -> bool:
        dense = index < self.first_k_dense_replace or index in self.mlp_only_layers
        return self.n_routed_experts > 0 and not dense and (index + 1) % self.decoder_sparse_step == 0

    def is_sliding_layer(self, index: int) -> bool:
        types = self.layer_types
        return self.sliding_window is not None and (types is None or types[index] == "sliding_attention")

    def family_problems(self) -> tuple[str, ...]:
        """Return the reasons why a checkpoint of `model_type` cannot represent this config, one line each.

        Every valid config builds and trains. A save refuses a config whose checkpoint would be incomplete, or would
        mean something else in transformers, vLLM, SGLang or llama.cpp. Fields without effect are ignored.
        """
        import moe  # the lazy package, because checkpoint families depend on this module

        return moe.family_problems(self)

    def idle_parameters(self) -> tuple[str, ...]:
        """Return the parameters outside the routers that the loss cannot train, with the reason, one line each.

        Such configurations are valid, because checkpoints may have them. An uncompiled `Transformer` warns in training.
        """
        slides = not self.attention_sinks and any(map(self.is_sliding_layer, range(self.num_hidden_layers)))
        reasons = {
            "all: a vocabulary of one token makes the loss 0": self.vocab_size == 1,
            "mtp: mtp_loss_weight is 0; use num_nextn_predict_layers=0, or moe.load(..., mtp=False)": (
                self.num_nextn_predict_layers > 0 and self.mtp_loss_weight == 0
            ),
            "q_proj, k_proj and their norms: in a sliding_window of 1 a token attends to itself only; use 2 or more": (
                slides and self.sliding_window == 1
            ),
        }
        return tuple(reason for reason, holds in reasons.items() if holds)

    def validate(self) -> None:
        super().validate()
        sizes = ("vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "decoder_sparse_step")
        self._require_sizes(*sizes)
        optional = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "num_key_value_heads", "head_dim")
        self._require_sizes(*optional, "sliding_window", optional=True)
        mtp, layers, dense = self.num_nextn_predict_layers, self.num_hidden_layers, self.first_k_dense_replace
        self._require("num_nextn_predict_layers", 0 <= mtp <= 1024, "an integer from 0 to 1024")
        self._require("num_nextn_predict_layers", not mtp or self.n_routed_experts > 0, "0 without n_routed_experts")
        self._require("num_hidden_layers", layers <= 10_000, "at most 10000 layers")
        self._require(
            "max_position_embeddings",
            1 <= self.max_position_embeddings <= MAX_LENGTH,
            f"an integer from 1 to {MAX_LENGTH}",
        )

        self._validate_attention()

        self._require(
            "first_k_dense_replace", 0 <= dense <= layers, f"an integer from 0 to num_hidden_layers ({layers})"
        )
        distinct = len({i for i in self.mlp_only_layers if 0 <= i < layers}) == len(self.mlp_only_layers)
        self._require("mlp_only_layers", distinct, f"distinct layers from 0 to {layers - 1}")
        self._require("rms_norm_eps", 0 < self.rms_norm_eps < 1, "a number between 0 and 1")
        self._require("mtp_loss_weight", self.mtp_loss_weight >= 0, "a number of at least 0")
        self._limit_parameters("vocab_size", self.vocab_size)
        self._limit_parameters("intermediate_size", 3 * layers * self.intermediate_size)
        self._limit_parameters("n_routed_experts", 3 * layers * self.moe_intermediate_size * self.n_routed_experts)

    def _require_sizes(self, *names: str, optional: bool = False) -> None:
        if not any(getattr(self, name) for name in _EXPERT_SIZES):
            names = tuple(name for name in names if name not in _EXPERT_SIZES)
        super()._require_sizes(*names, optional=optional)

    def _validate_attention(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        types, layers = self.layer_types, self.num_hidden_layers
        if self.is_mla:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                self._require(name, getattr(self, name) is not None, "a size, because kv_lora_rank selects MLA")
            for name, ok, allowed in (
                ("qk_nope_head_dim", 0 <= (self.qk_nope_head_dim or 0) <= MAX_SIZE, f"an integer from 0 to {MAX_SIZE}"),
                ("num_key_value_heads", kv_heads in (None, heads), f"None or num_attention_heads ({heads}) with MLA"),
                ("head_dim", self.head_dim is None, "None with MLA, which has qk_nope_head_dim and qk_rope_head_dim"),
                ("qk_norm", self.qk_norm == "none", "'none' with MLA, whose latents are normalised"),
                ("attention_sinks", not self.attention_sinks, "False with MLA"),
                ("sliding_window", self.sliding_window is None, "None with MLA"),
            ):
                self._require(name, ok, allowed)
            rope = self.rope_parameters
            rope._require("partial_rotary_factor", rope.partial_rotary_factor == 1, "1 with MLA")
        else:
            for name in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                self._require(name, getattr(self, name) is None, "None without kv_lora_rank (grouped-query attention)")
            divides = heads % (kv_heads or heads) == 0
            self._require("num_key_value_heads", divides, f"a divisor of num_attention_heads ({heads})")
            fits = self.head_dim is not None or self.hidden_size % heads == 0
            self._require("hidden_size", fits, f"a multiple of num_attention_heads ({heads}), or a head_dim")
        name = "qk_rope_head_dim" if self.is_mla else ("head_dim" if self.head_dim is not None else "hidden_size")
        even = self.rope_dim % 2 == 0 and self.rope_dim > 0
        self._require(name, even, f"an even rotary dimension; found {self.rope_dim}")
        complete = types is None or len(types) == layers
        self._require("layer_types", complete, f"None or {layers} entries, one for each layer")
        slides = types is None or "sliding_attention" not in types or self.sliding_window is not None
        self._require("sliding_window", slides, "a size, because layer_types has sliding_attention")


class OpenConfig(ModelConfig):
    """Config of a `Transformer`: its fields are frozen, but other libraries may set further attributes.

    transformers' Trainer, for example, sets `use_cache`. This library neither reads nor saves such attributes. Values
    of `extra` can be read as attributes.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden", "losses", "load"]
    """Values of `moe.output.Output` that trainers must not collect over evaluation batches."""

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)})

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self).get("extra", {}):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.extra[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self.to_dict() == other.to_dict()

    def get_text_config(self, **_: Any) -> Self:
        """Return this config, because the model is text-only."""
        return self

    def to_json_string(self, **_: Any) -> str:
        """Return `to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=2)


# Allowed values of a field by its type, for errors. A Literal lists its own.
_ALLOWED: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    RopeParameters: "a RopeParameters",
    Mapping[str, Any]: "a mapping",
    tuple[int, ...]: "a list of integers",
    tuple[LayerType, ...]: f"None or a list of {' and '.join(get_args(LayerType))}",
}


def _is_a(kind: Any, value: Any) -> bool:
    """Return whether `value` is valid for a field of type `kind`: bool is not int, int is float, floats are finite."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(get_args(kind)[0], each) for each in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is not float:
        return isinstance(value, get_origin(kind) or kind)
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
