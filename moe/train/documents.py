"""Documents: reading from files, and the validation split.

A document is a name and a text. Each iteration reads the files again, one record or text file at a time, so data need
not fit into memory. The file name determines the format, and the content is checked: markup, JSON and binary data are
never read as text.
"""

import contextlib
import glob
import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from moe.checkpoint.format.strict_json import parse_json
from moe.errors import CheckpointError, ConfigError, Place, did_you_mean, one_line

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex")
LINES_SUFFIXES = (".jsonl", ".ndjson")
RECORD_SUFFIXES = (*LINES_SUFFIXES, ".json", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "pyarrow"}
"""Suffix -> module that decompresses such files."""
FORMATS = f"{', '.join(TEXT_SUFFIXES)}, {', '.join(RECORD_SUFFIXES)} (all but Parquet also {', '.join(COMPRESSIONS)})"
# Suffixes of files that consist mostly of markup.
MARKUP_SUFFIXES = (".csv", ".tsv", ".html", ".htm", ".xhtml", ".xml", ".svg", ".rtf", ".ipynb")
# Fields of fine-tuning data. A record with one of these and without the text field is not plain text.
CHAT_FIELDS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "instruction")
DOCUMENT_BYTES = 8192
MAX_RECORD_BYTES = 2**28
HELD_OUT_FRACTION = 0.1
# Shorter paragraphs ("Example:", a signature) are not considered copies.
COPY_MIN_CHARACTERS = 40

_BEGINNING_BYTES = 4096
_MAGIC = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a Parquet file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"%PDF-", "a PDF file"),
    (b"{\\rtf", "an RTF file"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer: the file was not downloaded (git lfs pull)"),
)
_MARKUP = re.compile(rb"\s*(<!doctype|<html|<head|<\?xml|<svg)", re.IGNORECASE)
_JSON = re.compile(rb'\s*(\{\s*"(?:[^"\\\n]|\\.)*"\s*:|\[\s*\{\s*")')


@dataclass(frozen=True)
class Document:
    name: str
    text: str


class Documents(Protocol):
    """Iterable that yields the same documents each time."""

    def __iter__(self) -> Iterator[Document]: ...


def python_topics() -> list[Document]:
    """Return the language reference that ships with Python, `pydoc_data.topics`; it differs between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError("--data", None, "text files; this Python has no pydoc_data.topics as default") from None
    return [Document(name, text) for name, text in sorted(topics.items())]


@dataclass(frozen=True)
class _File:
    """File to read. `explicit`: given by its own path, not found in a folder."""

    path: Path
    name: str
    kind: Literal["text", "lines", "json", "parquet"]
    compression: str | None
    explicit: bool
    option: str

    def error(self, expected: str, found: Any = None, *, record: int | None = None) -> ConfigError:
        """Return a ConfigError with the file and, if given, the line or record number (from 1)."""
        unit = {"lines": "line", "parquet": "row"}.get(self.kind, "record")
        where = Place(self.path if record is None else f"{self.path}, {unit} {record}")
        return ConfigError(self.option, where, expected if found is None else f"{expected}; found {one_line(found)}")

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the decompressed content. Raises ConfigError, also while reading, if it is unreadable or damaged."""
        try:
            with _open(self.path, self.compression) as file:
                yield file
        except ImportError as error:
            allowed = f'the module {error.name} to read {self.path.suffix} files; pip install -e ".[data]"'
            raise self.error(allowed) from None
        except ConfigError:
            raise
        except Exception as error:  # zlib, lzma and pyarrow raise their own exceptions
            found = getattr(error, "strerror", None) or error
            expected = "a readable file" if self.compression is None else f"a readable {self.path.suffix} file"
            raise self.error(expected, found) from None

    def beginning(self) -> bytes:
        with self.open() as file:
            return file.read(_BEGINNING_BYTES)

    def documents(self, field: str) -> Iterator[Document]:
        """Yield the documents. Raises ConfigError for the first line or record without text, with its number."""
        if self.kind == "text":
            with self.open() as file:
                content = file.read()
            found: Iterable[tuple[int, str]] = enumerate(_cut(_decode(content, self)))
        else:
            found = ((number, self._text(record, field, number)) for number, record in self.records(field))
        number = None
        for number, text in found:
            if text.strip():
                yield Document(f"{self.name}#{number}", text)
        if number is None and (self.explicit or self.kind != "text"):
            raise self.error("documents", "none")

    def records(self, field: str) -> Iterator[tuple[int, Any]]:
        """Yield the number and the value of each record; of a Parquet file, the values of `field` alone."""
        return {"lines": _read_lines, "json": _read_json, "parquet": _read_parquet}[self.kind](self, field)

    def _text(self, record: Any, field: str, number: int) -> str:
        if not isinstance(record, dict):
            raise self.error(f'an object with the field "{field}"', kind_of(record), record=number)
        if isinstance(text := record.get(field), str):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise self.error(f'Unicode text in "{field}"', "half of a surrogate pair", record=number) from None
            return text
        names = ", ".join(map(str, record)) or "no field"
        if chat := [name for name in CHAT_FIELDS if name in record]:
            expected = f'plain text in "{field}", not fine-tuning data'
            raise self.error(expected, ", ".join(chat), record=number)
        if field not in record:
            expected = f'the field "{field}", or --field with the name of the text field{did_you_mean(field, record)}'
            raise self.error(expected, names, record=number)
        raise self.error(f'a string in "{field}"', kind_of(record[field]), record=number)


