"""Tasks: countdown, and a user's own, with every mistake that its file can contain."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.errors import ConfigError
from moe.recipes.countdown import Problem, solve
from moe.recipes.task import countdown_task, load_task

OWN = """
class Length:
    train = ["a", "b"]
    test = ("c",)

    def reward(self, prompt, completion):
        return len(completion) / 10


task = Length()
"""
FUNCTION = "task with a function reward(prompt, completion)"


def write(folder: Path, text: str) -> str:
    file = folder / "own.py"
    file.write_text(text)
    return f"{file}:task"


def test_countdown_has_disjoint_prompts_and_two_parts() -> None:
    task = load_task("countdown", format_weight=0.25)
    assert len(task.test) == 500 and len(task.train) == 20_000
    assert not set(task.train) & set(task.test) and task.goal == "accuracy"
    prompt = task.test[0]
    numbers, target = prompt.removeprefix("Numbers: ").split(" Target: ")
    answer = solve(Problem(tuple(map(int, numbers.split())), int(target)))
    right = task.score(prompt, f"<think></think> <answer>{answer}</answer>")
    assert right == {"accuracy": 1.0, "format": 1.0, "reward": 1.25}
    assert task.score(prompt, f"<answer>{answer}</answer>") == {"accuracy": 1.0, "format": 0.0, "reward": 1.0}
    assert task.score(prompt, "<think></think> <answer></answer>")["reward"] == 0.25
    assert len(countdown_task(numbers=4).test[0].split()) == 7


def test_an_own_task(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, OWN))
    assert (task.train, task.test, task.goal) == (("a", "b"), ("c",), "reward")
    assert task.score("a", "xyz") == {"reward": 0.3}
    assert task.name == f"{tmp_path / 'own.py'}:task"


@pytest.mark.parametrize("value", [True, np.float32(1), np.array(1), torch.tensor(1.0), 1])
def test_numbers_that_a_reward_may_be(tmp_path: Path, value: object) -> None:
    task = load_task(write(tmp_path, OWN.replace("len(completion) / 10", "NUMBERS[0]") + "\nNUMBERS = []\n"))
    sys.modules["moesmith_task_own"].NUMBERS.append(value)
    assert task.score("a", "x") == {"reward": 1.0}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("task = (", "a file that runs; found SyntaxError: '(' was never closed (own.py, line 1)"),
        ("import math\nx = 1 / 0", "a file that runs; found ZeroDivisionError: division by zero (own.py, line 2)"),
        ("import sys\n\nsys.exit('no')", "a file that runs; found SystemExit: no (own.py, line 3)"),
        ("other = 1", "an object task in own.py; found none"),
        ("task = 1", f"{FUNCTION}; found no reward"),
        (OWN.replace("def reward", "reward = 3\n    def f"), f"{FUNCTION}; found reward = 3"),
        (OWN.replace("prompt, completion", "prompt"), "reward(prompt, completion) of task; found reward(prompt)"),
        (OWN.replace("prompt, completion", "a, b, c"), "reward(prompt, completion) of task; found reward(a, b, c)"),
        (OWN.replace('["a", "b"]', "[]"), "a list task.train of one or more prompts, non-empty str; found []"),
        (OWN.replace('("c",)', '"c"'), "a list task.test of one or more prompts, non-empty str; found 'c'"),
        (OWN.replace('("c",)', '["c", ""]'), "a list task.test of one or more prompts, non-empty str; found ['c', '']"),
        (OWN.replace("test =", "other ="), "a list task.test of one or more prompts, non-empty str; found none"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_task("own.py:task")
    assert caught.value.field == "--task" and caught.value.allowed == problem


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("float('nan')", "a finite number as a reward; found nan from line 6 of own.py"),
        ("1e400", "a finite number as a reward; found inf from line 6 of own.py"),
        ("None", "a finite number as a reward; found None from line 6 of own.py"),
        ("'1'", "a finite number as a reward; found '1' from line 6 of own.py"),
        ("1j", "a finite number as a reward; found 1j from line 6 of own.py"),
        (
            "completion[99]",
            "a reward for every completion; found IndexError: string index out of range (own.py, line 7)",
        ),
    ],
)
def test_mistakes_of_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, OWN.replace("len(completion) / 10", result))
    task = load_task("own.py:task")
    with pytest.raises(ConfigError) as caught:
        task.score("a", "x")
    assert caught.value.allowed == problem


@pytest.mark.parametrize("name", ["counting", "own.py", "own.py:", "own:task", ":task", "own.py:a b"])
def test_names_of_no_task(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected countdown, or FILE\.py:NAME"):
        load_task(name)


def test_a_missing_file_and_a_wrong_weight() -> None:
    with pytest.raises(ConfigError, match=r"expected a Python file; found no file none\.py"):
        load_task("none.py:task")
    with pytest.raises(ConfigError, match="format_weight = -1"):
        load_task("countdown", format_weight=-1)
