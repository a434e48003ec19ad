"""Errors that all ranks raise together: one that fails alone would leave the others waiting for it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from moe.errors import CheckpointError

_Result = TypeVar("_Result")


def on_first(where: Any, function: Callable[[], _Result], group: Any = None) -> _Result:
    """What `function` returns on rank 0 of `group`, or raises, on every rank; the error is a `CheckpointError`.

    A collective call, unless there is no process group.
    """
    if not dist.is_initialized():
        with about(where):
            return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            with about(where):
                outcome[0] = function()
        except CheckpointError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def together(where: Any, group: Any = None) -> Iterator[None]:
    """What the block raises on any rank is raised on all when it ends; the error is a `CheckpointError`.

    A collective call, unless there is no process group; the block itself must not wait for other ranks.
    """
    mine: CheckpointError | None = None
    try:
        with about(where):
            yield
    except CheckpointError as error:
        mine = error
    errors = [mine]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, mine, group=group)
    for error in errors:
        if error is not None:
            raise error


@contextlib.contextmanager
def about(where: Any) -> Iterator[None]:
    """Makes a `CheckpointError` of whatever the block raises."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(where, f"{type(error).__name__}: {error}") from error
