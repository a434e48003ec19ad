"""Training run in one folder: data, steps, saved states, summary, checkpoint. `train` documents the folder."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from moe.balance import LoadReport
from moe.checkpoint.writing.atomic import locked
from moe.config import ModelConfig
from moe.counts import count_parameters
from moe.errors import CheckpointError, ConfigError
from moe.generation import generate
from moe.model import Block, Transformer
from moe.train.architecture import check_experts, read_architecture
from moe.train.baselines import bigram_nats, bits_per_byte, unigram_nats
from moe.train.data import Dataset, open_dataset, prepare, write_json
from moe.train.logs import check_log, open_log
from moe.train.loop import Trainer, check_savable, deterministic, uncompiled
from moe.train.memory import check_memory
from moe.train.metrics import Metrics
from moe.train.report import ProgressDisplay, say
from moe.train.scoring import load_rows
from moe.train.settings import Settings
from moe.train.state import is_safetensors_state, load_latest_state
from moe.train.tokenizer import check_vocabulary
from moe.train.world import World, world_of

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh

SAMPLE_PROMPT_TOKENS = 16
SAMPLE_NEW_TOKENS = 96
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}


class Interrupted(Exception):
    """Interruption of a run by a signal, after its state was saved. Attributes: signum, step, state (folder)."""

    def __init__(self, signum: int, step: int, state: Path) -> None:
        self.signum, self.step, self.state = signum, step, state
        super().__init__(f"{signal.Signals(signum).name}: step {step} is saved in {state}")


def train(
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    mesh: "Mesh | None" = None,
) -> dict[str, Any] | None:
    """Train a model, and return the summary that is also written to summary.json.

    Writes to the folder: settings.json, model.json (the `ModelConfig`), data/ (tokens, tokenizer), states/ (see
    `moe.train.state`), metrics.jsonl, loss.png and load.png (with matplotlib), checkpoint/ (Hugging Face layout, with
    the tokenizer), summary.json.

    A run that was ended by a signal or a crash continues with `resume` from its last saved state. Its result is
    bit-identical to that of an uninterrupted run on the same machine with the same number of threads. If `steps` has
    changed, the learning rate follows the schedule of the new length from there.

    Validation scores in metrics.jsonl and summary.json, and those of the baselines, are over the tokens that training
    predicts: with `document_mask`, without the first token of each document. `tokens` and `bytes` in the summary count
    these tokens and their bytes of text, the denominator of bits per byte.

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
    world, device = world_of(mesh), torch.device(settings.device) if mesh is None else mesh.device
    first = world.rank == 0
    folder = _named(folder)
    overwritten, was_empty = _overwritten(folder), False
    with deterministic(), contextlib.ExitStack() as held:
        with world.together():
            config = _architecture(folder, settings) if resume else read_architecture(settings)
            _check(settings, config, world, device)
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
                    _dataset(folder, settings)
            with world.together():
                trainer = _trainer(folder, settings, world, device)
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
        say(console, _describe(trainer, folder))
        for line in _describe_data(trainer.dataset.facts):
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
            summary = _summary(trainer, metrics, folder, model) | {"seconds": time.perf_counter() - started}
        write_json(folder / "summary.json", summary)
        return summary


def _describe(trainer: Trainer, folder: Path) -> str:
    settings = trainer.settings
    return f"model: {_model(trainer)}; {settings.device}, {settings.dtype}; {folder}"


def _model(trainer: Trainer) -> str:
    """The model's name, changed fields and size."""
    name, counts = " ".join((trainer.settings.name, *trainer.settings.set)), count_parameters(trainer.model.config)
    return f"{name}, {counts.with_mtp:,} parameters, {counts.activated:,} activated"


