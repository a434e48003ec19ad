"""The strict reader: what a file or an index may not say, and that the safetensors library accepts all that we do."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from moe import CheckpointError
from moe.checkpoint.format.folder import read_tensors
from moe.checkpoint.format.header import read_header
from moe.checkpoint.format.strict_json import ambiguity, last_values, parse_as_python, parse_json

DATA = bytes(range(34))
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [34, 34]},
}


def encode(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(name: str, **entry: Any) -> dict[str, Any]:
    return {**HEADER, name: {**HEADER[name], **entry}}


def write(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_valid_file(tmp_path: Path) -> None:
    path = write(tmp_path, encode(HEADER))
    tensors = read_header(path)
    assert list(tensors) == ["a.weight", "b", "empty"]
    b = tensors["b"]
    assert (b.dtype, b.shape, b.nbytes, b.numel, b.path) == ("BF16", (5,), 10, 5, path)
    assert path.read_bytes()[b.offset : b.offset + b.nbytes] == DATA[24:34]


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{}", b""),
        (json.dumps(HEADER).encode() + b" " * 7, DATA),  # padding, and unaligned data
        ({"x": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}}, b"\x01"),
        (changed("b", more={"a": [1]}), DATA),
        ({**HEADER, "__metadata__": None}, DATA),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', b""),
        ({"x": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}, b"\x01" * 4),
    ],
)
def test_odd_but_legal(tmp_path: Path, header: Any, data: bytes) -> None:
    content = encode(header, data)
    read_header(write(tmp_path, content))
    deserialize(content)


# Beside the mutations of a whole folder in tests/support/hostile.py.
BAD_HEADERS = {
    "not JSON": (encode(b'{"a": '), "Expecting value"),
    "an array": (encode(b"[1, 2]"), "'{' first"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "not valid JSON"),
    "lone surrogate": (encode(b'{"\\ud800": 1}'), "not valid JSON"),
    "hole at the front": (encode({"b": HEADER["b"]}), "unused bytes"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_file_is_one_error_that_names_it(tmp_path: Path, case: str) -> None:
    content, message = BAD_HEADERS[case]
    path = write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and caught.value.path == path
    assert len(str(caught.value)) < 2000


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    content = encode(HEADER)
    for length in range(len(content)):
        with pytest.raises(CheckpointError):
            read_header(write(tmp_path, content[:length]))


@settings(
    deadline=None, derandomize=True, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_the_library_accepts_what_we_accept(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(encode(HEADER))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - len(DATA) - 1))
        content[at] = data.draw(st.sampled_from(b'0123456789{}[],:" \\FBUI.aenu\0\xff\x80'))
    try:
        ours = read_header(write(tmp_path, bytes(content)))
    except CheckpointError:
        return
    theirs = dict(deserialize(bytes(content)))
    assert {name: list(t.shape) for name, t in ours.items()} == {name: t["shape"] for name, t in theirs.items()}
    assert {name: t.dtype for name, t in ours.items()} == {name: t["dtype"] for name, t in theirs.items()}


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_tensors(tmp_path)


def test_what_python_reads_and_json_does_not_have(tmp_path: Path) -> None:
    text = b'{"a": [NaN, -Infinity, 1e999], "b": 1, "b": {"c": 2, "c": 3}, "d": 4, "d": 4, "e": [{"f": null}]}'
    values = parse_as_python(text, tmp_path, max_values=100)
    assert {key: ambiguity(value) for key, value in values.items()} == {
        "a": "nan",
        "b": "two values: 1 and later {'c': 2 and later 3}",
        "d": None,
        "e": None,
    }
    assert last_values(values)["b"] == json.loads(text)["b"] == {"c": 3}
    for bad in (b"[1", b"[01]", b"{'a': 1}", b"[" * 65 + b"]" * 65, b"\xff", b"[" + b"1" * 5000 + b"]"):
        with pytest.raises(CheckpointError, match="not valid JSON"):
            parse_as_python(bad, tmp_path, max_values=100)
    with pytest.raises(CheckpointError, match="too many values; expected at most 2 commas and brackets; found 3"):
        parse_as_python(b"[1, 2, 3]", tmp_path, max_values=2)


def test_numbers_and_keys_that_json_does_not_have() -> None:
    for text in (b"[Infinity]", b"[-Infinity]", b"[1e999]", b"[" + b"1" * 5000 + b"]"):
        with pytest.raises(CheckpointError, match="not valid JSON"):
            parse_json(text, Path("config.json"))
    assert parse_json(b'{"a": [1, 2.5, null, true, "x"]}', Path("p")) == {"a": [1, 2.5, None, True, "x"]}


def two_shards(folder: Path) -> dict[str, Any]:
    """A valid folder of two files; returns its index."""
    one = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    two = {"b": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "c": HEADER["empty"] | {"data_offsets": [2, 2]}}
    write(folder, encode(one, b"1234"), "one.safetensors")
    write(folder, encode(two, b"12"), "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    set_index(folder, index)
    return index


def set_index(folder: Path, index: Any) -> None:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(text)


def test_shards(tmp_path: Path) -> None:
    two_shards(tmp_path)
    assert {name: tensor.path.name for name, tensor in read_tensors(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
        "c": "two.safetensors",
    }


def test_shards_without_an_index(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"model-{name}.safetensors")
    assert sorted(read_tensors(tmp_path)) == ["a", "b", "c"]


def moved(index: dict[str, Any], **files: Any) -> dict[str, Any]:
    return {"weight_map": {**index["weight_map"], **files}}


# Beside the mutations of a whole folder in tests/support/hostile.py.
BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "two weight_maps": (
        lambda index: b'{"weight_map": {}, "weight_map": {}}',
        "weight_map occurs twice; expected one; found two",
    ),
    "metadata of a megabyte": (lambda index: {"metadata": [0] * 2**20, **index}, "a value of more than 1048576 bytes"),
    "metadata cut": (lambda index: b'{"metadata": {"a": [1, 2]', "Expecting ',' delimiter"),
    "brackets that differ": (lambda index: b'{"metadata": {"a": [1}, "weight_map": {}}', "Expecting ',' delimiter"),
    "metadata with a comma too many": (lambda index: b'{"metadata": [1,], "weight_map": {}}', "expected a value"),
    "metadata without a colon": (lambda index: b'{"metadata": {"a" 1}, "weight_map": {}}', "Expecting ':' delimiter"),
    "metadata too deep": (lambda index: b'{"metadata": ' + b"[" * 65 + b"]" * 65 + b"}", "more than 64 nested arrays"),
    "many other keys": (lambda index: {**{str(i): i for i in range(65)}, **index}, "too many keys beside weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_one_error(tmp_path: Path, case: str) -> None:
    mutate, message = BAD_INDEXES[case]
    set_index(tmp_path, mutate(two_shards(tmp_path)))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_the_index_decides_which_files_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_shards(tmp_path)
    for name in ("model-10.safetensors", "model-9.safetensors", "consolidated.safetensors", ".DS_Store"):
        write(tmp_path, b"no weights", name)
    assert sorted(read_tensors(tmp_path)) == ["a", "b", "c"]
    (warning,) = caplog.messages
    assert warning.endswith("index.json does not list some files, which are ignored: model-9.safetensors and 1 more")
    caplog.clear()
    write(tmp_path, encode(HEADER))
    assert sorted(read_tensors(tmp_path)) == ["a", "b", "c"]
    (warning,) = caplog.messages
    assert warning.endswith(
        "are ignored: model.safetensors and 2 more; transformers reads model.safetensors instead of the index"
    )


def test_without_an_index_model_safetensors_is_read_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers opens nothing else. A copy beside it holds the same names; half a set of shards is no reason."""
    write(tmp_path, encode(HEADER))
    alone = read_tensors(tmp_path)
    assert not caplog.messages
    for name in ("model-backup.safetensors", "model-00001-of-00002.safetensors"):
        write(tmp_path, encode(HEADER), name)
    assert read_tensors(tmp_path) == alone
    (warning,) = caplog.messages
    assert warning.endswith("other weight files are ignored: model-00001-of-00002.safetensors and 1 more")


