"""Settings of runs, as frozen dataclasses: `RunSettings` of every kind of run, `Settings` of `moesmith train`.

Imports no torch, because the command line reads it first.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.reading.hub import is_hub_name
from moe.errors import ConfigError

# These change what is written and where it is computed, but not what is trained; a resumed run may change them.
_FREE = ("eval_every", "save_every", "keep", "log", "device", "ep", "dp_shard", "dp_replicate", "timeout")

DEFAULT_PRESET = "tiny"


@dataclass(frozen=True)
class ModelSettings:
    """Settings that select the model."""

    preset: str | None = None
    """Preset to train, a name from `moe.presets`. The tokenizer determines the vocabulary size. Default: tiny."""
    config: Path | None = None
    """Configuration to train instead: a Hugging Face config.json or its folder, or a JSON object of ModelConfig
    fields."""
    set: tuple[str, ...] = ()
    """Field of the configuration to change, for example num_hidden_layers=12. Repeatable."""
    init: Path | None = None
    """Continue from the weights and the tokenizer of a checkpoint: a folder, a run, or a Hugging Face Hub name."""
    tokenizer: Path | None = None
    """Tokenizer: a tokenizer.json, or a folder or Hub name that has one. Default: one trained on the training text."""

    @property
    def source(self) -> str:
        """Name of the setting that selects the model: preset, config or init."""
        return next((name for name in ("config", "init") if getattr(self, name) is not None), "preset")

    @property
    def name(self) -> str:
        """Name of the model, for messages and the default folder."""
        if self.config is not None:
            path = self.config.resolve().parent if self.config.name == CONFIG else self.config
            return path.name.removesuffix(".json")
        return self.preset or (DEFAULT_PRESET if self.init is None else self.init.name)


@dataclass(frozen=True)
class RunSettings(ModelSettings):
    """Settings of every kind of run.

    Class attributes that a subclass sets:
        kind: name of the command; settings.json records it.
        default_lr: peak learning rate for each optimizer without --lr.
    """

    kind: ClassVar[str]
    default_lr: ClassVar[Mapping[str, float]] = {"muon": 0.02, "adamw": 0.004}

    steps: int = 320
    """Number of optimizer steps."""
    batch_size: int = 4
    """Sequences per forward pass, summed over all ranks."""
    accumulation: int = 1
    """Forward passes per optimizer step."""
    seq_length: int = 256
    """Sequence length in tokens."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer. muon uses Muon for matrices and AdamW for the embedding, head, gates and vectors."""
    lr: float | None = None
    """Peak learning rate. Default: 0.02 with muon (0.3 of it for the AdamW part), 0.004 with adamw."""
    weight_decay: float = 0.3
    """Weight decay, applied to matrices only, not to norms or biases."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """Learning-rate schedule. cosine decays to a tenth of the peak; wsd is constant, then decays linearly over the last
    30 percent of the steps."""
    warmup: int = 10
    """Steps over which the learning rate rises from zero."""
    clip: float = 1.0
    """Clip the global gradient norm to this value."""
    bias_update_speed: float = 0.01
    """Change of an expert's correction bias per step; use DeepSeek's 0.001 for long runs."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute precision. bf16 uses autocast; parameters stay in fp32."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Train with torch.compile; the first step takes longer. Validation is not compiled."""
    seed: int = 0
    """Random seed for weights, data order and the final sample."""
    eval_every: int = 80
    """Validate every N steps, and always before and after the run; 0 disables the rest."""
    save_every: int = 80
    """Save a state every N steps, and always at the end or when interrupted; 0 disables the rest."""
    keep: int = 2
    """Number of saved states to keep."""
    log: Literal["tensorboard", "wandb"] | None = None
    """Also log to TensorBoard or Weights & Biases, in the run's folder. Under torchrun, which has options that begin
    with --log, write --log-to."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to compute on. Under torchrun, each process uses the GPU of its local rank."""
    ep: int = 1
    """Under torchrun: number of ranks that divide the experts of each layer."""
    dp_shard: int | None = None
    """Under torchrun: number of ranks that shard all other parameters. Default: number of ranks / --dp-replicate."""
    dp_replicate: int = 1
    """Under torchrun: number of replicas of the sharded parameters."""
    dispatch: Literal["same", "fp8"] = "same"
    """Dtype of tokens sent to experts on other ranks. same: unchanged; fp8: FP8 with one scale per 128 values."""
    timeout: float = 600.0
    """Under torchrun: seconds to wait for a rank before all others raise an error."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ConfigError for a value that is out of range and for settings that exclude each other."""
        sources = [f"--{name}" for name in ("preset", "config", "init") if getattr(self, name) is not None]
        if len(sources) > 1 or (self.init is not None and self.set):
            given = [*sources, *(["--set"] if self.set else [])]
            allowed = "only one of --preset, --config and --init, and --set only with the first two"
            raise ConfigError(
                given[-1], _plain(getattr(self, given[-1][2:])), f"{allowed}; found {' and '.join(given)}"
            )
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
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(self, name), allowed)

    @property
    def peak_lr(self) -> float:
        """`lr`, or the default of the optimizer."""
        return self.lr if self.lr is not None else self.default_lr[self.optimizer]

    @property
    def attention_masks(self) -> bool:
        """Whether attention needs a mask [S, S] of each sequence, because a sequence contains several documents."""
        return False

    @property
    def default_folder(self) -> Path:
        """Folder of the run without --out."""
        return Path("runs") / (self.name if self.kind == "train" else f"{self.name}-{self.kind}")

    @classmethod
    def own(cls) -> type[Self]:
        """The class that sets `kind`: the options of a command derive from it and have more fields."""
        found: Any = next(each for each in cls.__mro__ if "kind" in vars(each))
        return found

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """JSON values of the deciding settings, unless given; for those that earlier releases did not record."""
        values = {f.name: _plain(f.default) for f in dataclasses.fields(cls.own()) if f.name not in _FREE}
        return {"kind": "train"} | values

    def deciding(self) -> dict[str, Any]:
        """JSON values of the settings that a resumed run must repeat. Paths are absolute."""
        names = [f.name for f in dataclasses.fields(self.own()) if f.name not in _FREE]
        values = {"kind": self.kind} | {name: _plain(getattr(self, name)) for name in names}
        values["lr"] = self.peak_lr
        if self.config is None and self.init is None:
            values["preset"] = self.preset or DEFAULT_PRESET
        return values

    @classmethod
    def from_deciding(cls, values: Mapping[str, Any]) -> Self:
        """The settings from the `values` that `deciding` returned; missing ones have their defaults.

        Raises ConfigError if they are those of another kind of run.
        """
        made = cls.own()
        check_kind(values, made.kind)
        kinds = get_type_hints(made)
        known = [f.name for f in dataclasses.fields(made) if f.name in values]
        return made(**{name: _typed(values[name], kinds[name]) for name in known})

    def options(self, without: Collection[str] = ()) -> list[str]:
        """Command-line options that give these settings, except those named in `without`."""
        words: list[str] = []
        for f in dataclasses.fields(self.own()):
            value = getattr(self, f.name)
            if value == f.default or f.name in without:
                continue
            option = "--log-to" if f.name == "log" else f"--{f.name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(option)
            elif f.name == "set":
                words += [word for each in value for word in (option, each)]
            else:
                words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
        return words


