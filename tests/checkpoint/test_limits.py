"""What the largest of hostile files costs, the caps, and the values that a role does not allow."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import CheckpointError
from moe.checkpoint import read_config
from moe.checkpoint.format import files
from moe.checkpoint.format.config_json import parse_config, render_config
from moe.checkpoint.format.folder import read_tensors
from moe.checkpoint.format.header import MAX_HEADER_BYTES, MAX_TENSORS, read_header
from moe.checkpoint.format.layout import layout
from moe.checkpoint.format.tensor_roles import (
    allowed_dtypes,
    check_experts,
    check_scales,
    is_quantisable,
    needs_common_dtype,
)
from moe.errors import one_line
from tests.support.checkpoint_cases import V2, V3, V3_MTP

MEBI = 2**20
EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def entries(count: int, entry: bytes = EMPTY) -> bytes:
    name = b'"model.layers.%d.mlp.experts.%d.down_proj.weight":%b'
    return b",".join(name % (i // 256, i % 256, entry) for i in range(count))


def single(header: bytes, size: int = 0) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        if size:
            os.truncate(path, size)
        return path

    return make


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


INDEX = "model.safetensors.index.json"
LARGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "as many tensors as there may be and a hole": (
        single(b"{" + entries(MAX_TENSORS - 1) + b',"z":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', 16 * MEBI),
        "unused bytes",
    ),
    "entries with an object in each": (
        single(b"{" + entries(120_000, EMPTY[:-1] + b',"x":{}}') + b',"b":1}'),
        "b: entry",
    ),
    "more tensors than bytes for them": (single(b"{" + entries(MAX_TENSORS + 1) + b"}"), "tensors in one file"),
    "the last name twice": (single(b"{" + entries(MAX_TENSORS - 1) + b"," + entries(1) + b"}"), "twice in the header"),
    "lists": (single(b'{"a":[' + b"[]," * (5 * MEBI) + b"0]}"), "a: entry"),
    "nested": (single(b'{"a":' + b"[" * (15 * MEBI)), "a: entry"),
    "a name": (single(b'{"' + b"a" * (15 * MEBI) + b'"}'), "a key of at most"),
    "wide characters": (
        single(b'{"__metadata__":{"a":"' + "🙂".encode() * (3 * MEBI) + b'"},"b":1}'),
        "b: entry",
    ),
    "escapes": (single(b'{"__metadata__":{"a":"' + rb"\ud83d\ude00" * MEBI + b'"},"b":1}'), "b: entry"),
    "metadata of many keys": (
        single(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(MEBI)) + b'},"b":1}'),
        "b: entry",
    ),
    "an index of many tensors": (
        file(INDEX, b'{"weight_map":{' + b",".join(b'"%d":"a.safetensors"' % i for i in range(2**18 + 1)) + b"}}"),
        "tensors in the index",
    ),
    "an index of lists": (
        file(INDEX, b'{"metadata":[' + b"[]," * (20 * MEBI) + b"0]}"),
        "a value of more than 1048576 bytes",
    ),
    "an index of brackets": (file(INDEX, b'{"metadata":' + b"[" * (60 * MEBI)), "in each other"),
    "an index of a text": (file(INDEX, b'{"metadata":"' + b"a" * (60 * MEBI)), "a value of more than 1048576 bytes"),
    "an index of many keys": (file(INDEX, b"{" + b'"a":[[[]]],' * (5 * MEBI)), "keys beside weight_map"),
    "an index of one name": (file(INDEX, b'{"weight_map":{"' + b"a" * (60 * MEBI) + b'":0}}'), "a key of at most"),
    "a configuration of lists": (file("config.json", b'{"a":[' + b"[]," * 2**17 + b"0]}"), "model_type"),
    "a configuration of more lists": (file("config.json", b'{"a":[' + b"[]," * (5 * MEBI) + b"0]}"), "too many values"),
    "a configuration of keys": (
        file("config.json", b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}"),
        "model_type",
    ),
    "a configuration that is nested": (file("config.json", b"[" * (MEBI // 2)), "in each other"),
}


def terabyte(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{")
    os.truncate(path, 2**40 + 100)  # a hole, on the disk as well
    return path


LARGE["a header of a terabyte"] = (terabyte, "header length")

MEASURE = """
import resource, sys, time
from pathlib import Path
from moe import CheckpointError
from moe.checkpoint.format.comparison import plan

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, resource.RLIM_INFINITY))
started = time.process_time()
try:
    plan(sys.argv[1])
