"""What only a GPU can show: dispatch, synchronisation, graphs, repeatability and sizes.

The operators' own tests run there by
`python -m pytest -p tests.support.kernels tests/ops/test_ops.py tests/ops/test_routing.py`.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor

import moe
from benchmarks.cuda import no_waiting
from moe import ops
from tests.support.cases import BY_NAME, CASES, ROUTING_CASES, Case, Inputs, RoutingCase
from tests.support.operators import digest, eager_experts, fused, gradients
from tests.support.running_error import complaints, moe_mlp_errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(**{name: tensor.cuda() for name, tensor in vars(inputs).items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moe_mlp(case: Case, dtype: torch.dtype) -> None:
    inputs = on_gpu(case.inputs(dtype))
    grad = torch.randn(case.tokens, case.width, dtype=torch.float64, device="cuda").to(dtype)
    ours, exact = gradients(fused, inputs, grad), gradients(eager_experts, inputs.to(torch.float64), grad)
    errors, eager = moe_mlp_errors(inputs, grad), cache(lambda: gradients(eager_experts, inputs, grad))
    assert not complaints(inputs, ours, errors, exact, eager)
    with torch.no_grad():
        assert not complaints(inputs, {"y": fused(inputs)}, errors, exact, eager)


@pytest.mark.parametrize("case", ROUTING_CASES, ids=str)
def test_route_as_on_the_cpu(case: RoutingCase) -> None:
    """Scores may differ by a rounding, so that only rows without a near tie have to agree; there are always some."""
    logits, bias = case.inputs(torch.float32)
    here = ops.route(logits.cuda(), None if bias is None else bias.cuda(), **case.settings)
    there = ops.route(logits, bias, **case.settings)
    torch.testing.assert_close(here.scores.cpu(), there.scores, rtol=2**-20, atol=1e-37, equal_nan=True)
    same = (here.expert_ids.cpu() == there.expert_ids).all(dim=1)
    assert len(same) == 0 or same.float().mean() > 0.9
    torch.testing.assert_close(here.weights.cpu()[same], there.weights[same], rtol=2**-20, atol=1e-30, equal_nan=True)


def layer(dtype: torch.dtype = torch.bfloat16) -> moe.MoELayer:
    made = moe.MoELayer(256, 128, 32, 4, n_group=4, topk_group=2, n_shared_experts=1, aux_loss_alpha=1e-3, seed=0)
    return made.to("cuda", dtype)


@pytest.fixture
def any_algorithm() -> Iterator[None]:
    """Allows nondeterministic algorithms: torch's deterministic scatter copies from the host, which a CUDA graph cannot
    capture."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.usefixtures("any_algorithm")
def test_a_training_step_never_waits_for_the_device() -> None:
    model = layer()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    moe.balance.attach(model, optimizer)
    batches = [torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for i, x in enumerate(batches):
        with no_waiting() if i else nullcontext():  # the first step compiles and allocates
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.usefixtures("any_algorithm")
@pytest.mark.parametrize("tokens", [1, 64, 65, 700])
def test_the_layer_in_a_cuda_graph(tokens: int) -> None:
    model = layer().eval()
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        graph, y = captured(lambda: model(x))
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, model(x))


@pytest.mark.usefixtures("any_algorithm")
def test_forward_and_backward_in_a_cuda_graph() -> None:
    inputs = on_gpu(BY_NAME["many_experts"].inputs(torch.bfloat16)).leaves()
    grad = torch.randn_like(inputs.x)

    def step() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(fused(inputs), inputs.differentiable, grad)])

    graph, result = captured(step)
    with torch.no_grad():
        inputs.x.normal_()
    graph.replay()
    assert torch.equal(result, step())


