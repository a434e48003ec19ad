"""The options of every command: help that fits 80 columns, and one line for every kind of usage error."""

import dataclasses
import importlib
import io
import re

import pytest
from rich.console import Console

import moe
from moe.cli import COMMANDS
from moe.cli.options import Field, fields_of
from moe.train.report import print_scores, print_summary, print_table
from tests.support.command_line import fails_in_one_line, run

FIELDS = {name: list(fields_of(importlib.import_module(f"moe.cli.{name}").Args)) for name in COMMANDS}
ALL = [pytest.param(field, id=f"{name} {field.invocation}") for name in COMMANDS for field in FIELDS[name]]


@pytest.fixture(params=["80 columns", "piped"], autouse=True)
def narrow(request, monkeypatch):
    """Output that is not a terminal has 80 columns, too."""
    monkeypatch.setenv("COLUMNS", "80")
    if request.param == "piped":
        monkeypatch.delenv("COLUMNS")


def words(text: str) -> str:
    return " ".join(text.split())


def fits(shown: str) -> None:
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_with_its_whole_text(capsys, command):
    status, shown, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    fits(shown)
    assert shown.startswith(f"usage: moesmith {command} ")
    for field in FIELDS[command]:
        assert f"\n  {field.invocation}" in shown and words(f"{field.invocation} {field.text}") in words(shown)
    required = [field.invocation for field in FIELDS[command] if field.invocation in shown.split("\n\n")[0]]
    none = dict.fromkeys(("train", "sft", "distill", "grpo", "doctor"), 0)
    assert len(required) == ({"place": 3, "convert": 2, "cut": 3} | none).get(command, 1)


def test_the_top_level_fits(capsys):
    fits(run(capsys, "--help")[1])


@pytest.mark.parametrize("field", ALL)
def test_a_help_text_is_sentences_that_name_their_subject(field: Field):
    text = field.text
    assert text[0].isupper() and text.endswith(".")
    assert not re.match(r"(Of|To|That|What|Where|Which|Who|In which|Among|How|[A-Z]\w*[^e]ed)\b", text)
    assert "default:" not in text and text.count("Default: ") <= 1
    optional = repr(field.default) not in ("None", "()", "False") and field.default is not dataclasses.MISSING
    assert not optional or "Default: " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_cannot_be_read(capsys, command):
    for field in FIELDS[command]:
        flag = "/".join(field.flags)
        if field.choices:
            expected = f"one of {', '.join(field.choices)}"
        elif field.value in (int, float):
            expected = {int: "an integer", float: "a number"}[field.value]
        else:
            continue
        values = ["many"] * (2 if field.metavar == "ROWS COLUMNS" else 1)
        line = fails_in_one_line(capsys, command, field.flags[-1], *values)
        assert line == f"moesmith {command}: {flag}: expected {expected}; found 'many'\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_options_without_a_value_and_flags_with_one(capsys, command):
    for field in FIELDS[command]:
        if field.option.positional:
            continue
        if field.kind is bool:
            if field.name == "resume":  # takes the folder of a run
                continue
            line = fails_in_one_line(capsys, command, f"{field.flags[-1]}=yes")
            assert line == f"moesmith {command}: {field.flags[-1]}: expected no value; found 'yes'\n"
            continue
        line = fails_in_one_line(capsys, command, field.flags[-1])
        assert line.startswith(f"moesmith {command}: {'/'.join(field.flags)}: expected ")
        assert re.search(r"expected (one value|at least one value); found none|expected 2 values; found fewer", line)


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_options_and_arguments(capsys, command):
    for field in FIELDS[command]:
        if field.option.positional or len(field.name) < 4:
            continue
        flag = field.flags[-1]
        for typo in (f"{flag}{flag[-1]}", f"{flag}{flag[-1]}=1"):
            line = fails_in_one_line(capsys, command, typo)
            assert line == f"moesmith {command}: {flag}{flag[-1]}: unknown option; did you mean {flag}?\n"
    for word in ("--xyzzy", "-q"):
        line = fails_in_one_line(capsys, command, word)
        assert line == f"moesmith {command}: {word}: unknown option; moesmith {command} --help lists the options\n"
    positional = [field.metavar for field in FIELDS[command] if field.option.positional]
    line = fails_in_one_line(capsys, command, *("a" for _ in positional), "b")
    expected = f"one {positional[0]}" if positional else "options only"
    assert line == f"moesmith {command}: b: unexpected argument; expected {expected}\n"


