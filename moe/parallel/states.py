"""Training states of a model on a mesh: saved while training continues, loaded on any mesh or without one.

`states/step-000040/` contains the files of `torch.distributed.checkpoint` (one with each rank's parts, and `.metadata`)
and state.json: the caller's values, the torch version, the mesh, and a digest of every file. All ranks must see the
folder. A state is written to `step-000040.partial`, synced by every rank, and renamed by rank 0 once all have finished,
so that a crash leaves earlier states intact.

States are for resuming one's own training. `.metadata` is a pickle, so do not load untrusted states, although only the
classes that belong there are unpickled. To exchange models, write safetensors with `moe.parallel.export`.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe.checkpoint.writing.atomic import saved_steps, sync, sync_folder
from moe.errors import CheckpointError
from moe.parallel.mesh import Mesh, group_timeout
from moe.parallel.shared_errors import on_first_rank, raise_together
from moe.parallel.state_parts import METADATA, LoadPlanner, Part, Reader, SavePlanner

_VALUES = "state.json"
_PARTIAL = ".partial"
# State that an optimizer keeps for each parameter. torch's Muon and `BatchedMuon` can load each other's.
_OPTIMIZER_STATE = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
    "BatchedMuon": {"momentum_buffer"},
}


class StateWriter:
    """Saves training states below `folder`, one at a time, in a background thread; keeps the newest `keep`.

    The constructor and all methods are collective calls.
    """

    def __init__(self, folder: str | os.PathLike[str], mesh: Mesh, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: expected 1 or more")
        self.folder, self.mesh, self.keep = Path(folder), mesh, keep
        # A separate group, because the thread's collectives must not interleave with those of training.
        self._group: Any = dist.new_group(backend="gloo", timeout=group_timeout(mesh.device.type))
        self._pending: Future[Any] | None = None
        self._name = ""

    def save(self, model: nn.Module, optimizers: Sequence[Optimizer], values: Mapping[str, Any]) -> Path:
        """Start to save the state of step `values["step"]`; returns its future folder.

        Waits for the previous save, copies this rank's parts to CPU memory and returns; later changes are not in the
        state. Learning rates and the like are not saved: put them into `values` (JSON; those of rank 0 are saved)
        unless they follow from the step. An existing state of this step is kept.

        Raises:
            CheckpointError: on all ranks, if the previous save failed or the folder cannot be created.
        """
        self.wait()
        text = dict(values) | {"torch": torch.__version__, "mesh": str(self.mesh)}
        json.dumps(text)
        final = self.folder / f"step-{values['step']:06d}"
        if on_first_rank(final, lambda: _prepare_folder(final), self._group):
            parts = {name: Part.of(tensor).copy() for name, tensor in _tensors(model, optimizers).items()}
            writer = _Writer(final, text, self.keep)
            self._name = str(final)
            self._pending = async_save(  # pyright: ignore[reportAttributeAccessIssue]
                parts, storage_writer=writer, planner=SavePlanner(), process_group=self._group
            )
        return final

    def wait(self) -> None:
        """Wait until the save in progress is on disk. Call it before the process group is destroyed.

        Raises:
            CheckpointError: the save failed. Earlier states are intact.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:
            raise _as_checkpoint_error(error, self._name, "not saved") from error


def load_latest(
    folder: str | os.PathLike[str], model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, Any] | None:
    """Load the newest state below `folder` into a model and its optimizers; returns its values, or None if none exists.

    A collective call, also usable in one process without a process group. The model may be on any mesh, but not on the
    meta device; optimizers need not have stepped. Each rank reads its own parts, and holds them in memory in addition
    to the model. Leftovers of interrupted saves are removed, so no `StateWriter` may be writing there.

    Raises:
        CheckpointError: on all ranks, if the state is incomplete or damaged, or belongs to a different model or
            different optimizers. Nothing has been changed then.
    """
    folder = Path(folder)
    found = on_first_rank(folder, lambda: _latest(folder))
    if found is None:
        return None
    path, values, entries = found
    with raise_together(path):
        _check_contents(path, values.pop("files"))
        restore = _Restore(path, model, optimizers, entries)
    try:
        with warnings.catch_warnings():
            # Loading in a single process is intended.
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load(restore.parts, storage_reader=Reader(path), planner=LoadPlanner())
    except (Exception, CheckpointException) as error:
        raise _as_checkpoint_error(error, path, "cannot be loaded") from error
    restore.commit()
    return values


