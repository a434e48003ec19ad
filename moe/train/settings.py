"""Everything that decides a training run, as one frozen dataclass. No torch here: the command line reads it first."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.errors import ConfigError

# These change what is written and shown, not what is trained; a resumed run may have others.
_CADENCE = ("eval_every", "save_every", "keep")


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how. Equal settings give equal bits on one machine."""

    preset: str = "tiny"
    """Model to build: a name from `moe.presets`. Its vocabulary becomes the tokenizer's."""
    data: tuple[Path, ...] = ()
    """UTF-8 text files, or folders of them; by default the language reference that ships with Python."""
    tokenizer: Path | None = None
    """A tokenizer.json; by default one is trained on the training text."""
    steps: int = 320
    """Optimizer steps."""
    batch_size: int = 4
    """Windows of text in one forward pass."""
    accumulation: int = 1
    """Forward passes in one optimizer step."""
    seq_length: int = 256
    """Tokens in one window."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon takes matrices and leaves the embedding, the head, gates and vectors to AdamW."""
    lr: float | None = None
    """Peak learning rate; by default 0.02 with muon, whose AdamW part takes 0.3 of it, and 0.004 with adamw."""
    weight_decay: float = 0.3
    """Of matrices; norms and biases have none."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """cosine to a tenth of the peak, or wsd: stable, then a linear decay over the last 30 percent."""
    warmup: int = 10
    """Steps in which the learning rate rises from zero."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together."""
    bias_update_speed: float = 0.01
    """Change of an expert's correction bias per step; long runs want DeepSeek's 0.001."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of products: bf16 is autocast, the parameters stay fp32."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    document_mask: bool = False
    """Let tokens of a window see their own document only."""
    seed: int = 0
    """Of the initial weights, the order of the data and the sample."""
    eval_every: int = 80
    """Steps between validations; it is always done before and after the run. 0 for these two only."""
    save_every: int = 80
    """Steps between saved states; one is always saved at the end or when interrupted. 0 for that one only."""
    keep: int = 2
    """Saved states that are kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "keep"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("eval_every", "save_every", "warmup"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("seq_length", self.seq_length >= 4, "4 or more")
        self._require("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1")
        self._require("lr", 0 < self.peak_lr < math.inf, "a finite number above 0")
        self._require("clip", 0 < self.clip < math.inf, "a finite number above 0")
        for name in ("weight_decay", "bias_update_speed"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number from 0 up")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(self, name), allowed)

    @property
    def peak_lr(self) -> float:
        """`lr`, or what the tiny preset did best with of those tried."""
        return self.lr if self.lr is not None else {"muon": 0.02, "adamw": 0.004}[self.optimizer]

    def deciding(self) -> dict[str, Any]:
        """JSON values of the settings that a resumed run must share. Paths are absolute."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings) if f.name not in _CADENCE}
        values["data"] = [str(path.resolve()) for path in self.data]
        values["lr"] = self.peak_lr
        values["tokenizer"] = str(self.tokenizer.resolve()) if self.tokenizer else None
        return values

    def options(self) -> list[str]:
        """Command-line options that give these settings."""
        words: list[str] = []
        for f in dataclasses.fields(Settings):
            value = getattr(self, f.name)
            if value == f.default:
                continue
            option = f"--{f.name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(option)
            else:
                words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
        return words
