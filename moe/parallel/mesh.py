"""Which ranks hold what: the meshes of data, shards and experts."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import ParallelError
from moe.parallel.journal import Journal


@dataclass(frozen=True)
class Mesh:
    """The ranks, seen twice. Every rank has data of its own; there is no tensor or pipeline parallelism.

    Attributes:
        dense: [replicas, shards], for what is not a routed expert's: a parameter is cut over `shards` ranks.
        experts: [replicas, shards, ep]: `ep` ranks in a row divide the experts of a layer among themselves, and what
            one of them has is cut over `shards` ranks again.
        journal: what this rank has done on it.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    journal: Journal

    @property
    def size(self) -> int:
        """Ranks in all, each with its part of the global batch."""
        return self.dense.size()

    @property
    def ep(self) -> int:
        return self.experts["ep"].size()

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return device_of(self.dense)

    def __str__(self) -> str:
        replicas, shards = self.dense.shape
        copies = "1 copy" if replicas == 1 else f"{replicas} copies"
        return f"{self.size} ranks: EP {self.ep}, parameters cut over {shards}, {copies}"


def device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def make_mesh(
    *, ep: int = 1, dp_shard: int | None = None, dp_replicate: int = 1, journal: Journal | None = None
) -> Mesh:
    """The mesh over all ranks of the default process group, which runs already. A collective call.

    Args:
        ep: ranks among which the experts of a layer are divided; consecutive ones, so that they share a node.
        dp_shard: ranks over which every other parameter is cut (FSDP); by default all ranks / `dp_replicate`.
        dp_replicate: copies of that; more than 1 is hybrid sharding (HSDP), dp_shard = 1 plain data parallelism.
        journal: in which collectives are noted, that of `start` for instance; by default a new one.

    Experts are cut over max(1, dp_shard / ep) ranks besides.

    Raises:
        ParallelError: numbers that do not fit each other, or no process group.
    """
    if not dist.is_initialized():
        raise ParallelError("no process group: start with torchrun, and call moe.parallel.start() first")
    world = dist.get_world_size()
    if dp_shard is None:
        dp_shard = world // dp_replicate if dp_replicate > 0 else 0
    for name, value in (("ep", ep), ("dp_shard", dp_shard), ("dp_replicate", dp_replicate)):
        if value < 1:
            raise ParallelError(f"{name} = {value}: expected 1 or more")
    if dp_replicate * dp_shard != world:
        raise ParallelError(
            f"dp_replicate {dp_replicate} x dp_shard {dp_shard} = {dp_replicate * dp_shard} ranks, "
            f"but there are {world}"
        )
    if world % ep:
        raise ParallelError(f"ep = {ep}: expected a divisor of the {world} ranks")
    if dp_shard % ep and ep % dp_shard:
        raise ParallelError(f"ep = {ep}: expected a divisor or a multiple of dp_shard = {dp_shard}")
    shards = max(1, dp_shard // ep)
    kind = "cuda" if "cuda:nccl" in dist.get_backend_config() else "cpu"  # or both: cpu:gloo,cuda:nccl
    dense = _device_mesh(kind, replicate=dp_replicate, shard=dp_shard)
    experts = _device_mesh(kind, replicate=world // (ep * shards), shard=shards, ep=ep)
    return Mesh(dense, experts, journal if journal is not None else Journal(dist.get_rank()))


def group_timeout(kind: str) -> timedelta:
    """That of the default group; torch would give every other group its own half an hour."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD._get_backend(torch.device(kind)).options._timeout


def _device_mesh(kind: str, **dims: int) -> DeviceMesh:
    options: Any = {}
    kinds: Any = dist.ProcessGroupNCCL.Options if kind == "cuda" else dist.ProcessGroupGloo._Options  # pyright: ignore[reportAttributeAccessIssue]
    for name in dims:
        made = kinds()
        made._timeout = group_timeout(kind)
        options[name] = made
    return init_device_mesh(kind, tuple(dims.values()), mesh_dim_names=tuple(dims), backend_override=options)
