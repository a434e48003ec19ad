"""Which tensors a checkpoint of a configuration has, and where each goes in the model: `families.py`, expanded."""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from moe.checkpoint.config_json import parse_config
from moe.checkpoint.families import FAMILIES, Family, Names, family_of
from moe.checkpoint.folder import CONFIG, locate, read_config_values, read_tensors
from moe.checkpoint.header import TensorInfo
from moe.config import ModelConfig
from moe.counts import Shape, parameter_shapes
from moe.errors import CheckpointError

logger = logging.getLogger("moe")

MAX_EXPERTS = 2**18  # ten times the largest released model; a config.json from a stranger may ask for billions


@dataclass(frozen=True)
class Slot:
    """A tensor of the files, and what it fills: `state_dict()[parameter][index]`, which has `shape`.

    A repeat is one more copy of a parameter that has a slot of its own; where the files have it, it must be equal.
    `written` says whether a save writes it.
    """

    name: str
    parameter: str
    index: tuple[int | slice, ...]
    shape: Shape
    repeat: bool = False
    written: bool = True


def layout(config: ModelConfig) -> dict[str, Slot]:
    """File tensor name -> `Slot`, for every tensor that a checkpoint of `config` can have.

    The slots without repeats tile the parameters: each value of the model has exactly one place in the files.
    """
    family = family_of(config.model_type, CONFIG)
    experts = config.n_routed_experts * (config.num_moe_layers + config.num_nextn_predict_layers)
    if experts > MAX_EXPERTS:
        raise CheckpointError(CONFIG, "experts in all layers", expected=f"at most {MAX_EXPERTS}", found=experts)
    slots = {}
    for parameter, shape in parameter_shapes(config).items():
        prefix, local, names = _table(family, config, parameter)
        if local not in names:
            raise CheckpointError(CONFIG, f"{family.model_type} has no name for it", tensor=parameter)
        for slot in _expand(prefix, names[local], parameter, shape):
            slots[slot.name] = slot
    slots.update((slot.name, slot) for slot in _repeats(family, config))
    return slots


def _table(family: Family, config: ModelConfig, parameter: str) -> tuple[str, str, Names]:
    """Prefix in the files, name within the table, and the table that names `parameter`."""
    match parameter.split("."):
        case ["layers", layer, *rest]:
            return family.layer_prefix.format(layer=layer), ".".join(rest), family.block
        case ["mtp", module, "block", *rest]:
            return _mtp_prefix(family, config, int(module)), ".".join(rest), family.block
        case ["mtp", module, *rest]:
            return _mtp_prefix(family, config, int(module)), ".".join(rest), family.mtp
        case _:
            return "", parameter, family.top


def _mtp_prefix(family: Family, config: ModelConfig, module: int) -> str:
    return family.layer_prefix.format(layer=config.num_hidden_layers + module)


def _expand(prefix: str, names: str | tuple[str, ...], parameter: str, shape: Shape) -> Iterator[Slot]:
    names = (names,) if isinstance(names, str) else names
    stacked = "{expert}" in names[0]
    rows, *rest = shape[1:] if stacked else shape
    part = rows // len(names)
    for expert in range(shape[0]) if stacked else (None,):
        for i, name in enumerate(names):
            index: tuple[int | slice, ...] = () if expert is None else (expert,)
            if len(names) > 1:
                index += (slice(i * part, (i + 1) * part),)
            yield Slot(prefix + name.format(expert=expert), parameter, index, (part, *rest))


def _repeats(family: Family, config: ModelConfig) -> Iterator[Slot]:
    shape = (config.vocab_size, config.hidden_size)
    head = "lm_head.weight"
    source = {head: "embed_tokens.weight"} if config.tie_word_embeddings else {}
    for module in range(config.num_nextn_predict_layers):
        prefix = _mtp_prefix(family, config, module)
        for parameter, name in family.mtp_repeats.items():
            yield Slot(prefix + name, source.get(parameter, parameter), (), shape, repeat=True)
    if config.tie_word_embeddings:
        name = family.top[head]
        assert isinstance(name, str)
        # transformers leaves it out as well
        yield Slot(name, "embed_tokens.weight", (), shape, repeat=True, written=False)


@dataclass(frozen=True)
class Plan:
    """What a folder holds beside what its configuration asks for. Nothing but headers has been read.

    Attributes:
        config: without MTP modules where the files have none of their tensors, whatever config.json says.
        tensors: all that the files hold.
        slots: what they should hold.
        missing, unexpected, misshaped: names; repeats are never missing.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    slots: dict[str, Slot]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    def check(self) -> None:
        """Raise `CheckpointError` for the first tensor that is missing, unexpected or mis-shaped."""
        for names, problem in ((self.missing, "missing"), (self.unexpected, "unexpected"), (self.misshaped, "shape")):
            if not names:
                continue
            name = names[0]
            found = self.tensors.get(name)
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                found.path if found else self.folder,
                problem + more,
                tensor=name,
                expected=list(self.slots[name].shape) if name in self.slots else "no such tensor",
                found=list(found.shape) if found else "no such tensor",
            )


def plan(folder: str | PathLike[str]) -> Plan:
    """Read config.json and the headers of `folder`, and compare them."""
    path = locate(folder)
    values = read_config_values(path)
    config = parse_config(values, path / CONFIG)
    tensors = read_tensors(path)
    config = _with_mtp_of_files(config, tensors)
    slots = layout(config)
    return Plan(
        folder=path,
        config=config,
        tensors=tensors,
        slots=slots,
        missing=tuple(name for name, slot in slots.items() if not slot.repeat and name not in tensors),
        # Nothing is lost with a tensor that holds nothing: transformers writes shared experts of width 0.
        unexpected=tuple(name for name in tensors if name not in slots and tensors[name].numel),
        misshaped=tuple(name for name in tensors if name in slots and tensors[name].shape != slots[name].shape),
    )


def _with_mtp_of_files(config: ModelConfig, tensors: dict[str, TensorInfo]) -> ModelConfig:
    """transformers writes num_nextn_predict_layers: 1 and no such layer; then the model has none."""
    modules = config.num_nextn_predict_layers
    if not modules:
        return config
    prefixes = tuple(_mtp_prefix(FAMILIES[config.model_type], config, k) for k in range(modules))
    if any(name.startswith(prefixes) for name in tensors):
        return config
    logger.warning(
        "config.json has num_nextn_predict_layers %d but the files hold no such layer: no MTP modules", modules
    )
    return dataclasses.replace(config, num_nextn_predict_layers=0)
