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
    outcome: list[Any] = [None]
    with together(where, group):
        if not dist.is_initialized() or dist.get_rank(group) == 0:
            outcome[0] = function()
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, group=group, group_src=0)
    return outcome[0]


@contextlib.contextmanager
def together(where: Any, group: Any = None) -> Iterator[None]:
    """What the block raises on any rank is raised on all when it ends; the error is a `CheckpointError`.

    A collective call, unless there is no process group; the block itself must not wait for other ranks.
    """
    with raised_by_all(CheckpointError, group=group), about(where):
        yield


@contextlib.contextmanager
def raised_by_all(*kinds: type[Exception], group: Any = None) -> Iterator[None]:
    """As `together`, for errors of `kinds`, which are raised as they are; of several, that of the first rank."""
    mine: Exception | None = None
    try:
        yield
    except kinds as error:
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
