"""Joining the other ranks, and telling which of them is missing when something fails."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe.errors import ParallelError
from moe.parallel.journal import Journal


@dataclass(frozen=True)
class Watch:
    """This process among the ranks of a run."""

    rank: int
    size: int
    journal: Journal


@contextlib.contextmanager
def start(*, timeout: float = 600.0, device: str | None = None) -> Iterator[Watch]:
    """Join the ranks that torchrun has started, for the length of the block.

    Args:
        timeout: seconds after which a collective that another rank does not join is an error.
        device: "cuda" (NCCL; this process takes the GPU of its local rank) or "cpu" (gloo); by default what there is.

    Raises:
        ParallelError: not started by torchrun.
    """
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ParallelError(f"{lacking[0]} is not set: start with torchrun --nproc-per-node N ...")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Watch(dist.get_rank(), dist.get_world_size(), Journal(dist.get_rank()))
    finally:
        dist.destroy_process_group()
