"""Models of other libraries on moesmith's operators: a module for each library, imported only by whoever asks."""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
