"""One model, its optimizers and its data: a training step, an evaluation, and the state between them."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe import balance
from moe.model import Output, Transformer
from moe.train.baselines import bits_per_byte
from moe.train.data import Dataset, Sampler, document_ids, evaluation_batches
from moe.train.optimizer import build_optimizers
from moe.train.schedule import learning_rate_factor
from moe.train.settings import Settings


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not a number.

    Attributes: step, what ("loss" or "gradient"), where (name of the module or parameter that shows it first).
    """

    def __init__(self, step: int, what: str, where: str) -> None:
        self.step, self.what, self.where = step, what, where
        super().__init__(f"step {step}: the {what} is not finite; {where}")


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did: means over its tokens, the gradient's norm before clipping, load [layers, E]."""

    losses: dict[str, float]
    grad_norm: float
    lr: float
    load: Tensor
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """The whole validation part: tokens scored, their summed nats, and the load [layers, E] int64."""

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
    """torch's deterministic algorithms while the block runs."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN costs a tenth of the step; the tests of the operators do it instead.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


class Trainer:
    """Steps a model along a schedule. `state` after step n, loaded into a new Trainer, gives the same step n + 1."""

    def __init__(self, model: Transformer, dataset: Dataset, settings: Settings) -> None:
        self.model, self.dataset, self.settings = model, dataset, settings
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
        """One optimizer step. Raises `NonFiniteError` before any parameter changes."""
        started = time.perf_counter()
        settings, number = self.settings, self.step_number + 1
        factor = learning_rate_factor(number, steps=settings.steps, warmup=settings.warmup, schedule=settings.schedule)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad()
        self.model.train()
        losses: dict[str, float] = {}
        load = torch.zeros(())
        for _ in range(settings.accumulation):
            input_ids = self.sampler.next_batch()
            output = self._forward(input_ids)
            assert output.loss is not None and output.load is not None
            if not torch.isfinite(output.loss):
                raise NonFiniteError(number, "loss", self._first_non_finite(input_ids))
            # Every window predicts as many tokens, so the mean of the means is the mean over tokens.
            (output.loss / settings.accumulation).backward()
            for name, value in output.losses.items():
                losses[name] = losses.get(name, 0.0) + value.item() / settings.accumulation
            load = load + output.load
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip).item()
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
        """Score every validation token but the first, each given what precedes it in its window of packed text."""
        # Training mode, because that is when MTP modules run: their experts' load counts too. No layer has dropout.
        self.model.train()
        nats, tokens, load = 0.0, 0, torch.zeros((), dtype=torch.int64)
        for input_ids in evaluation_batches(
            self.dataset.validation, self.settings.seq_length, self.settings.batch_size
        ):
            with self._autocast():
                output = self.model(input_ids, labels=input_ids)
            count = input_ids.numel() - len(input_ids)
            nats += output.losses["ce"].item() * count
            tokens += count
            load = load + output.load
        return Evaluation(tokens, nats, self.dataset.validation_bytes, load)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON values) from which `load_state` continues bit for bit."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state.items():
                tensors |= {f"optimizer/{i}/{self._names[parameter]}/{key}": value for key, value in state.items()}
        tensors["rng"] = torch.get_rng_state()
        return tensors, {"step": self.step_number, "sampler": self.sampler.state_dict()}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        parameters = {name: parameter for parameter, name in self._names.items()}
        weights: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "model":
                weights[rest] = tensor
            elif kind == "optimizer":
                index, name, entry = rest.split("/")
                self.optimizers[int(index)].state[parameters[name]][entry] = tensor
        self.model.load_state_dict(weights)
        torch.set_rng_state(tensors["rng"])
        self.step_number = values["step"]
        self.sampler.load_state_dict(values["sampler"])

    def _autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.dtype == "bf16")

    def _forward(self, input_ids: Tensor) -> Output:
        documents = document_ids(input_ids, self.dataset.end_of_text) if self.settings.document_mask else None
        with self._autocast():
            return self.model(input_ids, labels=input_ids, document_ids=documents)

    @torch.no_grad()
    def _first_non_finite(self, input_ids: Tensor) -> str:
        """Where a forward pass goes wrong: the first parameter, else the first module to return, that is not finite."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if not torch.isfinite(tensor).all():
                return f"first in the parameter {name}"
        found: list[str] = []

        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(names[module])

        names = {module: name for name, module in self.model.named_modules() if name}
        hooks = [module.register_forward_hook(look) for module in names]
        try:
            self._forward(input_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return f"first in the output of {found[0]}" if found else "every module's output is finite"

    def _first_non_finite_gradient(self) -> str:
        # The backward pass runs from the last parameter to the first.
        for parameter, name in reversed(self._names.items()):
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"first in the gradient of {name}"
        return "every parameter's gradient is finite, their norm is not"


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "__dataclass_fields__"):
        yield from _tensors(list(vars(output).values()))
