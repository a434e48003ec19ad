"""Output and exit status of the processes that torchrun starts. Imports no torch.

torchrun ends all processes of a node as soon as one of them fails. Therefore only the first process of each node prints
an error that all of them find, and fails. The others exit with status 0, so that they cannot end the first one before
it has printed. No process waits for another.
"""

import contextlib
import os
from collections.abc import Iterator
from io import StringIO
from typing import TextIO

from moe.errors import CheckpointError, ConfigError, ParallelError

# Errors of the user or of the system, printed in one line without a traceback.
MISTAKES = (ConfigError, CheckpointError, ParallelError, OSError)


def is_first(*, on_node: bool = False) -> bool:
    """Whether this process is rank 0, which prints progress and results, or the first process of its node."""
    return os.environ.get("LOCAL_RANK" if on_node else "RANK", "0") == "0"


def shown(stream: TextIO) -> TextIO:
    """`stream` in the first process of each node, otherwise a buffer that is never read."""
    return stream if is_first(on_node=True) else StringIO()


@contextlib.contextmanager
def reported_once(*errors: type[BaseException]) -> Iterator[None]:
    """Raise `errors` of the block in the first process of each node only; the others exit with status 0.

    Only for errors that all processes of a node raise: an error of a single process would be lost.
    """
    try:
        yield
    except errors:
        if is_first(on_node=True):
            raise
        raise SystemExit(0) from None