def test_an_index_whose_files_are_gone_is_ignored_beside_the_file_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after merging the shards. transformers reads that file, too."""
    index = two_shards(tmp_path)
    write(tmp_path, encode(HEADER))
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"one\.safetensors: No such file"):
        read_tensors(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    caplog.clear()
    assert sorted(read_tensors(tmp_path)) == ["a.weight", "b", "empty"]
    assert [message.partition("index.json ")[2] for message in caplog.messages] == [
        "is ignored: none of its files exists, but model.safetensors does"
    ]
    set_index(tmp_path, moved(index, b="../two.safetensors"))
    with pytest.raises(CheckpointError, match="b: invalid file name"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        *(b"null", b'{"total_size": 7}', b'{"total_size": NaN}', b"[[[]]]", b'"\\"}"', b"-1e9"),
        *(b"1" * 300, b'"%b"' % ("é" * 300).encode()),  # longer than what is decoded first
    ],
)
def test_metadata_of_an_index_is_not_read(tmp_path: Path, metadata: bytes, caplog: pytest.LogCaptureFixture) -> None:
    index = two_shards(tmp_path)
    text = json.dumps(index).encode()
    set_index(tmp_path, b'{"metadata": ' + metadata + b", " + text[1:-1] + b', "metadata": ' + metadata + b"}")
    assert sorted(read_tensors(tmp_path)) == ["a", "b", "c"]
    set_index(
        tmp_path, b'{"metadata": ' + metadata + b", " + json.dumps(moved(index, d="one.safetensors"))[1:].encode()
    )
    with pytest.raises(CheckpointError, match="d: missing"):  # nothing comes before the real error
        read_tensors(tmp_path)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ("model-00001-of-000003 model-00002-of-000003 model-00003-of-000003", None),
        ("model-1-of-3 model-2-of-3 model-3-of-3", None),
        ("model-00000-of-00002 model-00001-of-00002 model-00002-of-00002", None),
        ("model-00000-of-00003 model-00001-of-00003 model-00002-of-00003", None),
        ("model-00001-of-000004 model-00002-of-000004 model-00003-of-000004", "model-00004-of-000004"),
        ("model-1-of-11 model-2-of-11 model-11-of-11", "model-3-of-11"),
        ("model-00000-of-00002 model-00002-of-00002 model-x", "model-00001-of-00002"),
        ("model-00000-of-00004 model-00001-of-00004 model-00002-of-00004", "model-00003-of-00004"),
    ],
)
def test_numbered_files_without_an_index(tmp_path: Path, names: str, absent: str | None) -> None:
    for i, name in enumerate(names.split()):
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        write(tmp_path, encode({f"t{i}": entry}, b"\1"), f"{name}.safetensors")
    if absent is None:
        assert list(read_tensors(tmp_path)) == ["t0", "t1", "t2"]
        return
    with pytest.raises(CheckpointError, match=f"{absent}.safetensors: No such file; expected \\d+ files, as model"):
        read_tensors(tmp_path)


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(1, 12):
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        write(tmp_path, encode({f"t{number}": entry}, b"\1"), f"model-{number}-of-11.safetensors")
    assert list(read_tensors(tmp_path)) == [f"t{number}" for number in range(1, 12)]
