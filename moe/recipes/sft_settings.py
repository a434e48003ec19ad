"""Settings of `moesmith sft`. Imports no torch, because the command line reads them first."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moe.errors import ConfigError
from moe.train.settings import ModelSettings, RunSettings


# Apart, so that --help shows these before the steps; see `moe.train.settings.TextSettings`.
@dataclass(frozen=True)
class ExampleSettings(ModelSettings):
    """Settings of the examples to train on."""

    tokenizer: Path | None = None
    """Tokenizer: a tokenizer.json, or a folder or Hub name that has one. Default: that of --init."""
    data: tuple[Path, ...] | None = None
    """JSON Lines or JSON files of examples, or folders of them. An example is {"prompt": ..., "completion": ...}, with
    text or lists of messages, or {"messages": [...]}."""
    validation_data: tuple[Path, ...] | None = None
    """Files or folders to validate on. Default: the examples of a tenth of the prompts, held out of training."""
    epochs: int = 0
    """Passes over the examples, instead of --steps. Default: as many as the steps take."""


@dataclass(frozen=True)
class SftSettings(RunSettings, ExampleSettings):
    """Settings of `moesmith sft`. Identical settings give bit-identical results on one machine."""

    kind: ClassVar[str] = "sft"
    default_lr: ClassVar[Mapping[str, float]] = {"muon": 0.002, "adamw": 0.0004}

    batch_size: int = 4
    """Rows of packed examples per forward pass, summed over all ranks."""
    seq_length: int = 256
    """Row length in tokens. Examples that are longer are left out and counted."""
    lr: float | None = None
    """Peak learning rate. Default: 0.002 with muon (0.3 of it for the AdamW part), 0.0004 with adamw."""

    def check(self) -> None:
        for name in ("data", "validation_data"):
            self._require(name, getattr(self, name) != (), "one or more files or folders")
        self._check_data()
        self._require("epochs", self.epochs >= 0, "0 or more")
        if self.epochs and self.steps != RunSettings.steps:
            raise ConfigError("--epochs", self.epochs, f"no --steps as well; found --steps {self.steps}")
        super().check()
        if self.tokenizer_path is None:
            allowed = "a checkpoint to fine-tune, or --tokenizer for a new model"
            raise ConfigError("--init", None, f"{allowed}; found neither")

    def _check_data(self) -> None:
        self._require("data", self.data is not None, "files or folders of examples")

    @property
    def tokenizer_path(self) -> Path | None:
        """Path of the tokenizer, for `find_tokenizer`."""
        return self.tokenizer or self.init

    @property
    def attention_masks(self) -> bool:
        return True

    def deciding(self) -> dict[str, Any]:
        values = super().deciding()
        return values | {"data": values["data"] or []}
