"""Timing on a GPU: events with a cold L2 cache, graphs, peak memory, the driver."""

import contextlib
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Timer

LARGEST_CACHE = 2**28  # bytes: more than the last-level cache of any GPU that we know


def timer() -> Timer:
    """Times one call by events, after its inputs have been driven out of the cache."""
    flush = torch.empty(LARGEST_CACHE, dtype=torch.uint8, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds(call: Callable[[], Any]) -> float:
        flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises RuntimeError if the host waits for the device."""
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        # torch's, that it does not see every synchronisation
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


class NotCapturable(Exception):
    """Why no CUDA graph of a call can be made."""


@dataclass(frozen=True)
class Captured:
    """`replay` writes `result`, which was NaN before the first one."""

    replay: Callable[[], None]
    result: Any


def capture(call: Callable[[], Any], pool: Any) -> Captured:
    """A graph of the call, with its memory in `pool`. Raises NotCapturable."""
    try:
        # Asked first, since a capture that fails half-way leaves the allocator's bookkeeping of it behind.
        with no_waiting():
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise NotCapturable(str(error)) from error
        raise NotCapturable("it waits for the device") from None
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream().wait_stream(aside)
        # The outer one gives the stream back where the end of a capture raises.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            result = call()
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # a peer's launcher may fail under capture in its own way
        raise NotCapturable(str(error)) from error
    return Captured(graph.replay, result)


def poison(bytes_: int) -> None:
    """Leaves NaN in memory that the allocator will hand out next, at most 1 GiB: what is not written then shows."""
    torch.full((min(bytes_, 2**30) // 4,), torch.nan, device="cuda")


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that one call had allocated beyond what was there, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split("\n") or [""])[0].strip() or None
