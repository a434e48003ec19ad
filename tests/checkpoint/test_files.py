"""The strict reader: what a file or an index may not say, and that the safetensors library accepts all that we do."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from moe import CheckpointError
from moe.checkpoint.format.folder import read_tensors
from moe.checkpoint.format.header import MAX_HEADER_BYTES, read_header
from moe.checkpoint.format.strict_json import doubt, parse_as_python, parse_json, settled

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


ENTRY = json.dumps(HEADER["empty"] | {"data_offsets": [0, 0]}).encode()
TWICE = b'{"a": %b, "a": %b}' % (ENTRY, ENTRY)

BAD_HEADERS = {
    "empty file": (b"", "truncated"),
    "half a length": (b"\x10\0\0", "truncated"),
    "length past the end": (encode(HEADER, length=10_000), "header length"),
    "length of 2^63": (encode(HEADER, length=2**63), "header length"),
    "header above the bound": (encode(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "header length"),
    "a pickle": (b"\x80\x02}q\0" + b"." * 100, "header length"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "header length"),
    "space first": (encode(b" " + json.dumps(HEADER).encode()), "'{' first"),
    "not JSON": (encode(b'{"a": '), "Expecting value"),
    "an array": (encode(b"[1, 2]"), "'{' first"),
    "not UTF-8": (encode(b'{"\xff": 1}'), "not valid JSON"),
    "NaN": (encode(b'{"a": NaN}'), "literal NaN"),
    "nested without end": (encode(b'{"a":' + b"[" * 200_000), "more than 64 arrays"),
    "name twice": (encode(TWICE), "a: twice in the header"),
    "name twice in another spelling": (encode(TWICE.replace(b', "a"', b', "\\u0061"')), "a: twice in the header"),
    "key twice within an entry": (encode(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' twice"),
    "metadata not an object": (encode({**HEADER, "__metadata__": 3}), "__metadata__"),
    "metadata not strings": (encode({**HEADER, "__metadata__": {"format": 1}}), "__metadata__"),
    "name with NUL": (encode({"a\0": HEADER["a.weight"]}), "printable"),
    "name with a newline": (encode({"a\nb": HEADER["a.weight"]}), "printable"),
    "empty name": (encode({"": HEADER["a.weight"]}), "printable"),
    "long name": (encode({"a" * 1025: HEADER["a.weight"]}), "printable"),
    "lone surrogate": (encode(b'{"\\ud800": 1}'), "not valid JSON"),
    "entry not an object": (encode({"a": 7}), "entry"),
    "entry without dtype": (encode({"a": {"shape": [1], "data_offsets": [0, 4]}}), "entry"),
    "unknown dtype": (encode(changed("b", dtype="BF17")), "dtype"),
    "dtype of another type": (encode(changed("b", dtype=["F32"])), "dtype"),
    "negative size": (encode(changed("b", shape=[-5])), "shape"),
    "fractional size": (encode(changed("b", shape=[5.0])), "shape"),
    "true for a size": (encode(changed("b", shape=[5, True])), "shape"),
    "shape that overflows": (encode(changed("empty", shape=[0, 2**40, 2**40])), "shape"),
    "nine dimensions": (encode(changed("b", shape=[5] + [1] * 8)), "shape"),
    "shape too small for its bytes": (encode(changed("b", shape=[4])), "8 bytes for BF16"),
    "dtype too wide for its bytes": (encode(changed("b", dtype="F32")), "20 bytes for F32"),
    "one offset": (encode(changed("b", data_offsets=[24])), "data_offsets"),
    "negative offset": (encode(changed("b", data_offsets=[-1, 9])), "data_offsets"),
    "offsets reversed": (encode(changed("b", data_offsets=[34, 24])), "data_offsets"),
    "overlap": (encode(changed("b", data_offsets=[23, 33])), "overlaps"),
    "hole": (encode(changed("b", data_offsets=[25, 35]), DATA + b"\0"), "unused bytes"),
    "hole at the front": (encode({"b": HEADER["b"]}), "unused bytes"),
    "one byte short": (encode(HEADER, DATA[:-1]), "truncated"),
    "one byte too many": (encode(HEADER, DATA + b"\0"), "trailing bytes"),
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


def test_the_library_refuses_the_worst_of_it_too() -> None:
    for case in ("hole", "overlap", "one byte too many"):
        with pytest.raises(SafetensorError):
            deserialize(BAD_HEADERS[case][0])


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_tensors(tmp_path)


def test_what_python_reads_and_json_does_not_have(tmp_path: Path) -> None:
    text = b'{"a": [NaN, -Infinity, 1e999], "b": 1, "b": {"c": 2, "c": 3}, "d": 4, "d": 4, "e": [{"f": null}]}'
    values = parse_as_python(text, tmp_path, max_values=100)
    assert {key: doubt(value) for key, value in values.items()} == {
        "a": "nan",
        "b": "two values: 1 and later {'c': 2 and later 3}",
        "d": None,
        "e": None,
    }
    assert settled(values)["b"] == json.loads(text)["b"] == {"c": 3}
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


def without(index: dict[str, Any], name: str) -> dict[str, Any]:
    return {"weight_map": {key: file for key, file in index["weight_map"].items() if key != name}}


BAD_INDEXES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not JSON": (lambda index: b"<html>", "not valid JSON"),
    "an array": (lambda index: [], "expected an object"),
    "two weight_maps": (lambda index: b'{"weight_map": {}, "weight_map": {}}', "weight_map; expected one; found two"),
    "metadata of a megabyte": (lambda index: {"metadata": [0] * 2**20, **index}, "a value of more than 1048576 bytes"),
    "metadata cut": (lambda index: b'{"metadata": {"a": [1, 2]', "Expecting ',' delimiter"),
    "brackets that differ": (lambda index: b'{"metadata": {"a": [1}, "weight_map": {}}', "Expecting ',' delimiter"),
    "metadata with a comma too many": (lambda index: b'{"metadata": [1,], "weight_map": {}}', "expected a value"),
    "metadata without a colon": (lambda index: b'{"metadata": {"a" 1}, "weight_map": {}}', "Expecting ':' delimiter"),
    "metadata too deep": (lambda index: b'{"metadata": ' + b"[" * 65 + b"]" * 65 + b"}", "more than 64 arrays"),
    "many other keys": (lambda index: {**{str(i): i for i in range(65)}, **index}, "keys beside weight_map"),
    "no weight_map": (lambda index: {"metadata": {}}, "no weight_map"),
    "weight_map not an object": (lambda index: {"weight_map": ["a"]}, "no weight_map"),
    "key twice": (lambda index: b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "a: twice"),
    "absolute path": (lambda index: moved(index, b="/etc/two.safetensors"), "b: file name"),
    "path upwards": (lambda index: moved(index, b="../two.safetensors"), "b: file name"),
    "path into a folder": (lambda index: moved(index, b="sub/two.safetensors"), "b: file name"),
    "path with backslash": (lambda index: moved(index, b="..\\two.safetensors"), "b: file name"),
    "another kind of file": (lambda index: moved(index, b="pytorch_model.bin"), "b: file name"),
    "file is a number": (lambda index: moved(index, b=2), "b: file name"),
    "missing shard": (lambda index: moved(index, b="three.safetensors"), "three.safetensors: No such file"),
    "tensor in another shard": (lambda index: moved(index, b="one.safetensors"), "b: the index disagrees"),
    "tensor that no shard has": (lambda index: moved(index, d="one.safetensors"), "d: missing"),
    "tensor that the index lacks": (lambda index: without(index, "c"), "c: the index disagrees"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_one_error(tmp_path: Path, case: str) -> None:
    mutate, message = BAD_INDEXES[case]
    set_index(tmp_path, mutate(two_shards(tmp_path)))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    set_index(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    with pytest.raises(CheckpointError, match="a: in two files"):
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
    """Somebody has merged the shards. transformers reads that file as well."""
    index = two_shards(tmp_path)
    write(tmp_path, encode(HEADER))
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"one\.safetensors: No such file"):
        read_tensors(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    caplog.clear()
    assert sorted(read_tensors(tmp_path)) == ["a.weight", "b", "empty"]
    assert [message.partition("index.json ")[2] for message in caplog.messages] == [
        "is ignored: none of its files is there, and model.safetensors is"
    ]
    set_index(tmp_path, moved(index, b="../two.safetensors"))
    with pytest.raises(CheckpointError, match="b: file name"):
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
    with pytest.raises(CheckpointError, match=f"{absent}.safetensors: No such file; expected all that"):
        read_tensors(tmp_path)


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(1, 12):
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        write(tmp_path, encode({f"t{number}": entry}, b"\1"), f"model-{number}-of-11.safetensors")
    assert list(read_tensors(tmp_path)) == [f"t{number}" for number in range(1, 12)]


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        read_tensors(tmp_path)
