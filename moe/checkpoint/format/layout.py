"""Tensors of a checkpoint for a given configuration, and where each belongs in the model."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.family import MXFP4, Names, Reordered, Row, Table
from moe.checkpoint.format.folder import CONFIG
from moe.checkpoint.format.tensor_roles import is_quantisable
from moe.config import ModelConfig
from moe.counts import Shape, parameter_shapes
from moe.errors import CheckpointError

MAX_EXPERTS = 2**18  # ten times the largest released model; an untrusted config.json may request billions
MXFP4_BLOCK = 32  # values that share a scale; 16 bytes


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the files and the part of the model that it fills: `state_dict()[parameter][index]`.

    Attributes:
        shape: shape in the file.
        repeat: whether it is a copy of a parameter that another tensor fills; if a file has it, it must be equal.
        written: whether a save writes it.
        split, axes: if `axes` is not None, the model's part is the file's values, reshaped to `split`, permuted by
            `axes`, and reshaped.
        is_row: whether `shape` is [1, N] and the model's [N].
        scale_of: name of the quantised tensor whose scales these are, or None.
    """

    name: str
    parameter: str
    index: tuple[int | slice, ...]
    shape: Shape
    repeat: bool = False
    written: bool = True
    split: Shape = ()
    axes: tuple[int, ...] | None = None
    is_row: bool = False
    scale_of: str | None = None

    @property
    def values_each(self) -> int:
        """Number of the model's values in an element of the file: 2 for MXFP4 blocks, otherwise 1."""
        return 2 if self.parameter.endswith("_blocks") else 1

    def stored(self, parameter: Any) -> Any:
        """Return the values in the file's order and shape, given the whole parameter (a torch tensor)."""
        part = parameter[self.index]
        if self.axes is None:
            return part[None] if self.is_row else part
        split = part.reshape([self.split[axis] for axis in self.axes])
        return split.permute([self.axes.index(axis) for axis in range(len(self.axes))]).reshape(self.shape)


def layout(config: ModelConfig, table: str | None = None, path: Path = Path(CONFIG)) -> dict[str, TensorSpec]:
    """Return every tensor that a checkpoint of `config` can have in the layout `table`, by name.

    Without repeats, each value of the model has exactly one place in the files. None is the layout of a new checkpoint;
    `path` is for messages.
    """
    family = family_of(config.model_type, path)
    names = family.tables[table or next(iter(family.tables))]
    experts = config.n_routed_experts * (config.num_moe_layers + config.num_nextn_predict_layers)
    if experts > MAX_EXPERTS:
        raise CheckpointError(path, "too many experts in all layers", expected=f"at most {MAX_EXPERTS}", found=experts)
    specs = {}
    for parameter, shape in parameter_shapes(config).items():
        prefix, local, part = _part(names, config, parameter)
        if local not in part:
            raise CheckpointError(path, f"{family.model_type} files cannot hold it", tensor=parameter)
        for spec in _expand(prefix, part[local], parameter, shape):
            specs[spec.name] = spec
    specs.update((spec.name, spec) for spec in _repeats(names, config))
    return specs


def _part(table: Table, config: ModelConfig, parameter: str) -> tuple[str, str, Names]:
    """Return the prefix in the files, the name without it, and the part of the table that names `parameter`."""
    match parameter.split("."):
        case ["layers", layer, *rest]:
            return table.layer_prefix.format(layer=layer), ".".join(rest), table.block
        case ["mtp", module, "block", *rest]:
            return mtp_prefix(table, config, int(module)), ".".join(rest), table.block
        case ["mtp", module, *rest]:
            return mtp_prefix(table, config, int(module)), ".".join(rest), table.mtp
        case _:
            return "", parameter, table.top


def mtp_prefix(table: Table, config: ModelConfig, module: int) -> str:
    return table.layer_prefix.format(layer=config.num_hidden_layers + module)


def _expand(
    prefix: str, names: str | tuple[str, ...] | Reordered | MXFP4 | Row, parameter: str, shape: Shape
) -> Iterator[TensorSpec]:
    if isinstance(names, MXFP4):
        yield from _expand_mxfp4(prefix, names, parameter, shape)
        return
    if isinstance(names, Reordered):
        yield _reordered(prefix + names.name, names.file, names.model, parameter, shape)
        return
    if isinstance(names, Row):
        yield TensorSpec(prefix + names.name, parameter, (), (1, *shape), is_row=True)
        return
    names = (names,) if isinstance(names, str) else names
    stacked = "{expert}" in names[0]
    rows, *rest = shape[1:] if stacked else shape
    part = rows // len(names)
    for expert in range(shape[0]) if stacked else (None,):
        for i, name in enumerate(names):
            index: tuple[int | slice, ...] = () if expert is None else (expert,)
            if len(names) > 1:
                index += (slice(i * part, (i + 1) * part),)
            yield TensorSpec(prefix + name.format(expert=expert), parameter, index, (part, *rest))


