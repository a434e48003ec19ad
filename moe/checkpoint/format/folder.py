"""Files of a checkpoint folder, and the location of each tensor in them."""

import contextlib
import itertools
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from moe.checkpoint.format.files import open_regular, read_bounded, read_exactly, recognise
from moe.checkpoint.format.header import MAX_HEADER_BYTES, TensorInfo, read_header
from moe.checkpoint.format.strict_json import (
    CHARACTERS,
    KEY,
    MAX_SKIPPED,
    NEXT,
    Scanner,
    decode_string,
    parse_as_python,
)
from moe.errors import CheckpointError, nearest, one_line

logger = logging.getLogger("moe")

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "moesmith.manifest.json"  # digests of what a save wrote; loading does not read it
CUT_RECORD = "cut.json"  # which part of its source a cut checkpoint is
RUN, METRICS = "settings.json", "metrics.jsonl"  # files of a run of `moesmith train`; "checkpoint" is added at its end

NO_FOLDER = "no such folder"  # the first words of an error about a path or a name on the Hub

MAX_CONFIG_BYTES = 16 * 2**20  # some tools write maps of the vocabulary
MAX_CONFIG_VALUES = 2**19
MAX_INDEX_BYTES = 64 * 2**20
MAX_INDEX_TENSORS = 2**18  # nearly three times as many as DeepSeek-V3 has in FP8
MAX_INDEX_KEYS = 64  # other than weight_map; released files have one
MAX_FILE_NAME_BYTES = 255
MAX_NEIGHBOURS = 1000  # folders to search for a similar name

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*/*.pth")
_OTHERS = ("*.safetensors", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")
_ENTRY = re.compile(KEY + rb'"(' + CHARACTERS + rb')"' + NEXT)
_SHARD = re.compile(r"model-(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)
_DIGITS = re.compile(r"(\d+)", re.ASCII)


def previous_folder(folder: Path) -> Path:
    """Return the path to which `save` moves the old checkpoint if it cannot swap two folders atomically."""
    return folder.with_name(f".{folder.name}.previous")


def locate(folder: str | PathLike[str], revision: str | None = None) -> Path:
    """Return the folder that holds the checkpoint.

    That is `folder`, except: for a save that was killed between two renames, the old checkpoint that it moved; for a
    run of `moesmith train`, its checkpoint; and for a repository in Hugging Face's cache (`models--ORG--NAME`), the
    snapshot of `revision`, a branch, tag or commit. No other folder has revisions.
    """
    path = Path(folder)
    try:
        mode = os.stat(path).st_mode
        has_config = stat.S_ISDIR(mode) and _exists(path / CONFIG)
    except FileNotFoundError:
        if path.name and os.path.isdir(previous_folder(path)):
            return previous_folder(path)
        raise CheckpointError(path, f"{NO_FOLDER}{neighbour(path)}") from None
    except (OSError, ValueError) as error:  # a link to itself, a NUL, a name too long
        raise CheckpointError(path, f"cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(path, "not a folder")
    if not has_config and os.path.isdir(path / "refs") and os.path.isdir(path / "snapshots"):
        return _snapshot(path, revision or "main")
    if revision is not None:
        raise CheckpointError(path, "a folder has no revisions", expected="no revision", found=revision)
    if not has_config and os.path.isfile(path / RUN):
        return _checkpoint_of_run(path)
    return path


def _exists(path: Path) -> bool:
    """Like `os.path.lexists`, but raises OSError if the path cannot be examined."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _checkpoint_of_run(run: Path) -> Path:
    checkpoint = run / "checkpoint"
    for path in (checkpoint, previous_folder(checkpoint)):
        if os.path.isdir(path):
            return path
    if os.path.isfile(run / METRICS):
        problem = "a run of moesmith train without a checkpoint"
        raise CheckpointError(run, problem, expected="a finished run; resume it with moesmith train --resume")
    return run


def neighbour(path: Path) -> str:
    """Return "; did you mean FOLDER?" for a path that does not exist, or "" if no folder has a similar name."""
    missing = path
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    with contextlib.suppress(OSError), os.scandir(missing.parent) as entries:
        names = [entry.name for entry in itertools.islice(entries, MAX_NEIGHBOURS) if entry.is_dir()]
        meant = nearest(missing.name, names) if missing.name else None
        if meant is not None and os.path.isdir(other := missing.parent / meant / path.relative_to(missing)):
            return f"; did you mean {one_line(other)}?"
    return ""


def has_weights(folder: Path) -> bool:
    """Whether any safetensors file of the model exists."""
    return any(folder.glob("*.safetensors" if os.path.lexists(folder / INDEX) else "model*.safetensors"))


def has_all_weights(folder: Path) -> bool:
    """Whether the safetensors files exist: all that the index lists, if there is one."""
    if not os.path.lexists(folder / INDEX):
        return has_weights(folder)
    return all(os.path.lexists(folder / name) for name in set(_read_index(member(folder, INDEX)).values()))


def _snapshot(repository: Path, revision: str) -> Path:
    ref, commit = repository / "refs" / revision, revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        _check_inside(ref, [Path(os.path.realpath(repository))])
        if not os.path.lexists(ref):
            there = _some(repository / "refs")
            raise CheckpointError(repository, "no such revision in the cache", expected=there, found=revision)
        commit = read_bounded(ref, 1024).decode("utf-8", "replace").strip()
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]{0,254}", commit):
        raise CheckpointError(ref, "invalid revision", expected="a commit", found=repr(commit[:80]))
    path = repository / "snapshots" / commit
    if not os.path.isdir(path):
        there = _some(repository / "snapshots")
        raise CheckpointError(ref, "its snapshot is not in the cache", expected=commit, found=there)
    _check_inside(path, [Path(os.path.realpath(repository))])
    return path


def _some(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "none"


def member(folder: Path, name: str) -> Path:
    """Return `folder / name`; raises `CheckpointError` if that is a symbolic link out of the checkpoint.

    In Hugging Face's cache, files are links to the blobs of their repository, which may be links to blobs that all
    repositories share. Both are allowed. `folder` may be a link itself.
    """
    path = folder / name
    if os.path.islink(path):
        _check_inside(path, _roots(folder))
    return path


def _check_inside(path: Path, roots: list[Path]) -> None:
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        problem = "a symbolic link that leads out of the checkpoint"
        raise CheckpointError(path, problem, expected=f"a target in {roots[0]}", found=str(real))


def _roots(folder: Path) -> list[Path]:
    """Return the folders that links in `folder` may lead to."""
    real = Path(os.path.realpath(folder))
    for repository in real.parents:
        if repository.name.startswith("models--") and real.is_relative_to(repository / "snapshots"):
            shared = repository.parent / "blobs"
            return [repository, shared] if (shared / ".huggingface-shared-blobs").is_file() else [repository]
    return [real]


def read_config_values(folder: Path) -> dict[str, Any]:
    """Read the object in config.json with `parse_as_python`."""
    path = member(folder, CONFIG)
    if not os.path.lexists(path):
        expected = f"{CONFIG} and {SINGLE}, or its shards"
        raise CheckpointError(path, "No such file", expected=expected, found=_describe_files(folder))
    values = parse_as_python(read_bounded(path, MAX_CONFIG_BYTES), path, max_values=MAX_CONFIG_VALUES)
    if not isinstance(values, dict):
        raise CheckpointError(path, "wrong JSON value", expected="an object", found=type(values).__name__)
    return values


def read_tensors(
    folder: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, optional: Callable[[str], bool] = lambda name: False
) -> dict[str, TensorInfo]:
    """Read the headers of all tensors in the folder, file by file; shard 2 comes before shard 10.

    With an index, its files must hold exactly the tensors that it lists for them; other files and the index's metadata
    are ignored. Without one, model.safetensors is read alone, as in transformers; if it is missing, all
    `model*.safetensors` are read, and numbered files must be complete. A tensor must not be in two files.

    Args:
        max_header_bytes: maximum size of each file's header.
        optional: returns whether a tensor is dispensable, by its name. The index and the files may disagree about such
            a tensor, and a file that cannot be read is ignored if the index lists no other tensors for it.
    """
    index = folder / INDEX
    listed = _read_index(member(folder, INDEX)) if os.path.lexists(index) else None
    present = {path.name for path in folder.glob("model*.safetensors")}
    if listed and SINGLE in present and not any(os.path.lexists(folder / file) for file in set(listed.values())):
        logger.warning("%s is ignored: none of its files exists, but %s does", index, SINGLE)
        listed = None
    names = set(listed.values()) if listed is not None else {SINGLE} if SINGLE in present else present
    if not names:
        raise CheckpointError(folder, "no tensors", expected=f"{SINGLE}, or {INDEX}", found=_describe_files(folder))
    if listed is None:
        needed = names
        _check_complete(folder, names)
    else:
        needed = {file for name, file in listed.items() if not optional(name)}
    _warn_about_others(folder / SINGLE if listed is None else index, present - names)
    for name in sorted(needed, key=by_number):
        if not os.path.lexists(folder / name):
            raise CheckpointError(folder / name, "No such file", expected=f"a file, because {INDEX} lists it")

    tensors: dict[str, TensorInfo] = {}
    for file in sorted(names, key=by_number):
        try:
            header = read_header(member(folder, file), max_header_bytes=max_header_bytes)
        except CheckpointError:
            if file in needed:
                raise
            continue
        for name, tensor in header.items():
            in_place = listed is None or listed.get(name) == file
            if (name in tensors or not in_place) and optional(name):
                tensors.setdefault(name, tensor)
                continue
            if name in tensors:
                problem, other = "in two files", tensors[name].path.name
                raise CheckpointError(tensor.path, problem, tensor=name, found=f"also in {other}")
            if listed is not None and not in_place:
                expected = listed.get(name, "no such tensor")
                raise CheckpointError(tensor.path, "the index disagrees", tensor=name, expected=expected, found=file)
            tensors[name] = tensor
    for name, file in (listed or {}).items():
        if name not in tensors and not optional(name):
            raise CheckpointError(folder / file, "missing: the index lists it for this file", tensor=name)
    return tensors


def _warn_about_others(chosen: Path, others: set[str]) -> None:
    """Warn about weight files that are not read: not in the index, or beside model.safetensors."""
    if others:
        first = SINGLE if SINGLE in others else min(others, key=by_number)
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        note = f"; transformers reads {SINGLE} instead of the index" if first == SINGLE else ""
        problem = "is read, other weight files are" if chosen.name == SINGLE else "does not list some files, which are"
        logger.warning("%s %s ignored: %s%s%s", chosen, problem, first, more, note)


def by_number(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts "model-10" after "model-2"."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in _DIGITS.split(name))


def _check_complete(folder: Path, names: Iterable[str]) -> None:
    """Raise if a numbered file is missing; numbers start from 1, or from 0 as in gpt-oss."""
    sets: dict[int, dict[int, re.Match[str]]] = {}
    for found in filter(None, map(_SHARD.fullmatch, names)):
        sets.setdefault(int(found[2]), {})[int(found[1])] = found
    for count, shards in sets.items():
        like = shards[min(shards)]
        for number in range(count) if 0 in shards else range(1, count + 1):
            if number not in shards:
                other = f"model-{number:0{len(like[1])}}-of-{like[2]}.safetensors"
                raise CheckpointError(folder / other, "No such file", expected=f"{count} files, as {like[0]} states")


def _read_index(path: Path) -> dict[str, str]:
    """Read the weight_map of an index: tensor name -> file name, without folders. Everything else is skipped."""
    file, size = open_regular(path)
    with file:
        if size > MAX_INDEX_BYTES:
            raise CheckpointError(path, "file too large", expected=f"at most {MAX_INDEX_BYTES} bytes", found=size)
        known = recognise(read_exactly(file, min(size, 512), path))
        if known is not None:
            raise CheckpointError(path, "not valid JSON", expected="an index", found=known)
        file.seek(0)
        scan = Scanner(file, size, path)
        weight_map: dict[str, str] | None = None
        others = 0
        going = scan.object()
        while going:
            if scan.key() != "weight_map":
                scan.value(limit=MAX_SKIPPED, as_python=True)
                others += 1
                if others > MAX_INDEX_KEYS:
                    expected = f"at most {MAX_INDEX_KEYS}"
                    raise CheckpointError(path, "too many keys beside weight_map", expected=expected, found="more")
            elif weight_map is None:
                weight_map = _read_weight_map(scan)
            else:
                raise CheckpointError(path, "weight_map occurs twice", expected="one", found="two")
            going = scan.more()
        scan.end()
    if weight_map is None:
        raise CheckpointError(path, "no weight_map", expected="an object of tensor names and file names")
    return weight_map


def _read_weight_map(scan: Scanner) -> dict[str, str]:
    if not scan.rest().startswith("{"):
        expected = "an object of tensor names and file names"
        raise CheckpointError(scan.path, "invalid weight_map", expected=expected, found=scan.rest())
    weight_map: dict[str, str] = {}
    files: dict[bytes, str] = {}  # keeps one copy of each name
    if not scan.object():
        return weight_map
    while found := scan.take(_ENTRY):
        name, file = decode_string(found[1]), files.get(found[2])
        if file is None:
            file = files[found[2]] = _file_name(decode_string(found[2]), name, scan.path)
        if weight_map.get(name, file) != file:
            raise CheckpointError(scan.path, "twice in the index", tensor=name, expected="one file", found="two")
        if len(weight_map) == MAX_INDEX_TENSORS:
            expected = f"at most {MAX_INDEX_TENSORS}"
            raise CheckpointError(
                scan.path, "too many tensors in the index", tensor=name, expected=expected, found="more"
            )
        weight_map[name] = file
        if found[3] == b"}":
            return weight_map
    name = scan.key()
    expected = "the name of a .safetensors file"
    raise CheckpointError(scan.path, "invalid file name", tensor=name, expected=expected, found=scan.rest())


def _file_name(file: str, name: str, path: Path) -> str:
    fits = len(file.encode("utf-8")) <= MAX_FILE_NAME_BYTES and file.isprintable()
    if not (fits and file.endswith(".safetensors") and not set(file) & set("/\\")):
        expected = "a .safetensors file in this folder"
        raise CheckpointError(path, "invalid file name", tensor=name, expected=expected, found=repr(file[:300]))
    return file


def _describe_files(folder: Path) -> str:
    pickles = sorted(str(p.relative_to(folder)) for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        return f"{pickles[0]}, a pickle: it can run code and is never read; convert it to safetensors first"
    if os.path.lexists(folder / "adapter_model.safetensors"):
        return "adapter_model.safetensors, an adapter: it requires its base model"
    others = sorted(p.name for pattern in _OTHERS for p in folder.glob(pattern))
    return others[0] if others else "none of these"
