"""A model onto a mesh: experts divided among ranks, everything cut by FSDP2. The only page that knows both."""

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
from moe.parallel.dispatch import AllToAllDispatcher, Payload
from moe.parallel.journal import Journal, name_ranks
from moe.parallel.mesh import Mesh, device_of
from moe.parallel.tensor_parts import fill_part, mesh_of
from moe.parallel.transport import AllToAll, eager
from moe.quantized import Quantized
from moe.router import Router


@dataclass(frozen=True)
class ParallelConfig:
    """How a model runs on a mesh.

    Attributes:
        param_dtype: of parameters while they are used, and so of activations; None is their own. Routers and correction
            biases stay float32.
        reduce_dtype: in which gradients are summed; None is float32, or the parameters' own where that is wider.
        reshard_after_forward: free a block's gathered parameters between its forward and its backward pass.
        activation_checkpointing: recompute each block in its backward pass.
        compile: torch.compile each block, by `compile_backend`; the exchange of tokens stays eager.
        payload: how rows travel to their experts, see `AllToAllDispatcher`.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    payload: Payload = "same"


class DividedExperts(Experts):
    """The experts of a layer, divided among the ranks of a mesh's one dimension.

    Parameters are DTensors of all experts, so that optimizers, checkpoints and norms see one layer wherever it is; the
    forward pass takes this rank's. Their gradients are means over the ranks: each adds to them what its own loss asks
    for, as ranks do to whole parameters, where the average is taken by whoever sums.
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
            if len(mine) != share:  # a copy, so that the others can be freed
                mine = mine[start : start + share].clone()
            divided = DTensor.from_local(mine, ep, [Shard(0)], run_check=False)
            self.register_parameter(name, nn.Parameter(divided, requires_grad=parameter.requires_grad))

    @eager  # Dynamo would have to trace the gradient's division over parts that FSDP has gathered
    def forward(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        return super().forward(x, weights, expert_ids)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        parts = (None if p is None else _MeanGradient.apply(_local(p), self.ranks) for p in super().operands())
        return tuple(parts)  # pyright: ignore[reportReturnType]


class _MeanGradient(torch.autograd.Function):
    """x, with a gradient that is divided by `ranks`."""

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
    layer: MoELayer, ep: DeviceMesh, *, payload: Payload = "same", name: str = "", journal: Journal | None = None
) -> MoELayer:
    """Make one `MoELayer`, in anybody's model, expert-parallel: in place; returns the layer.

    Each rank of `ep` (one dimension of a DeviceMesh) keeps E / ranks experts, by its place, of those it holds, and
    reaches the others through `AllToAllDispatcher`. Give it the layer whole (equal on all ranks), or with this rank's
    experts only (`moe.load(..., experts=...)`). Every rank must call the layer equally often, with as many tokens as it
    likes, none too. Expert gradients are means over the ranks of `ep`, as data parallelism has them: leave them out of
    its own average over these ranks (DDP: `_ddp_params_and_buffers_to_ignore`), and average them over ranks with the
    same experts, if there are any.

    Raises:
        ParallelError: E is not a multiple of the ranks, or the layer holds another number of experts.
    """
    if isinstance(layer.experts, DividedExperts):
        raise ParallelError("the experts of this layer are divided already", layer=name)
    if not isinstance(layer.experts, Experts | Quantized):
        problem = f"its experts are a {type(layer.experts).__name__}: divide them first, and then wrap them"
        raise ParallelError(problem, layer=name)
    total, held = layer.config.n_routed_experts, _held(layer.experts)
    dispatcher = AllToAllDispatcher(AllToAll(ep.get_group(), name, journal), total, payload=payload)
    if held not in (total, dispatcher.experts_per_rank):
        wanted = f"all {total} or this rank's {dispatcher.experts_per_rank}"
        raise ParallelError(f"the layer holds {held} experts: expected {wanted}", layer=name)
    experts: nn.Module = layer.experts
    if isinstance(experts, Experts):
        experts = DividedExperts(experts, ep, total)
    elif held != dispatcher.experts_per_rank:
        raise ParallelError("quantised experts cannot be divided: load this rank's with experts=range(...)", layer=name)
    layer.divide(experts, dispatcher)
    return layer


def _held(experts: nn.Module) -> int:
    return len(next(iter((*experts.parameters(), *experts.buffers()))))


