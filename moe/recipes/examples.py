"""Examples for fine-tuning: reading, tokenization, and the files in which a run keeps them.

An example is a line of JSON, in one of the forms that TRL reads:

    {"prompt": "text", "completion": "text"}
    {"prompt": [messages], "completion": [messages]}
    {"messages": [messages]}                            a message is {"role": "user", "content": "text"}

Only completions are trained on: the text of "completion" and the end-of-text token after it, or the messages of the
assistant, as the chat template renders them, with what it writes after them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from moe.checkpoint.chat import ChatTemplate
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.train.data import write_json
from moe.train.documents import HELD_OUT_FRACTION, Record, kind_of, read_records
from moe.train.tokenizer import find_tokenizer, load_tokenizer, read_tokenizer_settings, vocabulary_size

FORMS = '"prompt" and "completion", or "messages"'
_Messages = list[dict[str, Any]]


class ExampleError(ValueError):
    """Example that cannot be encoded. Attributes: expected, found (texts)."""

    def __init__(self, expected: str, found: str) -> None:
        self.expected, self.found = expected, found
        super().__init__(f"expected {expected}; found {found}")


@dataclass(frozen=True)
class Example:
    """Token ids of an example, and for each whether it is trained on, that is predicted from those before it."""

    ids: list[int]
    trained: list[bool]


class Encoder:
    """Tokenizer of examples.

    Tokens are those of transformers and TRL. Added tokens are recognised wherever the text contains them, special ones
    such as the end-of-text token included, as `moesmith generate` recognises them in a prompt. Pre-training instead
    encodes special tokens in documents as plain text. A completion that ends with the end-of-text token gets no second
    one.

    The completion begins at a token boundary. Usually the tokens of the prompt are also the first tokens of prompt and
    completion together, which are then used. If instead a token would contain both the end of the prompt and the
    beginning of the completion, prompt and completion are encoded separately, so that the prompt has the tokens that a
    model sees when it is prompted. TRL trains on the token that contains both.

    Args:
        tokenizer: its state is not changed.
        end_of_text: name of the token after a completion.
        folder: folder of the chat template, which is read with the first messages.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_text: str, folder: Path) -> None:
        end = tokenizer.token_to_id(end_of_text)
        assert end is not None  # `load_tokenizer` has checked that
        self.tokenizer, self.end, self.folder = tokenizer, end, folder

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.read(self.folder)

    def encode(self, record: Any) -> Example:
        """Encode an example. Raises `ExampleError`, or CheckpointError if the chat template fails."""
        if not isinstance(record, dict):
            raise ExampleError(f"an object with {FORMS}", kind_of(record))
        forms = [names for names in (("prompt", "completion"), ("messages",)) if set(names) <= record.keys()]
        if len(forms) != 1:
            raise ExampleError(FORMS, ", ".join(map(str, record)) or "no field")
        parts = [record[name] for name in forms[0]]
        if len(parts) == 2 and isinstance(parts[0], str):
            prompt, completion = (_text(part, name) for part, name in zip(parts, forms[0], strict=True))
            example = self.encode_completion(prompt, completion)
        else:
            messages = [_messages(part, name) for part, name in zip(parts, forms[0], strict=True)]
            first = len(messages[0]) if len(messages) == 2 else 0
            example = self.encode_messages([each for part in messages for each in part], first)
        if not any(example.trained[1:]):
            raise ExampleError("a token to predict", "an empty prompt and completion")
        return example

    def encode_completion(self, prompt: str, completion: str) -> Example:
        """Encode a prompt, and a completion that is trained on with the end-of-text token after it."""
        before, after = self._encode_parts([prompt, completion], add_special_tokens=True)
        if after[-1:] != [self.end]:
            after = [*after, self.end]
        return Example(before + after, [False] * len(before) + [True] * len(after))

    def encode_messages(self, messages: _Messages, first: int = 0) -> Example:
        """Encode a conversation, of which the assistant's messages from number `first` on are trained on.

        Raises `ExampleError` if the chat template renders a message differently when others follow, because the
        assistant's part of the text is then unknown.
        """
        whole = self.template.render(messages, add_generation_prompt=False)
        cuts, trained = [0], [False]
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < first:
                continue
            begins = self.template.render(messages[:number], add_generation_prompt=True)
            ends = self.template.render(messages[: number + 1], add_generation_prompt=False)
            if not (ends.startswith(begins) and whole.startswith(ends)):
                expected = "a chat template that renders a conversation as the beginning of each longer one"
                raise ExampleError(expected, f"another text before or in message {number + 1}")
            cuts += [len(begins), len(ends)]
            trained += [True, False]
        if len(cuts) == 1:
            raise ExampleError('a message with the role "assistant" to train on', f"{len(messages)} others")
        texts = [whole[a:b] for a, b in pairwise([*cuts, len(whole)])]
        parts = self._encode_parts(texts, add_special_tokens=False)
        flags = [flag for part, flag in zip(parts, trained, strict=True) for _ in part]
        return Example([token for part in parts for token in part], flags)

    def _encode_parts(self, parts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each part of a text; see the class for tokens that span two parts."""
        text, whole, ends = "", self._ids("".join(parts), add_special_tokens), [0]
        for part in parts:
            text += part
            ids = self._ids(text, add_special_tokens)
            if whole[: len(ids)] != ids:
                return [self._ids(each, add_special_tokens and not i) for i, each in enumerate(parts)]
            ends.append(len(ids))
        return [whole[a:b] for a, b in pairwise(ends)]

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ExampleError(f'a text in "{name}"', kind_of(value))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ExampleError(f'Unicode text in "{name}"', "half of a surrogate pair") from None
    return value


def _messages(value: Any, name: str) -> _Messages:
    if not isinstance(value, list) or not value:
        raise ExampleError(f'messages in "{name}"', kind_of(value))
    for each in value:
        if not isinstance(each, dict) or not {"role", "content"} <= each.keys():
            raise ExampleError(f'objects with "role" and "content" in "{name}"', kind_of(each))
        _text(each["role"], "role")
        _text(each["content"], "content")
    return value


@dataclass(frozen=True)
class Examples:
    """Examples of one split.

    Attributes:
        tokens: int32 [T], the token ids of all examples, one after the other.
        trained: bool [T], tokens that are predicted; never the first of an example.
        starts: int64 [N + 1], where each example starts; the last value is T.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        lengths = [len(example.ids) for example in examples]
        starts = np.cumsum([0, *lengths], dtype=np.int64)
        trained = np.array([flag for example in examples for flag in example.trained], dtype=bool)
        trained[starts[:-1]] = False
        return cls(np.array([token for each in examples for token in each.ids], dtype=np.int32), trained, starts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return np.diff(self.starts).tolist()

    def save(self, file: Path) -> dict[str, Any]:
        """Write the examples; return their sizes and the hash of the file."""
        save_file({"tokens": self.tokens, "trained": self.trained, "starts": self.starts}, file)
        sizes = {"examples": len(self.starts) - 1, "tokens": len(self.tokens), "trained": int(self.trained.sum())}
        return {**sizes, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


@dataclass(frozen=True)
class ExampleData:
    """Examples of the training and validation splits, with their tokenizer.

    Attributes:
        end_of_text: id of the token after a completion.
        facts: content of examples.json: sizes and hash of each split, examples that were left out because they are
            longer than a row, and `read_tokenizer_settings`.
    """

    tokenizer: Tokenizer
    end_of_text: int
    train: Examples
    validation: Examples
    facts: dict[str, Any]

    def check_vocabulary(self, config: ModelConfig) -> None:
        """Raise ConfigError if the model has fewer tokens than the tokenizer."""
        if self.facts["vocab_size"] > config.vocab_size:
            allowed = f"at least {self.facts['vocab_size']}, the vocabulary size of the tokenizer"
            raise ConfigError("vocab_size", config.vocab_size, allowed)


def prepare_examples(
    folder: Path, data: Sequence[Path], tokenizer: Path, length: int, *, validation_data: Sequence[Path] | None = None
) -> ExampleData:
    """Read, encode and split examples, and write them to `folder`; examples.json is written last.

    Without `validation_data`, a hash of the prompt decides which examples are held out, so that examples with the same
    prompt are in the same split.

    Args:
        data, validation_data: files and folders, see `read_records`.
        tokenizer: see `find_tokenizer`.
        length: most tokens of an example; longer ones are left out.

    Raises ConfigError for a wrong line, with its file and number, and if no examples are left in a split.
    """
    file = find_tokenizer(tokenizer)
    encoder = Encoder(*load_tokenizer(file), file.parent)
    encoder.tokenizer.no_truncation()
    encoder.tokenizer.no_padding()
    training, longest = _read(encoder, data, length, "--data")
    if validation_data is None:
        training, held_out = _hold_out(training)
    else:
        held_out, others = _read(encoder, validation_data, length, "--validation-data")
        longest += others
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "end_of_text": encoder.end,
        "vocab_size": vocabulary_size(encoder.tokenizer),
        "left_out": {"count": len(longest), "longest": max(longest, default=0)},
        "tokenizer": read_tokenizer_settings(file),
    }
    for part, members in (("train", training), ("validation", held_out)):
        facts[part] = Examples.of(members).save(folder / f"{part}.safetensors")
    (folder / "tokenizer.json").write_text(encoder.tokenizer.to_str(), encoding="utf-8")
    write_json(folder / "examples.json", facts)
    return open_examples(folder)


def open_examples(folder: Path) -> ExampleData:
    """Open what `prepare_examples` wrote to `folder`. Raises ConfigError if a file has changed."""
    facts = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    parts = {}
    for part in ("train", "validation"):
        file = folder / f"{part}.safetensors"
        if hashlib.sha256(file.read_bytes()).hexdigest() != facts[part]["sha256"]:
            raise ConfigError("--data", str(file), "the examples with which the run started; found a changed file")
        parts[part] = Examples(**load_file(file))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return ExampleData(tokenizer, facts["end_of_text"], facts=facts, **parts)


def _read(encoder: Encoder, paths: Sequence[Path], length: int, option: str) -> tuple[list[Example], list[int]]:
    """Return the examples of files, and the lengths of those that are too long."""
    found: list[Example] = []
    longer: list[int] = []
    for record in read_records(paths, option=option):
        example = _encode(encoder, record)
        if len(example.ids) <= length:
            found.append(example)
        else:
            longer.append(len(example.ids))
    if not found:
        allowed = f"examples of at most {length} tokens; the shortest has {min(longer)} (--seq-length)"
        raise ConfigError(option, ", ".join(map(str, paths)), allowed)
    return found, longer


def _encode(encoder: Encoder, record: Record) -> Example:
    try:
        return encoder.encode(record.value)
    except ExampleError as error:
        raise record.error(error.expected, error.found) from None
    except CheckpointError as error:
        raise record.error("messages that the chat template accepts", error.problem) from None


def _hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Divide the examples by their prompts into training and validation, both not empty."""
    ranks = [_rank(example) for example in examples]
    least, most = min(ranks), max(ranks)
    if least == most:
        allowed = "examples with two prompts or more, one of them held out, or --validation-data"
        raise ConfigError("--data", None, f"{allowed}; found one prompt")
    limit = min(max(HELD_OUT_FRACTION, least), np.nextafter(most, 0))
    parts: tuple[list[Example], list[Example]] = [], []
    for example, rank in zip(examples, ranks, strict=True):
        parts[rank <= limit].append(example)
    return parts


def _rank(example: Example) -> float:
    """Return a number from 0 to 1 that depends on the prompt, or without a prompt on the whole example."""
    prompt = example.ids[: example.trained.index(True)] or example.ids
    digest = hashlib.sha256(np.array(prompt, dtype=np.int32).tobytes()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
