"""The three errors of the library. Each carries its facts as attributes and says them in one line."""

from typing import Any


class ConfigError(ValueError):
    """A configuration value that makes no sense. Raised before anything is allocated.

    Attributes: field (name), value (found), allowed (text).
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        try:
            shown = repr(value)
        except ValueError:  # an integer with more digits than Python prints
            shown = f"a number of {value.bit_length()} bits"
        super().__init__(f"{field} = {shown if len(shown) <= 80 else shown[:77] + '...'}: expected {allowed}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked. Nothing has been loaded or replaced.

    Attributes: path (file or folder), tensor (name or None), expected, found (texts or None).
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
        self.path, self.tensor, self.expected, self.found = path, tensor, expected, found
        message = f"{path}: {problem}"
        if tensor is not None:
            message = f"{path}: {tensor}: {problem}"
        if expected is not None:
            message += f"; expected {expected}"
        if found is not None:
            message += f"; found {found}"
        super().__init__(message)


class ParallelError(RuntimeError):
    """A mesh, a layout or a collective that cannot work as asked.

    Attributes: rank (int or None), layer (name or None).
    """

    def __init__(self, problem: str, *, rank: int | None = None, layer: str | None = None) -> None:
        self.rank, self.layer = rank, layer
        where = "".join(f"{name} {value}: " for name, value in (("rank", rank), ("layer", layer)) if value is not None)
        super().__init__(where + problem)
