"""Run the test suite with the oldest dependencies that pyproject.toml allows.

    python -m tests.oldest                                   the whole suite
    python -m tests.oldest tests/cli/test_cli.py -k verify   some tests
    python -m tests.oldest --keep DIR                        keep the environment, or reuse it

A virtual environment contains the project and the minimum version of every dependency, including those of extras.
Indirect dependencies are as new as they allow.

Only torch is not at its minimum: it is the CPU build of 2.13.0, because a CUDA build requires a version of Triton that
is not the minimum.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TORCH = "2.13.0"


class OldestError(Exception):
    """The environment could not be built."""


def minimum_versions(pyproject: str) -> dict[str, Version]:
    """Return the minimum version of each dependency on this platform, by its normalised name.

    If several groups name a dependency, the highest minimum counts. Raises OldestError for a dependency of any platform
    without exactly one `>=`, or with a `==`.
    """
    project = tomllib.loads(pyproject)["project"]
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    minima: dict[str, Version] = {}
    for group, texts in groups.items():
        for requirement in map(Requirement, texts):
            lower = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
            if len(lower) != 1 or any(each.operator in ("==", "===", "~=") for each in requirement.specifier):
                found = str(requirement.specifier) or "no version"
                raise OldestError(f"pyproject.toml: {group}: {requirement.name}: expected one >=VERSION; found {found}")
            if requirement.marker is None or requirement.marker.evaluate():
                name = canonicalize_name(requirement.name)
                minima[name] = max(lower[0], minima.get(name, lower[0]))
    return minima


def run(*command: str | Path) -> int:
    """Run a command in the repository without PYTHONPATH; return its exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # a terminal interrupts the child, too
            process.terminate()
            raise


def build(folder: Path, wanted: dict[str, Version]) -> Path:
    """Build or reuse an environment with exactly these versions in `folder`; return its Python."""
    python = folder / "bin" / "python"
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise OldestError(f"{folder}: expected a virtual environment, an empty folder or none; found other files")
    if not python.exists() and run(sys.executable, "-m", "venv", folder):
        raise OldestError(f"{folder}: the virtual environment could not be created; the reason is above")
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    pins = [f"{name}=={version}" for name, version in wanted.items()]
    print("+ pip install", *pins, flush=True)
    for step in (("install", "-q", *pins), ("install", "-q", "--no-deps", "-e", str(ROOT)), ("check",)):
        if run(*pip, *step):
            raise OldestError(f"{folder}: pip {step[0]} failed; the reason is above")
    listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True, check=True).stdout
    found: dict[str, Version] = {
        canonicalize_name(each["name"]): Version(each["version"]) for each in json.loads(listed)
    }
    for name, version in wanted.items():
        if name not in found or Version(found[name].public) != version:  # without "+cpu"
            raise OldestError(f"{folder}: {name}: expected {version}; found {found.get(name, 'none')}")
    return python


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.oldest",
        usage="%(prog)s [-h] [--keep DIR] [-n N] [ARGUMENT ...]",
        description=f"{str(__doc__).partition(chr(10))[0]} Other arguments go to pytest; the exit status is pytest's.",
        epilog=f"torch stays at {TORCH}, the CPU build. Without --keep the environment is temporary, in $TMPDIR.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="Keep the environment in DIR, or reuse it (default: temporary)"
    )
    parser.add_argument("-n", metavar="N", default="2", help="Number of pytest processes (default: 2)")
    options, others = parser.parse_known_args(arguments)
    try:
        wanted = minimum_versions((ROOT / "pyproject.toml").read_text()) | {"torch": Version(TORCH)}
        with contextlib.ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oldest-")))
            return run(build(folder.absolute(), wanted), "-m", "pytest", "-n", options.n, *others)
    except OldestError as error:
        print(f"tests.oldest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
