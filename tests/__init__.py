"""Tests, and the programs among them: `python -m tests.NAME`."""

import sys
from pathlib import Path

# The kernels of this checkout, in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
