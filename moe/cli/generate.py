"""`moesmith generate`: continue prompts with a model."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from moe.checkpoint import read_config
from moe.checkpoint.chat import ChatTemplate
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import CONFIG, MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, member
from moe.checkpoint.format.strict_json import parse_as_python
from moe.checkpoint.reading.hub import explain_cache_misses, find
from moe.cli.options import COMPUTE_DTYPES, Option, dtype_option, option, read_dtype
from moe.cli.source import FOLDER
from moe.errors import CheckpointError, ConfigError
from moe.sampling import Sampling, Speculative

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moe.speculative import Statistics


@dataclass(frozen=True)
class Args:
    """Continue prompts with a model, or chat with it.

    Each prompt is printed with its continuation, as it is generated. Several prompts run as one batch and are printed
    in order. Tokens per second and measurements of speculative decoding go to standard error.

    With --chat, a prompt is a message, and only the model's answer is printed. Without --prompt, --chat holds a
    conversation: each line of standard input is a message; /quit or Ctrl-D ends it.
    """

    folder: Annotated[str, Option("FOLDER", positional=True, text=FOLDER)]
    prompt: Annotated[tuple[str, ...], Option(repeated=True)] = ()
    """Text to continue, or - to read it from standard input. Repeatable."""
    chat: bool = False
    """Apply the checkpoint's chat template. Without --prompt, hold a conversation."""
    system: str | None = None
    """System message, which precedes all others. Requires --chat."""
    max_new_tokens: int = 128
    """Maximum number of new tokens; the model may stop earlier."""
    stop: Annotated[tuple[str, ...], Option(repeated=True)] = ()
    """Stop before this text, which is not printed. Repeatable."""
    temperature: float = 0.0
    """Sampling temperature. 0 always takes the most likely token; larger values sample more randomly."""
    top_k: int = 0
    """Sample from the K most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose total probability reaches this value."""
    min_p: float = 0.0
    """Sample from the tokens whose probability is at least this fraction of the highest one; 0 means all."""
    repetition_penalty: float = 1.0
    """Penalty for tokens that are in the prompt or the new text; values above 1 make them less likely."""
    seed: int | None = None
    """Sampling seed, for reproducible output. Default: random."""
    dtype: Annotated[str, dtype_option(COMPUTE_DTYPES)] = "auto"
    """Compute dtype; auto uses the checkpoint's."""
    speculative: Speculative = "auto"
    """Draft tokens with the multi-token prediction modules, and verify several in one pass. auto: only if
    this makes the first passes faster; off: never, and do not load the modules."""
    quantize: Literal["int8"] | None = None
    """Convert weights to int8 while they are loaded. Halves the memory of bf16 weights and, on a CPU, decodes
    faster with --dtype bf16. `moesmith eval --quantize` prints the error."""
    pack: bool = False
    """Store bf16 weights in the layout that a CPU reads fastest, for faster decoding. Requires AVX-512 or
    AVX-NE-CONVERT, and bf16 weights or --dtype bf16."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    json: bool = False
    """Print one JSON object per prompt, once all are finished, instead of streaming text."""

    def check(self) -> None:
        for name, ok, allowed in (
            ("prompt", bool(self.prompt) or self.chat, "at least one, or --chat for a conversation; found neither"),
            ("system", self.system is None or self.chat, "--chat as well; found --system alone"),
            ("json", bool(self.prompt) or not self.json, "a --prompt as well; found --json alone"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("stop", all(self.stop), "some text"),
            ("pack", not (self.pack and self.quantize), f"no --quantize; found --quantize {self.quantize} as well"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1"),
        ):
            if not ok:
                raise ConfigError(option(name), "" if name in ("stop", "pack") else getattr(self, name), allowed)
        try:
            _ = self.sampling
        except ConfigError as error:
            raise ConfigError(option(error.field), error.value, error.allowed) from None
        read_dtype(self.dtype, COMPUTE_DTYPES)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def run(args: Args) -> int:
    folder = find(args.folder)
    with explain_cache_misses(args.folder):
        tokenizer = read_tokenizer(folder)
    template = ChatTemplate.read(folder) if args.chat else None
    system = [] if args.system is None else [_message("system", _utf8("--system", args.system))]
    prompts = [_utf8("--prompt", _standard_input() if prompt == "-" else prompt) for prompt in args.prompt]
    for stop in args.stop:
        _utf8("--stop", stop)
    if template is None:
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    else:
        ids = [_render(tokenizer, template, [*system, _message("user", prompt)]) for prompt in prompts]
    if not all(ids):
        raise ConfigError("--prompt", prompts[ids.index([])], "some text")

    model = _Model(args, folder, tokenizer, end_ids(folder))
    if template is not None and not prompts:
        return _converse(model, template, system)
    model.check(ids, prompts)
    shown = prompts if template is None else [""] * len(prompts)
    printer = None if args.json else _Printer(shown)
    texts, seconds, statistics = model.answer(ids, printer)
    if printer is None:
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            result = {"prompt": prompt, "text": text.text, "token_ids": text.token_ids}
            result |= {"finish_reason": text.reason, "seconds": round(seconds, 3)}
            result |= {"speculative": _speculative(statistics, i, len(text.token_ids))}
            print(json.dumps(result, ensure_ascii=False))
    return 0


def _converse(model: "_Model", template: ChatTemplate, messages: list[dict[str, str]]) -> int:
    """Answer each line of standard input, until it ends or is /quit."""
    if sys.stdin.isatty():
        print("/quit or Ctrl-D ends the conversation.", file=sys.stderr)
    while (line := _ask()) != "/quit":
        if not line:
            continue
        messages = [*messages, _message("user", line)]
        ids = _render(model.tokenizer, template, messages)
        model.check([ids], [line])
        (text,), *_ = model.answer([ids], _Printer([""]))
        messages = [*messages, _message("assistant", text.text)]
    return 0


def _ask() -> str:
    """The next line of standard input, without spaces around it; /quit at its end."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history, and arrow keys that work
    try:
        return _utf8("standard input", input("> " if on_terminal else "").strip())
    except EOFError:
        print(end="\n" if on_terminal else "")
        return "/quit"
    except UnicodeDecodeError as error:
        raise ConfigError("standard input", error.object[:80], "UTF-8 text") from None
    except KeyboardInterrupt:
        print()  # the message of the interruption gets a line of its own
        raise


