"""Experts on several GPUs."""