def kind_of(value: Any) -> str:
    """Describe a value: its JSON type and its beginning."""
    kinds = {
        dict: "an object",
        list: "an array",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
    }
    return "null" if value is None else f"{kinds.get(type(value), type(value).__name__)}, {one_line(repr(value), 60)}"


@dataclass(frozen=True)
class FileDocuments:
    """Documents of files.

    Attributes:
        left_out: names of files in folders that are not read, because their format is not supported, their name begins
            with ".", or they are empty.
    """

    files: tuple[_File, ...]
    field: str
    left_out: tuple[str, ...]

    @property
    def where(self) -> str:
        """Paths, for messages."""
        return ", ".join(str(file.path) for file in self.files[:3]) + (", ..." if len(self.files) > 3 else "")

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            yield from file.documents(self.field)


def read_files(paths: Iterable[Path], field: str | None = None, *, option: str = "--data") -> FileDocuments:
    """Return the documents of files and of all files below folders. The files are read during iteration.

    Text files are UTF-8; long ones are split, see `_cut`. Every line of a JSON Lines file, every object in the array of
    a JSON file and every row of a Parquet file is a document. A file given by its own path may have any other suffix
    if it contains plain text. Files of other formats in folders are left out.

    Args:
        field: name of the field with the text. None rejects files of records.
        option: command-line option, for messages.

    Raises:
        ConfigError: a path that does not exist, a folder without supported files, or a file whose content does not
            match its name; during iteration, the first line or record without text.
    """
    files: list[_File] = []
    left_out: list[str] = []
    for path in paths:
        if path.is_file():
            files.append(_examine(path, path.name, field, option, explicit=True))
        elif path.is_dir():
            found, others = _walk(path, option)
            chosen = [_examine(file, file.relative_to(path).as_posix(), field, option) for file in found]
            left_out += others + [file.name for file in chosen if file.kind == "json" and not _is_array(file)]
            files += (chosen := [file for file in chosen if file.kind != "json" or _is_array(file)])
            if not chosen:
                found = _listed(left_out) if left_out else "an empty folder"
                raise ConfigError(option, str(path), f"a folder with files of {FORMATS}; found {found}")
        else:
            raise ConfigError(option, str(path), "an existing file or folder")
    return FileDocuments(tuple(files), field or "", tuple(left_out))


@dataclass(frozen=True)
class Record:
    """JSON value of a line of a JSON Lines file, or of an element of the array in a JSON file."""

    value: Any
    file: _File
    number: int

    def error(self, expected: str, found: str) -> ConfigError:
        """Return a ConfigError that names the file and the line or record."""
        return self.file.error(expected, found, record=self.number)


def read_records(paths: Iterable[Path], *, option: str = "--data") -> Iterator[Record]:
    """Yield the records of JSON Lines and JSON files, and of all such files below folders.

    Raises ConfigError as `read_files` does, and for a file of another format, or without records.
    """
    for file in read_files(paths, "", option=option).files:
        if file.kind not in ("lines", "json"):
            if file.explicit:
                raise file.error("JSON Lines or JSON", f"a {file.path.suffix or 'text'} file")
            continue
        number = None
        for number, value in file.records(""):
            yield Record(value, file, number)
        if number is None:
            raise file.error("records", "none")


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return one_line(", ".join(names[:limit])) + more


def _walk(folder: Path, option: str) -> tuple[list[Path], list[str]]:
    """Return the sorted files of supported formats below a folder, and the names of all other files."""

    def refuse(error: OSError) -> None:
        raise ConfigError(option, str(error.filename), f"a readable folder; {error.strerror}") from None

    found, others = [], []
    for root, folders, names in os.walk(folder, onerror=refuse):
        others += [f"{Path(root, name).relative_to(folder).as_posix()}/" for name in folders if _is_skipped(root, name)]
        folders[:] = [name for name in folders if not _is_skipped(root, name)]
        for name in names:
            file = Path(root, name)
            known = _suffixes(file)[0] in (*TEXT_SUFFIXES, *RECORD_SUFFIXES) and not name.startswith(".")
            if known and file.is_file() and file.stat().st_size:
                found.append(file)
            else:
                others.append(file.relative_to(folder).as_posix())
    return sorted(found), sorted(others)


