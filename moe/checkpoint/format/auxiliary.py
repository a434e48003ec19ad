"""Auxiliary files that are copied with a checkpoint: tokenizers, templates, licences, and code that JSON files name.

README.md is not copied, because it describes the original checkpoint. Code is never imported.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.checkpoint.format.families import FAMILIES
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import (
    CONFIG,
    CUT_RECORD,
    INDEX,
    MANIFEST,
    MAX_CONFIG_VALUES,
    MAX_FILE_NAME_BYTES,
    member,
    read_config_values,
)
from moe.checkpoint.format.quantized_formats import QUANTIZATION_FILES
from moe.checkpoint.format.strict_json import last_values, parse_as_python
from moe.errors import CheckpointError, one_line

logger = logging.getLogger("moe")

MAX_AUXILIARY_BYTES = 64 * 2**20  # of one file
MAX_CODE_BYTES = 4 * 2**20  # of one Python file; released ones are smaller than 200 KiB
MAX_LICENSE_BYTES = 2**20
MAX_AUXILIARY_FILES = 128

# Copied whether or not another file names them. The vocabularies are those of transformers' tokenizers.
AUXILIARY_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.tiktoken",
    "qwen.tiktoken",
    "tekken.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
# Patterns of all files that may be copied, for downloads.
PATTERNS = (*AUXILIARY_FILES, "LICENSE*", f"{TEMPLATES}/*.jinja", "*.py", "*.model", "*.tiktoken", "tokenizer*.json")

_NAMING = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json")
_VOCABULARIES = (".model", ".tiktoken", ".bpe", ".vocab", ".codes", ".txt", ".jinja")
_CODE = re.compile(r"[A-Za-z0-9_-]{1,200}\.py")
_DATA = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_TEMPLATE = re.compile(rf"{TEMPLATES}/[A-Za-z0-9_-][A-Za-z0-9_.-]{{0,200}}\.jinja")
_LICENSE = re.compile(r"LICENSE[A-Za-z0-9_.-]{0,100}")
_RESERVED = {CONFIG, INDEX, MANIFEST, CUT_RECORD, "adapter_config.json", *QUANTIZATION_FILES}
# The regular expressions with which transformers finds the files that a module imports.
_IMPORT = re.compile(rb"import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import")
_QUOTED = re.compile(rb"""["'](?:\./)?([A-Za-z0-9_][A-Za-z0-9_.-]{0,200})["']""")


def read_auxiliary(folder: Path) -> dict[str, bytes]:
    """Return the content of all auxiliary files in `folder`, by name.

    These are `AUXILIARY_FILES`, licences, additional chat templates, the Python files that an `auto_map` names, their
    relative imports, and vocabularies named in code or tokenizer_config.json. Raises `CheckpointError` for a link that
    leads out of the folder, a file that is too large, and too many files; licences that are either are skipped.
    """

    def read(name: str) -> bytes | None:
        if not os.path.lexists(folder / name):
            return None
        return read_bounded(member(folder, name), _limit(name))

    try:
        config = read_config_values(folder)
    except CheckpointError:  # a folder of tokenizer files, or a damaged checkpoint that a save replaces
        config = {}
    files = _collect(config, [*AUXILIARY_FILES, *_licenses(folder), *templates(folder)], read)
    if len(files) > MAX_AUXILIARY_FILES:
        expected = f"at most {MAX_AUXILIARY_FILES}"
        raise CheckpointError(folder, "too many auxiliary files", expected=expected, found=len(files))
    for name in _NAMING:
        try:
            _parse(files.get(name, b"{}"), folder / name)
        except CheckpointError as error:
            logger.warning("files that it may name are not copied: %s", error)
    return files


def templates(folder: Path) -> list[str]:
    """Return the names of the additional chat templates in `folder`."""
    path = member(folder, TEMPLATES)
    if not os.path.isdir(path):
        return []
    names = sorted(f"{TEMPLATES}/{entry.name}" for entry in os.scandir(path))
    return [name for name in names if _TEMPLATE.fullmatch(name)][: MAX_AUXILIARY_FILES + 1]


def special_token(values: Mapping[str, Any], name: str) -> str | None:
    """Return a special token of tokenizer_config.json, where it is a string or an object with "content"; or None."""
    token = values.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _licenses(folder: Path) -> list[str]:
    """Return the names of the licences in `folder`, except files too large to be one and links out of the folder."""
    names: list[str] = []
    for entry in os.scandir(folder):
        with contextlib.suppress(CheckpointError, OSError):
            if _LICENSE.fullmatch(entry.name) and member(folder, entry.name).stat().st_size <= MAX_LICENSE_BYTES:
                names += [entry.name] if entry.is_file() else []
    return sorted(names)[: MAX_AUXILIARY_FILES + 1]


def check_auxiliary(files: Mapping[str, bytes], path: Path) -> None:
    """Raise `CheckpointError` for files that `read_auxiliary` would not return; `path` is for messages."""
    for name, content in files.items():
        if not isinstance(content, bytes):
            problem = f"carried_files[{name!r}] is not bytes"
            raise CheckpointError(path, problem, expected="bytes", found=type(content).__name__)
        if not (_is_fixed(name) or _CODE.fullmatch(name) or _is_data(name)):
            expected = (
                f"one of {', '.join(AUXILIARY_FILES)}, LICENSE, {TEMPLATES}/NAME.jinja, or NAME.py that auto_map names"
            )
            raise CheckpointError(path, f"carried_files[{name!r}] is not an auxiliary file", expected=expected)
        if len(content) > _limit(name):
            problem = f"carried_files[{name!r}] is too large"
            raise CheckpointError(path, problem, expected=f"at most {_limit(name)} bytes", found=len(content))
    if len(files) > MAX_AUXILIARY_FILES:
        raise CheckpointError(
            path, "too many carried_files", expected=f"at most {MAX_AUXILIARY_FILES}", found=len(files)
        )


def resolve_references(
    config: Mapping[str, Any], files: Mapping[str, bytes], *, same_layout: bool = True
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the object for config.json and the files to write, without dangling references and unreferenced code.

    One warning lists what is left out. Unless `same_layout`, code for configurations and models is left out too,
    because it cannot read the layout of the new files. A model_type that requires such code is replaced by
    `Family.without_code`.
    """
    values = dict(config)
    named = _collect(values, filter(_is_fixed, files), files.get)
    lost = [f"{name}, because no other file names it" for name in files if name not in named]
    if not same_layout and isinstance(auto_map := values.get("auto_map"), dict):
        theirs = [key for key in auto_map if key == "AutoConfig" or key.startswith("AutoModel")]
        values["auto_map"] = {key: value for key, value in auto_map.items() if key not in theirs}
        if theirs and not values["auto_map"]:
            del values["auto_map"]
        lost += [f"auto_map.{key} of {CONFIG}, because its code reads another layout" for key in theirs]
    _remove_dangling(values, CONFIG, files, lost)
    without_code = FAMILIES[values["model_type"]].without_code
    if without_code is not None and "AutoConfig" not in values.get("auto_map", {}):
        values["model_type"] = without_code
    changed: dict[str, bytes] = {}
    for name in _NAMING:
        inner = _object(files.get(name))
        if _remove_dangling(inner, name, files, lost):
            changed[name] = (json.dumps(inner, indent=2, ensure_ascii=False) + "\n").encode()
    if lost:
        logger.warning("not written: %s", one_line("; ".join(lost), 1000))
    files = {**files, **changed}
    return values, _collect(values, filter(_is_fixed, files), files.get)


def is_template(name: str) -> bool:
    """Whether `name` is that of an additional chat template, the only auxiliary files in a subfolder."""
    return _TEMPLATE.fullmatch(name) is not None


def write_auxiliary(folder: Path, files: Mapping[str, bytes]) -> None:
    if any(map(is_template, files)):
        (folder / TEMPLATES).mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _limit(name: str) -> int:
    if name.endswith(".py"):
        return MAX_CODE_BYTES
    return MAX_LICENSE_BYTES if _LICENSE.fullmatch(name) else MAX_AUXILIARY_BYTES


def _is_fixed(name: str) -> bool:
    return name in AUXILIARY_FILES or is_template(name) or _LICENSE.fullmatch(name) is not None


def _collect(config: Mapping[str, Any], names: Iterable[str], read: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """Return the content of `names`, and of all files that they and `config` name, by name; skips missing ones."""
    files: dict[str, bytes] = {}
    pending = [*names, *filter(None, map(_file_of, _references(config.get("auto_map"))))]
    asked: set[str] = set()
    while pending and len(files) <= MAX_AUXILIARY_FILES:
        name = pending.pop()
        if name in asked:
            continue
        asked.add(name)
        content = read(name)
        if content is not None:
            files[name] = content
            pending += _named_in(name, content)
    return dict(sorted(files.items()))


def _named_in(name: str, content: bytes) -> Iterator[str]:
    if name.endswith(".py"):
        yield from filter(_CODE.fullmatch, _imports(content))
        for found in _QUOTED.finditer(content[:MAX_CODE_BYTES]):
            other = found[1].decode()
            if other.endswith(_VOCABULARIES):
                yield other
    elif name in _NAMING:
        values = _object(content)
        yield from filter(None, map(_file_of, _references(values.get("auto_map"))))
        for key, value in values.items():
            for other in value if isinstance(value, list) else [value]:
                # vocab_file, tokenizer_file, fast_tokenizer_files in transformers
                if key.endswith(("_file", "_files")) and isinstance(other, str) and _is_data(other):
                    yield other


def _is_data(name: str) -> bool:
    allowed = name.endswith((*_VOCABULARIES, ".json")) and name not in _RESERVED
    return allowed and _DATA.fullmatch(name) is not None and len(name) <= MAX_FILE_NAME_BYTES


def _imports(content: bytes) -> list[str]:
    lines = content[:MAX_CODE_BYTES].splitlines()
    found = filter(None, (_IMPORT.match(line.lstrip()) for line in lines))
    return [f"{(match[1] or match[2]).decode('utf-8', 'replace')}.py" for match in found]


def _references(auto_map: Any) -> list[Any]:
    """Return the references in an auto_map, whose values are "module.Class" or lists of these and nulls."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map] if isinstance(auto_map, list) else []
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _file_of(reference: Any) -> str | None:
    """Return the Python file of "module.Class"; None for "repository--module.Class" and for anything else."""
    if not isinstance(reference, str) or "--" in reference:
        return None
    name = reference.rpartition(".")[0] + ".py"
    return name if _CODE.fullmatch(name) else None


def _object(content: bytes | None) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no file or no object in it."""
    try:
        return _parse(content or b"{}", Path())
    except CheckpointError:
        return {}


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the object in a JSON file with Python's rules, with or without a byte order mark."""
    text = content.removeprefix(b"\xef\xbb\xbf")
    values = last_values(parse_as_python(text, path, max_values=MAX_CONFIG_VALUES))
    return values if isinstance(values, dict) else {}


def _remove_dangling(values: dict[str, Any], where: str, files: Mapping[str, bytes], lost: list[str]) -> bool:
    """Remove references to missing files from `auto_map` and add them to `lost`; return whether there were any."""
    auto_map = values.get("auto_map")
    if not isinstance(auto_map, dict | list):
        return False
    entries = auto_map if isinstance(auto_map, dict) else {"AutoTokenizer": auto_map}  # the old format
    kept: dict[str, Any] = {}
    for key, value in entries.items():
        items = [_missing(item, files) for item in (value if isinstance(value, list) else [value])]
        missing = sorted({name for item in items for name in item})
        if missing:
            lost.append(f"auto_map.{key} of {where}, because there is no {' and no '.join(missing)}")
        if not isinstance(value, list):
            kept |= {} if missing else {key: value}
        elif not missing or any(item is not None and not gone for item, gone in zip(value, items, strict=True)):
            kept[key] = [None if gone else item for item, gone in zip(value, items, strict=True)]
    left = kept if isinstance(auto_map, dict) else kept.get("AutoTokenizer")
    if left == auto_map:
        return False
    if left:
        values["auto_map"] = left
    else:
        del values["auto_map"]
    return True


def _missing(reference: Any, files: Mapping[str, bytes]) -> list[str]:
    """Return the files that a reference requires, directly or by imports, and that are not in `files`."""
    if not isinstance(reference, str) or "--" in reference:
        return []
    pending, asked, missing = [reference.rpartition(".")[0] + ".py"], set[str](), list[str]()
    while pending:
        name = pending.pop()
        if name in asked:
            continue
        asked.add(name)
        if name in files and _CODE.fullmatch(name):
            pending += _imports(files[name])
        else:
            missing.append(name)
    return missing
