"""Which experts the tokens go to.

uniform   K distinct experts for each token, all equally likely
zipf      K distinct experts for each token, drawn in proportion to 1 / rank; the ranks are shuffled among the experts
one-hot   every token to the same K experts: the worst balance that distinct experts allow
FILE.npz  array `expert_ids` [T, K], of which a benchmark of fewer tokens takes the first rows, and optionally
          `weights` [T, K]
"""

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import BadInput, one_line

NAMES = ("uniform", "zipf", "one-hot")


@dataclass(frozen=True)
class Assignment:
    """expert_ids [T, K] int64 and weights [T, K] float32, on the CPU."""

    expert_ids: Tensor
    weights: Tensor


def assign(routing: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Assignment:
    """One of `NAMES`, or a file. Raises BadInput, one line, for a file that does not fit."""
    weights = torch.rand(tokens, top_k, generator=generator) + 0.05
    weights /= weights.sum(dim=1, keepdim=True)
    if routing not in NAMES:
        return _read(Path(routing), tokens, experts, top_k, weights)
    if routing == "one-hot":
        return Assignment(torch.randperm(experts, generator=generator)[:top_k].repeat(tokens, 1), weights)
    chances = torch.ones(experts)
    if routing == "zipf":
        chances /= 1 + torch.randperm(experts, generator=generator)
    # The K largest of log p - log(-log u) are a draw without replacement (Gumbel top-k).
    noise = torch.rand(tokens, experts, generator=generator).clamp_min_(1e-20).log_().neg_().clamp_min_(1e-20).log_()
    return Assignment((chances.log() - noise).topk(top_k, dim=1).indices, weights)


def tokens_in(file: Path) -> int:
    """How many tokens the file routes."""
    return _array(file, _open(file), "expert_ids").shape[0]


def _open(file: Path) -> dict[str, Callable[[], np.ndarray]]:
    """How to read each array of the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except FileNotFoundError:
        raise BadInput(f"--routing {file}: no such file; expected {', '.join(NAMES)} or a .npz file") from None
    except Exception as error:  # zipfile and its decompressors fail in many ways
        raise BadInput(f"--routing {file}: not a readable .npz file ({one_line(error)})") from None
    return {name.removesuffix(".npy"): partial(_member, file, name) for name in names}


def _member(file: Path, name: str) -> np.ndarray:
    with zipfile.ZipFile(file) as archive:
        size = archive.getinfo(name).file_size
        with archive.open(name) as member:
            # Its header is asked first: numpy would allocate whatever it says.
            version = np.lib.format.read_magic(member)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](member)
            if math.prod(shape) * dtype.itemsize > size:
                raise ValueError(f"{shape} {dtype} in {size} bytes")
        with archive.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _array(file: Path, arrays: Mapping[str, Callable[[], np.ndarray]], name: str) -> np.ndarray:
    if name not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise BadInput(f"--routing {file}: no array {name}, found {found}")
    try:
        array = arrays[name]()
    except Exception as error:
        raise BadInput(f"--routing {file}: {name}: not readable ({type(error).__name__}: {one_line(error)})") from None
    if array.ndim != 2:
        raise BadInput(f"--routing {file}: {name}: found shape {array.shape}, expected [T, K]")
    if array.size == 0:
        raise BadInput(f"--routing {file}: {name}: found shape {array.shape}, expected some tokens")
    return array


def _read(file: Path, tokens: int, experts: int, top_k: int, weights: Tensor) -> Assignment:
    arrays = _open(file)
    ids = _array(file, arrays, "expert_ids")
    if ids.shape[1] != top_k or ids.shape[0] < tokens:
        raise BadInput(f"--routing {file}: expert_ids: found shape {ids.shape}, expected [{tokens} or more, {top_k}]")
    if ids.dtype.kind not in "iu":
        raise BadInput(f"--routing {file}: expert_ids: found {ids.dtype}, expected integers")
    if ids.min() < 0 or ids.max() >= experts:
        raise BadInput(f"--routing {file}: expert_ids: found {ids.min()} to {ids.max()}, expected 0 to {experts - 1}")
    if "weights" in arrays:
        given = _array(file, arrays, "weights")
        if given.shape != ids.shape:
            raise BadInput(f"--routing {file}: weights: found shape {given.shape}, expected {ids.shape}")
        if given.dtype.kind != "f" or not (np.abs(given) <= np.finfo(np.float32).max).all():
            raise BadInput(f"--routing {file}: weights: expected finite floating point numbers in float32's range")
        weights = torch.from_numpy(given[:tokens].astype(np.float32))
    return Assignment(torch.from_numpy(ids[:tokens].astype(np.int64)), weights)