def _is_skipped(root: str, name: str) -> bool:
    """Return whether a folder is hidden or a symbolic link, which may form a cycle."""
    return name.startswith(".") or os.path.islink(os.path.join(root, name))


def _suffixes(path: Path) -> tuple[str, str | None]:
    """Return (suffix, module that decompresses, or None)."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), COMPRESSIONS[last]) if last in COMPRESSIONS else (last, None)


def _examine(path: Path, name: str, field: str | None, option: str, *, explicit: bool = False) -> _File:
    suffix, compression = _suffixes(path)
    kind = "lines" if suffix in LINES_SUFFIXES else suffix[1:] if suffix in RECORD_SUFFIXES else "text"
    file = _File(path, name, kind, compression, explicit, option)  # pyright: ignore[reportArgumentType]
    if suffix in MARKUP_SUFFIXES:
        raise file.error(f"one of the formats {FORMATS}", f"{suffix}, which is not plain text")
    beginning = file.beginning()
    if not beginning:
        raise file.error("documents", "an empty file")
    if kind == "parquet" and (compression or not beginning.startswith(b"PAR1")):
        raise file.error("a Parquet file", _recognise(beginning) or "other content")
    if kind in ("lines", "json") and (found := _recognise(beginning)) not in (None, "JSON"):
        raise file.error("JSON", found)
    if kind == "text" and (found := _recognise(beginning)) is not None:
        raise file.error(f"plain text, or a file name with the suffix of its format, one of {FORMATS}", found)
    if kind != "text" and field is None:
        raise file.error("the name of the text field (--field), or plain text files", f"a {suffix} file")
    if kind == "json" and beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[" and _is_json_lines(beginning):
        return _File(path, name, "lines", compression, explicit, option)  # common among data sets
    return file


def _is_json_lines(beginning: bytes) -> bool:
    """Return whether the first line looks like one JSON object."""
    line, newline, _ = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    return line.startswith(b"{") and line.rstrip() != b"{" and (not newline or line.rstrip().endswith(b"}"))


def _is_array(file: _File) -> bool:
    return file.beginning().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _recognise(beginning: bytes) -> str | None:
    """Return the format of a file that is not plain text, given its beginning; None for plain text."""
    if magic := next((found for head, found in _MAGIC if beginning.startswith(head)), None):
        return magic
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16 text instead of UTF-8"
    if (at := beginning.find(b"\0")) >= 0:
        return f"binary data: a zero byte at offset {at}"
    text = beginning.removeprefix(b"\xef\xbb\xbf")
    return "HTML or XML" if _MARKUP.match(text) else "JSON" if _JSON.match(text) else None


def _open(path: Path, compression: str | None) -> Any:
    if compression is None:
        return path.open("rb")
    module: Any = importlib.import_module(compression)
    if compression != "pyarrow":
        return module.open(path, "rb")
    return io.BufferedReader(module.input_stream(str(path), compression="zstd"))


def _decode(content: bytes, file: _File) -> str:
    if (at := content.find(b"\0")) >= 0:
        raise file.error("plain text", f"binary data: a zero byte at offset {at}")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise file.error("UTF-8 text", f"byte {content[error.start]:#04x} at offset {error.start}") from None


def _parse(content: bytes, file: _File, number: int | None) -> Any:
    try:
        return parse_json(content, file.path)
    except CheckpointError as error:
        raise file.error("JSON", str(error.found).replace("line 1 column", "column"), record=number) from None


def _read_lines(file: _File, field: str) -> Iterator[tuple[int, Any]]:
    with file.open() as lines:
        number = 0
        while line := lines.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                raise file.error(f"a line of at most {MAX_RECORD_BYTES >> 20} MiB", "a longer one", record=number)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, _parse(line, file, number)


def _read_json(file: _File, field: str) -> Iterator[tuple[int, Any]]:
    with file.open() as whole:
        content = whole.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        expected = f"at most {MAX_RECORD_BYTES >> 20} MiB of JSON, or JSON Lines (.jsonl), which is not read at once"
        raise file.error(expected, "a larger file")
    values = _parse(content.removeprefix(b"\xef\xbb\xbf"), file, None)
    if not isinstance(values, list):
        raise file.error("an array of objects, or an object in each line", kind_of(values))
    yield from enumerate(values, 1)


def _read_parquet(file: _File, field: str) -> Iterator[tuple[int, Any]]:
    try:
        from datasets import Dataset
        from pyarrow import parquet
    except ImportError:
        raise file.error('the package datasets to read Parquet files; pip install -e ".[data]"') from None
    try:
        names = parquet.read_schema(file.path).names
        if field in names:  # datasets treats the path as a pattern; its load_dataset would access the network
            rows: Any = Dataset.from_parquet(glob.escape(str(file.path)), streaming=True, columns=[field])
        else:
            rows = [dict.fromkeys(names)]
        yield from enumerate(rows, 1)
    except Exception as error:
        raise file.error("a readable Parquet file", str(error).partition("\n")[0]) from None


def _cut(text: str) -> Iterator[str]:
    """Split into pieces of at least DOCUMENT_BYTES characters, at a blank line or, past twice that, at any line end."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= 2 * DOCUMENT_BYTES or (size >= DOCUMENT_BYTES and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if any(line.strip() for line in piece):
        yield "".join(piece)


