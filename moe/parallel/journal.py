"""What a rank has done: the collectives of its last steps, by name, so that an error can say where it happened."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from moe.errors import ParallelError

KEPT = 256


@dataclass(frozen=True)
class Entry:
    """One collective: its place in this rank's order, the optimizer step, the layer and the operation."""

    number: int
    step: int
    layer: str
    operation: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.layer}, {self.operation}"


@dataclass
class Journal:
    """The collectives of a rank, in order; the last `KEPT` of them by name.

    Every rank of a step does the same ones, whatever its data: equal counts are a check, and the first entries that
    differ say which rank left the others.
    """

    rank: int
    step: int = 0
    count: int = 0
    entries: deque[Entry] = field(default_factory=lambda: deque(maxlen=KEPT))

    def note(self, layer: str, operation: str) -> None:
        self.count += 1
        self.entries.append(Entry(self.count, self.step, layer, operation))

    @contextlib.contextmanager
    def collective(self, layer: str, operation: str) -> Iterator[None]:
        """Notes the collective that the block does; what torch raises in it becomes a `ParallelError` that names it."""
        self.note(layer, operation)
        with self.during(layer, operation):
            yield

    @contextlib.contextmanager
    def during(self, layer: str, operation: str) -> Iterator[None]:
        """As `collective`, for the wait that ends one noted before."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ParallelError):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ParallelError(f"step {self.step}, {operation}: {reason}", rank=self.rank, layer=layer) from error
