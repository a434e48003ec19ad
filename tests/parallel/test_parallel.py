"""Several processes over gloo against one, see `tests.parallel.cases`; all of it: `python -m tests.parallel --long`."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.cases import SIZES, cases

ROOT = Path(__file__).parents[2]


@cache
def results(file: Path) -> dict[str, Any]:
    # A process of its own: threads that a process has started do not survive its forks.
    command = [sys.executable, "-m", "tests.parallel", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize(("size", "name"), [(size, case.name) for size in SIZES for case in cases(size, long=False)])
def test_ranks_against_one_process(size: int, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    result = results(tmp_path_factory.getbasetemp() / "parallel.json")[str(size)][name]
    assert result["failed"] is None, result["failed"]
