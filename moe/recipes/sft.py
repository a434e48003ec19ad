"""Supervised fine-tuning on packed examples: batches, trainer, and run of `moesmith sft`."""

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from moe.balance import LoadReport
from moe.generation import generate
from moe.loss import IGNORED
from moe.model import Transformer
from moe.recipes.examples import ExampleData, Examples, open_examples, prepare_examples
from moe.recipes.packing import pack
from moe.recipes.sft_settings import SftSettings
from moe.train.lifecycle import Run, describe_model, run_in_folder
from moe.train.loop import BaseTrainer, BatchLoss, StepReport
from moe.train.metrics import Metrics
from moe.train.scoring import load_rows
from moe.train.tokenizer import token_ids, tokenizer_files
from moe.train.world import World

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh

SAMPLE_NEW_TOKENS = 128
PADDING = -1  # document id of the end of a row

Batch = dict[str, Tensor]
"""Arguments of `Transformer.forward`, each [B, S]."""


def sft(
    settings: SftSettings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    mesh: "Mesh | None" = None,
) -> dict[str, Any] | None:
    """Fine-tune a model, and return the summary that is also written to summary.json.

    Writes to the folder what `moe.train.lifecycle.run_in_folder` writes, and data/ (encoded examples, tokenizer),
    loss.png and load.png (with matplotlib). That function documents resuming, meshes and errors.

    Validation scores are nats per completion token of the held-out examples.
    """
    return run_in_folder(SftRun(settings, folder), resume=resume, overwrite=overwrite, console=console, mesh=mesh)


def batch_of(examples: Examples, rows: Sequence[Sequence[int]], length: int, fill: int) -> Batch:
    """Return rows of packed examples as model arguments.

    Each token attends to, and is predicted from, its own example only, whose positions begin at 0. The loss and its
    gradients are those of the examples, each in a sequence of its own. Only the balance losses differ, which are means
    over sequences: over rows.

    Args:
        rows: numbers of the examples of each row; an empty row is padding.
        length: row length in tokens; the end of a row is padded with `fill`.

    Returns:
        int64 [B, length]: input_ids, labels (-100 where nothing is predicted), document_ids and position_ids; and
        attention_mask, bool.
    """
    shape = (len(rows), length)
    ids, labels = torch.full(shape, fill), torch.full(shape, IGNORED)
    documents, positions = torch.full(shape, PADDING), torch.zeros(shape, dtype=torch.int64)
    for row, members in enumerate(rows):
        at = 0
        for document, example in enumerate(members):
            a, b = examples.starts[example : example + 2]
            here = (row, slice(at, at := at + int(b - a)))
            ids[here] = torch.from_numpy(examples.tokens[a:b].astype(np.int64))
            labels[here] = ids[here].masked_fill(~torch.from_numpy(examples.trained[a:b]), IGNORED)
            documents[here], positions[here] = document, torch.arange(b - a)
    arguments = {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}
    return {**arguments, "attention_mask": documents != PADDING}


