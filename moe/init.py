"""Initial values of weights, which do not depend on the order of creation or on how a model is divided."""

import hashlib

import torch
from torch import Tensor, nn

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


def materialize(module: nn.Module, *, std: float, seed: int | None) -> None:
    """Turn a module built on the meta device into an initialised one on the default device; a no-op if that is meta.

    Building on meta first keeps torch's own initialisation from running. A seed of None is drawn from the global
    generator, which is not moved otherwise.
    """
    device = torch.get_default_device()
    if device.type != "meta":
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
        module.to_empty(device=device)
        initialize(module, std=std, seed=seed)
