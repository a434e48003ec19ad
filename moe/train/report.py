"""What people see of a run: a progress bar, and tables at the end."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 5.0


class ProgressDisplay:
    """A bar on a terminal; elsewhere a plain line every few seconds. `note` prints above the bar."""

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

    def update(self, step: int, loss: float, tokens_per_second: float, max_vio: float) -> None:
        text = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  worst MaxVio {max_vio:.2f}"
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = now
            self.note(f"step {step}/{self._steps}  {text}")

    def note(self, text: str) -> None:
        say(self._console, text)


def say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_summary(console: Console, summary: dict[str, Any], command: str | None) -> None:
    """The tables, the sample, and where everything is. `command` continues a prompt with the saved model."""
    scored = summary["validation"]
    table = Table(title=f"validation, {scored['tokens']:,} tokens of {scored['documents']} held-out documents")
    table.add_column("")
    for heading in ("nats/token", "bits/byte"):
        table.add_column(heading, justify="right")
    for label, key in (
        ("before training", "before"),
        ("unigram", "unigram"),
        ("bigram, interpolated", "bigram"),
        ("after training", "after"),
    ):
        row = scored[key]
        table.add_row(label, f"{row['nats_per_token']:.4f}", f"{row['bits_per_byte']:.4f}")
    console.print(table)

    _print_load(console, summary["load"], "expert load on the validation text")

    say(console, f"sample ({summary['sample']['prompt']!r} and what the model adds):")
    say(console, summary["sample"]["text"])
    say(console, "")
    rate, seconds = summary["tokens_per_second"], summary["seconds"]
    say(console, f"{summary['steps']} steps, {rate:,.0f} tokens/s while stepping, {seconds:.0f} s in all")
    plots = "  ".join(summary["plots"]) or 'none: matplotlib is not installed; pip install -e ".[plot]"'
    say(console, f"plots        {plots}")
    say(console, f"metrics      {summary['metrics']}")
    say(console, f"checkpoint   {summary['checkpoint']}")
    if command is not None:
        say(console, f"try          {command}")


def print_scores(console: Console, result: dict[str, Any]) -> None:
    """What `moe.train.scoring.score` returns, as tables."""
    scored = f"{result['tokens']:,} tokens of {result['documents']:,} documents"
    say(console, f"{result['folder']}: {scored}, in windows of {result['seq_length']:,}")
    table = Table()
    for heading in ("perplexity", "nats/token", "bits/byte"):
        table.add_column(heading, justify="right")
    table.add_row(f"{result['perplexity']:,.4f}", f"{result['nats_per_token']:.4f}", f"{result['bits_per_byte']:.4f}")
    console.print(table)
    _print_load(console, result["load"], "expert load")


def _print_load(console: Console, load: list[dict[str, Any]], title: str) -> None:
    if not load:
        return
    table = Table(title=title)
    table.add_column("layer")
    for heading in ("MaxVio", "dead experts", "least", "most"):
        table.add_column(heading, justify="right")
    for row in load:
        counts = f"{min(row['tokens']):,}", f"{max(row['tokens']):,}"
        table.add_row(row["layer"], f"{row['max_vio']:.3f}", str(row["dead_experts"]), *counts)
    console.print(table)
