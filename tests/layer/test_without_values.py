"""Tensors without values: the meta device and fake tensors. Shapes and dtypes are those of a run with values."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import moe
from moe import balance, ops
from moe.cache import Cache
from moe.ops.grouped_gemm import grouped_mm
from moe.quantized import FP8Experts, FP8Linear, Int8Experts, Int8Linear, MXFP4Experts
from tests.support.cases import Case, RoutingCase
from tests.support.models import GQA, MLA, small_model
from tests.support.operators import whole_layer

SINKS = dict(num_key_value_heads=2, head_dim=8, attention_sinks=True, expert_bias=True, router_bias=True)
ATTENTION = {"mla": MLA, "gqa": GQA, "sinks": SINKS}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)

Signature = tuple[torch.Size, torch.dtype]


def signatures(tensors: Any) -> list[Signature | None]:
    return [None if t is None else (t.shape, t.dtype) for t in tensors]


@each_dtype
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_every_operator_on_the_meta_device(tokens: int, dtype: torch.dtype) -> None:
    def run(device: str) -> list[Signature | None]:
        inputs = Case("meta", tokens, 24, 40, 8, 3).inputs(dtype)
        inputs = type(inputs)(**{name: tensor.to(device) for name, tensor in vars(inputs).items()}).leaves()
        logits = torch.randn(tokens, 8, dtype=torch.promote_types(dtype, torch.float32), device=device)
        bias, leaves = torch.zeros(8, device=device), (logits.requires_grad_(), *inputs.differentiable)
        y = whole_layer(logits, bias, inputs, RoutingCase("meta", experts=8, top_k=3, n_group=4, topk_group=2))
        assert y.device.type == device
        return signatures([y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)])

    assert run("meta") == run("cpu")


@pytest.mark.parametrize("tier", ["auto", "reference", "triton"])
def test_tiers_and_quantised_formats_on_the_meta_device(tier: Any) -> None:
    with torch.device("meta"):
        x, down, ids = torch.randn(6, 8), torch.randn(4, 8, 3), torch.zeros(6, 2, dtype=torch.int64)
        y = ops.moe_mlp(x.requires_grad_(), torch.randn(4, 6, 8), down, torch.rand(6, 2), ids, tier=tier)
        y.sum().backward()
        offs = torch.zeros(4, dtype=torch.int32)
        rows = grouped_mm(x, down, offs, tier=tier)
        weights = ops.route(torch.randn(6, 8), top_k=2, tier=tier).weights
        codes, scales = ops.quantize_blocks(torch.randn(4, 8, 32), (4, 4))
        blocks, exponents = ops.quantize_mxfp4(torch.randn(4, 8, 32))
    assert (y.shape, rows.shape, weights.shape) == ((6, 8), (6, 3), (6, 2)) and x.grad is not None
    assert ops.dequantize_blocks(codes, scales, (4, 4)).shape == ops.dequantize_mxfp4(blocks, exponents).shape
    assert all(t.is_meta for t in (y, rows, weights, codes, scales, blocks, exponents))


def passes(attention: str, device: str, dtype: torch.dtype) -> Iterator[Any]:
    """Results and gradients of training, with padding and with documents; then results of decoding."""
    model = small_model(ATTENTION[attention], num_nextn_predict_layers=1, n_shared_experts=1, shared_expert_gate=True)
    model = model.to(dtype).to(device)
    ids = torch.zeros(2, 6, dtype=torch.int64, device=device)
    for more in ({"attention_mask": torch.ones_like(ids)}, {"document_ids": ids}):
        out = model(ids, labels=ids, **more)
        yield from (out.logits, out.loss, out.load, *out.losses.values())
    assert out.loss is not None
    out.loss.backward()
    yield from (parameter.grad for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        cache = Cache(model.config)
        for length, real in ((6, 6), (1, 7), (1, 8)):
            mask = torch.ones(2, real, dtype=torch.int64, device=device) if real == 8 else None
            yield model(ids[:, :length], cache=cache, logits_to_keep=1, attention_mask=mask).logits
    mask = torch.ones_like(ids)
    yield moe.generate(model, ids, max_new_tokens=2, attention_mask=mask, temperature=0.7, top_p=0.9, seed=0)
    yield moe.generate(model, ids, max_new_tokens=2, eos_token_id=100)


@pytest.mark.parametrize(
    ("attention", "dtype"), [("mla", torch.float32), ("gqa", torch.bfloat16), ("sinks", torch.float16)]
)
def test_a_model_on_the_meta_device(attention: str, dtype: torch.dtype) -> None:
    found = list(passes(attention, "meta", dtype))
    assert all(tensor.is_meta for tensor in found)
    assert signatures(found) == signatures(passes(attention, "cpu", dtype))


QUANTISED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: FP8Linear(32, 64, True),
    "fp8": lambda: FP8Experts(8, 32, 64, bias=True),
    "mxfp4": lambda: MXFP4Experts(8, 32, 64, bias=True),
    "int8 linear": lambda: Int8Linear(32, 64),
    "int8": lambda: Int8Experts(8, 32, 64),
}


def run_quantised(kind: str, tokens: int) -> None:
    x = torch.randn(tokens, 32, requires_grad=True)
    routed = () if "linear" in kind else (torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int64))
    module = QUANTISED[kind]()
    y = module(x, *routed)
    y.sum().backward()
    assert x.grad is not None and y.shape == (tokens, 64 if "linear" in kind else 32)
    with torch.no_grad():
        assert module(x, *routed).shape == y.shape


@pytest.mark.parametrize("kind", list(QUANTISED))
def test_quantised_modules_without_values(kind: str) -> None:
    for tokens in (5, 1):
        with torch.device("meta"):
            run_quantised(kind, tokens)
        with FakeTensorMode():
            run_quantised(kind, tokens)


def test_attach_and_an_optimizer_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = small_model(MLA)
        optimizer = torch.optim.AdamW(model.parameters())
        balance.attach(model, optimizer)
        model(torch.zeros(2, 6, dtype=torch.int64)).logits.sum().backward()
        optimizer.step()


@pytest.mark.parametrize("seed", [None, 0])
def test_a_layer_of_fake_tensors(seed: int | None) -> None:
    state = torch.get_rng_state()
    with FakeTensorMode() as mode:
        layer, x = moe.MoELayer(32, 16, 8, 2, n_shared_experts=1, seed=seed), torch.empty(2, 5, 32)
        y, stats = layer(x, torch.ones(2, 5, dtype=torch.bool), return_stats=True)
        (y.sum() + stats.aux_loss).backward()
        tensors: list[Any] = [*layer.parameters(), *layer.buffers(), y]
        assert all(isinstance(tensor, FakeTensor) and tensor.fake_mode is mode for tensor in tensors)
        assert all(parameter.grad is not None for parameter in layer.parameters())
    assert {tensor.device.type for tensor in tensors} == {"cpu"} and y.shape == x.shape
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_of_fake_tensors_generates() -> None:
    with FakeTensorMode():
        model, ids = small_model(MLA), torch.zeros(1, 4, dtype=torch.int64)
        model(ids, labels=ids).loss.backward()
        assert moe.generate(model, ids, max_new_tokens=2, attention_mask=torch.ones_like(ids)).shape == (1, 6)


class RegisteredOnMeta:
    """Moves parameters to the meta device as they are registered, as accelerate.init_empty_weights does."""

    def __enter__(self) -> None:
        self.register = register = nn.Module.register_parameter

        def moved(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(self, name, None if param is None else nn.Parameter(param.to("meta")))

        nn.Module.register_parameter = moved

    def __exit__(self, *_: Any) -> None:
        nn.Module.register_parameter = self.register


def init_empty_weights() -> Any:
    return pytest.importorskip("accelerate").init_empty_weights()


CONTEXTS = {"meta": lambda: torch.device("meta"), "registered": RegisteredOnMeta, "accelerate": init_empty_weights}


@pytest.mark.parametrize("name", list(CONTEXTS))
def test_modules_stay_on_meta_in_the_contexts_of_other_libraries(name: str) -> None:
    state = torch.get_rng_state()
    with CONTEXTS[name]():
        modules = [moe.MoELayer(32, 16, 8, 2), moe.MoELayer(32, 16, 8, 2, seed=0), small_model(MLA)]
    assert all(tensor.is_meta for module in modules for tensor in (*module.parameters(), *module.buffers()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.is_meta for tensor in moe.MoELayer(32, 16, 8, 2).state_dict().values())


ON_META = "its weight is on the meta device; expected cpu; load or initialise it first"
TWO_DEVICES = "tensors on cpu, meta: expected one device"


@pytest.mark.parametrize("grad", [True, False])
def test_weights_on_meta_and_an_input_with_values(grad: bool) -> None:
    """torch multiplies some of them, and returns arbitrary memory."""
    with torch.device("meta"):
        layer, model, tied, quantised = (
            moe.MoELayer(32, 16, 8, 2),
            small_model(MLA),
            small_model(GQA),
            FP8Linear(32, 64),
        )
        far = Case("meta", 5, 32, 3, 4, 2).inputs(torch.float32)
    near = Case("meta", 5, 32, 3, 4, 2).inputs(torch.float32)
    x, ids = torch.randn(5, 32), torch.zeros(5, 2, dtype=torch.int64)
    routing = moe.Routing(torch.rand(5, 2), ids, torch.rand(5, 8))
    refused = [
        (f"Router: {ON_META}", lambda: layer(x)),
        (f"Router: {ON_META}", lambda: layer.gate(x)),
        (f"Embedding: {ON_META}", lambda: model(ids)),
        (f"Embedding: {ON_META}", lambda: moe.generate(model, ids, max_new_tokens=1)),
        (f"Embedding: {ON_META}", lambda: tied.head(x)),
        (f"FP8Linear: {ON_META}", lambda: quantised(x)),
        (TWO_DEVICES, lambda: layer(x, routing=routing)),
        (TWO_DEVICES, lambda: layer.experts(x, torch.rand(5, 2), ids)),
        (TWO_DEVICES, lambda: moe.MoELayer(32, 16, 8, 2)(x.to("meta"))),
        (TWO_DEVICES, lambda: ops.moe_mlp(near.x, far.gate_up, near.down, near.weights, near.expert_ids)),
        (TWO_DEVICES, lambda: ops.permute(x, ids.to("meta"), 8)),
        (TWO_DEVICES, lambda: ops.unpermute(x.to("meta"), ids[:, :1])),
        (TWO_DEVICES, lambda: ops.route(x, torch.zeros(32, device="meta"), top_k=2)),
        (TWO_DEVICES, lambda: ops.grouped_mm(x, far.gate_up.mT, torch.tensor([1, 2, 3, 5], dtype=torch.int32))),
    ]
    for message, call in refused:
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
            call()
