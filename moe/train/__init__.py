"""Training on text: data, baselines, optimizers, schedule and the loop that ties them together.

Importing this package imports no torch: the command line reads `settings` before it decides to train.
"""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
