# ruff: noqa: RUF001 (look-alikes of ASCII characters are part of the tests)
"""Countdown: scores against an independent reference and by hand; problems are reachable, distinct and reproducible."""

import hashlib
import itertools
import random
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.recipes.countdown import MAX_PROBLEMS, Problem, Score, generate, score, solve
from tests.conftest import ROOT
from tests.countdown import TAGS, complete, hostile, mutated, reference, reference_value, right_answer

PROBLEM = Problem((3, 7, 25), 46)
RIGHT = "3*7+25"


def ok(answer: str = RIGHT) -> str:
    return f"<think>t</think> <answer>{answer}</answer>"


# Answers between well-formed tags (format is 1), whether they are right, and why.
ANSWERS = [
    (RIGHT, 1, "right"),
    (" 3 * 7 + 25 ", 1, "spaces"),
    ("\n3\t*\n7 +\t25\n", 1, "tabs and line feeds"),
    ("25+7*3", 1, "precedence"),
    ("(3*7)+25", 1, "parentheses"),
    ("((((3))*(7))+(25))", 1, "needless parentheses"),
    ("(" * 97 + RIGHT + ")" * 97, 1, "97 parentheses, 200 characters"),
    ("(" * 98 + RIGHT + ")" * 98, 0, "202 characters"),
    (RIGHT + " " * 194, 1, "200 characters"),
    (RIGHT + " " * 195, 0, "201 characters"),
    ("25-3+7*3", 0, "3 twice"),
    ("3*7+25+0", 0, "0 is not among the numbers"),
    ("46", 0, "the target is not among the numbers"),
    ("21+25", 0, "21 is not among the numbers"),
    ("3*(7+25)", 0, "96"),
    ("3+7+25", 0, "35"),
    ("3*7-25", 0, "-4"),
    ("25/3*7", 0, "another value"),
    ("", 0, "empty"),
    (" ", 0, "white space"),
    ("()", 0, "nothing in parentheses"),
    ("3*7+25+", 0, "operator at the end"),
    ("*3*7+25", 0, "operator at the beginning"),
    ("+3*7+25", 0, "sign"),
    ("25--3*7", 0, "sign: Python evaluates it to the target"),
    ("25+ +3*7", 0, "sign"),
    ("-(-3*7-25)", 0, "sign before a parenthesis"),
    ("3**7+25", 0, "power"),
    ("7//3+25", 0, "floor division"),
    ("3* *7+25", 0, "two operators"),
    ("3*7+25.0", 0, "decimals"),
    ("3.*7+25", 0, "decimal point"),
    ("3*7+2_5", 0, "underscore"),
    ("3*07+25", 0, "leading zero"),
    ("003*7+25", 0, "leading zeros"),
    ("0x3*7+25", 0, "hexadecimal"),
    ("3e0*7+25", 0, "exponent"),
    ("3*7+2 5", 0, "space in a number"),
    ("3 7+25", 0, "no operator"),
    ("3(7)+25", 0, "no operator before a parenthesis"),
    ("(3)(7)+25", 0, "no operator between parentheses"),
    ("(3)7+25", 0, "no operator after a parenthesis"),
    ("(3*7+25", 0, "unclosed parenthesis"),
    ("3*7+25)", 0, "unopened parenthesis"),
    (")3*7+25(", 0, "parentheses swapped"),
    ("3*7)+(25", 0, "parentheses that only count right"),
    ("(3*7+)25", 0, "operator before a parenthesis"),
    ("[3*7]+25", 0, "brackets"),
    ("3*7+25=46", 0, "equation"),
    ("46=3*7+25", 0, "equation"),
    ("3*7+25;", 0, "semicolon"),
    ("3*7+25 # 46", 0, "comment"),
    ("3*7+25,", 0, "comma"),
    ("3x7+25", 0, "letter"),
    ("3×7+25", 0, "multiplication sign"),
    ("3*7＋25", 0, "full-width plus"),
    ("3*7+２５", 0, "full-width digits"),
    ("3*7+٢٥", 0, "Arabic digits"),
    ("3*7+25²", 0, "superscript"),
    ("−3*7+25", 0, "minus sign"),
    ("3*7\u00a0+25", 0, "no-break space"),
    ("3*7\u200b+25", 0, "zero-width space"),
    ("\ufeff3*7+25", 0, "byte order mark"),
    ("3*7\r+25", 0, "carriage return"),
    ("3*7\v+\f25", 0, "vertical tab and form feed"),
    ("3*7+25\0", 0, "NUL"),
    ("3*7+25\ud800", 0, "surrogate"),
    ("3*7+25<", 0, "angle bracket"),
    ("<b>3*7+25</b>", 0, "other tags"),
    ("3/(7-7)+25", 0, "7 twice, and division by zero"),
    ("__import__('os')", 0, "code"),
    ("9" * 5000, 0, "more digits than Python converts"),
    (RIGHT + "*" + "9" * 150, 0, "a long number"),
    ("(" * 1_000_000, 0, "a million parentheses"),
    ("(" * 1_000_000 + RIGHT + ")" * 1_000_000, 0, "a right answer in a million parentheses"),
    ("1+" * 500_000 + "1", 0, "a million characters"),
]
E_ = f"<answer>{RIGHT}</answer>"
T_ = "<think>t</think>"
# Whole completions: accuracy, format, and why.
COMPLETIONS = [
    ("", 0, 0, "empty"),
    (RIGHT, 0, 0, "no tags"),
    (E_, 1, 0, "no think element"),
    (T_, 0, 0, "no answer"),
    (T_ + E_, 1, 1, "no white space"),
    (f"\n{T_}\n\n\t{E_} \n", 1, 1, "white space around and between"),
    (f"<think></think>{E_}", 1, 1, "empty think element"),
    (f"<think>\0\ud800 < > </b> 3<7</think>{E_}", 1, 1, "anything in the think element"),
    (f"{E_} {T_}", 1, 0, "answer first"),
    (f"{T_} {T_} {E_}", 1, 0, "two think elements"),
    (f"<think>{T_}</think> {E_}", 1, 0, "nested think elements"),
    (f"{T_} x {E_}", 1, 0, "text between"),
    (f"x {T_} {E_}", 1, 0, "text before"),
    (f"{T_} {E_} x", 1, 0, "text after"),
    (f"{T_} {E_}\0", 1, 0, "NUL after"),
    (f"{T_}\u00a0{E_}", 1, 0, "no-break space between"),
    (f"{T_}\r{E_}", 1, 0, "carriage return between"),
    (f"<think>t {E_}", 1, 0, "unclosed think element"),
    (f"t</think> {E_}", 1, 0, "think element without a beginning"),
    (f"<Think>t</Think> {E_}", 1, 0, "think tags in other case"),
    (f"<think x>t</think> {E_}", 1, 0, "think tag with an attribute"),
    (f"<think><THINK</think> {E_}", 1, 0, "stray think tag"),
    (f"</think>t<think> {E_}", 1, 0, "think tags swapped"),
    (f"<think>{E_}</think>", 1, 0, "the only answer is in the think element"),
    (f"<think>{E_}</think> {E_}", 0, 0, "two answers"),
    (f"<think>{E_}</think> <answer>46</answer>", 0, 0, "a wrong answer after a right one"),
    (f"<think><answer>46</answer></think> {E_}", 0, 0, "a right answer after a wrong one"),
    (f"{T_} {E_} {E_}", 0, 0, "the answer twice"),
    (f"{T_} {E_}</answer>", 0, 0, "a second closing tag"),
    (f"{T_} <answer>{E_}", 0, 0, "a second opening tag"),
    (f"{T_} <answer>{E_}</answer>", 0, 0, "nested answers"),
    (f"<think><answer></think> {E_}", 0, 0, "an opening tag in the think element"),
    (f"<think></answer></think> {E_}", 0, 0, "a closing tag in the think element"),
    (f"<think><ANSWER>1</ANSWER></think> {E_}", 0, 0, "stray tags in other case"),
    (f"<think><answer x='1'></think> {E_}", 0, 0, "stray tag with an attribute"),
    (f"<think><answer</think> {E_}", 0, 0, "stray unfinished tag"),
    (f"{T_} <ANSWER>{RIGHT}</ANSWER>", 0, 0, "tags in other case"),
    (f"{T_} <answer>{RIGHT}</Answer>", 0, 0, "closing tag in other case"),
    (f"{T_} <answer id=1>{RIGHT}</answer>", 0, 0, "attribute"),
    (f"{T_} <answer >{RIGHT}</answer>", 0, 0, "space in the tag"),
    (f"{T_} < answer>{RIGHT}</answer>", 0, 0, "space at the beginning of the tag"),
    (f"{T_} <answer>{RIGHT}</answer >", 0, 0, "space in the closing tag"),
    (f"{T_} <answer/>{RIGHT}</answer>", 0, 0, "empty element"),
    (f"{T_} <answers>{RIGHT}</answers>", 0, 0, "another name"),
    (f"{T_} <answer>{RIGHT}", 0, 0, "unclosed answer"),
    (f"{T_} {RIGHT}</answer>", 0, 0, "unopened answer"),
    (f"{T_} </answer>{RIGHT}<answer>", 0, 0, "tags swapped"),
    (f"{T_} <answer>{RIGHT}<answer>", 0, 0, "two opening tags"),
    (f"{T_} <answer>{T_}{RIGHT}</answer>", 0, 0, "think element in the answer"),
    (f"<think>t<answer></think>{RIGHT}</answer>", 0, 0, "elements that overlap"),
    (f"{T_} ＜answer＞{RIGHT}＜/answer＞", 0, 0, "full-width brackets"),
    (f"{T_} <anſwer>{RIGHT}</anſwer>", 0, 0, "long s"),
    (f"{T_} <anſwer>{E_}", 1, 0, "a tag with a long s is text"),
    ("<answer>" * 100_000 + E_, 0, 0, "many opening tags"),
    ("<" * 1_000_000 + E_, 1, 0, "a million angle brackets"),
    (f"<think>{'<' * 1_000_000}</think>{E_}", 1, 1, "a million angle brackets in the think element"),
]


