"""A pytest plugin that runs the operators' tests on the Triton kernels.

    TRITON_INTERPRET=1 python -m pytest -p tests.support.kernels FILE...  by Triton's interpreter: float32 and float16
    python -m pytest -p tests.support.kernels FILE...                     on the GPU: bfloat16 as well

The operators' CPU implementations are replaced by ones that call the kernels, on the CPU or on a copy on the GPU. Every
buffer that a kernel is given or allocates stands between guard bands and is poisoned where nothing was written: a read
beyond it shows in the result, a write beyond it fails the call. In the interpreter every address is looked at as well:
one outside all buffers fails the call, even if nothing comes of what is read there, and is not followed.
"""

import dataclasses
import importlib
import math
import os
import pkgutil
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.ops.library import LIBRARY

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
GUARD = 256  # elements, which keeps the alignment that kernels may count on
# Torch's operators on every device.
WITHOUT_KERNELS = {"dequantize_blocks", "dequantize_mxfp4", "int8_linear", "int8_mlp"}
POISON = 2**30  # for integers, which would lead outside every buffer


def poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else 1 if dtype == torch.bool else POISON


class Guards(TorchDispatchMode):
    """Puts what is allocated inside it between guard bands; `check` says whether they are as they were."""

    entered: "Guards | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.bands: list[Tensor] = []
        self.buffers: dict[int, int] = {}  # where each begins and ends, in bytes
        self.guarded: set[int] = set()  # storages
        self.outside: set[str] = set()

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        whole = torch.full((elements + 2 * GUARD,), poison(dtype), dtype=dtype, device=DEVICE)
        self.bands += [whole[:GUARD], whole[GUARD + elements :]]
        self.guarded.add(whole.untyped_storage().data_ptr())
        self.know(whole[GUARD : GUARD + elements])
        return whole

    def know(self, tensor: Tensor) -> None:
        begin = tensor.data_ptr()
        self.buffers[begin] = max(self.buffers.get(begin, 0), begin + tensor.numel() * tensor.itemsize)

    def inside(self, addresses: np.ndarray, wanted: np.ndarray, size: int, what: str) -> np.ndarray:
        """Those of the wanted addresses at which `size` bytes belong to a buffer."""
        begins = np.array(sorted(self.buffers), dtype=np.uint64)
        ends = np.maximum.accumulate(np.array([self.buffers[int(begin)] for begin in begins], dtype=np.uint64))
        at = np.searchsorted(begins, addresses, side="right")
        found = wanted & (at > 0) & (addresses + np.uint64(size) <= ends[np.maximum(at, 1) - 1])
        if not np.array_equal(found, wanted):
            self.outside.add(what)
        return found

    def __enter__(self) -> "Guards":
        Guards.entered = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        Guards.entered = None
        super().__exit__(*args)

    def like(self, tensor: Tensor) -> Tensor:
        """A copy with the same strides."""
        if tensor.numel() == 0:
            return tensor.to(DEVICE)
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        whole = self.buffer(span, tensor.dtype)
        whole[GUARD : GUARD + span] = tensor.as_strided((span,), (1,))
        return whole.as_strided(tensor.shape, tensor.stride(), GUARD)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        if name not in ("aten::empty", "aten::empty_like", "aten::zeros", "aten::zeros_like") or not result.numel():
            for tensor in tree_leaves(result):
                storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
                if storage is not None and storage.data_ptr() not in self.guarded:
                    self.know(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            return result
        guarded = self.buffer(result.numel(), result.dtype)[GUARD : GUARD + result.numel()].view(result.shape)
        return guarded.zero_() if "zeros" in name else guarded

    def check(self, name: str) -> None:
        assert not self.outside, f"{name}: a kernel {' and '.join(sorted(self.outside))} outside all buffers"
        for band in self.bands:
            whole = band.isnan() if band.is_floating_point() else band == poison(band.dtype)
            assert whole.all(), f"{name}: a kernel wrote outside a buffer"


def on_kernels(name: str, page: ModuleType) -> Callable[..., Any]:
    tiered = getattr(torch.ops.moesmith, name).default._schema.arguments[-1].name == "tier"
    original = torch.library.get_kernel(f"moesmith::{name}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def implementation(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return original.call_boxed(keys, *args)
        args = args[:-1] if tiered else args
        guards = Guards()
        given = [guards.like(arg) if isinstance(arg, Tensor) else arg for arg in args]
        before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in given]
        with guards:
            result = getattr(page, name)(*given)
        guards.check(name)
        for old, new in zip(before, given, strict=True):
            if isinstance(new, Tensor):
                assert torch.equal(old.nan_to_num(), new.nan_to_num()), f"{name}: a kernel wrote into an argument"
        return tuple(t.cpu().clone() for t in result) if isinstance(result, tuple) else result.cpu().clone()

    return implementation


def look_at_addresses(builder: Any) -> None:
    """Makes Triton's interpreter ask the guards that are entered, if any, before it reads and writes."""
    load, store = builder.create_masked_load, builder.create_masked_store

    def looked_at(addresses: Any, mask: Any, what: str) -> Any:
        if Guards.entered is None:
            return mask
        size = max(1, addresses.get_element_ty().primitive_bitwidth // 8)
        wanted = np.broadcast_to(mask.data, addresses.data.shape)
        return type(mask)(Guards.entered.inside(addresses.data, wanted, size, what), mask.dtype)

    def masked_load(addresses: Any, mask: Any, *rest: Any) -> Any:
        return load(addresses, looked_at(addresses, mask, "read"), *rest)

    def masked_store(addresses: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(addresses, value, looked_at(addresses, mask, "wrote"), *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


def pages() -> list[ModuleType]:
    import moe_triton

    return [importlib.import_module(f"moe_triton.{info.name}") for info in pkgutil.iter_modules(moe_triton.__path__)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", help="i/n: of the tests, only each n-th from the i-th on")


def pytest_configure(config: pytest.Config) -> None:
    import moe.ops

    assert moe.ops
    if INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder

        # Device assertions, as with `debug` on a GPU; a wrapped offset is to show in the numbers.
        interpreter_builder.options = dataclasses.replace(
            interpreter_builder.options, debug=True, sanitize_overflow=False
        )
        look_at_addresses(interpreter_builder)
    # numpy's, for `tl.max` and for an exponential that is meant to be infinite
    for message in ("All-NaN slice", "overflow encountered in (multiply|exp2)"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")
    # numpy's, for the bounds of loops in the interpreter of Triton 3.6
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
    seen = []
    for name in sorted(definition.partition("::")[2] for definition in LIBRARY._op_defs):
        for page in pages():
            function = getattr(page, name, None)
            if function is not None and function.__module__ == page.__name__:
                seen.append(name)
                with warnings.catch_warnings(action="ignore"):  # torch's, about the overriding
                    LIBRARY.impl(name, on_kernels(name, page), "CPU", allow_override=True)
    missing = {definition.partition("::")[2] for definition in LIBRARY._op_defs} - set(seen)
    assert missing == WITHOUT_KERNELS, f"no kernels for {missing}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops what the kernels leave to others: float64; bfloat16 where the interpreter would be wrong."""
    left_out = {torch.float64, torch.bfloat16} if INTERPRETED else {torch.float64}
    dropped = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("dtype") in left_out
    ]
    shard, shards = map(int, str(config.getoption("--shard")).split("/"))
    left = [item for item in items if item not in dropped]
    items[:] = left[shard::shards]
    config.hook.pytest_deselected(items=dropped)
