"""Tests how `python -m tests.oldest` reads pyproject.toml; no environment is built."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from tests.oldest import ROOT, OldestError, main, minimum_versions

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_every_dependency_states_a_minimum() -> None:
    project = tomllib.loads(PYPROJECT)["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    names = {re.split("[^a-z0-9-]", text)[0] for text in texts}
    minima = minimum_versions(PYPROJECT)
    assert set(minima) == names and {"torch", "triton", "transformers", "ruff"} <= names
    assert all(f"{name}>={version}" in re.sub(r"\s", "", PYPROJECT) for name, version in minima.items())


def pyproject(core: str, extra: str = "b>=1") -> str:
    return f'[project]\ndependencies = ["{core}"]\noptional-dependencies = {{ test = ["{extra}"] }}'


def test_minimum_versions() -> None:
    two = pyproject("Some_Name>=1.9; python_version >= '3'", "some-name>=1.10,<2,!=1.11")
    assert minimum_versions(two) == {"some-name": Version("1.10")}
    elsewhere = pyproject("a>=1; sys_platform == 'elsewhere'")
    assert minimum_versions(elsewhere) == {"b": Version("1")}


@pytest.mark.parametrize(
    ("specifier", "found"),
    [("", "no version"), ("<2", "<2"), ("==1.2", "==1.2"), (">=1,>=2", ".*"), (">=1,~=1.2", ".*")],
)
@pytest.mark.parametrize("marker", ["", "; sys_platform == 'elsewhere'"])
def test_a_dependency_without_one_minimum_is_named(specifier: str, found: str, marker: str) -> None:
    match = f"^pyproject.toml: dependencies: name: expected one >=VERSION; found {found}$"
    with pytest.raises(OldestError, match=match):
        minimum_versions(pyproject(f"name{specifier}{marker}"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--keep", str(tmp_path)]) == 1
    error = f"tests.oldest: {tmp_path}: expected a virtual environment, an empty folder or none; found other files\n"
    assert capsys.readouterr().err == error and [path.name for path in tmp_path.iterdir()] == ["file"]
