"""Tensors of one dtype among those of another: what loads runs, and is right; what cannot run is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe import CheckpointError, ModelConfig, Transformer
from moe.cache import Cache
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format import config_json
from moe.checkpoint.format.layout import layout
from moe.norm import RMSNorm

# Every expert takes every token: no rounding changes the routing.
COMMON: dict[str, Any] = dict(
    vocab_size=29,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    moe_intermediate_size=16,
    n_routed_experts=3,
    num_experts_per_tok=3,
    initializer_range=0.2,
    max_position_embeddings=64,
)
MLA: dict[str, Any] = dict(
    kv_lora_rank=14, q_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=16, n_shared_experts=1
)
GQA: dict[str, Any] = dict(num_key_value_heads=1, head_dim=12, scoring_func="softmax", topk_method="greedy")
GQA |= dict(seq_aux=False)
SIGMOID: dict[str, Any] = dict(scoring_func="sigmoid", topk_method="noaux_tc")
CONFIGS = {
    "deepseek_v3": dict(MLA, first_k_dense_replace=1, num_nextn_predict_layers=1, attention_bias=True),
    "qwen2_moe": dict(
        GQA,
        n_shared_experts=1,
        shared_expert_gate=True,
        shared_expert_intermediate_size=20,
        attention_bias=True,
        attention_output_bias=False,
    ),
    "qwen3_moe": dict(GQA, qk_norm="head", mlp_only_layers=(0,)),
    "gpt_oss": dict(
        GQA,
        attention_bias=True,
        attention_sinks=True,
        router_bias=True,
        expert_bias=True,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        swiglu_beta=1.0,
    ),
    "olmoe": dict(GQA, qk_norm="whole"),
    "minimax_m2": dict(GQA | SIGMOID, qk_norm="whole"),
}
IDS = torch.tensor([[3, 17, 28, 5, 5, 11, 0, 2]])
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(autouse=True)
def every_engine_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases and dense layers that only some engines compute are roles, too, and released files have them."""
    monkeypatch.setattr(config_json, "_problems", lambda *_: ())


