"""Training step, evaluation and state of one model with its optimizers and data.

On a mesh every rank has a `Trainer`, and all ranks call its methods together. Each rank takes its share of the same
global batch, so steps, losses and the position in the data equal those of a single process.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe import balance
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.model import Output, Transformer
from moe.train.baselines import bits_per_byte
from moe.train.data import Dataset, Sampler, document_ids, evaluation_batches
from moe.train.optimizer import build_optimizers
from moe.train.schedule import learning_rate_factor
from moe.train.settings import Settings
from moe.train.world import World, world_of

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh


class NonFiniteError(FloatingPointError):
    """NaN or infinity in a loss or a gradient.

    Attributes: step, what ("loss", "validation loss" or "gradient"), where (name of the module or parameter that shows
    it first).
    """

    def __init__(self, step: int, what: str, where: str) -> None:
        self.step, self.what, self.where = step, what, where
        super().__init__(f"step {step}: the {what} is not finite; {where}")


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step: mean losses, gradient norm before clipping, learning rate, load [layers, E]."""

    losses: dict[str, float]
    grad_norm: float
    lr: float
    load: Tensor
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """Score of the validation split: scored tokens, their nats and bytes of text, load [layers, E] of all tokens."""

    tokens: int
    nats: float
    text_bytes: int
    load: Tensor

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.text_bytes)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Enable torch's deterministic algorithms within the block. CUBLAS_WORKSPACE_CONFIG stays set afterwards."""
    # cuBLAS reads it before the first matrix product on a GPU. Some releases of torch raise if it is not set.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN takes a tenth of the step; the operator tests do it instead.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