def _describe_data(facts: dict[str, Any]) -> Iterator[str]:
    held_out = f"{facts['validation']['tokens']:,} validation tokens of {facts['validation']['documents']:,} documents"
    yield f"data: {facts['train']['tokens']:,} training tokens of {facts['train']['documents']:,} documents, {held_out}"
    left_out = facts.get("left_out", {"count": 0})  # not recorded by earlier releases
    if left_out["count"]:
        names = ", ".join(left_out["first"]) + (", ..." if left_out["count"] > len(left_out["first"]) else "")
        yield f"data: {left_out['count']:,} files or folders left out: {names}"
    if dropped := facts.get("dropped_paragraphs"):
        yield f"data: {dropped:,} paragraphs of training text dropped, because they also occur in the validation text"


def _architecture(folder: Path, settings: Settings) -> ModelConfig:
    """Return the config with which the run started; before the start, that of the settings."""
    file = folder / "model.json"
    return ModelConfig.from_dict(json.loads(file.read_text())) if file.exists() else read_architecture(settings)


def _check(settings: Settings, config: ModelConfig, world: World, device: torch.device) -> None:
    """Raise ConfigError if the run cannot work, before anything is written."""
    check_experts(config)
    check_savable(config)
    if settings.seq_length > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ConfigError("--seq-length", settings.seq_length, f"at most the model's {limit} positions")
    default = Settings.bias_update_speed
    if config.topk_method != "noaux_tc" and settings.bias_update_speed != default:
        problem = f"the default {default}: {settings.name} has no correction bias"
        raise ConfigError("--bias-update-speed", settings.bias_update_speed, problem)
    if settings.dispatch != "same" and settings.ep == 1:
        raise ConfigError("--dispatch", settings.dispatch, "same if --ep is 1")
    if settings.init is not None:
        option = "--init" if settings.tokenizer is None else "--tokenizer"
        check_vocabulary(settings.tokenizer or settings.init, config.vocab_size, option)
    check_memory(config, settings, ranks=world.size, device=device)


def _dataset(folder: Path, settings: Settings) -> Dataset:
    if (folder / "data" / "data.json").exists():
        return open_dataset(folder / "data")
    config = _architecture(folder, settings)
    write_json(folder / "model.json", config.to_dict())
    return prepare(
        folder / "data",
        settings.data,
        settings.tokenizer or settings.init,
        config.vocab_size,
        field=settings.field,
        validation_data=settings.validation_data,
    )


def _trainer(folder: Path, settings: Settings, world: World, device: torch.device) -> Trainer:
    dataset = _dataset(folder, settings)
    config = _architecture(folder, settings)
    if settings.init is None:
        extra = {**config.extra, **dataset.token_ids}
        config = replace(config, vocab_size=dataset.facts["vocab_size"], extra=extra)
    check_memory(config, settings, ranks=world.size, device=device, vocab_size=config.vocab_size)
    torch.manual_seed(settings.seed)
    model = world.build(config, settings)
    if settings.init is None or settings.tokenizer is not None:
        model.carried_files = dataset.carried_files()
    trainer = Trainer(model, dataset, settings, world=world)
    if settings.compile:
        # Per block, because blocks of one kind share compiled code. Static shapes, so that the bits of a step do not
        # depend on what was compiled before.
        for block in model.modules():
            if isinstance(block, Block):
                block.compile(dynamic=False)
    return trainer


def _extend(folder: Path, settings: Settings, trainer: Trainer) -> str | None:
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


def _load_state(trainer: Trainer, states: Path, console: Console) -> None:
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


def _run_steps(trainer: Trainer, metrics: Metrics, states: Path, display: ProgressDisplay, stopped: list[int]) -> None:
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
            metrics.write(
                "validation",
                step,
                nats_per_token=evaluation.nats_per_token,
                bits_per_byte=evaluation.bits_per_byte,
                load=evaluation.load.tolist(),
            )
            display.note(
                f"step {step}: validation {evaluation.nats_per_token:.4f} nats/token, "
                f"{evaluation.bits_per_byte:.4f} bits/byte"
            )
        if at_end or (settings.save_every and step and step % settings.save_every == 0):
            save(wait=at_end)
        if at_end:
            return
        if world.sum(torch.tensor(len(stopped))):
            signum = stopped[0] if stopped else signal.SIGTERM
            raise Interrupted(signum, step, save(wait=True))
        report = trainer.step()
        max_vio = LoadReport(trainer.layer_names, report.load).max_vio
        metrics.write(
            "train",
            trainer.step_number,
            **report.losses,
            lr=report.lr,
            grad_norm=report.grad_norm,
            max_vio=max_vio,
            tokens_per_second=report.tokens_per_second,
        )
        display.update(trainer.step_number, report.losses["ce"], report.tokens_per_second, max(max_vio))


