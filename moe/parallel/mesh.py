"""Device meshes: which ranks hold which parameters and experts."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import ParallelError
from moe.parallel.collective_log import CollectiveLog


@dataclass(frozen=True)
class Mesh:
    """Two device meshes of the same ranks: one for routed experts, one for all other parameters.

    All ranks are data-parallel; there is no tensor or pipeline parallelism.

    Attributes:
        dense: [replicate, shard], for parameters other than routed experts: each is sharded over `shard` ranks.
        experts: [replicate, shard, ep]. `ep` consecutive ranks divide the experts of a layer, and the share of each is
            sharded over `shard` ranks.
        log: collective log of this rank.
    """

    dense: DeviceMesh
    experts: DeviceMesh
    log: CollectiveLog

    @property
    def size(self) -> int:
        """Number of ranks; each has its own part of the global batch."""
        return self.dense.size()

    @property
    def ep(self) -> int:
        """Number of ranks that divide the experts of a layer."""
        return self.experts["ep"].size()

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return device_of(self.dense)

    def __str__(self) -> str:
        replicas, shards = self.dense.shape
        copies = "1 copy" if replicas == 1 else f"{replicas} copies"
        return f"{self.size} ranks: EP {self.ep}, parameters sharded over {shards}, {copies}"


def device_of(mesh: DeviceMesh) -> torch.device:
    """Device of this rank on a mesh."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def make_mesh(
    *, ep: int = 1, dp_shard: int | None = None, dp_replicate: int = 1, log: CollectiveLog | None = None
) -> Mesh:
    """Make a mesh of all ranks of the default process group, which must exist. A collective call.

    Args:
        ep: number of consecutive ranks that divide the experts of a layer.
        dp_shard: number of ranks that shard all other parameters (FSDP); default: all ranks / `dp_replicate`. Experts
            are also sharded, over max(1, dp_shard / ep) ranks.
        dp_replicate: number of replicas of the sharded parameters. More than 1 is hybrid sharding (HSDP); with
            dp_shard = 1 it is plain data parallelism.
        log: collective log, for example that of `start`; default: a new one.

    Raises:
        ParallelError: the numbers do not fit together, or there is no process group.
    """
    if not dist.is_initialized():
        raise ParallelError("no process group: start with torchrun and enter moe.parallel.start() first")
    world = dist.get_world_size()
    if dp_shard is None:
        dp_shard = world // dp_replicate if dp_replicate > 0 else 0
    for name, value in (("ep", ep), ("dp_shard", dp_shard), ("dp_replicate", dp_replicate)):
        if value < 1:
            raise ParallelError(f"{name} = {value}: expected 1 or more")
    if dp_replicate * dp_shard != world:
        product = f"dp_replicate x dp_shard = {dp_replicate} x {dp_shard}"
        raise ParallelError(f"{product}: expected {world}, the number of ranks")
    if world % ep:
        raise ParallelError(f"ep = {ep}: expected a divisor of the {world} ranks")
    if dp_shard % ep and ep % dp_shard:
        raise ParallelError(f"ep = {ep}: expected a divisor or a multiple of dp_shard = {dp_shard}")
    shards = max(1, dp_shard // ep)
    kind = "cuda" if "cuda:nccl" in dist.get_backend_config() else "cpu"  # or both: cpu:gloo,cuda:nccl
    dense = _device_mesh(kind, replicate=dp_replicate, shard=dp_shard)
    experts = _device_mesh(kind, replicate=world // (ep * shards), shard=shards, ep=ep)
    return Mesh(dense, experts, log if log is not None else CollectiveLog(dist.get_rank()))


def group_timeout(kind: str) -> timedelta:
    """Timeout of the default process group; torch's default for every other group is half an hour."""
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
