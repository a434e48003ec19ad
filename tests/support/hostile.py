"""Mutations of a complete, valid checkpoint folder: one thing is wrong in each, or odd but legal.

`MUTATIONS` are refused, each with the file, the tensor and what was found; `LEGAL` load as the original. The folder is
`build`'s: three shards or more, an index, a configuration and a tokenizer.
"""

import json
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe import Transformer
from moe.checkpoint import save
from tests.support.checkpoint_cases import V3_MTP, configure

INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"
LAST = "LAST"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def build(folder: Path) -> None:
    model = Transformer(V3_MTP)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save(model, folder, max_shard_bytes=250_000)
    (folder / "tokenizer.json").write_text("{}")


# Parts of a folder


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def shard(folder: Path, tensor: str = EXPERT) -> Path:
    """The file that holds `tensor`."""
    return folder / weight_map(folder)[tensor]


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


Change = Callable[[Path], Any]


def entry(tensor: str = EXPERT, **values: Any) -> Change:
    """The header entry of `tensor` with other values; they are functions of the old ones."""

    def change(folder: Path) -> None:
        file = shard(folder, tensor)
        header, data = split(file)
        header[tensor] |= {key: value(header[tensor][key]) for key, value in values.items()}
        file.write_bytes(join(header, data))

    return change


def rewritten(change: Callable[[dict[str, Any]], Any], tensor: str = EXPERT) -> Change:
    """What `change` makes of the header in the place of it."""

    def apply(folder: Path) -> None:
        file = shard(folder, tensor)
        values, data = split(file)
        file.write_bytes(join(change(values), data))

    return apply


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    return rewritten(lambda values: (change(values), values)[1])


def text(change: Callable[[bytes], bytes]) -> Change:
    return rewritten(lambda values: change(json.dumps(values, separators=(",", ":")).encode()))


def renamed(new: str) -> Change:
    return rewritten(lambda values: {new if name == EXPERT else name: value for name, value in values.items()})


