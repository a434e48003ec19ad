"""Triton kernels behind `moe.ops`, page for page; never imports moe.

A page holds the kernels and the functions that launch them. Those functions take and return what the operators of the
same name in `moe.ops` do, whose docstrings are their contract: float32, float16 and bfloat16 tensors on one device.
No function waits for the device, and no kernel is compiled anew for another number of tokens.
"""