def _tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Tensors of a state, by the keys model/NAME and optimizer/NAME/ENTRY.

    Keys do not say which optimizer a parameter belongs to, because that may differ when the state is loaded.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter, optimizer in _optimized(model, optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def _optimized(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    """Name, parameter and optimizer of each optimized parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError("an optimizer has a parameter that does not belong to the model")
                yield names[parameter], parameter, optimizer


class _Writer(FileSystemWriter):
    """Writer to a folder beside the final one, which it renames once all ranks have finished."""

    def __init__(self, final: Path, values: dict[str, Any], keep: int) -> None:
        super().__init__(final.with_name(final.name + _PARTIAL), per_thread_copy_ahead=0)
        self.final, self.values, self.keep = final, values, keep

    def stage(self, state_dict: Any) -> Any:
        return state_dict  # already copied

    def storage_meta(self) -> None:
        return None  # it would store the path of the folder

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        """Write this rank's file, and add its fingerprint to the results, because torch.load misses flipped bits."""
        written = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in written}
        future: Any = torch.futures.Future()
        future.set_result((written, {name: _fingerprint(Path(self.path) / name) for name in names}))
        return future

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """Complete the state, on rank 0, after every rank has synced its file."""
        super().finish(metadata, [written for written, _ in results])
        partial = Path(self.path)
        files = {name: found for _, of_rank in results for name, found in of_rank.items()}
        files[METADATA] = _fingerprint(partial / METADATA)
        _check_sizes(partial, files)
        (partial / _VALUES).write_text(json.dumps(self.values | {"files": files}, indent=2))
        sync_folder(partial)
        sync(partial)
        os.rename(partial, self.final)
        sync(self.final.parent)
        for old in saved_steps(self.final.parent)[: -self.keep]:
            with suppress(OSError):  # the save has succeeded; the next one tries again
                doomed = old.with_name(old.name + _PARTIAL)
                os.rename(old, doomed)  # so that an interruption leaves no incomplete state under its name
                shutil.rmtree(doomed)


def _prepare_folder(final: Path) -> bool:
    """Create an empty partial folder; returns False if the state exists, as in a run resumed without a new step."""
    if final.exists():
        return False
    partial = final.with_name(final.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return True


def _latest(folder: Path) -> tuple[Path, dict[str, Any], dict[str, tuple[torch.Size, torch.dtype]]] | None:
    """Find the newest state; returns its folder, its values, and the size and dtype of each tensor."""
    for leftover in folder.glob("step-*" + _PARTIAL):
        shutil.rmtree(leftover)
    states = saved_steps(folder)
    if not states:
        return None
    path = states[-1]
    try:
        values = json.loads((path / _VALUES).read_text())
        _check_sizes(path, values["files"])
        metadata = Reader(path).read_metadata()
        saved: dict[str, Any] = metadata.state_dict_metadata
        return path, values, {name: (entry.size, entry.properties.dtype) for name, entry in saved.items()}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle may raise any exception
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            path, f"not a training state: {reason}; delete it to resume from an earlier one"
        ) from error


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _check_sizes(folder: Path, files: Mapping[str, Any]) -> None:
    for name, recorded in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else "no such file"
        if found != recorded["bytes"]:
            problem = "incomplete; all ranks must see the same folder"
            raise CheckpointError(file, problem, expected=f"{recorded['bytes']} bytes", found=found)


def _check_contents(folder: Path, files: Mapping[str, Any]) -> None:
    """Check the digests of this rank's share of the files."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name in sorted(files)[rank::size]:
        if _fingerprint(folder / name) != files[name]:
            raise CheckpointError(folder / name, "bytes changed since it was saved")


def _as_checkpoint_error(error: BaseException, path: Any, problem: str) -> CheckpointError:
    """Convert an error of `torch.distributed.checkpoint`, which has one for each rank, to a one-line error."""
    rank = ""
    if isinstance(error, CheckpointException):
        first, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        rank = f"rank {first}: "
    if isinstance(error, CheckpointError):
        return error
    reason = next(iter(str(error).strip().splitlines()), "")
    return CheckpointError(path, f"{problem}: {rank}{type(error).__name__}: {reason}")


class _Restore:
    """Buffers for the parts that this rank reads; `commit` copies them to the model and its optimizers."""

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        entries: Mapping[str, tuple[torch.Size, torch.dtype]],
    ) -> None:
        self.path, self.optimizers = path, optimizers
        self.parts: dict[str, Part] = {}
        self.tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        self.optimizer_keys: dict[Optimizer, dict[nn.Parameter, dict[str, str]]] = {
            optimizer: {} for optimizer in optimizers
        }
        left = set(entries)
        for name, tensor in self.tensors.items():
            if tensor.is_meta:
                raise CheckpointError(path, "the model is on the meta device", tensor=name)
            self._check(name, entries.get(name), (tensor.shape, tensor.dtype))
            self.parts[name] = Part.of(tensor).empty(tensor.dtype)
            left.discard(name)
        for name, parameter, optimizer in _optimized(model, optimizers):
            prefix = f"optimizer/{name}/"
            keys = {key.removeprefix(prefix): key for key in left if key.startswith(prefix)}
            left -= set(keys.values())
            expected = _OPTIMIZER_STATE.get(type(optimizer).__name__, keys.keys())
            if keys and keys.keys() != expected:
                problem = f"state of an optimizer other than {type(optimizer).__name__}"
                raise CheckpointError(path, problem, tensor=name, expected=sorted(expected), found=sorted(keys))
            for key in keys.values():
                size, dtype = entries[key]
                like = parameter if size == parameter.shape else torch.empty(size, device="meta")
                self.parts[key] = Part.of(like).empty(dtype)
            if keys:
                self.optimizer_keys[optimizer][parameter] = keys
        if left:
            raise CheckpointError(path, "unexpected", tensor=min(left), expected="no such tensor")

    def _check(self, name: str, found: Any, expected: tuple[torch.Size, torch.dtype]) -> None:
        shown = f"{list(expected[0])} {expected[1]}"
        if found is None:
            raise CheckpointError(self.path, "missing", tensor=name, expected=shown, found="no such tensor")
        if found != expected:
            raise CheckpointError(
                self.path, "shape or dtype", tensor=name, expected=shown, found=f"{list(found[0])} {found[1]}"
            )

    @torch.no_grad()
    def commit(self) -> None:
        for name, tensor in self.tensors.items():
            local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.copy_(self.parts[name].local)
        for optimizer in self.optimizers:
            order = (parameter for group in optimizer.param_groups for parameter in group["params"])
            number = {parameter: i for i, parameter in enumerate(order)}
            state = {
                number[parameter]: {entry: self._placed(key, parameter) for entry, key in keys.items()}
                for parameter, keys in self.optimizer_keys[optimizer].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def _placed(self, key: str, parameter: nn.Parameter) -> Tensor:
        part = self.parts[key]
        if not isinstance(parameter, DTensor) or part.size != parameter.shape:
            return part.local
        return DTensor.from_local(
            part.local.to(parameter.to_local().device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