@pytest.mark.parametrize(
    ("completion", "accuracy", "form"),
    [
        pytest.param(completion, accuracy, form, id=f"{i}-{why}")
        for i, (completion, accuracy, form, why) in enumerate(
            [*((ok(answer), accuracy, 1, why) for answer, accuracy, why in ANSWERS), *COMPLETIONS]
        )
    ],
)
def test_score_by_hand(completion: str, accuracy: int, form: int) -> None:
    found = score(PROBLEM, completion)
    assert found == Score(accuracy=accuracy, format=form) == reference(PROBLEM, completion)
    assert type(found.accuracy) is type(found.format) is float


@pytest.mark.parametrize(
    ("numbers", "target", "answer", "right"),
    [
        ((3, 3, 5), 14, "3*3+5", True),  # a number that is there twice, twice
        ((3, 3, 5), 1, "3/3", True),
        ((3, 3, 5), 9, "3+3+3", False),
        ((3, 33, 5), 6, "3+3", False),  # digits of another number
        ((3, 7, 25), 4, "7-3", True),  # not all are needed
        ((3, 7, 25), 7, "7", True),
        ((3, 7, 25), 7, "(7)", True),
        ((1, 3, 2, 6), 4, "6*2/3", True),
        ((1, 3, 2, 6), 4, "6*(2/3)", True),  # not an integer on the way
        ((1, 3, 6, 9), 9, "6/(1-3/9)", True),
        ((1, 3, 49, 98), 49, "1/3*3*49", False),
        ((1, 49, 49, 2), 2, "(1/49)*49*2", True),  # in floating point, 0.9999999999999999 * 2
        ((99, 98, 97, 96), 1, "99*98/(97*96)", False),  # near, but not equal
        ((5, 5, 3), 3, "3/(5-5)", False),  # division by zero
        ((5, 5, 3), 3, "3+3/(5-5)", False),
        ((5, 5, 3), 3, "3+(5-5)", True),
        ((5, 5, 3, 7), 7, "7+(5-5)/3", True),
        ((8, 4, 2), 1, "8/4/2", True),  # from the left
        ((8, 4, 2), 4, "8/4/2", False),
        ((8, 4, 2), 2, "8-4-2", True),
        ((8, 4, 2), 6, "8-4-2", False),
        ((8, 4, 2), 6, "8-4+2", True),
        ((8, 4, 2), 4, "8/4*2", True),
        ((8, 4, 2), 1, "8/4*2", False),
        ((8, 4, 2), 16, "8+4*2", True),
        ((8, 4, 2), 24, "(8+4)*2", True),
        ((8, 4, 2), 10, "8+4/2", True),
        ((8, 4, 2), 6, "8-4/2", True),
    ],
)
def test_numbers_and_arithmetic(numbers: tuple[int, ...], target: int, answer: str, right: bool) -> None:
    problem = Problem(numbers, target)
    assert score(problem, ok(answer)) == Score(float(right), 1.0) == reference(problem, ok(answer))


