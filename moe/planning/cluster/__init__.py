"""Cost model of a training run on a cluster: memory per rank, all-to-all bytes and time per step, without torch.

Modules, each with its formulae: `settings` (mesh and assumptions), `gpus` (data), `stages` (division of blocks among
pipeline stages, and their multiply-adds), `traffic` (ranks that a token reaches), `memory` and `step`.
"""
