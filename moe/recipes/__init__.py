"""Reinforcement learning with accuracy rewards.

`countdown` is a task: it generates problems and scores completions. This package does not import torch.
"""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
