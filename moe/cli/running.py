"""Options and execution of the commands that run in a folder: train, sft, distill."""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from moe.cli.options import Option, option
from moe.errors import CheckpointError, ConfigError, ParallelError
from moe.train.launcher import is_first, reported_once
from moe.train.settings import RunSettings, check_kind

if TYPE_CHECKING:
    from rich.console import Console

    from moe.parallel import Mesh
    from moe.train.lifecycle import Run


# Before the settings among the bases of an `Args`, so that these fields come last. It derives from no settings, because
# its copies of their fields would replace those that the settings of a command define again.
@dataclass(frozen=True)
class RunArgs:
    """Options that every run has beside its settings."""

    preset: Annotated[str | None, Option("NAME")] = None
    set: Annotated[tuple[str, ...], Option("FIELD=VALUE", repeated=True)] = ()
    log: Annotated[Literal["tensorboard", "wandb"] | None, Option(alias="--log-to")] = None
    out: Path | None = None
    """Folder of the run: saved states, metrics, plots and checkpoint. Default: runs/MODEL."""
    resume: Annotated[bool, Option("[RUN]")] = False
    """Resume the run in --out; the original options must be given again. With RUN, resume the run in that folder, with
    its options. --steps may differ."""
    auto_resume: bool = False
    """Resume the run in --out if there is one, otherwise start it; for jobs that are requeued."""
    overwrite: bool = False
    """Delete an earlier run in --out and start over."""
    json: bool = False
    """Print one JSON object on standard output instead of tables; everything else goes to standard error."""

    def __post_init__(self) -> None:
        """Do nothing: `moe.cli.options.parse` calls `check`."""

    @classmethod
    def expand(cls, words: Sequence[str]) -> list[str]:
        """The arguments, with --resume RUN replaced by the options of that run that are not given again.

        Raises ConfigError if RUN is not the folder of a run.
        """
        found = [i for i, word in enumerate(words) if word == "--resume" or word.startswith("--resume=")]
        if not found:
            return list(words)
        at, (_, equals, run) = found[0], words[found[0]].partition("=")
        rest = [*words[:at], *words[at + 1 :]]
        if not equals:
            if not words[at + 1 : at + 2] or words[at + 1].startswith("-"):
                return list(words)
            run = rest.pop(at)
        rest = ["--log" if word == "--log-to" else word for word in rest]
        given = {re.sub("^no_", "", word[2:].partition("=")[0].replace("-", "_")) for word in rest if word[:2] == "--"}
        if "out" in given:
            raise ConfigError("--resume", run, "no folder together with --out")
        own = cast(type[RunSettings], cls).own()
        try:
            values = dict(json.loads((Path(run) / "settings.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise ConfigError("--resume", run, "the folder of a run") from None
        check_kind(values, own.kind)
        try:
            settings = own.from_deciding(values)
        except (ValueError, TypeError):
            raise ConfigError("--resume", run, "the folder of a run") from None
        return [*settings.options(without=given), *rest, "--resume", "--out", run]


def run_command(
    make: "Callable[[Path], Run[Any, Any]]",
    settings: RunSettings,
    args: RunArgs,
    show: "Callable[[Console, dict[str, Any]], None]",
) -> int:
    """Run `make(folder)`, and print its summary; return the exit status.

    Args:
        make: imports torch and returns the run in a folder.
        settings, args: the two parts of the options of the command.
        show: prints the summary, unless it is printed as JSON.
    """
    # OpenMP reads this when torch is imported. By default its threads spin while they wait for each other: on two cores
    # shared with another process, training ran four to eight times slower than with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from rich.console import Console

    from moe.train.lifecycle import Interrupted, run_in_folder
    from moe.train.loop import NonFiniteError

    _check_device(settings.device)
    if args.resume and args.overwrite:
        raise ConfigError("--overwrite", None, "no --resume, which keeps the run")
    folder = args.out or settings.default_folder
    try:
        with reported_once(Interrupted, NonFiniteError, CheckpointError), _ranks(settings) as mesh:
            # torchrun repeats the original command when it restarts all ranks because one has died.
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            again = (args.auto_resume or restarted) and (folder / "settings.json").exists()
            progress = Console(stderr=True, quiet=not is_first())
            resume, overwrite = args.resume or again, args.overwrite and not again
            summary = run_in_folder(make(folder), resume=resume, overwrite=overwrite, console=progress, mesh=mesh)
    except Interrupted as stop:
        command = shlex.join([*_program(), settings.kind, *settings.options(), "--out", str(folder), "--resume"])
        print(f"stopped after step {stop.step}, saved; resume with: {command}", file=sys.stderr)
        if args.json and is_first():
            print(json.dumps({"interrupted": signal.Signals(stop.signum).name, "step": stop.step, "resume": command}))
        return 128 + stop.signum
    except NonFiniteError as error:
        print(f"moesmith {settings.kind}: {error}", file=sys.stderr)
        return 2
    if summary is None:
        return 0
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        show(Console(), summary)
    return 0


def _program() -> list[str]:
    """The program that started the run, as far as its processes know."""
    if "RANK" not in os.environ:
        return ["moesmith"]
    nodes, each = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    where = ["--standalone"] if nodes == "1" else ["--nnodes", nodes, "--rdzv-endpoint", "HOST:PORT"]
    return ["torchrun", *where, "--nproc-per-node", each, "-m", "moe"]


@reported_once(ConfigError)
def _check_device(device: str) -> None:
    """Called before anything is written and before any rank waits for another."""
    if device != "cuda":
        return
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= processes:
        return
    each = f" for each of the {processes} processes on this node" if processes > 1 else ""
    raise ConfigError("--device", device, f"a GPU{each}; found {found or 'none'} usable by torch {torch.__version__}")


@contextlib.contextmanager
def _ranks(settings: RunSettings) -> "Iterator[Mesh | None]":
    """The mesh of the ranks that torchrun has started; None without torchrun."""
    if "RANK" not in os.environ:
        for name in ("ep", "dp_shard", "dp_replicate"):
            if getattr(settings, name) not in (None, 1):
                allowed = f"1 without torchrun (torchrun --nproc-per-node N -m moe {settings.kind} ...)"
                raise ConfigError(option(name), getattr(settings, name), allowed)
        yield None
        return
    from moe.parallel import make_mesh, start

    # torch sets this in deterministic mode, which begins only after the NCCL groups exist.
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    with start(timeout=settings.timeout, device=settings.device) as job:
        shape = {"ep": settings.ep, "dp_shard": settings.dp_shard, "dp_replicate": settings.dp_replicate}
        with reported_once(ParallelError):
            mesh = make_mesh(**shape, log=job.log)
        yield mesh
