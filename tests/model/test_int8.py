"""Models with int8 weights: which weights are converted, and that the result is the model with those weights."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moe
from moe import CheckpointError, ConfigError
from moe.cache import Cache
from moe.linear import Linear
from moe.quantized import Int8Experts, Int8Linear
from tests.support.checkpoint_cases import BY_FAMILY, V3_MTP, build
from tests.support.models import GQA, GROUPED, MLA, SMALL, distance, noisy, small_model
from tests.support.quantised_checkpoints import make_fp8, make_mxfp4

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def dequantised(model: moe.Transformer, dtype: torch.dtype) -> moe.Transformer:
    """The plain model with the weights of an int8 model, by the definition: codes times the scale of the row."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int8:
            scale = model.state_dict()[f"{name}_scale"]
            state[name] = (tensor.double() * scale.double().unsqueeze(-1)).to(dtype)
        elif not name.endswith("_scale"):
            state[name] = tensor.to(torch.float32 if "e_score" in name else dtype)
    plain = moe.Transformer(model.config).to(dtype).eval()
    plain.load_state_dict(state)
    return plain


def model_of(config: moe.ModelConfig) -> moe.Transformer:
    return moe.Transformer(config, seed=1).eval()


@pytest.mark.parametrize("family", ["mla", "gqa", "gpt_oss", "qwen2_moe", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_dequantised_weights(family: str, dtype: torch.dtype) -> None:
    config = {"mla": SMALL, "gqa": GROUPED}.get(family) or BY_FAMILY[family]
    if dtype == torch.bfloat16:  # all experts, because its roundings would choose others
        every = {"num_experts_per_tok": config.n_routed_experts, "topk_group": config.n_group}
        config = dataclasses.replace(config, **every)  # pyright: ignore[reportArgumentType]
    original = noisy(config).to(dtype)
    int8 = moe.quantize(copy.deepcopy(original), "int8")
    with torch.no_grad():
        exact = dequantised(int8, torch.float64)(IDS).logits
        plain = dequantised(int8, dtype)(IDS).logits
        cache = Cache(config)
        steps = [int8(ids, cache=cache).logits for ids in (IDS[:, :4], *IDS[:, 4:].split(1, dim=1))]
        for found in (int8(IDS).logits, torch.cat(steps, dim=1)):
            assert found.dtype == dtype
            if dtype == torch.bfloat16:
                assert distance(found, exact) <= 2 * distance(plain, exact)
            else:
                assert distance(found, exact) < (1e-12 if dtype == torch.float64 else 1e-4)
        assert distance(original(IDS).logits, exact) > 1e-3


def test_which_weights_are_converted() -> None:
    config = dataclasses.replace(V3_MTP, first_k_dense_replace=1, attention_bias=True, shared_expert_gate=True)
    config = dataclasses.replace(config, n_shared_experts=1, model_type="")
    model = moe.Transformer(config)
    before, dtypes = sum(t.nbytes for t in model.state_dict().values()), {}
    biases = {name for name, module in model.named_modules() if getattr(module, "bias", None) is not None}
    assert moe.quantize(model.bfloat16(), "int8") is model and biases
    for name, tensor in model.state_dict().items():
        dtypes.setdefault(tensor.dtype, set()).add(name)
    converted = {name for name, m in model.named_modules() if isinstance(m, Int8Linear | Int8Experts)}
    rest = {name for name, m in model.named_modules() if type(m) is Linear}
    assert {name.rpartition(".")[2] for name in rest} == {"kv_b_proj", "shared_expert_gate"}
    assert {name.rpartition(".")[2] for name in converted} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("experts", "lm_head", "eh_proj"),
    }
    assert {name for name, m in model.named_modules() if getattr(m, "bias", None) is not None} == biases
    unconverted = dtypes[torch.bfloat16] - {f"{name}_scale" for name in dtypes[torch.int8]}
    assert all(
        name.endswith(("norm.weight", "embed_tokens.weight", "gate.weight", "kv_b_proj.weight", "_proj.bias"))
        or "kv_a_proj_with_mqa.bias" in name
        for name in unconverted
    )
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == torch.int8)
    assert sum(t.nbytes for t in model.state_dict().values()) < 0.45 * before
    tied = moe.quantize(small_model(GQA), "int8")
    assert tied.lm_head is None and tied.embed_tokens.weight.dtype == torch.float32


def same(a: moe.Transformer, b: moe.Transformer) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name
    assert [type(module) for module in a.modules()] == [type(module) for module in b.modules()]
    assert a.training == b.training == any(module.training for module in a.modules())


