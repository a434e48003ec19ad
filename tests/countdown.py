"""Score hostile completions of Countdown, and compare each score with an independent reference.

    python -m tests.countdown --count 10000 --seed 1

The reference finds tags by counting text and evaluates expressions with Python's own parser. A case fails if the scores
differ, if scoring raises an exception, or if it takes longer than a second of
processor time.
"""

import argparse
import ast
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from moe.recipes.countdown import Problem, Score, score

SECONDS = 1.0  # of processor time: absurdly long for one completion; the slowest is reported
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def reference_value(text: str, numbers: tuple[int, ...]) -> Fraction | None:
    """Evaluate an expression with Python's parser; None if it is not one of the grammar or uses other numbers."""
    if len(text) > 200 or not set(text) <= set("0123456789+-*/() \t\n"):
        return None
    line = re.sub(r"\s", " ", text).strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of calls of numbers
            tree = ast.parse(line, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    try:
        value = _evaluate(tree)
    except (ArithmeticError, TypeError):
        return None
    return value if used <= Counter(numbers) else None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise TypeError
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    if isinstance(node.op, ast.Div):
        return left / right
    raise TypeError


def reference(problem: Problem, completion: str) -> Score:
    lower = completion.translate(_LOWER)

    def span(name: str, begin: int) -> tuple[int, int] | None:
        """Start and end of the only element of a name; None if there is not exactly one."""
        if lower.count(f"<{name}") != 1 or lower.count(f"</{name}") != 1:
            return None
        start, stop = completion.find(f"<{name}>", begin), completion.find(f"</{name}>", begin)
        return (start, stop + len(name) + 3) if -1 < start < stop else None

    accuracy = form = 0.0
    answer = span("answer", 0)
    if answer is not None:
        value = reference_value(completion[answer[0] + 8 : answer[1] - 9], problem.numbers)
        accuracy = float(value is not None and value == problem.target)
        think = span("think", 0)
        if think is not None and think[1] <= answer[0]:
            rest = completion[: think[0]] + completion[think[1] : answer[0]] + completion[answer[1] :]
            form = float(set(rest) <= set(" \t\n"))
    return Score(accuracy, form)


def expression(rng: random.Random, numbers: list[int]) -> str:
    """Write a random expression that uses each of the numbers once, with white space and needless parentheses."""
    if len(numbers) == 1:
        text = str(numbers[0])
    else:
        cut = rng.randrange(1, len(numbers))
        left, right = expression(rng, numbers[:cut]), expression(rng, numbers[cut:])
        space = rng.choice(("", " ", "\t", " \n"))
        text = f"{left}{space}{rng.choice('+-*/')}{rng.choice(('', ' '))}{right}"
    return f"({text})" if rng.random() < 0.5 else text


def right_answer(rng: random.Random) -> tuple[Problem, str]:
    """Return a problem and a random right expression for it."""
    while True:
        numbers = [rng.randint(1, rng.choice((9, 99))) for _ in range(rng.randint(3, 6))]
        text = expression(rng, rng.sample(numbers, rng.randint(2, len(numbers))))
        value = reference_value(text, tuple(numbers))
        if value is not None and value.denominator == 1 and 1 <= value <= 999:
            return Problem(tuple(numbers), int(value)), text


TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<ANSWER>",
    "<answer x='1'>",
    "</answer >",
    "<Think>",
    "<answers>",
)
TAGS += ("< answer>", "<answer/>", "<answer", "</answer", "<\0answer>", "＜answer＞", "<anſwer>", "<thin\u212a>")  # noqa: RUF001
CHARACTERS = (
    "0123456789+-*/() \t\n\r\v\f._,^%e<>=xX\0\ufeff\u00a0\u2212\u00d7\u00f7\u2044\uff0b\uff13\u0663\u00b2\ud800\u200b"
)


