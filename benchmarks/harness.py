"""What every benchmark needs: interleaved timings, the machine's ceilings, where a figure comes from."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from moe.cli.doctor import cpu_model

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class BadInput(ValueError):
    """The user's mistake, in one line."""


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def once(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


Timer = Callable[[Callable[[], Any]], float]


def interleave(candidates: Mapping[str, Callable[[], Any]], rounds: int, timer: Timer = once) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` for each candidate, in the order A B A B ...; one round before them is not kept.

    What else runs on the machine then slows all of them alike, which timing them one after the other would not give.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, call in candidates.items():
            took = timer(call)
            if i > 0:
                seconds[name].append(took)
    return seconds


def matmul_rate(dtype: torch.dtype, size: int, device: str = "cpu", timer: Timer = once) -> float:
    """FLOP/s of the best of nine products x W^T as in a linear layer, x [size / 4, size] and W [size, size]."""
    x, w = torch.randn(size // 4, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    best = min(interleave({"": lambda: F.linear(x, w)}, 9, timer)[""])
    return 2 * x.numel() * size / best


def read_rate(dtype: torch.dtype, bytes_: int) -> float:
    """Bytes/s of the best of nine readings of a matrix, as a sum and as a product with a vector (which decode does)."""
    width = 4096
    w = torch.ones(bytes_ // dtype.itemsize // width, width, dtype=dtype)
    x = torch.ones(width, dtype=dtype)
    readings = {"sum": w.sum, "mv": lambda: torch.mv(w, x)}
    best = min(min(seconds) for seconds in interleave(readings, rounds=9).values())
    return w.numel() * dtype.itemsize / best


def copy_rate(bytes_: int, device: str = "cpu", timer: Timer = once) -> float:
    """Bytes/s, read and written ones counted, of the best of nine copies of a buffer."""
    source = torch.ones(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * bytes_ / min(interleave({"": lambda: target.copy_(source)}, 9, timer)[""])


def environment() -> dict[str, Any]:
    """Where a figure comes from: commit, processor, versions, and how busy the machine was."""
    packages = ("torch", "transformers")
    return {
        "commit": commit(),
        "device": cpu_name(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "load": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    return f"{cpu_model()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit checked out, with a + where tracked files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, after those that are there; of none, only sees that it can. Raises BadInput."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise BadInput(f"--json {path}: {error.strerror}") from None


def out_of_memory(error: BaseException) -> bool:
    """Also of the CPU's allocator, whose error has no class of its own, and of sizes that no integer holds."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median_s": median(seconds), "min_s": min(seconds), "rounds": len(seconds)}


def say(progress: str) -> None:
    """Progress goes to stderr: a whole run takes minutes."""
    print(progress, file=sys.stderr, flush=True)