def _summary(trainer: Trainer, metrics: Metrics, folder: Path, whole: Transformer) -> dict[str, Any]:
    model, dataset = trainer.model, trainer.dataset
    validation = metrics.of("validation")
    scored = dataset.scored(document_mask=trainer.settings.document_mask)
    scored_bytes = dataset.scored_bytes(document_mask=trainer.settings.document_mask)
    tokens = int(scored.sum())
    scores = {
        name: {key: record[key] for key in ("nats_per_token", "bits_per_byte")}
        for name, record in (("before", validation[0]), ("after", validation[-1]))
    }
    for name, count_nats in (("unigram", unigram_nats), ("bigram", bigram_nats)):
        nats = count_nats(dataset.train, dataset.validation, dataset.facts["vocab_size"], scored)
        bits = bits_per_byte(nats, scored_bytes)
        scores[name] = {"nats_per_token": nats / tokens, "bits_per_byte": bits}
    load = LoadReport(trainer.layer_names, torch.tensor(validation[-1]["load"]))
    baselines = {name: scores[name]["nats_per_token"] for name in ("unigram", "bigram")}
    train_records = metrics.of("train")
    mean_seconds = sum(1 / record["tokens_per_second"] for record in train_records) / len(train_records)
    return {
        "folder": str(folder),
        "checkpoint": str(folder / "checkpoint"),
        "metrics": str(metrics.file),
        "steps": trainer.step_number,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_second": 1 / mean_seconds,
        "validation": {
            "tokens": tokens,
            "bytes": scored_bytes,
            "documents": dataset.facts["validation"]["documents"],
            **scores,
        },
        "load": load_rows(load),
        "plots": _plot(trainer, metrics, folder, load, baselines),
        "sample": _sample(trainer, whole),
    }


def _plot(trainer: Trainer, metrics: Metrics, folder: Path, load: LoadReport, baselines: dict[str, float]) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from moe.train.plots import plot_run

    steps = trainer.step_number
    title = f"{_model(trainer)}, {steps:,} {'step' if steps == 1 else 'steps'}"
    train_records, validation = metrics.of("train"), metrics.of("validation")
    files = plot_run(folder, title, train_records, validation, baselines, load.layers, load.load.numpy())
    return [str(file) for file in files]


def _sample(trainer: Trainer, model: Transformer) -> dict[str, str]:
    """Generate a continuation of the first held-out document."""
    dataset = trainer.dataset
    opening = dataset.validation[: 1 + SAMPLE_PROMPT_TOKENS].astype(np.int64)
    ends = np.flatnonzero(opening[1:] == dataset.end_of_text)
    prompt = opening[: ends[0] + 1] if len(ends) else opening
    ids = generate(
        model,
        torch.from_numpy(prompt)[None].to(next(model.parameters()).device),
        max_new_tokens=min(SAMPLE_NEW_TOKENS, model.config.max_position_embeddings - len(prompt)),
        **SAMPLING,
        seed=trainer.settings.seed,
        eos_token_id=dataset.end_of_text,
    )[0].tolist()
    decode = dataset.tokenizer.decode
    return {"prompt": decode(ids[1 : len(prompt)]), "text": decode(ids)}


def _open_folder(folder: Path, settings: Settings, *, resume: bool, overwrite: bool) -> None:
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
        defaults = Settings().deciding()  # for settings that earlier releases did not record
        before = defaults | before
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


def _named(folder: Path) -> Path:
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
