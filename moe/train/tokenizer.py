"""Tokenizers: training, loading, and settings to keep in an exported checkpoint."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.checkpoint.format.auxiliary import special_token
from moe.checkpoint.reading.hub import find, is_hub_name
from moe.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"
# End-of-text tokens of released tokenizers, for a tokenizer.json without a tokenizer_config.json.
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's)
    "<|end_of_text|>",
    "<eos>",
    "</s>",
    "<|im_end|>",
    "[SEP]",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens, END_OF_TEXT included; deterministic."""
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
    if path.suffix == ".json" or not (path.is_dir() or is_hub_name(path)):
        return path
    try:
        folder = find(path, files=("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    except CheckpointError as error:
        raise ConfigError("--tokenizer", str(path), f"a readable tokenizer.json; {error.problem}") from None
    return folder / "tokenizer.json"


def load_tokenizer(path: Path) -> tuple[Tokenizer, str]:
    """Return (tokenizer, end-of-text token) of a tokenizer.json.

    The token is the `eos_token` of the tokenizer_config.json in the same folder, otherwise the first of
    END_OF_TEXT_NAMES that exists.
    """
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--tokenizer", str(path), f"a readable tokenizer.json; {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("--tokenizer", str(path), f"a tokenizer.json; {reason}") from None
    names = END_OF_TEXT_NAMES
    if named := special_token(_read_beside(path), "eos_token"):
        names = (named,)
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            return tokenizer, name
    raise ConfigError("--tokenizer", str(path), f"a tokenizer with an end-of-text token, one of {', '.join(names)}")


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the largest id plus one, which exceeds the number of tokens if ids have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def check_vocabulary(path: Path, vocab_size: int, option: str) -> None:
    """Raise ConfigError if the tokenizer given by `path` has an id that is not below `vocab_size`."""
    found = vocabulary_size(load_tokenizer(find_tokenizer(path))[0])
    if found > vocab_size:
        raise ConfigError(option, str(path), f"a tokenizer of at most {vocab_size} tokens; found {found}")


def _read_beside(path: Path) -> dict[str, Any]:
    """Read the tokenizer_config.json in the folder of a tokenizer.json; empty if there is none."""
    beside = path.with_name("tokenizer_config.json")
    try:
        return {**json.loads(beside.read_text(encoding="utf-8"))} if beside.is_file() else {}
    except (ValueError, TypeError):
        raise ConfigError("--tokenizer", str(beside), "a JSON object") from None


def read_tokenizer_settings(tokenizer_path: Path) -> dict[str, Any]:
    """Read "chat_template" and "pad_token", for an exported checkpoint, from the folder of a tokenizer.json.

    As in transformers, chat_template.jinja takes precedence over tokenizer_config.json. Missing keys are omitted.
    """
    values = _read_beside(tokenizer_path)
    found = {"chat_template": values.get("chat_template"), "pad_token": special_token(values, "pad_token")}
    template = tokenizer_path.with_name("chat_template.jinja")
    if template.is_file():
        try:
            found["chat_template"] = template.read_bytes().decode("utf-8").removeprefix("\ufeff")
        except (OSError, UnicodeError) as error:
            raise ConfigError("--tokenizer", str(template), f"UTF-8 text; {error}") from None
    return {name: value for name, value in found.items() if value is not None}


def token_ids(tokenizer: Tokenizer, end_of_text: int, settings: Mapping[str, Any]) -> dict[str, int]:
    """Special token ids with the names of config.json. A text begins and ends with `end_of_text`.

    `settings` are what `read_tokenizer_settings` returned.
    """
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    pad = tokenizer.token_to_id(settings.get("pad_token") or "")
    return ids if pad is None else {**ids, "pad_token_id": pad}


def tokenizer_files(tokenizer: Tokenizer, end_of_text: int, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Checkpoint files that transformers needs to load the tokenizer and to stop generation; see `token_ids`."""
    ids = token_ids(tokenizer, end_of_text, settings)
    names = {key.removesuffix("_id"): tokenizer.id_to_token(number) for key, number in ids.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
    }
    files: dict[str, Any] = {"tokenizer_config.json": config, "generation_config.json": ids}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        config["chat_template"] = template
    carried = {name: json.dumps(values, indent=2, ensure_ascii=False).encode() for name, values in files.items()}
    if isinstance(template, str):
        carried["chat_template.jinja"] = template.encode()
    return {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), **carried}
