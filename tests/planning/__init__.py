"""Tests of memory, time and placement planning."""
