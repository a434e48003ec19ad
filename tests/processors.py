"""Run the numeric tests as on other x86 processors, with 1 and 2 threads.

    python -m tests.processors                         all that this machine has
    python -m tests.processors --leg avx2-1 avx512-2   only these legs
    python -m tests.processors --leg avx2-1 -- tests/ops/test_ops.py -x

A leg limits the instruction sets of torch, oneDNN and MKL and sets the number
of threads. Its name is the instruction set, or "default" for no limit, and the
number of threads. Arguments after -- are passed to pytest; test files among
them replace the numeric tests.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = (
    "ops/test_ops",
    "ops/test_contract",
    "ops/test_routing",
    "ops/test_quantization",
    "ops/test_matmul",
    "ops/test_int8",
    "layer/test_layer",
    "layer/test_balance",
    "model/test_model",
    "model/test_attention_blocks",
    "model/test_loss",
    "model/test_generation",
    "model/test_speculative",
    "model/test_quantized",
    "model/test_int8",
    "model/test_packed",
    "train/test_optimizer",
    "checkpoint/test_quantised",
    "checkpoint/test_transformers",
)
SLOW = ("integrations/test_transformers", "train/test_trainer", "train/test_train", "train/test_tiny")

# torch obeys the first, oneDNN the second; without AVX-512 torch computes half-precision products with its own kernels.
# MKL obeys the third on Intel. On AMD it ignores that one (MKL 2024.2: a product has the same bits with SSE4_2), but
# MKL_CBWR selects other kernels, which sum in another order.
LIMITS = {
    "default": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LIMITED = {name for limits in LIMITS.values() for name in limits} | set(THREADS)


@dataclass(frozen=True)
class Leg:
    instructions: str
    threads: int

    def __str__(self) -> str:
        return f"{self.instructions}-{self.threads}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in LIMITED}
        own = {
            "MOESMITH_LEG": str(self),
            "OMP_WAIT_POLICY": "passive",
        }  # spinning threads slow others down on busy cores
        return kept | LIMITS[self.instructions] | dict.fromkeys(THREADS, str(self.threads)) | own


LEGS = {str(leg): leg for leg in (Leg(instructions, threads) for instructions in LIMITS for threads in (1, 2))}


def lacks(instructions: str) -> bool:
    supported = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}
    return instructions in supported and not supported[instructions]()


def pytest_configure(config: pytest.Config) -> None:
    """Check in a leg's process, where this module is a pytest plugin, that the limits are in effect."""
    leg = LEGS[os.environ["MOESMITH_LEG"]]
    found = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    expected = leg.instructions.upper() if leg.instructions != "default" else found[0], leg.threads
    if found != expected:
        raise pytest.UsageError(
            f"{leg}: limits not in effect; expected {expected[0]}, {expected[1]} threads; "
            f"found {found[0]}, {found[1]} threads"
        )


def selected(few: bool, arguments: list[str]) -> list[str]:
    """Return pytest's arguments, with the numeric test files unless `arguments` names files."""
    if any(Path(argument.partition("::")[0]).is_file() for argument in arguments):
        return arguments
    files = [f"tests/{name}.py" for name in (FILES if few else FILES + SLOW)]
    return [*files, *(["-k", "not compile"] if few else []), *arguments]


def run(leg: Leg, arguments: list[str]) -> bool:
    """Run one leg and print its result, after pytest's output if a test failed; return whether all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.processors", *arguments]
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=leg.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = process.communicate()[0]
    except KeyboardInterrupt:
        process.kill()
        process.wait()
        raise
    counts = re.findall(r"^(?:=+ )?(\d+ .+?|no tests ran) in [\d.]+s", output, re.MULTILINE)
    passed = process.returncode == 0
    if not passed:
        print(output)
    result = counts[-1] if counts else f"pytest exited with status {process.returncode}"
    print(f"{leg}: {'passed' if passed else 'FAILED'}, {time.monotonic() - started:.0f} s: {result}", flush=True)
    return passed


def main(argv: list[str] | None = None) -> int:
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.processors",
        usage="%(prog)s [-h] [--leg NAME [NAME ...]] [--few] [--list]\n" + " " * 34 + "[-- ARGUMENT ...]",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--leg",
        nargs="+",
        metavar="NAME",
        default=list(LEGS),
        help=f"Legs to run (see below), from {', '.join(LEGS)} (default: all)",
    )
    parser.add_argument(
        "--few",
        action="store_true",
        help="Skip transformers' experts, training runs and compiled graphs, as CI does",
    )
    parser.add_argument("--list", action="store_true", help="Print each leg's environment and exit")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="Arguments for pytest, after --")
    options = parser.parse_args(argv)
    unknown = [name for name in options.leg if name not in LEGS]
    if unknown:
        print(f"--leg: unknown leg; expected one of {', '.join(LEGS)}; found {unknown[0]}", file=sys.stderr)
        return 2
    legs = [LEGS[name] for name in dict.fromkeys(options.leg)]
    if options.list:
        for leg in legs:
            limits = LIMITS[leg.instructions] | dict.fromkeys(THREADS, str(leg.threads))
            print(f"{leg}: {' '.join(f'{name}={value}' for name, value in limits.items())}")
        return 0
    absent = {leg.instructions for leg in legs if lacks(leg.instructions)}
    for instructions in sorted(absent):
        print(f"{instructions}: not run, because this processor does not support it")
    arguments = selected(options.few, options.arguments)
    results = [run(leg, arguments) for leg in legs if leg.instructions not in absent]
    return int(not all(results))


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
