"""A tokenizer with a chat template, and examples, for fine-tuning."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import ModelConfig
from moe.presets import PRESETS
from tests.support.command_line import write_tokenizer

# An end-of-turn token after every message, and a line break: the usual form of released templates.
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A folder with a byte-level tokenizer of single bytes and special tokens; <|end|> ends a text."""
    write_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_examples(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def sums(count: int) -> list[dict[str, str]]:
    """Prompts and completions of different lengths."""
    return [{"prompt": f"{i}+{i % 7}=", "completion": f"{i + i % 7}" + "!" * (i % 3)} for i in range(count)]


@contextmanager
def small_runs(monkeypatch: pytest.MonkeyPatch, **presets: ModelConfig) -> Iterator[None]:
    """These presets, on one thread; runs without plots and with a short sample."""
    for name, config in presets.items():
        monkeypatch.setitem(PRESETS, name, config)
    monkeypatch.setattr("moe.recipes.sft._plot", lambda *_: [])
    monkeypatch.setattr("moe.recipes.sft.SAMPLE_NEW_TOKENS", 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # set by the command otherwise, and for good
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
