"""Run of `moesmith train` in one folder: text, summary, plots. `train` documents the folder."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from moe.balance import LoadReport
from moe.generation import generate
from moe.model import Transformer
from moe.train.baselines import bigram_nats, bits_per_byte, unigram_nats
from moe.train.data import Dataset, open_dataset, prepare
from moe.train.lifecycle import Run, describe_model, run_in_folder
from moe.train.loop import Trainer
from moe.train.metrics import Metrics
from moe.train.scoring import load_rows
from moe.train.settings import Settings
from moe.train.world import World

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh

SAMPLE_PROMPT_TOKENS = 16
SAMPLE_NEW_TOKENS = 96
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}


def train(
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    mesh: "Mesh | None" = None,
) -> dict[str, Any] | None:
    """Train a model, and return the summary that is also written to summary.json.

    Writes to the folder what `moe.train.lifecycle.run_in_folder` writes, and data/ (tokens, tokenizer), loss.png and
    load.png (with matplotlib), and the tokenizer in checkpoint/. That function documents resuming, meshes and errors.

    Validation scores in metrics.jsonl and summary.json, and those of the baselines, are over the tokens that training
    predicts: with `document_mask`, without the first token of each document. `tokens` and `bytes` in the summary count
    these tokens and their bytes of text, the denominator of bits per byte.
    """
    return run_in_folder(TextRun(settings, folder), resume=resume, overwrite=overwrite, console=console, mesh=mesh)


class TextRun(Run[Settings, Trainer]):
    """Run of `moesmith train`."""

    def prepare(self) -> None:
        self._dataset()

    def _dataset(self) -> Dataset:
        settings, data = self.settings, self.folder / "data"
        if (data / "data.json").exists():
            return open_dataset(data)
        return prepare(
            data,
            settings.data,
            settings.tokenizer or settings.init,
            self.write_architecture().vocab_size,
            field=settings.field,
            validation_data=settings.validation_data,
        )

    def build(self, world: World, device: torch.device) -> Trainer:
        settings, dataset, config = self.settings, self._dataset(), self.architecture()
        if settings.init is None:
            extra = {**config.extra, **dataset.token_ids}
            config = replace(config, vocab_size=dataset.facts["vocab_size"], extra=extra)
        model = self.build_model(config, world, device)
        if settings.init is None or settings.tokenizer is not None:
            model.carried_files = dataset.carried_files()
        return Trainer(model, dataset, settings, world=world)

    def describe(self, trainer: Trainer) -> Iterator[str]:
        facts = trainer.dataset.facts
        train, held_out = (
            f"{facts[part]['tokens']:,} {name} tokens of {facts[part]['documents']:,} documents"
            for part, name in (("train", "training"), ("validation", "validation"))
        )
        yield f"data: {train}, {held_out}"
        left_out = facts.get("left_out", {"count": 0})  # not recorded by earlier releases
        if left_out["count"]:
            names = ", ".join(left_out["first"]) + (", ..." if left_out["count"] > len(left_out["first"]) else "")
            yield f"data: {left_out['count']:,} files or folders left out: {names}"
        if dropped := facts.get("dropped_paragraphs"):
            copies = "because they also occur in the validation text"
            yield f"data: {dropped:,} paragraphs of training text dropped, {copies}"

    def summary(self, trainer: Trainer, metrics: Metrics, model: Transformer) -> dict[str, Any]:
        dataset = trainer.dataset
        validation = metrics.of("validation")
        scored = dataset.scored(document_mask=trainer.document_mask)
        scored_bytes = dataset.scored_bytes(document_mask=trainer.document_mask)
        tokens = int(scored.sum())
        scores = {
            name: {key: record[key] for key in ("nats_per_token", "bits_per_byte")}
            for name, record in (("before", validation[0]), ("after", validation[-1]))
        }
        for name, count_nats in (("unigram", unigram_nats), ("bigram", bigram_nats)):
            nats = count_nats(dataset.train, dataset.validation, dataset.facts["vocab_size"], scored)
            bits = bits_per_byte(nats, scored_bytes)
            scores[name] = {"nats_per_token": nats / tokens, "bits_per_byte": bits}
        load = LoadReport(trainer.layer_names, torch.tensor(validation[-1]["load"]))
        baselines = {name: scores[name]["nats_per_token"] for name in ("unigram", "bigram")}
        return {
            "tokens_per_second": metrics.tokens_per_second,
            "validation": {
                "tokens": tokens,
                "bytes": scored_bytes,
                "documents": dataset.facts["validation"]["documents"],
                **scores,
            },
            "load": load_rows(load),
            "plots": _plot(trainer, metrics, self.folder, load, baselines),
            "sample": _sample(trainer, model),
        }


def _plot(trainer: Trainer, metrics: Metrics, folder: Path, load: LoadReport, baselines: dict[str, float]) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from moe.train.plots import plot_run

    steps = trainer.step_number
    title = f"{describe_model(trainer)}, {steps:,} {'step' if steps == 1 else 'steps'}"
    train_records, validation = metrics.of("train"), metrics.of("validation")
    files = plot_run(folder, title, train_records, validation, baselines, load.layers, load.load.numpy())
    return [str(file) for file in files]


def _sample(trainer: Trainer, model: Transformer) -> dict[str, str]:
    """Generate a continuation of the first held-out document."""
    dataset = trainer.dataset
    opening = dataset.validation[: 1 + SAMPLE_PROMPT_TOKENS].astype(np.int64)
    ends = np.flatnonzero(opening[1:] == dataset.end_of_text)
    prompt = opening[: ends[0] + 1] if len(ends) else opening
    ids = generate(
        model,
        torch.from_numpy(prompt)[None].to(next(model.parameters()).device),
        max_new_tokens=min(SAMPLE_NEW_TOKENS, model.config.max_position_embeddings - len(prompt)),
        **SAMPLING,
        seed=trainer.settings.seed,
        eos_token_id=dataset.end_of_text,
    )[0].tolist()
    decode = dataset.tokenizer.decode
    return {"prompt": decode(ids[1 : len(prompt)]), "text": decode(ids)}