def test_right_answers_and_their_mutations_agree_with_the_reference() -> None:
    rng, right = random.Random(1), 0
    for _ in range(1500):
        problem, answer = right_answer(rng)
        assert score(problem, ok(answer)) == Score(1.0, 1.0), (problem, answer)
        other = Problem(problem.numbers, problem.target % 999 + 1)
        assert score(other, ok(answer)) == Score(0.0, 1.0), (other, answer)
        for text in (ok(mutated(rng, answer)), ok(mutated(rng, answer)), mutated(rng, ok(answer))):
            expected = reference(problem, text)
            assert score(problem, text) == expected, (problem, text)
            right += expected.accuracy == 1.0
    assert right > 100  # some mutations change no value


def test_hostile_completions_agree_with_the_reference() -> None:
    for index in range(600):
        problem, text = hostile(random.Random(index))
        if len(text) < 500_000:
            assert score(problem, text) == reference(problem, text), (problem, text[:300])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*TAGS, RIGHT, " ", "\n"]) | st.text(max_size=3), max_size=9))
def test_any_text_agrees_with_the_reference(pieces: list[str]) -> None:
    for text in ("".join(pieces), complete("".join(pieces))):
        assert score(PROBLEM, text) == reference(PROBLEM, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("3725+-*/() \n"), max_size=14))
