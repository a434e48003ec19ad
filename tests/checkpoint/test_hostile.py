"""Untrusted folders: each mutation of a valid one is one error that names it, at once."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize, safe_open

import moe
from moe import CheckpointError
from moe.checkpoint.format.header import read_header
from moe.checkpoint.reading import load as reading
from tests.support import hostile
from tests.support.checkpoint_cases import assert_same
from tests.support.hostile import LEGAL, MUTATIONS, REVISION


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    hostile.build(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Name -> (mode, bytes) of everything in the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_mode, data)
    return found


@pytest.mark.parametrize("case", MUTATIONS)
def test_a_mutation_is_one_error_that_names_it(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before a model is made."""
    mutation = MUTATIONS[case]
    files = {"shard": hostile.shard(folder).name, "router": hostile.shard(folder, hostile.GATE).name}
    last = max(hostile.split(hostile.shard(folder))[0].items(), key=lambda item: item[1].get("data_offsets", [0]))[0]
    mutation.change(folder)
    before = contents(folder)
    monkeypatch.setattr(reading, "Transformer", None)
    started = time.process_time()  # what waits for something waits for ever
    with pytest.raises(CheckpointError) as caught:
        moe.load(folder)
    assert time.process_time() - started < 1
    error = caught.value
    assert error.path == folder / files.get(mutation.file, mutation.file)
    assert error.tensor == (last if mutation.tensor == hostile.LAST else mutation.tensor)
    assert mutation.found in str(error.found if error.found is not None else "")
    assert mutation.expected in str(error.expected if error.expected is not None else "")
    assert mutation.problem in str(error)
    assert mutation.found or mutation.expected or mutation.problem, "an error that says nothing"
    assert str(error).isprintable() and len(str(error)) < 1500
    assert contents(folder) == before


@pytest.mark.parametrize("case", LEGAL)
def test_what_is_odd_and_legal_loads_as_the_original(original: Path, folder: Path, case: str) -> None:
    LEGAL[case](folder)
    assert contents(folder) != contents(original)
    assert_same(moe.load(folder), moe.load(original))


@pytest.mark.parametrize("case", [*MUTATIONS, *LEGAL])
def test_the_library_reads_what_we_read(folder: Path, case: str) -> None:
    """Each file that the reader accepts, in a folder that it may refuse, and what it refuses as the library does."""
    (MUTATIONS[case].change if case in MUTATIONS else LEGAL[case])(folder)
    accepted = 0
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            ours = read_header(path)
        except CheckpointError:
            continue
        accepted += 1
        content = path.read_bytes()
        theirs = dict(deserialize(content))
        assert {name: (t.dtype, list(t.shape)) for name, t in ours.items()} == {
            name: (t["dtype"], t["shape"]) for name, t in theirs.items()
        }
        for name, info in ours.items():
            assert content[info.offset : info.offset + info.nbytes] == bytes(theirs[name]["data"]), name
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == set(ours)
    assert accepted or case in MUTATIONS


LIBRARY_REFUSES = (
    *("header length past the end", "minus zero", "hole", "overlap"),
    *("one byte short", "a trailing byte", "lone surrogate in metadata", "metadata twice", "NaN", "unknown dtype"),
)


@pytest.mark.parametrize("case", LIBRARY_REFUSES)
def test_the_library_refuses_the_same(folder: Path, case: str) -> None:
    path = hostile.shard(folder)
    MUTATIONS[case].change(folder)
    with pytest.raises(SafetensorError):
        deserialize(path.read_bytes())


def test_no_code_is_imported(folder: Path) -> None:
    LEGAL["code that nobody runs"](folder)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    modules = set(sys.modules)
    moe.load(folder)
    assert not {name for name in set(sys.modules) - modules if "evil" in name}


# Hugging Face's cache: models--ORG--NAME/{refs/main, blobs/HASH, snapshots/REVISION/FILE -> ../../blobs/HASH}


@pytest.fixture
def repository(folder: Path, tmp_path: Path) -> Path:
    place = tmp_path / "hub" / "models--org--name"
    snapshot = place / "snapshots" / REVISION
    for part in (place / "refs", place / "blobs", snapshot):
        part.mkdir(parents=True)
    (place / "refs" / "main").write_text(REVISION)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(place / "blobs" / f"hash{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{i}")
    return place


