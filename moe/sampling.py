"""Sampling parameters of generation. This module does not import torch, so the command line can check them early."""

import math
from dataclasses import dataclass
from typing import Literal

from moe.errors import ConfigError

Speculative = Literal["auto", "on", "off"]  # see `moe.generate`


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, in the order in which they apply, as in transformers. The default is greedy.

    Attributes:
        repetition_penalty: divides positive and multiplies negative logits of tokens that are already in the sequence
            or its prompt; 1 for none.
        temperature: divides the logits; 0 selects the most likely token (the lowest id among equals) and disables the
            parameters below.
        top_k: sample from the k most likely tokens, lower ids first among equals; 0 for all.
        top_p: sample from the smallest set of most likely tokens whose total probability is at least top_p.
        min_p: sample from tokens that are at least min_p times as likely as the most likely one; 0 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
        ):
            if not ok:
                raise ConfigError(name, getattr(self, name), allowed)