class Part:
    """Documents whose position `chosen` accepts, without paragraphs whose digest is in `copies`.

    Attributes:
        dropped: number of paragraphs dropped in the last iteration.
    """

    def __init__(
        self, documents: Documents, chosen: Callable[[int], bool], copies: Collection[bytes] = frozenset()
    ) -> None:
        self.documents, self.chosen, self.copies, self.dropped = documents, chosen, copies, 0

    def __iter__(self) -> Iterator[Document]:
        self.dropped = 0
        for number, document in enumerate(self.documents):
            if not self.chosen(number):
                continue
            pieces = paragraphs(document.text) if self.copies else [document.text]
            kept = [text for text in pieces if not self.copies or _digest(text) not in self.copies]
            self.dropped += len(pieces) - len(kept)
            if (text := "".join(kept)).strip():
                yield Document(document.name, text)


def split(documents: Documents, validation: Documents | None = None) -> tuple[Part, Part]:
    """Return (training, validation), both not empty. A hash of the name decides which documents are held out.

    With `validation` nothing is held out. Paragraphs of validation documents, compared without white space differences,
    are dropped from training documents, because documents may repeat each other ("with" is a section of "compound" in
    Python's reference).
    """
    if validation is None:
        held_out, number = _hold_out(documents)
        count = f"{number} documents"
        training, scored = (lambda number: number not in held_out), Part(documents, held_out.__contains__)
    else:
        training, scored, count = (lambda number: True), Part(validation, lambda number: True), "the training documents"
    digests = (_digest(text) for document in scored for text in paragraphs(document.text))
    part = Part(documents, training, {digest for digest in digests if digest is not None})
    if next(iter(scored), None) is None:
        raise ConfigError("--validation-data", where(scored.documents), "text; found white space only")
    if next(iter(part), None) is None:
        expected = f"documents that differ: all text of {count} is a copy of what is held out"
        raise ConfigError("--data", where(documents), expected)
    return part, scored


def _hold_out(documents: Documents) -> tuple[set[int], int]:
    """Return the positions of documents to hold out, at least one and not all, and the number of all documents."""
    held_out: set[int] = set()
    first = last = (0.0, "", 0)
    number = -1
    for number, document in enumerate(documents):
        rank = (_fraction(document.name), document.name, number)
        first, last = (min(first, rank), max(last, rank)) if number else (rank, rank)
        if rank[0] < HELD_OUT_FRACTION:
            held_out.add(number)
    if number < 1:
        allowed = f"two documents or more, one of them held out, or --validation-data; found {number + 1}"
        raise ConfigError("--data", where(documents), allowed)
    return (held_out or {first[2]}) - ({last[2]} if len(held_out) == number + 1 else set()), number + 1


def where(documents: Documents) -> str | None:
    """The files of documents, for messages; None for those of Python."""
    return documents.where if isinstance(documents, FileDocuments) else None


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _digest(paragraph: str) -> bytes | None:
    """Return a digest of the words of a paragraph; None if it is too short to be considered a copy."""
    words = " ".join(paragraph.split())
    return hashlib.blake2b(words.encode(), digest_size=16).digest() if len(words) >= COPY_MIN_CHARACTERS else None


def paragraphs(text: str) -> list[str]:
    """Split a text into paragraphs, each with its trailing blank lines."""
    pieces: list[str] = []
    blank = True
    for line in text.splitlines(keepends=True):
        if (blank and line.strip()) or not pieces:
            pieces.append("")
        pieces[-1] += line
        blank = not line.strip()
    return pieces
