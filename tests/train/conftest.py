"""Data for training runs and the preset of their model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.presets import PRESETS
from moe.train.data import Dataset, prepare
from tests.support.training import MICRO


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The preset, on one thread: models this small spend their time waiting for a second one."""
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files that differ."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ("the", "a", "model", "layer", "expert", "token", "router", "gate", "loss", "step", "of", "in", "to", "is")
    for i in range(24):
        (folder / f"{i:02}.txt").write_text("\n\n".join(" ".join(rng.choice(words, 40)) + "." for _ in range(4)))
    return folder


@pytest.fixture(scope="session")
def dataset(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(tmp_path_factory.mktemp("data"), [text], None, MICRO.vocab_size)


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which documents of one word alternate with long ones: windows predict unequal numbers of tokens."""
    folder = tmp_path_factory.mktemp("short")
    rng = np.random.default_rng(1)
    for i in range(60):
        text = " ".join(rng.choice(["ein", "zwei", "drei", "vier", "fünf", "日本語"], 1 if i % 3 else 60))
        (folder / f"{i:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def short(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(tmp_path_factory.mktemp("data"), [short_documents], None, MICRO.vocab_size)
