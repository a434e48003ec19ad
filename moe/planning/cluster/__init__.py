"""Training past this machine, by arithmetic: memory of a rank, all-to-all bytes, time of a step. No torch, no weights.

Modules, each with its formulae: `settings` (the mesh and what is assumed), `gpus` (data), `stages` (how blocks are
divided among a pipeline, and what they multiply), `traffic` (how many ranks a token reaches), `memory` and `step`.
"""
