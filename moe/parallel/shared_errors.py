"""Errors that all ranks raise together, because a rank that fails alone would leave the others waiting."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from moe.errors import CheckpointError

_Result = TypeVar("_Result")


def on_first_rank(where: Any, function: Callable[[], _Result], group: Any = None) -> _Result:
    """Call `function` on rank 0 of `group`; every rank returns its result or raises its error as a `CheckpointError`.

    A collective call if there is a process group.
    """
    outcome: list[Any] = [None]
    with raise_together(where, group):
        if not dist.is_initialized() or dist.get_rank(group) == 0:
            outcome[0] = function()
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, group=group, group_src=0)
    return outcome[0]


@contextlib.contextmanager
def raise_together(where: Any, group: Any = None) -> Iterator[None]:
    """Raise on every rank, as a `CheckpointError`, any error that the block raises on one of them.

    A collective call at the end of the block if there is a process group. The block must not wait for other ranks.
    """
    with raise_on_all_ranks(CheckpointError, group=group), as_checkpoint_error(where):
        yield


@contextlib.contextmanager
def raise_on_all_ranks(*kinds: type[Exception], group: Any = None) -> Iterator[None]:
    """Raise on every rank an error of `kinds` that the block raises on one of them, unchanged.

    If several ranks fail, it is the error of the first. A collective call, like `raise_together`.
    """
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
def as_checkpoint_error(where: Any) -> Iterator[None]:
    """Convert any error of the block to a `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(where, f"{type(error).__name__}: {error}") from error
