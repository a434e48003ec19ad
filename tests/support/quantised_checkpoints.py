"""Small checkpoints in FP8 and MXFP4, as they are released."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe import ModelConfig, RopeParameters
from moe.ops import quantize_blocks, quantize_mxfp4
from tests.support.checkpoint_cases import configure

BLOCK = (8, 16)  # no size of the model is a multiple of both
GPT_OSS = ModelConfig(
    vocab_size=61,
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=64,
    moe_intermediate_size=64,
    n_routed_experts=6,
    num_experts_per_tok=2,
    attention_bias=True,
    attention_sinks=True,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
    expert_bias=True,
    router_bias=True,
    swiglu_limit=7.0,
    swiglu_alpha=1.702,
    swiglu_beta=1.0,
    rope_parameters=RopeParameters(
        rope_theta=150000.0, rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, truncate=False
    ),
    scoring_func="softmax",
    topk_method="greedy",
    seq_aux=False,
    model_type="gpt_oss",
)


def is_quantised(name: str) -> bool:
    """In DeepSeek's FP8 files: every projection of attention, MLPs and experts."""
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")) and "eh_proj" not in name


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """Values by the definition: exact in float64, rounded once to float32, then to bfloat16 as stored."""
    result = torch.empty(codes.shape, dtype=torch.float32)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            result[i, j] = codes[i, j].double() * scale[i // BLOCK[0], j // BLOCK[1]].double()
    return result.bfloat16()


def noisy(config: ModelConfig) -> moe.Transformer:
    model = moe.Transformer(config, seed=1)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=g) * 0.2)
    return model.bfloat16()


@dataclasses.dataclass
class Folders:
    """The same model in FP8, weights and scales in shards of their own, and dequantised by the definition."""

    fp8: Path
    plain: Path

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.fp8 / "model-00001-of-00002.safetensors") | load_file(
            self.fp8 / "model-00002-of-00002.safetensors"
        )

    def write(self, tensors: dict[str, Tensor]) -> None:
        weight_map = {}
        for i in (1, 2):
            file = f"model-0000{i}-of-00002.safetensors"
            part = {n: t for n, t in tensors.items() if n.endswith("_scale_inv") == (i == 2)}
            save_file(part, self.fp8 / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.fp8 / "model.safetensors.index.json").write_text(json.dumps(index))


def make_fp8(root: Path, config: ModelConfig) -> Folders:
    folders = Folders(root / "fp8", root / "plain")
    noisy(config).save(folders.plain)
    noisy(config).save(folders.fp8)
    (folders.fp8 / "model.safetensors").rename(root / "saved")
    plain, tensors = load_file(root / "saved"), {}
    for name, tensor in list(plain.items()):
        if not is_quantised(name):
            tensors[name] = tensor
            continue
        codes, scale = quantize_blocks(tensor, BLOCK)
        tensors |= {name: codes, name + "_scale_inv": scale}
        plain[name] = dequantised(codes, scale)
    folders.write(tensors)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
    configure(folders.fp8, quantization_config=quantization)
    save_file(plain, folders.plain / "model.safetensors", metadata={"format": "pt"})
    return folders


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def make_mxfp4(root: Path) -> tuple[Path, dict[str, Tensor]]:
    """gpt-oss as released, with experts in MXFP4. Returns the folder and its tensors.

    Beside codes and scales there are the experts as transformers dequantises them.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    noisy(GPT_OSS).save(root / "wide")
    tensors, theirs = load_file(root / "wide" / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        # In the files [E, in, out]; blocks are [E, out, in / 32, 16].
        blocks, scales = quantize_mxfp4(tensors.pop(name).transpose(1, 2).contiguous())
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        theirs[name] = convert_moe_packed_tensors(blocks, scales)  # [E, in, out] again
    folder = root / "mxfp4"
    noisy(GPT_OSS).save(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp"]})
    return folder, tensors | theirs