def uncompiled(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly within the block."""
    return torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()


def check_savable(config: ModelConfig) -> None:
    """Raise ConfigError if a checkpoint of the model cannot be saved."""
    if problems := config.family_problems():
        raise ConfigError("model_type", config.model_type, f"a model that its files can express; {'; '.join(problems)}")


class Trainer:
    """Trainer of one model. Loading the `state` of step n into a new Trainer reproduces step n + 1."""

    def __init__(
        self,
        model: Transformer,
        dataset: Dataset,
        settings: Settings,
        mesh: "Mesh | None" = None,
        *,
        world: World | None = None,
    ) -> None:
        self.model, self.dataset, self.settings, self.world = model, dataset, settings, world or world_of(mesh)
        dataset.check_vocabulary(model.config)
        if not dataset.scored_bytes(document_mask=settings.document_mask):
            raise ConfigError("--document-mask", True, "a held-out document of more than one token")
        if settings.batch_size % self.world.size:
            raise ConfigError("--batch-size", settings.batch_size, f"a multiple of the {self.world.size} ranks")
        self.device = next(model.parameters()).device
        self.step_number = 0
        self.sampler = Sampler(dataset.train, settings.seq_length, settings.batch_size, settings.seed)
        self.optimizers = build_optimizers(model, settings.optimizer, settings.peak_lr, settings.weight_decay)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        if model.config.topk_method == "noaux_tc" and model.config.num_moe_layers + len(model.mtp):
            balance.attach(model, self.optimizers[-1], bias_update_speed=settings.bias_update_speed)
        model.set_activation_checkpointing(settings.activation_checkpointing)
        self.layer_names = [name.removesuffix(".gate") for name, _ in balance.routers(model)]
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def step(self) -> StepReport:
        """Run one optimizer step. Raises `NonFiniteError` before any parameter changes."""
        started = time.perf_counter()
        settings, number = self.settings, self.step_number + 1
        factor = learning_rate_factor(number, steps=settings.steps, warmup=settings.warmup, schedule=settings.schedule)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad()
        self.model.train()
        self.world.begin_step(number)
        losses: dict[str, float] = {}
        load = torch.zeros((), dtype=torch.int64, device=self.device)
        batches = [self._local_rows(self.sampler.next_batch()) for _ in range(settings.accumulation)]
        with self.model.global_batch.step([self.model.loss_counts(**self._arguments(ids)) for ids in batches]):
            for input_ids in batches:
                output = self._forward(input_ids)
                assert output.loss is not None and output.load is not None
                # Averaged over ranks, so that all ranks detect a non-finite loss.
                parts = self._mean({**output.losses, "sum": output.loss.detach()})
                if not parts.pop("sum") < float("inf"):
                    raise NonFiniteError(number, "loss", self._first_non_finite(input_ids))
                output.loss.backward()
                for name, value in parts.items():
                    losses[name] = losses.get(name, 0.0) + value
                load = load + output.load
        load = self.world.sum(load.cpu())
        norm = self.world.clip(self.model.parameters(), settings.clip).item()
        if not norm < float("inf"):
            raise NonFiniteError(number, "gradient", self._first_non_finite_gradient())
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_number = number
        tokens = settings.accumulation * settings.batch_size * (settings.seq_length - 1)
        rate = tokens / (time.perf_counter() - started)
        return StepReport(losses, norm, settings.peak_lr * factor, load, rate)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Score every validation token but the first, given the preceding tokens of its window of packed text.

        With `document_mask` the first token of each document, which training does not predict either, is left out, and
        the others are given what precedes them in their document. Raises `NonFiniteError`.
        """
        # Training mode runs the MTP modules too, whose load is reported. No layer has dropout.
        self.model.train()
        nats, tokens, load = 0.0, 0, torch.zeros((), dtype=torch.int64)
        for batch in evaluation_batches(self.dataset.validation, self.settings.seq_length, self.settings.batch_size):
            count = int(self.model.loss_counts(**self._arguments(batch))["ce.0"])
            # Padded to a multiple of the ranks, because every rank must call the model.
            rows = nn.functional.pad(batch, (0, 0, 0, -len(batch) % self.world.size))
            input_ids, real = self._local_rows(rows), torch.arange(len(rows))[:, None].expand_as(rows) < len(batch)
            output = self._forward(input_ids, self._local_rows(real) if self.world.size > 1 else None)
            assert output.load is not None
            mean = self._mean({"ce": output.losses["ce"]})["ce"]
            if not mean < float("inf"):
                raise NonFiniteError(self.step_number, "validation loss", self._first_non_finite(input_ids))
            nats += mean * count
            tokens += count
            load = load + output.load.cpu()
        scored_bytes = self.dataset.scored_bytes(document_mask=self.settings.document_mask)
        return Evaluation(tokens, nats, scored_bytes, self.world.sum(load))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON values) from which `load_state` continues bit-exactly."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                tensors |= {f"optimizer/{i}/{self._names[parameter]}/{key}": value for key, value in state.items()}
        tensors["rng"] = torch.get_rng_state()
        return tensors, self.position()

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Load what `state` returned. On a mesh each rank takes its part of the full `tensors`."""
        parameters = {name: parameter for parameter, name in self._names.items()}
        owners = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        weights: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "model":
                weights[rest] = self._place(tensor, parameters.get(rest))
            elif kind == "optimizer":
                _, name, entry = rest.split("/")
                parameter = parameters[name]
                owners[parameter].state[parameter][entry] = self._place(tensor, parameter)
        self.model.load_state_dict(weights)
        torch.set_rng_state(tensors["rng"])
        self.load_position(values)

    def _place(self, tensor: Tensor, parameter: Tensor | None) -> Tensor:
        tensor = tensor.to(self.device) if tensor.ndim else tensor  # step counts stay on the CPU
        if parameter is None or tensor.shape != parameter.shape:
            return tensor
        return self.world.part_like(tensor, parameter)

    def position(self) -> dict[str, Any]:
        """Return the step and the position in the data, equal on all ranks, as JSON values."""
        return {"step": self.step_number, "sampler": self.sampler.state_dict()}

    def load_position(self, values: dict[str, Any]) -> None:
        self.step_number = values["step"]
        self.sampler.load_state_dict(values["sampler"])

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.dtype == "bf16")

    def _arguments(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the model arguments; training and evaluation predict the same tokens of a window."""
        documents = document_ids(input_ids, self.dataset.end_of_text) if self.settings.document_mask else None
        return {"input_ids": input_ids, "labels": input_ids, "document_ids": documents}

    def _forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        with self._autocast():
            return self.model(**self._arguments(input_ids), attention_mask=attention_mask)

    def _local_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's rows of a global batch, on its device."""
        each = len(rows) // self.world.size
        return rows[self.world.rank * each : (self.world.rank + 1) * each].to(self.device)

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Average values over the ranks, which are weighted already."""
        flat = torch.stack([value.double() for value in values.values()])
        return dict(zip(values, (self.world.sum(flat) / self.world.size).tolist(), strict=True))

    def _first_reported(self, found: str) -> str:
        """Return the first non-empty text of all ranks, with its rank if there are several; otherwise ""."""
        texts = enumerate(self.world.gather(found))
        return next((f"{text} (rank {rank})" if self.world.launched else text for rank, text in texts if text), "")

    @torch.no_grad()
    def _first_non_finite(self, input_ids: Tensor) -> str:
        """Describe the first non-finite parameter or, if there is none, the first non-finite module output."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        bad = next((name for name, tensor in tensors if not torch.isfinite(_part(tensor)).all()), "")
        if where := self._first_reported(bad and f"first in the parameter {bad}"):
            return where
        found: list[str] = []

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(names[module])

        names = {module: name for name, module in self.model.named_modules() if name}
        hooks = [module.register_forward_hook(look) for module in names]
        try:
            with uncompiled(self.settings):  # compiled code calls no hooks
                self._forward(input_ids)
        finally:
            for hook in hooks:
                hook.remove()
        where = self._first_reported(f"first in the output of {found[0]}" if found else "")
        return where or "all module outputs are finite"

    def _first_non_finite_gradient(self) -> str:
        # The backward pass runs from the last parameter to the first.
        gradients = ((name, parameter.grad) for parameter, name in reversed(self._names.items()))
        bad = (name for name, grad in gradients if grad is not None and not torch.isfinite(_part(grad)).all())
        where = self._first_reported(next((f"first in the gradient of {name}" for name in bad), ""))
        return where or "all parameters have finite gradients, but their norm is not finite"


def _part(tensor: Any) -> Tensor:
    """Return this rank's part of a parameter or a gradient."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "__dataclass_fields__"):
        yield from _tensors(list(vars(output).values()))
