"""A save is whole or not there, whatever fails and whenever the process dies: every call that changes the disk is made
to fail, and is the last that a process does."""

import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe
from moe import CheckpointError, Transformer
from moe.checkpoint import save
from moe.checkpoint.format.folder import MANIFEST
from moe.checkpoint.format.manifest import Manifest, verify
from moe.checkpoint.writing import atomic, shards
from tests.support.checkpoint_cases import V3, assert_same, build

SMALL = dataclasses.replace(V3, num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=4, num_experts_per_tok=2)
SHARD = 50_000  # three files
OLD, NEW = build(SMALL, seed=1), build(SMALL, seed=2)

# The way a child ends
UNHARMED, REFUSED, SAVED_ALL_THE_SAME, BUG = 10, 11, 12, 13

AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "fcntl.flock"}
WRITING = os.O_WRONLY | os.O_RDWR


class Faults:
    """Counts the calls below `root` that change or lock the disk, in a child process, and makes the `at`-th fail.

    Python's audit events show whatever way a call is made; what they do not show is replaced. How it is spoiled:
    "kill" ends the process before the call, or with half of a file written; "once" has the call fail; "from then on"
    has all that follow fail, too.
    """

    def __init__(self, root: Path, at: int, how: str, fallback: bool) -> None:
        self.root, self.at, self.how = str(root), at, how
        self.calls: list[list[str]] = []
        self.original = {"fsync": os.fsync, "write": Path.write_bytes, "put": shards._put}
        self.swap = (lambda a, b: False) if fallback else atomic._swap
        os.fsync = self._fsync
        plain = lambda path, content: self._write_bytes(path, content)  # noqa: E731 - a bound method does not bind again
        Path.write_bytes = plain  # pyright: ignore[reportAttributeAccessIssue]
        shards._put = self._put
        atomic._swap = self._swap
        sys.addaudithook(self._audit)

    def due(self, name: str, path: object) -> bool:
        self.calls.append([name, str(path).replace(self.root, "")])
        return len(self.calls) == self.at or (self.how == "from then on" and self.harmed)

    @property
    def harmed(self) -> bool:
        return 0 < self.at <= len(self.calls)

    def fail(self) -> None:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = (errno.ENOSPC, errno.EIO)[self.at % 2]
        raise OSError(number, os.strerror(number))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in AUDITED:
            return
        if event == "open" and not args[2] & WRITING:
            return
        relative = event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] != -1  # rmtree works within open folders
        ours = relative or event == "fcntl.flock" or str(args[0]).startswith(f"{self.root}/")
        if ours and self.due(event, args[1] if event == "os.rename" else args[0]):
            self.fail()

    def _fsync(self, descriptor: int) -> None:  # that nothing is lost when the power fails is not what is tried here
        if self.due("fsync", os.readlink(f"/proc/self/fd/{descriptor}")):
            self.fail()

    def _write_bytes(self, path: Path, content: bytes) -> int:
        if self.due("write", path):
            self.original["write"](path, content[: len(content) // 2])
            self.fail()
        return self.original["write"](path, content)

    def _put(self, file: Any, part: memoryview) -> None:
        if self.due("put", file.name):
            self.original["put"](file, part[: len(part) // 2])
            file.flush()
            self.fail()
        self.original["put"](file, part)

    def _swap(self, a: Path, b: Path) -> bool:
        if self.due("exchange", b):
            self.fail()
        return self.swap(a, b)


def in_child(work: Callable[[], int]) -> int:
    """Fork, and return the child's pid. Its status is what `work` returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; the child does not need them
        pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(60)
        os._exit(work())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(BUG)


def status_of(pid: int) -> int:
    """Exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def spoiled_save(target: Path, root: Path, at: int, how: str, fallback: bool) -> tuple[int, list[list[str]]]:
    """Save NEW in a child with the `at`-th call spoiled: how the child ended, and the calls until then."""
    log = root.parent / f"{root.name}.calls"

    def work() -> int:
        faults = Faults(root, at, how, fallback)
        fail = faults.fail

        def write_log() -> None:
            with log.open("w") as file:
                json.dump(faults.calls, file)

        def logged_fail() -> None:
            write_log()
            fail()

        faults.fail = logged_fail
        try:
            save(NEW, target, max_shard_bytes=SHARD)
        except CheckpointError as error:
            clear = f"{target}: not saved, and what was there is as it was: [Errno" in str(error)
            return REFUSED if clear and faults.harmed else BUG
        if not faults.harmed:
            write_log()
        return SAVED_ALL_THE_SAME if faults.harmed else UNHARMED

    status = status_of(in_child(work))
    return status, json.loads(log.read_text())


def found_in(target: Path) -> str:
    """Which of the two checkpoints is there, bit for bit and with its manifest."""
    found = moe.load(target)
    name = "old" if found.norm.weight.equal(OLD.norm.weight) else "new"
    assert_same(found, OLD if name == "old" else NEW)
    assert not verify(target).findings
    return name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["kill", "once", "from then on"])
@pytest.mark.parametrize("path", ["exchange", "fallback", "fresh"])
def test_every_crash_point(tmp_path: Path, path: str, how: str) -> None:
    """An old checkpoint is exchanged or replaced by two renames, or neither it nor its parent folders exist."""
    old, root = tmp_path / "old", tmp_path / "root"
    replacing, fallback = path != "fresh", path == "fallback"
    save(OLD, old, max_shard_bytes=SHARD)
    target = root / "model" if replacing else root / "made" / "for" / "model"
    recovered, at, seen = 0, 0, set()
    while True:
        at += 1
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if replacing:
            shutil.copytree(old, target)
        status, calls = spoiled_save(target, root, at, how, fallback)
        if status == UNHARMED:
            break
        point = f"call {at}, {calls[-1]}"
        seen.add(calls[at - 1][0])
        assert status in ([-signal.SIGKILL] if how == "kill" else [REFUSED, SAVED_ALL_THE_SAME]), point
        if replacing or target.exists():
            found = found_in(target)
            if how == "once" or (status == SAVED_ALL_THE_SAME and not fallback):
                assert found == ("new" if status == SAVED_ALL_THE_SAME else "old"), point
        if how == "once" and status == REFUSED:
            assert names(root) == (["model"] if replacing else []), point
        if how == "once" and status == SAVED_ALL_THE_SAME:
            # Nothing but tidying up, and the lock, may fail without a word.
            assert calls[at - 1][0] in ("os.remove", "os.rmdir", "os.truncate", "fcntl.flock", "os.rename"), point
        # Whatever is left, the next save succeeds and leaves nothing beside its folder.
        save(NEW, target, max_shard_bytes=SHARD)
        assert found_in(target) == "new", point
        assert names(target.parent) == ["model"], point
        recovered += 1
    print(f"{at - 1} crash points, {recovered} recovered")
    assert seen >= {"open", "write", "put", "fsync", "os.mkdir", "os.chmod", "fcntl.flock"}
    assert ("exchange" in seen) == replacing
    assert ("os.rename" in seen) == (path != "exchange")
    assert at > 30


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "fallback"])
def test_the_order_of_calls(tmp_path: Path, fallback: bool) -> None:
    """A power failure may lose whatever was not synced before it mattered."""
    root, model = tmp_path / "root", build(SMALL)
    root.mkdir()
    model.carried_files["tokenizer.json"] = b"{}"
    save(model, root / "model", max_shard_bytes=SHARD)
    files = set(names(root / "model"))
    assert len(files) == 7
    status, calls = spoiled_save(root / "model", root, 0, "once", fallback)
    assert status == UNHARMED

    def at(name: str, path: str) -> int:
        found = [i for i, call in enumerate(calls) if call[0] == name and call[1].endswith(path)]
        assert len(found) == 1, (name, path, found)
        return found[0]

    def last(name: str, path: str) -> int:
        return max(i for i, call in enumerate(calls) if call[0] == name and call[1].endswith(path))

    mkdir = next(i for i, call in enumerate(calls) if call[0] == "os.mkdir")
    new = calls[mkdir][1]
    manifest = at("write", f"{new}/{MANIFEST}")
    for name in files - {MANIFEST}:
        weights = name.endswith(".safetensors")
        written = last("put", f"{new}/{name}") if weights else at("write", f"{new}/{name}")
        assert mkdir < written < at("os.chmod", f"{new}/{name}") < at("fsync", f"{new}/{name}") < manifest
    parent = next(i for i, call in enumerate(calls) if call == ["fsync", ""])
    replaced = at("os.rename", "/model") if fallback else at("exchange", new)
    removed = next(i for i, call in enumerate(calls) if call[0] in ("os.remove", "os.rmdir"))
    order = [manifest, at("fsync", MANIFEST), at("fsync", new), replaced, parent, removed]
    assert order == sorted(order)
    if fallback:
        assert at("fsync", new) < at("os.rename", "/.model.previous") < replaced


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("killed", [True, False])
def test_a_disk_that_takes_no_more_in_the_middle_of_a_file(tmp_path: Path, killed: bool) -> None:
    """By the system's file-size limit, which also applies within the library's native code."""
    root, target = tmp_path / "root", tmp_path / "root" / "model"
    root.mkdir()
    save(OLD, target, max_shard_bytes=SHARD)
    sizes = [path.stat().st_size for path in target.iterdir()]

    def work(limit: int) -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            save(NEW, target, max_shard_bytes=SHARD)
        except CheckpointError as error:
            return REFUSED if "not saved" in str(error) and "too large" in str(error) else BUG
        return UNHARMED

    for limit in sorted({0, 1, 9, 1000, *(size - 1 for size in sizes), *(size // 2 for size in sizes)}):
        status = status_of(in_child(lambda limit=limit: work(limit)))
        assert status == (-signal.SIGXFSZ if killed else REFUSED), limit
        assert found_in(target) == "old"
        if not killed:
            assert names(root) == ["model"]
    save(NEW, target, max_shard_bytes=SHARD)
    assert (found_in(target), names(root)) == ("new", ["model"])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_second_save_is_refused_while_the_first_runs_and_cleans_up_after_it_died(tmp_path: Path) -> None:
    target = tmp_path / "model"
    OLD.save(target)

    def work() -> int:
        with atomic.replacing(target, Manifest()) as new:
            (new / "model.safetensors").write_bytes(b"half")
            signal.pause()
        return BUG

    child = in_child(work)
    try:
        wait_for(lambda: bool(list(tmp_path.glob(".model.partial-*/model.safetensors"))))
        before = names(tmp_path)
        with pytest.raises(CheckpointError, match=f"another save to this folder is going on; found process {child} on"):
            NEW.save(target)
        assert names(tmp_path) == before and len(before) == 3
        assert found_in(target) == "old"
        NEW.save(tmp_path / "model2")  # another folder is nobody's business
        shutil.rmtree(tmp_path / "model2")
    finally:
        os.kill(child, signal.SIGKILL)
        status_of(child)
    assert names(tmp_path) == before
    NEW.save(target)
    assert (found_in(target), names(tmp_path)) == ("new", ["model"])


@pytest.mark.usefixtures("quick")
def test_two_processes_save_while_a_third_loads(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(OLD, target, max_shard_bytes=SHARD)

    def work(model: Transformer) -> int:
        saved = 0
        while saved < 15:
            try:
                save(model, target, max_shard_bytes=SHARD)
                saved += 1
            except CheckpointError as error:
                if "another save to this folder" not in str(error):
                    raise
                time.sleep(0.001)
        return UNHARMED

    children = {in_child(lambda model=model: work(model)) for model in (OLD, NEW)}
    loads = 0
    while children:
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert os.waitstatus_to_exitcode(status) == UNHARMED
                children.remove(child)
        try:
            found = moe.load(target)
        except CheckpointError as error:
            # Its files went while they were read: the message may be of the file, or of the folder.
            assert target.is_dir(), error
            continue
        assert_same(found, OLD if found.norm.weight.equal(OLD.norm.weight) else NEW)
        loads += 1
    found_in(target)
    assert loads and names(tmp_path) == ["model"]


def test_a_lock_that_its_holder_removes_at_the_last_moment_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed between opening and locking: the lock would be on a file that no other process can open."""
    lock, original, calls = tmp_path / ".model.lock", fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            lock.unlink()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(KeyError), atomic.replacing(tmp_path / "model", Manifest()):
        with pytest.raises(CheckpointError, match="another save to this folder"):
            NEW.save(tmp_path / "model")
        raise KeyError
    assert names(tmp_path) == []


def test_without_locks_saving_works_and_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    others = tmp_path / ".model.partial-0123abcd"
    others.mkdir()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    NEW.save(tmp_path / "model")
    assert found_in(tmp_path / "model") == "new"
    assert names(tmp_path) == [others.name, "model"]


def test_only_leftovers_of_this_folder_are_swept(tmp_path: Path) -> None:
    others = [
        ".model2.partial-0123abcd",
        ".model.partial-mine",
        ".model.partial-0123abcd.bak",
        "model.partial-0123abcd",
    ]
    for name in (*others, ".model.partial-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    NEW.save(tmp_path / "model")
    assert names(tmp_path) == sorted([*others, "model"])


def test_a_file_that_appears_during_a_save_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "model"
    OLD.save(target)
    with (
        pytest.raises(CheckpointError, match=r"holds other files.*found notes\.txt"),
        atomic.replacing(target, Manifest()),
    ):
        (target / "notes.txt").write_text("precious")
    assert (target / "notes.txt").read_text() == "precious"
    assert names(tmp_path) == ["model"]


def test_an_exception_of_the_block_is_raised_and_no_files_remain(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="bug"), atomic.replacing(tmp_path / "deep" / "er" / "model", Manifest()) as new:
        (new / "config.json").write_text("{}")
        raise KeyError("bug")
    assert names(tmp_path) == []


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(OLD, tmp_path / "model", max_shard_bytes=SHARD)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()} == {0o640}


def test_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "model"
    OLD.save(target)
    os.rename(target, tmp_path / ".model.previous")
    assert_same(moe.load(target), OLD)
    with pytest.raises(KeyError), atomic.replacing(target, Manifest()):
        raise KeyError
    assert_same(moe.load(target), OLD)
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("made_anew", ["empty", "with files"])
def test_a_folder_created_after_a_kill_does_not_cost_the_old_checkpoint(tmp_path: Path, made_anew: str) -> None:
    """`out.mkdir(exist_ok=True)` before a save is common, and must not cost the checkpoint that a kill put aside."""
    target = tmp_path / "model"
    OLD.save(target)
    os.rename(target, tmp_path / ".model.previous")
    target.mkdir()
    if made_anew == "with files":
        (target / "notes.txt").write_text("mine")
    expected = CheckpointError if made_anew == "with files" else KeyError
    with pytest.raises(expected), atomic.replacing(target, Manifest()):
        raise KeyError
    kept = target if made_anew == "empty" else tmp_path / ".model.previous"
    assert_same(moe.load(kept), OLD)


def test_a_folder_that_cannot_be_synced_is_accepted_and_a_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems answer EINVAL for folders; for a file it is an error like any other."""
    original = os.fsync
    refused: list[bool] = [True, False]  # is it a folder?

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") in refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"not saved.*Invalid argument"):
        NEW.save(tmp_path / "model")
    assert names(tmp_path) == []
    refused.remove(False)
    NEW.save(tmp_path / "model")
    assert found_in(tmp_path / "model") == "new"
