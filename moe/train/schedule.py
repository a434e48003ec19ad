"""Learning rate as a function of the step, without state."""

import math
from typing import Literal

ScheduleName = Literal["cosine", "wsd"]

FINAL_FRACTION = 0.1  # final learning rate of "cosine", as a fraction of the peak
DECAY_FRACTION = 0.3  # decay phase of "wsd", as a fraction of all steps


def learning_rate_factor(step: int, *, steps: int, warmup: int, schedule: ScheduleName) -> float:
    """Return the factor of the peak learning rate at `step`, from 1 to `steps`.

    Linear warm-up over `warmup` steps. Then "cosine" falls to FINAL_FRACTION at the last step; "wsd"
    (warm-up-stable-decay) stays at the peak and falls linearly over the last DECAY_FRACTION of all steps, reaching zero
    one step after the last.
    """
    if step <= warmup:
        return step / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(steps - warmup, 1)
        return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = max(round(steps * DECAY_FRACTION), 1)
    return min(1.0, (steps - step + 1) / (decay + 1))
