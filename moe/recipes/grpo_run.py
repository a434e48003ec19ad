"""Run of `moesmith grpo` in one folder: task, summary, plot. `grpo` documents the folder."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from moe.model import Transformer
from moe.recipes.answers import encode_prompt
from moe.recipes.grpo import GrpoTrainer
from moe.recipes.grpo_settings import GrpoSettings
from moe.recipes.rollout import rollout
from moe.recipes.task import load_task
from moe.train.lifecycle import Run, describe_model, run_in_folder
from moe.train.metrics import Metrics
from moe.train.tokenizer import find_tokenizer, load_tokenizer
from moe.train.world import World

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh


def grpo(
    settings: GrpoSettings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    mesh: "Mesh | None" = None,
) -> dict[str, Any] | None:
    """Train a model on a task, and return the summary that is also written to summary.json.

    Writes to the folder what `moe.train.lifecycle.run_in_folder` writes, and grpo.png (with matplotlib). That function
    documents resuming, meshes and errors. A resumed run needs the folder of --init and the file of the task again.
    """
    return run_in_folder(GrpoRun(settings, folder), resume=resume, overwrite=overwrite, console=console, mesh=mesh)


class GrpoRun(Run[GrpoSettings, GrpoTrainer]):
    """Run of `moesmith grpo`."""

    def prepare(self) -> None:
        self.write_architecture()

    def build(self, world: World, device: torch.device) -> GrpoTrainer:
        settings, config = self.settings, self.architecture()
        assert settings.init is not None  # checked by the settings
        task = load_task(settings.task, format_weight=settings.format_weight)
        task = replace(task, test=task.test[: settings.test_prompts])
        tokenizer, name = load_tokenizer(find_tokenizer(settings.init))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end_of_text = tokenizer.token_to_id(name)
        assert end_of_text is not None  # checked by `load_tokenizer`
        model = self.build_model(config, world, device)
        reference = world.build(config, settings).eval().requires_grad_(False) if settings.kl else None
        return GrpoTrainer(model, task, tokenizer, end_of_text, settings, reference=reference, world=world)

    def describe(self, trainer: GrpoTrainer) -> Iterator[str]:
        task, settings = trainer.task, trainer.settings
        yield f"task: {task.name}, {len(task.train):,} prompts for training, {len(task.test):,} held out"
        prompts = settings.completions // settings.group_size
        yield f"{settings.algorithm}: {prompts:,} prompts per step, {settings.group_size} completions of each"

    def summary(self, trainer: GrpoTrainer, metrics: Metrics, model: Transformer) -> dict[str, Any]:
        validation, task = metrics.of("validation"), trainer.task
        scores = {
            name: {key: value for key, value in record.items() if key not in ("kind", "step", "prompts")}
            for name, record in (("before", validation[0]), ("after", validation[-1]))
        }
        return {
            "task": task.name,
            "tokens_per_second": metrics.tokens_per_second,
            "sampled_tokens": sum(record["sampled_tokens"] for record in metrics.of("train")),
            "trained_tokens": sum(record["trained_tokens"] for record in metrics.of("train")),
            "validation": {"prompts": len(task.test), **scores},
            "plots": self._plot(trainer, metrics),
            "sample": _sample(trainer, model),
        }

    def _plot(self, trainer: GrpoTrainer, metrics: Metrics) -> list[str]:
        if importlib.util.find_spec("matplotlib") is None:
            return []
        from moe.train.plots import DPI, plot_policy

        title = f"{trainer.task.name}: {describe_model(trainer)}, {trainer.settings.algorithm}"
        figure = plot_policy(title, metrics.of("train"), metrics.of("validation"), tuple(trainer.task.weights))
        file = self.folder / "grpo.png"
        figure.savefig(file, dpi=DPI)
        return [str(file)]


def _sample(trainer: GrpoTrainer, model: Transformer) -> dict[str, str]:
    """Answer the first held-out prompt with the most likely tokens."""
    prompt = trainer.task.test[0]
    found = rollout(
        model,
        [encode_prompt(trainer.tokenizer, prompt)],
        max_new_tokens=trainer.settings.max_new_tokens,
        end_of_text=(trainer.end_of_text,),
        temperature=0,
        record=False,
    )
    return {"prompt": prompt, "text": trainer.tokenizer.decode(found.completions()[0], skip_special_tokens=False)}