def test_equal_input_equal_bits() -> None:
    inputs = on_gpu(Case("repeat", 3000, 256, 128, 32, 4, "skew").inputs(torch.bfloat16)).leaves()
    grad = torch.randn_like(inputs.x)
    seen = set()
    for _ in range(100):
        y = fused(inputs)
        seen.add(digest(*(t.cpu() for t in (y, *torch.autograd.grad(y, inputs.differentiable, grad)))))
    assert len(seen) == 1


def test_no_binary_for_another_token_count() -> None:
    from moe_triton import mlp

    def binaries() -> int:
        return sum(len(cache[0]) for cache in mlp.up_kernel.device_caches.values())

    inputs = on_gpu(Case("counts", 4000, 128, 64, 8, 2).inputs(torch.bfloat16))
    counts = []
    for tokens in (100, 300, 1000, *range(65, 4000, 97)):
        few = Inputs(**vars(inputs) | {n: getattr(inputs, n)[:tokens] for n in ("x", "weights", "expert_ids")})
        fused(few)
        counts.append(binaries())
    assert counts[-1] == counts[2]


def test_more_than_two_to_the_31_elements() -> None:
    """A pre-activation [R, 2F] and a gradient of it that 32-bit offsets cannot reach."""
    tokens, d, f, experts, top_k = 131_080, 128, 1024, 16, 8
    assert tokens * top_k * 2 * f > 2**31
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device="cuda") * scale).bfloat16()

    x, gate_up, down = normal(tokens, d), normal(experts, 2 * f, d, scale=d**-0.5), normal(experts, d, f, scale=f**-0.5)
    weights = torch.rand(tokens, top_k, generator=g, device="cuda") + 0.05
    ids = torch.rand(tokens, experts, generator=g, device="cuda").topk(top_k).indices
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    grad = normal(tokens, d)
    y = ops.moe_mlp(x, gate_up, down, weights, ids)
    grads = torch.autograd.grad(y, leaves, grad)
    some = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device="cuda")
    few = [t.detach()[some].double().requires_grad_() for t in (x, weights)]
    double = [t.detach().double() for t in (gate_up, down)]
    exact = ops.moe_mlp(few[0], double[0], double[1], few[1], ids[some], tier="reference")
    exact_grads = torch.autograd.grad(exact, few, grad[some].double())
    for result, right in ((y[some], exact), (grads[0][some], exact_grads[0]), (grads[3][some], exact_grads[1])):
        error = (result.double() - right).norm(dim=1) / right.norm(dim=1)
        assert error.max() < 2**-6, error
    # A weight's gradient is a sum over every row of its expert: compared for one column of the last expert.
    hit = ids == experts - 1
    token = hit.any(dim=1)
    weight = (weights * hit).sum(dim=1)[token].detach().double()
    gate, up = (x[token].detach().double() @ double[0][-1].T).chunk(2, dim=1)
    column = (torch.nn.functional.silu(gate) * up)[:, 7] * weight
    right = grad[token].double().T @ column
    assert (grads[2][-1, :, 7].double() - right).norm() / right.norm() < 2**-6


def test_an_id_that_names_no_expert_is_a_device_assertion() -> None:
    for tokens in (3, 200):
        code = (
            "import torch\n"
            "from moe import ops\n"
            f"x, w = torch.ones({tokens}, 16, device='cuda'), torch.ones({tokens}, 1, device='cuda')\n"
            f"ids = torch.full(({tokens}, 1), 2, device='cuda')\n"
            "ops.moe_mlp(x, torch.ones(2, 32, 16).cuda(), torch.ones(2, 16, 16).cuda(), w, ids)\n"
            "torch.cuda.synchronize()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0 and "neither -1 nor in [0, E)" in done.stdout + done.stderr


def test_a_transformer_trains_and_generates() -> None:
    torch.manual_seed(0)
    model = moe.Transformer(moe.preset("tiny")).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    moe.balance.attach(model, optimizer)
    ids = torch.randint(0, model.config.vocab_size, (2, 64), device="cuda")
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert moe.generate(model, ids[:, :5], max_new_tokens=4).shape == (2, 9)