def _render(tokenizer: "Tokenizer", template: ChatTemplate, messages: list[dict[str, str]]) -> list[int]:
    ids = tokenizer.encode(template.render(messages), add_special_tokens=False).ids
    if not ids:
        raise CheckpointError(template.file, "the chat template renders a message as no text")
    return ids


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _standard_input() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("--prompt", error.object[:80], "UTF-8 text") from None


def _utf8(where: str, text: str) -> str:
    try:
        text.encode()  # bytes of an argument that are not UTF-8 arrive as lone surrogates
    except UnicodeEncodeError:
        raise ConfigError(where, text, "UTF-8 text") from None
    return text


class _Model:
    """A loaded model that continues token ids with the options of the command."""

    def __init__(self, args: Args, folder: Path, tokenizer: "Tokenizer", ends: set[int]) -> None:
        import torch

        import moe
        from moe.checkpoint.reading.load import usable_device

        self.args, self.folder, self.tokenizer, self.ends = args, folder, tokenizer, ends
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        self.device = usable_device(chosen)
        with explain_cache_misses(args.folder):
            self.model = moe.load(
                folder,
                device=self.device,
                dtype=read_dtype(args.dtype, COMPUTE_DTYPES),
                mtp=args.speculative != "off",
                quantize=args.quantize,
            )
        if args.pack:
            try:
                self.model.pack()
            except ConfigError as error:
                raise ConfigError("--pack", error.value, error.allowed) from None

    def check(self, ids: list[list[int]], prompts: list[str]) -> None:
        """Raise ConfigError or CheckpointError for prompts that the model cannot process."""
        config = self.model.config
        if max(map(max, ids)) >= config.vocab_size:
            problem = "the tokenizer does not belong to this model"
            raise CheckpointError(
                self.folder, problem, expected=f"ids below {config.vocab_size}", found=max(map(max, ids))
            )
        positions = config.max_position_embeddings
        for row, prompt in zip(ids, prompts, strict=True):
            if len(row) >= positions:
                where, of = ("--prompt", "") if self.args.prompt else ("--chat", " in the whole conversation")
                allowed = f"fewer tokens{of} than the model's {positions} positions; found {len(row)}"
                raise ConfigError(where, prompt, allowed)

    def answer(
        self, ids: list[list[int]], printer: "_Printer | None"
    ) -> tuple[list["GrowingText"], float, "Statistics"]:
        """The continuation of each prompt, the elapsed seconds, and measurements of speculative decoding."""
        import torch

        from moe.generation import stream
        from moe.speculative import Statistics

        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=self.device)
        room = self.model.config.max_position_embeddings - longest
        statistics = Statistics()
        steps = stream(
            self.model,
            padded,
            self.args.sampling,
            max_new_tokens=min(self.args.max_new_tokens, room),
            attention_mask=mask if len(ids) > 1 else None,  # plain causal attention is faster
            seed=self.args.seed,
            eos_token_id=sorted(self.ends),
            speculative=self.args.speculative,
            statistics=statistics,
        )
        texts = [GrowingText(self.tokenizer, row, self.args.stop) for row in ids]
        start = time.perf_counter()
        try:
            for step in steps:
                for text, token in zip(texts, step.tolist(), strict=True):
                    if text.reason is None:
                        text.append(token, ended=token in self.ends)
                if printer is not None:
                    printer.show(texts)
                if all(text.reason is not None for text in texts):
                    break
        except FloatingPointError as error:
            raise CheckpointError(self.folder, str(error)) from error
        except KeyboardInterrupt:
            print(end="" if printer is None else "\n")  # the message of the interruption gets a line of its own
            raise
        seconds = time.perf_counter() - start
        if room < self.args.max_new_tokens and any(text.reason is None for text in texts):
            at = f"at the last of the model's {self.model.config.max_position_embeddings} positions"
            print(f"note: stopped after {room} new tokens, {at}", file=sys.stderr)
        for text in texts:
            text.finish("length")
        if printer is not None:
            printer.show(texts)
            new = sum(len(text.token_ids) for text in texts)
            print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s", file=sys.stderr)
            for line in _report(statistics, texts):
                print(f"speculative: {line}", file=sys.stderr)
        return texts, seconds, statistics


