"""Bounded, non-blocking reads of untrusted files, and detection of their format."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moe.errors import CheckpointError

_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes: it holds a pickle, which can run code and is never read"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x7fELF", "a program"),
)
_PICKLE = "a pickle: it can run code and is never read"


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for unbuffered reading; return it with its size.

    Opening a pipe or a device may block or have effects, so the type is checked before. In case the file is replaced
    in between, it is opened without blocking and checked again.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    _check_regular(path, status)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _unreadable(path, error) from error
    file = os.fdopen(fd, "rb", buffering=0)
    try:
        status = os.fstat(fd)
        _check_regular(path, status)
    except BaseException:
        file.close()
        raise
    return file, status.st_size


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else str(error)  # ValueError: a NUL in the name
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        reason = f"{reason} (a symbolic link to nothing)"
    return CheckpointError(path, reason or "cannot be read")


def _check_regular(path: Path, status: os.stat_result) -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        found = kinds.get(kind, "a device")
        raise CheckpointError(path, "not a regular file", expected="a file", found=found)


def read_exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """Read `count` bytes; raises `CheckpointError` if the file ends before."""
    parts = []
    while count:
        part = file.read(count)
        if not part:
            raise CheckpointError(path, "the file was truncated while it was read")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes."""
    file, size = open_regular(path)
    with file:
        if size > limit:
            raise CheckpointError(path, "file too large", expected=f"at most {limit} bytes", found=size)
        return read_exactly(file, size, path)


def recognise(head: bytes) -> str | None:
    """Return a description of a file that begins with `head`, if it has a known wrong format; or None."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer: the file itself was not downloaded (git lfs pull)"
    if head.startswith(b"\xef\xbb\xbf{"):
        return "a byte order mark before the text"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, such as a login or a download error"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1:
        return _PICKLE
    return next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