def test_any_expression_agrees_with_the_reference(answer: str) -> None:
    value = reference_value(answer, PROBLEM.numbers)
    target = int(value) if value is not None and value.denominator == 1 and 1 <= value <= 999 else 46
    problem = Problem(PROBLEM.numbers, target)
    assert score(problem, ok(answer)) == reference(problem, ok(answer))


def test_a_completion_is_a_str() -> None:
    for other, name in ((None, "NoneType"), (b"<answer>", "bytes"), (46, "int")):
        bad: Any = other
        with pytest.raises(TypeError) as caught:
            score(PROBLEM, bad)
        assert str(caught.value) == f"completion: expected a str; found {name}"


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """Return all values of expressions that use all of the numbers, by brute force."""
    if len(numbers) == 1:
        return {numbers[0]}
    found: set[Fraction] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= reachable([value, *rest])
    return found


@pytest.mark.parametrize(("count", "numbers"), [(60, 3), (4, 4)])
def test_generated_problems_are_reachable(count: int, numbers: int) -> None:
    for problem in generate(count, seed=3, split="train", numbers=numbers):
        assert problem.target in reachable([Fraction(number) for number in problem.numbers]), problem


@pytest.mark.parametrize(("count", "numbers"), [(100, 3), (40, 4), (10, 5), (2, 6)])
def test_solve_solves_generated_problems(count: int, numbers: int) -> None:
    for split in ("train", "test"):
        for problem in generate(count, seed=4, split=split, numbers=numbers):
            assert len(problem.numbers) == numbers and problem.target not in problem.numbers
            answer = solve(problem)
            assert answer is not None and score(problem, ok(answer)).accuracy == 1.0, (problem, answer)
            assert reference(problem, ok(answer)).accuracy == 1.0, (problem, answer)


def test_solve_without_a_solution_or_with_one_number() -> None:
    assert solve(Problem((1, 1, 1), 999)) is None
    assert solve(Problem((3, 7, 25), 7)) == "7"


def canonical(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem.numbers)), problem.target


def test_splits_are_disjoint_for_all_seeds() -> None:
    """Also across seeds. The problems of one list are all different."""
    found: dict[str, set[Any]] = {"train": set(), "test": set()}
    for split, problems in found.items():
        for seed in range(20):
            new = generate(250, seed=seed, split="train" if split == "train" else "test")
            assert len({canonical(problem) for problem in new}) == len(new) == 250
            problems |= {canonical(problem) for problem in new}
    assert min(map(len, found.values())) > 4000
    assert not found["train"] & found["test"]


