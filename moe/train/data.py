"""Data pipeline from documents to batches: tokenizer, packed tokens on disk, seeded windows.

The tokens of all documents of a split are in one file, each document after an end-of-text token. Training reads it in
windows, in an order that depends only on (seed, epoch).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor

from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.train.documents import Document, FileDocuments, python_topics, read_files, split
from moe.train.tokenizer import (
    END_OF_TEXT,
    find_tokenizer,
    load_tokenizer,
    read_tokenizer_settings,
    token_ids,
    tokenizer_files,
    train_tokenizer,
    vocabulary_size,
)

LEFT_OUT_NAMES = 5


@dataclass(frozen=True)
class Dataset:
    """Packed tokens of the training and validation splits, with their tokenizer.

    A model is scored on every validation token but the first, including the <end> after each document. With a document
    mask the first token of each document is not scored, because nothing in its document precedes it.

    Attributes:
        end_of_text: id of <end>.
        train, validation: memory-mapped tokens: <end> document <end> document ... <end>.
        facts: content of data.json: tokens, documents and hash of each split, names of the held-out documents, and
            `read_tokenizer_settings`.
    """

    tokenizer: Tokenizer
    end_of_text: int
    train: np.ndarray
    validation: np.ndarray
    facts: dict[str, Any]

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents."""
        return self.facts["validation_bytes"]

    def check_vocabulary(self, config: ModelConfig) -> None:
        """Raise ConfigError if the model has fewer tokens than the tokenizer."""
        if self.facts["vocab_size"] > config.vocab_size:
            allowed = f"at least {self.facts['vocab_size']}, the vocabulary size of the data"
            raise ConfigError("vocab_size", config.vocab_size, allowed)

    def scored(self, *, document_mask: bool) -> np.ndarray:
        """Return the mask of scored tokens in validation[1:], bool [len(validation) - 1]."""
        if document_mask:
            return self.validation[:-1] != self.end_of_text
        return np.ones(len(self.validation) - 1, dtype=bool)

    def scored_bytes(self, *, document_mask: bool) -> int:
        """Count the UTF-8 bytes of the scored tokens of held-out documents; <end> has none."""
        left_out, times = np.unique(self.validation[1:][~self.scored(document_mask=document_mask)], return_counts=True)
        return self.validation_bytes - sum(
            int(count) * self._bytes_of(int(token)) for token, count in zip(left_out, times, strict=True)
        )

    def _bytes_of(self, token: int) -> int:
        """Count the bytes of a token at the start of a document; they may be part of a character."""
        text = self.tokenizer.id_to_token(token)
        if text is None or token == self.end_of_text:
            return 0
        if isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return len(text)  # one character per byte
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return 1
        return len(self.tokenizer.decode([token], skip_special_tokens=False).encode())

    @property
    def token_ids(self) -> dict[str, int]:
        """Special token ids with the names of config.json. A text begins and ends with <end>."""
        return token_ids(self.tokenizer, self.end_of_text, self.facts.get("tokenizer", {}))

    def carried_files(self) -> dict[str, bytes]:
        """Return the checkpoint files that transformers needs to load the tokenizer and to stop generation."""
        return tokenizer_files(self.tokenizer, self.end_of_text, self.facts.get("tokenizer", {}))


def prepare(
    folder: Path,
    data: Sequence[Path] | None,
    tokenizer_path: Path | None,
    vocab_size: int,
    *,
    field: str = "text",
    validation_data: Sequence[Path] | None = None,
) -> Dataset:
    """Read, split, tokenize and pack documents into `folder`. data.json is written last and marks it as complete.

    Args:
        data: files and folders, see `read_files`; None or empty for the language reference that ships with Python.
        tokenizer_path: see `find_tokenizer`; None trains a tokenizer of at most `vocab_size` tokens.
        field: name of the text field in files of records.
        validation_data: validation files and folders; None holds out documents of `data`.

    Raises:
        ConfigError: as raised by `read_files`, `split` and `load_tokenizer`.
    """
    documents = read_files(data, field) if data else python_topics()
    others = None if validation_data is None else read_files(validation_data, field, option="--validation-data")
    training, validation = split(documents, others)
    settings: dict[str, Any] = {}
    if tokenizer_path is None:
        tokenizer, end_name = train_tokenizer((document.text for document in training), vocab_size), END_OF_TEXT
    else:
        tokenizer_path = find_tokenizer(tokenizer_path)
        tokenizer, end_name = load_tokenizer(tokenizer_path)
        settings = read_tokenizer_settings(tokenizer_path)
    end = tokenizer.token_to_id(end_name)
    assert end is not None  # ensured by both branches
    folder.mkdir(parents=True, exist_ok=True)
    size = vocabulary_size(tokenizer)
    left_out = [name for each in (documents, others) if isinstance(each, FileDocuments) for name in each.left_out]
    facts: dict[str, Any] = {
        "dtype": "uint16" if size <= 2**16 else "uint32",
        "end_of_text": end,
        "vocab_size": size,
        "held_out": [document.name for document in validation],
        "left_out": {"count": len(left_out), "first": left_out[:LEFT_OUT_NAMES]},
        "tokenizer": settings,
    }
    for part, members in (("train", training), ("validation", validation)):
        facts[part] = _pack(folder / f"{part}.bin", tokenizer, end, members, facts["dtype"])
    facts |= {"validation_bytes": facts["validation"]["bytes"], "dropped_paragraphs": training.dropped}
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / "data.json", facts)
    return open_dataset(folder)


