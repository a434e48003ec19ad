"""Distillation of a teacher into a student, by its logits or by completions that it samples: `moesmith distill`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from moe.checkpoint import load, read_config
from moe.checkpoint.chat import ChatTemplate
from moe.checkpoint.reading.hub import find
from moe.config import ModelConfig
from moe.errors import ConfigError, one_line
from moe.loss import IGNORED, Mean, next_token_loss, targets
from moe.model import Transformer
from moe.recipes.distill_settings import DistillSettings
from moe.recipes.examples import ExampleData
from moe.recipes.rollout import rollout
from moe.recipes.sft import Batch, ExampleRun, SftTrainer
from moe.recipes.task import Task, load_task
from moe.train.data import write_json
from moe.train.documents import read_records
from moe.train.lifecycle import run_in_folder
from moe.train.loop import BatchLoss
from moe.train.tokenizer import find_tokenizer, load_tokenizer
from moe.train.world import World

if TYPE_CHECKING:  # importing it takes half a second
    from moe.parallel import Mesh

AT_ONCE = 64  # completions that the teacher samples together

Prompt = str | list[dict[str, str]]


def distill(
    settings: DistillSettings,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
    mesh: "Mesh | None" = None,
) -> dict[str, Any] | None:
    """Distill a teacher into a student, and return the summary that is also written to summary.json.

    The folder is that of `moe.recipes.sft.sft`. By traces, it also has traces.jsonl, the completions of the teacher
    that were kept, in a form that `moesmith sft` and TRL read, and traces.json with the numbers of sampled and kept
    completions. Sampling is not resumed: a run that is interrupted before its first step starts over.
    """
    return run_in_folder(DistillRun(settings, folder), resume=resume, overwrite=overwrite, console=console, mesh=mesh)


def kl_divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, document_ids: Tensor | None, *, temperature: float, vocab: int
) -> Mean:
    """Compute the mean divergence KL(teacher || student) of next-token distributions, in nats times temperature^2.

    With p and q the softmax of the teacher's and the student's logits divided by the temperature, it is the sum of
    p (log p - log q) over the tokens, times the square of the temperature, as in arXiv 1503.02531: gradients then have
    the same size at every temperature. Computed in fp32 or wider.

    Args:
        student, teacher: logits [B, S, V], where the sizes V may differ.
        labels: int64 [B, S]. The mean is over the positions whose next label is kept, see `moe.loss.targets`; 0 if
            there are none.
        document_ids: int64 [B, S], or None.
        vocab: number of tokens that both models have; other logits are padding.
    """
    target, count = targets(labels, 1, labels.shape[1], document_ids, None)
    rows = (target.flatten() != IGNORED).nonzero().squeeze(1)

    def log_probabilities(logits: Tensor) -> Tensor:
        logits = logits.flatten(0, 1).index_select(0, rows)[:, :vocab]
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)

    log_p, log_q = log_probabilities(teacher), log_probabilities(student)
    total = (log_p.exp() * (log_p - log_q)).sum() * temperature**2
    return Mean(total / count.clamp_min(1), count)


@dataclass(frozen=True)
class _Loss:
    """See `moe.train.loop.BatchLoss`."""

    loss: Tensor
    losses: dict[str, Tensor]
    load: Tensor | None


class DistillTrainer(SftTrainer):
    """Trainer of a student on packed examples, with the logits of a teacher unless it is None.

    The cross entropy has the weight 1 - `kl_weight`, and the divergence of `kl_divergence`, the part "kl" of the loss,
    has `kl_weight`. Other parts of the loss are those of fine-tuning.
    """

    def __init__(
        self,
        model: Transformer,
        data: ExampleData,
        settings: DistillSettings,
        mesh: "Mesh | None" = None,
        *,
        teacher: Transformer | None,
        world: World | None = None,
    ) -> None:
        super().__init__(model, data, settings, mesh, world=world)
        self.teacher, self.weight, self.temperature = teacher, settings.kl_weight, settings.kl_temperature

    def _loss(self, batch: Batch) -> BatchLoss:
        output = self._call(batch)
        if self.teacher is None:
            return output
        assert output.loss is not None
        with torch.no_grad(), self._autocast():
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            teacher = self.teacher(**inputs).logits
        labels, documents = batch["labels"], batch["document_ids"]
        vocab = self.data.facts["vocab_size"]
        kl = kl_divergence(output.logits, teacher, labels, documents, temperature=self.temperature, vocab=vocab)
        ce = next_token_loss(output.logits, labels, 1, documents, batch["attention_mask"])
        kl, ce = self.model.global_batch.weigh([kl.value, ce.value], [kl.count, ce.count], ["ce.0", "ce.0"])
        losses = {**output.losses, "kl": kl.detach()}
        return _Loss(output.loss + self.weight * (kl - ce), losses, output.load)


class DistillRun(ExampleRun[DistillSettings, DistillTrainer]):
    """Run of `moesmith distill`."""

    def check(self, config: ModelConfig, world: World, device: torch.device) -> None:
        super().check(config, world, device)
        settings = self.settings
        assert settings.teacher is not None  # checked by the settings
        positions = read_config(find(settings.teacher)).max_position_embeddings
        if settings.by == "logits" and settings.seq_length > positions:
            raise ConfigError("--seq-length", settings.seq_length, f"at most the teacher's {positions} positions")
        if settings.by == "traces" and settings.max_new_tokens >= positions:
            allowed = f"less than the teacher's {positions} positions"
            raise ConfigError("--max-new-tokens", settings.max_new_tokens, allowed)
        if settings.by == "logits" and settings.tokenizer_path is not None:
            own, others = (_tokens(path) for path in (settings.tokenizer_path, settings.teacher))
            if differing := sorted(own.items() ^ others.items(), key=lambda item: item[1]):
                token, number = differing[0]
                found = f"another: token {number} of one of them is {one_line(repr(token), 40)}"
                raise ConfigError("--teacher", str(settings.teacher), f"the student's tokenizer; found {found}")
        elif settings.task is not None:
            load_task(settings.task)

    def example_files(self) -> Sequence[Path]:
        if self.settings.by == "logits":
            return super().example_files()
        file = self.folder / "traces.jsonl"
        write_traces(file, self.settings)
        return (file,)

    def build(self, world: World, device: torch.device) -> DistillTrainer:
        data, teacher, settings = self.data(), None, self.settings
        model = self.model_for(data, world, device)
        if settings.by == "logits" and settings.kl_weight:
            assert settings.teacher is not None
            as_student = replace(settings, init=settings.teacher, preset=None, config=None, set=())
            teacher = world.build(read_config(find(settings.teacher)), as_student).eval().requires_grad_(False)
        return DistillTrainer(model, data, settings, teacher=teacher, world=world)

    def describe(self, trainer: DistillTrainer) -> Iterator[str]:
        if (file := self.folder / "traces.json").exists():
            facts = json.loads(file.read_text())
            yield (
                f"traces: {facts['kept']:,} of {facts['sampled']:,} completions kept, {facts['unfinished']:,} did not "
                f"end within {self.settings.max_new_tokens:,} tokens, {facts['rejected']:,} were rejected by the reward"
            )
        yield from super().describe(trainer)


def write_traces(file: Path, settings: DistillSettings) -> None:
    """Sample completions from the teacher and write those that are kept to `file`, and their numbers beside it.

    A completion is kept if it ended within `max_new_tokens` and, with a task, if the first part of its reward is 1 or
    more. A line is {"prompt": text, "completion": text}, or with a prompt of messages {"prompt": [messages],
    "completion": [message]}. The random numbers of a completion depend only on the seed and the numbers of its prompt
    and sample.

    Raises ConfigError for a wrong prompt, with its file and line, and if no completion is kept.
    """
    assert settings.teacher is not None
    folder = find(settings.teacher)
    tokenizer, end = load_tokenizer(find_tokenizer(settings.teacher))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end_of_text = tokenizer.token_to_id(end)
    assert end_of_text is not None  # `load_tokenizer` has checked that
    task = None if settings.task is None else load_task(settings.task)
    prompts = _prompts(settings, task)[: settings.prompts]
    encoded = [_encode(tokenizer, prompt, folder) for prompt in prompts]
    model = load(folder, settings.device, torch.float32, progress=False).eval()
    counts = {"sampled": len(prompts) * settings.samples, "unfinished": 0, "rejected": 0, "kept": 0}
    each = max(AT_ONCE // settings.samples, 1)
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, len(prompts), each):
            batch = rollout(
                model,
                encoded[start : start + each],
                max_new_tokens=settings.max_new_tokens,
                end_of_text=(end_of_text,),
                group_size=settings.samples,
                temperature=settings.temperature,
                seed=(settings.seed,),
                first_prompt=start,
                record=False,
            )
            for number, (ids, ended) in enumerate(zip(batch.completions(), batch.ended.tolist(), strict=True)):
                prompt = prompts[start + number // settings.samples]
                text = tokenizer.decode(ids, skip_special_tokens=False)
                if not ended:
                    counts["unfinished"] += 1
                elif task is not None and task.score(str(prompt), text)[task.goal] < 1:
                    counts["rejected"] += 1
                else:
                    counts["kept"] += 1
                    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                    out.write(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
    if not counts["kept"]:
        found = f"{counts['unfinished']:,} that did not end, {counts['rejected']:,} rejected"
        raise ConfigError("--teacher", str(settings.teacher), f"completions that are kept; found {found}")
    write_json(file.with_suffix(".json"), counts)


def _prompts(settings: DistillSettings, task: Task | None) -> list[Prompt]:
    if task is not None:
        return list(task.train)
    assert settings.data is not None  # checked by the settings
    found: list[Prompt] = []
    for record in read_records(settings.data):
        prompt = record.value.get("prompt") if isinstance(record.value, dict) else None
        if not prompt or not isinstance(prompt, str | list):
            raise record.error('a text or messages in "prompt"', one_line(repr(record.value), 60))
        found.append(prompt)
    return found


def _encode(tokenizer: Tokenizer, prompt: Prompt, folder: Path) -> list[int]:
    """Return the token ids of a prompt, those of `moesmith generate`."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt).ids
    return tokenizer.encode(ChatTemplate.read(folder).render(prompt), add_special_tokens=False).ids


def _tokens(path: Path) -> dict[str, int]:
    return load_tokenizer(find_tokenizer(path))[0].get_vocab()
