"""Strict JSON for untrusted files: small files are parsed whole, large ones scanned in bounded memory.

`json.loads` with hooks holds the whole text and builds every value. Measured: 135 MiB for a valid index of
`folder.MAX_INDEX_TENSORS` tensors, 114 MiB for a header of 16 MiB with 139,583 tensors, 391 MiB for one of "[],". The
scanner uses 36, 57 and 1 MiB.
"""

import codecs
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe.checkpoint.format.files import read_exactly, recognise
from moe.errors import CheckpointError, one_line

MAX_DEPTH = 64  # of nested arrays and objects; Python's parsers have limits that differ
WINDOW = 2**18
MAX_TOKEN = 2**16  # bytes that are matched or decoded at once
MAX_SKIPPED = 2**20  # bytes of an unused value; tens of bytes in released files

WS = rb"[ \t\n\r]*+"
# Surrogates must be paired: Python accepts a lone one, other parsers do not.
_ESCAPE = (
    rb'\\(?:["\\/bfnrt]|u(?:(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    rb"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
CHARACTERS = rb'(?:[^"\\\x00-\x1f]++|' + _ESCAPE + rb")*+"

KEY = WS + rb'"(' + CHARACTERS + rb')"' + WS + rb":" + WS
NEXT = WS + rb"([,}])"
_KEY = re.compile(KEY)
_OPEN = re.compile(WS + rb"\{")
_CLOSE = re.compile(WS + rb"\}")
_NEXT = re.compile(NEXT)
_SPACE = re.compile(rb"[ \t\n\r]++")
_QUOTE = re.compile(rb'"')
_PIECE = re.compile(rb'(?:[^"\\\x00-\x1f]{1,4096}+|' + _ESCAPE + rb"){1,64}+")
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|([\[{])|[\]}]', re.DOTALL)


def parse_json(data: bytes, path: Path) -> Any:
    """Parse the JSON text `data`, the content of `path`.

    Raises `CheckpointError` for invalid JSON, also where Python's parser accepts it (duplicate keys, NaN, Infinity,
    numbers too large for a float), for invalid UTF-8, and for deep nesting.
    """
    return _decode(_STRICT_DECODER, data, path)


def _decode(decoder: json.JSONDecoder, data: bytes, path: Path) -> Any:
    try:
        _check_depth(data)
        return decoder.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        found = recognise(data[:512]) or ("an empty file" if not data else str(error))
        raise CheckpointError(path, "not valid JSON", expected="JSON in UTF-8", found=found) from error


@dataclass(frozen=True)
class Duplicate:
    """Value of a duplicate key with different values; Python's parser returns the last one."""

    first: Any
    last: Any

    def __repr__(self) -> str:
        return f"{self.first!r} and later {self.last!r}"


def parse_as_python(data: bytes, path: Path, *, max_values: int) -> Any:
    """Parse `data` with Python's rules, which also allow NaN, Infinity and duplicate keys.

    A key with several values has a `Duplicate`. Raises `CheckpointError` for what Python refuses, for deep nesting, and
    for more than `max_values` commas and brackets, which bounds the memory of the result.
    """
    found = sum(map(data.count, (b",", b"[", b"{")))
    if found > max_values:
        expected = f"at most {max_values} commas and brackets"
        raise CheckpointError(path, "too many values", expected=expected, found=found)
    return _decode(_PYTHON_DECODER, data, path)


def ambiguity(value: Any) -> str | None:
    """Describe the first ambiguity in a value from `parse_as_python`: NaN, Infinity or a duplicate key; or None."""
    if isinstance(value, Duplicate):
        return f"two values: {value}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(ambiguity, inner)), None)


def last_values(value: Any) -> Any:
    """Replace each `Duplicate` in `value` by its last value."""
    if isinstance(value, Duplicate):
        return last_values(value.last)
    if isinstance(value, dict):
        return {key: last_values(inner) for key, inner in value.items()}
    return [last_values(inner) for inner in value] if isinstance(value, list) else value


class Scanner:
    """Incremental parser of a JSON text of `length` bytes in a file.

    Only requested values become Python objects, and only a window of the text is in memory. The syntax is that of
    `parse_json`. A token, with the white space before it, has at most `MAX_TOKEN` bytes; skipped strings are unlimited.
    """

    def __init__(self, file: BinaryIO, length: int, path: Path) -> None:
        self.path = path
        self._file, self._left = file, length
        self._window, self._at, self._before = b"", 0, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._more()

    def take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        """Match `pattern` at the current position and move past it; None if it does not match."""
        if self._left and len(self._window) - self._at < MAX_TOKEN:
            self._more()
        found = pattern.match(self._window, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def object(self) -> bool:
        """Enter an object; return False and skip it if it is empty."""
        if not self.take(_OPEN):
            raise self.error("an object")
        return not self.take(_CLOSE)

    def key(self) -> str:
        """Read a key and its colon."""
        found = self.take(_KEY)
        if found is None:
            raise self.error(f"a key of at most {MAX_TOKEN} bytes and a value")
        return decode_string(found[1])

    def more(self) -> bool:
        """Skip a comma, or the end of the object; return whether another key follows."""
        found = self.take(_NEXT)
        if found is None:
            raise self.error("',' or '}'")
        return found[1] == b","

    def skip_string(self) -> bool:
        """Skip a string of any length; return False if there is none."""
        if not self.take(_QUOTE):
            return False
        while not self.take(_QUOTE):
            if not self.take(_PIECE):
                raise self.error("a string")
        return True

    def value(self, *, limit: int = MAX_TOKEN, as_python: bool = False) -> Any:
        """Read a value of at most `limit` bytes, as `parse_json` or `parse_as_python` does."""
        decoder = _PYTHON_DECODER if as_python else _STRICT_DECODER
        problem: Exception | None = None
        for size in (2**8, 2**10, 2**12, 2**14, MAX_TOKEN, limit):  # small values are fast
            while self._left and len(self._window) - self._at < size:
                self._more()
            data = self._window[self._at : self._at + size]
            text = data.decode("utf-8", "ignore")  # the end may split a character
            try:
                _check_depth(data)
                value, end = decoder.raw_decode(text)
            except (ValueError, RecursionError) as error:
                problem = error
                continue
            if end < len(text) or size == limit:  # otherwise the end may split a number
                self._at += len(text[:end].encode("utf-8"))
                return value
        message = f"not valid JSON, or a value of more than {limit} bytes: {problem}"
        raise CheckpointError(self.path, message, expected="a value", found=self.rest()) from problem

    def end(self) -> None:
        """Raise unless only white space follows."""
        while self.take(_SPACE):
            pass
        if self._left or self._at < len(self._window):
            raise self.error("nothing more")

    def rest(self) -> str:
        """Return the next characters, for a message."""
        part = self._window[self._at : self._at + 60]
        return one_line(part.decode("utf-8", "backslashreplace")) if part else "the end"

    def error(self, expected: str) -> CheckpointError:
        problem = f"not valid JSON at byte {self._before + self._at}"
        return CheckpointError(self.path, problem, expected=expected, found=self.rest())

    def _more(self) -> None:
        count = min(WINDOW, self._left)
        part = read_exactly(self._file, count, self.path)
        self._left -= count
        try:
            self._utf8.decode(part, final=not self._left)
        except UnicodeDecodeError as error:
            raise CheckpointError(self.path, "not valid JSON", expected="UTF-8", found=str(error)) from error
        self._before += self._at
        self._window, self._at = self._window[self._at :] + part, 0


def decode_string(characters: bytes) -> str:
    """Decode a match of `CHARACTERS`, which must be valid UTF-8."""
    return json.loads(b'"%b"' % characters) if b"\\" in characters else characters.decode("utf-8")


def _check_depth(data: bytes) -> None:
    """Raise ValueError if the value at the beginning of `data` is nested too deeply."""
    depth = 0
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    for found in _BRACKETS.finditer(data):
        if found[1]:
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} nested arrays and objects")
        elif found[0][0] in b"]}":
            depth -= 1
            if depth <= 0:
                return


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"the literal {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]}, too large for a float")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # -0 is not an integer in other languages


def _keep_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value and not isinstance(values[key], Duplicate):
                values[key] = Duplicate(value, values[key])
    return values


_PYTHON_DECODER = json.JSONDecoder(object_pairs_hook=_keep_duplicates)
_STRICT_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
)
