"""Parallelize a model on a mesh: experts divided among ranks, all parameters sharded by FSDP2.

The only module that depends on both the model and the mesh.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe.errors import ParallelError
from moe.global_batch import GlobalBatch
from moe.layer import Experts, MoELayer
from moe.model import Block, Transformer
from moe.packed import Packed
from moe.parallel.collective_log import CollectiveLog, format_ranks
from moe.parallel.dispatch import AllToAllDispatcher, Payload
from moe.parallel.mesh import Mesh, device_of
from moe.parallel.tensor_parts import fill_part, mesh_of
from moe.parallel.transport import AllToAll, eager
from moe.quantized import Quantized
from moe.router import Router
from moe.uncast import Uncast


@dataclass(frozen=True)
class ParallelConfig:
    """Options of `parallelize`.

    Attributes:
        param_dtype: dtype of unsharded parameters and of activations; None keeps the parameters' dtype. Routers and
            correction biases stay float32.
        reduce_dtype: dtype in which gradients are reduced; None is float32, or the parameters' dtype if it is wider.
        reshard_after_forward: free a block's unsharded parameters between its forward and its backward pass.
        activation_checkpointing: recompute each block in its backward pass.
        compile: compile each block with `compile_backend`; dispatch and combine stay eager.
        payload: format of the rows sent to experts, see `AllToAllDispatcher`.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    payload: Payload = "same"


class DividedExperts(Experts):
    """Experts of a layer, divided among the ranks of a one-dimensional mesh.

    Parameters are DTensors of all experts, so that optimizers, checkpoints and norms see the whole layer. The forward
    pass uses this rank's experts. Gradients are means over the ranks, as in data parallelism.
    """

    def __init__(self, whole: Experts, ep: DeviceMesh, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.activation = whole.activation
        self.ranks = ep.size()
        share = num_experts // ep.size()
        start = ep.get_local_rank() * share
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            parameter: nn.Parameter | None = getattr(whole, name)
            if parameter is None:
                self.register_parameter(name, None)
                continue
            mine = parameter.detach()
            if len(mine) != share:  # a copy, so that the other experts can be freed
                mine = mine[start : start + share].clone()
            divided = DTensor.from_local(mine, ep, [Shard(0)], run_check=False)
            self.register_parameter(name, nn.Parameter(divided, requires_grad=parameter.requires_grad))

    @eager  # otherwise Dynamo would trace the gradient's division through unsharded parameters
    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor, uncast: Uncast | None = None) -> Tensor:
        return super().forward(x, weights, expert_ids, uncast)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        parts = (None if p is None else _MeanGradient.apply(_local(p), self.ranks) for p in super().operands())
        return tuple(parts)  # pyright: ignore[reportReturnType]


