"""Tests of the experts backend of transformers and of other libraries' trainers."""
