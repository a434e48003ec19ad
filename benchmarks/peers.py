"""The candidates: ours and its peers, each as a function of the same inputs.

A peer is absent if its package cannot be imported, which is tried only when the peer is used. A peer's own layout of
the inputs (ids in int32, for example) is made when the call is built, outside the timing.

Your own peer, `--peer FILE.py:FUNCTION`, is called with a `LayerInputs` and returns y [T, D]. For train, y must be
differentiable in the inputs' x, gate_up, down and weights.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import BadInput, one_line
from moe.ops import grouped_mm, moe_mlp, route
from moe.ops.library import Tier

# Bytes, a quarter of an H200: transformers' batched_mm copies an expert's weights for every routed row.
MOST_COPIED = 2**35


@dataclass(frozen=True)
class LayerInputs:
    """The expert MLP of a layer: y[t] = sum over k of weights[t, k] * (silu(x @ gate.T) * (x @ up.T)) @ down.T

    x [T, D], gate_up [E, 2F, D] with the gate rows first, down [E, D, F], weights [T, K] float32, expert_ids [T, K]
    int64. If train, x, gate_up, down and weights require gradients, and grad [T, D] is the gradient of y.
    """

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    expert_ids: Tensor
    grad: Tensor
    train: bool

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.gate_up, self.down, self.weights


@dataclass(frozen=True)
class GemmInputs:
    """a [R, K] x b [E, K, N] -> [R, N], or a [M, R] x b [R, N] -> [E, M, N]; offs [E] int32 ends the groups."""

    a: Tensor
    b: Tensor
    offs: Tensor


@dataclass(frozen=True)
class RouteInputs:
    """logits [T, E] float32 -> weights [T, K], softmax over the selected experts, and their ids [T, K]."""

    logits: Tensor
    top_k: int


Call = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """Builders of calls for each operation that the peer supports; None for others.

    Attributes:
        needs: module that must be importable.
        backward: whether the layer is differentiable.
        same_work: False for a yardstick that does other work; its results are not judged.
        note: returns a remark on the timings, asked after the call was built.
    """

    name: str
    layer: Callable[[LayerInputs], Call] | None = None
    gemm: Callable[[GemmInputs], Call] | None = None
    route: Callable[[RouteInputs], Call] | None = None
    needs: str = "torch"
    cuda_only: bool = False
    backward: bool = True
    same_work: bool = True
    note: Callable[[], str] | None = None

    @property
    def ours(self) -> bool:
        return self is OURS

    def absent(self, device: str) -> str:
        """Why the peer cannot run here; empty if it can."""
        try:
            importlib.import_module(self.needs)
        except Exception as error:  # a package may fail in any way while it is imported
            return f"{type(error).__name__}: {one_line(error)}"
        return "needs CUDA" if self.cuda_only and device != "cuda" else ""


def tier_for(tensor: Tensor) -> Tier:
    """ "triton" on a GPU, so that torch's operators are never timed in place of the kernels."""
    return "auto" if tensor.device.type == "cpu" else "triton"


def _ours_layer(i: LayerInputs) -> Call:
    return lambda: moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids, tier=tier_for(i.x))


def _ours_gemm(i: GemmInputs) -> Call:
    return lambda: grouped_mm(i.a, i.b, i.offs, tier=tier_for(i.a))


def _ours_route(i: RouteInputs) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        routing = route(i.logits, top_k=i.top_k, scoring_func="softmax", tier=tier_for(i.logits))
        return routing.weights, routing.expert_ids

    return call


def _dense_layer(i: LayerInputs) -> Call:
    """Only the products of one dense MLP, over the same number of rows."""
    rows = i.x.detach().repeat_interleave(i.expert_ids.shape[1], dim=0)
    gate_up, down = i.gate_up.detach()[0], i.down.detach()[0]
    hidden, grad = torch.randn_like(rows @ down), torch.randn_like(rows)

    def call() -> None:
        wide = rows @ gate_up.t()
        _ = hidden @ down.t()
        if i.train:
            _ = grad @ down
            _ = grad.t() @ hidden
            _ = wide @ gate_up
            _ = wide.t() @ rows

    return call


def _dense_gemm(i: GemmInputs) -> Call:
    """One product with the total size of all groups."""
    b = i.b if i.b.dim() == 2 else i.b[0]
    return lambda: i.a @ b


