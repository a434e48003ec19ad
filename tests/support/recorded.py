"""A pytest plugin for runs that may end at any test: a JSON line for each test, and no test on a GPU that is lost.

    python -m pytest -p tests.support.recorded --record LINES.jsonl [--part i/n] [--without FILE] FILE...

The lines are {"tests": number}, then for each test {"begin": id} and {"test": id, "outcome", "reason", "detail"}, and
{"warning": text, "where": id} for each different warning. After an error that no later CUDA call survives, {"lost":
reason} is the last line, and the process exits with status 70.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

LOST = 70  # exit status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, help="File for the JSON lines")
    parser.addoption("--part", default="0/1", help="i/n: every n-th test, starting at index i")
    parser.addoption("--without", type=Path, help="File with ids of tests to leave out, one per line")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(Path(str(config.getoption("--record")))))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, str(config.getoption("--part")).split("/"))
    without: Path | None = config.getoption("--without")
    left_out = set(without.read_text().splitlines()) if without is not None else set()
    items[:] = [item for item in items[part::parts] if item.nodeid not in left_out]


class Recorder:
    """Writes the lines, each at once, so that they are there whatever happens next."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.reports: list[pytest.TestReport] = []
        self.warned: set[str] = set()

    def write(self, **record: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(tests=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports.clear()
        self.write(begin=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = next((report for report in self.reports if report.failed), None)
        skipped = next((report for report in self.reports if report.skipped), None)
        if failed is not None:
            self.write(test=nodeid, outcome="failed", reason=_reason(failed), detail=failed.longreprtext[-4000:])
            self._look_at_the_gpu()
        elif skipped is not None:
            reason = skipped.longrepr[-1] if isinstance(skipped.longrepr, tuple) else skipped.longreprtext
            self.write(test=nodeid, outcome="skipped", reason=reason)
        else:
            self.write(test=nodeid, outcome="passed")

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        if text not in self.warned:
            self.warned.add(text)
            self.write(warning=text[:1000], where=nodeid)

    def _look_at_the_gpu(self) -> None:
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            self.write(lost=str(error).partition("\n")[0])
            os._exit(LOST)


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = " ".join((crash.message if crash is not None else report.longreprtext).split())
    return text if len(text) <= 240 else text[:237] + "..."
