"""From text to batches: documents, held-out split, tokenizer, packed tokens on disk, seeded windows.

A document is a name and a text. Validation takes whole documents, chosen by a hash of the name, and whatever training
text repeats one of their paragraphs is dropped. Tokens of all documents of a part stand in one file, each document
after an end-of-text token; training reads it in windows whose order is a function of (seed, epoch).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from moe.checkpoint.reading.hub import find, is_name
from moe.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"
# What released tokenizers call the token between documents, for a tokenizer.json without a tokenizer_config.json.
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's)
    "<|end_of_text|>",
    "<eos>",
    "</s>",
    "<|im_end|>",
    "[SEP]",
)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")
DOCUMENT_BYTES = 8192
HELD_OUT_FRACTION = 0.1
# Shorter paragraphs ("Example:", a signature) are language, not a copy.
COPY_MIN_CHARACTERS = 40


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def python_topics() -> list[Document]:
    """The language reference that ships with Python as `pydoc_data.topics`; its content differs between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError("--data", None, "text files: this Python comes without pydoc_data.topics") from None
    return [Document(name, text) for name, text in sorted(topics.items())]


def read_files(paths: Iterable[Path]) -> list[Document]:
    """Documents of UTF-8 text files, and of the text files below folders. Long files are cut, see `_cut`."""
    documents = []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
            if not files:
                raise ConfigError("--data", str(path), f"a folder with files of {', '.join(TEXT_SUFFIXES)}")
        elif path.is_file():
            files = [path]
        else:
            raise ConfigError("--data", str(path), "an existing file or folder")
        for file in files:
            name = file.relative_to(path).as_posix() if file != path else path.name
            documents += [Document(f"{name}#{i}", text) for i, text in enumerate(_cut(_read_utf8(file)))]
    return documents


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise ConfigError("--data", str(file), f"UTF-8 text; found {found}") from None
    except OSError as error:
        raise ConfigError("--data", str(file), f"a readable file; {error.strerror}") from None


