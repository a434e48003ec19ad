"""Size of a model on disk and per GPU, computed from a configuration or file headers, without torch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe.checkpoint.format.contents import Contents
from moe.checkpoint.format.dtypes import FLOATING, SAFETENSORS, Dtype
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.layout import TensorSpec, fp8_names, layout, with_scales
from moe.config import ModelConfig
from moe.counts import count_parameters, parameter_shapes
from moe.errors import ConfigError

SIZES = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes per value of safetensors dtypes
FP8_BLOCK = (128, 128)
BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Stored:
    """Size of a checkpoint: number of tensors, number of values by safetensors dtype, and bytes."""

    tensors: int
    values: Mapping[str, int]
    bytes: int


def stored(
    config: ModelConfig, dtype: Dtype, block_size: tuple[int, int] = FP8_BLOCK, like: Contents | None = None
) -> Stored:
    """Size of the checkpoint of a configuration in its family's layout, with the embeddings that MTP modules repeat.

    With `like`, files of the same model, the layout is theirs if it supports the dtype, and embeddings are repeated
    only if they are there. Raises ConfigError if the family has no layout for the dtype.
    """
    dtypes = _dtypes(config, dtype, block_size, like)
    values: dict[str, int] = {}
    for spec, stored_dtype in dtypes:
        values[stored_dtype] = values.get(stored_dtype, 0) + math.prod(spec.shape)
    return Stored(len(dtypes), values, sum(SIZES[stored_dtype] * number for stored_dtype, number in values.items()))


def stored_in(files: Contents) -> Stored:
    """Size of all tensors in a folder."""
    values: dict[str, int] = {}
    for info in files.tensors.values():
        values[info.dtype] = values.get(info.dtype, 0) + info.numel
    return Stored(len(files.tensors), values, sum(info.nbytes for info in files.tensors.values()))


def dtype_of(files: Contents) -> Dtype:
    """Dtype of a folder's weights: that of the quantised ones, otherwise the most common one."""
    if files.quantization is not None and files.has_quantised_tensors:
        return "fp8" if files.quantization.method == "fp8" else "mxfp4"
    values = stored_in(files).values
    return max(FLOATING, key=lambda name: values.get(SAFETENSORS[name], 0))


def _dtypes(
    config: ModelConfig, dtype: Dtype, block_size: tuple[int, int], like: Contents | None
) -> list[tuple[TensorSpec, str]]:
    """Tensors of a checkpoint, each with its safetensors dtype."""
    tables = family_of(config.model_type, CONFIG).tables
    first = next(iter(tables))
    name = "mxfp4" if dtype == "mxfp4" else like.table if like is not None and like.table != "mxfp4" else first
    if name not in tables:
        raise ConfigError("dtype", dtype, f"fp8, bf16, fp16, fp32 or fp64 for {config.model_type}")
    specs = _written(config, name)
    if dtype == "fp8" and _stacks_experts(specs):
        name, specs = first, _written(config, first)
    if like is not None and not any(spec.repeat and n in like.tensors for n, spec in like.specs.items()):
        specs = {n: spec for n, spec in specs.items() if not spec.repeat}
    codes: set[str] = set()
    if dtype == "fp8":
        if _stacks_experts(specs):
            raise ConfigError(
                "dtype", dtype, f"bf16, fp16, fp32, fp64 or mxfp4 for {config.model_type}, whose files stack experts"
            )
        codes = set(fp8_names(specs))
        specs = with_scales(specs, tables[name], block_size, codes)
    return [(spec, _dtype(n, spec, codes, dtype)) for n, spec in specs.items()]


def _written(config: ModelConfig, table: str) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in layout(config, table).items() if spec.written}


def _stacks_experts(specs: Mapping[str, TensorSpec]) -> bool:
    return any(".mlp.experts." in spec.parameter and not spec.index for spec in specs.values())


def _dtype(name: str, spec: TensorSpec, codes: set[str], dtype: Dtype) -> str:
    if name in codes:
        return "F8_E4M3"
    if spec.parameter.endswith(("_blocks", "_scales")):
        return "U8"
    if spec.scale_of is not None or spec.parameter.endswith(BIAS):
        return "F32"
    return SAFETENSORS[dtype] if dtype in FLOATING else "BF16"


