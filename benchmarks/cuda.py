"""Timing on a GPU: events with a cold L2 cache, CUDA graphs, peak memory, driver version."""

import contextlib
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Timer

LARGEST_CACHE = 2**28  # bytes, more than the last-level cache of any known GPU


def timer() -> Timer:
    """A timer that measures one call by events, after flushing the cache."""
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
    """While the block runs, raise RuntimeError if the host waits for the device."""
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        # torch warns that it does not detect every synchronisation.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


class NotCapturable(Exception):
    """A call cannot be captured as a CUDA graph; the message is the reason."""


@dataclass(frozen=True)
class Captured:
    """A captured call: `replay` writes `result`, which was filled with NaN before the first replay."""

    replay: Callable[[], None]
    result: Any


def capture(call: Callable[[], Any], pool: Any) -> Captured:
    """Capture a graph of the call, with its memory in `pool`. Raises NotCapturable."""
    try:
        # Checked first, because a failed capture leaves its bookkeeping in the allocator.
        with no_waiting():
            call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise NotCapturable(str(error)) from error
        raise NotCapturable("waits for the device") from None
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()
        torch.cuda.current_stream().wait_stream(aside)
        # The outer context restores the stream if the end of the capture raises.
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
    """Fill at most 1 GiB that the allocator will hand out next with NaN, so that unwritten results show."""
    torch.full((min(bytes_, 2**30) // 4,), torch.nan, device="cuda")


def peak_bytes(call: Callable[[], Any]) -> int:
    """Peak memory that one call allocates, including its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def driver() -> str | None:
    """Version of the NVIDIA driver; None if unknown."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split("\n") or [""])[0].strip() or None
