"""Tests of checkpoints: reading, writing and the file format."""
