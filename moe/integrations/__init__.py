"""Integrations with other libraries, one module each, imported on first use."""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