@pytest.mark.parametrize("family", BY_FAMILY)
def test_loaded_as_converted_afterwards(family: str, tmp_path: Path) -> None:
    build(BY_FAMILY[family]).save(tmp_path / "model")
    for dtype in ("auto", "bf16"):
        loaded = moe.load(tmp_path / "model", dtype=dtype, quantize="int8")
        same(loaded, moe.quantize(moe.load(tmp_path / "model", dtype=dtype), "int8"))
    whole = loaded.state_dict()
    if loaded.config.has_experts:
        part = moe.load(tmp_path / "model", dtype="bf16", quantize="int8", experts=range(3, 7))
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, whole[name][3:7] if ".mlp.experts." in name else whole[name]), name
    meta = moe.load(tmp_path / "model", dtype="bf16", quantize="int8", device="meta")
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in whole.items()
    }


def test_loaded_from_quantised_files_and_stacked_ones(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in (make_fp8(tmp_path / "a", V3_MTP).fp8, make_mxfp4(tmp_path / "b")[0]):
        same(moe.load(folder, quantize="int8"), moe.quantize(moe.load(folder), "int8"))
        with pytest.raises(ConfigError, match="model = 'Transformer': expected a model that is neither quantised"):
            moe.quantize(moe.load(folder, dtype="keep"), "int8")


def test_models_that_are_not_transformers() -> None:
    linear = torch.nn.Linear(2, 2)
    for wrong, name in (
        (linear, "torch.nn.modules.linear.Linear"),
        (torch.nn.DataParallel(build(V3_MTP)), "torch.nn.parallel.data_parallel.DataParallel"),
        (build(V3_MTP).layers[-1].mlp, "moe.layer.MoELayer"),
        (None, "builtins.NoneType"),
        ("checkpoint", "builtins.str"),
    ):
        with pytest.raises(
            ConfigError, match=f"^model = '{name}': expected a moe.Transformer, such as moe.load returns"
        ):
            moe.quantize(wrong, "int8")  # pyright: ignore[reportArgumentType]
    assert type(linear) is torch.nn.Linear


def test_refusals(tmp_path: Path) -> None:
    model = build(V3_MTP)
    model.save(tmp_path / "model")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"quantize": "int4"}, "quantize = 'int4': expected 'int8'"),
        ({"quantize": "int8", "dtype": "keep"}, "dtype = 'keep': expected 'auto' or a floating dtype"),
    )
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            moe.load(tmp_path / "model", **options)
    with pytest.raises(ConfigError, match="kind = 'int4': expected 'int8'"):
        moe.quantize(model, "int4")  # pyright: ignore[reportArgumentType]
    int8 = moe.load(tmp_path / "model", quantize="int8")
    with pytest.raises(ConfigError, match="expected a model that is neither quantised nor sharded"):
        moe.quantize(int8, "int8")
    with pytest.raises(CheckpointError, match="int8 weights cannot be saved; save the model before it is quantised"):
        int8.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()

    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    message = r"up_proj\.weight: int8 cannot hold its values; expected finite values; found weight\[2\]: NaN"
    with pytest.raises(CheckpointError, match=message):
        moe.load(tmp_path / "model", quantize="int8")
    with pytest.raises(ValueError, match=r"^layers\.1\.mlp\.experts: weight\[3, 22\]: NaN, infinity or too large"):
        moe.quantize(moe.load(tmp_path / "model"), "int8")


def test_a_model_that_does_not_fit_is_measured_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(V3_MTP).save(tmp_path / "model")
    loaded = moe.load(tmp_path / "model", quantize="int8")
    size = sum(t.nbytes for t in loaded.state_dict().values())
    free = {"bytes": size}
    monkeypatch.setattr("moe.checkpoint.reading.memory.free_bytes", lambda _: (free["bytes"], "this machine's memory"))
    moe.load(tmp_path / "model", quantize="int8")
    free["bytes"] -= 1
    with pytest.raises(CheckpointError, match=f"found {size:,} bytes"):
        moe.load(tmp_path / "model", quantize="int8")


def test_compiled_exported_and_generating() -> None:
    torch._dynamo.reset()
    model = moe.quantize(small_model(MLA).eval(), "int8")
    with torch.no_grad():
        expected = model(IDS).logits
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        exported = torch.export.export(model, (IDS,)).module()
        torch.testing.assert_close(exported(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    ids = moe.generate(model, IDS, max_new_tokens=4)
    assert torch.equal(ids, moe.generate(dequantised(model, torch.float32), IDS, max_new_tokens=4))


def test_trained_parameters_are_the_others() -> None:
    """Gradients reach the embedding, and none the int8 weights."""
    model = moe.quantize(small_model(MLA), "int8")
    model(IDS, labels=IDS).loss.backward()
    assert model.embed_tokens.weight.grad is not None
    plain = dequantised(model, torch.float32).train()
    plain(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(model.embed_tokens.weight.grad, plain.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters() if p.dtype == torch.int8)


def test_a_sharded_model_is_refused() -> None:
    """Plain FSDP keeps the classes of the modules that it does not wrap; only the weights show it."""
    model = build(V3_MTP)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match="expected a model that is neither quantised nor sharded"):
            moe.quantize(model, "int8")
    finally:
        dist.destroy_process_group()
