"""Routings: the experts of each token.

uniform   K distinct experts for each token, all equally likely
zipf      K distinct experts for each token, drawn in proportion to 1 / rank, with ranks in random order
one-hot   the same K experts for every token: the worst balance that distinct experts allow
FILE.npz  array `expert_ids` [T, K], whose first rows are used for fewer tokens, and optionally `weights` [T, K]
FILE.npz:LAYER  a layer of a file that `moesmith trace` wrote: `expert_ids` and `weights` [L, T, K], `layers` [L] names,
    and `routed` [L, T]: only these tokens are used, which are fewer in MTP modules
"""

import math
import re
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
    """The routing with one of `NAMES`, or of a file. Raises BadInput if a file does not fit."""
    weights = torch.rand(tokens, top_k, generator=generator) + 0.05
    weights /= weights.sum(dim=1, keepdim=True)
    if routing not in NAMES:
        return _read(routing, tokens, experts, top_k, weights)
    if routing == "one-hot":
        return Assignment(torch.randperm(experts, generator=generator)[:top_k].repeat(tokens, 1), weights)
    chances = torch.ones(experts)
    if routing == "zipf":
        chances /= 1 + torch.randperm(experts, generator=generator)
    # The K largest of log p - log(-log u) are a sample without replacement (Gumbel top-k).
    noise = torch.rand(tokens, experts, generator=generator).clamp_min_(1e-20).log_().neg_().clamp_min_(1e-20).log_()
    return Assignment((chances.log() - noise).topk(top_k, dim=1).indices, weights)


def tokens_in(routing: str) -> int:
    """Number of tokens in the file."""
    file, layer = _split(routing)
    return _array(file, _open(file), "expert_ids", layer).shape[0]


def _split(routing: str) -> tuple[Path, str | None]:
    """The file, and the name of the layer if there is one."""
    found = None if Path(routing).exists() else re.fullmatch(r"(.+\.npz):(.*)", routing, re.DOTALL)
    return (Path(found[1]), found[2]) if found else (Path(routing), None)


def _open(file: Path) -> dict[str, Callable[[], np.ndarray]]:
    """A function for each array of the file that reads it."""
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
            # numpy allocates whatever the header claims, so the header is checked first.
            version = np.lib.format.read_magic(member)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](member)
            if math.prod(shape) * dtype.itemsize > size:
                raise ValueError(f"{shape} {dtype} in {size} bytes")
        with archive.open(name) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def _array(
    file: Path, arrays: Mapping[str, Callable[[], np.ndarray]], name: str, layer: str | None = None
) -> np.ndarray:
    """The array [T, K], which is that of the layer if the file has several."""
    array = _load(file, arrays, name)
    if array.ndim == 3 or layer is not None:
        layers = [str(each) for each in _load(file, arrays, "layers").flatten()]
        if layer not in layers or array.ndim != 3 or len(array) != len(layers):
            found = file if layer is None else f"{file}:{layer}"
            raise BadInput(f"--routing {found}: {name}: expected FILE.npz:LAYER with one of {', '.join(layers)}")
        array = array[layers.index(layer)]
        if "routed" in arrays:
            routed = _load(file, arrays, "routed")
            if routed.dtype.kind != "b" or routed.shape != (len(layers), len(array)):
                allowed = f"bool {(len(layers), len(array))}"
                raise BadInput(f"--routing {file}: routed: expected {allowed}; found {routed.dtype} {routed.shape}")
            array = array[routed[layers.index(layer)]]
    if array.ndim != 2:
        raise BadInput(f"--routing {file}: {name}: wrong shape; expected [T, K]; found {array.shape}")
    if array.size == 0:
        raise BadInput(f"--routing {file}: {name}: no tokens; expected [T, K]; found {array.shape}")
    return array


def _load(file: Path, arrays: Mapping[str, Callable[[], np.ndarray]], name: str) -> np.ndarray:
    if name not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise BadInput(f"--routing {file}: array missing; expected {name}; found {found}")
    try:
        return arrays[name]()
    except Exception as error:
        raise BadInput(f"--routing {file}: {name}: not readable ({type(error).__name__}: {one_line(error)})") from None


def _read(routing: str, tokens: int, experts: int, top_k: int, weights: Tensor) -> Assignment:
    file, layer = _split(routing)
    arrays = _open(file)
    ids = _array(file, arrays, "expert_ids", layer)
    if ids.shape[1] != top_k or ids.shape[0] < tokens:
        raise BadInput(
            f"--routing {file}: expert_ids: wrong shape; expected [{tokens} or more, {top_k}]; found {ids.shape}"
        )
    if ids.dtype.kind not in "iu":
        raise BadInput(f"--routing {file}: expert_ids: wrong dtype; expected integers; found {ids.dtype}")
    if ids.min() < 0 or ids.max() >= experts:
        raise BadInput(
            f"--routing {file}: expert_ids: out of range; expected 0 to {experts - 1}; found {ids.min()} to {ids.max()}"
        )
    if "weights" in arrays:
        given = _array(file, arrays, "weights", layer)
        if given.shape != ids.shape:
            raise BadInput(f"--routing {file}: weights: wrong shape; expected {ids.shape}; found {given.shape}")
        if given.dtype.kind != "f" or not (np.abs(given) <= np.finfo(np.float32).max).all():
            raise BadInput(f"--routing {file}: weights: not usable; expected finite numbers in float32's range")
        weights = torch.from_numpy(given[:tokens].astype(np.float32))
    return Assignment(torch.from_numpy(ids[:tokens].astype(np.int64)), weights)
