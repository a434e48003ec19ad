"""Training on text: data, baselines, optimizers, learning-rate schedule and training loop.

This package does not import torch, so that the command line can check its options first.
"""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