class Order:
    """Endless order of `count` rows, permuted anew in each epoch by (seed, epoch). The state is two integers."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.load_state_dict({"epoch": 0, "position": 0})

    def take(self, number: int) -> list[int]:
        """Return the next rows; they may be of two epochs."""
        taken: list[int] = []
        while len(taken) < number:
            if self.position == self.count:
                self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
            more = self._rows[self.position : self.position + number - len(taken)]
            self.position += len(more)
            taken += more
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._rows = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()


@dataclass(frozen=True)
class CompletionScore:
    """Score of the held-out examples: completion tokens, their nats, load [layers, E] of all tokens."""

    tokens: int
    nats: float
    load: Tensor

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def values(self) -> dict[str, Any]:
        return {"nats_per_token": self.nats_per_token, "load": self.load.tolist()}

    def text(self) -> str:
        return f"validation {self.nats_per_token:.4f} nats per completion token"


class SftTrainer(BaseTrainer):
    """Trainer of one model on packed examples.

    With `epochs`, the steps of the settings are replaced by as many as these epochs take.
    """

    def __init__(
        self,
        model: Transformer,
        data: ExampleData,
        settings: SftSettings,
        mesh: "Mesh | None" = None,
        *,
        world: World | None = None,
    ) -> None:
        data.check_vocabulary(model.config)
        self.data, self.lengths = data, data.train.lengths
        self.rows = pack(self.lengths, settings.seq_length)
        if settings.epochs:
            each = settings.batch_size * settings.accumulation
            settings = replace(settings, epochs=0, steps=math.ceil(settings.epochs * len(self.rows) / each))
        super().__init__(model, settings, mesh, world=world)
        self.order = Order(len(self.rows), settings.seed)

    def step(self) -> StepReport:
        """Run one optimizer step on the mean over all completion tokens. Raises `NonFiniteError`."""
        started = time.perf_counter()
        lr, size = self.begin_step(), self.settings.batch_size
        taken = [[self.rows[row] for row in self.order.take(size)] for _ in range(self.settings.accumulation)]
        batches = [self._local(self._batch(self.data.train, rows)) for rows in taken]
        found = self.update(batches, self._loss, lambda batch: self.model.loss_counts(**batch))
        self.step_number += 1
        tokens = sum(self.lengths[example] for rows in taken for row in rows for example in row)
        rate = tokens / (time.perf_counter() - started)
        return StepReport(found.losses, found.grad_norm, found.load, lr, rate)

    def evaluate(self) -> CompletionScore:
        """Score the completion tokens of the held-out examples, without the loss of distillation."""
        nats, tokens, load = self._score(self._evaluation_batches())
        return CompletionScore(tokens, nats, load)

    def position(self) -> dict[str, Any]:
        return {**super().position(), "order": self.order.state_dict()}

    def load_position(self, values: dict[str, Any]) -> None:
        super().load_position(values)
        self.order.load_state_dict(values["order"])

    def _loss(self, batch: Batch) -> BatchLoss:
        return self._call(batch)

    def _evaluation_batches(self) -> Iterator[tuple[Batch, int]]:
        rows, size = pack(self.data.validation.lengths, self.settings.seq_length), self.settings.batch_size
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            # Padded to a multiple of the ranks, because every rank must call the model.
            some += [[]] * (-len(some) % self.world.size)
            batch = self._batch(self.data.validation, some)
            yield self._local(batch), int(self.model.loss_counts(**batch)["ce.0"])

    def _batch(self, examples: Examples, rows: Sequence[Sequence[int]]) -> Batch:
        return batch_of(examples, rows, self.settings.seq_length, self.data.end_of_text)

    def _local(self, batch: Batch) -> Batch:
        return {name: self._local_rows(tensor) for name, tensor in batch.items()}


_Settings = TypeVar("_Settings", bound=SftSettings)
_Trainer = TypeVar("_Trainer", bound=SftTrainer)


class ExampleRun(Run[_Settings, _Trainer]):
    """Run on examples."""

    def prepare(self) -> None:
        self.data()

    def data(self) -> ExampleData:
        """Prepare the examples, or open them if they are complete already."""
        settings, folder = self.settings, self.folder / "data"
        if (folder / "examples.json").exists():
            return open_examples(folder)
        self.write_architecture()
        assert settings.tokenizer_path is not None  # checked by the settings
        files, others = self.example_files(), settings.validation_data
        return prepare_examples(folder, files, settings.tokenizer_path, settings.seq_length, validation_data=others)

    def example_files(self) -> Sequence[Path]:
        """Return files or folders of the examples to train on."""
        assert self.settings.data is not None  # checked by the settings
        return self.settings.data

    def model_for(self, data: ExampleData, world: World, device: torch.device) -> Transformer:
        """Build the model to train, with the tokenizer of the examples."""
        settings, config = self.settings, self.architecture()
        own = data.tokenizer, data.end_of_text, data.facts["tokenizer"]
        if settings.init is None:
            extra = {**config.extra, **token_ids(*own)}
            config = replace(config, vocab_size=data.facts["vocab_size"], extra=extra)
        model = self.build_model(config, world, device)
        if settings.init is None or settings.tokenizer is not None:
            model.carried_files = tokenizer_files(*own)
        return model

    def describe(self, trainer: _Trainer) -> Iterator[str]:
        facts, rows = trainer.data.facts, len(trainer.rows)
        train, held_out = (
            f"{facts[part]['examples']:,} {name} examples ({facts[part]['trained']:,} of "
            f"{facts[part]['tokens']:,} tokens predicted)"
            for part, name in (("train", "training"), ("validation", "validation"))
        )
        length = trainer.settings.seq_length
        yield f"data: {train} in {rows:,} rows of {length:,}, {held_out}"
        if left_out := facts["left_out"]["count"]:
            longest = facts["left_out"]["longest"]
            yield f"data: {left_out:,} examples of more than {length:,} tokens left out, the longest has {longest:,}"

    def summary(self, trainer: _Trainer, metrics: Metrics, model: Transformer) -> dict[str, Any]:
        facts, validation = trainer.data.facts["validation"], metrics.of("validation")
        scores = (("before", validation[0]), ("after", validation[-1]))
        load = LoadReport(trainer.layer_names, torch.tensor(validation[-1]["load"]))
        return {
            "tokens_per_second": metrics.tokens_per_second,
            "validation": {
                "tokens": facts["trained"],
                "examples": facts["examples"],
                **{name: {"nats_per_token": record["nats_per_token"]} for name, record in scores},
            },
            "load": load_rows(load),
            "plots": _plot(trainer, metrics, self.folder, load),
            "sample": _sample(trainer.data, model),
        }


class SftRun(ExampleRun[SftSettings, SftTrainer]):
    """Run of `moesmith sft`."""

    def build(self, world: World, device: torch.device) -> SftTrainer:
        data = self.data()
        return SftTrainer(self.model_for(data, world, device), data, self.settings, world=world)


def _plot(trainer: BaseTrainer, metrics: Metrics, folder: Path, load: LoadReport) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from moe.train.plots import plot_run

    title = f"{describe_model(trainer)}, {trainer.step_number:,} steps of {trainer.settings.kind}"
    train, validation = metrics.of("train"), metrics.of("validation")
    files = plot_run(folder, title, train, validation, {}, load.layers, load.load.numpy())
    return [str(file) for file in files]


def _sample(data: ExampleData, model: Transformer) -> dict[str, str]:
    """The prompt of the first held-out example, its completion, and that of the model, greedily decoded."""
    ids = data.validation.tokens[: data.validation.starts[1]].tolist()
    at = max(data.validation.trained.tolist().index(True), 1)
    device = next(model.parameters()).device
    room = min(SAMPLE_NEW_TOKENS, model.config.max_position_embeddings - at)
    found = generate(
        model, torch.tensor([ids[:at]], device=device), max_new_tokens=room, eos_token_id=data.end_of_text
    )[0].tolist()
    parts = {"prompt": ids[:at], "completion": ids[at:], "text": found[at:]}
    return {name: data.tokenizer.decode(part, skip_special_tokens=False) for name, part in parts.items()}
