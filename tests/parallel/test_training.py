"""`torchrun -m moe train` on several processes trains like one, and any number of them can resume it."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe
from moe.cli import main
from tests.support.examples import sums, tokenizer_folder, write_examples

ROOT = Path(__file__).parents[2]
STEPS = 8
# AdamW, because the bf16 products of Muon amplify rounding differences of the gradient.
OPTIONS = ["--steps", STEPS, "--batch-size", 4, "--seq-length", 32, "--eval-every", 4, "--save-every", 2, "--keep", 9]
OPTIONS += ["--optimizer", "adamw", "--document-mask"]
MOE, ONE_NODE = ("-m", "moe"), ("--standalone",)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(20):
        words = rng.choice(["model", "expert", "token", "router", "gate", "loss", "step", "of", "in", "is"], (4, 60))
        (folder / f"{i:02}.txt").write_text("\n\n".join(" ".join(row) + "." for row in words))
    return folder


def arguments(text: Path, out: Path, *more: Any) -> list[str]:
    return ["train", "--preset", "tiny", "--data", str(text), *map(str, OPTIONS), "--out", str(out), *map(str, more)]


# `python -m moe`, whose last rank is killed once, after its third step.
KILLED = """
import os, signal, sys
from moe.cli import main
from moe.train.loop import Trainer

take_step = Trainer.step

def step(trainer):
    report = take_step(trainer)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and trainer.step_number == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return report

Trainer.step = step
sys.exit(main(sys.argv[1:]))
"""


# Prefix of a program that delays stderr of the first process of each node until torchrun has seen the others exit. Its
# line is lost if torchrun then ends it because of their status.
LATE = """
import os, sys, time

class Late:
    def __init__(self, file):
        self.file, self.seconds = file, 2

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        time.sleep(self.seconds)
        self.seconds = 0
        return self.file.write(text)

if os.environ["LOCAL_RANK"] == "0":
    sys.stderr = Late(sys.stderr)
