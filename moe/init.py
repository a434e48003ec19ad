"""Weight initialisation, independent of creation order and of sharding."""

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe.ops.library import has_values, is_fake
from moe.roles import role_of


@torch.no_grad()
def initialize(module: nn.Module, *, std: float, seed: int) -> None:
    """Initialise every parameter and buffer of `module` in place.

    The role of a tensor decides its values: norm weights are 1, biases (the correction bias included) 0, all others
    normal with standard deviation `std`. Each tensor, and each expert's slice of a stacked one, has its own generator
    seeded by (seed, name, expert). So a rank that owns some experts can initialise exactly those. Raises ConfigError
    for a tensor without a role.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        fill(tensor, name, std=std, seed=seed)


def fill(tensor: Tensor, name: str, *, std: float, seed: int, first_expert: int = 0) -> None:
    """Initialise one tensor as `initialize` does; stacked experts start at number `first_expert`."""
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


def skip_init() -> AbstractContextManager[Any]:
    """Return the context for building a module on the meta device, without torch's initialisation."""
    # Fake tensors have no values to initialise and cannot be replaced.
    return nullcontext() if is_fake(torch.empty(0)) else torch.device("meta")


def materialize(module: nn.Module, *, std: float, seed: int | None) -> None:
    """Allocate and initialise a module built under `skip_init()`, on the default device.

    Does nothing if new parameters have no values, as on the meta device or under `accelerate.init_empty_weights`. A
    seed of None is drawn from the global generator, which is not used otherwise.
    """
    probe = nn.Module()
    probe.register_parameter("new", nn.Parameter(torch.empty(0)))  # accelerate patches this method
    (new,) = probe.parameters()
    if has_values(new):
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        module.to_empty(device=new.device)
        initialize(module, std=std, seed=seed)
