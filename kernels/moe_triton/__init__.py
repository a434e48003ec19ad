"""Triton kernels behind `moe.ops`; never imports moe."""
