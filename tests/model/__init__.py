"""Tests of the model, its configuration and generation."""