def content(change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        file = shard(folder)
        file.write_bytes(change(file.read_bytes()))

    return apply


def index(change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values)
        (folder / INDEX).write_text(json.dumps(values))

    return apply


def mapped(file: Any) -> Change:
    return index(lambda values: values["weight_map"].update({EXPERT: file}))


def total(value: Any) -> Change:
    return index(lambda values: values["metadata"].update(total_size=value))


def config(**values: Any) -> Change:
    return lambda folder: configure(folder, **values)


def again(old: str, new: str) -> Change:
    """config.json in which `new` stands after the member `old`."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, f"{old}, {new}"))

    return apply


def written(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def instead(make: Callable[[Path], Any]) -> Change:
    """Something else at the place of a shard."""

    def apply(folder: Path) -> None:
        file = shard(folder)
        file.unlink()
        make(file)

    return apply


def linked(target: str) -> Change:
    return instead(lambda file: file.symlink_to(target))


def moved_and_linked(place: Callable[[Path], Path]) -> Change:
    def apply(folder: Path) -> None:
        file = shard(folder)
        target = place(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        file.symlink_to(os.path.relpath(target, folder))

    return apply


def only(name: str, data: bytes = b"\x80\x02}q\0.") -> Change:
    """Nothing but one file, and its folder."""

    def apply(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return apply


def bind(file: Path) -> None:
    """A socket; its path may be longer than a socket's address can be."""
    place = os.open(file.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{place}/{file.name}")
    finally:
        os.close(place)


def shift(by: int) -> Callable[[list[int]], list[int]]:
    return lambda offsets: [offset + by for offset in offsets]


def twice(name: str) -> Change:
    def change(data: bytes) -> bytes:
        value = json.dumps(json.loads(data)[EXPERT], separators=(",", ":")).encode()
        return data[:-1] + b',"%b":%b}' % (name.encode(), value)

    return text(change)


def spelled(old: bytes, new: bytes) -> Change:
    """The text of EXPERT's entry changed, where it first has `old`."""

    def change(data: bytes) -> bytes:
        start = data.index(b'"%b":{' % EXPERT.encode())
        at = data.index(old, start)
        return data[:at] + new + data[at + len(old) :]

    return text(change)


def as_bytes(tensor: str, dtype: str) -> Change:
    """`tensor` as one byte for each value: of `dtype`, and all 2."""

    def change(folder: Path) -> None:
        file = shard(folder, tensor)
        values, data = split(file)
        begin, end = values[tensor]["data_offsets"]
        cut = (end - begin) // 4
        data = data[:begin] + b"\2" * cut + data[end:]
        for name, other in values.items():
            if name != "__metadata__":
                other["data_offsets"] = [o - (end - begin) + cut if o >= end else o for o in other["data_offsets"]]
        values[tensor]["dtype"] = dtype
        file.write_bytes(join(values, data))

    return change


def both(old: str, new: str) -> Change:
    """A tensor renamed, in its file and in the index."""

    def change(folder: Path) -> None:
        renamed(new)(folder)
        index(lambda values: values["weight_map"].update({new: values["weight_map"].pop(old)}))(folder)

    return change


def added(name: str, dtype: str = "U8") -> Change:
    def change(folder: Path) -> None:
        file = shard(folder)
        values, data = split(file)
        values[name] = {"dtype": dtype, "shape": [1], "data_offsets": [len(data), len(data) + 1]}
        file.write_bytes(join(values, data + b"\2"))
        index(lambda i: i["weight_map"].update({name: file.name}))(folder)

    return change


def dropped(name: str) -> Change:
    def change(folder: Path) -> None:
        file = shard(folder)
        values, data = split(file)
        begin, end = values.pop(name)["data_offsets"]
        for other, value in values.items():
            if other != "__metadata__" and value["data_offsets"][0] >= end:
                value["data_offsets"] = [o - (end - begin) for o in value["data_offsets"]]
        file.write_bytes(join(values, data[:begin] + data[end:]))
        index(lambda i: i["weight_map"].pop(name))(folder)

    return change


def duplicated(folder: Path) -> None:
    """EXPERT in the last shard too."""
    values, data = split(shard(folder))
    begin, end = values[EXPERT]["data_offsets"]
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    others, bytes_there = split(file)
    place = [len(bytes_there), len(bytes_there) + end - begin]
    others[EXPERT] = values[EXPERT] | {"data_offsets": place}
    file.write_bytes(join(others, bytes_there + data[begin:end]))


def twice_in_index(file: str | None) -> Change:
    """EXPERT first with `file`, or with its own, and then with its own."""

    def apply(folder: Path) -> None:
        path = folder / INDEX
        new = f'"weight_map": {{"{EXPERT}": "{file or shard(folder).name}",'
        path.write_text(path.read_text().replace('"weight_map": {', new, 1))

    return apply


def piped(name: str) -> Change:
    return lambda folder: [(folder / name).unlink(), os.mkfifo(folder / name)]


def no_tensors(name: str) -> Change:
    def change(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(b"\x80\x02}q\0.")

    return change


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@dataclass(frozen=True)
class Mutation:
    """What is wrong, and what the error must say of it: `found` and `expected` are parts of these attributes.

    `file` "shard" is the one that holds EXPERT, "" the folder.
    """

    change: Change
    file: str = "shard"
    tensor: str | None = None
    found: str = ""
    expected: str = ""
    problem: str = ""


def at_expert(change: Change, found: str = "", expected: str = "", problem: str = "") -> Mutation:
    return Mutation(change, "shard", EXPERT, found, expected, problem)


def in_index(change: Change, found: str = "", expected: str = "", problem: str = "") -> Mutation:
    return Mutation(change, INDEX, EXPERT, found, expected, problem)


def in_config(change: Change, found: str = "", problem: str = "") -> Mutation:
    return Mutation(change, "config.json", None, found, problem=problem)


def whole(change: Change, found: str = "", problem: str = "", expected: str = "") -> Mutation:
    return Mutation(change, "shard", None, found, expected, problem)


_BIG = 2**24

MUTATIONS: dict[str, Mutation] = {
    # The length of the header
    "empty file": whole(content(lambda c: b""), "0 bytes"),
    "seven bytes": whole(content(lambda c: c[:7]), "7 bytes"),
    "header length 0": whole(content(lambda c: bytes(8) + c[8:]), "length of 0"),
    "header length past the end": whole(content(lambda c: struct.pack("<Q", len(c)) + c[8:]), "", "header length"),
    "header length 2^63": whole(content(lambda c: struct.pack("<Q", 2**63) + c[8:]), str(2**63)),
    "header length that cuts it": whole(content(lambda c: struct.pack("<Q", 2) + c[8:]), '"'),
    "header above the cap": whole(text(lambda t: t + b" " * _BIG), "", "header length", str(_BIG)),
    "space first": whole(text(lambda t: b" " + t), "b' {", expected="'{' first"),
    "header cut": whole(content(lambda c: c[:500]), problem="header length", expected="492 bytes follow"),
    # The length of the data
    "one byte short": Mutation(content(lambda c: c[:-1]), "shard", LAST, problem="truncated"),
    "a trailing byte": whole(content(lambda c: c + b"\0"), "", "trailing bytes"),
    # The header's JSON
    "name twice": at_expert(twice(EXPERT), "two", "one"),
    "name twice, escaped": at_expert(twice(EXPERT.replace("e", "\\u0065")), "two", "one"),
    "key twice in an entry": at_expert(spelled(b'"shape":', b'"dtype":"F32","shape":'), problem="'dtype' twice"),
    "metadata twice": whole(text(lambda t: t[:-1] + b',"__metadata__":{}}'), "two", "__metadata__ twice"),
    "metadata of a number": whole(header(lambda h: h.update(__metadata__={"format": 1})), "'format': 1"),
    "metadata a list": whole(header(lambda h: h.update(__metadata__=["pt"])), '["pt"]', "__metadata__"),
    "lone surrogate in metadata": whole(text(lambda t: t.replace(b'"pt"', b'"\\ud800"')), "ud800"),
    "not UTF-8": whole(text(lambda t: t.replace(b'"pt"', b'"\xff"')), "0xff", expected="UTF-8"),
    "NaN": at_expert(spelled(b"[20,42]", b"[20,NaN]"), problem="literal NaN"),
    "minus zero": at_expert(spelled(b"[20,42]", b"[-0,42]"), "-0.0", problem="shape"),
    "number of 5000 digits": at_expert(spelled(b"[20,42]", b"[20,%b]" % (b"9" * 5000)), problem="digits"),
    "entry nested deeply": at_expert(spelled(b"[20,42]", b"[" * 5000), problem="in each other"),
    "entry of 16 MiB of lists": at_expert(
        spelled(b"[20,42]", b"[" + b"[]," * ((_BIG - 80_000) // 3) + b"1]"), problem="65536"
    ),
    "a comma too many": whole(text(lambda t: t[:-1] + b",}"), "}"),
    "the end twice": whole(text(lambda t: t + b"}"), "}", expected="nothing more"),
    # Names
    "name empty": Mutation(renamed(""), "shard", "", "an empty name"),
    "name with NUL": Mutation(renamed("a\0b"), "shard", "a\0b", "'a\\x00b'"),
    "name with a newline": Mutation(renamed("a\nb"), "shard", "a\nb", "'a\\nb'"),
    "name with a terminal's command": Mutation(renamed("a\x1b[2J"), "shard", "a\x1b[2J", "'a\\x1b[2J'"),
    "name that writes backwards": Mutation(renamed("a\u202eb"), "shard", "a\u202eb", "202e"),
    "name of 1025 bytes": Mutation(renamed("é" * 512 + "a"), "shard", "é" * 512 + "a", "1025 bytes", "1024"),
    "name of 16 MiB": whole(renamed("a" * (_BIG - 80_000)), "aaaa", expected="65536"),
    # Entries
    "entry a number": at_expert(header(lambda h: h.update({EXPERT: 7})), "7", "dtype, shape and data_offsets"),
    "entry without a shape": at_expert(header(lambda h: h[EXPERT].pop("shape")), "data_offsets", "shape"),
    "unknown dtype": at_expert(entry(dtype=lambda d: "F33"), "F33", "BF16"),
    "dtype a list": at_expert(entry(dtype=lambda d: ["F32"]), "['F32']"),
    "dtype too wide": at_expert(entry(dtype=lambda d: "F64"), "3360", "6720 bytes for F64"),
    "negative size": at_expert(entry(shape=lambda s: [-20, -42]), "[-20, -42]", problem="shape"),
    "fractional size": at_expert(entry(shape=lambda s: [20.0, 42]), "[20.0, 42]", problem="shape"),
    "true for a size": at_expert(entry(shape=lambda s: [True, 840]), "[True, 840]", problem="shape"),
    "shape of 2^64 and nothing": at_expert(entry(shape=lambda s: [2**32, 2**32, 0]), "4294967296", "2^63"),
    "nine dimensions": at_expert(entry(shape=lambda s: [*s, *[1] * 7]), "1, 1, 1", "at most 8"),
    "a hundred thousand dimensions": at_expert(entry(shape=lambda s: [*s, *[1] * 100_000]), problem="entry"),
    "one value less": at_expert(entry(shape=lambda s: [20, 41]), "3360", "3280 bytes"),
    "one offset": at_expert(entry(data_offsets=lambda o: o[:1]), "[", "[begin, end]"),
    "offsets reversed": at_expert(entry(data_offsets=lambda o: o[::-1]), "[", "[begin, end]"),
    "negative offset": at_expert(entry(data_offsets=lambda o: [-4, o[1]]), "-4", "[begin, end]"),
    "offsets beyond the file": at_expert(entry(data_offsets=shift(2**40)), "10995", problem="beyond"),
    "overlap": at_expert(entry(data_offsets=shift(-4)), problem="overlaps", expected="offset"),
    "hole": at_expert(entry(data_offsets=shift(4)), problem="unused bytes", expected="offset"),
    # Dtypes and shapes that are no weights
    "int8 router": Mutation(as_bytes(GATE, "I8"), "router", GATE, "I8", "F32"),
    "fp8 router": Mutation(as_bytes(GATE, "F8_E4M3"), "router", GATE, "F8_E4M3", "F32"),
    "bool router": Mutation(as_bytes(GATE, "BOOL"), "router", GATE, "BOOL", "F32"),
    "transposed": at_expert(entry(shape=lambda s: s[::-1]), "[42, 20]", "[20, 42]", "shape"),
    "integers": at_expert(entry(dtype=lambda d: "I32"), "I32", "BF16", "dtype"),
    # Experts
    "expert beyond the count": Mutation(
        both(EXPERT, EXPERT.replace(".7.", ".12.")), "", EXPERT, "no such tensor", "[20, 42]", "missing"
    ),
    "expert missing": Mutation(dropped(EXPERT), "", EXPERT, "no such tensor", "[20, 42]", "missing"),
    "expert too many": Mutation(
        added(EXPERT.replace(".7.", ".12.")), "shard", EXPERT.replace(".7.", ".12."), "[1]", "no such", "unexpected"
    ),
    # What is no safetensors file
    "Git LFS pointer": whole(
        content(lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"), "Git LFS pointer"
    ),
    "web page": whole(content(lambda c: b"\n<!DOCTYPE html>\n<html><title>404</title></html>"), "a web page"),
    "zip": whole(content(lambda c: b"PK\x03\x04" + c), "a zip archive"),
    "pickle": whole(content(lambda c: b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s."), "a pickle"),
    "gzip": whole(content(lambda c: b"\x1f\x8b\x08\0" + c), "a gzip archive"),
    "gguf": whole(content(lambda c: b"GGUF\3\0\0\0" + c), "a GGUF file"),
    "pipe": whole(instead(os.mkfifo), "a pipe", "not a regular file"),
    "folder": whole(instead(os.mkdir), "a folder", "not a regular file"),
    "socket": whole(instead(bind), "a socket", "not a regular file"),
    "device": whole(linked("/dev/zero"), "/dev/zero", "leads out"),
    "link to itself": whole(instead(lambda file: file.symlink_to(file.name)), problem="symbolic link"),
    "link to nothing": whole(linked("nothing.safetensors"), problem="a symbolic link to nothing"),
    "link upwards": whole(moved_and_linked(lambda f: f.parent / "elsewhere" / "x"), "elsewhere", "leads out"),
    "link to another model of the cache": whole(
        moved_and_linked(lambda f: f.parent / "models--a--b" / "blobs" / "x"), "models--a--b", "leads out"
    ),
    "shard missing": whole(lambda f: shard(f).unlink(), problem="No such file"),
    # The index
    "index not JSON": Mutation(written(INDEX, b"{"), INDEX, None, "the end", "a key"),
    "index a web page": Mutation(written(INDEX, b"<html>"), INDEX, None, "a web page"),
    "index an array": Mutation(written(INDEX, b"[]"), INDEX, None, "[]", "an object"),
    "index without a map": Mutation(index(lambda i: i.pop("weight_map")), INDEX, problem="no weight_map"),
    "map a list": Mutation(index(lambda i: i.update(weight_map=["a"])), INDEX, None, '["a"]'),
    "map of 64 MiB": Mutation(
        written(INDEX, b'{"weight_map":{"a":"' + b"b" * (2**26 - 30) + b'"}}'), INDEX, "a", "bbb"
    ),
    "index of more": Mutation(written(INDEX, b"{" + b" " * 2**26), INDEX, None, str(2**26 + 1), str(2**26)),
    "tensor twice in the map": in_index(twice_in_index("model-00004-of-00004.safetensors"), "two", "one file"),
    "absolute path": in_index(mapped("/etc/model.safetensors"), "'/etc/model.safetensors'"),
    "path upwards": in_index(mapped("../model.safetensors"), "'../model.safetensors'"),
    "path into a folder": in_index(mapped("a/model.safetensors"), "'a/model.safetensors'"),
    "path with a backslash": in_index(mapped("..\\model.safetensors"), "model.safetensors"),
    "path with NUL": in_index(mapped("a\0.safetensors"), "'a\\x00.safetensors'"),
    "path with a newline": in_index(mapped("a\n.safetensors"), "'a\\n.safetensors'"),
    "path of 300 bytes": in_index(mapped("a" * 300 + ".safetensors"), "aaa"),
    "another kind of file": in_index(mapped("pytorch_model.bin"), "'pytorch_model.bin'"),
    "file a number": in_index(mapped(7), "7", "safetensors"),
    "file null": in_index(mapped(None), "null"),
    "a file that is missing": Mutation(mapped("model-9.safetensors"), "model-9.safetensors", problem="No such file"),
    "tensor of another shard": at_expert(mapped("model-00003-of-00004.safetensors"), "model-0", "00003", "disagrees"),
    "tensor that no shard has": Mutation(
        index(lambda i: i["weight_map"].update(x="model-00001-of-00004.safetensors")),
        "model-00001-of-00004.safetensors",
        "x",
        problem="missing",
    ),
    "tensor that the index lacks": at_expert(
        index(lambda i: i["weight_map"].pop(EXPERT)), "model-0", "no such tensor", "disagrees"
    ),
    "tensor in two shards": Mutation(duplicated, "model-00004-of-00004.safetensors", EXPERT, "also in", problem="two"),
    "no index, a shard missing": Mutation(
        lambda f: [(f / "model-00002-of-00004.safetensors").unlink(), (f / INDEX).unlink()],
        "model-00002-of-00004.safetensors",
        problem="No such file",
    ),
    "index a pipe": Mutation(piped(INDEX), INDEX, None, "a pipe"),
    "index a link to nothing": Mutation(
        lambda f: [(f / INDEX).unlink(), (f / INDEX).symlink_to("x")], INDEX, problem="link to nothing"
    ),
    # config.json
    "config not JSON": in_config(written("config.json", b"{'a': 1}"), "property name"),
    "config empty": in_config(written("config.json", b""), "an empty file"),
    "config an array": in_config(written("config.json", b"[]"), "list"),
    "config null": in_config(written("config.json", b"null"), "NoneType"),
    "config a web page": in_config(written("config.json", b"<!doctype html>"), "a web page"),
    "config a Git LFS pointer": in_config(
        written("config.json", b"version https://git-lfs.github.com/spec/v1\n"), "LFS"
    ),
    "config a pickle": in_config(written("config.json", b"\x80\x04\x95"), "a pickle"),
    "config of more than 16 MiB": in_config(config(a="x" * 2**24), "1677", "too large"),
    "config of a million values": in_config(config(a=[0] * 2**20), "1048", "too many values"),
    "config nested deeply": in_config(config(hidden_act=nested(900)), "in each other"),
    "config key with two values": in_config(
        again('"vocab_size": 61', '"vocab_size": 62'), "61 and later 62", "vocab_size"
    ),
    "config key with two values below": in_config(
        again('"rope_theta": 10000.0', '"rope_theta": 1'), "10000.0 and later 1", "rope_parameters"
    ),
    "config NaN": in_config(config(rms_norm_eps=float("nan")), "nan", "rms_norm_eps"),
    "config NaN for yes": in_config(config(rope_interleave=float("nan")), "nan", "rope_interleave"),
    "config NaN below": in_config(config(rope_scaling={"rope_theta": float("nan")}), "nan", "rope_scaling"),
    "config a number without end": in_config(again('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'), "inf"),
    "quantisation of NaN": in_config(config(quantization_config={"x": [float("inf")]}), "inf", "quantization_config"),
    "config missing": in_config(lambda f: (f / "config.json").unlink(), "model-00001-of-00004", "No such file"),
    "config a pipe": in_config(piped("config.json"), "a pipe"),
    "config a folder": in_config(
        lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()], "a folder", "not a regular file"
    ),
    "family with a newline": in_config(config(model_type="deep\nseek"), "deep\nseek", "model_type"),
    "family of 100 kB": in_config(config(model_type="x" * 100_000), "xxx", "model_type"),
    "size of 2000 digits": in_config(config(hidden_size=10**2000), problem="hidden_size"),
    "experts without end": in_config(config(n_routed_experts=2**25), problem="n_routed_experts"),
    "layers without end": in_config(config(num_hidden_layers=10**6), problem="num_hidden_layers"),
    "true for a number": in_config(config(moe_layer_freq=True), "True", "moe_layer_freq"),
    # What travels with the model
    "tokenizer a pipe": Mutation(piped("tokenizer.json"), "tokenizer.json", None, "a pipe"),
    "tokenizer a link outside": Mutation(
        lambda f: [(f / "tokenizer.json").unlink(), (f / "tokenizer.json").symlink_to("/etc/passwd")],
        "tokenizer.json",
        None,
        "/etc/passwd",
        problem="leads out",
    ),
    # No tensors that are read
    "only an adapter's pickle": in_config(only("adapter_model.bin"), "adapter_model.bin, a pickle"),
    "only a consolidated pickle": in_config(only("consolidated.00.pth"), "consolidated.00.pth, a pickle"),
    "only a pickle below": in_config(only("original/consolidated.00.pth"), "consolidated.00.pth, a pickle"),
    "pickles and a configuration": Mutation(no_tensors("pytorch_model.bin"), "", None, "pytorch_model.bin, a pickle"),
    "an adapter and a configuration": Mutation(no_tensors("adapter_model.safetensors"), "", None, "an adapter"),
    "nothing": in_config(lambda f: [path.unlink() for path in f.iterdir()], "none of these"),
}


# What is odd and legal


def resorted(values: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items(), reverse=True))


def in_one_file(folder: Path) -> None:
    tensors: dict[str, Any] = {}
    data = b""
    for file in sorted(folder.glob("model-*.safetensors")):
        values, part = split(file)
        values.pop("__metadata__", None)
        for value in values.values():
            value["data_offsets"] = shift(len(data))(value["data_offsets"])
        tensors |= values
        data += part
        file.unlink()
    (folder / "model.safetensors").write_bytes(join(tensors, data))
    (folder / INDEX).unlink()


def in_hundreds(folder: Path) -> None:
    """One tensor in each file, named as everybody names them."""
    parts = []
    for file in sorted(folder.glob("model-*.safetensors")):
        values, data = split(file)
        values.pop("__metadata__", None)
        for name, value in values.items():
            begin, end = value["data_offsets"]
            parts.append((name, value | {"data_offsets": [0, end - begin]}, data[begin:end]))
        file.unlink()
    places = {}
    for i, (name, value, data) in enumerate(parts, 1):
        places[name] = f"model-{i:05}-of-{len(parts):05}.safetensors"
        (folder / places[name]).write_bytes(join({name: value}, data))
    index(lambda values: values.update(weight_map=places))(folder)


def other_order(folder: Path) -> None:
    """The data of a shard from the last tensor to the first."""
    file = shard(folder)
    values, data = split(file)
    values.pop("__metadata__", None)
    parts = b""
    for value in reversed(values.values()):
        begin, end = value["data_offsets"]
        value["data_offsets"] = [len(parts), len(parts) + end - begin]
        parts += data[begin:end]
    file.write_bytes(join(values, parts))


def with_empty(values: dict[str, Any]) -> None:
    for i in range(3):
        values[f"empty.{i}"] = {"dtype": "F32", "shape": [0, 2**40][:: 1 if i else -1], "data_offsets": [0, 0]}


def empty_in_index(folder: Path) -> None:
    header(with_empty)(folder)
    index(lambda i: i["weight_map"].update({f"empty.{k}": shard(folder).name for k in range(3)}))(folder)


def numbered(first: int, width: int, count: int = 4) -> Change:
    """The four shards numbered from `first` in at least `width` digits, of `count`, and no index."""

    def apply(folder: Path) -> None:
        for i, file in enumerate(sorted(folder.glob("model-*.safetensors")), first):
            file.rename(folder / f"model-{i:0{width}}-of-{count:0{width + 1}}.safetensors")
        (folder / INDEX).unlink()

    return apply


LEGAL: dict[str, Change] = {
    "one file": in_one_file,
    "hundreds of files": in_hundreds,
    "no index": lambda folder: (folder / INDEX).unlink(),
    "unaligned data": text(lambda t: t + b" " * 3),
    "a header padded with spaces of all kinds": text(lambda t: t + b" \n\t\r" * 100_000),
    "a header on many lines": rewritten(lambda values: json.dumps(values, indent=4).encode()),
    "names backwards": rewritten(resorted),
    "keys backwards": rewritten(lambda values: {n: resorted(v) for n, v in values.items()}),
    "data backwards": other_order,
    "names escaped": text(lambda t: t.replace(b"up_proj", b"\\u0075p_pr\\u006fj")),
    "tensors of no size": empty_in_index,
    "no metadata": header(lambda values: values.pop("__metadata__")),
    "metadata last": rewritten(lambda values: {**dict(list(values.items())[1:]), "__metadata__": {}}),
    "much metadata": header(lambda values: values.update(__metadata__={f"{i}é\0": "x\n🙂" * 50 for i in range(9000)})),
    "a metadata string of megabytes": header(lambda values: values.update(__metadata__={"a": '"\\é🙂' * 600_000})),
    "index without metadata": index(lambda i: i.pop("metadata")),
    "index with more": index(lambda i: i.update(metadata={"total_size": None, "b": [{"c": 1.5}]}, more=[None])),
    "index on one line, padded": lambda f: (f / INDEX).write_bytes((f / INDEX).read_bytes() + b"\n" * 10**6),
    "tensor twice in the map, the same": twice_in_index(None),
    "total size 1": total(1),
    "total size 0": total(0),
    "total size a text": total("many"),
    "total size true": total(True),
    "total size negative": total(-1),
    "total size a fraction": total(0.5),
    "total size null": total(None),
    "total size NaN": total(float("nan")),
    "metadata of the index null": index(lambda i: i.update(metadata=None)),
    "metadata of the index a list": index(lambda i: i.update(metadata=[{}, [], "]", -1e-5, True])),
    "metadata of the index deep": index(lambda i: i.update(metadata=nested(60))),
    "metadata of the index of 900 kB": index(lambda i: i.update(metadata={"a": ['b\\"é'] * 50_000})),
    "metadata of the index twice": lambda f: (f / INDEX).write_text(
        '{"metadata": 1, "metadata": {"total_size": 2},' + (f / INDEX).read_text()[1:]
    ),
    "one file beside the index": lambda f: (f / "model.safetensors").write_bytes(shard(f).read_bytes()),
    "a broken file beside the index": written("model-00005-of-00005.safetensors", b"broken"),
    "a backup and a folder beside": lambda f: [
        (f / "consolidated.safetensors").write_bytes(b"x"),
        (f / ".DS_Store").write_bytes(b"x"),
        (f / "tokenizer.json.bak").write_bytes(b"x"),
        (f / "original").mkdir(),
        (f / "original" / "model.safetensors").write_bytes(b"x"),
    ],
    "shards numbered from 0": numbered(0, 5),
    "shards numbered as gpt-oss's": numbered(0, 5, 3),
    "shards numbered without zeros": numbered(1, 1),
    "shards numbered as DeepSeek-V3's": numbered(1, 5),
    "metadata null": header(lambda values: values.update(__metadata__=None)),
    "metadata key twice": text(lambda t: t.replace(b'"format":', b'"format":"x","format":')),
    "entry with more": at_expert(header(lambda h: h[EXPERT].update(more=1))).change,
    "config NaN in a key that is not read": config(x=float("nan"), y={"a": [float("-inf")]}),
    "config key that is not read twice": again('"model_type": "deepseek_v3"', '"x": 1, "x": [2]'),
    "config key twice the same": again('"vocab_size": 61', '"vocab_size": 61'),
    "config of megabytes": config(id2label={str(i): f"LABEL_{i}" for i in range(200_000)}),
    "links within the folder": moved_and_linked(lambda f: f / "blobs" / "x"),
    "code that nobody runs": config(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil--evil.Model"}),
    "pickles beside": written("pytorch_model.bin", b"\x80\x02cos\nsystem\n."),
}
