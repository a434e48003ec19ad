"""What a checkpoint folder holds, from config.json and headers: no weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from moe.checkpoint.families import FAMILIES
from moe.checkpoint.folder import locate, read_config_values, read_tensors
from moe.checkpoint.layout import Plan, plan
from moe.config import ModelConfig
from moe.counts import ParameterCounts, count_parameters


@dataclass(frozen=True)
class DtypeTotals:
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """See `read_summary`.

    Attributes:
        model_type: as config.json has it.
        files: how many hold the tensors.
        tensors, values, bytes: of everything in the files.
        dtypes: safetensors name -> its share of these.
        plan: config, and tensors found beside tensors expected; None for a family that we have no table for.
        counts: of the plan's config.
    """

    folder: Path
    model_type: Any
    files: int
    tensors: int
    values: int
    bytes: int
    dtypes: Mapping[str, DtypeTotals]
    plan: Plan | None
    counts: ParameterCounts | None

    @property
    def config(self) -> ModelConfig | None:
        return self.plan.config if self.plan else None

    @property
    def parameters(self) -> int | None:
        """Values in the files that fill the model, repeats left out."""
        if self.plan is None:
            return None
        slots = self.plan.slots
        return sum(t.numel for name, t in self.plan.tensors.items() if name in slots and not slots[name].repeat)

    @property
    def agrees(self) -> bool:
        """The files hold exactly the tensors that config.json asks for, and as many values as arithmetic says."""
        if self.plan is None or self.counts is None:
            return False
        complete = not (self.plan.missing or self.plan.unexpected or self.plan.misshaped)
        return complete and self.parameters == self.counts.with_mtp


def read_summary(folder: str | PathLike[str]) -> CheckpointSummary:
    """Summarise any folder of safetensors with a config.json.

    A malformed file raises `CheckpointError`, as does a configuration of a known family that cannot be understood;
    tensors that do not fit it are listed in the plan.
    """
    path = locate(folder)
    model_type = read_config_values(path).get("model_type")
    known = plan(path) if isinstance(model_type, str) and model_type in FAMILIES else None
    tensors = known.tensors if known else read_tensors(path)
    dtypes: dict[str, DtypeTotals] = {}
    for tensor in tensors.values():
        so_far = dtypes.get(tensor.dtype, DtypeTotals(0, 0, 0))
        dtypes[tensor.dtype] = DtypeTotals(
            so_far.tensors + 1, so_far.values + tensor.numel, so_far.bytes + tensor.nbytes
        )
    return CheckpointSummary(
        folder=path,
        model_type=model_type,
        files=len({tensor.path for tensor in tensors.values()}),
        tensors=len(tensors),
        values=sum(totals.values for totals in dtypes.values()),
        bytes=sum(totals.bytes for totals in dtypes.values()),
        dtypes=dtypes,
        plan=known,
        counts=count_parameters(known.config) if known else None,
    )
