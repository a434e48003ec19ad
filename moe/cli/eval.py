"""`moesmith eval`: score a model on text or on a task."""

import json
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from moe.checkpoint import read_config
from moe.checkpoint.reading.hub import explain_cache_misses, find
from moe.cli.generate import read_tokenizer
from moe.cli.options import COMPUTE_DTYPES, Option, dtype_option, option, read_dtype
from moe.cli.source import FOLDER
from moe.errors import CheckpointError, ConfigError
from moe.train.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from tokenizers import Tokenizer

    from moe.model import Transformer
    from moe.train.data import Dataset

DEFAULT_SEQ_LENGTH = 2048
DEFAULT_PROMPTS = 128


@dataclass(frozen=True)
class TextArgs:
    """A model and a text for it, in windows."""

    folder: Annotated[str, Option("FOLDER", positional=True, text=FOLDER)]
    data: tuple[Path, ...] | None = None
    """Text, JSON Lines, JSON or Parquet files, or folders of them. Default: the text held out by the run."""
    field: str = "text"
    """Name of the text field in JSON Lines, JSON and Parquet files."""
    seq_length: int | None = None
    """Window length in tokens. Default: that of the run, otherwise 2048, or the model's maximum if that is less."""
    batch_size: int | None = None
    """Windows per forward pass. Default: that of the run, otherwise 4."""
    document_mask: bool | None = None
    """Restrict attention to tokens of the same document. Default: that of the run, otherwise off."""
    dtype: Annotated[str, dtype_option(COMPUTE_DTYPES)] = "auto"
    """Compute dtype; auto uses the checkpoint's."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        for name, ok, allowed in (
            ("field", bool(self.field), "the name of a field"),
            ("seq_length", self.seq_length is None or self.seq_length >= 4, "4 or more"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "1 or more"),
        ):
            if not ok:
                raise ConfigError(option(name), getattr(self, name), allowed)
        read_dtype(self.dtype, COMPUTE_DTYPES)


@dataclass(frozen=True)
class Args(TextArgs):
    """Score a model on text: perplexity, nats per token, bits per byte, and the load of its experts. With --task, on
    the prompts that a task holds out: the mean reward of its completions, with its parts, such as accuracy.

    The text is tokenized with the folder's tokenizer.json and scored in windows, as in validation by `moesmith train`:
    each token is predicted from those before it in its window. Perplexities are comparable only between models with the
    same tokenizer; bits per byte are comparable between all models.

    With --quantize, the text is scored with int8 weights, and also with the stored weights in fp32 and in bf16. For the
    first 512 tokens, the logits of int8 and bf16 are compared with those of fp32: relative error (Frobenius norm), KL
    divergence of the next token in nats, and how often the most likely token is the same.
    """

    batch_size: int | None = None
    """Windows per forward pass. Default: that of the run, otherwise 4. With --task, prompts, by default 128."""
    task: str | None = None
    """Task to score: countdown, or FILE.py:NAME, an object with lists of prompts `train` and `test` and a function
    reward(prompt, completion). The file is executed."""
    max_new_tokens: int = 128
    """With --task, the longest completion in tokens."""
    temperature: float = 0.0
    """With --task, the sampling temperature; 0 selects the most likely tokens."""
    seed: int = 0
    """With --task, the sampling seed."""
    quantize: Literal["int8"] | None = None
    """Score the model with int8 weights, and print the errors of int8 and of bf16, relative to the stored weights in
    fp32. The model must fit into memory in fp32."""

    def check(self) -> None:
        super().check()
        for name in ("data", "seq_length", "document_mask"):
            if self.task is not None and getattr(self, name) is not None:
                raise ConfigError(option(name), getattr(self, name), "nothing with --task")
        for name, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1"),
        ):
            if not ok:
                raise ConfigError(option(name), getattr(self, name), allowed)


def run(args: Args) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in training
    from rich.console import Console

    from moe.train.report import print_scores, print_task_scores

    result = _text_scores(args) if args.task is None else _task_scores(args, args.task)
    if args.json:
        print(json.dumps(result))
    elif args.task is None:
        print_scores(Console(), result)
    else:
        print_task_scores(Console(), result)
    return 0


def _task_scores(args: Args, name: str) -> dict[str, Any]:
    """Mean scores of one completion of each held-out prompt."""
    folder = find(args.folder)

    import moe
    from moe.recipes.answers import complete, encode_prompt, score_completions
    from moe.recipes.task import load_task

    task = load_task(name)
    with explain_cache_misses(args.folder):
        tokenizer, end_of_text = _tokenizer(folder)
        dtype = read_dtype(args.dtype, COMPUTE_DTYPES)
        model = moe.load(folder, device=_device(args), dtype=dtype, quantize=args.quantize, mtp=False)
    positions = model.config.max_position_embeddings
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in task.test)
    room = positions - longest
    if 0 < room < args.max_new_tokens:
        allowed = f"at most {room}: the model's {positions} positions, without the longest prompt ({longest})"
        raise ConfigError("--max-new-tokens", args.max_new_tokens, allowed)
    try:
        batches = complete(
            model,
            task.test,
            tokenizer,
            end_of_text,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size or DEFAULT_PROMPTS,
            temperature=args.temperature,
            seed=args.seed,
        )
    except FloatingPointError as error:
        raise CheckpointError(folder, str(error)) from None
    scores = score_completions(task, task.test, batches, tokenizer)
    facts = {"folder": str(folder), "task": task.name, "prompts": len(task.test), "temperature": args.temperature}
    return facts | {name: sum(values) / len(values) for name, values in scores.items()}


def _text_scores(args: Args) -> dict[str, Any]:
    folder, load, dataset, settings = prepared(args)
    from moe.train.loop import NonFiniteError
    from moe.train.scoring import compare, score

    chosen = partial(load, dtype=read_dtype(args.dtype, COMPUTE_DTYPES), quantize=args.quantize)
    try:
        with explain_cache_misses(args.folder):
            if args.quantize is None:
                scores = score(chosen(), dataset, settings)
            else:
                models = {"fp32": partial(load, dtype="fp32"), "bf16": partial(load, dtype="bf16")}
                # Not the run's bf16, which is autocast.
                scores = compare(models | {args.quantize: chosen}, dataset, replace(settings, dtype="fp32"))
    except NonFiniteError as error:
        raise CheckpointError(folder, f"the {error.what} is not finite; {error.where}") from None
    return {"folder": str(folder)} | scores


def _device(args: TextArgs) -> "torch.device":
    import torch

    from moe.checkpoint.reading.load import usable_device

    return usable_device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)


def prepared(args: TextArgs) -> "tuple[Path, Callable[..., Transformer], Dataset, Settings]":
    """The folder of the checkpoint, `moe.load` for it, the text as the validation split, its windows and dtype."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in training
    folder = find(args.folder)
    began = _settings(Path(args.folder))

    import moe
    from moe.train.documents import read_files
    from moe.train.scoring import pack, validation_of

    device = _device(args)
    if args.data is None:
        dataset = validation_of(Path(args.folder))
    else:
        documents = read_files(args.data, args.field)
        with explain_cache_misses(args.folder):
            dataset = pack(documents, *_tokenizer(folder))
    with explain_cache_misses(args.folder):
        limit = read_config(folder).max_position_embeddings
    if (args.seq_length or 0) > limit:
        raise ConfigError("--seq-length", args.seq_length, f"at most the model's {limit} positions")
    settings = Settings(
        seq_length=min(args.seq_length or began.seq_length, limit, len(dataset.validation)),
        batch_size=args.batch_size or began.batch_size,
        document_mask=began.document_mask if args.document_mask is None else args.document_mask,
        dtype=began.dtype if args.dtype == "auto" else "fp32",
    )
    return folder, partial(moe.load, folder, device=device), dataset, settings


def _tokenizer(folder: Path) -> "tuple[Tokenizer, int]":
    """The folder's tokenizer, and the id of its end-of-text token."""
    from moe.train.tokenizer import load_tokenizer

    read_tokenizer(folder)  # its errors name the folder, not --tokenizer
    try:
        tokenizer, end = load_tokenizer(folder / "tokenizer.json")
    except ConfigError as error:
        raise CheckpointError(error.value, f"expected {error.allowed}") from None
    number = tokenizer.token_to_id(end)
    assert number is not None  # load_tokenizer has checked that
    return tokenizer, number


def _settings(run: Path) -> Settings:
    """The settings of a run of `moesmith train`; the defaults for any other folder."""
    try:
        return Settings.from_deciding(json.loads((run / "settings.json").read_text()))
    except (OSError, ValueError, TypeError, AttributeError):
        return Settings(seq_length=DEFAULT_SEQ_LENGTH)