def base(family: str, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Save a small model and return the tensors of its file."""
    model = Transformer(ModelConfig(**COMMON, **CONFIGS[family], model_type=family), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                center = 1.0 if "norm" in name else 0.0
                tensor.copy_(center + 0.3 * torch.randn(tensor.shape, generator=generator))
    model.to(dtype).save(folder)
    return load_file(folder / "model.safetensors")


def roles(config: ModelConfig) -> dict[str, list[str]]:
    """Kind of parameter -> its tensors in the last layer and expert that have it, copies included."""
    found: dict[str, dict[Any, list[str]]] = {}
    for slot in layout(config).values():
        kind = re.sub(r"^layers\.\d+\.", "", slot.parameter)
        expert = slot.index[:1] if slot.index and isinstance(slot.index[0], int) else ()
        found.setdefault(kind, {}).setdefault((slot.parameter, expert), []).append(slot.name)
    return {kind: list(places.values())[-1] for kind, places in found.items()}


def run(model: Transformer) -> tuple[Tensor, Tensor, float]:
    """Logits of a prompt, of the same token by token with a cache, and the MTP loss if there is one."""
    with torch.no_grad():
        logits = model(IDS).logits
        cache = Cache(model.config)
        steps = [model(IDS[:, :3], cache=cache).logits]
        steps += [model(IDS[:, i : i + 1], cache=cache).logits for i in range(3, IDS.shape[1])]
        loss = 0.0
        if model.config.num_nextn_predict_layers:
            loss = float(model.train()(IDS, labels=IDS).losses["mtp"])
            model.eval()
    return logits.double(), torch.cat(steps, dim=1).double(), loss


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", CONFIGS)
def test_every_role_in_every_dtype_runs_or_is_refused_by_name(family: str, tmp_path: Path) -> None:
    tensors = base(family, tmp_path, torch.bfloat16)
    exact, _, exact_loss = run(moe.load(tmp_path, dtype=torch.float64))
    bounds = {torch.bfloat16: 2 * distance(run(moe.load(tmp_path))[0], exact), torch.float32: 1e-5}
    refused: set[str] = set()
    ran: set[str] = set()
    cases = [("BF16", "F32"), ("F32", "BF16")] + [("BF16", "F16")] * (family == "qwen3_moe")
    for most, other in cases:
        for kind, names in roles(moe.checkpoint.read_config(tmp_path)).items():
            if tensors[names[0]].dtype == torch.float32:
                continue  # the correction bias is fp32 in every file
            found = {n: t.to(DTYPES[other if n in names else most]) for n, t in tensors.items()}
            save_file(found, tmp_path / "model.safetensors")
            try:
                model = moe.load(tmp_path)
            except CheckpointError as error:
                refused.add(kind)
                assert error.tensor in names, (kind, str(error))
                advice = re.search(r"load with dtype=torch\.(\w+)", str(error))
                assert advice is not None, str(error)
                model = moe.load(tmp_path, dtype=getattr(torch, advice[1]))
            else:
                ran.add(kind)
            logits, steps, loss = run(model)
            bound = bounds[model.embed_tokens.weight.dtype]
            assert distance(logits, exact) <= bound, (kind, most, other)
            assert distance(steps, exact) <= bound, (kind, most, other)
            assert loss == pytest.approx(exact_loss, rel=bound), (kind, most, other)
    free = re.compile(r"norm\.weight$|mlp\.gate\.(weight|bias)$|sinks$")
    assert ran and ran == {kind for kind in ran | refused if free.search(kind)}


def mixed(folder: Path, tensors: dict[str, Tensor], pattern: str, dtype: torch.dtype = torch.float32) -> Path:
    found = {name: t.to(dtype) if re.search(pattern, name) else t for name, t in tensors.items()}
    save_file(found, folder / "model.safetensors")
    return folder


def test_the_error_counts_what_differs_and_recommends_what_loads(tmp_path: Path) -> None:
    tensors = base("qwen3_moe", tmp_path, torch.bfloat16)
    mixed(tmp_path, tensors, r"o_proj|lm_head|norm|mlp\.gate\.")
    expected = (
        r"model\.layers\.0\.self_attn\.o_proj\.weight: its dtype and 2 more differ from most tensors, and the model "
        r"needs one; load with dtype=torch\.bfloat16, as config\.json states, or dtype=torch\.float32; "
        r"expected BF16, as model\.embed_tokens\.weight has; found F32$"
    )
    for dtype in ("auto", "keep"):
        with pytest.raises(CheckpointError, match=expected):
            moe.load(tmp_path, dtype=dtype)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match=expected):
        moe.load(tmp_path, experts=range(1))  # ranks agree, whichever experts they read
    config = json.loads((tmp_path / "config.json").read_text())
    for stated in ({}, {"torch_dtype": "auto"}, {"dtype": None}):
        text = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")} | stated
        (tmp_path / "config.json").write_text(json.dumps(text))
        with pytest.raises(CheckpointError, match=r"needs one; load with dtype=torch\.float32; expected BF16"):
            moe.load(tmp_path)


def test_an_mtp_module_of_another_dtype(tmp_path: Path) -> None:
    """Its copies of embedding and head are compared by value; without the module, dtypes are not mixed."""
    tensors = base("deepseek_v3", tmp_path, torch.bfloat16)
    mixed(tmp_path, tensors, r"layers\.2\.")
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.eh_proj\.weight: its dtype .*mtp=False \(--no-mtp\)"):
        moe.load(tmp_path)
    assert moe.load(tmp_path, dtype=torch.float32).config.num_nextn_predict_layers == 1
    model = moe.load(tmp_path, mtp=False)
    assert model.lm_head is not None and model.lm_head.weight.dtype == torch.bfloat16
    name = "model.layers.2.embed_tokens.weight"
    save_file(tensors | {name: tensors[name].float() + 1e-6}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: differs from the tensor that it repeats"):
        moe.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_tensors_get_the_dtype_of_the_others(dtype: torch.dtype, tmp_path: Path) -> None:
    """So a checkpoint that `convert` quantised runs, in the dtype that config.json states."""
    base("deepseek_v3", tmp_path / "wide", dtype)
    # Blocks so small that there are more scales, in fp32, than other values.
    convert(tmp_path / "wide", tmp_path / "fp8", dtype="fp8", block_size=(2, 2), progress=False)
    stated = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert stated["dtype"] == stated["torch_dtype"] == str(dtype).removeprefix("torch.")
    model = moe.load(tmp_path / "fp8")
    assert {p.dtype for n, p in model.named_parameters() if "e_score" not in n} == {dtype}
    exact = run(moe.load(tmp_path / "fp8", dtype=torch.float64))[0]
    kept = moe.load(tmp_path / "fp8", dtype="keep")
    bound = 1e-5 if dtype == torch.float32 else 0.1
    assert distance(run(model)[0], exact) < bound and distance(run(kept)[0], exact) < bound
    kept.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == stated["dtype"]
    cut(tmp_path / "fp8", tmp_path / "cut", layers=[1], experts=[0, 2], progress=False)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["dtype"] == stated["dtype"]


def test_norms_of_another_dtype_compute_as_in_transformers(tmp_path: Path) -> None:
    """transformers rounds the weights of norms to config.json's dtype; both are as near to float64."""
    transformers = pytest.importorskip("transformers")
    for family in ("qwen3_moe", "deepseek_v3"):
        tensors = base(family, tmp_path / family, torch.bfloat16)
        folder = mixed(tmp_path / family, tensors, "norm")
        with torch.no_grad():
            ours = moe.load(folder)(IDS).logits
            exact = moe.load(folder, dtype=torch.float64)(IDS).logits
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(IDS).logits
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert distance(ours.double(), exact) <= 1.2 * distance(theirs.double(), exact) < 0.1


def test_what_convert_quantised_in_fp32_is_fp32_in_transformers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    # It asks for accelerate, and then loads to the CPU without it.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    base("deepseek_v3", tmp_path / "wide", torch.float32)
    convert(tmp_path / "wide", tmp_path / "fp8", dtype="fp8", block_size=(2, 2), mtp=False, progress=False)
    ours = moe.load(tmp_path / "fp8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype="auto")
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    with torch.no_grad():
        assert distance(ours(IDS).logits, theirs(IDS).logits) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_a_norm_keeps_the_dtype_of_its_input_but_under_autocast(compiled: bool) -> None:
    norm = RMSNorm(6, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.25, 3.0, 1e-3, 2.0, 1.0]))
    call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = norm(x.double())
    assert exact.dtype == torch.float64
    assert torch.equal(call(x), exact.bfloat16())
    norm.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(x)
    assert y.dtype == torch.float32 and torch.allclose(y.double(), exact, rtol=1e-6)
    assert norm.to("meta")(x.to("meta")).dtype == torch.bfloat16


