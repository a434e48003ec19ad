"""A writer refuses before the first byte what a reader would refuse, and divides files so that readers take them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe
from moe import CheckpointError, ConfigError
from moe.checkpoint import read_summary, save
from moe.checkpoint.convert import convert, cut
from moe.checkpoint.format import header
from moe.checkpoint.format.families import family_of
from moe.checkpoint.format.folder import MAX_CONFIG_BYTES, MAX_CONFIG_VALUES, read_tensors
from moe.checkpoint.format.header import read_header
from moe.checkpoint.format.layout import fp8_names, layout, with_scales
from moe.checkpoint.format.manifest import MANIFEST, record_bytes, verify
from moe.checkpoint.writing import shards
from moe.checkpoint.writing.shards import Entry, divide
from tests.support.checkpoint_cases import V3, assert_same, build, configs


def limit(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(shards, name, value)


def kimi_in_one_file() -> list[Entry]:
    """All tensors of Kimi-K2 in FP8, in the layout of DeepSeek's inference code."""
    config = moe.preset("kimi_k2")
    table = family_of("kimi_k2", "").tables["deepseek"]
    slots = {name: slot for name, slot in layout(config, "deepseek").items() if slot.written}
    quantised = set(fp8_names(slots))
    slots = with_scales(slots, table, (128, 128), quantised)
    kinds = {
        name: "F8_E4M3" if name in quantised else "F32" if slot.scale_of else "BF16" for name, slot in slots.items()
    }
    return [Entry(name, kinds[name], slot.shape) for name, slot in slots.items()]


def test_kimi_k2_in_one_file(tmp_path: Path) -> None:
    """The header is as released widths make it; the data is a hole."""
    entries = kimi_in_one_file()
    [(file, shard)] = divide(entries, None, tmp_path, single="model0-mp1.safetensors").items()
    content = shards._header(shard)
    assert len(entries) == 139_583
    (tmp_path / file).write_bytes(content)
    os.truncate(tmp_path / file, len(content) + sum(entry.nbytes for entry in entries))
    found = read_header(tmp_path / file)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        entry.name: (entry.dtype, entry.shape) for entry in entries
    }


def test_more_tensors_than_one_file_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, MAX_TENSORS=100)
    entries = [Entry(f"experts.{i}.weight", "BF16", (2, 3)) for i in range(101)]
    with pytest.raises(CheckpointError) as caught:
        divide(entries, None, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/model.safetensors: tensors in one file: more than a reader accepts; choose a layout with several "
        "files; expected at most 100; found 101"
    )
    assert [len(shard) for shard in divide(entries, 2**62, tmp_path).values()] == [100, 1]
    assert list(map(len, divide(entries[1:], None, tmp_path).values())) == [100]


