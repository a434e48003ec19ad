"""Tests of the MoE layer and its balance."""
