"""The Countdown game as a task for reinforcement learning: reach a target with + - * / from a few numbers.

TinyZero (github.com/Jiayi-Pan/TinyZero) trains on it. Differences from TinyZero:

- Numbers are 1 to 99 and targets 1 to 999, where TinyZero's generator allows 100 and 1000. It draws the target
  independently of the numbers. Here the target is the value of a random expression, so every problem can be solved.
- Each number may be used at most once. TinyZero's prompt says so, too, but its reward requires exactly once.
- The hash of a problem decides whether it is for training or testing. TinyZero cuts a list in two.
- TinyZero passes the answer to `eval` after a regular expression has checked its characters, which allows `**`, `//`,
  decimals and signs. It accepts an error of 1e-5, and scores the last of several answers. Here the answer is parsed
  and calculated exactly, and must be the only one.
- Accuracy and format are two scores. TinyZero returns 1 for a right answer and 0.1 for any other answer.
"""

import hashlib
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from moe.errors import ConfigError

MAX_NUMBER, MAX_TARGET = 99, 999
MAX_PROBLEMS = 100_000  # of one list; about 137,000 of 3 numbers exist in the smaller split
MAX_ANSWER = 200  # characters
_SPACE = " \t\n"
_DIGITS = "0123456789"
_OPERATORS: dict[str, tuple[int, Callable[[Fraction, Fraction], Fraction]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
}
# Without ">" at the end, so that tags in other case or with attributes are found, too, and refused.
_ANSWER_TAG = re.compile(r"(</?answer>?)", re.ASCII | re.IGNORECASE)
_TAG = re.compile(r"(</?(?:think|answer)>?)", re.ASCII | re.IGNORECASE)


def _check(field: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(field, value, f"an integer from {low} to {high}")


@dataclass(frozen=True)
class Problem:
    """Numbers and a target. Problems that differ only in the order of their numbers count as the same problem.

    Args:
        numbers: 3 to 6 integers from 1 to 99; repetitions are allowed.
        target: integer from 1 to 999. Whether it can be reached is not checked.

    Raises ConfigError for other values.
    """

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, tuple) or not 3 <= len(self.numbers) <= 6:
            raise ConfigError("numbers", self.numbers, "a tuple of 3 to 6 integers")
        for number in self.numbers:
            _check("numbers", number, 1, MAX_NUMBER)
        _check("target", self.target, 1, MAX_TARGET)

    @property
    def prompt(self) -> str:
        """One line, such as "Numbers: 3 7 25 Target: 46", without a line break."""
        return f"Numbers: {' '.join(map(str, self.numbers))} Target: {self.target}"


@dataclass(frozen=True)
class Score:
    """Rewards of a completion, each 0.0 or 1.0."""

    accuracy: float
    format: float


def generate(n: int, *, seed: int, split: Literal["train", "test"], numbers: int = 3) -> list[Problem]:
    """Generate problems that can be solved.

    A hash of the sorted numbers and the target assigns about a tenth of all problems to "test" and the others to
    "train", so no problem of one split occurs in the other, whatever `n` and `seed` are. A list contains no problem
    twice, and no target that is among its own numbers. Equal arguments give the same list on every platform and Python
    version. The first problems of a longer list are those of a shorter one.

    Args:
        n: number of problems, 0 to 100,000.
        seed: integer from 0 to 2**64 - 1.
        split: "train" or "test".
        numbers: how many numbers each problem has, 3 to 6.

    Raises ConfigError for other values.
    """
    _check("n", n, 0, MAX_PROBLEMS)
    _check("seed", seed, 0, 2**64 - 1)
    _check("numbers", numbers, 3, 6)
    if split not in ("train", "test"):
        raise ConfigError("split", split, '"train" or "test"')
    uniform = random.Random(seed).random  # Python guarantees the sequence of this method only

    def below(end: int) -> int:
        return int(uniform() * end)

    problems: dict[tuple[tuple[int, ...], int], Problem] = {}
    while len(problems) < n:
        drawn = tuple(1 + below(MAX_NUMBER) for _ in range(numbers))
        values = list(drawn)
        while len(values) > 1:
            a, b = (values.pop(below(len(values))) for _ in range(2))
            results = operations(max(a, b), min(a, b))
            values.append(results[below(len(results))][1])
        target, ordered = values[0], tuple(sorted(drawn))
        if target not in drawn and _split(ordered, target) == split:
            problems.setdefault((ordered, target), Problem(drawn, target))
    return list(problems.values())


def operations(a: int, b: int) -> list[tuple[str, int]]:
    """Return operators and results from 1 to MAX_TARGET, for a >= b >= 1. There is at least one: a - b or a / b."""
    results = [("+", a + b), ("-", a - b), ("*", a * b)]
    if a % b == 0:
        results.append(("/", a // b))
    return [(symbol, value) for symbol, value in results if 1 <= value <= MAX_TARGET]


def _split(ordered: tuple[int, ...], target: int) -> str:
    """Return the split of a problem. `ordered` are its numbers, sorted."""
    digest = hashlib.sha256(f"{' '.join(map(str, ordered))} = {target}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def solve(problem: Problem) -> str | None:
    """Return an expression that reaches the target, or None if none is found.

    The search is complete for expressions whose intermediate results are integers from 1 to 999. Every generated
    problem has one. Six numbers take about a second at most.
    """
    numbers, target = problem.numbers, problem.target
    found: list[dict[int, str]] = [{}]  # for each subset of the numbers, as bits: value -> expression
    for subset in range(1, 1 << len(numbers)):
        values = {number: str(number) for i, number in enumerate(numbers) if subset == 1 << i}
        part = (subset - 1) & subset
        while part:
            for a, left in found[part].items():
                for b, right in found[subset ^ part].items():
                    if a >= b:
                        for symbol, value in operations(a, b):
                            if value not in values:
                                values[value] = f"({left} {symbol} {right})"
            part = (part - 1) & subset
        if target in values:
            return values[target].removeprefix("(").removesuffix(")")
        found.append(values)
    return None


def score(problem: Problem, completion: str) -> Score:
    """Score a completion, `<think>...</think> <answer>EXPRESSION</answer>`.

    Accuracy is 1.0 if the completion has exactly one answer element and that contains only a right expression.
    `<answer` and `</answer` in any case count as tags wherever they are, inside <think> too. There must be one
    `<answer>` and after it one `</answer>`, so a nested, unclosed or second tag, or one in other case or with
    attributes, gives 0.0. Other text outside the answer has no influence.

    Format is 1.0 if the completion is one think element followed by one answer element, with only white space around
    them. Tags are counted in the same way. The contents have no influence.

    A right expression has the target as its exact rational value and uses each number at most once (a number that
    occurs twice, at most twice). It has at most 200 characters: integers, the operators + - * / and parentheses, with
    white space between them. There are no signs, decimals or leading zeros, and only ASCII characters. White space is
    space, tab and line feed. Division by zero is wrong.

    Raises TypeError if `completion` is not a str. Every str is scored in time and memory linear in its length.
    """
    if not isinstance(completion, str):
        raise TypeError(f"completion: expected a str; found {type(completion).__name__}")
    outside = _TAG.split(completion)
    well_formed = outside[1::2] == ["<think>", "</think>", "<answer>", "</answer>"] and not any(
        text.strip(_SPACE) for text in outside[::4]
    )
    parts = _ANSWER_TAG.split(completion)
    right = parts[1::2] == ["<answer>", "</answer>"] and _value(parts[2], problem.numbers) == problem.target
    return Score(accuracy=float(right), format=float(well_formed))


def _value(text: str, numbers: tuple[int, ...]) -> Fraction | None:
    """Return the value of an expression, or None if it is not one or uses other numbers.

    Operators wait on a stack until one of lower precedence, a closing parenthesis or the end follows. There is no
    recursion, so the depth of parentheses is not limited by Python's stack.
    """
    if len(text) > MAX_ANSWER:
        return None
    unused = [str(number) for number in numbers]
    values: list[Fraction] = []
    waiting: list[str] = []

    def apply_from(precedence: int) -> None:
        while waiting and waiting[-1] != "(" and _OPERATORS[waiting[-1]][0] >= precedence:
            right, left = values.pop(), values.pop()
            values.append(_OPERATORS[waiting.pop()][1](left, right))

    operand = True  # whether an operand must follow
    at = 0
    try:
        while at < len(text):
            start, at = at, at + 1
            character = text[start]
            if character in _SPACE:
                continue
            if operand and character == "(":
                waiting.append(character)
            elif operand:
                while at < len(text) and text[at] in _DIGITS:
                    at += 1
                number = text[start:at]  # compared as text: nothing is converted that is not among the numbers
                if number not in unused:
                    return None
                unused.remove(number)
                values.append(Fraction(number))
                operand = False
            elif character in _OPERATORS:
                apply_from(_OPERATORS[character][0])
                waiting.append(character)
                operand = True
            elif character == ")":
                apply_from(0)
                if not waiting:
                    return None
                waiting.pop()
            else:
                return None
        if operand:
            return None
        apply_from(0)
    except ZeroDivisionError:
        return None
    return None if waiting else values[0]
