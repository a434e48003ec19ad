"""Comparisons with peers, run from a clone: `python -m benchmarks`. Only correct results are timed."""

import sys
from pathlib import Path

# The kernels of this checkout, in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