def test_a_shard_ends_where_its_header_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, MAX_HEADER_BYTES=100_000)
    entries = [Entry(f"{i:0{i % 90}}", "F32", (i,)) for i in range(1, 1_000)]
    files = divide(entries, 2**62, tmp_path)
    sizes = [len(shards._header(shard)) for shard in files.values()]
    assert len(files) == 2 and max(sizes) - 8 <= 100_000 < sum(sizes)
    assert max(sizes) > 85_000
    with pytest.raises(CheckpointError, match=r"model\.safetensors: bytes of the header: more than a reader accepts"):
        divide(entries, None, tmp_path)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"MAX_INDEX_TENSORS": 100}, r"index\.json: tensors in the index: .* stacks experts; expected at most 100"),
        ({"MAX_INDEX_BYTES": 1000}, r"index\.json: bytes of the index: .*; expected at most 1000; found \d+"),
        ({"MAX_MANIFEST_BYTES": 1000}, r"manifest\.json: bytes of the manifest: .* at most 1000"),
        ({"MAX_CONFIG_BYTES": 1000}, r"config\.json: extra: more than a reader accepts; expected at most 1000"),
        ({"MAX_HEADER_BYTES": 90}, r"bytes of the header: more than a reader accepts; .* at most 90"),
    ],
)
@pytest.mark.parametrize("way", ["save", "convert", "cut"])
def test_nothing_is_written_that_cannot_be_read(
    way: str, limits: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(V3)
    model.save(tmp_path / "source")
    limit(monkeypatch, **limits)
    monkeypatch.setattr(shards, "_put", None)
    out, size = tmp_path / "out", 2_000
    ways: dict[str, Any] = {
        "save": lambda: save(model, out, max_shard_bytes=size),
        "convert": lambda: convert(tmp_path / "source", out, dtype="BF16", max_shard_bytes=size),
        "cut": lambda: cut(tmp_path / "source", out, layers=[0, 1, 2], experts=range(12), max_shard_bytes=size),
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        ways[way]()
    assert Path(caught.value.path).parent == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_one_file_of_a_layout_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(V3).save(tmp_path / "source")
    limit(monkeypatch, MAX_TENSORS=100)
    with pytest.raises(CheckpointError, match=r"model0-mp1\.safetensors: tensors in one file: .* at most 100"):
        convert(tmp_path / "source", tmp_path / "out", table="deepseek")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    convert(tmp_path / "source", tmp_path / "out", dtype="F32", progress=False)
    assert_same(moe.load(tmp_path / "out"), build(V3))
    assert len(list((tmp_path / "out").glob("model-*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize("size", [(2**16 + 1, 1), (0, 16), (16, -1)])
def test_blocks_that_a_reader_refuses(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two integers from 1 to 65536"):
        convert(tmp_path, tmp_path / "out", dtype="fp8", block_size=size)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a": "x" * MAX_CONFIG_BYTES}, "more than a reader accepts"),
        ({"a": nested(64)}, "more than 64 nested arrays and objects"),
        ({"a": nested(800)}, "extra: not JSON|more than 64"),
        ({"a": {1: 0, "1": 0}}, "duplicate key|not JSON"),
        ({"a": float("nan")}, "not JSON"),
        ({"a": 10**5000}, "not JSON|not valid JSON"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "AWQ is not supported"),
    ],
    ids=["large", "deep", "deeper", "twice", "nan", "digits", "format"],
)
def test_a_config_that_a_reader_refuses(extra: Any, message: str, tmp_path: Path) -> None:
    model = build(V3)
    model.config = dataclasses.replace(V3, extra=extra)
    with pytest.raises(CheckpointError, match=message):
        model.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_config_of_more_values_than_a_reader_takes(tmp_path: Path) -> None:
    model = build(V3)
    model.config = dataclasses.replace(V3, extra={"x": [0] * (MAX_CONFIG_VALUES + 1)})
    with pytest.raises(CheckpointError, match=r"config\.json: too many values"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_small_without_line_breaks(tmp_path: Path) -> None:
    extra = {"a": [[[[i] for i in range(10)]] * 2_000]}
    model = build(V3)
    model.config = dataclasses.replace(V3, extra=extra)
    model.save(tmp_path / "out")
    assert moe.load(tmp_path / "out").config.extra["a"] == extra["a"]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    configs("deepseek_v3"),
    st.integers(1, 40),
    st.integers(600, 4000),
    st.integers(1, 20_000),
    st.integers(20, 200),
)
def test_what_a_save_accepts_a_load_accepts(
    tmp_path_factory: pytest.TempPathFactory, config: Any, tensors: int, nbytes: int, size: int, index: int
) -> None:
    """Under limits small enough to matter, the same for the reader and the writer."""
    folder = tmp_path_factory.mktemp("random") / "model"
    model = build(config)
    with pytest.MonkeyPatch.context() as patch:
        for module in (shards, header):
            patch.setattr(module, "MAX_TENSORS", tensors)
        limit(patch, MAX_HEADER_BYTES=nbytes, MAX_INDEX_TENSORS=index)
        try:
            save(model, folder, max_shard_bytes=size)
        except CheckpointError as error:
            assert len(model.state_dict()) > 1 and not folder.exists()
            assert "more than a reader accepts" in str(error)
            return
    # Read through the public argument: a header of so many bytes, and within it so many tensors.
    for file in folder.glob("*.safetensors"):
        assert len(read_header(file, max_header_bytes=max(nbytes, 100 * tensors))) <= tensors
        assert int.from_bytes(file.read_bytes()[:8], "little") <= nbytes
    assert len(read_tensors(folder)) <= index or len(list(folder.glob("*.safetensors"))) == 1
    assert_same(moe.load(folder), model)
    assert read_summary(folder).agrees and not verify(folder).findings


def test_the_manifest_is_no_larger_than_foreseen(tmp_path: Path) -> None:
    save(build(V3), tmp_path / "out", max_shard_bytes=5_000)
    foreseen = sum(record_bytes(info.name, info.shape) for info in read_tensors(tmp_path / "out").values())
    values = json.loads((tmp_path / "out" / MANIFEST).read_text())
    alone = {name: entry["tensors"] for name, entry in values["files"].items() if "tensors" in entry}
    written = len(json.dumps({"files": {file: {"tensors": t} for file, t in alone.items()}}, indent=1)) - 60 * len(
        alone
    )
    assert 0.7 * foreseen < written < foreseen


def test_more_shards_than_five_digits_count() -> None:
    assert shards._names_of(3)[-1] == "model-00003-of-00003.safetensors"
    names = shards._names_of(100_000)
    assert (names[0], names[-1]) == ("model-000001-of-100000.safetensors", "model-100000-of-100000.safetensors")
    assert len(set(names)) == 100_000