def test_problems_in_another_order_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers up to 6, the lists contain most problems that exist, drawn in many orders."""
    monkeypatch.setattr("moe.recipes.countdown.MAX_NUMBER", 6)
    train = [generate(300, seed=seed, split="train") for seed in range(4)]
    test = [generate(30, seed=seed, split="test") for seed in range(4)]
    for problems in (*train, *test):
        assert len({canonical(problem) for problem in problems}) == len(problems)
    trained, tested = ({canonical(problem) for problems in lists for problem in problems} for lists in (train, test))
    drawn = {problem for problems in train for problem in problems}
    assert len(drawn) > 1.3 * len(trained)
    assert not trained & tested


def test_the_same_arguments_give_the_same_problems() -> None:
    texts = [
        "\n".join(
            problem.prompt for numbers in (3, 4, 5, 6) for problem in generate(60, seed=7, split=split, numbers=numbers)
        )
        for split in ("train", "test")
    ]
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == [
        "c542405ffd4e9309",
        "332d8411a7ae3a7d",
    ]
    code = "from moe.recipes.countdown import generate as g; print(g(9, seed=5, split='test'))"
    for randomised in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": randomised},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{generate(9, seed=5, split='test')}\n"


def test_lists() -> None:
    ten = generate(10, seed=1, split="train")
    assert generate(4, seed=1, split="train") == ten[:4] and generate(0, seed=1, split="train") == []
    assert len({*ten, *generate(10, seed=2, split="train")}) == 20
    assert {number for problem in generate(700, seed=1, split="train") for number in problem.numbers} == set(
        range(1, 100)
    )


def test_there_are_more_problems_than_a_list_may_have() -> None:
    """Even of three numbers, in the smaller split. Every 50th triple is counted: those of integers on the way."""

    def results(a: int, b: int) -> set[int]:
        found = {a + b, abs(a - b), a * b} | ({a // b} if a % b == 0 else set())
        return {value for value in found if 1 <= value <= 999}

    problems, step = 0, 50
    for a, b, c in itertools.islice(itertools.combinations_with_replacement(range(1, 100), 3), 0, None, step):
        targets = {
            target
            for x, y, z in ((a, b, c), (a, c, b), (b, c, a))
            for value in results(x, y) | results(y, x)
            for target in results(value, z) | results(z, value)
        }
        problems += step * len(targets - {a, b, c})
    assert problems // 10 > 1.2 * MAX_PROBLEMS, problems


def test_prompt() -> None:
    assert PROBLEM.prompt == "Numbers: 3 7 25 Target: 46"
    assert Problem((25, 7, 3), 46).prompt == "Numbers: 25 7 3 Target: 46"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n = -1: expected an integer from 0 to 100000"),
        ({"n": 100_001}, "n = 100001: expected an integer from 0 to 100000"),
        ({"n": True}, "n = True: expected an integer from 0 to 100000"),
        ({"n": 2.0}, "n = 2.0: expected an integer from 0 to 100000"),
        ({"seed": -1}, "seed = -1: expected an integer from 0 to 18446744073709551615"),
        ({"seed": "a"}, "seed = 'a': expected an integer from 0 to 18446744073709551615"),
        ({"numbers": 2}, "numbers = 2: expected an integer from 3 to 6"),
        ({"numbers": 7}, "numbers = 7: expected an integer from 3 to 6"),
        ({"split": "validation"}, 'split = \'validation\': expected "train" or "test"'),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate(**{"n": 1, "seed": 0, "split": "train", **arguments})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("numbers", "target", "message"),
    [
        ([3, 7, 25], 46, "numbers = [3, 7, 25]: expected a tuple of 3 to 6 integers"),
        ((3, 7), 10, "numbers = (3, 7): expected a tuple of 3 to 6 integers"),
        ((1,) * 7, 7, "numbers = (1, 1, 1, 1, 1, 1, 1): expected a tuple of 3 to 6 integers"),
        ((0, 7, 25), 46, "numbers = 0: expected an integer from 1 to 99"),
        ((3, 7, 100), 46, "numbers = 100: expected an integer from 1 to 99"),
        ((3, True, 25), 46, "numbers = True: expected an integer from 1 to 99"),
        ((3, 7, 25), 0, "target = 0: expected an integer from 1 to 999"),
        ((3, 7, 25), 1000, "target = 1000: expected an integer from 1 to 999"),
        ((3, 7, 25), 46.0, "target = 46.0: expected an integer from 1 to 999"),
    ],
)
def test_invalid_problems(numbers: Any, target: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Problem(numbers, target)
    assert str(caught.value) == message
