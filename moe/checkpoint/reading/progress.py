"""Progress bar on stderr: bytes done, bytes per second, time left."""

import sys
from typing import Any, Self


class Progress:
    """Progress bar; `shown` None shows it if stderr is a terminal. rich is imported only then."""

    def __init__(self, description: str, total: int, shown: bool | None) -> None:
        self.description, self.total = description, total
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.bar: Any = None

    def __enter__(self) -> Self:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=sys.stderr.isatty())
            self.task = self.bar.add_task(self.description, total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, nbytes: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, nbytes)
