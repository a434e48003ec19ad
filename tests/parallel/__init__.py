"""Tests of expert parallelism and sharding. `python -m tests.parallel` compares several processes with one."""
