"""torch.export under no_grad, as it is usually called, and what is done with the result afterwards."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import moe
from tests.support.models import MLA, small_model

WIDTH = 16
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, in copying an export


def sharpened(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return module.eval()


@pytest.fixture(scope="module")
def layer() -> nn.Module:
    return sharpened(moe.MoELayer(WIDTH, 8, 4, 2, n_shared_experts=1, seed=0))


@pytest.fixture(scope="module")
def exported(layer: nn.Module) -> ExportedProgram:
    sizes = {0: Dim("B", min=1, max=64), 1: Dim("S", min=1, max=64)}
    with torch.no_grad():
        return export(layer, (torch.randn(2, 5, WIDTH),), dynamic_shapes=(sizes,), strict=False)


def saves(program: ExportedProgram) -> list[Any]:
    """Whether the experts of a graph keep what a backward pass needs."""
    return [node.args[10] for node in program.graph.nodes if "moe_mlp_forward" in str(node.target)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["exported", "decomposed", "loaded"])
def test_an_exported_layer_is_the_layer(way: str, layer: nn.Module, exported: ExportedProgram) -> None:
    program = exported
    if way == "decomposed":  # as ONNX, ExecuTorch and AOTInductor do
        program = exported.run_decompositions()
    elif way == "loaded":
        file = io.BytesIO()
        torch.export.save(exported, file)
        program = torch.export.load(io.BytesIO(file.getvalue()))
    assert saves(program) == [False]
    run = program.module()
    for shape in ((2, 5), (1, 1), (3, 17)):
        x = torch.randn(*shape, WIDTH)
        with torch.no_grad():
            close(run(x), layer(x))
        found, expected = (list(gradients(module, x)) for module in (run, layer))
        for a, b in zip(found, expected, strict=True):
            close(a, b)


class RouterLogits(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.gate.logits(x)


@pytest.mark.parametrize("way", ["exported", "compiled"])
def test_a_graph_made_without_autocast_routes_in_float32_under_it(way: str, layer: nn.Module) -> None:
    logits, x = RouterLogits(layer), torch.randn(5, WIDTH)
    if way == "exported":
        run = export(logits, (x,), strict=False).module()
    else:
        torch._dynamo.reset()
        run = torch.compile(logits, backend="aot_eager", fullgraph=True)
        run(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(x), logits(x)) and logits(x).dtype == torch.float32


def test_a_training_layer_with_losses_is_refused() -> None:
    """Their gradients would be lost, and under no_grad there are none."""
    training, x = moe.MoELayer(WIDTH, 8, 4, 2, aux_loss_alpha=0.1), torch.randn(2, 5, WIDTH)
    with pytest.raises(ValueError, match=r"^torch.export drops .*; export in eval\(\)"):
        export(training, (x,), strict=False)
    with torch.no_grad():
        close(export(training, (x,), strict=False).module()(x), training(x))


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    leaves = [x, *(parameter for _, parameter in sorted(module.named_parameters()))]
    return torch.autograd.grad(module(x).square().sum(), leaves)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


@pytest.mark.parametrize("attention", ["mla", "sinks"])
def test_an_exported_model_is_the_model(attention: str) -> None:
    sinks: dict[str, Any] = dict(head_dim=8, attention_sinks=True, expert_bias=True, router_bias=True)
    model = Logits(small_model(MLA if attention == "mla" else sinks, num_hidden_layers=2)).eval()
    sizes = {0: Dim("B", min=1, max=8), 1: Dim("S", min=2, max=64)}
    with torch.no_grad():
        program = export(model, (torch.ones(2, 5, dtype=torch.int64),), dynamic_shapes=(sizes,), strict=False)
    run = program.module()
    for shape in ((2, 5), (1, 2), (3, 17)):
        ids = torch.randint(0, 61, shape)
        close(run(ids), model(ids))
