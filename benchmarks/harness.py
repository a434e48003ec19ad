"""Common to all benchmarks: interleaved timing, the machine's ceilings, load by other processes, origin of a result."""

import importlib.metadata
import json
import math
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
    """An error of the user, in one line."""


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
    """Seconds of each call, `rounds` for each candidate, in the order A B A B ..., after a warm-up round.

    Other load on the machine then slows all candidates alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, call in candidates.items():
            took = timer(call)
            if i > 0:
                seconds[name].append(took)
    return seconds


def matmul_rate(dtype: torch.dtype, size: int, device: str = "cpu", timer: Timer = once) -> float:
    """FLOP/s of x W^T, x [size / 4, size] and W [size, size], as in a linear layer; the best of nine."""
    x, w = torch.randn(size // 4, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    best = min(interleave({"": lambda: F.linear(x, w)}, 9, timer)[""])
    return 2 * x.numel() * size / best


def read_rate(dtype: torch.dtype, bytes_: int) -> float:
    """Bytes/s of reading a matrix, as a sum or a matrix-vector product (as in decode); the best of nine of each."""
    width = 4096
    w = torch.ones(bytes_ // dtype.itemsize // width, width, dtype=dtype)
    x = torch.ones(width, dtype=dtype)
    readings = {"sum": w.sum, "mv": lambda: torch.mv(w, x)}
    best = min(min(seconds) for seconds in interleave(readings, rounds=9).values())
    return w.numel() * dtype.itemsize / best


def copy_rate(bytes_: int, device: str = "cpu", timer: Timer = once) -> float:
    """Bytes/s, read plus written, of copying a buffer; the best of nine."""
    source = torch.ones(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * bytes_ / min(interleave({"": lambda: target.copy_(source)}, 9, timer)[""])


class OtherProcesses:
    """CPU time that other processes use on this process's cores, from now on. Linux only.

    Time that the hypervisor takes from the machine counts as used by others.
    """

    def __init__(self) -> None:
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._begun = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Seconds: wall clock, busy time of the cores (NaN if unknown), CPU time of this process and ended children."""
        try:
            lines = {name: values for name, *values in map(str.split, STAT.read_text().splitlines())}
            busy = sum(_busy_ticks(lines[f"cpu{core}"]) for core in self._cores) / os.sysconf("SC_CLK_TCK")
        except (OSError, KeyError, ValueError):
            busy = math.nan
        return time.perf_counter(), busy, sum(os.times()[:4])

    def record(self, own: float | None = None) -> dict[str, Any]:
        """`cores`, `other_cores` (cores used by other processes on average, None if unknown), and `disturbed`.

        Args:
            own: CPU seconds of the benchmark since then, if it has several processes; default: of this process and its
                ended children.
        """
        wall, busy, mine = (now - then for now, then in zip(self._now(), self._begun, strict=True))
        cores = len(self._cores)
        mine = mine if own is None else own
        used = busy - mine
        least = max(LEAST_DISTURBANCE, LEAST_DISTURBED_SHARE * cores) * wall
        # Some sandboxes have counters that stand still, and count no work of this process either.
        known = cores > 0 and used >= -max(LEAST_SECONDS, 0.1 * mine)
        other_cores = round(min(max(0.0, used / wall), cores), 3) if known else None
        return {"cores": cores, "other_cores": other_cores, "disturbed": known and used > max(least, LEAST_SECONDS)}


def _busy_ticks(values: list[str]) -> int:
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
    return user + nice + system + irq + softirq + steal


STAT = Path("/proc/stat")
# Other processes' use of the cores that a result is marked for: background services of an idle machine use less.
LEAST_DISTURBANCE = 0.1  # cores
LEAST_DISTURBED_SHARE = 0.02  # of the cores
LEAST_SECONDS = 0.05  # smaller differences are within the resolution of the counters, ticks of 10 ms


def disturbance(records: Iterable[Mapping[str, Any]]) -> str:
    """A line on the most disturbed record; empty if none was."""
    worst = max((r for r in records if r.get("disturbed")), key=lambda r: r["other_cores"], default=None)
    return f"disturbed: other processes used {worst['other_cores']:.1f} of {worst['cores']} cores" if worst else ""


def environment(small: bool) -> dict[str, Any]:
    """Origin of a result: commit, processor, versions, load average, and whether it is a smoke test."""
    packages = ("torch", "transformers")
    return {
        "small": small,
        "commit": commit(),
        "device": cpu_name(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "load": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{cpu_model()}, {threads} thread{plural}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit checked out, followed by + if tracked files other than results differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        differs = git("status", "--porcelain", "-uno", "--", ".", f":!{RESULTS}")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object per line; without records, only check that the file is writable. Raises BadInput."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise BadInput(f"--json {path}: {error.strerror}") from None


def out_of_memory(error: BaseException) -> bool:
    """Includes the CPU allocator's error, which has no class of its own, and sizes that overflow an integer."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median_s": median(seconds), "min_s": min(seconds), "rounds": len(seconds)}


def say(progress: str) -> None:
    """Print progress to stderr."""
    print(progress, file=sys.stderr, flush=True)
