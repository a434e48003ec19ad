"""Triton kernels behind `moe.ops`, with the same module names; never imports moe.

A module contains the kernels and the functions that launch them. These functions have the contract of the operators of
the same name in `moe.ops`, for float32, float16 and bfloat16 tensors on one device. No function waits for the device,
and no kernel is recompiled for another number of tokens.
"""