def parallelize(model: Transformer, mesh: Mesh, config: ParallelConfig | None = None) -> Transformer:
    """Put `model` onto `mesh`: in place; returns the model. A collective call.

    In this order: experts divided among `mesh.experts["ep"]`; activation checkpointing; compilation of each block;
    FSDP2 units from the inside out: each layer's experts, each router (float32 throughout), each block, the rest.

    A model on the meta device needs `materialize` afterwards, and no rank ever has it whole; a materialised one must be
    equal on all ranks. Call `moe.balance.attach` and build optimizers after this, and not between a forward pass and
    its backward pass, when FSDP has put gathered copies in the place of some parameters. Every rank runs each step on
    its own part of the global batch, with equally many forward passes; gradients equal those of one process on the
    whole batch, and `clip_grad_norm` gives the norm of them all. A rank's `out.loss` and `out.losses` are weighed by
    how much of the batch it has: their mean over the ranks is that of the batch. `out.load` and `load_report` count the
    rank's own tokens.

    Raises:
        ParallelError: a mesh that does not fit the model, quantised weights, a model that is parallel already.
    """
    config = config or ParallelConfig()
    journal = mesh.journal
    _check(model, mesh)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if mesh.ep > 1:
        for name, layer in layers.items():
            divide_experts(layer, mesh.experts["ep"], payload=config.payload, name=name, journal=journal)
    model.set_activation_checkpointing(config.activation_checkpointing)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if config.compile:
        for block in blocks:
            block.compile(backend=config.compile_backend)

    wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    reduce_dtype = config.reduce_dtype or wide
    policy = MixedPrecisionPolicy(param_dtype=config.param_dtype, reduce_dtype=reduce_dtype)
    exact = MixedPrecisionPolicy(param_dtype=wide, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # FSDP would cast every floating-point argument, and routing weights and tables of rotations stay what they are.
    uncast = MixedPrecisionPolicy(config.param_dtype, reduce_dtype, cast_forward_inputs=False)
    dense, cut = _data_mesh(mesh.dense), _data_mesh(mesh.experts)
    reshard: Any = {"reshard_after_forward": config.reshard_after_forward}
    for name, layer in layers.items():
        if mesh.ep > 1:
            place = partial(_placement, mesh=mesh.experts, layer=name)
            fully_shard(layer.experts, mesh=cut, mp_policy=uncast, shard_placement_fn=place, **reshard)
        fully_shard(layer.gate, mesh=dense, mp_policy=exact, **reshard)
    for block in model.layers:
        fully_shard(block, mesh=dense, mp_policy=uncast, **reshard)
    for module in model.mtp:
        fully_shard(module, mesh=dense, mp_policy=uncast, **reshard)
    fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_AllGather(journal, name or "embedding and head"))
            module.set_custom_reduce_scatter(_ReduceScatter(journal, name or "embedding and head"))
            module.set_force_sum_reduction_for_comms(True)  # then one division: gloo has no average
    model.join(MeshBatch(journal))
    model.register_forward_pre_hook(_FirstPass(), prepend=True)
    model.register_forward_hook(_cut_again)
    return model


class _FirstPass:
    """FSDP allocates what it gathers into at the first pass, and cannot use tensors that inference mode has made."""

    def __init__(self) -> None:
        self.over = False

    def __call__(self, model: nn.Module, _: Any) -> None:
        over, self.over = self.over, True
        if over or not torch.is_inference_mode_enabled():
            return
        with torch.inference_mode(False):
            for module in model.modules():  # the root first: who is first to be gathered is taken for it
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()


