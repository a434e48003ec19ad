"""Training step, evaluation and state of one model with its optimizers and data.

`BaseTrainer` is everything but the data and the loss. `Trainer` trains on packed text.

On a mesh every rank has a trainer, and all ranks call its methods together. Each rank takes its share of the same
global batch, so steps, losses and the position in the data equal those of a single process.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from moe import balance
from moe.balance import LoadReport
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.model import Output, Transformer
from moe.train.baselines import bits_per_byte
from moe.train.data import Dataset, Sampler, document_ids, evaluation_batches
from moe.train.optimizer import build_optimizers
from moe.train.schedule import learning_rate_factor
from moe.train.settings import RunSettings, Settings
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


class Report(Protocol):
    """What a step or an evaluation reports."""

    def values(self) -> dict[str, Any]:
        """JSON values for metrics.jsonl."""
        ...

    def text(self) -> str:
        """The most important values, for the display of progress."""
        ...


class BatchLoss(Protocol):
    """Loss of a micro-batch, for `BaseTrainer.update`, such as an `Output`.

    Attributes:
        loss: scalar to minimise: this micro-batch's share of the loss of the update.
        losses: detached parts of the loss, likewise.
        load: int64 [layers, E] of this micro-batch; None without experts.
    """

    @property
    def loss(self) -> Tensor | None: ...
    @property
    def losses(self) -> dict[str, Tensor]: ...
    @property
    def load(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Update:
    """Report of one optimizer update: losses, gradient norm before clipping, load [layers, E]."""

    losses: dict[str, float]
    grad_norm: float
    load: Tensor

    @property
    def max_vio(self) -> list[float]:
        return LoadReport([], self.load).max_vio


@dataclass(frozen=True)
class StepReport(Update):
    """Report of one training step of one update, with the learning rate. The losses are means over tokens."""

    lr: float
    tokens_per_second: float

    def values(self) -> dict[str, Any]:
        rates = {"lr": self.lr, "grad_norm": self.grad_norm, "max_vio": self.max_vio}
        return {**self.losses, **rates, "tokens_per_second": self.tokens_per_second}

    def text(self) -> str:
        balanced = f"  highest MaxVio {max(self.max_vio):.2f}" if len(self.load) else ""
        return f"loss {self.losses['ce']:.3f}  {self.tokens_per_second:,.0f} tokens/s{balanced}"


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

    def values(self) -> dict[str, Any]:
        scores = {"nats_per_token": self.nats_per_token, "bits_per_byte": self.bits_per_byte}
        return {**scores, "load": self.load.tolist()}

    def text(self) -> str:
        return f"validation {self.nats_per_token:.4f} nats/token, {self.bits_per_byte:.4f} bits/byte"


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


def uncompiled(settings: RunSettings) -> contextlib.AbstractContextManager[Any]:
    """Run compiled models eagerly within the block."""
    return torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()


def check_savable(config: ModelConfig) -> None:
    """Raise ConfigError if a checkpoint of the model cannot be saved."""
    if problems := config.family_problems():
        raise ConfigError("model_type", config.model_type, f"a model that its files can express; {'; '.join(problems)}")


class BaseTrainer:
    """Model, optimizers and state of a run. Loading the `state` of step n into a new one reproduces step n + 1.

    A subclass defines `step`, which calls `begin_step` and then `update` once or several times, and `evaluate`. If it
    has a position in its data, it extends `position` and `load_position`. Random numbers of a step must depend only on
    the seed and the step, because a state of several ranks contains no random state.

    Attributes:
        step_number: steps that were taken.
        layer_names: names of the layers with experts, in the order of every load [layers, E].
    """

    def __init__(
        self, model: Transformer, settings: RunSettings, mesh: "Mesh | None" = None, *, world: World | None = None
    ) -> None:
        self.model, self.settings, self.world = model, settings, world or world_of(mesh)
        if settings.batch_size % self.world.size:
            raise ConfigError("--batch-size", settings.batch_size, f"a multiple of the {self.world.size} ranks")
        self.device = next(model.parameters()).device
        self.step_number = 0
        self.optimizers = build_optimizers(model, settings.optimizer, settings.peak_lr, settings.weight_decay)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        if model.config.topk_method == "noaux_tc" and model.config.has_experts:
            balance.attach(model, self.optimizers[-1], bias_update_speed=settings.bias_update_speed)
        model.set_activation_checkpointing(settings.activation_checkpointing)
        self.layer_names = [name.removesuffix(".gate") for name, _ in balance.routers(model)]
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    def step(self) -> Report:
        """Take one step. Raises `NonFiniteError` before any parameter changes."""
        raise NotImplementedError

    def evaluate(self) -> Report:
        """Score the model on held-out data. Raises `NonFiniteError`."""
        raise NotImplementedError

    def begin_step(self) -> float:
        """Begin the step after `step_number`, in training mode; return its learning rate, which is set."""
        settings, number = self.settings, self.step_number + 1
        factor = learning_rate_factor(number, steps=settings.steps, warmup=settings.warmup, schedule=settings.schedule)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        self.model.train()
        self.world.begin_step(number)
        return settings.peak_lr * factor

    def update(
        self,
        batches: Sequence[Any],
        loss: Callable[[Any], BatchLoss],
        counts: Callable[[Any], dict[str, Tensor]],
    ) -> Update:
        """Run one optimizer update, in the step that `begin_step` began.

        Args:
            batches: this rank's micro-batches; all ranks have equally many.
            loss: runs the model on a micro-batch. The loss of the update is the sum of its results over micro-batches,
                averaged over ranks. With labels, `Transformer.forward` weights its parts accordingly; other means are
                weighted by `model.global_batch.weigh`.
            counts: the counts of a micro-batch for `GlobalBatch.step`, from `Transformer.loss_counts`, and those of
                other means that `loss` weights.

        Raises `NonFiniteError` before any parameter changes.
        """
        number = self.step_number + 1
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses: dict[str, float] = {}
        load = self._no_load().to(self.device)
        with self.model.global_batch.step([counts(batch) for batch in batches]):
            for batch in batches:
                output = loss(batch)
                assert output.loss is not None
                # Averaged over ranks, so that all ranks detect a non-finite loss.
                parts = self._mean({**output.losses, "sum": output.loss.detach()})
                if not parts.pop("sum") < float("inf"):
                    raise NonFiniteError(number, "loss", self._first_non_finite(loss, batch))
                output.loss.backward()
                for name, value in parts.items():
                    losses[name] = losses.get(name, 0.0) + value
                if output.load is not None:
                    load = load + output.load
        load = self.world.sum(load.cpu())
        norm = self.world.clip(self.model.parameters(), self.settings.clip).item()
        if not norm < float("inf"):
            raise NonFiniteError(number, "gradient", self._first_non_finite_gradient())
        for optimizer in self.optimizers:
            optimizer.step()
        return Update(losses, norm, load)

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
        return {"step": self.step_number}

    def load_position(self, values: dict[str, Any]) -> None:
        """Continue at the `values` that `position` returned."""
        self.step_number = values["step"]

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.dtype == "bf16")

    def _call(self, arguments: dict[str, Any]) -> Output:
        """Call the model in the compute precision of the settings."""
        with self._autocast():
            return self.model(**arguments)

    @torch.no_grad()
    def _score(self, batches: Iterable[tuple[dict[str, Any], int]]) -> tuple[float, int, Tensor]:
        """Sum the cross entropy of held-out data.

        Args:
            batches: this rank's model arguments, and the number of tokens that all ranks predict in this batch.

        Returns (nats, predicted tokens, load [layers, E]). Raises `NonFiniteError`.
        """
        # Training mode runs the MTP modules too, whose load is reported. No layer has dropout.
        self.model.train()
        nats, tokens, load = 0.0, 0, self._no_load()
        for arguments, count in batches:
            output = self._call(arguments)
            mean = self._mean({"ce": output.losses["ce"]})["ce"]
            if not mean < float("inf"):
                where = self._first_non_finite(self._call, arguments)
                raise NonFiniteError(self.step_number, "validation loss", where)
            nats += mean * count
            tokens += count
            if output.load is not None:
                load = load + output.load.cpu()
        return nats, tokens, self.world.sum(load)

    def _no_load(self) -> Tensor:
        """Return a load [layers, E] of zeros, on the CPU."""
        experts = self.model.config.n_routed_experts if self.layer_names else 0
        return torch.zeros(len(self.layer_names), experts, dtype=torch.int64)

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
    def _first_non_finite(self, forward: Callable[[Any], Any], batch: Any) -> str:
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
                forward(batch)
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


class Trainer(BaseTrainer):
    """Trainer of one model on packed text."""

    def __init__(
        self,
        model: Transformer,
        dataset: Dataset,
        settings: Settings,
        mesh: "Mesh | None" = None,
        *,
        world: World | None = None,
    ) -> None:
        dataset.check_vocabulary(model.config)
        if not dataset.scored_bytes(document_mask=settings.document_mask):
            raise ConfigError("--document-mask", True, "a held-out document of more than one token")
        super().__init__(model, settings, mesh, world=world)
        self.dataset, self.document_mask = dataset, settings.document_mask
        self.sampler = Sampler(dataset.train, settings.seq_length, settings.batch_size, settings.seed)

    def step(self) -> StepReport:
        """Run one optimizer step. Raises `NonFiniteError` before any parameter changes."""
        started = time.perf_counter()
        settings, lr = self.settings, self.begin_step()
        batches = [self._local_rows(self.sampler.next_batch()) for _ in range(settings.accumulation)]
        found = self.update(batches, self._forward, lambda ids: self.model.loss_counts(**self._arguments(ids)))
        self.step_number += 1
        tokens = settings.accumulation * settings.batch_size * (settings.seq_length - 1)
        rate = tokens / (time.perf_counter() - started)
        return StepReport(found.losses, found.grad_norm, found.load, lr, rate)

    def evaluate(self) -> Evaluation:
        """Score every validation token but the first, given the preceding tokens of its window of packed text.

        With `document_mask` the first token of each document, which training does not predict either, is left out, and
        the others are given what precedes them in their document. Raises `NonFiniteError`.
        """
        scored_bytes = self.dataset.scored_bytes(document_mask=self.document_mask)
        nats, tokens, load = self._score(self._evaluation_batches())
        return Evaluation(tokens, nats, scored_bytes, load)

    def _evaluation_batches(self) -> Iterator[tuple[dict[str, Any], int]]:
        for batch in evaluation_batches(self.dataset.validation, self.settings.seq_length, self.settings.batch_size):
            count = int(self.model.loss_counts(**self._arguments(batch))["ce.0"])
            # Padded to a multiple of the ranks, because every rank must call the model.
            rows = nn.functional.pad(batch, (0, 0, 0, -len(batch) % self.world.size))
            input_ids, real = self._local_rows(rows), torch.arange(len(rows))[:, None].expand_as(rows) < len(batch)
            mask = self._local_rows(real) if self.world.size > 1 else None
            yield {**self._arguments(input_ids), "attention_mask": mask}, count

    def position(self) -> dict[str, Any]:
        return {**super().position(), "sampler": self.sampler.state_dict()}

    def load_position(self, values: dict[str, Any]) -> None:
        super().load_position(values)
        self.sampler.load_state_dict(values["sampler"])

    def _arguments(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the model arguments; training and evaluation predict the same tokens of a window."""
        documents = document_ids(input_ids, self.dataset.end_of_text) if self.document_mask else None
        return {"input_ids": input_ids, "labels": input_ids, "document_ids": documents}

    def _forward(self, input_ids: Tensor) -> Output:
        return self._call(self._arguments(input_ids))


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
