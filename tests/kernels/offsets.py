"""Offsets around 2^31 elements, where 32-bit arithmetic wraps; run by tests/kernels/test_kernels.py in the interpreter.

The tensors are that large but for the most part never touched: their pages do not exist. Each result is compared with
that of the same numbers in an ordinary tensor. A wrapped offset is negative; what it leads to belongs to the tensor's
memory, so that it shows in the result and does not end the process.
"""

import math
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_triton import mlp
from moe_triton.activation import SwiGLU
from moe_triton.grouped_gemm import products, rows
from moe_triton.permutation import Order, Tiles, combine, permute
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = 2**31
around = pytest.mark.parametrize("far", [LIMIT - 1, LIMIT, LIMIT + 1])
D, F = 24, 16


NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python has a name for since 3.13


def untouched(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros, with LIMIT elements before them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    pages = mmap.mmap(-1, (LIMIT + math.prod(shape)) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype)[LIMIT:].view(shape)


class Untouched(TorchDispatchMode):
    """Buffers that kernels write to come from `untouched`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func.overloadpacket._qualified_op_name in ("aten::empty", "aten::empty_like") and result.numel()
        return untouched(*result.shape, dtype=result.dtype) if made else result


@pytest.fixture(autouse=True)
def _untouched_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, Untouched():
        patch.setattr("torch.utils.deterministic.fill_uninitialized_memory", False)
        yield


def spread(tensor: Tensor, *stride: int) -> Tensor:
    """The same values with other, enormous strides."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, stride, strict=True))
    whole = untouched(span)
    far = whole.as_strided(tensor.shape, stride, whole.storage_offset())
    far.copy_(tensor)
    return far


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


def order(first: int, groups: tuple[int, ...]) -> Order:
    """Rows of `groups` that begin at row `first`, one token each, in tiles of 16."""
    ends = first + torch.tensor(groups).cumsum(0)
    starts = torch.cat([torch.tensor([first]), ends, ends[-1:]]).int()
    number = sum(groups)
    slots = torch.zeros(first + number, dtype=torch.int32)
    slots[first:] = torch.arange(number)
    position = (first + torch.arange(number))[:, None].int()
    tiles = Tiles(torch.arange(len(groups), dtype=torch.int32), torch.arange(len(groups) + 2, dtype=torch.int32), 16)
    return Order(slots, slots, position, starts, tiles)


@around
@pytest.mark.parametrize("which", ["x", "gate_up", "down", "grad"])
def test_arguments(which: str, far: int) -> None:
    ids, weights = torch.tensor([[2], [0], [1]]), torch.rand(3, 1)  # twice LIMIT - 1 is beyond it as well
    given = {"x": half(3, D), "gate_up": half(3, 2 * F, D), "down": half(3, D, F), "grad": half(3, D)}
    pre = half(3, 2 * F)

    def results() -> list[Tensor]:
        x, gate_up, down, grad = given.values()
        args = (x, gate_up, down, weights, ids, None, None)
        out = [mlp.moe_mlp_forward(*args, None, 1.0, 0.0, save)[0] for save in (False, True)]
        return [*out, *mlp.moe_mlp_backward(grad, *args, pre, None, 1.0, 0.0, [True] * 4 + [False] * 2)]

    near = results()
    inner = given[which].stride()[1:]
    given[which] = spread(given[which], far, *inner)
    assert all(torch.equal(a, b) for a, b in zip(near, results(), strict=True))


@around
def test_inner_strides(far: int) -> None:
    """A matrix whose inner dimension is the one with the enormous stride, at its second and at its last block."""
    number = order(0, (2,))
    a, b = half(2, 130), half(1, 130, 3)
    assert number.tiles is not None
    near = rows(a, b, number.starts, number.tiles)
    assert torch.equal(near, rows(a, spread(b, 1, far // 128, 1), number.starts, number.tiles))


@around
@pytest.mark.parametrize("which", ["a", "b"])
def test_steps_between_blocks_of_rows(which: str, far: int) -> None:
    """A weight's gradient whose operand's next block of rows, and every later one, is that far away."""
    starts = torch.tensor([0, 70, 70], dtype=torch.int32)
    a, b = half(70, D), half(70, F)
    near = products(a, b, starts, 1)
    a, b = (spread(t, far // 32, 1) if which == name else t for name, t in (("a", a), ("b", b)))
    assert torch.equal(near, products(a, b, starts, 1))


def test_rows() -> None:
    """Rows on both sides of the limit in everything that is made for each routed row."""
    width = 1024
    x, gate_up, down = half(5, D), half(2, 2 * width, D), half(2, D, width)
    grad, weights, pre = half(5, D), torch.rand(5, 1), half(5, 2 * width)
    results = []
    for first in (0, LIMIT // (2 * width) - 2, LIMIT // width - 2):
        o = order(first, (3, 2))
        assert o.tiles is not None
        whole, wide = untouched(first + 5, 2 * width), untouched(first + 5, width)[:, :D]
        hidden = mlp._up(x, gate_up, None, SwiGLU(), whole, o)
        made = whole[first:].clone()
        whole[first:] = pre
        out = rows(hidden, down.transpose(1, 2), o.starts, o.tiles, out=wide)
        grad_pre, scaled, dots = mlp._hidden_backward(grad, down, whole, weights, SwiGLU(), o, width)
        results.append(
            [
                *(t[first:].clone() for t in (hidden, out, grad_pre, scaled, dots)),
                made,
                combine(hidden, o.position, weights),
                products(scaled, grad, o.starts, 2, tokens=o.tokens, gather_b=True),
                mlp._sum_dots(dots, o.position, grad, None, torch.zeros(5, 1, dtype=torch.int64)),
                mlp._column_sums(grad_pre, o, 2, None),
            ]
        )
    for far_results in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], far_results, strict=True))
    assert results[0][0].abs().sum() > 0


@around
def test_permute(far: int) -> None:
    x, ids = half(2, D), torch.tensor([[1, 0], [0, 1]])
    assert torch.equal(permute(x, ids, 2)[0], permute(spread(x, far, 1), ids, 2)[0])
