"""The mutants themselves: `python -m tests.mutants` says which of them the tests see."""

import ast
import difflib
from pathlib import Path

import pytest
import torch

from tests import mutants
from tests.mutants import PLANS, ROOT, Lab, Mutant, Stage, is_numeric, named_mutants, random_mutants, verdict
from tests.support.defects import EQUIVALENT, NAMED

TEXTS = {file: (ROOT / file).read_text() for file in PLANS}


def test_named_defects_fit_the_code() -> None:
    mutants = named_mutants(TEXTS)
    assert len(mutants) == len(NAMED) >= 40 and len({(m.file, m.name) for m in mutants}) == len(NAMED)
    for mutant in mutants:
        ast.parse(mutant.apply(TEXTS[mutant.file]))
    file = NAMED[0].file
    with pytest.raises(SystemExit, match=f"{NAMED[0].name}: its snippet stands 2 times in {file}, expected once"):
        named_mutants({**TEXTS, file: TEXTS[file] * 2})


@pytest.mark.parametrize("file", PLANS)
def test_random_mutants_change_one_place(file: str) -> None:
    text, mutants = TEXTS[file], random_mutants(file, TEXTS[file])
    assert mutants == random_mutants(file, text) and len(mutants) == len(set(mutants))
    assert len({mutant.apply(text) for mutant in mutants} | {text}) == len(mutants) + 1
    tree = ast.dump(ast.parse(text))
    for mutant in mutants[::10]:
        mutated = mutant.apply(text)
        assert ast.dump(ast.parse(mutated)) != tree
        assert len(mutated) - len(text) == len(mutant.new) - len(mutant.old)


def test_what_random_mutants_leave_alone() -> None:
    text = (
        'LIMIT = 3\n\n\ndef f(a: "list[2]" = 4, *, b=1) -> "int[5]":\n    """Adds 6."""\n    assert a == 7\n'
        "    if a < 8:\n        raise ValueError(9)\n    # and 10\n    g(num_warps=11, mask=(a < b) & (b != a))\n"
        "    return tl.where(a, b, -a)\n\n\ndef f_fake(a):\n    return a + 12\n"
    )
    changed = []
    for mutant in random_mutants("file.py", text):
        old, new = text.splitlines(), mutant.apply(text).splitlines()
        (line,) = (line[2:].strip() for line in difflib.ndiff(old, new) if line.startswith("+ "))
        changed.append(line)
    call = "g(num_warps=11, mask="
    assert sorted(changed) == sorted(
        [
            "LIMIT = 4",
            'def f(a: "list[2]" = 5, *, b=1) -> "int[5]":',
            'def f(a: "list[2]" = 4, *, b=0) -> "int[5]":',
            *(f"{call}{mask})" for mask in ("(a <= b) & (b != a)", "(a < b) & (b == a)", "(a < b) | (b != a)")),
            *(f"{call}{mask})" for mask in ("(a < b)", "(b != a)")),
            "return tl.where(a, -a, b)",
            "return tl.where(a, b, a)",
        ]
    )


def test_explained_mutants_exist() -> None:
    for file, old, new in EQUIVALENT:
        mutants = (m for m in random_mutants(file, TEXTS[file]) if m.lines(TEXTS[file])[1:] == (old, new))
        assert any(mutants), f"{file}: no mutant makes {new!r} of {old!r}"


def test_a_defect_is_killed_and_a_comment_survives(tmp_path: Path) -> None:
    file = "moe/ops/routing.py"
    lab = Lab(tmp_path, {file: (Stage(("tests/ops/test_routing.py",), ("bias_only_selects", "refused[half")),)})
    old = "choice = scores if"
    mutants = [
        Mutant(file, TEXTS[file].rindex(old), old, new) for new in ("choice  =  scores if", "choice = -scores if")
    ]
    assert [lab.judge(mutant).verdict for mutant in mutants] == ["survived", "killed"]
    assert (ROOT / file).read_text() == TEXTS[file] and [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_only_assertions_of_tests_count() -> None:
    def different() -> None:
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))

    def unlike() -> None:
        assert torch.zeros(1).any()

    def of_the_code() -> None:
        exec(compile("assert False", "moe/ops/mlp.py", "exec"))

    def at_import() -> None:
        import moe.opps  # noqa: F401  # pyright: ignore[reportMissingImports]

    def not_raised() -> None:
        with pytest.raises(ValueError):
            pass

    for function, expected in {
        different: True,
        unlike: True,
        of_the_code: False,
        at_import: False,
        not_raised: False,
    }.items():
        with pytest.raises(BaseException) as found:
            function()
        assert is_numeric(found) == expected, function.__name__


def test_only_the_tests_of_this_tree_count(tmp_path: Path) -> None:
    """A checkout below a folder called tests is no test for that."""
    for path, expected in {
        tmp_path / "tests" / "mlp.py": False,
        ROOT / "moe" / "tests" / "mlp.py": False,
        ROOT / "tests" / "ops" / "test_ops.py": True,
    }.items():
        with pytest.raises(AssertionError) as found:
            exec(compile("assert False", str(path), "exec"))
        assert is_numeric(found) == expected, path


def campaign_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr("sys.argv", ["mutants", *arguments])
    with pytest.raises(SystemExit) as stop:
        mutants.main()
    return stop.value.code


def test_bad_arguments_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--named"], [], ["--list"]):
        assert campaign_of(monkeypatch, *arguments, "--file", "nosuch") == 2
        shown = capsys.readouterr()
        assert "--file nosuch: no mutants, expected a part of moe/ops/" in shown.err and not shown.out
    for option in ("--count", "--jobs"):
        for wrong in ("0", "-1", "x", "9" * 5000):
            assert campaign_of(monkeypatch, option, wrong) == 2
            assert "is not a positive integer" in capsys.readouterr().err


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("as_completed", "random_mutants", "Lab.__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(Lab, "judge", lambda *_: mutants.Outcome("survived", ""))
            patch.setattr(f"tests.mutants.{place}", interrupted)
            assert campaign_of(monkeypatch, "--count", "2", "--file", "matmul") == 130
        assert "interrupted\n" in capsys.readouterr().out


def test_verdicts() -> None:
    start, good = {"test": "a"}, {"test": "a", "error": "", "numeric": False}
    error, numeric = good | {"error": "TypeError"}, good | {"error": "AssertionError", "numeric": True}
    assert verdict([start, good]).verdict == "survived"
    assert verdict([start, error, start, numeric]).verdict == "killed"
    assert verdict([start, error, start, good]).why == "TypeError"
    assert verdict([start, good | {"error": "AssertionError"}]).verdict == "broken"  # one of the code under test
    assert verdict([start, start, good]).why == "crash or hang"