def mixed_fp8(folder: Path, change: Any) -> Path:
    """A folder in FP8 in which `change` has replaced some tensors of the experts by those of the source."""
    wide = base("minimax_m2", folder / "wide", torch.bfloat16)
    convert(folder / "wide", folder / "fp8", dtype="fp8", block_size=(8, 8), progress=False)
    file = folder / "fp8" / "model.safetensors"
    tensors = load_file(file)
    change(tensors, wide)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "fp8"


EXPERT = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize(("experts", "parts"), [((0,), "w1"), ((2,), "w3"), ((0,), "w2"), ((0, 1, 2), "w3")])
def test_experts_that_are_quantised_in_part_are_not_kept(experts: tuple[int, ...], parts: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], wide: dict[str, Tensor]) -> None:
        for expert in experts:
            name = f"{EXPERT}.{expert}.{parts}.weight"
            tensors[name] = wide[name]
            del tensors[f"{name}_scale_inv"]

    folder = mixed_fp8(tmp_path, change)
    assert distance(run(moe.load(folder))[0], run(moe.load(tmp_path / "wide"))[0]) < 0.2
    with pytest.raises(
        CheckpointError, match=r"its dtype differs within layers\.1\.mlp\.experts.*load with dtype='auto'"
    ):
        moe.load(folder, dtype="keep")


def test_scales_in_two_formats_are_not_kept(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], wide: dict[str, Tensor]) -> None:
        name = f"{EXPERT}.2.w2.weight_scale_inv"
        tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    folder = mixed_fp8(tmp_path, change)
    assert run(moe.load(folder))[0].isfinite().all()
    with pytest.raises(CheckpointError, match=r"w2\.weight_scale_inv.* differs within .*; expected F32.*found F8_E8M0"):
        moe.load(folder, dtype="keep")


def test_experts_of_two_dtypes_are_not_stacked_in_one(tmp_path: Path) -> None:
    tensors = base("minimax_m2", tmp_path / "m", torch.float32)
    name = f"{EXPERT}.0.w2.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its dtype differs within .*down_proj.* stacked; choose a dtype"):
        convert(tmp_path / "m", tmp_path / "stacked", table="stacked", progress=False)
    assert not (tmp_path / "stacked").exists()
    convert(tmp_path / "m", tmp_path / "stacked", table="stacked", dtype="fp32", progress=False)
    stacked, each = moe.load(tmp_path / "stacked"), moe.load(tmp_path / "m", dtype="fp32")
    assert torch.equal(run(stacked)[0], run(each)[0])


def test_values_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    tensors = base("minimax_m2", tmp_path / "m", torch.float32)
    tensors["lm_head.weight"][3, 2] = 1e6
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    for call in (
        lambda: moe.load(tmp_path / "m", dtype=torch.float16),
        lambda: convert(tmp_path / "m", tmp_path / "out", dtype="fp16", progress=False),
    ):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: a value that float16 cannot hold"):
            call()
    name = f"{EXPERT}.0.w2.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: cannot be quantised: .*NaN"):
        convert(tmp_path / "m", tmp_path / "out", dtype="fp8", progress=False)
    assert not (tmp_path / "out").exists()


def test_modules_that_are_not_quantised_are_listed_as_they_are(tmp_path: Path) -> None:
    """vLLM builds a linear layer in FP8, with a scale that no file has, for a router that is not listed."""
    base("qwen2_moe", tmp_path / "m", torch.bfloat16)
    convert(tmp_path / "m", tmp_path / "fp8", dtype="fp8", block_size=(4, 4), progress=False)

    def listed(folder: Path) -> list[str]:
        config = json.loads((folder / "config.json").read_text())
        return config["quantization_config"]["modules_to_not_convert"]

    gates = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")]
    assert sorted(listed(tmp_path / "fp8")) == sorted(["lm_head", *gates])
    cut(tmp_path / "fp8", tmp_path / "cut", layers=[1], experts=[0, 1, 2], compare=False, progress=False)
    assert sorted(listed(tmp_path / "cut")) == sorted(["lm_head", *gates[:2]])
    kept = moe.load(tmp_path / "fp8", dtype="keep")
    kept.save(tmp_path / "saved")
    assert listed(tmp_path / "saved") == listed(tmp_path / "fp8")
