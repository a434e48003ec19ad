"""Another commit's model in a process of its own, which computes only while it is asked."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import cpu_work
from benchmarks.cpu_work import KINDS, Sizes
from benchmarks.harness import ROOT, BadInput, one_line
from moe import Transformer


def resolve(commit: str) -> str:
    """The full hash of a commit of this repository. Raises BadInput."""
    try:
        found = run_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise BadInput(f"--against: git cannot be run: {one_line(error)}") from None
    if found.returncode:
        raise BadInput(f"--against: unknown commit; expected a commit of {ROOT}; found {commit}")
    return found.stdout.strip()


def run_git(*args: str) -> subprocess.CompletedProcess[str]:
    # In a session of its own, because Ctrl-C would end it halfway.
    command = ["git", "-C", str(ROOT), "-c", "core.hooksPath=/dev/null", *args]
    return subprocess.run(command, capture_output=True, text=True, start_new_session=True)


@contextlib.contextmanager
def other_commit(commit: str) -> Iterator["OtherCommit"]:
    """Check the commit out into a temporary folder, and start its process; afterwards nothing remains of both."""
    root, other = Path(tempfile.mkdtemp(prefix="moesmith-against-")), None
    try:
        done = run_git("worktree", "add", "--detach", str(root / "tree"), commit)
        if done.returncode:
            raise BadInput(f"--against {commit[:8]}: {one_line(ValueError(done.stderr))}")
        other = OtherCommit(commit, root)
        yield other
    finally:
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
        if other is not None:
            other.close()
        # Forced twice, because git locks a folder until it is complete.
        removed = run_git("worktree", "remove", "--force", "--force", str(root / "tree")).returncode == 0
        shutil.rmtree(root, ignore_errors=True)
        if not removed:
            run_git("worktree", "prune")
        signal.signal(signal.SIGINT, ignored)


class OtherCommit:
    """The process, with the methods of `Task`. Errors of the process raise BadInput.

    Attributes: name (the shortened commit), process, cpu (seconds of CPU time that it has used).
    """

    kinds = KINDS

    def __init__(self, commit: str, root: Path) -> None:
        self.name, self.cpu = commit[:8], 0.0
        self._root, self._log = root, root / "log"
        tree = root / "tree"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", cpu_work.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=root,
                env={**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}"},
            )

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.communicate()

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        if not answer:
            said = self._log.read_text(errors="replace").splitlines()[-1:]
            reason = f"its process ended with exit status {self.process.wait()}"
            answer["error"] = ": ".join([reason, *said])
        if "error" in answer:
            raise BadInput(f"--against {self.name}: {do}: {one_line(ValueError(answer['error']))}")
        self.cpu = answer["cpu"]
        return answer

    def build(self, model: Transformer, dtype: str, ids: Tensor, sizes: Sizes) -> None:
        """Build the model with the same weights, for the work on these ids."""
        file = self._root / "weights.safetensors"
        try:
            cpu_work.save(model.state_dict(), str(file))
        except (OSError, SafetensorError) as error:  # the disk is full
            raise BadInput(f"--against {self.name}: {file}: {one_line(error)}") from None
        threads, values = torch.get_num_threads(), {"ids": ids.tolist(), "sizes": dataclasses.asdict(sizes)}
        built = self._ask(
            "build", dtype=dtype, config=cpu_work.settings(model.config), weights=str(file), threads=threads, **values
        )
        file.unlink()
        found, tree = Path(built["moe"]).resolve(), (self._root / "tree").resolve()
        if not found.is_relative_to(tree):
            raise BadInput(f"--against {self.name}: another moe was imported; expected one in {tree}; found {found}")

    def logits(self, work: str) -> Tensor:
        return self._tensors("logits", work=work)["logits"]

    def gradients(self) -> dict[str, Tensor]:
        return self._tensors("gradients")

    def _tensors(self, do: str, **request: Any) -> dict[str, Tensor]:
        file = self._root / f"{do}.safetensors"
        self._ask(do, file=str(file), **request)
        found = load_file(file)
        file.unlink()
        return found

    def call(self, work: str) -> Callable[[], float]:
        """A call that returns the seconds of the work in the process."""
        return lambda: self._ask("time", work=work)["seconds"]