def test_a_repository_in_the_cache(original: Path, repository: Path, tmp_path: Path) -> None:
    expected = moe.load(original)
    snapshot = repository / "snapshots" / REVISION
    link = tmp_path / "link"
    for given in (snapshot, repository):
        assert_same(moe.load(given), expected)
        link.symlink_to(given)
        assert_same(moe.load(link), expected)
        link.unlink()
    moved = tmp_path / "disk"
    repository.parent.rename(moved)
    repository.parent.symlink_to(moved)
    assert_same(moe.load(repository), expected)


def test_the_store_that_repositories_share(original: Path, repository: Path) -> None:
    """Newer ones of Hugging Face's cache: blobs are links to a store beside the repositories, which a file marks."""
    store = repository.parent / "blobs"
    blob = (repository / "snapshots" / REVISION / hostile.shard(original).name).resolve()
    (store / "aa").mkdir(parents=True)
    blob.rename(store / "aa" / "xet")
    blob.symlink_to("../../blobs/aa/xet")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        moe.load(repository)
    (store / ".huggingface-shared-blobs").write_text("1\n")
    assert_same(moe.load(repository), moe.load(original))


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


BROKEN_REPOSITORIES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no ref": (
        lambda r: (r / "refs" / "main").unlink(),
        "",
        "no such revision in the cache; expected none",
    ),
    "ref upwards": (lambda r: (r / "refs" / "main").write_text("../../../x"), "refs/main", "no revision"),
    "ref of dots": (lambda r: (r / "refs" / "main").write_text(".."), "refs/main", "no revision"),
    "ref with a newline": (lambda r: (r / "refs" / "main").write_text("a\nb"), "refs/main", "no revision"),
    "ref of a megabyte": (lambda r: (r / "refs" / "main").write_text("a" * 2**20), "refs/main", "too large"),
    "ref a link outside": (lambda r: relink(r / "refs" / "main", "/etc/hostname"), "refs/main", "leads out"),
    "no snapshot": (lambda r: (r / "snapshots" / REVISION).rename(r / "other"), "refs/main", REVISION),
    "snapshot a link outside": (
        lambda r: (
            (r / "snapshots" / REVISION).rename(r.parent / "x"),
            (r / "snapshots" / REVISION).symlink_to("../../x"),
        ),
        f"snapshots/{REVISION}",
        "leads out",
    ),
    "file a link outside": (
        lambda r: relink(r / "snapshots" / REVISION / "config.json", "/etc/hostname"),
        f"snapshots/{REVISION}/config.json",
        "leads out",
    ),
    "file a link to another repository": (
        lambda r: relink(r / "snapshots" / REVISION / "config.json", "../../../models--x--y/blobs/a"),
        f"snapshots/{REVISION}/config.json",
        "leads out",
    ),
    "blob not downloaded": (
        lambda r: (r / "snapshots" / REVISION / "config.json").resolve().unlink(),
        f"snapshots/{REVISION}/config.json",
        "link to nothing",
    ),
}


@pytest.mark.parametrize("case", BROKEN_REPOSITORIES)
def test_a_broken_repository(repository: Path, case: str) -> None:
    change, path, message = BROKEN_REPOSITORIES[case]
    change(repository)
    with pytest.raises(CheckpointError, match=message) as caught:
        moe.load(repository)
    assert caught.value.path == repository / path
    assert str(caught.value).isprintable()


def test_links_are_judged_from_where_the_folder_is(original: Path, folder: Path, tmp_path: Path) -> None:
    """A folder given by a link is the folder; its files' links still lead nowhere else."""
    given = tmp_path / "given"
    given.symlink_to(folder)
    assert_same(moe.load(given), moe.load(original))
    file = hostile.shard(folder)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint") as caught:
        moe.load(given)
    assert caught.value.path == given / file.name


@pytest.mark.parametrize("path", ["a\0b", "x" * 250, "x" * 300, "a\nb", "/dev/null"])
def test_no_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        moe.load(tmp_path / path)
    assert caught.value.path == tmp_path / path and str(caught.value).isprintable()
