"""Timings beside peers, from a clone: `python -m benchmarks`. Correctness comes first: a wrong result gets no ratio."""

import sys
from pathlib import Path

# The kernels of this checkout, in a clone that is not installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
