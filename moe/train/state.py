"""Saved training states: folders that are whole or not there. safetensors and JSON, no pickle.

`states/step-000040/` holds tensors.safetensors and state.json. A state is written beside its final place, synced and
renamed, so that whatever ends the process leaves the states before it untouched.
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

from moe.checkpoint.writing.atomic import saved_steps, settle, sync
from moe.checkpoint.writing.shards import check_dense
from moe.errors import CheckpointError

_PARTIAL = ".partial"


def save_state(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any], *, keep: int) -> Path:
    """Write the state of step `values["step"]` below `folder`; then delete all but the `keep` newest.

    Raises CheckpointError for what the system answers, a full disk for example; the earlier states are as they were.
    """
    check_dense(tensors, folder)
    final = folder / f"step-{values['step']:06d}"
    if not final.exists():  # a resumed run may be interrupted before its first step: that state is here already
        partial = folder / (final.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "tensors.safetensors")
            values = values | {"torch": torch.__version__, "threads": torch.get_num_threads()}
            (partial / "state.json").write_text(json.dumps(values, indent=2))
            settle(partial)
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
    """What `save_state` wrote last below `folder`; None if there is nothing. Leftovers of a killed save are removed."""
    for leftover in folder.glob("step-*" + _PARTIAL):
        shutil.rmtree(leftover, ignore_errors=True)  # another rank may be at it
    states = saved_steps(folder)
    if not states:
        return None
    try:
        values = json.loads((states[-1] / "state.json").read_text())
        return load_file(states[-1] / "tensors.safetensors"), values
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            states[-1], f"not a training state: {error}; delete it to go on from an earlier one"
        ) from None


def is_safetensors_state(folder: Path) -> bool:
    """Whether the newest state, if there is any, is one of `save_state`, and not of many ranks."""
    states = saved_steps(folder)
    return not states or (states[-1] / "tensors.safetensors").exists()
