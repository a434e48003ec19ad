"""The three errors of the library. Each carries its facts as attributes and says them in one line."""

import copyreg
import difflib
from collections.abc import Iterable
from typing import Any


def one_line(value: Any, limit: int = 300) -> str:
    """`value` as text for a message: what does not print is escaped, and of what is too long the middle left out.

    Names and values come from strangers' files, and may hold line breaks, terminal commands or a megabyte.
    """
    try:
        text = str(value)
    except ValueError:  # an integer with more digits than Python prints
        text = f"a number of {value.bit_length()} bits"
    if len(text) > limit:
        text = f"{text[: limit - 20]}…{text[-19:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: Any, known: Iterable[str]) -> str | None:
    """Return the closest match to `name` in `known`, or None; ignores case, "-" and "_"."""
    folded = {each.lower().replace("-", "_"): each for each in known}
    word = str(name)[:200].lower().replace("-", "_")
    # difflib counts letters in order, so of a short word with two letters exchanged it finds little.
    near = [each for each in folded if _are_exchanged(word, each)] or difflib.get_close_matches(word, folded, n=1)
    return folded[near[0]] if near else None


def _are_exchanged(word: str, other: str) -> bool:
    """Whether the words differ in two letters that have changed places."""
    pairs = [pair for pair in zip(word, other, strict=False) if pair[0] != pair[1]]
    return len(word) == len(other) and len(pairs) == 2 and pairs[0] == pairs[1][::-1]


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the end of a message about an unknown name, or "" if none is near."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near}?"


class ConfigError(ValueError):
    """A configuration value that makes no sense. Raised before anything is allocated.

    Attributes: field (name), value (found), allowed (text).
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        try:
            shown = repr(value)
        except ValueError:  # an integer with more digits than Python prints
            shown = value
        # Wide enough for a path, whose end says most.
        super().__init__(f"{field} = {one_line(shown)}: expected {allowed}")

    def __reduce__(self) -> Any:
        return ConfigError, (self.field, self.value, self.allowed)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked. Nothing has been loaded or replaced.

    Attributes: path (file or folder), problem (text), tensor (name or None), expected, found (texts or None). They are
    as they were found; the message has them escaped and shortened to one line.
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
        # Ranks send each other what they raise; exceptions are made anew from their message alone.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # pyright: ignore[reportAttributeAccessIssue]


class ParallelError(RuntimeError):
    """A mesh, a layout or a collective that cannot work as asked, or a rank that has left the others.

    Attributes: problem (the message without the others), rank (int or None; whose fault it is, where that is known),
    step (of the optimizer), layer (name), operation (name): each may be None.
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
