"""Tile sizes of grouped products, chosen by a rule instead of autotuning, so that no call is slower than the next."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of a product; `group_m` row tiles share a pass over the weights.

    With `all_registers` a kernel may use all registers; otherwise some releases of ptxas spill to fit one more program.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 16
    all_registers: bool = False

    def shared_memory(self, itemsize: int) -> int:
        """Bytes for the operands of all stages, the most that the pipeline allocates."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize

    @property
    def options(self) -> dict[str, int]:
        """Launch options of a kernel."""
        options = {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }
        return options | {"maxnreg": 255} if self.all_registers and not torch.version.hip else options


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per block; for the interpreter those of the largest GPU."""
    if device.type == "cpu":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def fit(tile: Tile, itemsize: int, shared: int) -> Tile:
    """The tile, with stages and then block sizes reduced until it fits into `shared` bytes."""
    while tile.shared_memory(itemsize) > shared:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_n > 64:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            tile = replace(tile, block_k=tile.block_k // 2)
    return tile


def row_block(dtype: torch.dtype, num_rows: int, num_groups: int, *sizes: int) -> int:
    """Rows of a tile in all row products of a call: one of three heights, by the mean number of rows in a group.

    Matrices whose sizes are not multiples of 16 cannot be read 16 bytes at a time. That takes registers and leaves room
    for 32 rows, for 16 in float32.
    """
    mean = num_rows / max(num_groups, 1)
    odd = any(size % 16 for size in sizes)
    if dtype == torch.float32:
        return 16 if odd or mean <= 16 else 64
    if odd:
        return 32
    return 16 if mean <= 16 else 64 if mean <= 96 else 128


def largest(shared: int) -> Tile:
    """Tile of a half-precision product with large sizes, with up to four stages.

    The smaller one fills the shared memory as well, so no other program needs its registers.
    """
    return Tile(128, 256, 64, 8, 4) if shared >= 200000 else Tile(128, 128, 64, 8, 4, all_registers=True)


def rows_tile(dtype: torch.dtype, block_m: int, shared: int) -> Tile:
    """Tile of a product over row tiles; the up projection splits block_n between its gate and up halves."""
    if dtype == torch.float32:
        # Without tensor cores, accumulator and operands are all in registers.
        tile = Tile(16, 32, 32, 4, 2) if block_m == 16 else Tile(block_m, 64, 16, 4, 3)
        return fit(replace(tile, all_registers=True), 4, shared)
    tile = {
        16: Tile(16, 64, 64, 4, 6),
        32: Tile(32, 64, 32, 4, 2, all_registers=True),
        64: Tile(64, 128, 64, 4, 4),
        128: largest(shared),
    }[block_m]
    return fit(tile, dtype.itemsize, shared)


def products_tile(dtype: torch.dtype, m: int, n: int, shared: int) -> Tile:
    """Tile of the weight gradient of an m x n matrix, a sum over a group's rows."""
    if dtype == torch.float32:
        # Masks take registers as well.
        block_m = 64 if even(m, 64) and even(n, 64) else 32
        return fit(Tile(block_m, 64, 16, 4, 3, all_registers=True), 4, shared)
    if m % 16 or n % 16:
        return Tile(64, 64, 32, 4, 2, all_registers=True)
    if m < 128 or n < 128:
        return fit(Tile(64, 64, 64, 4, 3), dtype.itemsize, shared)
    return fit(largest(shared), dtype.itemsize, shared)


def gathering(tile: Tile) -> Tile:
    """The tile with more stages, for rows that are found through a list.

    Loading the list takes as many stages as loading the rows: with n stages in all, a product would wait for every
    copy. On an NVIDIA GPU 2 n - 1 stages need no more memory than n without a list, except for the list itself. A tile
    of two stages has no room for more, or nothing to copy asynchronously.
    """
    return replace(tile, num_stages=2 * tile.num_stages - 1) if tile.num_stages > 2 else tile


def hidden_backward_tile(dtype: torch.dtype, block_m: int, shared: int, clamped: bool) -> Tile:
    """Tile narrower than `rows_tile`, because the epilogue needs the pre-activation beside the accumulator.

    In small models the epilogue is longer than the loop. If shared memory suffices for two programs of four warps and
    three stages each, one multiplies while the other is in its epilogue. With clamping this spills.
    """
    tile = replace(narrowed(rows_tile(dtype, block_m, shared), 128), all_registers=True)
    half = replace(tile, num_warps=4, num_stages=3, all_registers=False)
    two = tile.num_warps == 8 and not clamped and 2 * half.shared_memory(dtype.itemsize) <= shared
    return half if two else tile


def narrowed(tile: Tile, block_n: int) -> Tile:
    return replace(tile, block_n=min(tile.block_n, block_n))


def even(size: int, block: int) -> bool:
    """Whether blocks cover the size exactly, so that no mask is needed."""
    return size > 0 and size % block == 0


def last_stride_one(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
