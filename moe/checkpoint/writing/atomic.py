"""Atomic replacement of a checkpoint folder, even if the writing process is killed.

    with replacing(folder, manifest) as new:
        ...  # write files into the empty folder `new`

During a save, or after it was killed, these may exist beside the folder NAME:

    .NAME.lock              locked by the current writer
    .NAME.partial-01234567  being written or removed; the next writer removes leftovers
    .NAME.previous          the old checkpoint between two renames, if folders cannot be exchanged atomically
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

from moe.checkpoint.format.auxiliary import TEMPLATES, read_auxiliary
from moe.checkpoint.format.folder import CONFIG, CUT_RECORD, INDEX, MANIFEST, previous_folder
from moe.checkpoint.format.manifest import Manifest
from moe.errors import CheckpointError

# Names of weight files; other .safetensors files, such as adapters, are not part of a checkpoint.
_TENSORS = re.compile(r"model(-\d{1,6}-of-\d{1,6}|0-mp1)?\.safetensors")
_STEP = re.compile(r"step-(\d+)", re.ASCII)


@contextmanager
def replacing(folder: str | PathLike[str], manifest: Manifest, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write files into, which atomically replaces `folder` at the end of the block.

    Before that, every file is synced with the mode that the umask gives, and the manifest is written, last. After an
    exception the new folder is removed, and `folder` is unchanged. A kill at any moment leaves the old checkpoint or
    the new one; the next save removes leftovers. The old checkpoint is removed once the new one is on the disk.

    Only one process may save at a time; a second one is refused. If the file system has no locks, the last writer wins,
    and leftovers are kept, because they may belong to a running writer.

    Raises `CheckpointError` if `folder` holds anything but a checkpoint's files (without `overwrite`: anything at all)
    or is a mount point, which cannot be replaced by renaming, and for errors of the system or the safetensors library,
    such as a full disk.
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
                sync_folder(new)
                manifest.write(new)
                sync(new / MANIFEST)
                sync(new)
                _check_replaceable(target, overwrite)  # again, because a save may take long
                _replace(target, new)
            finally:
                # By now `new` is the old checkpoint, or an incomplete new one after an error.
                shutil.rmtree(new, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(target, f"not saved; the folder is unchanged: {error}") from error


def check_target(folder: str | PathLike[str], *, overwrite: bool) -> None:
    """Raise `CheckpointError` if `replacing` would refuse `folder` in its current state."""
    if not str(folder):
        raise CheckpointError("''", "not a folder", expected="the name of a folder to write")
    target = Path(os.path.realpath(folder))
    try:
        if target.is_mount():
            raise CheckpointError(target, "a mount point, which cannot be replaced atomically; save to a folder in it")
        _check_replaceable(target, overwrite)
        if not overwrite:  # a save that was killed between two renames has left a checkpoint
            _check_replaceable(previous_folder(target), overwrite)
    except OSError as error:
        raise CheckpointError(target, f"cannot be written: {error}") from error


def sync_folder(folder: Path) -> None:
    """Sync every file of `folder` to the disk, with the mode that the umask gives.

    The safetensors library creates files that only their owner can read. The folder itself has the intended mode.
    """
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)
        sync(path)


def sync(path: Path) -> None:
    """Sync a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, CIFS) cannot sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def saved_steps(folder: Path) -> list[Path]:
    """Return the training states `step-NUMBER` in `folder`, in numerical order."""
    found = ((_STEP.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Create the folders above `target`; after an exception, remove them again."""
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
def locked(target: Path, problem: str = "another save to this folder is in progress") -> Iterator[bool]:
    """Hold an exclusive lock for `target`, which ends with the process; yield False if the file system has no locks."""
    path = target.with_name(f".{target.name}.lock")
    descriptor = _lock(target, path, problem)
    try:
        yield descriptor is not None
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if descriptor is not None:
            with suppress(OSError):
                # Closing is not enough: a process that was forked meanwhile has the descriptor, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(target: Path, path: Path, problem: str) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                with suppress(OSError):  # a full disk; the text is only for the error of another writer
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
        os.close(descriptor)  # its holder removed the file between the two calls, so this lock is void


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")


def _sweep(target: Path) -> None:
    """Remove leftovers of killed writers; the caller holds the lock, so no other writer is running."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}")
    for path in target.parent.iterdir():
        if leftover.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _recover(target: Path) -> None:
    """Complete a save that was killed between two renames, or before it removed the old checkpoint."""
    previous = previous_folder(target)
    if not previous.exists():
        return
    if (target / CONFIG).exists():
        sync(target.parent)  # the killed save may not have reached this
        _discard(previous, target)
        return
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()  # an empty folder was created since
    if target.exists():
        raise CheckpointError(
            target,
            "exists, and so does the checkpoint that an interrupted save moved; remove one of them",
            found=str(previous),
        )
    os.rename(previous, target)
    sync(target.parent)


def _discard(previous: Path, target: Path) -> None:
    """Remove the moved old checkpoint; renaming it first ensures that a partly removed one is not recovered."""
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
    known = {CONFIG, INDEX, MANIFEST, CUT_RECORD, *read_auxiliary(target)}
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
            "the folder would be replaced, but holds other files",
            expected="only the files of a checkpoint",
            found=_some(foreign),
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _replace(target: Path, new: Path) -> None:
    """Replace `target` by the folder `new` and sync; afterwards `new` is the old folder or does not exist."""
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
        with suppress(OSError):  # the save has succeeded; the next one retries
            _discard(previous, target)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two folders atomically; return False if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0
