"""The three exceptions of the library. Each has a one-line message and its details as attributes."""

import copyreg
import difflib
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any


def one_line(value: Any, limit: int = 300) -> str:
    """Return `value` as text for a message: unprintable characters escaped, the middle of a long text left out.

    Names and values come from untrusted files and may contain line breaks, terminal escapes or a megabyte of text.
    """
    try:
        text = str(value)
    except ValueError:  # an integer with more digits than Python converts
        text = f"a number of {value.bit_length()} bits"
    if len(text) > limit:
        text = f"{text[: limit - 20]}…{text[-19:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the closest match to `name` in `known`, or None. Case is ignored, and "-" equals "_"."""
    folded = {each.lower().replace("-", "_"): each for each in known}
    word = str(name)[:200].lower().replace("-", "_")
    # difflib compares letters in order, so it rates a short word with two transposed letters too low.
    near = [each for each in folded if _is_transposed(word, each)] or difflib.get_close_matches(word, folded, n=1)
    return folded[near[0]] if near else None


def _is_transposed(word: str, other: str) -> bool:
    """Return whether the words differ by one transposition of two letters."""
    pairs = [pair for pair in zip(word, other, strict=False) if pair[0] != pair[1]]
    return len(word) == len(other) and len(pairs) == 2 and pairs[0] == pairs[1][::-1]


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return "; did you mean X?" to append to an error about an unknown name, or "" if no name is similar."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near}?"


class Place(str):
    """File, with the line or record if there is one: the value of a ConfigError about its content."""

    __slots__ = ()


class ConfigError(ValueError):
    """Invalid configuration value. Raised before anything is allocated.

    Attributes: field (name), value (found), allowed (text).
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        try:
            shown = repr(str(value) if isinstance(value, PurePath) else value)
        except ValueError:  # an integer with more digits than Python converts
            shown = value
        super().__init__(f"{field} = {one_line(shown)}: expected {allowed}")

    def __reduce__(self) -> Any:
        return ConfigError, (self.field, self.value, self.allowed)


class CheckpointError(ValueError):
    """Checkpoint that cannot be read or written as requested. Nothing has been loaded or replaced.

    Attributes: path (file or folder), problem (text), tensor (name or None), expected, found (texts or None). The
    message escapes and shortens them to one line; the attributes are unchanged.
    """

    def __init__(
        self,
        path: Any,
        problem: str,
        *,
        tensor: str | None = None,
        expected: Any = None,
        found: Any = None,
    ) -> None:
        self.path, self.problem, self.tensor, self.expected, self.found = path, problem, tensor, expected, found
        where = one_line(path, 1000)
        if tensor is not None:
            where += f": {one_line(tensor)}"
        message = f"{where}: {one_line(problem, 500)}"
        if expected is not None:
            message += f"; expected {one_line(expected)}"
        if found is not None:
            message += f"; found {one_line(found)}"
        super().__init__(message)

    def __reduce__(self) -> Any:
        # Ranks exchange exceptions by pickle, which by default recreates them from the message alone.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # pyright: ignore[reportAttributeAccessIssue]


class ParallelError(RuntimeError):
    """Mesh, layout or collective that cannot work as requested, or a rank that failed.

    Attributes: problem (the message without the location), rank (the failed rank, if known), step (of the optimizer),
    layer (name), operation (name); all but `problem` may be None.
    """

    def __init__(
        self,
        problem: str,
        *,
        rank: int | None = None,
        step: int | None = None,
        layer: str | None = None,
        operation: str | None = None,
    ) -> None:
        self.problem, self.rank, self.step, self.layer, self.operation = problem, rank, step, layer, operation
        named = [
            f"{name} {value}" for name, value in (("rank", rank), ("step", step), ("layer", layer)) if value is not None
        ]
        where = ", ".join((*named, operation) if operation else named)
        super().__init__(f"{where}: {problem}" if where else problem)
