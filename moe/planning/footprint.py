"""What a model weighs on disk and on each GPU of a group, from a configuration or headers: no torch, no weights."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe.checkpoint.format.comparison import Plan
from moe.checkpoint.format.dtypes import FLOATING, SAFETENSORS, Dtype
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.layout import Slot, fp8_names, layout, with_scales
from moe.config import ModelConfig
from moe.counts import count_parameters, parameter_shapes
from moe.errors import ConfigError

SIZES = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # of safetensors' dtypes
FP8_BLOCK = (128, 128)
BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Stored:
    """A checkpoint's tensors: how many, values and bytes by safetensors' dtype."""

    tensors: int
    values: Mapping[str, int]
    bytes: int


def stored(
    config: ModelConfig, dtype: Dtype, block_size: tuple[int, int] = FP8_BLOCK, like: Plan | None = None
) -> Stored:
    """The checkpoint of a configuration in its family's own layout, MTP modules' repeated embeddings included.

    With `like`, files of the same model, it has their layout if that can hold the dtype, and repeats only if they do.
    Raises ConfigError where the family has no layout for the dtype.
    """
    kinds = _kinds(config, dtype, block_size, like)
    values: dict[str, int] = {}
    for slot, kind in kinds:
        values[kind] = values.get(kind, 0) + math.prod(slot.shape)
    return Stored(len(kinds), values, sum(SIZES[kind] * number for kind, number in values.items()))


def stored_in(files: Plan) -> Stored:
    """The tensors that a folder has, all of them."""
    values: dict[str, int] = {}
    for info in files.tensors.values():
        values[info.dtype] = values.get(info.dtype, 0) + info.numel
    return Stored(len(files.tensors), values, sum(info.nbytes for info in files.tensors.values()))


def dtype_of(files: Plan) -> Dtype:
    """The name of what a folder's weights are stored in: the quantised ones', otherwise that of most values."""
    if files.quantization is not None and files.has_quantised_tensors:
        return "fp8" if files.quantization.method == "fp8" else "mxfp4"
    values = stored_in(files).values
    return max(FLOATING, key=lambda name: values.get(SAFETENSORS[name], 0))


def _kinds(config: ModelConfig, dtype: Dtype, block_size: tuple[int, int], like: Plan | None) -> list[tuple[Slot, str]]:
    """The tensors of a checkpoint, and the safetensors dtype of each."""
    tables = family_of(config.model_type, CONFIG).tables
    first = next(iter(tables))
    name = "mxfp4" if dtype == "mxfp4" else like.table if like is not None and like.table != "mxfp4" else first
    if name not in tables:
        raise ConfigError("dtype", dtype, f"fp8, bf16, fp16, fp32 or fp64 for {config.model_type}")
    slots = _written(config, name)
    if dtype == "fp8" and _stacks_experts(slots):
        name, slots = first, _written(config, first)
    if like is not None and not any(slot.repeat and n in like.tensors for n, slot in like.slots.items()):
        slots = {n: slot for n, slot in slots.items() if not slot.repeat}
    codes: set[str] = set()
    if dtype == "fp8":
        if _stacks_experts(slots):
            raise ConfigError(
                "dtype", dtype, f"bf16, fp16, fp32, fp64 or mxfp4 for {config.model_type}, whose files stack experts"
            )
        codes = set(fp8_names(slots))
        slots = with_scales(slots, tables[name], block_size, codes)
    return [(slot, _kind(n, slot, codes, dtype)) for n, slot in slots.items()]


def _written(config: ModelConfig, table: str) -> dict[str, Slot]:
    return {name: slot for name, slot in layout(config, table).items() if slot.written}


def _stacks_experts(slots: Mapping[str, Slot]) -> bool:
    return any(".mlp.experts." in slot.parameter and not slot.index for slot in slots.values())


def _kind(name: str, slot: Slot, codes: set[str], dtype: Dtype) -> str:
    if name in codes:
        return "F8_E4M3"
    if slot.parameter.endswith(("_blocks", "_scales")):
        return "U8"
    if slot.scale_of is not None or slot.parameter.endswith(BIAS):
        return "F32"
    return SAFETENSORS[dtype] if dtype in FLOATING else "BF16"


@dataclass(frozen=True)
class Placement:
    """How a model is spread over GPUs.

    `gpus` hold it together; the experts of each layer are divided among groups of `ep`. Training shards parameters,
    gradients and optimizer over all GPUs that hold the same (FSDP): `gpus` for what is not an expert's, `gpus / ep`
    for experts. `tokens` per GPU are in its cache, or go through it in one training step.
    `block_size` is that of FP8 weights.
    """

    gpus: int
    ep: int
    dtype: Dtype
    tokens: int
    block_size: tuple[int, int] = FP8_BLOCK


@dataclass(frozen=True)
class Estimate:
    """Bytes of one GPU by part, and what they are assumed to be. `experts` is its share of each layer's."""

    experts: int
    parts: Mapping[str, int]
    assumptions: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def check(config: ModelConfig, placement: Placement) -> None:
    """Raise `ConfigError` for a placement that cannot be, naming the numbers."""
    for name in ("gpus", "ep", "tokens"):
        if getattr(placement, name) < 1:
            raise ConfigError(name, getattr(placement, name), "a positive integer")
    if placement.gpus % placement.ep:
        raise ConfigError("ep", placement.ep, f"a divisor of the {placement.gpus} GPUs")
    if placement.ep > config.n_routed_experts:
        raise ConfigError("ep", placement.ep, f"at most the {config.n_routed_experts} experts of a layer")


