"""Tests of tasks for reinforcement learning."""