class _MeanGradient(torch.autograd.Function):
    """Identity whose gradient is divided by `ranks`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


def _local(tensor: Tensor | None) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divide_experts(
    layer: MoELayer, ep: DeviceMesh, *, payload: Payload = "same", name: str = "", log: CollectiveLog | None = None
) -> MoELayer:
    """Make one `MoELayer` of any model expert-parallel, in place; returns the layer.

    Each rank of `ep` (one dimension of a DeviceMesh) keeps E / ranks consecutive experts and reaches the others through
    `AllToAllDispatcher`. The layer holds either all experts, with equal values on all ranks, or only those of this rank
    (`moe.load(..., experts=...)`). All ranks must call the layer the same number of times, each with any number of
    tokens, including 0.

    Expert gradients are means over the ranks of `ep`, as in data parallelism. Exclude these parameters from any other
    average over the same ranks (DDP: `_ddp_params_and_buffers_to_ignore`). If other ranks hold the same experts,
    average the gradients over those.

    Args:
        payload: see `AllToAllDispatcher`.
        name: name of the layer, for errors.
        log: collective log of this rank; default: a new one.

    Raises:
        ParallelError: E is not a multiple of the number of ranks, or the layer does not hold all experts or E / ranks.
    """
    if isinstance(layer.experts, DividedExperts):
        raise ParallelError("the experts of this layer are already divided", layer=name)
    if not isinstance(layer.experts, Experts | Quantized):
        found = type(layer.experts).__name__
        raise ParallelError(f"experts must be divided before they are wrapped; found {found}", layer=name)
    total, held = layer.config.n_routed_experts, _held(layer.experts)
    dispatcher = AllToAllDispatcher(AllToAll(ep.get_group(), name, log), total, payload=payload)
    if held not in (total, dispatcher.experts_per_rank):
        wanted = f"all {total} or the {dispatcher.experts_per_rank} of this rank"
        raise ParallelError(f"number of experts; expected {wanted}; found {held}", layer=name)
    experts: nn.Module = layer.experts
    if isinstance(experts, Experts):
        experts = DividedExperts(experts, ep, total)
    elif held != dispatcher.experts_per_rank:
        raise ParallelError(
            "quantised experts cannot be divided; load those of this rank with experts=range(...)", layer=name
        )
    layer.divide(experts, dispatcher)
    return layer


def _held(experts: nn.Module) -> int:
    return len(next(iter((*experts.parameters(), *experts.buffers()))))


def parallelize(model: Transformer, mesh: Mesh, config: ParallelConfig | None = None) -> Transformer:
    """Parallelize `model` on `mesh`, in place; returns the model. A collective call.

    Applied in this order: division of the experts among `mesh.experts["ep"]`; activation checkpointing; compilation of
    each block; FSDP2, innermost units first: the experts of each layer, each router (always float32), each block, the
    rest.

    A model on the meta device needs `materialize` afterwards, and no rank ever holds all of it. Any other model must
    have equal values on all ranks. Call `moe.balance.attach` and build optimizers after `parallelize`, but not between
    a forward and a backward pass, when FSDP has replaced some parameters by unsharded copies.

    In each step, every rank runs the same number of forward passes on its own part of the global batch. Gradients equal
    those of one process on the whole batch, and `clip_grad_norm` computes their global norm. `out.loss` and
    `out.losses` are weighted by the rank's share of the batch: their mean over the ranks is the loss of the batch.
    `out.load` and `load_report` count the rank's own tokens.

    Raises:
        ParallelError: the mesh does not fit the model, weights are quantised, or the model is already parallel.
    """
    config = config or ParallelConfig()
    log = mesh.log
    _check(model, mesh)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if mesh.ep > 1:
        for name, layer in layers.items():
            divide_experts(layer, mesh.experts["ep"], payload=config.payload, name=name, log=log)
    model.set_activation_checkpointing(config.activation_checkpointing)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if config.compile:
        for block in blocks:
            block.compile(backend=config.compile_backend)

    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    reduce_dtype = config.reduce_dtype or wide
    policy = MixedPrecisionPolicy(param_dtype=config.param_dtype, reduce_dtype=reduce_dtype)
    exact = MixedPrecisionPolicy(param_dtype=wide, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # FSDP must not cast all floating-point arguments, because routing weights and rotary tables keep their dtype.
    uncast = MixedPrecisionPolicy(config.param_dtype, reduce_dtype, cast_forward_inputs=False)
    dense, experts = _data_mesh(mesh.dense), _data_mesh(mesh.experts)
    reshard: Any = {"reshard_after_forward": config.reshard_after_forward}
    for name, layer in layers.items():
        if mesh.ep > 1:
            place = partial(_placement, mesh=mesh.experts, layer=name)
            fully_shard(layer.experts, mesh=experts, mp_policy=uncast, shard_placement_fn=place, **reshard)
        fully_shard(layer.gate, mesh=dense, mp_policy=exact, **reshard)
    for block in model.layers:
        fully_shard(block, mesh=dense, mp_policy=uncast, **reshard)
    for module in model.mtp:
        fully_shard(module, mesh=dense, mp_policy=uncast, **reshard)
    fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_AllGather(log, name or "embedding and head"))
            module.set_custom_reduce_scatter(_ReduceScatter(log, name or "embedding and head"))
            module.set_force_sum_reduction_for_comms(True)  # followed by one division, because gloo has no average
    model.join(MeshBatch(log))
    model.register_forward_pre_hook(_FirstPass(), prepend=True)
    model.register_forward_hook(_reshard)
    return model


class _FirstPass:
    """Hook that unshards before a first pass in inference mode.

    FSDP allocates its buffers in the first pass, and cannot use buffers allocated in inference mode later.
    """

    def __init__(self) -> None:
        self.over = False

    def __call__(self, model: nn.Module, _: Any) -> None:
        over, self.over = self.over, True
        if over or not torch.is_inference_mode_enabled():
            return
        with torch.inference_mode(False):
            for module in model.modules():  # FSDP treats the first unsharded module as the root
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()


def _reshard(model: nn.Module, *_: Any) -> None:
    """Reshard the root after a pass without gradients.

    FSDP leaves the root unsharded until a backward pass. Without one, `model.parameters()` would return unsharded
    copies, and the next pass would miss the updates of optimizers.
    """
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


class _AllGather(DefaultAllGather):
    def __init__(self, log: CollectiveLog, layer: str) -> None:
        self.log, self.layer = log, layer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with self.log.collective(self.layer, "gather of parameters", group, size=input_tensor.numel()):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, log: CollectiveLog, layer: str) -> None:
        self.log, self.layer = log, layer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        with self.log.collective(self.layer, "reduction of gradients", group, size=input_tensor.numel()):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


class MeshBatch(GlobalBatch):
    """Global batch of a model on a mesh; the parts of its ranks may have different numbers of tokens."""

    lockstep = True

    def __init__(self, log: CollectiveLog) -> None:
        super().__init__()
        self.log = log

    @eager
    def sum(self, values: Tensor, operation: str) -> Tensor:
        return self._sum(values, self.group, "routers", operation)

    def _per_rank(self, counts: Sequence[Tensor]) -> Tensor:
        # Over all ranks even if `self.group` is smaller, because gradients are averaged over all ranks.
        everywhere = self._sum(torch.stack(list(counts)), None, "loss", "sum of counts")
        return everywhere.clamp_min(1).double() / dist.get_world_size()

    def _sum(self, values: Tensor, group: Any, layer: str, operation: str) -> Tensor:
        with self.log.collective(layer, operation, group, size=values.numel()):
            dist.all_reduce(values, group=group)
        return values


def _check(model: Transformer, mesh: Mesh) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            raise ParallelError("quantised weights cannot be sharded; load with dtype='auto'", layer=name)
        if isinstance(module, Packed):
            raise ParallelError("packed weights cannot be sharded; call model.unpack() first", layer=name)
        if isinstance(module, FSDPModule):
            raise ParallelError("the model is already on a mesh", layer=name or "the model")
        if isinstance(module, DividedExperts):
            raise ParallelError("its experts are already divided", layer=name)
        if isinstance(module, Router) and module.counter is not None:
            raise ParallelError("call balance.attach, and build optimizers, after parallelize", layer=name)
    if mesh.ep > 1 and model.config.num_moe_layers and model.config.n_routed_experts % mesh.ep:
        raise ParallelError(f"ep = {mesh.ep}: expected a divisor of the {model.config.n_routed_experts} experts")


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Mesh for FSDP; one-dimensional if there is only one replica."""
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def _placement(parameter: nn.Parameter, mesh: DeviceMesh, layer: str) -> Shard:
    """Shard whole experts if they divide evenly among the ranks, otherwise rows of each expert."""
    shards, held = mesh["shard"].size(), parameter.shape[0] // mesh["ep"].size()
    if held % shards == 0:
        return Shard(0)
    if parameter.shape[1] % shards == 0:
        return Shard(1)
    each = f"{held} experts of {parameter.shape[1]} rows"
    raise ParallelError(f"{each} cannot be sharded evenly over {shards} ranks", layer=layer)


