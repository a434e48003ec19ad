"""The number of operators that one decoded token takes. A small model's time is that of calling them."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe
from moe.cache import Cache
from tests.support.models import GROUPED, SMALL


class Count(TorchDispatchMode):
    """Counts operators. In inference mode, these are the ones that are called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operators(config: moe.ModelConfig, dtype: torch.dtype) -> int:
    model = moe.Transformer(config).eval().to(dtype)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.inference_mode():
        cache = Cache(config)
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache)  # prepares weights for the next ones
        count = Count()
        with count:
            model(ids[:, :1], cache=cache, logits_to_keep=1)
    return count.number


# Operators of one layer with experts, and of the rest of the model. Raise a limit only for a reason.
LIMITS = {"mla": (71, 25), "gqa": (71, 25)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LIMITS)
def test_operators_of_a_decoded_token(name: str, dtype: torch.dtype) -> None:
    config = {"mla": SMALL, "gqa": GROUPED}[name]
    shallow, deep = (dataclasses.replace(config, first_k_dense_replace=0, num_hidden_layers=n) for n in (1, 3))
    one, three = operators(shallow, dtype), operators(deep, dtype)
    layer = (three - one) / 2
    slack = 6 if dtype == torch.bfloat16 else 0  # casts
    assert layer <= LIMITS[name][0] + slack and one - layer <= LIMITS[name][1]