def _cut_again(model: nn.Module, *_: Any) -> None:
    """FSDP leaves the outermost unit gathered until a backward pass: without one, `model.parameters()` would give
    copies that no optimizer may have, and the next pass would not see what optimizers have done."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


class _AllGather(DefaultAllGather):
    def __init__(self, journal: Journal, layer: str) -> None:
        self.journal, self.layer = journal, layer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        with self.journal.collective(self.layer, "gather of parameters", group, size=input_tensor.numel()):
            return super().__call__(output_tensor, input_tensor, group, async_op)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, journal: Journal, layer: str) -> None:
        self.journal, self.layer = journal, layer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        with self.journal.collective(self.layer, "reduction of gradients", group, size=input_tensor.numel()):
            return super().__call__(output_tensor, input_tensor, group, op, async_op)


class MeshBatch(GlobalBatch):
    """The global batch of a model on a mesh, whose ranks have parts with unequal numbers of tokens."""

    lockstep = True

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    @eager
    def sum(self, values: Tensor, operation: str) -> Tensor:
        return self._sum(values, self.group, "routers", operation)

    def _per_rank(self, counts: Sequence[Tensor]) -> Tensor:
        # Over all ranks, whatever group counts experts: the ranks' gradients are averaged over all of them.
        everywhere = self._sum(torch.stack(list(counts)), None, "loss", "sum of counts")
        return everywhere.clamp_min(1).double() / dist.get_world_size()

    def _sum(self, values: Tensor, group: Any, layer: str, operation: str) -> Tensor:
        with self.journal.collective(layer, operation, group, size=values.numel()):
            dist.all_reduce(values, group=group)
        return values


def _check(model: Transformer, mesh: Mesh) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            raise ParallelError("quantised weights cannot be sharded: load with dtype='auto'", layer=name)
        if isinstance(module, FSDPModule):
            raise ParallelError("this model is on a mesh already", layer=name or "the model")
        if isinstance(module, DividedExperts):
            raise ParallelError("its experts are divided already", layer=name)
        if isinstance(module, Router) and module.counter is not None:
            raise ParallelError("call balance.attach, and build optimizers, after parallelize", layer=name)
    if mesh.ep > 1 and model.config.num_moe_layers and model.config.n_routed_experts % mesh.ep:
        raise ParallelError(f"ep = {mesh.ep}: expected a divisor of the {model.config.n_routed_experts} experts")


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP cuts and copies over: one dimension where nothing is copied."""
    return mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]


def _placement(parameter: nn.Parameter, mesh: DeviceMesh, layer: str) -> Shard:
    """Whole experts where they can be counted out evenly, else rows of each."""
    shards, held = mesh["shard"].size(), parameter.shape[0] // mesh["ep"].size()
    if held % shards == 0:
        return Shard(0)
    if parameter.shape[1] % shards == 0:
        return Shard(1)
    each = f"{held} experts of {parameter.shape[1]} rows"
    raise ParallelError(f"{each} cannot be cut evenly over {shards} ranks", layer=layer)


@torch.no_grad()
def materialize(model: Transformer, *, seed: int = 0) -> Transformer:
    """Give a parallel model on the meta device its initial values: those of `Transformer(config, seed=seed)`.

    Each rank makes what it holds, one tensor at a time, whatever the mesh. In place; returns the model.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        model.to_empty(device=device_of(mesh_of(model)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        fill_part(tensor, name, std=model.config.initializer_range, seed=seed)
    return model


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """In lists of one device mesh each (plain tensors: one list): parameter groups for optimizers.

    On CUDA torch's optimizers update a whole group at once, and refuse one that mixes meshes.
    """
    lists: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        lists.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(lists.values())


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, *, journal: Journal | None = None) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`; returns the norm before, a float64 scalar.

    The norm is that of all gradients together, of every rank's part counted once, whatever meshes they lie on; it is
    equal on all ranks. NaN and infinity come out as they are. As `torch.nn.utils.clip_grad_norm_`, which refuses a list
    of DTensors of different meshes.

    With a mesh's `journal`, ranks that have not done the same collectives since the run began raise here, so that no
    optimizer steps on gradients that were put together from different ones. It costs one host synchronisation.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=_local(gradients[0]).device if gradients else None)
    world = dist.get_world_size()
    for gradient in gradients:
        square = torch.linalg.vector_norm(_local(gradient), dtype=torch.float64).square()
        total = total + square / _copies(gradient, world)
    if journal is None:
        dist.all_reduce(total)
    else:
        total = _sum_in_step(total, journal)
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = _local(gradient)
        local.mul_(scale.to(local.dtype))
    return norm


def _sum_in_step(total: Tensor, journal: Journal) -> Tensor:
    """The sum of all ranks' `total`, if their journals agree."""
    layer, operation = "gradients", "clip norm"
    with journal.collective(layer, operation, size=1):
        # Filled on the device: a tensor made of a number of the host would wait for it.
        mine = torch.stack((total, *(torch.full_like(total, n) for n in (journal.count, journal.digest))))
        everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, mine)
    found = torch.stack(everybody)
    done = [(int(count), int(digest)) for count, digest in found[:, 1:].tolist()]
    others = [rank for rank, each in enumerate(done) if each != (journal.count, journal.digest)]
    if others:
        raise journal.error(f"{name_ranks(others)} did other collectives until here", layer, operation)
    return found[:, 0].sum()


def _copies(tensor: Tensor, world: int) -> int:
    if not isinstance(tensor, DTensor):
        return world
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        parts *= 1 if isinstance(placement, Replicate) else size
    return world // parts
