"""`moesmith generate`: continue prompts with a model."""

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from moe.checkpoint import read_config
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import CONFIG, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, member
from moe.checkpoint.format.strict_json import parse_as_python
from moe.checkpoint.reading.hub import find, from_cache
from moe.cli.options import COMPUTE_DTYPES, UNSET, dtype_option, option, read_dtype
from moe.cli.source import FOLDER
from moe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Args:
    """Continue prompts with a model.

    Each prompt is printed with its continuation, as it is generated. Several prompts run as one batch and are printed
    in their order.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER", help=FOLDER)]
    prompt: Annotated[tyro.conf.UseAppendAction[list[str]], tyro.conf.arg(metavar="TEXT")]
    """Text to continue; - reads it from standard input. Give the option once per prompt."""
    max_new_tokens: int = 128
    """Maximum number of new tokens; the model may stop earlier."""
    temperature: float = 0.0
    """0 takes the most likely token each time; larger values sample more randomly."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    seed: Annotated[int | None, UNSET] = None
    """Sampling seed, for reproducible output."""
    dtype: Annotated[str, dtype_option(COMPUTE_DTYPES)] = "auto"
    """Compute dtype; auto (the default) uses the checkpoint's."""
    mtp: bool = True
    """Load the multi-token prediction modules, which generation does not use; --no-mtp ignores their tensors."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is the GPU if there is one."""
    json: bool = False
    """Print one JSON object per prompt, once all are finished, instead of streaming text."""

    def check(self) -> None:
        for name, ok, allowed in (
            ("prompt", bool(self.prompt), "at least one"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number from 0 up"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1"),
        ):
            if not ok:
                raise ConfigError(option(name), getattr(self, name), allowed)
        read_dtype(self.dtype, COMPUTE_DTYPES)


def run(args: Args) -> int:
    folder = find(args.folder)
    with from_cache(args.folder):
        tokenizer = read_tokenizer(folder)
    ends = end_ids(folder)
    prompts = [_text(prompt) for prompt in args.prompt]
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    if not all(ids):
        raise ConfigError("--prompt", prompts[ids.index([])], "some text")

    import torch

    import moe
    from moe.checkpoint.reading.load import usable_device
    from moe.generation import stream

    device = usable_device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    with from_cache(args.folder):
        model = moe.load(folder, device=device, dtype=read_dtype(args.dtype, COMPUTE_DTYPES), mtp=args.mtp)
    vocabulary = model.config.vocab_size
    if max(map(max, ids)) >= vocabulary:
        problem = "the tokenizer does not belong to this model"
        raise CheckpointError(folder, problem, expected=f"ids below {vocabulary}", found=max(map(max, ids)))

    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    if len(ids) == 1:
        mask = None  # nothing is padded, and plain causal attention is faster
    texts = [GrowingText(tokenizer, row) for row in ids]
    printer = None if args.json else _Printer(prompts)
    start = time.perf_counter()
    for step in stream(
        model,
        padded,
        max_new_tokens=args.max_new_tokens,
        attention_mask=mask,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    ):
        for text, token in zip(texts, step.tolist(), strict=True):
            if not text.ended:
                text.append(token, ended=token in ends)
        if printer is not None:
            printer.show(texts)
        if all(text.ended for text in texts):
            break
    seconds = time.perf_counter() - start
    for text in texts:
        text.finish()
    if printer is not None:
        printer.show(texts)
        return 0
    for prompt, text in zip(prompts, texts, strict=True):
        result = {"prompt": prompt, "text": text.text, "token_ids": text.token_ids}
        result |= {"finish_reason": "eos" if text.token_ids[-1] in ends else "length", "seconds": round(seconds, 3)}
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _text(prompt: str) -> str:
    try:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        text.encode()  # bytes of an argument that are not UTF-8 arrive as lone surrogates
    except UnicodeError:
        raise ConfigError("--prompt", prompt, "UTF-8 text") from None
    return text


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The folder's tokenizer.json, read as it is: transformers' AutoTokenizer alters some of them."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(file, "no such file; text needs the tokenizer that the model was trained with")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any content that it cannot read
        raise CheckpointError(file, f"not a tokenizer: {error}") from None


def end_ids(folder: Path) -> set[int]:
    """Ids that end a text: those of generation_config.json, or of config.json without that file, as in transformers."""
    file = next((f for f in (folder / "generation_config.json", folder / CONFIG) if f.is_file()), None)
    if file is None:
        return set()
    if file.name == CONFIG:
        values = read_config(folder).extra
    else:
        content = read_bounded(member(folder, file.name), MAX_CONFIG_BYTES)
        values = parse_as_python(content, file, max_values=MAX_CONFIG_VALUES)
    found = values.get("eos_token_id") if isinstance(values, Mapping) else None
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(file, "eos_token_id", expected="an id or a list of ids", found=repr(found)[:80])
    return set(ids)


class GrowingText:
    """The text of a sequence that grows by tokens, without characters that are still incomplete.

    Byte-level tokens may end within a character, and a token's text depends on the one before it (a leading space). So
    the tokens since the last complete character are decoded together with a few before them, and what is new is added.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.text, self.token_ids, self.ended = "", [], False
        self._context = prompt_ids[-8:]  # tokens whose text is out already
        self._pending: list[int] = []

    def append(self, token: int, *, ended: bool) -> None:
        """One more token; one that ends the text is kept in `token_ids` but not shown."""
        self.token_ids.append(token)
        self.ended = ended
        if ended:
            self.finish()
        else:
            self._pending.append(token)
            self._advance(final=False)

    def finish(self) -> None:
        """No more tokens come: bytes that never became a character are shown as U+FFFD."""
        self.ended = True
        self._advance(final=True)

    def _advance(self, *, final: bool) -> None:
        before = self.tokenizer.decode(self._context)
        after = self.tokenizer.decode(self._context + self._pending)
        if final or not after.endswith("\ufffd"):
            self.text += after[len(before) :]
            self._context, self._pending = self._pending[-8:] or self._context, []


class _Printer:
    """Prints texts one after the other: the first that has not ended grows on the screen, later ones wait."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts, self.current, self.shown = prompts, 0, -1

    def show(self, texts: list[GrowingText]) -> None:
        while self.current < len(texts):
            text = texts[self.current]
            if self.shown < 0:
                print(self.prompts[self.current], end="")
                self.shown = 0
            print(text.text[self.shown :], end="", flush=True)
            self.shown = len(text.text)
            if not text.ended:
                return
            print("\n" if self.current + 1 < len(texts) else "", flush=True)
            self.current, self.shown = self.current + 1, -1
