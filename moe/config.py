"""What a model is: frozen dataclasses with Hugging Face's field names, each setting listed once. No torch here.

A `ModelConfig` inherits the settings of its Mixture-of-Experts layers from `MoEConfig`, which inherits those of the
router and of the experts. None can exist in a state that makes no sense: `validate()` runs when one is made (also by
`dataclasses.replace`) and names the field, the value and what is allowed.
"""

import dataclasses
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
MAX_LENGTH = MAX_SIZE * 64  # of positions
MAX_PARAMETERS = 2**46  # a hundred times the largest released model


@dataclass(frozen=True)
class _Settings:
    """Base of the dataclasses of this module: checks when one is made, and conversion from and to plain values."""

    where: ClassVar[str] = ""  # precedes the names of fields in errors

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError` for the first field that makes no sense. Allocates nothing."""
        for f in dataclasses.fields(self):
            value, optional = getattr(self, f.name), isinstance(f.type, UnionType)
            kind = get_args(f.type)[0] if optional else f.type
            if not _is_a(kind, value) and not (value is None and optional):
                # Looked up only now: torch.compile, which may have to trace a SwiGLU being made, cannot hash a type.
                raise ConfigError(
                    self.where + f.name, value, _ALLOWED.get(kind) or f"one of {', '.join(get_args(kind))}"
                )

    @classmethod
    def check_names(cls, values: Mapping[str, Any]) -> None:
        """Raise `ConfigError` for the first name that is not a field, with the nearest name that is."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{cls.where}{name}", values[name], f"no such field{did_you_mean(name, known)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make one from plain values. Raises `ConfigError` if a field does not exist or a required one is missing."""
        cls.check_names(values)
        for f in dataclasses.fields(cls):
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in values:
                raise ConfigError(cls.where + f.name, None, "a value: the field is required")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, such that `from_dict(to_dict())` equals the original."""
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
    """Rotary embedding, in the form of Hugging Face's `rope_parameters`.

    rope_type "yarn" is always on when configured (DeepSeek's own code applies it only past the original length).
    attention_factor multiplies cos and sin; None derives it from factor, mscale and mscale_all_dim.
    mscale_all_dim also raises the softmax scale of MLA by (0.1 * mscale_all_dim * ln(factor) + 1)^2.
    partial_rotary_factor is the share of a head's dimensions, the first ones, that rotate (grouped-query attention).
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
            self._require(name, value is None or value >= 0, "None or a number from 0 up")
        factor = self.attention_factor
        self._require("attention_factor", factor is None or factor > 0, "None or a number above 0")
        if self.rope_type == "default":
            self._require("factor", self.factor in (None, 1), "None for rope_type 'default'")
        else:
            self._require(
                "factor", self.factor is not None and self.factor >= 1, "a number from 1 up for rope_type 'yarn'"
            )
            original = self.original_max_position_embeddings
            self._require(
                "original_max_position_embeddings",
                original is not None and 1 <= original <= MAX_LENGTH,
                "a positive length for rope_type 'yarn'",
            )


@dataclass(frozen=True)
class SwiGLU(_Settings):
    """The gated activation of experts; `moe.ops.swiglu` defines it. The default is silu(gate) * up.

    limit (None: no clamping) bounds the gate half from above and the up half on both sides, alpha multiplies the gate
    inside the sigmoid, beta is added to the up half. Raises ConfigError, a ValueError, for a limit that is not
    positive and for values that are not finite.
    """

    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def validate(self) -> None:
        super().validate()
        self._require("limit", self.limit is None or self.limit > 0, "a positive number, or None for no clamping")


@dataclass(frozen=True)
class ExpertsConfig(_Settings):
    """The experts of a Mixture-of-Experts layer.

    The shared expert, which every token uses, has the width n_shared_experts * moe_intermediate_size, or
    shared_expert_intermediate_size; with shared_expert_gate its output is multiplied by a sigmoid of the token.
    expert_bias adds biases to the projections of routed experts, and swiglu_limit, swiglu_alpha and swiglu_beta are the
    fields of their `SwiGLU`.
    """

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
        """The activation of routed experts."""
        return SwiGLU(self.swiglu_limit, self.swiglu_alpha, self.swiglu_beta)

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared expert; 0 for none."""
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
    """The router of a Mixture-of-Experts layer.

    `topk_method` decides selection as in DeepSeek's configs:

    - "noaux_tc": a correction bias is added for selection only; a group's score is the sum of its two best experts.
    - "group_limited_greedy": no bias; a group's score is its best expert.
    - "greedy": no bias, no groups.

    With norm_topk_prob, a token's weights are divided by their sum, or by moe_norm_min if the sum is smaller.
    router_bias adds a bias to the logits.
    """

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
        """The keyword arguments of `moe.ops.route`."""
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
        """Why the model's loss does not reach the router, whatever it is; None if it does.

        Such layers compute what their files say, so they are legal. A layer warns when it is trained.
        """
        if self.norm_topk_prob and self.num_experts_per_tok == 1 and self.moe_norm_min < 0.5:
            way_out = "norm_topk_prob=False or a larger num_experts_per_tok"
            return f"norm_topk_prob with num_experts_per_tok = 1: the only weight is w / w = 1; use {way_out}"
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
        self._require("moe_norm_min", self.moe_norm_min >= 0, "a number from 0 up")


@dataclass(frozen=True)
class MoEConfig(RouterConfig, ExpertsConfig):
    """A Mixture-of-Experts layer: router, experts and losses.

    `aux_loss_alpha` scales the balance loss, per sequence when `seq_aux`, else over the whole batch;
    `router_z_loss_coef` scales the mean squared logsumexp of the router's logits. `initializer_range` is the standard
    deviation of initial weights.
    """

    _: KW_ONLY
    aux_loss_alpha: float = 0.0
    seq_aux: bool = True
    router_z_loss_coef: float = 0.0
    initializer_range: float = 0.02

    def validate(self) -> None:
        super().validate()
        for name in ("aux_loss_alpha", "router_z_loss_coef"):
            self._require(name, getattr(self, name) >= 0, "a number from 0 up")
        self._require("initializer_range", 0 < self.initializer_range < 1, "a number between 0 and 1")
        self._limit_parameters("n_routed_experts", 3 * self.moe_intermediate_size * self.n_routed_experts)

    def _limit_parameters(self, name: str, rows: int) -> None:
        # A product, not the exact count: this guard must not depend on code that the config feeds.
        count = rows * self.hidden_size
        self._require(name, count <= MAX_PARAMETERS, f"a size that makes at most 2^46 parameters; it makes {count:.3g}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(MoEConfig):
    """A transformer with Mixture-of-Experts layers, which `MoEConfig` describes.

    Attention is MLA when `kv_lora_rank` is a number and grouped-query attention when it is None.
    MLA uses q_lora_rank (None: no compression of q), qk_nope_head_dim, qk_rope_head_dim and v_head_dim;
    grouped-query attention uses num_key_value_heads, head_dim, qk_norm ("head": each query and key head is normalised;
    "whole": all heads of a token together), attention_sinks (a learnt logit for each head that takes attention and
    gives nothing) and sliding_window: a query sees that many tokens, itself included, in the layers that `layer_types`
    calls "sliding_attention" (None: in all). attention_bias is of the projections of q, k and v;
    attention_output_bias of the output's (None: as attention_bias). rope_interleave rotates pairs (2i, 2i + 1) of a
    head's dimensions instead of (i, i + half); None becomes True with MLA and False without, as in released models.

    Layer i has experts if i >= first_k_dense_replace, it is not in mlp_only_layers and i + 1 is a multiple of
    decoder_sparse_step; other layers have a dense MLP of intermediate_size. `mtp_loss_weight` is the lambda of
    multi-token prediction. `model_type` is Hugging Face's and decides the checkpoint layout only. `extra` holds values
    of a config.json that nothing here reads; they are written back on save.
    """

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
        """How many of a head's dimensions rotate."""
        rotary = self.qk_rope_head_dim or 0
        return rotary if self.is_mla else int(self.qk_head_dim * self.rope_parameters.partial_rotary_factor)

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, without those of the MTP modules."""
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    def is_moe_layer(self, index: int) -> bool:
        dense = index < self.first_k_dense_replace or index in self.mlp_only_layers
        return not dense and (index + 1) % self.decoder_sparse_step == 0

    def is_sliding_layer(self, index: int) -> bool:
        types = self.layer_types
        return self.sliding_window is not None and (types is None or types[index] == "sliding_attention")

    def family_problems(self) -> tuple[str, ...]:
        """Why checkpoint files of `model_type` cannot express this config, one line for each reason; empty if they can.

        Every valid config builds and trains. A save refuses a config whose files would lack something, or would mean
        something else in transformers, vLLM, SGLang or llama.cpp. Fields without effect are ignored.
        """
        import moe  # the lazy package: families of files are built on configs, and not the reverse

        return moe.family_problems(self)

    def idle_parameters(self) -> tuple[str, ...]:
        """Which parameters outside the routers the loss cannot change, and why, one line each; usually none.

        Such models compute what their files say, so they are legal. `Transformer` warns when it is trained.
        """
        slides = not self.attention_sinks and any(map(self.is_sliding_layer, range(self.num_hidden_layers)))
        reasons = {
            "all: a vocabulary of one token makes the loss 0": self.vocab_size == 1,
            "mtp: mtp_loss_weight is 0; use num_nextn_predict_layers=0, or moe.load(..., mtp=False)": (
                self.num_nextn_predict_layers > 0 and self.mtp_loss_weight == 0
            ),
            "q_proj, k_proj and their norms: in a sliding_window of 1 a token sees itself only; use at least 2": (
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
        self._require("mtp_loss_weight", self.mtp_loss_weight >= 0, "a number from 0 up")
        self._limit_parameters("vocab_size", self.vocab_size)
        self._limit_parameters("intermediate_size", 3 * layers * self.intermediate_size)
        self._limit_parameters("n_routed_experts", 3 * layers * self.moe_intermediate_size * self.n_routed_experts)

    def _validate_attention(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        types, layers = self.layer_types, self.num_hidden_layers
        if self.is_mla:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                self._require(name, getattr(self, name) is not None, "a size, because kv_lora_rank asks for MLA")
            for name, ok, allowed in (
                ("qk_nope_head_dim", 0 <= (self.qk_nope_head_dim or 0) <= MAX_SIZE, f"an integer from 0 to {MAX_SIZE}"),
                ("num_key_value_heads", kv_heads in (None, heads), f"None or num_attention_heads ({heads}) with MLA"),
                ("head_dim", self.head_dim is None, "None with MLA (qk_nope_head_dim and qk_rope_head_dim decide)"),
                ("qk_norm", self.qk_norm == "none", "'none' with MLA (its latents are normalised)"),
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
        self._require(name, even, f"an even rotary dimension; it is {self.rope_dim}")
        listed = types is None or len(types) == layers
        self._require("layer_types", listed, f"None or {layers} entries, one for each layer")
        slides = types is None or "sliding_attention" not in types or self.sliding_window is not None
        self._require("sliding_window", slides, "a size, because layer_types has sliding_attention")


# What the value of a field may be, by its type. A Literal lists its own.
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
    """Whether a field of type `kind` may have the value. bool is not int; int passes for float; floats are finite."""
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
    except OverflowError:  # an integer beyond all floats
        return False
