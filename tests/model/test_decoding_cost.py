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
        for _ in range(2):  # the first one prepares weights
            with Count() as count:
                model(ids[:, :1], cache=cache, logits_to_keep=1)
    return count.number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_operators_per_layer(name: str, dtype: torch.dtype) -> None:
    config = {"mla": SMALL, "gqa": GROUPED}[name]
    few, many = (
        operators(dataclasses.replace(config, num_hidden_layers=layers, first_k_dense_replace=0), dtype)
        for layers in (2, 6)
    )
    print(name, dtype, (many - few) / 4, few - (many - few) / 2)
