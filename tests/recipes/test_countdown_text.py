"""Texts of the Countdown recipe: equations are right, chains of thought end at the first line that succeeds."""

import itertools
import json
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
from transformers import PreTrainedTokenizerFast

from moe.errors import ConfigError
from moe.recipes.countdown import Problem, Score, generate, score
from moe.recipes.countdown_text import (
    LINES,
    MAX_FAILURES,
    MORE_FAILURES,
    WORDS,
    arithmetic,
    chain_of_thought,
    tokenizer,
)

PROBLEMS = generate(400, seed=3, split="train")


def parse(equation: str) -> tuple[int, str, int, int]:
    found = re.fullmatch(r"([1-9]\d*)([-+*/])([1-9]\d*)=([1-9]\d*)", equation)
    assert found, equation
    a, symbol, b, c = found.groups()
    return int(a), symbol, int(b), int(c)


def check_value(a: str, symbol: str, b: str) -> int:
    x, y = int(a), int(b)
    exact = {"+": Fraction(x + y), "-": Fraction(x - y), "*": Fraction(x * y), "/": Fraction(x, y)}[symbol]
    assert exact.denominator == 1 and 1 <= exact <= 999
    return int(exact)


def check(equation: str) -> int:
    """Check an equation and return its result."""
    a, symbol, b, c = parse(equation)
    assert check_value(str(a), symbol, str(b)) == c, equation
    return c


def succeeds(line: str) -> bool:
    undone, attempt = line.split(" ")
    return check(undone) == check(attempt)


def thoughts(completion: str) -> list[str]:
    return completion.removeprefix("<think>").split("</think>")[0].split("\n")


def test_arithmetic_is_right_and_has_all_operators() -> None:
    documents = list(arithmetic(200, seed=1))
    lines = [document.splitlines() for document in documents]
    assert {len(each) for each in lines} == {LINES} and all(document.endswith("\n") for document in documents)
    texts = list(itertools.chain.from_iterable(lines))
    equations, calculations = ([text for text in texts if ("(" in text) is calculated] for calculated in (False, True))
    assert len(equations) / len(texts) == pytest.approx(0.5, abs=0.03)
    for equation in equations:
        a, _, b, c = parse(equation)
        check(equation)
        assert min(a, b, c) <= 99 and max(a, b, c) <= 999
    shares = {symbol: count / len(equations) for symbol, count in Counter(parse(e)[1] for e in equations).items()}
    expected = {"+": 2 / 7, "-": 2 / 7, "*": 2 / 7, "/": 1 / 7}
    assert {symbol: pytest.approx(share, abs=0.03) for symbol, share in expected.items()} == shares
    assert documents[:5] == list(arithmetic(5, seed=1)) != list(arithmetic(5, seed=2))
    forms = set()
    for text in calculations:
        whole, step, value = text.split("=")
        inner = re.search(r"\((\d+)([-+*/])(\d+)\)", whole)
        assert inner and int(inner[1]) >= int(inner[3])
        calculated = check_value(*inner.groups())
        assert step == whole.replace(inner[0], str(calculated))
        assert check(f"{step}={value}") == int(value)
        numbers = tuple(int(number) for number in re.findall(r"\d+", whole))
        assert score(Problem(numbers, int(value)), f"<answer>{whole}</answer>").accuracy == 1
        forms.add(re.sub(r"\d+", "n", whole))
    assert {"(n*n)+n", "n-(n-n)", "n/(n-n)", "(n+n)*n", "(n/n)+n", "n+(n-n)"} <= forms


def test_chains_of_thought_are_right_and_stop_at_the_first_success() -> None:
    rng = random.Random(0)
    failures: Counter[int] = Counter()
    for problem in PROBLEMS:
        completion = chain_of_thought(problem, rng)
        assert score(problem, completion) == Score(1.0, 1.0)
        lines = thoughts(completion)
        assert [succeeds(line) for line in lines] == [False] * (len(lines) - 1) + [True]
        assert len(set(lines)) == len(lines)
        failures[len(lines) - 1] += 1
    assert max(failures) == MAX_FAILURES
    assert failures[0] / len(PROBLEMS) == pytest.approx(1 - MORE_FAILURES, abs=0.07)
    assert chain_of_thought(PROBLEMS[0], random.Random(1)) == chain_of_thought(PROBLEMS[0], random.Random(1))


def test_lines_of_a_small_problem() -> None:
    """Written by hand: the last step undone on the left, an operation of the other two numbers on the right."""
    problem = Problem((3, 7, 25), 46)
    expected = {
        f"{undone} {attempt}"
        for undone, attempts in (
            (("46-3=43", "46+3=49", "46*3=138"), ("25+7=32", "25-7=18", "25*7=175")),
            (("46-7=39", "46+7=53", "46*7=322"), ("25+3=28", "25-3=22", "25*3=75")),
            (("46-25=21", "46+25=71"), ("7+3=10", "7-3=4", "7*3=21")),
        )
        for undone in undone
        for attempt in attempts
    }
    found: set[str] = set()
    rng = random.Random(0)
    for _ in range(400):
        completion = chain_of_thought(problem, rng)
        found.update(thoughts(completion))
        assert completion.endswith("46-25=21 7*3=21</think> <answer>(7*3)+25</answer>")
    assert found == expected


def test_problems_without_chains_are_refused() -> None:
    with pytest.raises(ConfigError, match="three numbers"):
        chain_of_thought(Problem((1, 2, 3, 4), 10), random.Random(0))
    with pytest.raises(ConfigError, match="a problem that one of its lines solves"):
        chain_of_thought(Problem((1, 1, 1), 999), random.Random(0))


def test_tokenizer_is_lossless_and_transformers_reads_it(tmp_path) -> None:
    words = tokenizer()
    file = tmp_path / "tokenizer.json"
    file.write_text(words.to_str())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    problem = PROBLEMS[0]
    text = problem.prompt + chain_of_thought(problem, random.Random(0))
    for each in (text, next(arithmetic(1, seed=0)), "Grüße \U0001f600\n\tÿ", json.dumps({"a": 1})):
        ids = words.encode(each, add_special_tokens=False).ids
        assert words.decode(ids) == each == theirs.decode(ids)
        assert ids == theirs.encode(each, add_special_tokens=False)
    for word in WORDS:
        assert len(words.encode(word).ids) == 1
    assert len(words.encode("46-25=21").ids) == 8
    assert sorted(words.get_vocab().values()) == list(range(1 + 256 + len(WORDS)))
