"""Terminal output of training and scoring: progress and tables."""

import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
LEAST_TEXT_WIDTH = 12  # of the text columns of a table


class ProgressDisplay:
    """A progress bar on a terminal, or a plain line every few seconds elsewhere. `note` prints above the bar."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._steps = console, steps
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, text="")

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:  # before rich 14.3 a disabled bar ends with an empty line
            self._bar.stop()

    def update(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = now
            self.note(f"step {step}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        say(self._console, text)


def say(console: Console, text: str) -> None:
    """Print text as it is: not coloured, not wrapped, so that paths and commands can be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_text(console: Console, text: str, indent: str = "") -> None:
    """Print prose, wrapped at words; `indent` is that of all lines but the first."""
    wrapped = textwrap.fill(
        text, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    say(console, wrapped)


def print_table(
    console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1
) -> None:
    """Print a table without a frame: `text_columns` on the left, which continue on the next line, then numbers.

    A table that is too wide for the terminal is printed beyond its edge, because rich would leave out columns.
    """
    say(console, title)  # rich would wrap a title to the width of its table
    rows, least = list(rows), 0
    for number in range(len(headings)):
        longest = max(len(row[number]) for row in [headings, *rows] if number < len(row))
        least += (min(longest, LEAST_TEXT_WIDTH) if number < text_columns else longest) + 3 * (number > 0)
    width = least if least > console.width else None
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, width=width)
    for number, heading in enumerate(headings):
        if number < text_columns:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # names of untrusted files are not markup
    console.print(table, crop=False)
    console.print()


def print_summary(console: Console, summary: dict[str, Any], command: str | None) -> None:
    """Print the tables, the sample and the files of a run; `command` continues a prompt with the saved model."""
    scored = summary["validation"]
    labels = {
        "before": "before training",
        "unigram": "unigram",
        "bigram": "bigram, interpolated",
        "after": "after training",
    }
    print_table(
        console,
        f"validation on {scored['tokens']:,} tokens of {scored['documents']:,} held-out documents",
        ("", "nats/token", "bits/byte"),
        [
            (label, f"{scored[key]['nats_per_token']:.4f}", f"{scored[key]['bits_per_byte']:.4f}")
            for key, label in labels.items()
        ],
    )
    print_load(console, summary["load"], "expert load on the validation text")

    say(console, f"sample (the prompt {summary['sample']['prompt']!r} and its continuation):")
    say(console, summary["sample"]["text"])
    say(console, "")
    print_files(console, summary, command)


def print_files(console: Console, summary: dict[str, Any], command: str | None) -> None:
    """Print the duration and the files of a run, and a `command` to try the model."""
    rate, seconds = summary["tokens_per_second"], summary["seconds"]
    say(console, f"{summary['steps']} steps at {rate:,.0f} tokens/s, {seconds:.0f} s in total")
    plots = "  ".join(summary["plots"]) or 'none: matplotlib is not installed; pip install -e ".[plot]"'
    say(console, f"plots        {plots}")
    say(console, f"metrics      {summary['metrics']}")
    say(console, f"checkpoint   {summary['checkpoint']}")
    if command is not None:
        say(console, f"try          {command}")


def print_policy_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary of a run of `moesmith grpo`."""
    scored = summary["validation"]
    labels = {"before": "before training", "after": "after training"}
    rows = ((label, *(f"{value:.4g}" for value in scored[key].values())) for key, label in labels.items())
    title = f"{summary['task']}: {scored['prompts']:,} held-out prompts, most likely tokens"
    print_table(console, title, ("", *scored["after"]), rows)
    say(console, f"sample (the prompt {summary['sample']['prompt']!r} and its completion):")
    say(console, summary["sample"]["text"])
    say(console, "")
    print_files(console, summary, None)


def print_task_scores(console: Console, result: dict[str, Any]) -> None:
    """Print the result of `moesmith eval --task`."""
    title = f"{result['folder']}: {result['task']}, {result['prompts']:,} held-out prompts"
    names = [name for name in result if name not in ("folder", "task", "prompts", "temperature")]
    print_table(console, title, names, [[f"{result[name]:.4g}" for name in names]], text_columns=0)


def print_completions(console: Console, summary: dict[str, Any], command: str | None) -> None:
    """Print the tables, the sample and the files of a run on examples."""
    scored, sample = summary["validation"], summary["sample"]
    print_table(
        console,
        f"validation on {scored['tokens']:,} completion tokens of {scored['examples']:,} held-out examples",
        ("", "nats/token"),
        [(f"{name} training", f"{scored[name]['nats_per_token']:.4f}") for name in ("before", "after")],
    )
    print_load(console, summary["load"], "expert load on the held-out examples")
    say(console, f"sample (the prompt {sample['prompt']!r} and its completion):")
    say(console, sample["text"])
    say(console, "")
    print_files(console, summary, command)


def print_scores(console: Console, result: dict[str, Any]) -> None:
    """Print the result of `moe.train.scoring.score`, and the rows of `compare` under "precisions", as tables."""
    scored = f"{result['tokens']:,} tokens of {result['documents']:,} documents"
    row = f"{result['perplexity']:,.4f}", f"{result['nats_per_token']:.4f}", f"{result['bits_per_byte']:.4f}"
    title = f"{result['folder']}: {scored}, in windows of {result['seq_length']:,} tokens"
    print_table(console, title, ("perplexity", "nats/token", "bits/byte"), [row], text_columns=0)
    if precisions := result.get("precisions"):
        print_table(
            console,
            "error of the logits against fp32",
            ("weights", "dtype", "bytes", "nats/token", "relative", "KL", "same top-1"),
            [
                (
                    row["weights"],
                    row["dtype"],
                    f"{row['bytes']:,}",
                    f"{row['nats_per_token']:.4f}",
                    f"{row['logits_error']:.2e}",
                    f"{row['kl_divergence']:.2e}",
                    f"{row['top1_agreement']:.1%}",
                )
                for row in precisions
            ],
            text_columns=2,
        )
    print_load(console, result["load"], "expert load")


def print_load(console: Console, load: list[dict[str, Any]], title: str) -> None:
    """Print the rows of `moe.train.scoring.load_rows`, if there are any."""
    if load:
        headings = ("layer", "MaxVio", "dead experts", "fewest tokens", "most tokens")
        rows = (
            (
                row["layer"],
                f"{row['max_vio']:.3f}",
                str(row["dead_experts"]),
                f"{min(row['tokens']):,}",
                f"{max(row['tokens']):,}",
            )
            for row in load
        )
        print_table(console, title, headings, rows)