"""


def torchrun(
    ranks: int,
    argv: list[str],
    *options: str,
    program: tuple[str, ...] = MOE,
    nodes: tuple[str, ...] = ONE_NODE,
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(ranks), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "CUDA_VISIBLE_DEVICES": ""}
    # Ignore warnings of the launcher itself.
    command = [command[0], "-W", "ignore", *command[1:]]
    return subprocess.Popen(
        [*command, *program, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=240)
    assert (process.returncode == 0) == (status == 0), err[-6000:]
    if status:  # torchrun exits with 1; it reports the first failure last
        assert re.findall(r"exitcode  : (-?\d+)", err)[-1] == str(status), err[-6000:]
    return out + err


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "moe", *arguments(text, out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    """Compare runs, up to the order of summation in float32 over some steps."""
    for one, other in zip(records(found), records(expected), strict=True):
        assert one["kind"] == other["kind"] and one["step"] == other["step"]
        for name in {"ce", "mtp", "balance", "kl", "nats_per_token", "lr", "grad_norm"} & (one.keys() | other.keys()):
            assert one[name] == pytest.approx(other[name], rel=2e-4), (name, one["step"])
        if one["kind"] == "train":
            assert one["max_vio"] == pytest.approx(other["max_vio"], abs=0.05)
    models = [moe.load(folder / "checkpoint") for folder in (found, expected)]
    start = moe.Transformer(models[1].config, seed=0)
    for (name, one), (_, other) in zip(*(model.state_dict().items() for model in models), strict=True):
        distance = (other - start.state_dict()[name]).norm()
        assert (one - other).norm() <= 0.02 * distance, name


def test_ranks_train_as_one_process_and_another_number_resumes(text: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = finish(torchrun(2, arguments(text, out, "--ep", 2)))
    assert "2 ranks: EP 2" in said and said.count(" training tokens of ") == 1
    assert_same_run(out, alone)
    assert json.loads((out / "summary.json").read_text())["sample"]["text"]

    # One process resumes from these states, and two processes with other shards from those of the one.
    for folder in sorted((out / "states").iterdir())[1:]:
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert main(arguments(text, out, "--resume")) == 0
    assert_same_run(out, alone)
    for folder in sorted((out / "states").iterdir())[2:]:
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert "resuming after step 4 of 8" in finish(torchrun(2, arguments(text, out, "--resume")))
    assert_same_run(out, alone)


def test_ranks_distill_as_one_process(tmp_path: Path) -> None:
    """Packed rows and a teacher, whose experts are divided as well; the evaluation has an odd number of rows."""
    folder = tokenizer_folder(tmp_path / "teacher")
    examples = str(write_examples(tmp_path / "x.jsonl", sums(60)))
    teacher = moe.Transformer(replace(moe.preset("tiny"), vocab_size=261), seed=3)
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    teacher.carried_files = {name: (folder / name).read_bytes() for name in names}
    teacher.save(tmp_path / "model")
    few = "--preset tiny --steps 2 --batch-size 4 --seq-length 32 --eval-every 0 --warmup 1 --optimizer adamw"
    argv = ["distill", "--teacher", str(tmp_path / "model"), "--data", examples, *few.split(), "--out"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    rows = json.loads((tmp_path / "one" / "data" / "examples.json").read_text())["validation"]["tokens"] / 32
    assert 2 < rows < 3, "three rows, of which the second rank gets one"
    said = finish(torchrun(2, [*argv, str(tmp_path / "two"), "--ep", "2"]))
    assert "2 ranks: EP 2" in said and said.count("training examples") == 1
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert all("kl" in record for record in records(tmp_path / "two") if record["kind"] == "train")


def test_a_killed_rank_is_restarted_and_the_run_resumes(text: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    options = arguments(text, out, "--ep", 2, "--timeout", 20)
    said = finish(torchrun(2, options, "--max-restarts", "1", program=(str(program),)))
    assert "resuming after step 2 of 8" in said
    assert_same_run(out, alone)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--batch-size", 3), "train: --batch-size: expected a multiple of the 2 ranks; found 3"),
        (("--ep", 3), "train: --ep: expected a divisor of the 2 ranks; found 3"),
        (("--dp-shard", 4), "dp_replicate x dp_shard = 1 x 4: expected 2, the number of ranks"),
        (("--resume",), "expected the folder of a run"),
        (("--optimizer", "sgd"), "--optimizer: expected one of adamw, muon"),
        (("--device", "cuda"), "expected a GPU for each of the 2 processes on this node"),
    ],
)
def test_errors_are_printed_once(more: tuple[Any, ...], expected: str, text: Path, tmp_path: Path) -> None:
    out, program = tmp_path / "run", tmp_path / "late.py"
    program.write_text(LATE + "from moe.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    said = finish(torchrun(2, arguments(text, out, *more), program=(str(program),)), status=2)
    assert said.count(expected) == 1, said
    assert "Traceback" not in said.split(expected)[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--optimizer", "sgd"), "--optimizer: expected one of adamw, muon"),
        (("--batch-size", 6), "--batch-size: expected a multiple"),
    ],
)
def test_errors_are_printed_once_on_each_node(more: tuple[Any, ...], expected: str, text: Path, tmp_path: Path) -> None:
    out, program = tmp_path / "run", tmp_path / "late.py"
    program.write_text(LATE + "from moe.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--node-rank")
    argv = arguments(text, out, *more)
    nodes = [torchrun(2, argv, program=(str(program),), nodes=(*where, str(node))) for node in range(2)]
    for node in nodes:
        said = finish(node, status=2)
        assert said.count(expected) == 1, said


def test_an_interrupted_run_prints_once_how_to_resume(text: Path, tmp_path: Path) -> None:
    out, program = tmp_path / "run", tmp_path / "stopped.py"
    program.write_text(LATE + KILLED.replace("SIGKILL", "SIGTERM"))
    options = arguments(text, out, "--ep", 2, "--json")
    said = finish(torchrun(2, options, program=(str(program),)), status=143)
    assert said.count("stopped after step 3, saved; resume with: torchrun") == 1, said
    assert said.count('"interrupted": "SIGTERM"') == 1, said


def test_ranks_without_torchrun_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(text, tmp_path / "run", "--ep", 2)) == 2
    assert "--ep: expected 1 without torchrun" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_this_process_has_no_process_group() -> None:
    assert not torch.distributed.is_initialized()
