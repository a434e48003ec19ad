"""Run of any kind in one folder: lock, saved states, resume, interruption, metrics, checkpoint."""

import contextlib
import json
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from rich.console import Console

from moe.checkpoint.writing.atomic import locked
from moe.config import ModelConfig
from moe.counts import count_parameters
from moe.errors import CheckpointError, ConfigError
from moe.model import Block, Transformer
from moe.train.architecture import read_architecture
from moe.train.data import write_json
from moe.train.logs import check_log, open_log
from moe.train.loop import BaseTrainer, check_savable, deterministic, uncompiled
from moe.train.memory import check_memory
from moe.train.metrics import Metrics
from moe.train.report import ProgressDisplay, say
from moe.train.settings import RunSettings, check_kind
from moe.train.state import is_safetensors_state, load_latest_state
from moe.train.tokenizer import check_vocabulary
from moe.train.world import World, world_of

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh

_Settings = TypeVar("_Settings", bound=RunSettings)
_Trainer = TypeVar("_Trainer", bound=BaseTrainer)


class Interrupted(Exception):
    """Interruption of a run by a signal, after its state was saved. Attributes: signum, step, state (folder)."""

    def __init__(self, signum: int, step: int, state: Path) -> None:
        self.signum, self.step, self.state = signum, step, state
        super().__init__(f"{signal.Signals(signum).name}: step {step} is saved in {state}")


class Run(ABC, Generic[_Settings, _Trainer]):
    """What differs between the kinds of runs: the data, the trainer and the summary.

    Args:
        settings: settings of the run.
        folder: folder of the run, to which only rank 0 writes.
    """

    def __init__(self, settings: _Settings, folder: Path) -> None:
        self.settings, self.folder = settings, named(folder)

    @abstractmethod
    def prepare(self) -> None:
        """Write the data to the folder, on rank 0 only, unless it is complete already.

        Raises ConfigError or CheckpointError for a mistake of the user, after which a new folder is removed again.
        """

    @abstractmethod
    def build(self, world: World, device: torch.device) -> _Trainer:
        """Build the trainer, on every rank, from what `prepare` wrote. It calls `build_model`."""

    @abstractmethod
    def describe(self, trainer: _Trainer) -> Iterable[str]:
        """Lines about the data, printed before the first step."""

    @abstractmethod
    def summary(self, trainer: _Trainer, metrics: Metrics, model: Transformer) -> dict[str, Any]:
        """JSON values for summary.json, beside those of every run; on rank 0 only. Also writes plots.

        Args:
            trainer: what `build` returned. Calling its model would wait for the other ranks.
            model: the trained model, whole, which rank 0 can call.
        """

    def check(self, config: ModelConfig, world: World, device: torch.device) -> None:
        """Raise ConfigError if the run cannot work, before anything is written."""
        settings = self.settings
        check_savable(config)
        if settings.seq_length > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ConfigError("--seq-length", settings.seq_length, f"at most the model's {limit} positions")
        default = type(settings).bias_update_speed
        biased = config.has_experts and config.topk_method == "noaux_tc"
        if not biased and settings.bias_update_speed != default:
            problem = f"the default {default}: {settings.name} has no correction bias"
            raise ConfigError("--bias-update-speed", settings.bias_update_speed, problem)
        if settings.ep > 1 and not config.has_experts:
            raise ConfigError("--ep", settings.ep, "1 for a model without experts")
        if settings.dispatch != "same" and settings.ep == 1:
            raise ConfigError("--dispatch", settings.dispatch, "same if --ep is 1")
        if settings.init is not None:
            option = "--init" if settings.tokenizer is None else "--tokenizer"
            check_vocabulary(settings.tokenizer or settings.init, config.vocab_size, option)
        check_memory(config, settings, ranks=world.size, device=device)

    def architecture(self) -> ModelConfig:
        """Return the config with which the run started; before the start, that of the settings."""
        file = self.folder / "model.json"
        return ModelConfig.from_dict(json.loads(file.read_text())) if file.exists() else self.new_architecture()

    def new_architecture(self) -> ModelConfig:
        """Return the config of the settings."""
        return read_architecture(self.settings)

    def write_architecture(self) -> ModelConfig:
        """Write the config with which the run starts to the folder, and return it."""
        config = self.architecture()
        write_json(self.folder / "model.json", config.to_dict())
        return config

    def build_model(self, config: ModelConfig, world: World, device: torch.device) -> Transformer:
        """Build a model of `config`, or load that of --init, after checking the memory. Seeds torch's generator."""
        settings = self.settings
        check_memory(config, settings, ranks=world.size, device=device, vocab_size=config.vocab_size)
        torch.manual_seed(settings.seed)
        return world.build(config, settings)


