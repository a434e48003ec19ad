"""Planning by arithmetic, without weights or communication.

`footprint` computes the size of a model on disk and per GPU, `cluster` models a training run on many GPUs, `published`
compares that model with runs whose GPU hours are known, and `placement` assigns experts to GPUs.
"""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
