"""Planners and a reader for `torch.distributed.checkpoint`, which save and load each rank's parts of tensors."""

import math
import pickle
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from moe.parallel.tensor_parts import region

METADATA = ".metadata"


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor.

    Not a DTensor, because a CPU copy of a DTensor still belongs to its mesh's device.

    Attributes:
        local: the values.
        offsets: position of the part within the whole tensor.
        size: shape of the whole tensor.
    """

    local: Tensor
    offsets: torch.Size
    size: torch.Size

    @staticmethod
    def of(tensor: Tensor) -> "Part":
        if not isinstance(tensor, DTensor):
            return Part(tensor.detach(), torch.Size([0] * tensor.ndim), tensor.shape)
        where, local = region(tensor), tensor.to_local().detach()
        assert [s.stop - s.start for s in where] == list(local.shape), (tensor.placements, where, local.shape)
        return Part(local, torch.Size(s.start for s in where), tensor.shape)

    def copy(self) -> "Part":
        return Part(self.local.to("cpu", copy=True), self.offsets, self.size)

    def empty(self, dtype: torch.dtype) -> "Part":
        return Part(torch.empty(self.local.shape, dtype=dtype), self.offsets, self.size)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offsets, self.local.shape)


class SavePlanner(DefaultSavePlanner):
    """Plans the writing of `Part`s; a part that several ranks hold is written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, part in self.state_dict.items():
            if part.local.numel():
                data = TensorWriteData(part.chunk, TensorProperties.create_from_tensor(part.local), part.size)
                items.append(WriteItem(MetadataIndex(name, part.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class LoadPlanner(DefaultLoadPlanner):
    """Plans reading into `Part`s, from parts of any shapes."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, part in self.state_dict.items():
            if not part.local.numel():
                continue
            saved: Any = self.metadata.state_dict_metadata[name]
            found = create_read_items_for_chunk_list(name, saved, [part.chunk])
            if sum(math.prod(item.lengths) for item in found) != part.local.numel():
                raise ValueError(f"{name}: some of its parts are missing")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class Reader(FileSystemReader):
    """Reader whose unpickler accepts only the classes of DCP's metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Unpickler(file).load()


def _member(kind: Any, name: str) -> Any:
    """Replacement for `getattr`, with which some Python versions pickle enum members; rejects anything else."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"{name} of {kind} does not belong in a training state")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch.distributed.checkpoint.metadata": (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "ChunkStorageMetadata",
                "MetadataIndex",
                "_MEM_FORMAT_ENCODING",
            ),
            "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch.serialization": ("_get_layout",),
            "torch": ("Size", *(n for n, value in vars(torch).items() if isinstance(value, torch.dtype))),
        }
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in known.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a training state")
        return super().find_class(module, name)
