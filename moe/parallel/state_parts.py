"""Parts of tensors in and out of files, through `torch.distributed.checkpoint`: where each lies is `region`'s word."""

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
    """What this rank holds of a tensor: the values, and where they stand in the whole, which has this size.

    Not a DTensor, whose copy on the CPU would still be one of its mesh's device.
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
    """Writes `Part`s; of equal ones, one rank's."""

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
    """Reads into `Part`s, whatever parts were written."""

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
                raise ValueError(f"{name}: parts of it are nowhere")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class Reader(FileSystemReader):
    """Reads no pickle but of the classes that DCP's metadata is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Unpickler(file).load()


def _member(kind: Any, name: str) -> Any:
    """What some releases of Python pickle the member of an enumeration by; nothing else has an attribute here."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"{name} of {kind} does not belong into a state")


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
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a state")
        return super().find_class(module, name)