# Not in `Settings` itself, whose fields follow those of its bases: --help shows the data before the steps.
@dataclass(frozen=True)
class TextSettings(ModelSettings):
    """Settings of the text to train on."""

    data: tuple[Path, ...] | None = None
    """Text, JSON Lines, JSON or Parquet files, or folders of them. Default: the Python language reference."""
    field: str = "text"
    """Name of the text field in JSON Lines, JSON and Parquet files."""
    validation_data: tuple[Path, ...] | None = None
    """Files or folders to validate on. Default: a tenth of the documents of --data, held out of training."""
    document_mask: bool = False
    """Restrict attention to tokens of the same document. The first token of a document is then not predicted or
    scored."""


@dataclass(frozen=True)
class Settings(RunSettings, TextSettings):
    """Settings of `moesmith train`. Identical settings give bit-identical results on one machine."""

    kind: ClassVar[str] = "train"

    def check(self) -> None:
        for name in ("data", "validation_data"):
            self._require(name, getattr(self, name) != (), "one or more files or folders")
        self._require("field", bool(self.field), "the name of a field")
        super().check()

    @property
    def attention_masks(self) -> bool:
        return self.document_mask

    def deciding(self) -> dict[str, Any]:
        values = super().deciding()
        return values | {"data": values["data"] or []}


def check_kind(values: Mapping[str, Any], kind: str) -> None:
    """Raise ConfigError if the `values` of a settings.json are those of a run of another command than `kind`."""
    found = values.get("kind", "train")  # not recorded by earlier releases
    if found != kind:
        raise ConfigError("--resume", None, f"a run of moesmith {kind}; found a run of moesmith {found}")


def _plain(value: Any) -> Any:
    """The JSON value of a setting, with absolute paths; names on the Hub are unchanged."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value if is_hub_name(value) else value.resolve())
    return value


def _typed(value: Any, kind: Any) -> Any:
    """The setting of type `kind` that `_plain` made a JSON value."""
    for each in (kind, *get_args(kind)):
        if each is Path and value:
            return Path(value)
        if get_origin(each) is tuple:
            member, *_ = get_args(each)
            return tuple(map(member, value or ())) or (() if each is kind else None)
    return value