@pytest.mark.parametrize(
    ("command", "given", "missing"),
    [
        ("eval", (), "FOLDER"),
        ("generate", (), "FOLDER"),
        ("inspect", ("--json",), "MODEL"),
        ("place", (), "FOLDER-OR-FILE, --gpus, --physical-experts"),
        ("place", ("--gpus", "2", "a.json"), "--physical-experts"),
        ("convert", (), "FOLDER, --out"),
        ("cut", ("--layers", "0", "folder"), "--out"),
    ],
)
def test_missing_arguments_are_named(capsys, command, given, missing):
    line = fails_in_one_line(capsys, command, *given)
    assert line == f"moesmith {command}: {missing}: required but missing\n"


def test_plan_needs_a_model(capsys):
    assert fails_in_one_line(capsys, "plan").startswith(
        "moesmith plan: MODEL: expected a folder, or one of the presets"
    )


def test_a_list_is_given_at_once(capsys):
    for command in (("train",), ("eval", "folder")):
        line = fails_in_one_line(capsys, *command, "--data", "a", "--data", "b")
        assert line == f"moesmith {command[0]}: --data: expected all values after one option; found 2 options\n"


def test_underscores_are_hyphens(capsys):
    assert fails_in_one_line(capsys, "train", "--batch_size=0") == (
        "moesmith train: --batch-size: expected 1 or more; found 0\n"
    )


def test_no_message_has_a_control_character(capsys):
    for words_ in (("train", "--steps", "\x1b[31m\n"), ("train", "--\x1b[31m\n"), ("doctor", "\x1b\n"), ("\x1b\n",)):
        assert fails_in_one_line(capsys, *words_).removesuffix("\n").isprintable()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("inspect", "deepseek_v3"), ["rope_parameters.original_max_position_embeddings"]),
        (("plan", "deepseek_v3", "--gpus", "16"), ["a block's activations", "total", "GiB per GPU"]),
        (
            ("plan", "deepseek_v3", "--gpu", "h800", "--gpus", "2048", "--pp", "16", "--ep", "64", "--dtype", "fp8"),
            ["activations in flight", "network", "total", "tokens/s per GPU"],
        ),
        (("plan", "--published"), ["OLMoE-1B-7B", "none hidden"]),
        (("place", "{loads}", "--gpus", "2", "--physical-experts", "6"), ["all layers", "lower bound", "3 per GPU"]),
        (("doctor",), ["dequantize_mxfp4"]),
    ],
)
def test_tables_fit(capsys, tmp_path, arguments, parts):
    (tmp_path / "loads.json").write_text('{"load": [[1, 2, 3, 400], [3, 3, 3, 3]]}')
    status, shown, err = run(capsys, *(word.format(loads=tmp_path / "loads.json") for word in arguments))
    assert (status, err) == (0, "")
    fits("\n".join(line for line in shown.splitlines() if not line.startswith("python: ")))  # a path of any length
    assert all(part in shown for part in parts)
    if arguments[0] == "inspect":
        values = moe.preset("deepseek_v3").to_dict()
        assert all(f"\n{name}" in shown for name, value in values.items() if value not in (None, {}))


def test_tables_of_a_run_fit():
    score = {"nats_per_token": 123456.789, "bits_per_byte": 98765.4321}
    load = [
        {"layer": f"mtp.{i}.block.mlp", "max_vio": 99.5, "dead_experts": 255, "tokens": [0, 10**11]} for i in (0, 10)
    ]
    facts = {"tokens": 10**11, "documents": 10**8, "load": load}
    summary = {
        "validation": facts | dict.fromkeys(("before", "unigram", "bigram", "after"), score),
        "load": load,
        "sample": {"prompt": "To be", "text": "To be, or not to be"},
        "steps": 320,
        "tokens_per_second": 1234567.8,
        "seconds": 98765.4,
        "plots": [],
        "metrics": "runs/tiny/metrics.jsonl",
        "checkpoint": "runs/tiny/checkpoint",
    }
    console = Console(file=io.StringIO())
    print_summary(console, summary, None)
    print_scores(console, facts | score | {"folder": "run", "perplexity": 1e12, "seq_length": 2048})
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    fits(shown)
    assert shown.count("mtp.10.block.mlp") == 2 and shown.count(" 100,000,000,000\n") == 4


def test_a_table_folds_a_name_that_is_too_long():
    name, number = "".join(map(str, range(100))), "9" * 20
    console = Console(file=io.StringIO(), width=80)
    print_table(console, "title", ("name", "value"), [(name, number)])
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    fits(shown)
    rows = "".join(shown.partition("─\n")[2].split())
    assert rows.replace(number, "", 1) == name