def _cut(text: str) -> Iterator[str]:
    """Pieces of at least DOCUMENT_BYTES characters that end at a blank line, or, at twice that, at any line's end."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= 2 * DOCUMENT_BYTES or (size >= DOCUMENT_BYTES and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if any(line.strip() for line in piece):
        yield "".join(piece)


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, validation): whole documents, held out where a hash of the name says so; neither part is empty.

    Documents repeat each other ("with" is a section of "compound" in Python's own): paragraphs that stand in a held-out
    document, whatever their white space, are dropped from the training documents.
    """
    if len(documents) < 2:
        raise ConfigError("--data", len(documents), "text for two documents or more, one of them held out")
    ranked = sorted(documents, key=lambda document: (_fraction(document.name), document.name))
    count = sum(_fraction(document.name) < HELD_OUT_FRACTION for document in documents)
    held_out = {id(document) for document in ranked[: min(max(count, 1), len(ranked) - 1)]}
    validation = [document for document in documents if id(document) in held_out]
    held_out_paragraphs = {_key(text) for document in validation for text in paragraphs(document.text)}
    copies = {key for key in held_out_paragraphs if len(key) >= COPY_MIN_CHARACTERS}
    training = []
    for document in documents:
        if id(document) in held_out:
            continue
        kept = "".join(text for text in paragraphs(document.text) if _key(text) not in copies)
        if kept.strip():
            training.append(Document(document.name, kept))
    if not training:
        raise ConfigError("--data", len(documents), "documents that differ: all text is a copy of what is held out")
    return training, validation


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def paragraphs(text: str) -> list[str]:
    """The text in pieces that end with their blank lines; joined they are the text."""
    pieces: list[str] = []
    blank = True
    for line in text.splitlines(keepends=True):
        if (blank and line.strip()) or not pieces:
            pieces.append("")
        pieces[-1] += line
        blank = not line.strip()
    return pieces


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most `vocab_size` tokens, END_OF_TEXT among them; the same texts give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def find_tokenizer(path: Path) -> Path:
    """The tokenizer.json that `path` names: itself, or that of a checkpoint folder, a run or a name on the Hub."""
    if path.suffix == ".json" or not (path.is_dir() or is_name(path)):
        return path
    try:
        folder = find(path, files=("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    except CheckpointError as error:
        raise ConfigError("--tokenizer", str(path), f"a readable tokenizer.json; {error.problem}") from None
    return folder / "tokenizer.json"


def load_tokenizer(path: Path) -> tuple[Tokenizer, str]:
    """(tokenizer, end-of-text token) of a tokenizer.json.

    The token is the `eos_token` of the tokenizer_config.json beside it, else the first of END_OF_TEXT_NAMES there is.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--tokenizer", str(path), f"a readable tokenizer.json; {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("--tokenizer", str(path), f"a tokenizer.json; {reason}") from None
    names = END_OF_TEXT_NAMES
    if named := _token(_read_beside(path), "eos_token"):
        names = (named,)
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            return tokenizer, name
    raise ConfigError("--tokenizer", str(path), f"a tokenizer with an end-of-text token, one of {', '.join(names)}")


def _read_beside(path: Path) -> dict[str, Any]:
    """The object in the tokenizer_config.json beside a tokenizer.json; empty if there is none."""
    beside = path.with_name("tokenizer_config.json")
    try:
        return {**json.loads(beside.read_text(encoding="utf-8"))} if beside.is_file() else {}
    except (ValueError, TypeError):
        raise ConfigError("--tokenizer", str(beside), "a JSON object") from None


def _token(values: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token, which is a string or an object with a "content"."""
    token = values.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def read_tokenizer_settings(tokenizer_path: Path) -> dict[str, Any]:
    """What an exported checkpoint keeps of the files beside a tokenizer.json: "chat_template" and "pad_token".

    chat_template.jinja goes before the chat_template of tokenizer_config.json, as in transformers. Keys that the files
    do not give are absent.
    """
    values = _read_beside(tokenizer_path)
    found = {"chat_template": values.get("chat_template"), "pad_token": _token(values, "pad_token")}
    template = tokenizer_path.with_name("chat_template.jinja")
    if template.is_file():
        found["chat_template"] = _read_utf8(template)
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Dataset:
    """Packed tokens of both parts and what scoring them needs.

    A model is scored on every validation token but the first, the closing <end> of each document among them. With a
    document mask the first token of each document is not scored: nothing in its document precedes it.

    Attributes:
        end_of_text: id of <end>.
        train, validation: memory-mapped, <end> document <end> document ... <end>.
        facts: what data.json says: tokens, documents and hash of each part, names of the held-out documents, and
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

    def scored(self, *, document_mask: bool) -> np.ndarray:
        """bool [len(validation) - 1]: which of validation[1:] are scored."""
        if document_mask:
            return self.validation[:-1] != self.end_of_text
        return np.ones(len(self.validation) - 1, dtype=bool)

    def scored_bytes(self, *, document_mask: bool) -> int:
        """UTF-8 bytes of the held-out documents that the scored tokens spell; an <end> spells none."""
        left_out, times = np.unique(self.validation[1:][~self.scored(document_mask=document_mask)], return_counts=True)
        return self.validation_bytes - sum(
            int(count) * self._bytes_of(int(token)) for token, count in zip(left_out, times, strict=True)
        )

    def _bytes_of(self, token: int) -> int:
        """Number of bytes of text spelled by a token that begins a document; they may be part of a character."""
        text = self.tokenizer.id_to_token(token)
        if text is None or token == self.end_of_text:
            return 0
        if isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return len(text)  # it has a character for each byte
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return 1
        return len(self.tokenizer.decode([token], skip_special_tokens=False).encode())

    @property
    def token_ids(self) -> dict[str, int]:
        """Special tokens as config.json and generation_config.json name them. A text begins and ends with <end>."""
        ids = {"bos_token_id": self.end_of_text, "eos_token_id": self.end_of_text}
        pad = self.tokenizer.token_to_id(self._settings.get("pad_token") or "")
        return ids if pad is None else {**ids, "pad_token_id": pad}

    def carried_files(self) -> dict[str, bytes]:
        """Files of a checkpoint with which transformers' AutoTokenizer reads the tokenizer and generate() stops."""
        names = {key.removesuffix("_id"): self.tokenizer.id_to_token(number) for key, number in self.token_ids.items()}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
        files: dict[str, Any] = {"tokenizer_config.json": settings, "generation_config.json": self.token_ids}
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            settings["chat_template"] = template
        carried = {name: json.dumps(values, indent=2, ensure_ascii=False).encode() for name, values in files.items()}
        if isinstance(template, str):
            carried["chat_template.jinja"] = template.encode()
        return {"tokenizer.json": self.tokenizer.to_str(pretty=True).encode(), **carried}

    @property
    def _settings(self) -> dict[str, Any]:
        return self.facts.get("tokenizer", {})


def prepare(folder: Path, data: Sequence[Path], tokenizer_path: Path | None, vocab_size: int) -> Dataset:
    """Read, split, tokenize and pack into `folder`. data.json is written last: with it the folder is complete."""
    documents = read_files(data) if data else python_topics()
    training, validation = split(documents)
    settings: dict[str, Any] = {}
    if tokenizer_path is None:
        tokenizer, end_name = train_tokenizer((document.text for document in training), vocab_size), END_OF_TEXT
    else:
        tokenizer_path = find_tokenizer(tokenizer_path)
        tokenizer, end_name = load_tokenizer(tokenizer_path)
        settings = read_tokenizer_settings(tokenizer_path)
    end = tokenizer.token_to_id(end_name)
    assert end is not None  # both ways of getting a tokenizer see to it
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = 1 + max(tokenizer.get_vocab().values())  # and not how many there are: some leave ids out
    facts: dict[str, Any] = {
        "dtype": "uint16" if vocab_size <= 2**16 else "uint32",
        "end_of_text": end,
        "vocab_size": vocab_size,
        "validation_bytes": sum(len(document.text.encode()) for document in validation),
        "held_out": [document.name for document in validation],
        "tokenizer": settings,
    }
    for part, members in (("train", training), ("validation", validation)):
        tokens = np.fromiter(_pack(tokenizer, end, members), dtype=facts["dtype"])
        (folder / f"{part}.bin").write_bytes(tokens.tobytes())
        facts[part] = {
            "documents": len(members),
            "tokens": len(tokens),
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / "data.json", facts)
    return open_dataset(folder)


def write_json(file: Path, values: Any) -> None:
    """Write `values` to `file` in one step: a killed process leaves the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _pack(tokenizer: Tokenizer, end: int, documents: Sequence[Document]) -> Iterator[int]:
    tokenizer.encode_special_tokens = True  # text that spells a special token is text
    yield end
    for document in documents:
        yield from tokenizer.encode(document.text, add_special_tokens=False).ids
        yield end


def open_dataset(folder: Path) -> Dataset:
    """The dataset that `prepare` wrote to `folder`; a file that changed since is refused."""
    facts = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    parts = {}
    for part in ("train", "validation"):
        file = folder / f"{part}.bin"
        parts[part] = np.memmap(file, dtype=facts["dtype"], mode="r")
        if hashlib.sha256(parts[part].tobytes()).hexdigest() != facts[part]["sha256"]:
            raise ConfigError("--data", str(file), "the tokens that the run began with; the file has changed")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Dataset(tokenizer, facts["end_of_text"], parts["train"], parts["validation"], facts)


class Sampler:
    """Batches of windows [batch_size, length] of `tokens`, in an order that is a function of (seed, epoch).

    An epoch visits consecutive windows that overlap by one token, so that each token is predicted once, in a seeded
    permutation; each epoch cuts the tokens at other places, by a seeded shift. A batch may span two epochs. The state
    is two integers.
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
        """int64 [batch_size, length]."""
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
    """All of `tokens` in order, int64 [<= batch_size, <= length], each but the first predicted exactly once."""
    stride = length - 1
    full = (len(tokens) - 1) // stride
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride] if full else tokens[:0]
    for start in range(0, full, batch_size):
        yield torch.from_numpy(windows[start : min(start + batch_size, full)].astype(np.int64))
    if full * stride + 1 < len(tokens):
        yield torch.from_numpy(tokens[full * stride :].astype(np.int64))[None]


def document_ids(input_ids: Tensor, end_of_text: int) -> Tensor:
    """int64 [B, S]: which document of its window a token belongs to; an end-of-text token closes its document."""
    ends = (input_ids == end_of_text).long()
    return ends.cumsum(dim=1) - ends
