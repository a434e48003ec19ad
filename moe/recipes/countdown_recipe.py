"""DeepSeek-R1's recipe on Countdown: pre-training, cold start, reinforcement learning, distillation; and what it beats.

Stages, each a run in OUT/seed-N/STAGE, whose folder the command of that name also reads:

    pretrain   `moesmith train` on arithmetic, without tags and without search
    sft        `moesmith sft` of pretrain on generated chains of thought, the cold start
    grpo       `moesmith grpo` of sft
    distill    `moesmith distill` of grpo into a dense student, by right completions that it samples
    rejection  `moesmith grpo --algorithm rejection` of sft: equally many sampled and trained tokens, cross entropy
    zero       `moesmith grpo` of pretrain without a cold start, as in R1-Zero
    scratch    `moesmith sft` of the student on the cold start, with the steps and tokens of distill
"""

import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console

from moe.checkpoint import load
from moe.checkpoint.writing.atomic import locked
from moe.errors import ConfigError
from moe.recipes.answers import complete, score_completions
from moe.recipes.countdown import MAX_PROBLEMS
from moe.recipes.countdown_settings import RecipeSettings
from moe.recipes.countdown_text import LINES, arithmetic, cold_start, tokenizer
from moe.recipes.distill import DistillRun
from moe.recipes.distill_settings import DistillSettings
from moe.recipes.grpo_run import GrpoRun
from moe.recipes.grpo_settings import GrpoSettings
from moe.recipes.sft import SftRun
from moe.recipes.sft_settings import SftSettings
from moe.recipes.task import countdown_task
from moe.train.data import write_json
from moe.train.lifecycle import Run, named, run_in_folder
from moe.train.metrics import Metrics
from moe.train.report import say
from moe.train.run import TextRun
from moe.train.settings import Settings
from moe.train.tokenizer import END_OF_TEXT

FILE = "recipe.json"
ROW = 256  # tokens of a row of text or of packed examples
ROWS = 8  # of a step
COMPLETION = 144  # longest completion in tokens
TOKENS_PER_LINE, TOKENS_PER_EXAMPLE = 8, 60  # less than the means, so that hardly any text is repeated
HELD_OUT = 100  # documents or examples
AT_ONCE = 250  # problems answered together


