"""Manifest of a saved folder: sizes and digests of its files and tensors, which `verify` checks. Needs no torch.

    {"format": 1,
     "files": {
       "config.json": {"bytes": 1234, "sha256": "..."},
       "model.safetensors": {"bytes": 5678, "sha256": (of the header, with its length), "tensors": {
         NAME: {"dtype": "BF16", "shape": [2, 3], "sha256": (of its bytes in the file)}, ...}}, ...},
     "sha256": (of this text without this entry)}

Digests of tensors are computed in memory before writing, so that they also reveal write errors. Other programs do not
update the manifest, so it also reveals later changes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from moe.checkpoint.format.auxiliary import AUXILIARY_FILES, is_template, templates
from moe.checkpoint.format.files import read_bounded
from moe.checkpoint.format.folder import CONFIG, INDEX, MANIFEST, locate
from moe.checkpoint.format.header import TensorInfo, read_header
from moe.checkpoint.format.quantized_formats import QUANTIZATION_FILES
from moe.checkpoint.format.strict_json import parse_json
from moe.errors import CheckpointError

FORMAT = 1
MAX_MANIFEST_BYTES = 256 * 2**20

_CHUNK = 4 * 2**20
_WEIGHTS = ".safetensors"

_Result = TypeVar("_Result")


class Manifest:
    """Digests of a folder that is being written; `replacing` writes them."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, tensors: Mapping[str, Any]) -> None:
        """Compute digests of tensors: name in the files -> buffer of the bytes to be written."""
        self._digests.update(zip(tensors, _parallel(_sha256, tensors.values()), strict=True))

    def write(self, folder: Path) -> None:
        """Write the manifest of `folder`, whose tensors must be those that were added."""
        files: dict[str, Any] = {}
        recorded = 0
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            files[name] = {"bytes": file.stat().st_size, "sha256": _digest_of_file(file)}
            if file.suffix == _WEIGHTS:
                header = read_header(file)
                recorded += len(header)
                files[name]["tensors"] = {
                    tensor: {"dtype": info.dtype, "shape": info.shape, "sha256": self._digests[tensor]}
                    for tensor, info in header.items()
                }
        assert recorded == len(self._digests), "a tensor was added and not written"
        (folder / MANIFEST).write_bytes(_sealed({"format": FORMAT, "files": files}))


def record_bytes(name: str, shape: Sequence[int]) -> int:
    """Return an upper bound of a tensor's bytes in the manifest."""
    return 192 + len(json.dumps(name)) + sum(12 + len(str(size)) for size in shape)


@dataclass(frozen=True)
class Finding:
    """A difference between a folder and its manifest; `expected` and `found` are texts or None."""

    file: str
    problem: str
    tensor: str | None = None
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        return str(
            CheckpointError(self.file, self.problem, tensor=self.tensor, expected=self.expected, found=self.found)
        )


@dataclass(frozen=True)
class Verification:
    """Result of `verify`; the numbers are those of the manifest."""

    folder: str
    files: int
    tensors: int
    bytes: int
    findings: tuple[Finding, ...]


def verify(
    folder: str | PathLike[str], report: Callable[[int, int], object] = lambda read, total: None
) -> Verification:
    """Read every byte of a saved folder and compare it with the manifest.

    Files that do not belong to a checkpoint are ignored.

    Args:
        report: called from several threads with the number of bytes just read and the total.

    Raises:
        CheckpointError: there is no manifest, or it has been changed.
    """
    path = locate(folder)
    files = _read_manifest(path)
    check = _Check(path, files)
    total = sum(part.nbytes for part in check.parts)
    found = _parallel(lambda part: _digest(part, lambda read: report(read, total)), check.parts)
    for part, digest in zip(check.parts, found, strict=True):
        check.compare(part, digest)
    return Verification(
        folder=str(path),
        files=len(files),
        tensors=sum(len(entry.get("tensors", ())) for entry in files.values()),
        bytes=sum(entry["bytes"] for entry in files.values()),
        findings=tuple(sorted(check.findings, key=lambda f: (f.file, f.tensor or ""))),
    )


@dataclass(frozen=True)
class _Part:
    """Bytes to read: a tensor or a whole file."""

    path: Path
    offset: int
    nbytes: int
    tensor: str | None
    expected: str


