"""What the kernels' launchers would launch, found without a GPU: the launchers run on tensors without data.

A tensor on the meta device refuses to give a value to the host, so that a launcher that passes here cannot wait for the
device; and the arguments say what Triton would compile, by the same rules: integers equal to 1 become constants, those
divisible by 16 are known to be, unless the kernel says `do_not_specialize`.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from moe_triton import tiling
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Gpu:
    """A target of the kernels, and the bytes of shared memory that one block may use on it."""

    name: str
    target: GPUTarget
    shared_memory: int


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("sm_80", GPUTarget("cuda", 80, 32), 166912),
        Gpu("sm_86", GPUTarget("cuda", 86, 32), 101376),
        Gpu("sm_89", GPUTarget("cuda", 89, 32), 101376),
        Gpu("sm_90", GPUTarget("cuda", 90, 32), 232448),
        Gpu("sm_100", GPUTarget("cuda", 100, 32), 232448),
        Gpu("sm_120", GPUTarget("cuda", 120, 32), 101376),
        Gpu("gfx942", GPUTarget("hip", "gfx942", 64), 65536),
    )
}


@dataclass(frozen=True)
class Launch:
    """One launch. Two with an equal `key` run the same binary."""

    kernel: JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.signature, self.constants, self.divisible, self.options


def _launch(kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    assert set(given) == set(names), f"{kernel.fn.__name__}: {set(given) ^ set(names)}"
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            assert type(value) is int, f"{name} = {value!r}"
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible.append(name)
    options = {name: value for name, value in kwargs.items() if name not in names}
    parts = (signature, constants, options)
    signature, constants, options = (tuple(sorted(part.items(), key=lambda item: item[0])) for part in parts)
    return Launch(kernel, grid, signature, constants, tuple(sorted(divisible)), options)


def record(function: Callable[..., Any], *args: Any, shared_memory: int = 232448, **kwargs: Any) -> list[Launch]:
    """The launches of a launcher for tensors on the meta device, on a GPU with that much shared memory."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not callable(grid) and not warmup
        assert all(0 < n < limit for n, limit in zip(grid, (2**31, 65536, 65536), strict=False)), grid
        launches.append(_launch(self, grid, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiling, "shared_memory", lambda device: shared_memory),
    ):
        function(*args, **kwargs)
    return launches


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel that multiplies in a loop: before it, in one pass through it, and after it."""

    before: int
    step: int
    after: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs: bytes of shared and of local memory, registers, wgmma instructions, spills; how
    many asynchronous copies are under way while products are computed (see `copies_ahead`); and for NVIDIA's GPUs its
    instructions and how many programs one multiprocessor holds."""

    shared: int
    local: int
    registers: int
    wgmma: int
    spills: int
    ahead: int | None = None
    code: Code | None = None
    programs: int = 0


def _binary(launch: Launch, gpu: Gpu) -> Any:
    signature = dict(launch.signature)
    order = [parameter.name for parameter in launch.kernel.params]
    source = ASTSource(
        launch.kernel,
        {name: signature[name] for name in order},
        constexprs={(order.index(name),): value for name, value in launch.constants},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    return triton.compile(source, target=gpu.target, options=dict(launch.options))


def copies_ahead(ttgir: str) -> int | None:
    """The fewest copies that the wait before a loop's product leaves under way, 0 where a loop with a product loads
    into registers; None without such a wait or load in a loop. What follows the loop is not looked at."""
    found: list[int] = []
    regions: list[str] = []
    loop: dict[str, int] = {}  # of the innermost loop so far: its first wait before a product, products, loads
    for line in ttgir.splitlines():
        if line.lstrip().startswith("}"):
            closed = regions.pop()
            if closed == "loop":
                if loop.get("products") and (loop.get("loads") or "wait" in loop):
                    found.append(0 if loop.get("loads") else loop["wait"])
                loop = {}
        if re.search(r"\{( loc\(.*)?$", line):
            regions.append("loop" if "scf.for" in line else "other")
            loop = {} if regions[-1] == "loop" else loop
        if "loop" not in regions:
            continue
        if re.search(r"(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", line):
            loop["products"] = 1
        if "tt.load " in line:
            loop["loads"] = 1
        if (wait := re.search(r"ttg\.async_wait .*num = (\d+)", line)) and "products" not in loop:
            loop["wait"] = int(wait[1])
    return min(found, default=None)


def instructions(sass: str) -> Code | None:
    """Counts the instructions before, in and after the loop that multiplies with tensor cores; None without a loop.

    The loop is what the first backward branch over a product goes back to; what follows the last instruction that ends
    the program is padding.
    """
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    ends = [at for at, text in found if "EXIT" in text or "RET" in text]
    for at, text in found:
        target = re.search(r"BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
        first = int(target[1], 16) if target else at
        inside = [text for place, text in found if first <= place <= at]
        if first < at and any(re.search(r"[HQI]G?MMA|UTC\w*MMA", text) for text in inside):
            before, after = sum(place < first for place, _ in found), sum(at < place <= max(ends) for place, _ in found)
            return Code(before, len(inside), after)
    return None


def programs(launch: Launch, gpu: Gpu, registers: int, shared: int) -> int:
    """Programs that one multiprocessor of an NVIDIA GPU holds. Each takes 1 KB of shared memory besides its own, so
    that one of a block's largest size just fits; a thread gets a multiple of 8 registers. (A limit on warps, 48 or 64,
    binds none that multiplies.)"""
    threads = 32 * dict(launch.options).get("num_warps", 4)
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, (gpu.shared_memory + 1024) // (shared + 1024))


def ptx(launch: Launch, gpu: Gpu) -> str:
    return _binary(launch, gpu).asm["ptx"]


def compile(launch: Launch, gpu: Gpu) -> Resources:
    binary = _binary(launch, gpu)
    shared = binary.metadata.shared
    if gpu.target.backend == "hip":
        text = binary.asm["amdgcn"]

        def number(field: str) -> int:
            return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])  # pyright: ignore[reportOptionalSubscript]

        return Resources(
            shared, number("private_segment_fixed_size"), number("vgpr_count"), 0, number("vgpr_spill_count")
        )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def run(*command: str) -> str:
            return subprocess.run(
                [str(tools / command[0]), *command[1:], file.name], capture_output=True, text=True
            ).stdout

        usage = run("cuobjdump", "--dump-resource-usage")
        code = run("cuobjdump", "-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found, usage
    assert "EXIT" in code, code[:500]
    return Resources(
        shared,
        int(found[2]) + int(found[3]),
        int(found[1]),
        binary.asm["ptx"].count("wgmma.mma_async"),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        copies_ahead(binary.asm["ttgir"]),
        instructions(code),
        programs(launch, gpu, int(found[1]), shared),
    )
