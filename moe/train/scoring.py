"""Scoring of a checkpoint on any text, as in the validation of a training run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moe.balance import LoadReport
from moe.errors import ConfigError
from moe.model import Transformer
from moe.train.architecture import check_experts
from moe.train.data import Dataset, encode, open_dataset
from moe.train.documents import Documents, where
from moe.train.loop import Trainer, deterministic
from moe.train.settings import Settings
from moe.train.tokenizer import vocabulary_size

MIN_TOKENS = 4


def validation_of(run: Path) -> Dataset:
    """Open the held-out text of a run of `moesmith train`."""
    if not (run / "data" / "data.json").is_file():
        raise ConfigError("--data", None, f"files or folders; {run} is not the folder of a training run")
    return open_dataset(run / "data")


def pack(documents: Documents, tokenizer: Tokenizer, end: int) -> Dataset:
    """Pack all `documents` in memory, as the validation split of a dataset."""
    tokens: list[np.ndarray] = []
    facts = {"vocab_size": vocabulary_size(tokenizer), "validation_bytes": 0}
    count = -1  # the first piece is <end> alone
    for ids, text_bytes in encode(tokenizer, end, documents):
        tokens.append(np.array(ids, dtype=np.uint32))
        facts["validation_bytes"] += text_bytes
        count += 1
    packed = np.concatenate(tokens)
    if len(packed) < MIN_TOKENS:
        raise ConfigError("--data", where(documents), f"text of {MIN_TOKENS} tokens or more; found {len(packed)}")
    return Dataset(tokenizer, end, packed, packed, {**facts, "validation": {"documents": count}})


def score(model: Transformer, dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """Score the validation split of `dataset` by `Trainer.evaluate`, in windows of `settings.seq_length`.

    Returns:
        JSON values: scored tokens, documents, bytes of text, nats_per_token, perplexity, bits_per_byte, and for each
        layer with experts max_vio, dead_experts and tokens (per expert).
    """
    check_experts(model.config)
    with deterministic():
        trainer = Trainer(model, dataset, settings)
        found = trainer.evaluate()
    load = LoadReport(trainer.layer_names, found.load)
    return {
        "tokens": found.tokens,
        "documents": dataset.facts["validation"]["documents"],
        "bytes": found.text_bytes,
        "seq_length": settings.seq_length,
        "nats_per_token": found.nats_per_token,
        "perplexity": math.exp(min(found.nats_per_token, 700.0)),  # exp(710) overflows
        "bits_per_byte": found.bits_per_byte,
        "load": load_rows(load),
    }


def load_rows(load: LoadReport) -> list[dict[str, Any]]:
    """Convert a load report to JSON values, one object per layer."""
    rows = zip(load.layers, load.max_vio, load.dead_experts, load.load.tolist(), strict=True)
    return [{"layer": name, "max_vio": vio, "dead_experts": dead, "tokens": counts} for name, vio, dead, counts in rows]
