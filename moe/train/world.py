"""The processes that train one model together: what a `Trainer` needs from all of them."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe
from moe.checkpoint import load
from moe.config import ModelConfig
from moe.model import Transformer
from moe.train.launcher import MISTAKES, said_once
from moe.train.settings import Settings
from moe.train.state import save_state

if TYPE_CHECKING:  # importing it takes half a second
    import moe.parallel.shared_errors


class World:
    """A process that trains alone, and the base class of `MeshWorld`. All ranks call the same methods in one order.

    Attributes: rank, size, launched (by torchrun, which sends its processes the signals that it receives).
    """

    rank, size, launched = 0, 1, False

    def build(self, config: ModelConfig, settings: Settings) -> Transformer:
        """Build a model on the device of `settings`: initialised from its seed, or in fp32 from its checkpoint."""
        if settings.init is not None:
            return load(settings.init, settings.device, torch.float32, progress=False)
        with torch.device(settings.device):
            return Transformer(config, seed=settings.seed)

    def begin_step(self, number: int) -> None:
        """Set the optimizer step that errors of collectives name."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks of a tensor of any shape."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """Values of all ranks, by rank."""
        return [value]

    def together(self) -> contextlib.AbstractContextManager[None]:
        """End all ranks if the block raises one of `MISTAKES` on any of them, so that none waits for a failed one.

        The first such error is raised as by `said_once`. The block must not wait for other ranks.
        """
        return contextlib.nullcontext()

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale the gradients to a global norm of at most `limit`; returns the norm before, a scalar."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def part_like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a whole tensor, distributed as `parameter` is."""
        return tensor

    def save_state(self, trainer: Any, states: Path, *, wait: bool) -> Path:
        """Save the state of a `Trainer` below `states`; returns its folder, with `wait` once it is on disk."""
        return save_state(states, *trainer.state(), keep=trainer.settings.keep)

    def export(self, model: Transformer, folder: Path) -> Transformer | None:
        """Write a checkpoint. Returns a model that rank 0 can call without the others; None on other ranks."""
        model.save(folder)
        return model


class MeshWorld(World):
    """A rank of a mesh. All methods but `begin_step` and `part_like` are collective calls."""

    def __init__(self, mesh: "moe.parallel.Mesh") -> None:
        # Whoever has a mesh has imported moe.parallel already.
        self.mesh, self.rank, self.size, self.launched = mesh, dist.get_rank(), mesh.size, True
        self.writer: moe.parallel.StateWriter | None = None

    def build(self, config: ModelConfig, settings: Settings) -> Transformer:
        parallel = moe.parallel.ParallelConfig(payload=settings.dispatch)
        if settings.init is not None:
            return moe.parallel.load(settings.init, self.mesh, parallel, dtype=torch.float32, progress=False)
        with torch.device("meta"):
            model = Transformer(config)
        moe.parallel.parallelize(model, self.mesh, parallel)
        moe.parallel.materialize(model, seed=settings.seed)
        return model

    def begin_step(self, number: int) -> None:
        self.mesh.log.set_step(number)

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.mesh.device)
        with self.mesh.log.collective("trainer", "sum of reports"):
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with said_once(*MISTAKES), moe.parallel.shared_errors.raise_on_all_ranks(*MISTAKES):
            yield

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        return moe.parallel.clip_grad_norm(parameters, limit, log=self.mesh.log)

    def part_like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        return moe.parallel.part_like(tensor, parameter)

    def save_state(self, trainer: Any, states: Path, *, wait: bool) -> Path:
        self.writer = self.writer or moe.parallel.StateWriter(states, self.mesh, keep=trainer.settings.keep)
        folder = self.writer.save(trainer.model, trainer.optimizers, trainer.position())
        if wait:
            self.writer.wait()
        return folder

    def export(self, model: Transformer, folder: Path) -> Transformer | None:
        moe.parallel.export(model, folder)
        # To generate with `model`, every rank would have to take part and draw the same tokens.
        return None if self.rank else load(folder, dtype=torch.float32)


def world_of(mesh: "moe.parallel.Mesh | None") -> World:
    """The world of all ranks of `mesh`, or, without one, of this process alone."""
    return World() if mesh is None else MeshWorld(mesh)
