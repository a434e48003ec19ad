"""Initial values of weights, which do not depend on the order of creation or on how a model is divided."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe.ops.library import has_values, is_fake
from moe.roles import role_of


@torch.no_grad()
def initialize(module: nn.Module, *, std: float, seed: int) -> None:
    """Initialise every parameter and buffer below `module`.

    Values are those of the tensors' roles: norm weights are 1, biases (the correction bias too) 0, everything else
    normal with standard deviation `std`. Each tensor, and each expert's slice of a stacked one, has its own generator
    seeded by (seed, name, expert): the result does not depend on the order of creation, and a rank that owns a few
    experts can make exactly those. Raises ConfigError for a tensor without a role.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        fill(tensor, name, std=std, seed=seed)


def fill(tensor: Tensor, name: str, *, std: float, seed: int, first_expert: int = 0) -> None:
    """One tensor of `initialize`; of stacked experts, those from `first_expert` on."""
    role = role_of(name)
    if role.initial != "normal":
        tensor.fill_(1.0 if role.initial == "ones" else 0.0)
    elif role.name == "experts":
        for expert, part in enumerate(tensor, first_expert):
            part.normal_(0.0, std, generator=_generator(tensor.device, seed, name, expert))
    else:
        tensor.normal_(0.0, std, generator=_generator(tensor.device, seed, name, 0))


def _generator(device: torch.device, seed: int, name: str, expert: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def unfilled() -> AbstractContextManager[Any]:
    """Context in which to build a module for `materialize`: on the meta device, so that torch's own initialisation does
    not run. Fake tensors hold nothing as they are, and cannot be replaced."""
    return nullcontext() if is_fake(torch.empty(0)) else torch.device("meta")


def materialize(module: nn.Module, *, std: float, seed: int | None) -> None:
    """Turn a module built in `unfilled()` into an initialised one, where new parameters have values here: on the
    default device, and not within `accelerate.init_empty_weights`, for one.

    A seed of None is drawn from the global generator, which is not moved otherwise.
    """
    here = nn.Module()
    here.register_parameter("new", nn.Parameter(torch.empty(0)))  # a method that others replace to have their say
    (new,) = here.parameters()
    if has_values(new):
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        module.to_empty(device=new.device)
        initialize(module, std=std, seed=seed)
