"""Parts of distributed tensors: which part a rank holds, and how it is initialised."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from moe.errors import ParallelError
from moe.init import fill
from moe.roles import role_of


def mesh_of(model: nn.Module) -> DeviceMesh:
    """Mesh of a parallel model."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return parameter.device_mesh
    raise ParallelError("the model is not on a mesh; call parallelize first")


def fill_part(tensor: Tensor, name: str, **how: Any) -> None:
    """Initialise this rank's part of a tensor, as `moe.init.fill` initialises the whole tensor."""
    if not isinstance(tensor, DTensor):
        fill(tensor, name, **how)
        return
    local = tensor.to_local()
    part = region(tensor)
    if role_of(name).name == "experts":  # each expert has its own generator, so the others need not be filled
        whole = local.new_empty(local.shape[0], *tensor.shape[1:])
        fill(whole, name, first_expert=part[0].start, **how)
        local.copy_(whole[:, part[1], part[2]])
    else:
        whole = local.new_empty(tensor.shape)
        fill(whole, name, **how)
        local.copy_(whole[part])


def region(tensor: DTensor, coordinate: Iterable[int] | None = None) -> tuple[slice, ...]:
    """Slices of the whole tensor that a rank holds: this rank, or the one at a coordinate of the tensor's mesh.

    If several mesh dimensions shard the same tensor dimension, they do so in order, except that `_StridedShard`
    dimensions come last. FSDP uses `_StridedShard` for experts that are already divided among ranks.
    """
    mesh = tensor.device_mesh
    index = list(mesh.get_coordinate() or ()) if coordinate is None else list(coordinate)
    bounds = [(0, size) for size in tensor.shape]
    order = sorted(range(mesh.ndim), key=lambda i: _is_strided(tensor.placements[i]))
    for i in order:
        placement = tensor.placements[i]
        if isinstance(placement, Replicate):
            continue
        dim: int = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
        low, high = bounds[dim]
        each = -(-(high - low) // mesh.size(i))  # like torch.chunk: the last parts may be shorter or empty
        start = min(low + index[i] * each, high)
        bounds[dim] = (start, min(start + each, high))
    return tuple(slice(low, high) for low, high in bounds)


def part_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, distributed like `example`, without communication."""
    if not isinstance(example, DTensor):
        return tensor
    part = tensor[region(example)].contiguous()
    where: Any = {"run_check": False, "shape": example.shape, "stride": example.stride()}
    return DTensor.from_local(part, example.device_mesh, example.placements, **where)


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"