class _Check:
    """Comparison of headers with the manifest; `parts` lists the bytes that remain to be read.

    Tensors are compared by name and not by file, so that a tensor moved to another shard is one finding and not two.
    """

    def __init__(self, folder: Path, files: Mapping[str, Any]) -> None:
        self.folder, self.files = folder, files
        self.findings: list[Finding] = []
        self.parts: list[_Part] = []
        self.home = {name: file for file, entry in files.items() for name in entry.get("tensors", ())}
        self.owner = {
            tensor["sha256"]: name for entry in files.values() for name, tensor in entry.get("tensors", {}).items()
        }
        self.headers = {entry["sha256"]: file for file, entry in files.items() if "tensors" in entry}
        self.unread: set[str] = set()  # files with unreadable headers: reported once, not per tensor
        weights = {name for name, entry in files.items() if "tensors" in entry}
        for name in sorted(
            {*files, CONFIG, INDEX, *AUXILIARY_FILES, *QUANTIZATION_FILES, *templates(folder)} - weights
        ):
            self._file(name)
        seen: dict[str, TensorInfo] = {}
        for name in sorted(weights | {path.name for path in folder.glob(f"model*{_WEIGHTS}")}):
            self._weights(name, seen)
        for name, file in self.home.items():
            if name not in seen and file not in self.unread:
                self._find(file, "missing", name)

    def compare(self, part: _Part, digest: str | OSError) -> None:
        if isinstance(digest, OSError):
            self._find(part.path.name, f"cannot be read: {digest.strerror}", part.tensor)
        elif digest != part.expected:
            other = self.owner.get(digest) if part.tensor else None
            problem = f"holds the values of {other}" if other else "bytes changed since it was saved"
            expected, found = f"sha256 {part.expected[:16]}...", f"{digest[:16]}..."
            self._find(part.path.name, problem, part.tensor, expected, found)

    def _find(
        self, file: str, problem: str, tensor: str | None = None, expected: str | None = None, found: str | None = None
    ) -> None:
        self.findings.append(Finding(file, problem, tensor, expected, found))

    def _file(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            if name in self.files:
                self._find(name, "missing")
        elif name not in self.files:
            self._find(name, "not in the manifest: it was added since")
        else:
            self.parts.append(_Part(path, 0, path.stat().st_size, None, self.files[name]["sha256"]))

    def _weights(self, name: str, seen: dict[str, TensorInfo]) -> None:
        """Check the header of one file, and add its tensors to `seen`."""
        path = self.folder / name
        try:
            header, digest = read_header(path), _digest_of_file(path)
        except (CheckpointError, OSError) as error:
            self.unread.add(name)
            self._find(name, "missing" if not path.exists() else str(error).removeprefix(f"{path}: "))
            return
        original = name
        if name not in self.files:
            self._find(name, "not in the manifest: it was added since")
        elif digest != self.files[name]["sha256"]:
            other = self.headers.get(digest)
            original = other or name
            self._find(name, f"has the header of {other}" if other else "header changed since it was saved")
        for tensor, info in header.items():
            if tensor in seen:
                self._find(name, "in two files", tensor, found=f"also in {seen[tensor].path.name}")
                continue
            seen[tensor] = info
            home = self.home.get(tensor)
            if home is None:
                self._find(name, "not in the manifest", tensor)
                continue
            if home != original:
                self._find(name, "moved to another file", tensor, home, name)
            expected = self.files[home]["tensors"][tensor]
            if [info.dtype, list(info.shape)] != [expected["dtype"], expected["shape"]]:
                was, is_ = f"{expected['dtype']} {expected['shape']}", f"{info.dtype} {list(info.shape)}"
                self._find(name, "wrong dtype or shape", tensor, was, is_)
            else:
                self.parts.append(_Part(path, info.offset, info.nbytes, tensor, expected["sha256"]))


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the entry "files", whose names must not lead out of the folder."""
    path = folder / MANIFEST
    if not path.exists():
        problem = f"cannot be verified without {MANIFEST}, which a save by moesmith writes"
        raise CheckpointError(folder, problem)
    content = read_bounded(path, MAX_MANIFEST_BYTES)
    values = parse_json(content, path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = repr(values.get("format") if isinstance(values, dict) else values)[:80]
        raise CheckpointError(path, "unknown format of the manifest", expected=FORMAT, found=found)
    values.pop("sha256", None)
    if content != _sealed(values):
        raise CheckpointError(path, "the manifest has been changed since it was written")
    files = values.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files, files.values())):
        raise CheckpointError(path, "invalid manifest", expected="an object of files with their digests")
    return files


def _is_entry(name: str, entry: Any) -> bool:
    """Whether an entry of "files" is valid; a manifest may be forged."""
    tensors = entry.get("tensors", {}) if isinstance(entry, dict) else None
    return (
        (not set(name) & set("/\\\0") or is_template(name))
        and isinstance(tensors, dict)
        and entry.keys() - {"tensors"} == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and all(isinstance(t, dict) and t.keys() == {"dtype", "shape", "sha256"} for t in tensors.values())
        and all(isinstance(record["sha256"], str) for record in (entry, *tensors.values()))
    )


def _sealed(values: Mapping[str, Any]) -> bytes:
    digest = _sha256(json.dumps(values, sort_keys=True).encode())
    return (json.dumps({**values, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of_file(path: Path) -> str:
    """Return the digest of a file, or of a safetensors header, whose data the tensors' digests cover."""
    if path.suffix != _WEIGHTS:
        return _sha256(path.read_bytes())
    with path.open("rb") as file:
        prefix = file.read(8)
        return _sha256(prefix + file.read(int.from_bytes(prefix, "little")))


def _digest(part: _Part, report: Callable[[int], object]) -> str | OSError:
    digest = hashlib.sha256()
    try:
        with part.path.open("rb", buffering=0) as file:
            file.seek(part.offset)
            left = part.nbytes
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
                report(len(chunk))
    except OSError as error:  # for example a defective sector
        return error
    return digest.hexdigest()


def _parallel(function: Callable[[Any], _Result], items: Iterable[Any]) -> list[_Result]:
    """Map `function` in threads; hashlib releases the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
