"""Timings beside peers, from a clone: `python -m benchmarks`. Correctness comes first: a wrong result gets no ratio."""
