"""Compile every kernel for every target, in the configurations that the benchmarked shapes require.

    python -m tests.compiled [--gpu sm_90 ...] [--shape NAME ...] [--dtype bfloat16 ...]
    python -m tests.compiled --table --gpu sm_90 --shape deepseek_v3 --dtype bfloat16

Requires no GPU. A kernel fails if it spills, uses local memory, or needs more shared memory than the GPU has. On NVIDIA
GPUs, half-precision products with rows that can be read 16 bytes at a time must overlap with copies for the next ones.
On sm_90, tiles of at least 64 rows must use wgmma, a weight gradient may take at most 170 instructions per step of its
largest tile, and a multiprocessor must hold two programs of the backward kernel. CI checks bfloat16 with the oldest and
newest Triton.

--table prints the resources of each product instead.
"""

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Iterable

import torch
import triton
from moe_triton import activation, grouped_gemm, mlp, permutation, routing
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.shapes import SHAPES as BENCHMARKED
from benchmarks.shapes import Shape
from tests.support.launches import GPUS, Gpu, Launch, Resources, compile, record

# Includes sizes that cannot be read 16 bytes at a time.
SHAPES = BENCHMARKED | {"odd": Shape("odd", 1000, 500, 8, 2)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUTINGS = (
    (8, "sigmoid", 8, 4, "top2", True, 2.5, 0.0),
    (6, "softmax", 8, 3, "max", False, 16.0, 0.0),
    (4, "softmax", 1, 1, "top2", True, 1.0, 0.0),
    (6, "softmax", 1, 1, "top2", True, 1.0, 1e-12),
)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer(tokens: int, shape: Shape, dtype: torch.dtype, shared: int, *, gpt_oss: bool = False) -> list[Launch]:
    """Record one layer's kernels: forward for training, backward, and forward for inference."""
    d, n, experts, top_k = shape.sizes
    x, down = meta(tokens, d, dtype=dtype), meta(experts, d, n, dtype=dtype)
    weights = meta(tokens, top_k, dtype=torch.float32)
    ids = meta(tokens, top_k, dtype=torch.int64)
    biases = (meta(experts, 2 * n, dtype=dtype), meta(experts, d, dtype=dtype)) if gpt_oss else (None, None)
    settings = (7.0, 1.702, 1.0) if gpt_oss else (None, 1.0, 0.0)
    args = (x, meta(experts, 2 * n, d, dtype=dtype), down, weights, ids, *biases)
    pre = meta(tokens * top_k, 2 * n, dtype=dtype)
    launches = [
        record(mlp.moe_mlp_forward, *args, *settings, True, shared_memory=shared),
        record(mlp.moe_mlp_backward, x, *args, pre, *settings, [True] * 6, shared_memory=shared),
        record(mlp.moe_mlp_forward, *args, *settings, False, shared_memory=shared),
    ]
    return [*itertools.chain(*launches)]


def products(shape: Shape, dtype: torch.dtype, shared: int) -> list[Launch]:
    """Record grouped_mm in all forms."""
    d, n, experts, top_k = shape.sizes
    rows = meta(4096 * top_k, d, dtype=dtype)
    weight = meta(experts, 2 * n, d, dtype=dtype)
    offs = meta(experts, dtype=torch.int32)
    grad = meta(4096 * top_k, 2 * n, dtype=dtype)
    columns = [meta(*t.shape[::-1], dtype=dtype).t() for t in (rows, grad)]
    forms = ((rows, weight.mT, offs), (weight.mT, grad.t(), offs), (weight, weight.mT, None))
    forms += tuple((a.t(), b, offs) for a in (rows, columns[0]) for b in (grad, columns[1]))
    return [launch for form in forms for launch in record(grouped_gemm.grouped_mm, *form, shared_memory=shared)]


def others(dtype: torch.dtype) -> list[Launch]:
    """Record the kernels without tiles."""
    x, ids = meta(4096, 7168, dtype=dtype), meta(4096, 8, dtype=torch.int64)
    position, weights = meta(4096, 8, dtype=torch.int64), meta(4096, 8, dtype=torch.float32)
    rows = meta(4096 * 8, 7168, dtype=dtype)
    calls = [
        record(permutation.permute, x, ids, 256),
        record(permutation.unpermute, rows, position, weights),
        record(permutation.unpermute, rows, position, None),
        record(permutation.unpermute_backward, x, rows, position, weights, [True, True]),
        record(activation.swiglu, rows, None, 1.0, 0.0),
        record(activation.swiglu_backward, rows[:, ::2], rows, 7.0, 1.702, 1.0),
    ]
    for top_k, *settings in ROUTINGS:
        for experts in (256, 64):
            logits, bias = meta(4096, experts, dtype=torch.float32), meta(experts, dtype=torch.float32)
            grad, chosen = meta(4096, top_k, dtype=torch.float32), meta(4096, top_k, dtype=torch.int64)
            calls.append(record(routing.route, logits, bias, top_k, *settings))
            after = (settings[0], *settings[4:])
            calls.append(record(routing.route_backward, grad, logits, logits, chosen, *after))
    return [*itertools.chain(*calls)]


def launches(gpu: Gpu, shapes: Iterable[Shape], dtypes: Iterable[torch.dtype]) -> dict[tuple, Launch]:
    """Return the distinct launches of the given shapes, one per binary."""
    found: list[Launch] = []
    for dtype in dtypes:
        for shape in shapes:
            gpt_oss = shape.name.startswith("gpt_oss")
            for tokens in sorted({1, 16, 64, 128, 1024, *shape.tokens}):
                found += layer(tokens, shape, dtype, gpu.shared_memory, gpt_oss=gpt_oss)
            found += products(shape, dtype, gpu.shared_memory)
        found += others(dtype)
    return {launch.key: launch for launch in found}


def multiplies_halves(launch: Launch) -> bool:
    """Whether it is a product of half-precision tiles."""
    halves = any(kind in ("*bf16", "*fp16") for _, kind in launch.signature)
    return halves and {"BLOCK_M", "BLOCK_K"} <= dict(launch.constants).keys()


def can_copy_ahead(launch: Launch) -> bool:
    """Whether it is a product of rows that can be read 16 bytes at a time."""
    sizes = {"inner", "width", "height"} & {name for name, _ in launch.signature}
    return multiplies_halves(launch) and sizes <= set(launch.divisible)


def can_use_wgmma(launch: Launch) -> bool:
    """Whether it is a product of tiles of at least 64 rows."""
    return multiplies_halves(launch) and dict(launch.constants)["BLOCK_M"] >= 64


def clamps(launch: Launch) -> bool:
    activation = dict(launch.constants).get("ACTIVATION")
    return activation is not None and activation.limit is not None


def complaint(launch: Launch, gpu: Gpu) -> str | None:
    """Return what is wrong with the binary, or None."""
    try:
        need = compile(launch, gpu)
    except Exception as error:
        return f"does not compile: {error!r}"
    if need.local or need.spills:
        return f"{need.local} bytes of local memory, {need.spills} spills, {need.registers} registers"
    if need.shared > gpu.shared_memory:
        return f"{need.shared} bytes of shared memory of {gpu.shared_memory}"
    if gpu.name == "sm_90" and can_use_wgmma(launch) and not need.wgmma:
        return "no wgmma"
    if gpu.target.backend == "cuda" and can_copy_ahead(launch) and not need.ahead:
        return "products wait for their operands"
    return slow_on_hopper(launch, need) if gpu.name == "sm_90" and can_copy_ahead(launch) else None


def slow_on_hopper(launch: Launch, need: Resources) -> str | None:
    """Check the machine code of the kernels with most work, for sm_90 and their largest tiles."""
    constants = dict(launch.constants)
    tile = launch.name, constants["BLOCK_M"], constants["BLOCK_N"]
    # The tensor cores need 1,024 cycles for a step of 128 x 256 x 64.
    if tile == ("products_kernel", 128, 256) and (need.code is None or need.code.step > 170):
        return f"instructions per step: expected at most 170; found {need.code}"
    if tile == ("hidden_backward_kernel", 128, 128) and not clamps(launch) and need.programs < 2:
        return f"programs per multiprocessor: expected 2; found {need.programs}"
    return None


def described(launch: Launch, gpu: Gpu) -> str | None:
    """Return a product's row of the table, or None for other kernels."""
    need = compile(launch, gpu) if multiplies_halves(launch) else None
    if need is None or need.code is None:
        return None
    constants, options = dict(launch.constants), dict(launch.options)
    settings = ("GATHER_A", "GATHER_B", "SAVE", "HAS_BIAS")
    name = [launch.name, *(setting for setting in settings if constants.get(setting)), *["clamped"] * clamps(launch)]
    if "SLOTS" in constants:
        name.append(f"{constants['SLOTS']} slots")
    tile = f"{constants['BLOCK_M']}x{constants['BLOCK_N']}x{constants['BLOCK_K']}"
    pipeline = f"{options['num_warps']} warps, {options['num_stages']} stages"
    code, shared = need.code, f"{need.shared / 1024:.0f} KB"
    cells = (" ".join(name), tile, pipeline, code.before, code.step, code.after, need.registers, shared, need.programs)
    return f"| {' | '.join(map(str, cells))} |"


@functools.cache
def _launches(gpu: str, shapes: str) -> list[Launch]:
    names = shapes.split(",")
    dtypes = [getattr(torch, name) for name in names.pop().split("+")]
    return list(launches(GPUS[gpu], [SHAPES[name] for name in names], dtypes).values())


def _described(task: tuple[str, str, int]) -> str | None:
    return described(_launches(*task[:2])[task[2]], GPUS[task[0]])


def _check(task: tuple[str, str, int]) -> str | None:
    gpu, launch = GPUS[task[0]], _launches(*task[:2])[task[2]]
    found = complaint(launch, gpu)
    return found and f"{gpu.name} {launch.name} {dict(launch.constants)} {dict(launch.options)}: {found}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compiled", description=(__doc__ or "").partition("\n")[0])
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    for name, text, choices in (("gpu", "Targets", GPUS), ("shape", "Shapes", SHAPES), ("dtype", "Dtypes", dtypes)):
        shown = f"{text}, from {', '.join(choices)} (default: all)"
        metavar = name.upper()
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices), metavar=metavar, help=shown)
    parser.add_argument("--table", action="store_true", help="Print a table of each product's resources; check nothing")
    args = parser.parse_args()
    shapes = ",".join([*args.shape, "+".join(args.dtype)])
    tasks = [(gpu, shapes, i) for gpu in args.gpu for i in range(len(_launches(gpu, shapes)))]
    if args.table:
        print("| kernel | tile | pipeline | before | step | after | registers | shared memory | programs |")
        print("|" + "---|" * 9)
    wrong = 0
    with multiprocessing.get_context("spawn").Pool() as pool:
        results = pool.imap(_described if args.table else _check, tasks, chunksize=8)
        for found in track(results, "compiling", len(tasks), console=Console(stderr=True)):
            if found:
                wrong += not args.table
                print(found, flush=True)
    if args.table:
        return 0
    print(f"Triton {triton.__version__}: {len(tasks)} kernels for {', '.join(args.gpu)}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