@torch.no_grad()
def materialize(model: Transformer, *, seed: int = 0) -> Transformer:
    """Initialise a parallel model on the meta device, in place; returns the model.

    On any mesh, values are those of `Transformer(config, seed=seed)`. Each rank initialises its own part, one tensor at
    a time.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        model.to_empty(device=device_of(mesh_of(model)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        fill_part(tensor, name, std=model.config.initializer_range, seed=seed)
    return model


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by device mesh, as parameter groups for optimizers; plain tensors form one group.

    On CUDA, torch's optimizers update a whole group at once and reject a group with several meshes.
    """
    lists: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        lists.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(lists.values())


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, *, log: CollectiveLog | None = None) -> Tensor:
    """Clip the global gradient norm to `max_norm`; returns the norm before clipping, a float64 scalar.

    Like `torch.nn.utils.clip_grad_norm_`, but accepts parameters on different meshes. The norm is that of all gradients
    of all ranks. It is equal on all ranks, and may be NaN or infinite.

    With `log`, raises ParallelError if the ranks have not performed the same collectives since the job began, so that
    no optimizer steps on wrong gradients. This costs one host synchronisation.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=_local(gradients[0]).device if gradients else None)
    world = dist.get_world_size()
    for gradient in gradients:
        square = torch.linalg.vector_norm(_local(gradient), dtype=torch.float64).square()
        total = total + square / _copies(gradient, world)
    if log is None:
        dist.all_reduce(total)
    else:
        total = _sum_in_step(total, log)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = _local(gradient)
        local.mul_(scale.to(local.dtype))
    return norm


def _sum_in_step(total: Tensor, log: CollectiveLog) -> Tensor:
    """Sum `total` over the ranks, if their logs agree."""
    layer, operation = "gradients", "clip norm"
    with log.collective(layer, operation, size=1):
        # `full_like` fills on the device; a tensor made on the host would synchronise.
        mine = torch.stack((total, *(torch.full_like(total, n) for n in (log.count, log.digest))))
        everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, mine)
    found = torch.stack(everybody)
    done = [(int(count), int(digest)) for count, digest in found[:, 1:].tolist()]
    others = [rank for rank, each in enumerate(done) if each != (log.count, log.digest)]
    if others:
        raise log.error(f"{format_ranks(others)} performed different collectives before this one", layer, operation)
    return found[:, 0].sum()


def _copies(tensor: Tensor, world: int) -> int:
    """Number of ranks that hold each element."""
    if not isinstance(tensor, DTensor):
        return world
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        parts *= 1 if isinstance(placement, Replicate) else size
    return world // parts
