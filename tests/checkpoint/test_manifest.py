"""The manifest: any change of a saved folder is found and named, and nothing else is."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moe
from moe import CheckpointError
from moe.checkpoint import save
from moe.checkpoint.format import manifest
from moe.checkpoint.format.folder import MANIFEST
from moe.checkpoint.format.header import read_header
from moe.checkpoint.format.manifest import verify
from moe.checkpoint.writing import shards
from tests.support.checkpoint_cases import V3_MTP, assert_same, build

MODEL = build(dataclasses.replace(V3_MTP, num_hidden_layers=2, num_nextn_predict_layers=1), dtype=torch.bfloat16)
EXPERTS = "model.layers.1.mlp.experts"
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "model"
    MODEL.carried_files["tokenizer.json"] = b'{"a": 1}'
    save(MODEL, folder, max_shard_bytes=70_000)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def where(folder: Path, tensor: str) -> Path:
    (path,) = (path for path in folder.glob("*.safetensors") if tensor in read_header(path))
    return path


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def swap_bytes(folder: Path, a: str, b: str) -> None:
    """Exchange the values of two tensors in place; no header changes."""
    one, two = (read_header(where(folder, name))[name] for name in (a, b))
    first, second = (info.path.read_bytes()[info.offset :][: info.nbytes] for info in (one, two))
    for info, content in ((one, second), (two, first)):
        with info.path.open("r+b") as file:
            file.seek(info.offset)
            file.write(content)


def test_what_is_recorded_is_what_an_independent_reader_finds(saved: Path) -> None:
    files = json.loads((saved / MANIFEST).read_text())["files"]
    assert files.keys() == {path.name for path in saved.iterdir()} - {MANIFEST}
    for name, entry in files.items():
        content = (saved / name).read_bytes()
        assert entry["bytes"] == len(content)
        if not name.endswith(".safetensors"):
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
            continue
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        assert entry["sha256"] == hashlib.sha256(header).hexdigest()
        with safe_open(saved / name, "pt") as reader:
            assert entry["tensors"].keys() == set(reader.keys())
            for tensor, record in entry["tensors"].items():
                values = reader.get_tensor(tensor)
                content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert record["sha256"] == hashlib.sha256(content).hexdigest()
                assert record["shape"] == list(values.shape)
                assert record["dtype"] == reader.get_slice(tensor).get_dtype()
    done = verify(saved)
    assert not done.findings
    assert (done.files, done.tensors) == (len(files), sum(len(entry.get("tensors", ())) for entry in files.values()))


def test_digests_are_taken_without_a_copy() -> None:
    for tensor in (torch.arange(6.0).bfloat16().view(2, 3), torch.tensor(2.5), torch.zeros(0, 3)):
        content = shards._bytes(shards.entry_of("a", tensor, tuple(tensor.shape)), tensor)
        assert content.nbytes == tensor.nbytes
        assert np.asarray(content).ctypes.data == tensor.data_ptr() or not tensor.numel()


def test_a_flipped_bit_anywhere_is_found_and_named(saved: Path) -> None:
    found = 0
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        header = read_header(path) if path.suffix == ".safetensors" else {}
        ends = {info.offset + info.nbytes: name for name, info in header.items()}
        data = min((info.offset for info in header.values()), default=len(content))
        places = [*range(0, data, max(1, data // 25)), *range(data, len(content), max(1, len(content) // 25))]
        for at in {*places, len(content) - 1}:
            flipped = bytearray(content)
            flipped[at] ^= 1 << at % 8
            path.write_bytes(flipped)
            if path.name == MANIFEST:
                with pytest.raises(CheckpointError, match=MANIFEST):
                    verify(saved)
            else:
                findings = verify(saved).findings
                assert {finding.file for finding in findings} == {path.name}, at
                if at >= data:
                    (finding,) = findings
                    assert finding.tensor == ends[min(end for end in ends if end > at)]
            found += 1
        path.write_bytes(content)
    assert not verify(saved).findings
    print(f"{found} flipped bits, {found} found")
    assert found > 250


def test_two_experts_exchanged(saved: Path) -> None:
    """Nothing else can see this: the folder loads, and the model is another."""
    a, b = f"{EXPERTS}.3.down_proj.weight", f"{EXPERTS}.7.down_proj.weight"
    swap_bytes(saved, a, b)
    moe.load(saved)
    first, second = verify(saved).findings
    assert (first.tensor, second.tensor) == (a, b)
    assert (first.problem, second.problem) == (f"holds the values of {b}", f"holds the values of {a}")
    assert first.file == where(saved, a).name


def test_two_experts_exchanged_by_their_names(saved: Path) -> None:
    a, b = f"{EXPERTS}.3.down_proj.weight", f"{EXPERTS}.7.down_proj.weight"
    path = where(saved, a)
    assert path == where(saved, b)
    content = path.read_bytes()
    for old, new in ((a, "?" * len(a)), (b, a), ("?" * len(a), b)):
        assert content.count(old.encode()) == 1
        content = content.replace(old.encode(), new.encode())
    path.write_bytes(content)
    findings = verify(saved).findings
    assert [f.tensor for f in findings] == [None, a, b]
    assert findings[0].problem == "header changed since it was saved"
    assert findings[1].problem == f"holds the values of {b}"


def test_two_shards_exchanged(saved: Path) -> None:
    one, two = saved / SHARDS[1], saved / SHARDS[2]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert [str(finding) for finding in verify(saved).findings] == [
        f"{one.name}: has the header of {two.name}",
        f"{two.name}: has the header of {one.name}",
    ]


def test_a_shard_of_another_checkpoint(saved: Path, tmp_path: Path) -> None:
    """Names, shapes and header are the same: only the values differ."""
    other = build(MODEL.config, seed=5, dtype=torch.bfloat16)
    save(other, tmp_path / "other", max_shard_bytes=70_000)
    shutil.copy(tmp_path / "other" / SHARDS[2], saved)
    findings = verify(saved).findings
    assert {f.file for f in findings} == {SHARDS[2]}
    assert {f.tensor for f in findings} == read_header(saved / SHARDS[2]).keys()


def edit_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 2.0}))


NORM = "model.norm.weight"
CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config": (edit_config, r"^config\.json: bytes changed since it was saved; expected sha256 .*; found "),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"^tokenizer\.json: bytes changed"),
    "quantisation added": (lambda f: (f / "hf_quant_config.json").write_text("{}"), r"^hf_quant_config\.json: "),
    "template added": (
        lambda f: (
            (f / "additional_chat_templates").mkdir(),
            (f / "additional_chat_templates" / "a.jinja").write_text("a"),
        ),
        r"^additional_chat_templates/a\.jinja: ",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"^tokenizer\.json: missing"),
    "no shard": (lambda f: (f / SHARDS[1]).unlink(), rf"^{SHARDS[1]}: missing$"),
    "one byte short": (
        lambda f: os.truncate(f / SHARDS[1], 70_000),
        rf"^{SHARDS[1]}: .*_proj.weight: truncated, or .*expected at most \d+; found \d+$",
    ),
    "a pickle in its place": (lambda f: (f / SHARDS[1]).write_bytes(b"\x80\x02}q\0."), rf"^{SHARDS[1]}: truncated"),
    "more chat": (lambda f: (f / "chat_template.jinja").touch(), r"^chat_template\.jinja: not in the manifest"),
    "one more file": (lambda f: save_file({"x": torch.zeros(1)}, f / "model-x.safetensors"), r"^model-x.*: x: not in"),
    "one more tensor": (
        lambda f: rewrite(f / SHARDS[0], lambda t: t.update(x=torch.zeros(1))),
        rf"^{SHARDS[0]}: x: not in the manifest",
    ),
    "one tensor less": (lambda f: rewrite(where(f, NORM), lambda t: t.pop(NORM)), rf": {NORM}: missing"),
    "another dtype": (
        lambda f: rewrite(where(f, NORM), lambda t: t.update({NORM: t[NORM].half()})),
        rf": {NORM}: dtype or shape; expected BF16 \[42\]; found F16 \[42\]",
    ),
    "a tensor twice": (
        lambda f: save_file({NORM: torch.zeros(42)}, f / "model-x.safetensors"),
        rf"{NORM}: in two files; found also in",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_found_and_named(saved: Path, case: str) -> None:
    change, expected = CHANGES[case]
    change(saved)
    lines = "\n".join(map(str, verify(saved).findings))
    assert len([line for line in lines.splitlines() if re.search(expected, line)]) == 1, lines
    assert len(lines.splitlines()) <= 3


def test_saved_again_by_another_program(saved: Path) -> None:
    """It leaves our manifest in place: each tensor that it changed or moved is named."""
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(saved / shard).items()}
    for shard in SHARDS:
        (saved / shard).unlink()
    (saved / "model.safetensors.index.json").unlink()
    changed = f"{EXPERTS}.0.up_proj.weight"
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, saved / "model.safetensors")
    findings = verify(saved).findings
    assert [f.file for f in findings if f.problem == "missing"] == sorted([*SHARDS, "model.safetensors.index.json"])
    assert [f.tensor for f in findings if f.problem.startswith("bytes changed")] == [changed]
    moved = {f.tensor for f in findings if f.problem == "in another file than it was saved to"}
    assert moved == tensors.keys()
    moe.load(saved)


def test_loading_does_not_look_at_it_and_saving_makes_a_new_one(saved: Path, tmp_path: Path) -> None:
    (saved / MANIFEST).write_bytes(b"\xff")
    model = moe.load(saved)
    assert_same(model, MODEL)
    model.save(tmp_path / "copy")
    assert MANIFEST not in model.carried_files
    with torch.no_grad():
        model.norm.weight.add_(1)
    model.save(saved)
    for folder in (saved, tmp_path / "copy"):
        assert not verify(folder).findings


def test_a_sector_that_cannot_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open

    def broken(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == SHARDS[1] and kwargs.get("buffering") == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    findings = verify(saved).findings
    assert {f.tensor for f in findings} == read_header(saved / SHARDS[1]).keys()
    assert {f.problem for f in findings} == {"cannot be read: Input/output error"}


def test_progress_adds_up(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_CHUNK", 1000)
    steps: list[tuple[int, int]] = []
    verify(saved, lambda read, total: steps.append((read, total)))
    assert {total for _, total in steps} == {sum(read for read, _ in steps)}
    assert max(read for read, _ in steps) == 1000


def forged(values: Any) -> bytes:
    return manifest._sealed({"format": 1, "files": values})


TENSOR = {"dtype": "F32", "shape": [1], "sha256": "0"}
FORGED = {
    "not JSON": (b"{", "not valid JSON"),
    "an array": (b"[1]", "not a manifest of this version"),
    "a later format": (manifest._sealed({"format": 2, "files": {}}), "format; expected 1; found 2"),
    "no seal": (b'{"format": 1, "files": {}}', "the manifest itself has changed"),
    "a seal of something else": (forged({}).replace(b'"files"', b'"Files"'), "the manifest itself has changed"),
    "files not an object": (forged([]), "not a manifest; expected an object of files"),
    "path upwards": (forged({"../../etc/passwd": {"bytes": 1, "sha256": "0"}}), "not a manifest"),
    "entry not an object": (forged({"a": 1}), "not a manifest"),
    "entry without digest": (forged({"a": {"bytes": 1}}), "not a manifest"),
    "digest not a text": (forged({"a": {"bytes": 1, "sha256": []}}), "not a manifest"),
    "size not a number": (forged({"a": {"bytes": "1", "sha256": ""}}), "not a manifest"),
    "tensors not an object": (forged({"a": {"bytes": 1, "sha256": "", "tensors": [1]}}), "not a manifest"),
    "tensor without shape": (
        forged({"a": {"bytes": 1, "sha256": "", "tensors": {"x": {"dtype": "F32"}}}}),
        "not a man",
    ),
    "tensor's digest": (
        forged({"a": {"bytes": 1, "sha256": "", "tensors": {"x": {**TENSOR, "sha256": 1}}}}),
        "not a m",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_file_that_is_no_manifest_is_refused(saved: Path, case: str) -> None:
    content, message = FORGED[case]
    (saved / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(saved)
    assert caught.value.path == saved / MANIFEST


def test_a_manifest_is_never_written_for_what_was_not_recorded(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    recorded = manifest.Manifest()
    with pytest.raises(KeyError, match="x"):
        recorded.write(tmp_path)
    recorded.add({"x": bytes(4), "y": b""})
    with pytest.raises(AssertionError, match="added and not written"):
        recorded.write(tmp_path)
    assert not (tmp_path / MANIFEST).exists()
