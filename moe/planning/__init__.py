"""Planning by arithmetic: nothing here loads weights or communicates.

`footprint` is the size of a model on disk and on each GPU, `cluster` a model of a training run on many GPUs,
`published` compares that model with runs whose GPU hours are known, and `placement` assigns experts to GPUs.
"""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
