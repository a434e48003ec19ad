"""Everything that decides a training run, as one frozen dataclass. No torch here: the command line reads it first."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.checkpoint.reading.hub import is_name
from moe.errors import ConfigError

# These change what is written and shown, and where it is computed, not what is trained; a resumed run may have others.
_FREE = ("eval_every", "save_every", "keep", "device", "ep", "dp_shard", "dp_replicate", "timeout")


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how. Equal settings give equal bits on one machine."""

    preset: str = "tiny"
    """Model to build: a name from `moe.presets`. Its vocabulary becomes the tokenizer's."""
    data: tuple[Path, ...] = ()
    """UTF-8 text files, or folders of them; by default the language reference that ships with Python."""
    tokenizer: Path | None = None
    """tokenizer.json, or a folder or Hub name that has one; default: one trained on the training text."""
    steps: int = 320
    """Optimizer steps."""
    batch_size: int = 4
    """Windows of text in one forward pass, of all ranks together."""
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
    """Let tokens of a window see their own document only; first tokens of documents are not predicted or scored."""
    seed: int = 0
    """Of the initial weights, the order of the data and the sample."""
    eval_every: int = 80
    """Steps between validations; it is always done before and after the run. 0 for these two only."""
    save_every: int = 80
    """Steps between saved states; one is always saved at the end or when interrupted. 0 for that one only."""
    keep: int = 2
    """Saved states that are kept."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute; under torchrun each process takes the GPU of its local rank."""
    ep: int = 1
    """Under torchrun: ranks among which the experts of each layer are divided."""
    dp_shard: int | None = None
    """Under torchrun: ranks over which all other parameters are cut; by default all, divided by --dp-replicate."""
    dp_replicate: int = 1
    """Under torchrun: copies of these."""
    dispatch: Literal["same", "fp8"] = "same"
    """How tokens travel to experts on other ranks: in their own dtype, or in FP8 with a scale for 128 values."""
    timeout: float = 600.0
    """Under torchrun: seconds after which a rank that does not answer is an error on all others."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        for name in ("steps", "batch_size", "accumulation", "keep", "ep", "dp_replicate"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("eval_every", "save_every", "warmup"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("seq_length", self.seq_length >= 4, "4 or more")
        self._require("seed", 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1")
        self._require("lr", 0 < self.peak_lr < math.inf, "a finite number above 0")
        self._require("clip", 0 < self.clip < math.inf, "a finite number above 0")
        self._require("timeout", 0 < self.timeout < math.inf, "a finite number above 0")
        self._require("dp_shard", self.dp_shard is None or self.dp_shard >= 1, "1 or more")
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
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings) if f.name not in _FREE}
        values["data"] = [str(path.resolve()) for path in self.data]
        values["lr"] = self.peak_lr
        tokenizer = self.tokenizer
        values["tokenizer"] = (
            None if tokenizer is None else str(tokenizer if is_name(tokenizer) else tokenizer.resolve())
        )
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