def run_in_folder(
    run: Run[Any, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    mesh: "Mesh | None" = None,
) -> dict[str, Any] | None:
    """Run or resume, and return the summary that is also written to summary.json.

    Writes to the folder: settings.json, model.json (the `ModelConfig`), states/ (see `moe.train.state`), metrics.jsonl,
    checkpoint/ (Hugging Face layout), summary.json, and what the kind of run adds.

    A run that was ended by a signal or a crash continues with `resume` from its last saved state. Its result is
    bit-identical to that of an uninterrupted run on the same machine with the same number of threads. If `steps` has
    changed, the learning rate follows the schedule of the new length from there.

    On a mesh every rank calls this function with the same shared folder. Rank 0 writes to it, except that each rank
    writes its part of the states (see `moe.parallel.StateWriter`), from which any other mesh or a single process can
    resume. Losses and counts equal those of a single process with the same settings, up to the order of sums. Other
    ranks return None.

    Raises:
        ConfigError: invalid settings, data or folder.
        CheckpointError: another run uses the folder, or a save failed.
        Interrupted: SIGINT or SIGTERM, after the current step was finished and saved; a second signal kills.
        NonFiniteError: see `moe.train.loop`.
        SystemExit: on a mesh, for an error found before the first step, except in the first process of a node.
    """
    started = time.perf_counter()
    settings, folder = run.settings, run.folder
    world, device = world_of(mesh), torch.device(settings.device) if mesh is None else mesh.device
    first = world.rank == 0
    overwritten, was_empty = _overwritten(folder), False
    with deterministic(), contextlib.ExitStack() as held:
        with world.together():
            config = run.architecture() if resume else run.new_architecture()
            run.check(config, world, device)
        with world.together():
            if first:
                check_log(settings.log)
                if not folder.parent.exists():
                    folder.parent.mkdir(parents=True)
                    held.callback(_remove_if_empty, folder.parent)  # if a later check fails
                held.enter_context(locked(folder, "another run is using this folder"))
                was_empty = folder.is_dir() and not any(folder.iterdir())
                _open_folder(folder, settings, resume=resume, overwrite=overwrite)
        try:
            with world.together():
                if first:
                    run.prepare()
            with world.together():
                trainer = run.build(world, device)
                _compile(trainer)
            if resume:
                _load_state(trainer, folder / "states", console)
            with world.together():
                extended = _extend(folder, settings, trainer) if first and resume else None
                log = held.enter_context(open_log(settings, folder, trainer.step_number) if first else nullcontext())
        except BaseException:
            if first and not resume:
                # Nothing was done there yet, and the next attempt needs the name.
                if was_empty:  # a folder of the user's, perhaps the current one
                    _clear(folder)
                else:
                    shutil.rmtree(folder)
                if overwritten.exists():
                    os.replace(overwritten, folder)
            raise
        if first and overwritten.exists():
            shutil.rmtree(overwritten)
        settings = trainer.settings
        say(console, f"model: {describe_model(trainer)}; {settings.device}, {settings.dtype}; {folder}")
        for line in run.describe(trainer):
            say(console, line)
        if world.launched:
            say(console, str(mesh))
        if resume:
            say(console, extended or f"resuming after step {trainer.step_number} of {settings.steps}")
        metrics = Metrics(folder / "metrics.jsonl" if first else Path(os.devnull), trainer.step_number, log)
        with (
            _stop_signals(console, once_more_kills=not world.launched) as stopped,
            ProgressDisplay(console, settings.steps, trainer.step_number) as display,
        ):
            _run_steps(trainer, metrics, folder / "states", display, stopped)
        trainer.model.eval()
        with uncompiled(settings):  # generation would compile for every length
            model = world.export(trainer.model, folder / "checkpoint")
            if model is None:
                return None
            summary = {
                "folder": str(folder),
                "checkpoint": str(folder / "checkpoint"),
                "metrics": str(metrics.file),
                "steps": trainer.step_number,
                "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
                **run.summary(trainer, metrics, model),
                "seconds": time.perf_counter() - started,
            }
        write_json(folder / "summary.json", summary)
        return summary


def describe_model(trainer: BaseTrainer) -> str:
    """The model's name, changed fields and size."""
    name, counts = " ".join((trainer.settings.name, *trainer.settings.set)), count_parameters(trainer.model.config)
    return f"{name}, {counts.with_mtp:,} parameters, {counts.activated:,} activated"


def _compile(trainer: BaseTrainer) -> None:
    """Compile the model with --compile.

    Per block, because blocks of one kind share compiled code. Static shapes, so that the bits of a step do not depend
    on what was compiled before.
    """
    if trainer.settings.compile:
        for block in trainer.model.modules():
            if isinstance(block, Block):
                block.compile(dynamic=False)


def _extend(folder: Path, settings: RunSettings, trainer: BaseTrainer) -> str | None:
    """Record a changed number of steps; return a message about it, or None if it is unchanged."""
    file = folder / "settings.json"
    before, done = json.loads(file.read_text()), trainer.step_number
    if before["steps"] == settings.steps:
        return None
    if settings.steps < done:
        raise ConfigError("--steps", settings.steps, f"at least {done}, the steps already taken")
    write_json(file, before | {"steps": settings.steps})
    return (
        f"resuming after step {done}, with {settings.steps} steps instead of {before['steps']}: "
        f"the {settings.schedule} schedule is recomputed for the new length"
    )


def _load_state(trainer: BaseTrainer, states: Path, console: Console) -> None:
    """Load the newest state, saved by one process or by a mesh."""
    if is_safetensors_state(states):
        saved = load_latest_state(states)
        if saved is not None:
            trainer.load_state(*saved)
            _warn_of_other_bits(console, saved[1])
        return
    from moe.parallel import load_latest

    values = load_latest(states, trainer.model, trainer.optimizers)
    if values is not None:
        trainer.load_position(values)


def _run_steps(
    trainer: BaseTrainer, metrics: Metrics, states: Path, display: ProgressDisplay, stopped: list[int]
) -> None:
    settings, world = trainer.settings, trainer.world

    def save(*, wait: bool = False) -> Path:
        if world.rank == 0:
            metrics.sync()
        return world.save_state(trainer, states, wait=wait)

    validated = world.gather({record["step"] for record in metrics.of("validation")})[0]
    while True:
        step = trainer.step_number
        at_end = step == settings.steps
        due = step == 0 or at_end or (settings.eval_every and step % settings.eval_every == 0)
        if due and step not in validated:
            with uncompiled(settings):  # the last windows have other lengths
                evaluation = trainer.evaluate()
            metrics.write("validation", step, **evaluation.values())
            display.note(f"step {step}: {evaluation.text()}")
        if at_end or (settings.save_every and step and step % settings.save_every == 0):
            save(wait=at_end)
        if at_end:
            return
        if world.sum(torch.tensor(len(stopped))):
            signum = stopped[0] if stopped else signal.SIGTERM
            raise Interrupted(signum, step, save(wait=True))
        report = trainer.step()
        metrics.write("train", trainer.step_number, **report.values())
        display.update(trainer.step_number, report.text())


def _open_folder(folder: Path, settings: RunSettings, *, resume: bool, overwrite: bool) -> None:
    """Create or check the folder of the run. Only the folder of an earlier run is ever overwritten."""
    file = folder / "settings.json"
    deciding = settings.deciding()
    if resume:
        try:
            before = json.loads(file.read_text())
        except OSError:
            raise ConfigError("--resume", str(folder), "the folder of a run") from None
        except ValueError:
            raise CheckpointError(file, "not JSON") from None
        if not _is_settings(file):
            raise ConfigError("--resume", str(folder), "the folder of a run")
        check_kind(before, settings.kind)
        before = settings.defaults() | before
        differing = [name for name in deciding if name != "steps" and before[name] != deciding[name]]
        if differing:
            words = (f"{name} {before[name]!r} (now {deciding[name]!r})" for name in differing)
            raise ConfigError("--resume", str(folder), f"the settings with which the run started: {', '.join(words)}")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not _is_settings(file):  # other programs have files of that name, too
            raise ConfigError("--out", str(folder), "a new or empty folder, or that of an earlier run")
        if not overwrite:
            raise ConfigError(
                "--out", str(folder), "a new folder, or --resume to continue, or --overwrite to start over"
            )
        if Path.cwd().is_relative_to(folder.resolve()):  # relative paths, and the shell, would lose their folder
            raise ConfigError("--out", str(folder), "a folder that is not the current one, with --overwrite")
        if _overwritten(folder).exists():
            shutil.rmtree(_overwritten(folder))
        os.replace(folder, _overwritten(folder))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, deciding)