def inference(config: ModelConfig, placement: Placement, files: Plan | None = None) -> Estimate:
    """Weights, cache and the largest activations of a forward pass, on the GPU that holds most.

    Weights are those of `files`, as they are stored, if given; for another dtype than theirs, in their layout.
    """
    check(config, placement)
    like, files = files, files if files is not None and dtype_of(files) == placement.dtype else None
    weights = _weights(config, placement, like) if files is None else _weights_in(files, placement)
    size = 2  # of activations and cache, whatever the weights are
    cache = placement.tokens * config.num_hidden_layers * _cache_values(config) * size
    parts = {"experts": weights[0], "other weights": weights[1], "cache": cache}
    parts["activations"] = _forward_values(config, placement.ep, min(placement.tokens, 8192)) * size
    replicated = "everything except experts is on every GPU (no tensor parallelism)"
    if files is None:
        rest = {
            "fp8": f"FP8: projections in blocks of {' x '.join(map(str, placement.block_size))} with fp32 scales, "
            "the rest bf16",
            "mxfp4": "MXFP4: experts, the rest bf16",
        }
        held = (f"weights {placement.dtype}; {replicated}", rest.get(placement.dtype, ""))
    else:
        lacking = f"{len(files.missing):,} tensors are missing in the files and not counted" if files.missing else ""
        held = (f"weights in the dtypes of the files; {replicated}", lacking)
    assumptions = (
        *held,
        f"cache and activations bf16; cache for {placement.tokens:,} tokens per GPU, {_cache_values(config):,} values "
        "per token and layer",
        "prefill in chunks of at most 8,192 tokens, experts balanced",
    )
    return Estimate(_share(config, placement.ep), parts, tuple(filter(None, assumptions)))


def training(config: ModelConfig, placement: Placement) -> Estimate:
    """Parameters, gradients, AdamW and activations under recomputation, on the GPU that holds most."""
    check(config, placement)
    counts = count_parameters(config)
    share = _share(config, placement.ep)
    experts = math.ceil(_experts(config) * share / config.n_routed_experts / (placement.gpus // placement.ep))
    others = math.ceil((counts.with_mtp - _experts(config)) / placement.gpus)
    mine = experts + others
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    largest = _block(config, share)
    logits = placement.tokens * config.vocab_size * 4 * 2
    saved = placement.tokens * config.hidden_size * blocks * 2
    parts = {
        "parameters": mine * 4,
        "gradients": mine * 4,
        "optimizer": mine * 8,
        "a gathered block": largest * 2,
        "saved activations": saved,
        "a block's activations": 3 * _forward_values(config, placement.ep, placement.tokens) * 2,
        "logits": logits,
    }
    assumptions = (
        "parameters, gradients and both moments of AdamW in fp32, sharded over all GPUs that hold the same parameters",
        "one block gathered in bf16 while it is computed",
        f"{placement.tokens:,} tokens per GPU and micro-batch; each block's input is kept in bf16, the rest recomputed",
        "logits and their gradient in fp32, not chunked; experts balanced",
    )
    return Estimate(share, parts, assumptions)


def _share(config: ModelConfig, ep: int) -> int:
    return math.ceil(config.n_routed_experts / ep)


def _experts(config: ModelConfig) -> int:
    """Parameters of all routed experts, MTP modules' included."""
    each = 3 * config.hidden_size * config.moe_intermediate_size
    each += (2 * config.moe_intermediate_size + config.hidden_size) if config.expert_bias else 0
    return each * config.n_routed_experts * (config.num_moe_layers + config.num_nextn_predict_layers)


def _weights(config: ModelConfig, placement: Placement, like: Plan | None) -> tuple[int, int]:
    """Bytes of a GPU's experts, and of everything else."""
    kinds = _kinds(config, placement.dtype, placement.block_size, like)
    sizes = ((slot, math.prod(slot.shape) * SIZES[kind]) for slot, kind in kinds)
    return _on_a_gpu(config, placement.ep, sizes)


def _weights_in(files: Plan, placement: Placement) -> tuple[int, int]:
    """The same, of the tensors that a folder has for its model."""
    sizes = ((slot, files.tensors[name].nbytes) for name, slot in files.slots.items() if name in files.tensors)
    return _on_a_gpu(files.config, placement.ep, sizes)


def _on_a_gpu(config: ModelConfig, ep: int, sizes: Iterable[tuple[Slot, int]]) -> tuple[int, int]:
    """Bytes of experts and of everything else; embeddings that files repeat count once."""
    total = experts = 0
    for slot, nbytes in sizes:
        total += 0 if slot.repeat else nbytes
        experts += nbytes if ".mlp.experts." in slot.parameter else 0
    return math.ceil(experts * _share(config, ep) / config.n_routed_experts), total - experts


def _cache_values(config: ModelConfig) -> int:
    """Of one token in one layer; windows are not taken off."""
    if config.kv_lora_rank is not None:
        return config.kv_lora_rank + config.rope_dim
    return 2 * (config.num_key_value_heads or config.num_attention_heads) * config.qk_head_dim


def _block(config: ModelConfig, share: int) -> int:
    """Parameters of the largest block or MTP module, with a GPU's share of the experts."""
    sizes: dict[tuple[str, ...], int] = {}
    for name, shape in parameter_shapes(config).items():
        unit = tuple(name.split(".")[:2])
        if unit[0] in ("layers", "mtp"):
            mine = (share, *shape[1:]) if ".mlp.experts." in name else shape
            sizes[unit] = sizes.get(unit, 0) + math.prod(mine)
    return max(sizes.values())


def _forward_values(config: ModelConfig, ep: int, tokens: int) -> int:
    """Activations of the widest place of a block for so many tokens a GPU: a MoE layer's routed rows."""
    rows = tokens * config.num_experts_per_tok
    routed = rows * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
    attention = tokens * config.num_attention_heads * config.qk_head_dim * 4
    return 4 * tokens * config.hidden_size + max(routed, attention)