def _loop_layer(i: LayerInputs) -> Call:
    top_k = i.expert_ids.shape[1]

    def call() -> Tensor:
        order = i.expert_ids.flatten().argsort(stable=True)
        counts = torch.bincount(i.expert_ids.flatten(), minlength=i.down.shape[0]).tolist()
        parts = []
        for expert, slots in enumerate(order.split(counts)):
            if counts[expert]:
                gate, up = (i.x.index_select(0, slots // top_k) @ i.gate_up[expert].t()).chunk(2, dim=1)
                parts.append((F.silu(gate) * up) @ i.down[expert].t())
        weights = i.weights.flatten().index_select(0, order)[:, None]
        rows = (torch.cat(parts) * weights).to(i.x.dtype)
        return torch.zeros_like(i.x).index_add(0, order // top_k, rows)

    return call


def _loop_gemm(i: GemmInputs) -> Call:
    def call() -> Tensor:
        ends = i.offs.tolist()
        spans = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if i.b.dim() == 2:
            return torch.stack([i.a[:, span] @ i.b[span] for span in spans])
        return torch.cat([i.a[span] @ i.b[g] for g, span in enumerate(spans)])

    return call


def _torch_layer(i: LayerInputs) -> Call:
    top_k, experts = i.expert_ids.shape[1], i.down.shape[0]

    def call() -> Tensor:
        order = i.expert_ids.flatten().argsort(stable=True)
        # Counting this way does not wait for the device, so a graph can be captured.
        edges = torch.arange(experts, device=i.x.device)
        ids = i.expert_ids.flatten().index_select(0, order)
        offs = torch.searchsorted(ids, edges, right=True).to(torch.int32)
        wide = F.grouped_mm(i.x.index_select(0, order // top_k), i.gate_up.transpose(1, 2), offs=offs)
        gate, up = wide.chunk(2, dim=1)
        rows = F.grouped_mm(F.silu(gate) * up, i.down.transpose(1, 2), offs=offs)
        weights = i.weights.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(i.x).index_add(0, order // top_k, (rows * weights).to(i.x.dtype))

    return call


def _torch_gemm(i: GemmInputs) -> Call:
    return lambda: F.grouped_mm(i.a, i.b, offs=i.offs)


def _torch_route(i: RouteInputs) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        best = i.logits.softmax(dim=1).topk(i.top_k, dim=1)
        return best.values / best.values.sum(dim=1, keepdim=True), best.indices

    return call


def _transformers(backend: str) -> Callable[[LayerInputs], Call]:
    def build(i: LayerInputs) -> Call:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        experts, d, n = i.down.shape
        copied = i.expert_ids.numel() * 3 * d * n * i.x.element_size()
        if backend == "batched_mm" and copied > MOST_COPIED:
            raise ValueError(f"would copy {copied / 2**30:.0f} GiB of weights")
        config = Qwen3MoeConfig(num_experts=experts, hidden_size=d, moe_intermediate_size=n)
        config._experts_implementation = backend
        with torch.device("meta"):
            module: Any = Qwen3MoeExperts(config)
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = i.gate_up, i.down
        return lambda: module(i.x, i.expert_ids, i.weights)

    return build


def _quick(config: Any) -> bool:
    """Whether a configuration is kept for Liger's autotuning, which takes minutes per shape with all of them.

    Kept are the tiles that Liger uses without tuning, and larger ones.
    """
    tile = config.kwargs
    if "BLOCK_H" in tile:  # the sum over k
        return tile["BLOCK_H"] in (128, 512) and tile.get("BLOCK_K") == 4
    if "BLOCK_M" in tile:  # weight gradients
        return tile.get("BLOCK_N") == 128 and tile.get("BLOCK_K") == 32
    return tile.get("BLOCK_N") == 128 and tile.get("BLOCK_K") == 64 and config.num_stages <= 4


@cache
def _liger_tuning() -> str:
    """Limit the autotuning of Liger's kernels, once; returns a description of the limits."""
    try:
        kernels = vars(importlib.import_module("liger_kernel.ops.fused_moe_kernels"))
    except ImportError:
        kernels = {}
    numbers = []
    for name, kernel in kernels.items():
        configs = getattr(kernel, "configs", None)
        if isinstance(configs, list):
            kernel.configs = list(filter(_quick, configs)) or configs
            numbers.append(f"{name.strip('_')} {len(kernel.configs)} of {len(configs)}")
    return f"autotuned over {', '.join(numbers) or 'all'} configurations"


def _liger(i: LayerInputs) -> Call:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    _liger_tuning()
    ids = i.expert_ids.int()
    return lambda: LigerFusedMoEFunction.apply(i.x, i.gate_up, i.down, ids, i.weights)


def _scattermoe(i: LayerInputs) -> Call:
    from scattermoe.parallel_experts import (  # pyright: ignore[reportMissingImports]
        flatten_sort_count,
        parallel_linear,
    )

    def call() -> Tensor:
        where = flatten_sort_count(i.expert_ids, num_experts=i.down.shape[0])
        wide = parallel_linear(i.x, i.gate_up.permute(0, 2, 1), i.expert_ids.shape[1], *where, grouped_out=True)
        gate, up = wide.chunk(2, dim=-1)
        hidden, weights = F.silu(gate) * up, i.weights.to(i.x.dtype)
        return parallel_linear(hidden, i.down.permute(0, 2, 1), 1, *where, grouped_in=True, gates=weights)

    return call


def _sonicmoe(i: LayerInputs) -> Call:
    from sonicmoe import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    tokens, top_k = i.expert_ids.shape
    token = torch.arange(tokens, device=i.x.device, dtype=torch.int32).repeat_interleave(top_k)
    ids = i.expert_ids.flatten().int()

    def call() -> Tensor:
        return moe_general_routing_inputs(
            i.x,
            i.weights.flatten(),
            token,
            ids,
            i.gate_up.permute(1, 2, 0),
            None,
            i.down.permute(1, 2, 0),
            None,
            i.down.shape[0],
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            not i.train,
            concat_layout=True,
        )[0]

    return call


def _moe_ops_layer(i: LayerInputs) -> Call:
    from moe_ops import grouped_gemm, permute, unpermute  # pyright: ignore[reportMissingImports]

    (tokens, top_k), experts = i.expert_ids.shape, i.down.shape[0]
    ids = i.expert_ids.int()

    def call() -> Tensor:
        rows, row_id_map, offsets = permute(i.x, ids, 0, experts)
        gate, up = grouped_gemm(rows, i.gate_up, offsets).chunk(2, dim=1)
        rows = grouped_gemm(F.silu(gate) * up, i.down, offsets)
        return unpermute(rows, row_id_map, i.weights, tokens, top_k)

    return call


def _moe_ops_gemm(i: GemmInputs) -> Call:
    from moe_ops import grouped_gemm  # pyright: ignore[reportMissingImports]

    if i.b.dim() == 2:
        raise ValueError("has no product over ragged rows")
    stored_transposed = i.b.stride(1) == 1
    b = i.b.transpose(1, 2) if stored_transposed else i.b
    offsets = F.pad(i.offs, (1, 0))  # its kernels read both ends of a group
    return lambda: grouped_gemm(i.a, b, offsets, trans_b=stored_transposed)


def _moe_ops_route(i: RouteInputs) -> Call:
    from moe_ops import fused_topk_softmax  # pyright: ignore[reportMissingImports]

    return lambda: fused_topk_softmax(i.logits, i.top_k, fp32_routing=True)


def _by_expert(i: LayerInputs) -> tuple[Tensor, Tensor]:
    """Slots in the order of their experts, and slots of each expert, int32, without waiting for the device."""
    ids, order = i.expert_ids.flatten().sort(stable=True)
    edges = torch.arange(i.down.shape[0] + 1, device=ids.device)
    return order.int(), torch.searchsorted(ids, edges).diff().int()


def _triton_kernels_layer(i: LayerInputs) -> Call:
    from triton_kernels.tensor import make_ragged_tensor_metadata  # pyright: ignore[reportMissingImports]

    tokens, top_k = i.expert_ids.shape
    gate_up, down = i.gate_up.transpose(1, 2), i.down.transpose(1, 2)
    try:
        from triton_kernels.matmul import matmul  # pyright: ignore[reportMissingImports]
        from triton_kernels.reduce import reduce  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _matmul_ogs_layer(i)

    def call() -> Tensor:
        order, counts = _by_expert(i)
        rows = make_ragged_tensor_metadata(counts, order.numel())
        gate, up = matmul(i.x, gate_up, None, a_ragged_metadata=rows, gather_indx=order // top_k).chunk(2, dim=1)
        weights = i.weights.flatten().index_select(0, order)
        hidden = F.silu(gate) * up
        slots = matmul(hidden, down, None, a_ragged_metadata=rows, scatter_indx=order, gammas=weights)
        return reduce(slots.view(tokens, top_k, -1), dim=1)[0]

    return call


def _matmul_ogs_layer(i: LayerInputs) -> Call:
    """triton_kernels as of Triton 3.6."""
    from triton_kernels.matmul_ogs import (  # pyright: ignore[reportMissingImports]
        GatherIndx,
        RoutingData,
        ScatterIndx,
        matmul_ogs,
    )
    from triton_kernels.tensor import make_ragged_tensor_metadata  # pyright: ignore[reportMissingImports]

    top_k, experts = i.expert_ids.shape[1], i.down.shape[0]
    gate_up, down = i.gate_up.transpose(1, 2), i.down.transpose(1, 2)

    def call() -> Tensor:
        order, counts = _by_expert(i)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
        weights = i.weights.flatten().index_select(0, order)
        rows = make_ragged_tensor_metadata(counts, order.numel())
        routing = RoutingData(weights, counts, experts, top_k, rows)
        wide = matmul_ogs(i.x, gate_up, None, routing, gather_indx=GatherIndx(order, place))
        gate, up = wide.chunk(2, dim=1)
        scatter = ScatterIndx(place, order)
        return matmul_ogs(F.silu(gate) * up, down, None, routing, scatter_indx=scatter, gammas=weights)

    return call


def _triton_kernels_gemm(i: GemmInputs) -> Call:
    from triton_kernels.tensor import make_ragged_tensor_metadata  # pyright: ignore[reportMissingImports]

    if i.b.dim() == 2:
        raise ValueError("its product over ragged rows requires groups padded with zeros")
    counts = i.offs.diff(prepend=i.offs.new_zeros(1))
    rows = make_ragged_tensor_metadata(counts, i.a.shape[0])
    try:
        from triton_kernels.matmul import matmul  # pyright: ignore[reportMissingImports]
    except ImportError:  # as of Triton 3.6
        from triton_kernels.matmul_ogs import RoutingData, matmul_ogs  # pyright: ignore[reportMissingImports]

        routing = RoutingData(None, counts, len(counts), 1, rows)
        return lambda: matmul_ogs(i.a, i.b, None, routing)
    return lambda: matmul(i.a, i.b, None, a_ragged_metadata=rows)


def _vllm(i: LayerInputs) -> Call:
    from vllm.model_executor.layers.fused_moe import fused_experts  # pyright: ignore[reportMissingImports]

    ids = i.expert_ids.int()
    return lambda: fused_experts(hidden_states=i.x, w1=i.gate_up, w2=i.down, topk_weights=i.weights, topk_ids=ids)


OURS = Peer("moesmith", _ours_layer, _ours_gemm, _ours_route)
PEERS = (
    Peer("dense", _dense_layer, _dense_gemm, same_work=False),
    Peer("loop", _loop_layer, _loop_gemm),
    Peer("torch", _torch_layer, _torch_gemm, _torch_route),
    Peer("transformers-grouped_mm", _transformers("grouped_mm"), needs="transformers"),
    Peer("transformers-batched_mm", _transformers("batched_mm"), needs="transformers"),
    Peer("transformers-eager", _transformers("eager"), needs="transformers"),
    Peer("liger", _liger, needs="liger_kernel.ops.fused_moe", cuda_only=True, note=_liger_tuning),
    Peer("scattermoe", _scattermoe, needs="scattermoe.parallel_experts", cuda_only=True),
    Peer("sonicmoe", _sonicmoe, needs="sonicmoe", cuda_only=True),
    Peer("moe_ops", _moe_ops_layer, _moe_ops_gemm, _moe_ops_route, needs="moe_ops", cuda_only=True),
    Peer(
        "triton_kernels",
        _triton_kernels_layer,
        _triton_kernels_gemm,
        needs="triton_kernels.tensor",
        cuda_only=True,
        backward=False,
    ),
    Peer("vllm", _vllm, needs="vllm.model_executor.layers.fused_moe", cuda_only=True, backward=False),
)
DESCRIPTIONS = {
    "moesmith": "moe.ops: moe_mlp, grouped_mm, route",
    "dense": "torch.matmul with the same FLOPs: a yardstick that does other work, so it is not checked",
    "loop": "one torch.matmul for each expert",
    "torch": "F.grouped_mm between index_select and index_add; softmax and topk",
    "transformers-grouped_mm": "transformers' Qwen3MoeExperts, grouped_mm backend",
    "transformers-batched_mm": "transformers' Qwen3MoeExperts, batched_mm backend",
    "transformers-eager": "transformers' Qwen3MoeExperts, eager backend",
    "liger": "Liger-Kernel's LigerFusedMoEFunction, autotuned over 4 to 6 of a kernel's 16 to 40 configurations",
    "scattermoe": "ScatterMoE's parallel_linear",
    "sonicmoe": "SonicMoE's moe_general_routing_inputs",
    "moe_ops": "moe-ops: permute, grouped_gemm, unpermute; fused_topk_softmax",
    "triton_kernels": "triton's triton_kernels: matmul (before triton 3.7: matmul_ogs) with torch's sort and SwiGLU; "
    "forward only",
    "vllm": "vLLM's fused_experts; forward only",
}


def load_peer(spec: str) -> Peer:
    """The peer `FILE.py:FUNCTION`. Raises BadInput."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not path or not name.isidentifier():
        raise BadInput(f"--peer {spec}: not a function of a file; expected FILE.py:FUNCTION")
    if not file.is_file():
        raise BadInput(f"--peer {spec}: no file {file}")
    found = importlib.util.spec_from_file_location(f"benchmarks_peer_{file.stem}", file)
    if found is None or found.loader is None:
        raise BadInput(f"--peer {spec}: {file} is not a Python file")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # foreign code may fail in any way
        raise BadInput(f"--peer {spec}: {type(error).__name__}: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"--peer {spec}: {file} has no function {name}")
    return Peer(f"{file}:{name}", lambda inputs: lambda: function(inputs))
