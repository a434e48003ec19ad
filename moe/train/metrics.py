"""Measurements of a run, one JSON object per line: {"kind": "train" | "validation", "step": n, ...}."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe.checkpoint.writing.atomic import sync


class Metrics:
    """Append-only JSON Lines file, with its records in memory.

    Args:
        file: created if missing; os.devnull on ranks that do not write.
        until: step from which a run resumes. Records of later steps and an incomplete last line are dropped.
        log: receives every new record, see `moe.train.logs`.
    """

    def __init__(self, file: Path, until: int, log: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.file, self._log = file, log
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        self.records: list[dict[str, Any]] = [record for record in whole if record["step"] <= until]
        file.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, kind: str, step: int, **values: Any) -> None:
        record = {"kind": kind, "step": step, **values}
        self.records.append(record)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._log is not None:
            self._log(record)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of the training steps, which have equally many tokens."""
        seconds = [1 / record["tokens_per_second"] for record in self.of("train")]
        return 1 / (sum(seconds) / len(seconds))

    def sync(self) -> None:
        sync(self.file)
