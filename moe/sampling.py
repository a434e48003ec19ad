"""How generation chooses the next token. No torch here: the command line checks its options first."""

import math
from dataclasses import dataclass

from moe.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """The rules, in the order in which they apply, which is that of transformers. The default is greedy.

    Attributes:
        repetition_penalty: logits of tokens that the sequence already has, the prompt included, are divided by it if
            they are positive and multiplied by it if they are negative; 1 changes nothing.
        temperature: 0 takes the most likely token (the lowest id among equals), whatever the rules below; else logits
            are divided by it.
        top_k: sample among the k most likely tokens, of equal ones those with the lower ids; 0 for all.
        top_p: sample among the smallest set of most likely tokens whose probability reaches top_p.
        min_p: sample among tokens that are at least min_p times as likely as the most likely one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number from 0 up"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
        ):
            if not ok:
                raise ConfigError(name, getattr(self, name), allowed)