def write_json(file: Path, values: Any) -> None:
    """Write `values` to `file` atomically, so that a killed process leaves the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _pack(file: Path, tokenizer: Tokenizer, end: int, documents: Iterable[Document], dtype: str) -> dict[str, Any]:
    """Write <end> document <end> document ... <end>; return documents, tokens, bytes of text, and the file's hash."""
    digest = hashlib.sha256()
    sizes = {"documents": 0, "tokens": 0, "bytes": 0}
    with file.open("wb") as out:
        for ids, text_bytes in encode(tokenizer, end, documents):
            content = np.array(ids, dtype=dtype).tobytes()
            digest.update(content)
            out.write(content)
            sizes = {
                "documents": sizes["documents"] + (text_bytes > 0),
                "tokens": sizes["tokens"] + len(ids),
                "bytes": sizes["bytes"] + text_bytes,
            }
    return {**sizes, "sha256": digest.hexdigest()}


def encode(tokenizer: Tokenizer, end: int, documents: Iterable[Document]) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, UTF-8 bytes of text): first of <end>, then of each document with the <end> after it."""
    tokenizer.encode_special_tokens = True  # encodes special tokens in documents as plain text
    yield [end], 0
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        yield [*ids, end], len(document.text.encode())


def open_dataset(folder: Path) -> Dataset:
    """Open the dataset that `prepare` wrote to `folder`. Raises ConfigError if a file has changed."""
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    parts = {}
    for part in ("train", "validation"):
        file = folder / f"{part}.bin"
        parts[part] = np.memmap(file, dtype=facts["dtype"], mode="r")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != facts[part]["sha256"]:
            raise ConfigError("--data", str(file), "the tokens with which the run started; found a changed file")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Dataset(tokenizer, facts["end_of_text"], parts["train"], parts["validation"], facts)


class Sampler:
    """Sampler of batches [batch_size, length] of windows of `tokens`, in an order that depends on (seed, epoch).

    The windows of an epoch overlap by one token, so that each token is predicted once, and are permuted by the seed. A
    seeded shift moves the window boundaries in each epoch. A batch may span two epochs. The state is two integers.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int) -> None:
        if len(tokens) < length:
            raise ConfigError("--seq-length", length, f"at most {len(tokens)}, the number of training tokens")
        self.tokens, self.length, self.batch_size, self.seed = tokens, length, batch_size, seed
        self.load_state_dict({"epoch": 0, "position": 0})

    def _shuffle(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch])
        shift = rng.integers(min(self.length - 1, len(self.tokens) - self.length + 1))
        return rng.permutation(np.arange(shift, len(self.tokens) - self.length + 1, self.length - 1))

    def next_batch(self) -> Tensor:
        """Return the next batch, int64 [batch_size, length]."""
        rows = []
        while len(rows) < self.batch_size:
            if self.position == len(self._starts):
                self.epoch, self.position = self.epoch + 1, 0
                self._starts = self._shuffle()
            start = self._starts[self.position]
            rows.append(self.tokens[start : start + self.length])
            self.position += 1
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._starts = self._shuffle()


def evaluation_batches(tokens: np.ndarray, length: int, batch_size: int) -> Iterator[Tensor]:
    """Yield `tokens` in order as int64 [<= batch_size, <= length]; each but the first is predicted exactly once."""
    stride = length - 1
    full = (len(tokens) - 1) // stride
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride] if full else tokens[:0]
    for start in range(0, full, batch_size):
        yield torch.from_numpy(windows[start : min(start + batch_size, full)].astype(np.int64))
    if full * stride + 1 < len(tokens):
        yield torch.from_numpy(tokens[full * stride :].astype(np.int64))[None]


def document_ids(input_ids: Tensor, end_of_text: int) -> Tensor:
    """Number the documents of each window, int64 [B, S]; an end-of-text token belongs to the document that it ends."""
    ends = (input_ids == end_of_text).long()
    return ends.cumsum(dim=1) - ends