except CheckpointError as error:
    ended = time.process_time()
    for _ in range(5_000_000):
        pass
    print((ended - started) / (time.process_time() - ended))
    print(error)
"""


@pytest.mark.parametrize("case", LARGE)
def test_the_largest_is_refused_in_64_mib_and_no_time(tmp_path: Path, case: str) -> None:
    make, message = LARGE[case]
    (tmp_path / "config.json").write_text(json.dumps(render_config(V3, Path("config.json"))))
    path = make(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    loops, error = done.stdout.splitlines()
    assert error.startswith(str(path)) and message in error
    # A loop of five million passes is the unit, which a slow or busy machine stretches as well: linear work takes up
    # to 5 of them, and work that is quadratic in the number of names thousands.
    assert float(loops) < 20


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, regular = tmp_path / "model.safetensors", os.stat(__file__)
    os.mkfifo(path)

    def late(*args: Any) -> None:
        raise AssertionError("it waits for the pipe's other end")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        with (
            monkeypatch.context() as patch,
            pytest.raises(CheckpointError, match="not a regular file; expected a file; found a pipe"),
        ):
            patch.setattr(files.os, "stat", lambda path: regular)  # as it was a moment before
            files.open_regular(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_the_cap_of_headers_is_an_argument(tmp_path: Path) -> None:
    path = single(b"{" + entries(1) + b"}" + b" " * MAX_HEADER_BYTES)(tmp_path)
    for read in (lambda **cap: read_header(path, **cap), lambda **cap: read_tensors(tmp_path, **cap)):
        with pytest.raises(CheckpointError, match=f"expected at most {MAX_HEADER_BYTES}"):
            read()
        assert len(read(max_header_bytes=2 * MAX_HEADER_BYTES)) == 1
        for cap in (100 * MEBI + 1, 0, -1):
            with pytest.raises(ValueError, match="max_header_bytes"):
                read(max_header_bytes=cap)


def test_what_the_library_refuses_is_refused_under_any_cap(tmp_path: Path) -> None:
    """Its cap is a hundred megabytes, which is less than 100 MiB."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 110 * MEBI)
    with pytest.raises(CheckpointError, match="expected at most 100000000"):
        read_header(path, max_header_bytes=100 * MEBI)


def test_headers_longer_than_the_window(tmp_path: Path) -> None:
    """Tokens cross its edges at every place, in any spelling."""
    for padding in (0, 1, 7, 30_001):
        header = b'{"__metadata__":{"a":"' + b"x" * padding + b'"},' + entries(9_000) + b"}"
        path = single(header)(tmp_path)
        plain = read_header(path)
        assert len(plain) == 9_000
        single(header.replace(b"down_proj", rb"d\u006fwn_proj"))(tmp_path)
        assert read_header(path).keys() == plain.keys()


ODD: tuple[Any, ...] = (None, True, False, -1, 0, 1, 1.5, 10**400, "", "1", "a\nb", [], [1], {}, {"a": 1}, [[[[1]]]])


@pytest.mark.parametrize("config", [V3_MTP, V2], ids=["v3", "v2"])
def test_any_value_of_any_key_is_understood_or_refused(config: Any) -> None:
    values = json.loads(json.dumps(render_config(config, Path("config.json"))))
    keys = {*values, "head_dim", "quantization_config", "auto_map", "torch_dtype", "partial_rotary_factor", "rope_type"}
    refused = 0
    for key in sorted(keys):
        for odd in ODD:
            try:
                parse_config({**values, key: odd}, Path("config.json"))
            except CheckpointError as error:
                refused += 1
                assert str(error).isprintable()
    for key in ("rope_theta", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "truncate", "\n"):
        for form in ("rope_parameters", "rope_scaling"):
            for odd in ODD:
                yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, key: odd}
                try:
                    parse_config({**values, "rope_parameters": None, "rope_scaling": None, form: yarn}, Path("c"))
                except CheckpointError as error:
                    refused += 1
                    assert str(error).isprintable()
    assert refused > 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "not valid JSON"),
        ("NaN", "expected an object"),
        ('"text"', "expected an object"),
        ("1", "expected an object"),
        ("\ufeff{}", "not valid JSON; expected JSON in UTF-8; found a byte order mark"),
        ('{"a": "\\ud800"}', "model_type"),
    ],
)
def test_a_config_that_is_no_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert caught.value.path == tmp_path / "config.json" and str(caught.value).isprintable()


