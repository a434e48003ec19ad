"""A checkpoint folder that appears whole or not at all, whatever ends the process that writes it.

    with replacing(folder, manifest) as new:
        ...  # write files into the empty folder `new`

Beside a folder NAME there can be, for as long as it takes or after a kill:

    .NAME.lock              held by the living writer
    .NAME.partial-01234567  being written, or removed; a dead writer's is swept by the next
    .NAME.previous          the old checkpoint between two renames, where folders cannot be exchanged in one step
"""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError

from moe.checkpoint.format.carried import TEMPLATES, read_carried
from moe.checkpoint.format.folder import CONFIG, INDEX, MANIFEST, RECEIPT, previous_folder
from moe.checkpoint.format.manifest import Manifest
from moe.errors import CheckpointError

# The names of weights: adapters and the like, which also end in .safetensors, are somebody's own.
_TENSORS = re.compile(r"model(-\d{1,6}-of-\d{1,6}|0-mp1)?\.safetensors")
_STEP = re.compile(r"step-(\d+)", re.ASCII)


@contextmanager
def replacing(folder: str | PathLike[str], manifest: Manifest, *, overwrite: bool = True) -> Iterator[Path]:
    """An empty folder to write files into. When the block ends, it takes the place of `folder` in one step.

    Before that every file gets its mode from the umask and is synced, and the manifest is written, last. After an
    exception nothing remains of the new folder, and `folder` is what it was. A kill at any moment leaves the old
    checkpoint or the new one, and what else it leaves is removed by the next save. The old checkpoint is removed only
    when the disk has the new one.

    One process at a time: a second is refused, not queued. Where the file system has no locks, several may write and
    the last wins, and nothing is swept, because nobody knows which writers live.

    Raises `CheckpointError` where `folder` holds anything but a checkpoint's files (without `overwrite`, anything at
    all), or is a mount point, which nothing can be renamed over; and for what the system or the safetensors library
    answers, a full disk and the like.
    """
    target = Path(os.path.realpath(folder))
    check_target(target, overwrite=overwrite)
    try:
        with _parents(target), locked(target) as has_lock:
            _recover(target)
            _check_replaceable(target, overwrite)
            if has_lock:
                _sweep(target)
            new = _partial(target)
            try:
                new.mkdir()
                yield new
                settle(new)
                manifest.write(new)
                sync(new / MANIFEST)
                sync(new)
                _check_replaceable(target, overwrite)  # again: a long save gives time to put something there
                _replace(target, new)
            finally:
                # What is left there is the old checkpoint, or what has been written until an error.
                shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(target, f"not saved, and what was there is as it was: {error}") from error


def check_target(folder: str | PathLike[str], *, overwrite: bool) -> None:
    """Raise the `CheckpointError` with which `replacing` would refuse `folder` as it is now."""
    if not str(folder):
        raise CheckpointError("''", "not a folder", expected="the name of a folder to write")
    target = Path(os.path.realpath(folder))
    try:
        if target.is_mount():
            raise CheckpointError(target, "a mount point, which cannot be replaced in one step; save to a folder in it")
        _check_replaceable(target, overwrite)
        if not overwrite:  # what a save that died between two renames has left is a checkpoint, too
            _check_replaceable(previous_folder(target), overwrite)
    except OSError as error:
        raise CheckpointError(target, f"cannot be written: {error}") from error


def settle(folder: Path) -> None:
    """Bring every file of `folder` to the disk, with the mode that the umask gives.

    The safetensors library makes files that only their owner can read; the folder has the mode that the user wants.
    """
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        sync(path)


def sync(path: Path) -> None:
    """Bring a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, CIFS) have no such thing for folders, and no other way.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def saved_steps(folder: Path) -> list[Path]:
    """The training states `step-NUMBER` in `folder`, oldest first: step 1,000,000 comes after step 999,999."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the folders above `target`; those that were not there go again after an exception."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            sync(parent.parent)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def locked(target: Path, problem: str = "another save to this folder is going on") -> Iterator[bool]:
    """Keep other writers away; False where the file system has no locks. The system frees a dead writer's."""
    path = target.with_name(f".{target.name}.lock")
    descriptor = _lock(target, path, problem)
    try:
        yield descriptor is not None
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if descriptor is not None:
            with suppress(OSError):
                # Closing would not do: a process that was forked meanwhile has the descriptor, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(target: Path, path: Path, problem: str) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                with suppress(OSError):  # a full disk; who it is only helps the one who is refused
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise CheckpointError(target, problem, found=holder or None) from None
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # its holder removed it between our two calls: nobody else would see this one


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")


def _sweep(target: Path) -> None:
    """Remove what dead writers have left; the caller holds the lock, so no living one has a folder here."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}")
    for path in target.parent.iterdir():
        if leftover.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _recover(target: Path) -> None:
    """Finish what a save that died between two renames, or before removing the old checkpoint, has left."""
    previous = previous_folder(target)
    if not previous.exists():
        return
    if (target / CONFIG).exists():
        sync(target.parent)  # the dead save may not have come to this
        _discard(previous, target)
        return
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # somebody made the folder anew; the checkpoint is still the one put aside
    if target.exists():
        raise CheckpointError(target, "in the way of the checkpoint that a broken save has left", found=str(previous))
    os.rename(previous, target)
    sync(target.parent)


def _discard(previous: Path, target: Path) -> None:
    """Remove the old checkpoint that was put aside; in one step, or a kill would leave a half to be recovered."""
    doomed = _partial(target)
    os.rename(previous, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(target, "not a folder")
    there = sorted(target.iterdir())
    if there and not overwrite:
        raise CheckpointError(
            target,
            "the folder exists and is not empty",
            expected="a new or empty folder, or overwrite=True (--overwrite)",
            found=_some([path.name for path in there]),
        )
    known = {CONFIG, INDEX, MANIFEST, RECEIPT, *read_carried(target)}
    inside = target / TEMPLATES
    paths = [path for path in there if path != inside or not path.is_dir()]
    paths += inside.iterdir() if inside.is_dir() else ()
    names = {path.relative_to(target).as_posix(): path for path in paths}
    foreign = sorted(
        name
        for name, path in names.items()
        if not path.is_file() or (name not in known and not _TENSORS.fullmatch(name))
    )
    if foreign:
        raise CheckpointError(
            target,
            "the folder would be replaced but holds other files",
            expected="a checkpoint or nothing",
            found=_some(foreign),
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _replace(target: Path, new: Path) -> None:
    """Put the folder `new` in the place of `target`, and this on the disk. Then `new` is the old one, or nothing."""
    previous = previous_folder(target)
    with ExitStack() as undo:
        if not target.exists():
            os.rename(new, target)
            undo.callback(os.rename, target, new)
        elif _swap(target, new):
            undo.callback(_swap, target, new)
        else:
            os.rename(target, previous)
            undo.callback(os.rename, previous, target)
            os.rename(new, target)
            undo.callback(os.rename, target, new)
        sync(target.parent)
        undo.pop_all()
    if previous.exists():
        with suppress(OSError):  # the save is done; the next one tries again
            _discard(previous, target)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
