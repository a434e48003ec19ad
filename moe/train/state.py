"""Saved training states: folders of safetensors and JSON, written atomically.

`states/step-000040/` contains tensors.safetensors and state.json. A state is written to a temporary folder, synced and
renamed, so a crash leaves earlier states unchanged.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.checkpoint.writing.atomic import saved_steps, sync, sync_folder
from moe.checkpoint.writing.shards import check_dense
from moe.errors import CheckpointError

_PARTIAL = ".partial"


def save_state(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any], *, keep: int) -> Path:
    """Write the state of step `values["step"]` to `folder`, then delete all but the `keep` newest states.

    Raises CheckpointError if the system reports an error, such as a full disk; earlier states are unchanged.
    """
    check_dense(tensors, folder)
    final = folder / f"step-{values['step']:06d}"
    if not final.exists():  # a resumed run interrupted before its first step has saved this state already
        partial = folder / (final.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "tensors.safetensors")
            values = values | {"torch": torch.__version__, "threads": torch.get_num_threads()}
            (partial / "state.json").write_text(json.dumps(values, indent=2))
            sync_folder(partial)
            sync(partial)
            os.rename(partial, final)
            sync(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(final, f"not saved: {error}") from error
    for old in saved_steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_latest_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Load the newest state that `save_state` wrote to `folder`; None if there is none. Removes incomplete states."""
    for leftover in folder.glob("step-*" + _PARTIAL):
        shutil.rmtree(leftover, ignore_errors=True)  # another rank may be removing it
    states = saved_steps(folder)
    if not states:
        return None
    try:
        values = json.loads((states[-1] / "state.json").read_text())
        return load_file(states[-1] / "tensors.safetensors"), values
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            states[-1], f"not a training state: {error}; delete it to resume from an earlier one"
        ) from None


def is_safetensors_state(folder: Path) -> bool:
    """Return whether the newest state, if any, was written by `save_state` and not by a mesh."""
    states = saved_steps(folder)
    return not states or (states[-1] / "tensors.safetensors").exists()