@dataclass(frozen=True)
class Deployment:
    """Distribution of a model over GPUs.

    Attributes:
        gpus: number of GPUs that share one model.
        ep: number of GPUs that divide the experts of a layer. Training shards parameters, gradients and optimizer state
            (FSDP): those of experts over gpus / ep GPUs, all others over `gpus`.
        dtype: dtype of the weights for inference.
        tokens: tokens per GPU: in the KV cache, or in a training step.
        block_size: block size of FP8 weights.
    """

    gpus: int
    ep: int
    dtype: Dtype
    tokens: int
    block_size: tuple[int, int] = FP8_BLOCK


@dataclass(frozen=True)
class Estimate:
    """Memory of one GPU: bytes by part, the assumptions, and its number of experts per layer."""

    experts: int
    parts: Mapping[str, int]
    assumptions: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def check(config: ModelConfig, deployment: Deployment) -> None:
    """Raise `ConfigError` if the numbers of a deployment do not fit together."""
    for name in ("gpus", "ep", "tokens"):
        if getattr(deployment, name) < 1:
            raise ConfigError(name, getattr(deployment, name), "a positive integer")
    if deployment.gpus % deployment.ep:
        raise ConfigError("ep", deployment.ep, f"a divisor of the {deployment.gpus} GPUs")
    if deployment.ep > max(config.n_routed_experts, 1):
        most = f"at most the {config.n_routed_experts} experts of a layer"
        raise ConfigError("ep", deployment.ep, most if config.n_routed_experts else "1 for a model without experts")


def inference(config: ModelConfig, deployment: Deployment, files: Contents | None = None) -> Estimate:
    """Estimate weights, KV cache and peak activations for inference, on the GPU that needs most memory.

    With `files`, weights are counted as stored there, or in their layout if their dtype differs.
    """
    check(config, deployment)
    like, files = files, files if files is not None and dtype_of(files) == deployment.dtype else None
    weights = _weights(config, deployment, like) if files is None else _weights_in(files, deployment)
    size = 2  # bytes per value of activations and cache, for any dtype of the weights
    cache = deployment.tokens * config.num_hidden_layers * _cache_values(config) * size
    parts = {"experts": weights[0], "other weights": weights[1], "cache": cache}
    parts["activations"] = _forward_values(config, deployment.ep, min(deployment.tokens, 8192)) * size
    replicated = "everything except experts is on every GPU (no tensor parallelism)"
    if not config.has_experts:
        replicated = "the whole model is on every GPU (no tensor parallelism)"
    if files is None:
        rest = {
            "fp8": f"FP8: projections in blocks of {' x '.join(map(str, deployment.block_size))} with fp32 scales, "
            "the rest bf16",
            "mxfp4": "MXFP4: experts, the rest bf16",
        }
        held = (f"weights {deployment.dtype}; {replicated}", rest.get(deployment.dtype, ""))
    else:
        lacking = f"{len(files.missing):,} tensors missing from the files are not counted" if files.missing else ""
        held = (f"weights in the dtypes of the files; {replicated}", lacking)
    assumptions = (
        *held,
        f"cache and activations bf16; cache for {deployment.tokens:,} tokens per GPU, {_cache_values(config):,} values "
        "per token and layer",
        f"prefill in chunks of at most 8,192 tokens{_balanced(config)}",
    )
    return Estimate(_share(config, deployment.ep), parts, tuple(filter(None, assumptions)))


