"""Scoring of a checkpoint on any text, as in the validation of a training run."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe.balance import LoadReport
from moe.errors import ConfigError
from moe.model import Transformer
from moe.train.data import Dataset, encode, open_dataset
from moe.train.documents import Documents, where
from moe.train.loop import Trainer, deterministic
from moe.train.settings import Settings
from moe.train.tokenizer import vocabulary_size

MIN_TOKENS = 4
COMPARED = 512  # few, because logits of a large vocabulary need gigabytes


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


def compare(models: Mapping[str, Callable[[], Transformer]], dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """Score versions of one model, and compare their logits with those of the first.

    Versions are made one after the other, so that only one is in memory. Logits are those of the first `COMPARED`
    tokens of the text, at most one window.

    Returns:
        The scores of the last version, as `score` returns them, and "precisions", one object per version: weights (name
        of the version), dtype (of the embedding), bytes (of all tensors), nats_per_token, perplexity, logits_error
        (norm of the difference, divided by the norm), kl_divergence (of the next token, in nats) and top1_agreement
        (fraction of positions).
    """
    ids = torch.from_numpy(dataset.validation[: min(settings.seq_length, COMPARED)].astype(np.int64))[None]
    rows: list[dict[str, Any]] = []
    exact: Tensor | None = None
    scores: dict[str, Any] = {}
    for name, make in models.items():
        model = make()
        scores = score(model, dataset, settings)
        device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
        with torch.no_grad():
            logits: Tensor = model(ids.to(device)).logits[0].cpu()
        exact = logits if exact is None else exact
        rows.append(
            {
                "weights": name,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
                "nats_per_token": scores["nats_per_token"],
                "perplexity": scores["perplexity"],
                **logits_difference(exact, logits),
            }
        )
        del model  # before the next one is made
    return {**scores, "precisions": rows}


def logits_difference(exact: Tensor, found: Tensor) -> dict[str, float]:
    """Compare logits [T, V], in float64."""
    error = norm = divergence = 0.0
    same = 0
    for a, b in zip(exact.split(64), found.split(64), strict=True):
        a, b = a.double(), b.double()
        error, norm = error + (b - a).square().sum().item(), norm + a.square().sum().item()
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return {
        "logits_error": math.sqrt(error / norm) if norm else 0.0,
        "kl_divergence": divergence / len(exact),
        "top1_agreement": same / len(exact),
    }


def load_rows(load: LoadReport) -> list[dict[str, Any]]:
    """Convert a load report to JSON values, one object per layer."""
    rows = zip(load.layers, load.max_vio, load.dead_experts, load.load.tolist(), strict=True)
    return [{"layer": name, "max_vio": vio, "dead_experts": dead, "tokens": counts} for name, vio, dead, counts in rows]