def _reordered(name: str, file: str, model: str, parameter: str, shape: Shape) -> TensorSpec:
    """Describe a `Reordered` tensor; the model's `shape` has "two" and the axis after it as one."""
    model_axes, file_axes = model.split(), file.split()
    sizes = list(shape)
    if "two" in model_axes:
        at = model_axes.index("two")
        sizes[at : at + 1] = [2, shape[at] // 2]
    size = dict(zip(model_axes, sizes, strict=True))
    split = tuple(size[axis] for axis in file_axes)
    joined = split if "two" not in file_axes else _joined(file_axes, size)
    return TensorSpec(
        name, parameter, (), joined, split=split, axes=tuple(file_axes.index(axis) for axis in model_axes)
    )


def _joined(axes: list[str], size: Mapping[str, int]) -> Shape:
    """Return the shape in the files, which have "two" and the axis before it as one."""
    at = axes.index("two")
    sizes = [size[axis] for axis in axes]
    return (*sizes[: at - 1], 2 * sizes[at - 1], *sizes[at + 1 :])


def _expand_mxfp4(prefix: str, names: MXFP4, parameter: str, shape: Shape) -> Iterator[TensorSpec]:
    experts, rows, columns = shape
    if columns % MXFP4_BLOCK:
        problem, expected = "MXFP4 stores whole blocks of columns", f"a multiple of {MXFP4_BLOCK}"
        raise CheckpointError(CONFIG, problem, tensor=parameter, expected=expected, found=columns)
    blocks = columns // MXFP4_BLOCK
    rows_in, rows_out = ("f two", "two f") if names.interleaved else ("f", "f")
    name = prefix + names.name + "_blocks"
    for kind, last in (("_blocks", (blocks, MXFP4_BLOCK // 2)), ("_scales", (blocks,))):
        axes = " ".join(("b", "c")[: len(last)])
        part = _reordered(
            prefix + names.name + kind,
            f"e {rows_in} {axes}",
            f"e {rows_out} {axes}",
            parameter + kind,
            (experts, rows, *last),
        )
        yield dataclasses.replace(part, scale_of=name if kind == "_scales" else None)


def _repeats(table: Table, config: ModelConfig) -> Iterator[TensorSpec]:
    shape = (config.vocab_size, config.hidden_size)
    head = "lm_head.weight"
    source = {head: "embed_tokens.weight"} if config.tie_word_embeddings else {}
    for module in range(config.num_nextn_predict_layers):
        prefix = mtp_prefix(table, config, module)
        for parameter, name in table.mtp_repeats.items():
            yield TensorSpec(prefix + name, source.get(parameter, parameter), (), shape, repeat=True)
    if config.tie_word_embeddings:
        name = table.top[head]
        assert isinstance(name, str)
        yield TensorSpec(name, "embed_tokens.weight", (), shape, repeat=True, written=False)


def with_scales(
    specs: Mapping[str, TensorSpec], table: Table, block_size: tuple[int, int], quantised: Iterable[str]
) -> dict[str, TensorSpec]:
    """Return `specs` and the scales of the tensors `quantised`, which are matrices in FP8 blocks.

    Gate and up have blocks of their own, so the scales of [E, 2F, D] are [E, 2 ceil(F / b), ceil(D / b)].
    """
    result = dict(specs)
    ending, scale_ending = table.scale
    for name in quantised:
        spec = specs[name]
        shape = tuple(-(-size // block) for size, block in zip(spec.shape, block_size, strict=True))
        index = tuple(
            slice(i.start // spec.shape[0] * shape[0], i.stop // spec.shape[0] * shape[0])
            if isinstance(i, slice)
            else i
            for i in spec.index
        )
        scale = name.removesuffix(ending) + scale_ending
        result[scale] = TensorSpec(scale, spec.parameter + "_scale_inv", index, shape, spec.repeat, scale_of=name)
    return result


def fp8_names(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the tensors that FP8 files quantise: the projections of attention, MLPs and experts."""
    return [
        name
        for name, spec in specs.items()
        if len(spec.shape) == 2 and not spec.repeat and is_quantisable(spec.parameter)
    ]


def layer_of(table: Table, name: str) -> tuple[int, str]:
    """Split the name of a file tensor into layer number and rest; (-1, name) if it is not in a layer."""
    before, after = table.layer_prefix.split("{layer}")
    number, dot, rest = name.removeprefix(before).partition(after)
    if name.startswith(before) and dot and number.isdecimal() and number.isascii() and str(int(number)) == number:
        return int(number), rest
    return -1, name
