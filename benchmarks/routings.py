"""Which experts the tokens go to.

uniform   K distinct experts for each token, all equally likely
zipf      K distinct experts for each token, drawn in proportion to 1 / rank; the ranks are shuffled among the experts
one-hot   every token to the same K experts: the worst balance that distinct experts allow
FILE.npz  array `expert_ids` [T, K], of which a benchmark of fewer tokens takes the first rows, and optionally
          `weights` [T, K]
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import BadInput

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
    with _open(file) as arrays:
        return _array(file, arrays, "expert_ids").shape[0]


def _open(file: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise BadInput(f"--routing {file}: no such file; expected {', '.join(NAMES)} or a .npz file") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise BadInput(f"--routing {file}: not a readable .npz file ({error})") from None
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise BadInput(f"--routing {file}: found a single array, expected an .npz file with the array expert_ids")
    return arrays


def _array(file: Path, arrays: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    if name not in arrays:
        found = ", ".join(arrays.files) or "nothing"
        raise BadInput(f"--routing {file}: no array {name}, found {found}")
    try:
        array = arrays[name]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise BadInput(f"--routing {file}: {name}: not readable ({error})") from None
    if array.ndim != 2:
        raise BadInput(f"--routing {file}: {name}: found shape {array.shape}, expected [T, K]")
    return array


def _read(file: Path, tokens: int, experts: int, top_k: int, weights: Tensor) -> Assignment:
    with _open(file) as arrays:
        ids = _array(file, arrays, "expert_ids")
        if ids.shape[1] != top_k or ids.shape[0] < tokens:
            raise BadInput(
                f"--routing {file}: expert_ids: found shape {ids.shape}, expected [{tokens} or more, {top_k}]"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise BadInput(f"--routing {file}: expert_ids: found {ids.dtype}, expected integers")
        if ids.min() < 0 or ids.max() >= experts:
            raise BadInput(
                f"--routing {file}: expert_ids: found {ids.min()} to {ids.max()}, expected 0 to {experts - 1}"
            )
        if "weights" in arrays:
            given = _array(file, arrays, "weights")
            if given.shape != ids.shape:
                raise BadInput(f"--routing {file}: weights: found shape {given.shape}, expected {ids.shape}")
            if not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
                raise BadInput(f"--routing {file}: weights: expected finite floating point numbers")
            weights = torch.from_numpy(given[:tokens].astype(np.float32))
        return Assignment(torch.from_numpy(ids[:tokens].astype(np.int64)), weights)