def named(folder: Path) -> Path:
    """`folder` by a path that ends in its name, beside which there is a lock and a replaced run: "." has none."""
    named = Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
    if not named.name:
        raise ConfigError("--out", str(folder), "a folder below the root")
    return named


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _overwritten(folder: Path) -> Path:
    """Return the path where --overwrite keeps the old run until the new one starts."""
    return folder.with_name(f".{folder.name}.overwritten")


def _is_settings(file: Path) -> bool:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"preset", "steps", "seq_length"} <= values.keys()


def _warn_of_other_bits(console: Console, values: dict[str, Any]) -> None:
    for name, now in (("torch", torch.__version__), ("threads", torch.get_num_threads())):
        if values[name] != now:
            found = f"{name} was {values[name]} and is {now}"
            say(console, f"note: {found}, so the result will not be bit-identical to that of an uninterrupted run")


@contextlib.contextmanager
def _stop_signals(console: Console, *, once_more_kills: bool) -> Iterator[list[int]]:
    """Yield a list to which SIGINT or SIGTERM is appended. With `once_more_kills` a second signal kills the process.

    torchrun needs False, because it forwards Ctrl-C as an immediate second signal, and has its own timeout.
    """
    stopped: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        if once_more_kills:
            for each in before:
                signal.signal(each, signal.SIG_DFL)
        once_more = "; press Ctrl-C again to quit immediately" if once_more_kills else ""
        if len(stopped) == 1:
            say(console, f"{signal.Signals(number).name}: finishing this step and saving{once_more}")

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
