"""Fine-tuning, reinforcement learning and distillation.

`sft` trains on the completions of packed `examples`, `distill` also on a teacher. `countdown` is a task: it generates
problems and scores completions; `task` loads others. `rollout` samples completions and `grpo` trains on them. The
package itself, the tasks and the settings do not import torch.
"""

from moe.lazy import attributes

__getattr__ = attributes(globals(), {})