def recipe(settings: RecipeSettings, folder: Path, *, overwrite: bool = False, console: Console) -> dict[str, Any]:
    """Run the stages of all seeds, score their models on the held-out problems, and return the summary.

    Finished stages are kept, and an interrupted one continues where it was saved. Writes summary.json and, with
    matplotlib, accuracy.png.

    Raises:
        ConfigError: the folder is of another kind or of other settings.
        CheckpointError: another recipe uses the folder.
        And what `run_in_folder` raises.
    """
    folder = named(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another recipe is using this folder"):
        _open_folder(folder, settings, overwrite=overwrite)
        return _run_stages(settings, folder, console)


def _run_stages(settings: RecipeSettings, folder: Path, console: Console) -> dict[str, Any]:
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        home = folder / f"seed-{seed}"
        write_texts(home / "texts", settings, seed)
        for stage, run in runs(settings, home, seed):
            say(console, f"seed {seed}: {stage}")
            resume = (run.folder / "settings.json").exists()
            try:
                summary = _finished(run) or run_in_folder(run, resume=resume, console=console)
            except ConfigError as error:  # its option may be one that only the command of the stage has
                where = f"stage {stage} of seed {seed}: {error.field}"
                raise ConfigError(where, error.value, error.allowed) from None
            assert summary is not None  # there is one rank
            results.setdefault(stage, []).append(_result(run, summary, settings))
            say(console, f"seed {seed}: {stage}: {_percent(results[stage][-1]['accuracy'])} of held-out problems right")
    summary = {"folder": str(folder), "seeds": list(settings.seeds), "problems": settings.problems}
    summary["stages"] = {stage: _over_seeds(found) for stage, found in results.items()}
    summary["plots"] = _plot(settings, folder, summary)
    write_json(folder / "summary.json", summary)
    return summary


def write_texts(folder: Path, settings: RecipeSettings, seed: int) -> None:
    """Write the tokenizer, and texts and examples for as many tokens as the stages read, unless they are there."""
    if (folder / "tokenizer.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    documents = settings.pretrain_steps * ROWS * ROW // (LINES * TOKENS_PER_LINE) + 1
    examples = max(settings.sft_steps, settings.distill_steps) * ROWS * ROW // TOKENS_PER_EXAMPLE + HELD_OUT
    _write(folder / "arithmetic.jsonl", ({"text": text} for text in arithmetic(documents, seed=seed)))
    _write(folder / "arithmetic_held_out.jsonl", ({"text": text} for text in arithmetic(HELD_OUT, seed=seed + 2**31)))
    found = [*cold_start(min(examples, MAX_PROBLEMS), seed=seed)]
    _write(folder / "cold_start.jsonl", found[HELD_OUT:])
    _write(folder / "cold_start_held_out.jsonl", found[:HELD_OUT])
    write_json(folder / "tokenizer_config.json", {"eos_token": END_OF_TEXT})
    write_json(folder / "tokenizer.json", json.loads(tokenizer().to_str()))


def _write(file: Path, records: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def runs(settings: RecipeSettings, home: Path, seed: int) -> Iterator[tuple[str, Run[Any, Any]]]:
    """Yield the stages, in order, with their runs in `home`."""
    texts = home / "texts"
    rows: dict[str, Any] = {"batch_size": ROWS, "seq_length": ROW, "seed": seed, "save_every": 100}
    policy: dict[str, Any] = {
        "steps": settings.grpo_steps,
        "test_prompts": settings.problems,
        "max_new_tokens": COMPLETION,
        "eval_every": max(settings.grpo_steps // 5, 1),
        "seed": seed,
        "group_size": settings.group_size,
        "batch_size": settings.completions // 4,
        "accumulation": 2,
        "updates": 2,
        "lr": settings.grpo_lr,
    }
    cold: dict[str, Any] = {
        "data": (texts / "cold_start.jsonl",),
        "validation_data": (texts / "cold_start_held_out.jsonl",),
    }

    def quarter(steps: int) -> dict[str, int]:
        return {"steps": steps, "eval_every": max(steps // 4, 1)}

    made: dict[str, Any] = {
        "pretrain": lambda: TextRun(
            Settings(
                preset=settings.preset,
                data=(texts / "arithmetic.jsonl",),
                validation_data=(texts / "arithmetic_held_out.jsonl",),
                tokenizer=texts / "tokenizer.json",
                **quarter(settings.pretrain_steps),
                **rows,
            ),
            home / "pretrain",
        ),
        "sft": lambda: SftRun(
            SftSettings(init=home / "pretrain", lr=settings.sft_lr, **cold, **quarter(settings.sft_steps), **rows),
            home / "sft",
        ),
        "grpo": lambda: GrpoRun(GrpoSettings(init=home / "sft", **policy), home / "grpo"),
        "distill": lambda: DistillRun(
            DistillSettings(
                teacher=home / "grpo",
                by="traces",
                task="countdown",
                prompts=settings.traces,
                max_new_tokens=COMPLETION,
                preset=settings.student,
                lr=settings.student_lr,
                **quarter(settings.distill_steps),
                **rows,
            ),
            home / "distill",
        ),
        "rejection": lambda: GrpoRun(
            GrpoSettings(init=home / "sft", algorithm="rejection", **policy), home / "rejection"
        ),
        "zero": lambda: GrpoRun(GrpoSettings(init=home / "pretrain", **policy), home / "zero"),
        "scratch": lambda: SftRun(
            SftSettings(
                preset=settings.student,
                tokenizer=texts / "tokenizer.json",
                lr=settings.student_lr,
                **cold,
                **quarter(settings.distill_steps),
                **rows,
            ),
            home / "scratch",
        ),
    }
    for stage in settings.complete_stages:
        yield stage, made[stage]()


def _open_folder(folder: Path, settings: RecipeSettings, *, overwrite: bool) -> None:
    """Create the folder, or check that it is of a recipe with these settings. Seeds and stages may be added."""
    file = folder / FILE
    names = [f.name for f in fields(RecipeSettings) if f.name not in ("seeds", "stages")]
    fixed = {name: getattr(settings, name) for name in names}
    before = _read_settings(file)
    if before and overwrite:
        if Path.cwd().is_relative_to(folder.resolve()):  # relative paths, and the shell, would lose their folder
            raise ConfigError("--out", str(folder), "a folder that is not the current one, with --overwrite")
        shutil.rmtree(folder)
    elif before:
        if differing := sorted(name for name in fixed if before.get(name) != fixed[name]):
            words = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in differing)
            raise ConfigError("--out", str(folder), f"a recipe with these settings, not {words}; or --overwrite")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("--out", str(folder), "a new or empty folder, or that of an earlier recipe")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, fixed)


def _read_settings(file: Path) -> dict[str, Any] | None:
    """Return the settings of the recipe in `file`; None if it is not there, or a file of another program."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and {"preset", "student", "traces"} <= values.keys() else None


def _finished(run: Run[Any, Any]) -> dict[str, Any] | None:
    """Return the summary of a run that is finished, None otherwise."""
    file = run.folder / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def _result(run: Run[Any, Any], summary: dict[str, Any], settings: RecipeSettings) -> dict[str, Any]:
    """Return the measurements of a stage, with the accuracy of its model, which is kept in accuracy.json."""
    file = run.folder / "accuracy.json"
    if not file.exists():
        model = load(run.folder / "checkpoint", dtype=torch.float32, progress=False).eval()
        task = countdown_task()
        words = tokenizer()
        end = words.token_to_id(END_OF_TEXT)
        assert end is not None
        prompts = task.test[: settings.problems]
        batches = complete(model, prompts, words, end, max_new_tokens=COMPLETION, batch_size=AT_ONCE)
        found = score_completions(task, prompts, batches, words)
        write_json(file, {name: fmean(found[name]) for name in ("accuracy", "format", "length")})
    names = ("seconds", "sampled_tokens", "trained_tokens", "parameters")
    return {**json.loads(file.read_text()), **{name: summary[name] for name in names if name in summary}}


def _over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, spread (standard deviation) and values of each measurement."""
    return {
        name: {
            "mean": fmean(result[name] for result in results),
            "spread": stdev([result[name] for result in results]) if len(results) > 1 else None,
            "values": [result[name] for result in results],
        }
        for name in results[0]
    }


def _plot(settings: RecipeSettings, folder: Path, summary: dict[str, Any]) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from moe.train.plots import DPI, plot_accuracy

    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for stage in ("grpo", "rejection", "zero"):
        for seed in settings.seeds if stage in summary["stages"] else ():
            metrics = Metrics(folder / f"seed-{seed}" / stage / "metrics.jsonl", settings.grpo_steps)
            records = metrics.of("validation")
            curves.setdefault(stage, []).append([(record["step"], record["accuracy"]) for record in records])
    levels = {s: summary["stages"][s]["accuracy"]["mean"] for s in ("distill", "scratch") if s in summary["stages"]}
    if not curves:
        return []
    figure = plot_accuracy(
        f"Countdown, three numbers, {settings.preset}: accuracy on held-out problems", curves, levels
    )
    figure.savefig(folder / "accuracy.png", dpi=DPI)
    return [str(folder / "accuracy.png")]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"
