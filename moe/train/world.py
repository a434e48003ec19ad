"""Communication of a `Trainer` with the other processes that train the same model."""

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
from moe.train.launcher import MISTAKES, reported_once
from moe.train.settings import RunSettings
from moe.train.state import save_state

if TYPE_CHECKING:  # importing it takes half a second
    import moe.parallel.shared_errors


class World:
    """World of a single process, and base class of `MeshWorld`. All ranks call the same methods in the same order.

    Attributes: rank, size, launched (by torchrun, which sends its processes the signals that it receives).
    """

    rank, size, launched = 0, 1, False

    def build(self, config: ModelConfig, settings: RunSettings) -> Transformer:
        """Build a model on the device of `settings`: initialised from its seed, or in fp32 from its checkpoint."""
        if settings.init is not None:
            return load(settings.init, settings.device, torch.float32, progress=False)
        with torch.device(settings.device):
            return Transformer(config, seed=settings.seed)

    def begin_step(self, number: int) -> None:
        """Set the optimizer step that errors of collectives name."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor of any shape over the ranks."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank."""
        return [value]

    def together(self) -> contextlib.AbstractContextManager[None]:
        """End all ranks if the block raises one of `MISTAKES` on any of them, so that none waits for a failed one.

        The first such error is raised as by `reported_once`. The block must not wait for other ranks.
        """
        return contextlib.nullcontext()

    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale the gradients to a global norm of at most `limit`; returns the norm before, a scalar."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def part_like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Return this rank's part of a full tensor, sharded as `parameter` is."""
        return tensor

    def save_state(self, trainer: Any, states: Path, *, wait: bool) -> Path:
        """Save the state of a `Trainer` to `states` and return its folder; with `wait`, after it is on disk."""
        return save_state(states, *trainer.state(), keep=trainer.settings.keep)

    def export(self, model: Transformer, folder: Path) -> Transformer | None:
        """Write a checkpoint. Returns a model that rank 0 can call without the others; None on other ranks."""
        model.save(folder)
        return model


class MeshWorld(World):
    """World of the ranks of a mesh. All methods except `begin_step` and `part_like` are collective."""

    def __init__(self, mesh: "moe.parallel.Mesh") -> None:
        # A caller with a mesh has already imported moe.parallel.
        self.mesh, self.rank, self.size, self.launched = mesh, dist.get_rank(), mesh.size, True
        self.writer: moe.parallel.StateWriter | None = None

    def build(self, config: ModelConfig, settings: RunSettings) -> Transformer:
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
        with reported_once(*MISTAKES), moe.parallel.shared_errors.raise_on_all_ranks(*MISTAKES):
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
        # Generating with `model` would require every rank to take part and to draw the same tokens.
        return None if self.rank else load(folder, dtype=torch.float32)


def world_of(mesh: "moe.parallel.Mesh | None") -> World:
    """Return the world of all ranks of `mesh`, or of this process alone if `mesh` is None."""
    return World() if mesh is None else MeshWorld(mesh)
