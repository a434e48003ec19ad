"""Free memory of a device, so that a model that does not fit is refused before it is allocated."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe.errors import CheckpointError


def check_fits(folder: Path, nbytes: int, device: torch.device) -> None:
    """Raise `CheckpointError` if the device has less than `nbytes` of free memory."""
    free, what = free_bytes(device)
    if nbytes > free:
        problem = f"the model does not fit into {what}"
        raise CheckpointError(
            folder, problem, expected=f"at most {free:,} bytes, the free memory", found=f"{nbytes:,} bytes"
        )


def free_bytes(device: torch.device) -> tuple[int, str]:
    """Return the free bytes under the tightest limit, and its name; 2^63 bytes if the device does not report any."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"the memory of {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return 2**63, str(device)
    return min(_host_limits(), default=(2**63, "memory"))


def _host_limits() -> Iterator[tuple[int, str]]:
    meminfo = _lines("/proc/meminfo")
    for line in meminfo:
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024, "this machine's memory"
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(next(iter(_lines("/proc/self/statm")), "0").split()[0])
        yield max(limit - pages * resource.getpagesize(), 0), "the address space of this process (ulimit -v)"
    for folder, most, used in _cgroups():
        numbers: list[Any] = [next(iter(_lines(f"{folder}/memory.{name}")), "") for name in (most, used)]
        if all(number.isdecimal() for number in numbers):
            yield max(int(numbers[0]) - int(numbers[1]) + _cached(folder), 0), "the memory of this container"


def _cgroups() -> Iterator[tuple[str, str, str]]:
    """Yield the folders of this process's control group and its parents, with their files of limit and usage.

    Within a container the group is often called "/", and its folder is the root.
    """
    groups = {"": "/", "memory": "/"}  # of version 2, which has a single hierarchy, and of version 1
    for line in _lines("/proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        groups |= {kind: path for kind in kinds.split(",") if kind in groups}
    for kind, most, used in (("", "max", "current"), ("memory", "limit_in_bytes", "usage_in_bytes")):
        parts = [part for part in ("/sys/fs/cgroup", kind, *groups[kind].split("/")) if part]
        for depth in range(len(parts), 1 if kind else 0, -1):
            yield "/".join(parts[:depth]), most, used


def _cached(folder: str) -> int:
    """Return the bytes of the container's page cache that can be reclaimed."""
    for line in _lines(f"{folder}/memory.stat"):
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