def training(config: ModelConfig, deployment: Deployment) -> Estimate:
    """Estimate parameters, gradients, AdamW state and activations for training, on the GPU that needs most memory."""
    check(config, deployment)
    counts = count_parameters(config)
    share = _share(config, deployment.ep)
    experts = math.ceil(_experts(config) * share / max(config.n_routed_experts, 1) / (deployment.gpus // deployment.ep))
    others = math.ceil((counts.with_mtp - _experts(config)) / deployment.gpus)
    mine = experts + others
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    largest = _block(config, share)
    logits = deployment.tokens * config.vocab_size * 4 * 2
    saved = deployment.tokens * config.hidden_size * blocks * 2
    parts = {
        "parameters": mine * 4,
        "gradients": mine * 4,
        "optimizer": mine * 8,
        "a gathered block": largest * 2,
        "saved activations": saved,
        "a block's activations": 3 * _forward_values(config, deployment.ep, deployment.tokens) * 2,
        "logits": logits,
    }
    assumptions = (
        "parameters, gradients and both moments of AdamW in fp32, sharded over all GPUs that hold the same parameters",
        "one block gathered in bf16 while it is computed",
        f"{deployment.tokens:,} tokens per GPU and micro-batch; block inputs kept in bf16, the rest recomputed",
        f"logits and their gradient in fp32, not chunked{_balanced(config).replace(',', ';')}",
    )
    return Estimate(share, parts, assumptions)


def _balanced(config: ModelConfig) -> str:
    return ", experts balanced" if config.has_experts else ""


def _share(config: ModelConfig, ep: int) -> int:
    """Experts of one layer on the GPU that holds most."""
    return math.ceil(config.n_routed_experts / ep)


def _experts(config: ModelConfig) -> int:
    """Parameters of all routed experts, including those of MTP modules."""
    each = 3 * config.hidden_size * config.moe_intermediate_size
    each += (2 * config.moe_intermediate_size + config.hidden_size) if config.expert_bias else 0
    return each * config.n_routed_experts * (config.num_moe_layers + config.num_nextn_predict_layers)


def _weights(config: ModelConfig, deployment: Deployment, like: Contents | None) -> tuple[int, int]:
    """Bytes per GPU of experts, and of all other tensors, in a dtype."""
    dtypes = _dtypes(config, deployment.dtype, deployment.block_size, like)
    sizes = ((spec, math.prod(spec.shape) * SIZES[stored_dtype]) for spec, stored_dtype in dtypes)
    return _per_gpu(config, deployment.ep, sizes)


def _weights_in(files: Contents, deployment: Deployment) -> tuple[int, int]:
    """Bytes per GPU of experts, and of all other tensors, as stored in a folder."""
    sizes = ((spec, files.tensors[name].nbytes) for name, spec in files.specs.items() if name in files.tensors)
    return _per_gpu(files.config, deployment.ep, sizes)


def _per_gpu(config: ModelConfig, ep: int, sizes: Iterable[tuple[TensorSpec, int]]) -> tuple[int, int]:
    """Bytes per GPU of experts, and of all other tensors; repeated embeddings count once."""
    total = experts = 0
    for spec, nbytes in sizes:
        total += 0 if spec.repeat else nbytes
        experts += nbytes if ".mlp.experts." in spec.parameter else 0
    return math.ceil(experts * _share(config, ep) / max(config.n_routed_experts, 1)), total - experts


def _cache_values(config: ModelConfig) -> int:
    """Cached values per token and layer; sliding windows are not deducted."""
    if config.kv_lora_rank is not None:
        return config.kv_lora_rank + config.rope_dim
    return 2 * (config.num_key_value_heads or config.num_attention_heads) * config.qk_head_dim


def _block(config: ModelConfig, share: int) -> int:
    """Parameters of the largest block or MTP module, with one GPU's share of the experts."""
    sizes: dict[tuple[str, ...], int] = {}
    for name, shape in parameter_shapes(config).items():
        unit = tuple(name.split(".")[:2])
        if unit[0] in ("layers", "mtp"):
            mine = (share, *shape[1:]) if ".mlp.experts." in name else shape
            sizes[unit] = sizes.get(unit, 0) + math.prod(mine)
    return max(sizes.values())


def _forward_values(config: ModelConfig, ep: int, tokens: int) -> int:
    """Peak number of activation values in a block for `tokens` per GPU, usually at the routed rows."""
    rows = tokens * config.num_experts_per_tok
    routed = rows * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
    attention = tokens * config.num_attention_heads * config.qk_head_dim * 4
    return 4 * tokens * config.hidden_size + max(routed, attention)
