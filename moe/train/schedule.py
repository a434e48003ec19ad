"""The learning rate as a function of the step: nothing to save, nothing to resume."""

import math
from typing import Literal

ScheduleName = Literal["cosine", "wsd"]

FINAL_FRACTION = 0.1  # of the peak, where cosine ends
DECAY_FRACTION = 0.3  # of all steps, in which warm-up-stable-decay goes to zero


def learning_rate_factor(step: int, *, steps: int, warmup: int, schedule: ScheduleName) -> float:
    """What the peak learning rate is multiplied by at `step`, the first being 1 and the last `steps`.

    Linear warm-up over `warmup` steps. Then "cosine" falls to FINAL_FRACTION at the last step; "wsd"
    (warm-up-stable-decay) stays at the peak and falls linearly over the last DECAY_FRACTION of all steps, to reach zero
    one step past the last.
    """
    if step <= warmup:
        return step / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(steps - warmup, 1)
        return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = max(round(steps * DECAY_FRACTION), 1)
    return min(1.0, (steps - step + 1) / (decay + 1))