def _speculative(statistics: "Statistics", row: int, new: int) -> dict[str, Any] | None:
    """Measurements of speculative decoding for --json; None if nothing was drafted."""
    if not statistics.passes:
        return None
    return {
        "on": not statistics.turned_off,
        "drafted": statistics.drafted,
        "accepted": statistics.accepted,
        "tokens_per_pass": round(statistics.tokens_per_pass, 3),
        "tokens_per_second": round(statistics.speed, 3),
        "plain_tokens_per_second": round(statistics.plain_speed, 3),
        "logit_difference": statistics.logit_difference,
        "close_calls": [token for sequence, token in statistics.close_calls if sequence == row and token < new],
    }


def _report(statistics: "Statistics", texts: "list[GrowingText]") -> Iterator[str]:
    """Lines about speculative decoding; none if nothing was drafted."""
    if not statistics.passes:
        return
    line = f"{statistics.acceptance:.0%} of {statistics.drafted} drafts accepted"
    line += f", {statistics.tokens_per_pass:.2f} tokens per pass"
    line += f", {statistics.speed:.1f} tokens/s; without drafts {statistics.plain_speed:.1f} tokens/s"
    yield f"{line}; turned off" if statistics.turned_off else line
    for i, text in enumerate(texts):
        calls = [token + 1 for row, token in statistics.close_calls if row == i and token < len(text.token_ids)]
        if calls:
            of = f" of text {i + 1}" if len(texts) > 1 else ""
            close = f"the best two logits of tokens {', '.join(map(str, calls))}{of} are equal within rounding"
            yield f"{close}; there, plain decoding may choose another token"


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The folder's tokenizer.json, unaltered: transformers' AutoTokenizer changes some of them."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(file, "no such file; text needs the tokenizer that the model was trained with")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any content that it cannot read
        raise CheckpointError(file, f"not a tokenizer: {error}") from None
    tokenizer.no_truncation()  # a file may have it from training; it would cut prompts
    tokenizer.no_padding()
    return tokenizer


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
    """The text of a sequence that grows by tokens, up to a stop, and without what is still incomplete.

    Byte-level tokens may end within a character, and a token's text depends on the one before it (a leading space). So
    the tokens since the last complete character are decoded together with those before them, and what is new is added.
    The end of that is held back as long as it may be the beginning of a stop.

    Attributes:
        text: all text to show so far.
        token_ids: all tokens.
        reason: why the text has ended, "eos", "stop" or "length"; None while it continues.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt_ids: list[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.token_ids = "", []
        self.reason: str | None = None
        self._context = prompt_ids  # complete characters, already shown
        self._pending: list[int] = []
        self._held = ""
        # Special tokens have no text to search.
        ids = {i for stop in stops if (i := tokenizer.token_to_id(stop)) is not None}
        self._stop_ids = {i for i in ids if not tokenizer.decode([i])}

    def append(self, token: int, *, ended: bool) -> None:
        """One more token; one that ends the text is kept in `token_ids` but not shown."""
        self.token_ids.append(token)
        if ended or token in self._stop_ids:
            self.finish("eos" if ended else "stop")
        else:
            self._pending.append(token)
            self._advance(final=False)

    def finish(self, reason: str) -> None:
        """No more tokens come: bytes that never became a character are shown as U+FFFD."""
        if self.reason is None:
            self._advance(final=True)
            self.reason = self.reason or reason

    def _advance(self, *, final: bool) -> None:
        before = self.tokenizer.decode(self._context)
        after = self.tokenizer.decode(self._context + self._pending)
        if final or not after.endswith("\ufffd"):
            # Some decoders lose a character if bytes that are none follow it.
            new = after[len(before) :] if after.startswith(before) else self.tokenizer.decode(self._pending)
            self._held += new
            # Special tokens have no text that a space could follow.
            self._context, self._pending = self._pending if new else self._context, []
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:  # the stop that is complete first, however the text is cut into tokens
            shown, self.reason = min(ends)[1], "stop"
        else:
            shown = len(self._held) if final else self._begins_stop()
        self.text, self._held = self.text + self._held[:shown], self._held[shown:]

    def _begins_stop(self) -> int:
        """Where in `_held` a stop may have begun that is still incomplete; its length if none has."""
        held, longest = self._held, max(map(len, self.stops), default=0)
        starts = range(max(0, len(held) - longest + 1), len(held))
        return next((i for i in starts if any(stop.startswith(held[i:]) for stop in self.stops)), len(held))


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
            if text.reason is None:
                return
            print("\n" if self.current + 1 < len(texts) else "", flush=True)
            self.current, self.shown = self.current + 1, -1