def test_messages_are_one_line_whatever_they_contain() -> None:
    evil = "a\nb\r\x1b[2J\u202e\u2028\ud800é" + "x" * 10_000
    error = CheckpointError(Path("p\nq"), "prob\nlem", tensor=evil, expected=["\n"], found=evil)
    assert str(error).isprintable() and len(str(error)) < 1000
    assert (error.tensor, error.found, error.expected) == (evil, evil, ["\n"])
    assert r"a\nb\r\x1b[2J\u202e\u2028\ud800é" in str(error)
    assert one_line(10**5000) == "a number of 16610 bits"
    assert one_line("x" * 300) == "x" * 300 and len(one_line("x" * 301)) == 300


# Roles


def info(folder: Path, dtype: str, data: bytes, name: str = "t") -> Any:
    header = json.dumps({name: {"dtype": dtype, "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return read_header(path)[name]


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, float("inf"), float("nan")])
def test_scales_are_positive_and_finite(tmp_path: Path, bad: float) -> None:
    tensor = info(tmp_path, "U8", b"\0", "w_scale_inv")
    check_scales(tensor, torch.tensor([[1e-38, 3.0], [2.0, 1e38]]))
    check_scales(tensor, torch.empty(0, 3))
    with pytest.raises(CheckpointError, match="w_scale_inv: scale; expected finite numbers above 0") as caught:
        check_scales(tensor, torch.tensor([[1.0, 2.0], [bad, 3.0]]))
    assert caught.value.found == f"{bad} at index 2"


def test_only_projections_may_be_quantised() -> None:
    quantisable = set()
    for slot in layout(V3_MTP).values():
        assert "I8" not in allowed_dtypes(slot.parameter)
        if "I8" in allowed_dtypes(slot.parameter, quantised=("I8",)):
            quantisable.add(".".join(part for part in slot.parameter.split(".") if not part.isdecimal()))
    released = {"layers.self_attn." + name for name in ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")}
    released |= {
        "layers.mlp." + prefix + name for prefix in ("", "shared_experts.") for name in ("gate_proj", "up_proj")
    }
    released |= {"layers.mlp.down_proj", "layers.mlp.shared_experts.down_proj", "layers.self_attn.kv_a_proj_with_mqa"}
    released = {name + ".weight" for name in released}
    released |= {"layers.mlp.experts.gate_up_proj", "layers.mlp.experts.down_proj"}
    modules = {name for name in quantisable if name.startswith("mtp.")}
    assert quantisable - modules == released
    assert modules < {name.replace("layers.", "mtp.block.", 1) for name in released}


def test_far_more_experts_than_tensors() -> None:
    path = Path("config.json")
    check_experts(2**14, (), path)
    check_experts(256 * 59, {str(i) for i in range(91_991)}, path)
    with pytest.raises(CheckpointError, match=r"n_routed_experts in all layers; .*; found 16386"):
        check_experts(2**14 + 2, {"one"}, path)


@pytest.mark.parametrize(
    ("parameter", "quantisable", "common"),
    [
        ("layers.1.mlp.gate.weight", False, False),
        ("mtp.0.block.mlp.gate.weight", False, False),
        ("layers.1.mlp.gate.e_score_correction_bias", False, False),
        ("layers.0.mlp.gate_proj.weight", True, True),
        ("layers.1.input_layernorm.weight", False, False),
        ("mtp.0.eh_proj.weight", False, True),
        ("layers.0.self_attn.q_proj.bias", False, True),
        ("layers.0.self_attn.q_proj.weight_scale_inv", False, False),
        ("layers.1.mlp.experts.down_proj_bias", False, True),
        ("layers.1.self_attn.sinks", False, False),
        ("layers.1.mlp.shared_expert_gate.weight", False, True),
        ("embed_tokens.weight", False, True),
    ],
)
def test_what_files_may_hold_of_a_parameter(parameter: str, quantisable: bool, common: bool) -> None:
    assert is_quantisable(parameter) == quantisable
    assert needs_common_dtype(parameter) == common
