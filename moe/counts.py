"""Names and shapes of a model's tensors, and parameter counts, computed from its config without torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of a model, correction biases included.

    A count is the number of values in the state dict, so tied embeddings count once. "Activated" parameters are those
    that one token uses: all except the routed experts that it is not sent to.

    Attributes:
        embedding, attention, dense_mlp, routed_experts, shared_experts, routers, norms, head: components of the main
            model. `attention` includes its projections and norms; `norms` has all other norms; `routers` includes the
            correction biases.
        mtp: multi-token prediction modules, without the embedding and head that they share with the main model.
        activated: activated parameters, with embedding and head.
        activated_without_embedding: activated parameters as usually quoted (37B for DeepSeek-V3).
        released: all parameters, with embedding and head repeated for each MTP module, as in released files.
    """

    embedding: int
    attention: int
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    routers: int
    norms: int
    head: int
    mtp: int
    activated: int
    activated_without_embedding: int
    released: int

    @property
    def total(self) -> int:
        """Parameters of the main model."""
        parts = (self.embedding, self.attention, self.dense_mlp, self.routed_experts)
        return sum(parts) + self.shared_experts + self.routers + self.norms + self.head

    @property
    def with_mtp(self) -> int:
        return self.total + self.mtp


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return name -> shape for every tensor of `Transformer(config).state_dict()`."""
    width = config.hidden_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": s for name, s in _block(config, has_experts=config.is_moe_layer(i))}
    shapes["norm.weight"] = (width,)
    for k in range(config.num_nextn_predict_layers):
        shapes |= {f"mtp.{k}.{name}": s for name, s in _mtp(config)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters from their shapes, without building the model."""
    parts = dict.fromkeys(_COMPONENTS.values(), 0)
    blocks = (
        (config.num_hidden_layers - config.num_moe_layers, _block(config, has_experts=False)),
        (config.num_moe_layers, _block(config, has_experts=True)),
    )
    for layers, block in blocks:
        for name, shape in block:
            parts[_component(name)] += layers * math.prod(shape)
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    mtp = sum(math.prod(shape) for _, shape in _mtp(config))
    modules = config.num_nextn_predict_layers
    parts["norms"] += config.hidden_size

    rest = sum(parts.values()) - parts["routed_experts"] + embedding + head
    used = activated(parts["routed_experts"], config)
    return ParameterCounts(
        embedding=embedding,
        head=head,
        mtp=modules * mtp,
        activated=rest + used,
        # A tied embedding is also the head, by which every token is multiplied.
        activated_without_embedding=rest + used - (embedding if head else 0),
        released=rest + parts["routed_experts"] + modules * (mtp + 2 * embedding),
        **parts,
    )


def activated(experts: int, config: ModelConfig) -> int:
    """Return how many of the parameters of routed experts one token uses."""
    return experts * config.num_experts_per_tok // max(config.n_routed_experts, 1)


_COMPONENTS = {
    "self_attn": "attention",
    "mlp": "dense_mlp",
    "mlp.experts": "routed_experts",
    "mlp.shared_experts": "shared_experts",
    "mlp.shared_expert_gate": "shared_experts",
    "mlp.gate": "routers",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}


def _component(name: str) -> str:
    """Return the component of a block's tensor: that of the longest prefix in the table."""
    while name not in _COMPONENTS:
        name = name.rpartition(".")[0]
    return _COMPONENTS[name]


def _block(config: ModelConfig, *, has_experts: bool) -> list[tuple[str, Shape]]:
    width = config.hidden_size
    return [
        ("input_layernorm.weight", (width,)),
        *((f"self_attn.{name}", shape) for name, shape in _attention(config)),
        ("post_attention_layernorm.weight", (width,)),
        *((f"mlp.{name}", shape) for name, shape in (_experts(config) if has_experts else _mlp(config))),
    ]


def _mtp(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    width = config.hidden_size
    yield from ((f"{name}.weight", (width,)) for name in ("enorm", "hnorm", "norm"))
    yield "eh_proj.weight", (width, 2 * width)
    yield from ((f"block.{name}", shape) for name, shape in _block(config, has_experts=True))


def _attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    width, heads, dim = config.hidden_size, config.num_attention_heads, config.qk_head_dim
    biased: dict[str, Shape]
    if config.kv_lora_rank is not None:
        latent, rope, nope = config.kv_lora_rank, config.qk_rope_head_dim or 0, config.qk_nope_head_dim or 0
        value = config.v_head_dim or 0
        biased = {"kv_a_proj_with_mqa": (latent + rope, width), "o_proj": (width, heads * value)}
        if config.q_lora_rank is None:
            yield "q_proj.weight", (heads * dim, width)
        else:
            biased["q_a_proj"] = (config.q_lora_rank, width)
            yield "q_a_layernorm.weight", (config.q_lora_rank,)
            yield "q_b_proj.weight", (heads * dim, config.q_lora_rank)
        yield "kv_a_layernorm.weight", (latent,)
        yield "kv_b_proj.weight", (heads * (nope + value), latent)
    else:
        kv = (config.num_key_value_heads or heads) * dim
        biased = {"q_proj": (heads * dim, width), "k_proj": (kv, width), "v_proj": (kv, width)}
        biased["o_proj"] = (width, heads * dim)
        if config.qk_norm != "none":
            yield "q_norm.weight", (dim,) if config.qk_norm == "head" else (heads * dim,)
            yield "k_norm.weight", (dim,) if config.qk_norm == "head" else (kv,)
        if config.attention_sinks:
            yield "sinks", (heads,)
    for name, shape in biased.items():
        yield f"{name}.weight", shape
        if config.output_bias if name == "o_proj" else config.attention_bias:
            yield f"{name}.bias", shape[:1]


def _mlp(config: ModelConfig, prefix: str = "", hidden: int | None = None) -> Iterator[tuple[str, Shape]]:
    width, hidden = config.hidden_size, hidden or config.intermediate_size
    yield f"{prefix}gate_proj.weight", (hidden, width)
    yield f"{prefix}up_proj.weight", (hidden, width)
    yield f"{prefix}down_proj.weight", (width, hidden)


def _experts(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    width, hidden, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield "gate.weight", (experts, width)
    if config.router_bias:
        yield "gate.bias", (experts,)
    if config.topk_method == "noaux_tc":
        yield "gate.e_score_correction_bias", (experts,)
    yield "experts.gate_up_proj", (experts, 2 * hidden, width)
    yield "experts.down_proj", (experts, width, hidden)
    if config.expert_bias:
        yield "experts.gate_up_proj_bias", (experts, 2 * hidden)
        yield "experts.down_proj_bias", (experts, width)
    if config.shared_width:
        yield from _mlp(config, "shared_experts.", config.shared_width)
        if config.shared_expert_gate:
            yield "shared_expert_gate.weight", (1, width)