def mutated(rng: random.Random, text: str) -> str:
    """Insert, delete, replace, swap or repeat characters at one to three places."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randint(0, 3))
        other = rng.randrange(len(text) + 1)
        insert = rng.choice(CHARACTERS[:16] if rng.random() < 0.5 else CHARACTERS)
        text = rng.choice(
            (
                text[:at] + insert + text[at:],
                text[:at] + insert + text[end:],
                text[:at] + text[end:],
                text[:end] + text[at:],
                text[:at] + text[at:end][::-1] + text[end:],
                text[:at] + text[other : other + 1] + text[at:],
            )
        )
    return text


def complete(answer: str) -> str:
    return f"<think>so</think> <answer>{answer}</answer>"


def _mutated_answer(rng: random.Random, answer: str) -> str:
    return complete(mutated(rng, answer))


def _mutated_completion(rng: random.Random, answer: str) -> str:
    return mutated(rng, complete(answer))


def _tag_soup(rng: random.Random, answer: str) -> str:
    pieces = (*TAGS, *TAGS[:4] * 3, answer, answer, f"<answer>{answer}</answer>", " ", "\n", "x")
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 9)))


def _inserted_tag(rng: random.Random, answer: str) -> str:
    text = complete(answer)
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(TAGS) + text[at:]


def _nested(rng: random.Random, answer: str) -> str:
    left, right = rng.choice((10, 60, 95, 100, 1000)), rng.choice((0, 0, 0, 1))
    return complete("(" * left + answer + ")" * (left + right))


def _huge_number(rng: random.Random, answer: str) -> str:
    digits = rng.choice("0123456789") * rng.choice((20, 190, 5000, 100_000))
    return complete(rng.choice((digits, f"{answer}+{digits}", f"{digits}/{digits}", f"{answer}*{digits}**{digits}")))


def _look_alikes(rng: random.Random, answer: str) -> str:
    alike = {
        "-": "\u2212\u2013",
        "*": "\u00d7\u2217",
        "/": "\u00f7\u2044\uff0f",
        "+": "\uff0b",
        "(": "\uff08",
        " ": "\u00a0\u3000",
    }
    alike |= {str(i): chr(0xFF10 + i) + chr(0x660 + i) + chr(0x1D7CE + i) for i in range(10)}
    places = [i for i, character in enumerate(answer) if character in alike]
    at = rng.choice(places)
    return complete(answer[:at] + rng.choice(alike[answer[at]]) + answer[at + 1 :])


def _megabyte(rng: random.Random, answer: str) -> str:
    unit = rng.choice((*TAGS, "<", "</", "<<answer", "(", ")", "1", "((1", "+", " ", "<think", "\ud800", "\0", answer))
    text = unit * (1_000_000 // len(unit))
    return rng.choice((text, complete(text), text + complete(answer), complete(answer) + text, complete(answer + text)))


def _padded(rng: random.Random, answer: str) -> str:
    """Right answers at the limit of length, and right ones in unusual completions."""
    space = rng.choice(" \t\n")
    length = rng.choice((199, 200, 201))
    return rng.choice(
        (
            complete(answer.rjust(length, space)),
            complete(answer.ljust(length, space)),
            f"{space}<think></think>{space}{space}<answer>{answer}</answer>{space}",
            f"<think><answer>{answer}</answer></think>",
            f"<answer>{answer}</answer>",
            f"no tags <answer>{answer}</answer> after <b>",
        )
    )


Kind = Callable[[random.Random, str], str]
KINDS: tuple[Kind, ...] = (_mutated_answer, _mutated_completion, _tag_soup, _inserted_tag, _nested, _huge_number)
KINDS += (_look_alikes, _padded)


def hostile(rng: random.Random) -> tuple[Problem, str]:
    """Return a problem and a hostile completion. One in a hundred has a million characters."""
    problem, answer = right_answer(rng)
    kind = _megabyte if rng.random() < 0.01 else rng.choice(KINDS)
    return problem, kind(rng, answer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.countdown", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="Number of completions (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the completions (default: 0)")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    slowest, wrong = (0.0, ""), 0
    for index in range(options.count):
        problem, completion = hostile(random.Random(f"{options.seed}:{index}"))
        expected = reference(problem, completion)
        shown = f"case {index}: {problem}: {completion[:100]!r} ({len(completion):,} characters)"
        begin = time.process_time()
        try:
            found = score(problem, completion)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:300]
        seconds = time.process_time() - begin
        slowest = max(slowest, (seconds, shown))
        if found != expected or seconds > SECONDS:
            wrong += 1
            print(f"{shown}: expected {expected}; found {found} in {seconds:.3f} s")
        counts[f"accuracy {expected.accuracy:.0f}, format {expected.format:.0f}"] += 1
    print(f"{options.count} completions, seed {options.seed}: {dict(sorted(counts.items()))}; {wrong} wrong")
    print(f"slowest: {slowest[0]:.4f} s, {slowest[1]}")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
