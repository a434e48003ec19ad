"""Texts for the Countdown recipe: arithmetic to pre-train on, chains of thought for a cold start, and a tokenizer.

A chain of thought searches for the last step of a solution with three numbers. Each line undoes a last step with one of
the numbers, which leaves a value to reach, and tries whether an operation on the other two reaches it:

    <think>46+3=49 25+7=32
    46-25=21 7*3=21</think> <answer>(7*3)+25</answer>
"""

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moe.errors import ConfigError
from moe.recipes.countdown import MAX_NUMBER, MAX_TARGET, Problem, generate, operations
from moe.train.tokenizer import END_OF_TEXT

LINES = 32  # equations of a document
MORE_FAILURES = 0.6  # probability that another line fails before the one that succeeds
MAX_FAILURES = 6
WORDS = ("Numbers:", " Target:", "<think>", "</think>", "<answer>", "</answer>")


def arithmetic(documents: int, *, seed: int) -> Iterator[str]:
    """Yield documents of `LINES` lines each, in equal parts equations and calculations of three numbers.

    An equation, such as "46-25=21", has an operand or result of at most 99 and no number above 999, as in chains of
    thought. Small numbers are more frequent. Two sevenths are sums, differences and products each, one seventh
    quotients. A calculation is "(7*3)+25=21+25=46", with numbers of a problem. All numbers are positive integers.
    """
    rng = random.Random(seed)
    for _ in range(documents):
        yield "".join(f"{_equation(rng) if rng.random() < 0.5 else _calculation(rng)}\n" for _ in range(LINES))


def _equation(rng: random.Random) -> str:
    symbol = rng.choice("++--**/")
    b = rng.randint(1, rng.choice((9, MAX_NUMBER)))
    most = MAX_TARGET // b if symbol in "*/" else MAX_TARGET - b
    a = rng.randint(1, min(most, rng.choice((9, MAX_NUMBER, MAX_TARGET))))
    a, b = rng.sample((a, b), 2)
    return {"+": f"{a}+{b}={a + b}", "-": f"{a + b}-{b}={a}", "*": f"{a}*{b}={a * b}", "/": f"{a * b}/{b}={a}"}[symbol]


def _calculation(rng: random.Random) -> str:
    z, *others = (rng.randint(1, MAX_NUMBER) for _ in range(3))
    y, x = sorted(others)
    symbol, inner = rng.choice(operations(x, y))
    last, value = rng.choice(operations(max(inner, z), min(inner, z)))
    if inner >= z or (last in "+*" and rng.random() < 0.5):
        return f"({x}{symbol}{y}){last}{z}={inner}{last}{z}={value}"
    return f"{z}{last}({x}{symbol}{y})={z}{last}{inner}={value}"


def cold_start(n: int, *, seed: int) -> Iterator[dict[str, str]]:
    """Yield examples for `moesmith sft`, {"prompt": ..., "completion": ...}, of n problems of split "train"."""
    rng = random.Random(seed)
    for problem in generate(n, seed=seed, split="train"):
        yield {"prompt": problem.prompt, "completion": chain_of_thought(problem, rng)}


def chain_of_thought(problem: Problem, rng: random.Random) -> str:
    """Return a right completion for a problem of three numbers.

    It has 0 to `MAX_FAILURES` failing lines, then a succeeding one. They are drawn from all of the problem, without
    repetition. Raises ConfigError for more numbers, and for a problem that no line solves.
    """
    if len(problem.numbers) != 3:
        raise ConfigError("numbers", problem.numbers, "three numbers")
    lines = list(dict.fromkeys(_lines(problem)))  # equal numbers repeat them
    right, wrong = ([line for line in lines if line[2] is succeeds] for succeeds in (True, False))
    if not right:
        raise ConfigError("problem", problem.prompt, "a problem that one of its lines solves")
    failures = 0
    while failures < min(MAX_FAILURES, len(wrong)) and rng.random() < MORE_FAILURES:
        failures += 1
    text, answer, _ = rng.choice(right)
    thoughts = "\n".join([*(line[0] for line in rng.sample(wrong, failures)), text])
    return f"<think>{thoughts}</think> <answer>{answer}</answer>"


def _lines(problem: Problem) -> Iterator[tuple[str, str, bool]]:
    """Yield all lines: text, answer if it succeeds, and whether it does."""
    t = problem.target
    for i, z in enumerate(problem.numbers):
        y, x = sorted(problem.numbers[:i] + problem.numbers[i + 1 :])
        tries = [(f"{x}{symbol}{y}", value) for symbol, value in operations(x, y)]
        undone = [(f"{t}-{z}", t - z, "({})+" + f"{z}"), (f"{t}+{z}", t + z, "({})-" + f"{z}")]
        undone += [(f"{z}-{t}", z - t, f"{z}-" + "({})"), (f"{t}*{z}", t * z, "({})/" + f"{z}")]
        if t % z == 0:
            undone.append((f"{t}/{z}", t // z, "({})*" + f"{z}"))
        if z % t == 0:
            undone.append((f"{z}/{t}", z // t, f"{z}/" + "({})"))
        for undo, needed, answer in undone:
            if 1 <= needed <= MAX_TARGET:
                for attempt, value in tries:
                    yield f"{undo}={needed} {attempt}={value}", answer.format(attempt), value == needed


def tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes and of the words of prompts and completions; numbers are sequences of digits."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate((END_OF_TEXT, *alphabet))}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    words.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    words.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    words.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return words
