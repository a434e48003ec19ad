"""Tasks for reinforcement learning: prompts for training and testing, and a reward. Imports no torch."""

import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moe.errors import ConfigError, one_line
from moe.recipes import countdown

TRAIN_PROMPTS, TEST_PROMPTS = 20_000, 500  # of countdown
FORMAT_WEIGHT = 0.1


@dataclass(frozen=True)
class Task:
    """Task with a reward for each completion of a prompt.

    Attributes:
        name: for messages.
        train, test: prompts, one or more each.
        parts: function (prompt, completion) -> parts of the reward by name, such as {"accuracy": 1.0, "format": 0.0}.
        weights: weight of each part in the reward. It has the same names.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    parts: Callable[[str, str], Mapping[str, float]]
    weights: Mapping[str, float]

    @property
    def goal(self) -> str:
        """Name of the part that is 1 for a right completion: the first one."""
        return next(iter(self.weights))

    def score(self, prompt: str, completion: str) -> dict[str, float]:
        """Return the parts of the reward of a completion, and "reward", the sum of weight * part."""
        parts = dict(self.parts(prompt, completion))
        return {**parts, "reward": sum(self.weights[name] * value for name, value in parts.items())}


def load_task(name: str, *, format_weight: float = FORMAT_WEIGHT) -> Task:
    """Return the task that `--task` names: "countdown", or "FILE.py:NAME" for an object that a Python file defines.

    The object has two lists of prompts, `train` and `test`, and a method or function `reward(prompt, completion)` that
    returns a finite number. The file is executed. The one part of its reward is "reward", with a weight of 1.

    Args:
        format_weight: weight of the format in the reward of countdown; accuracy has weight 1.

    Raises ConfigError for anything else, and for an error in the file, whose line it names. `Task.score` does so for an
    error in `reward`.
    """
    if name == "countdown":
        return countdown_task(format_weight=format_weight)
    file, colon, attribute = name.rpartition(":")
    if not colon or not file.endswith(".py") or not attribute.isidentifier():
        raise ConfigError("--task", name, "countdown, or FILE.py:NAME")
    return _OwnTask(Path(file), attribute).task()


def countdown_task(*, numbers: int = 3, format_weight: float = FORMAT_WEIGHT) -> Task:
    """Return Countdown as a task: `TRAIN_PROMPTS` problems of split "train", `TEST_PROMPTS` of split "test", seed 0.

    Prompts are `Problem.prompt`. The parts of the reward are those of `moe.recipes.countdown.score`.
    """
    if not 0 <= format_weight < math.inf:
        raise ConfigError("format_weight", format_weight, "a finite number of at least 0")
    train = countdown.generate(TRAIN_PROMPTS, seed=0, split="train", numbers=numbers)
    test = countdown.generate(TEST_PROMPTS, seed=0, split="test", numbers=numbers)
    problems = {problem.prompt: problem for problem in (*train, *test)}

    def parts(prompt: str, completion: str) -> Mapping[str, float]:
        score = countdown.score(problems[prompt], completion)
        return {"accuracy": score.accuracy, "format": score.format}

    weights = {"accuracy": 1.0, "format": format_weight}
    train_prompts, test_prompts = (tuple(problem.prompt for problem in split) for split in (train, test))
    return Task("countdown", train_prompts, test_prompts, parts, weights)


@dataclass(frozen=True)
class _OwnTask:
    """Object `name` of a Python file."""

    file: Path
    name: str

    def task(self) -> Task:
        found = self._load()
        reward = getattr(found, "reward", None)
        if not callable(reward):
            shown = "no reward" if reward is None else f"reward = {one_line(repr(reward), 80)}"
            raise self._mistake(f"{self.name} with a function reward(prompt, completion); found {shown}")
        if not _takes_two(reward):
            raise self._mistake(f"reward(prompt, completion) of {self.name}; found reward{inspect.signature(reward)}")

        def parts(prompt: str, completion: str) -> Mapping[str, float]:
            return {"reward": self._number(reward, prompt, completion)}

        train, test = (self._prompts(found, split) for split in ("train", "test"))
        return Task(f"{self.file}:{self.name}", train, test, parts, {"reward": 1.0})

    def _mistake(self, problem: str) -> ConfigError:
        return ConfigError("--task", f"{self.file}:{self.name}", problem)

    def _load(self) -> Any:
        if not self.file.is_file():
            raise self._mistake(f"a Python file; found no file {one_line(self.file)}")
        module = ModuleType(f"moesmith_task_{self.file.stem}")
        sys.modules[module.__name__] = module  # dataclasses and pickle look it up
        try:
            exec(compile(self.file.read_bytes(), str(self.file), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise self._mistake(f"a file that runs; found {self._where(error)}") from error
        if not hasattr(module, self.name):
            raise self._mistake(f"an object {self.name} in {one_line(self.file)}; found none")
        return getattr(module, self.name)

    def _prompts(self, found: Any, split: str) -> tuple[str, ...]:
        prompts = getattr(found, split, None)
        texts = isinstance(prompts, list | tuple) and all(isinstance(each, str) and each for each in prompts)
        if not texts or not prompts:
            shown = "none" if prompts is None else one_line(repr(prompts), 80)
            raise self._mistake(f"a list {self.name}.{split} of one or more prompts, non-empty str; found {shown}")
        return tuple(prompts)

    def _number(self, reward: Callable[..., Any], prompt: str, completion: str) -> float:
        try:
            value = reward(prompt, completion)
            number = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
        except Exception as error:
            raise self._mistake(f"a reward for every completion; found {self._where(error)}") from error
        if not isinstance(number, int | float) or not math.isfinite(number):
            code = getattr(reward, "__code__", None)
            line = "" if code is None else f" from line {code.co_firstlineno} of {one_line(self.file)}"
            raise self._mistake(f"a finite number as a reward; found {one_line(repr(value), 80)}{line}")
        return float(number)

    def _where(self, error: BaseException) -> str:
        """Describe an error and its last line in the file."""
        text = (error.msg if isinstance(error, SyntaxError) else str(error)) or "no message"
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(self.file)]
        if isinstance(error, SyntaxError) and error.filename == str(self.file):
            lines.append(error.lineno)
        at = f", line {lines[-1]}" if lines else ""
        return f"{type(error).__name__}: {one_line(text)} ({one_line(self.file)}{at})"


def _takes_two(reward: Callable[..., Any]) -> bool:
    try:
        inspect.signature(reward).bind("prompt", "completion")
    except TypeError:
        return False
    except ValueError:  # built-in functions without a signature
        return True
    return True
