"""The benchmarks run, and print no number for what is wrong."""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import correctness, cpu, cuda, harness, jobs, layer, load, peers, report, routings
from benchmarks.__main__ import main
from benchmarks.harness import ROOT, BadInput, interleave
from benchmarks.peers import OURS, PEERS, LayerInputs, Peer, RouteInputs
from benchmarks.roofline import Ceilings, Phase, activated, work
from benchmarks.shapes import SHAPES, Shape, shrink
from moe.ops import grouped_mm, moe_mlp
from moe.ops.library import why_no_kernels
from moe.trace import Trace


def test_interleaving_alternates_and_drops_the_first_round():
    calls: list[str] = []
    seconds = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]


# Sizes at which everything takes milliseconds, and an expert is left without tokens.
LAYER = "24,32,16,8,2"


def layer_run(*options: str) -> int:
    return main(["layer", "--device", "cpu", "--small", "--seconds", "0", *options])


def records_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "milliseconds"),
    [
        ("deepseek_v3", (".235", "2.995", "7.54", "7.96", "29.2")),
        ("deepseek_v2_lite", (".035", ".293", ".377", ".538", "4.31")),
        ("qwen3_30b_a3b", (".025", ".260", ".411", ".537", "3.13")),
        ("mixtral_8x7b", (".235", ".931", ".954", "3.65", "29.2")),
        ("olmoe", (".034", ".237", ".278", ".522", "4.18")),
    ],
)
def test_forward_limit_on_an_h100(name, milliseconds):
    """A table that was worked out apart from this code: 790 TFLOP/s and 3.0 TB/s, bf16."""
    shape, h100 = SHAPES[name], Ceilings(matmul=790e12, copy=3.0e12)
    for tokens, printed in zip((1, 16, 256, 4096, 32768), milliseconds, strict=True):
        seconds = work("forward", shape, tokens, activated(shape, tokens), itemsize=2).seconds(h100)
        assert abs(seconds * 1e3 - float(printed)) <= 0.5001 * 10.0 ** -len(printed.partition(".")[2])


def test_costs_by_hand():
    shape, ones = Shape("tiny", d=3, n=5, experts=4, top_k=2), Ceilings(1.0, 1.0)
    t, s, b, active = 7, 14, 2, 3.0
    w, every = active * 3 * 3 * 5 * b, 4 * 3 * 3 * 5 * b
    forward = w + 2 * t * 3 * b + 2 * s * 5 * b + 2 * s * 3 * b
    backward = w + every + 4 * t * 3 * b + 2 * s * 3 * b + 10 * s * 5 * b
    flops = s * 3 * 5
    assert work("decode", shape, t, active, b).phases[0] == Phase(6 * flops, forward)
    train = work("train", shape, t, active, b)
    assert train.phases == (Phase(6 * flops, forward + 2 * s * 5 * b), Phase(12 * flops, backward))
    assert train.seconds(ones) == max(train.phases[0].flops, train.phases[0].bytes) + max(12 * flops, backward)
    rows = s * (3 + 10) * b
    assert work("gemm", shape, t, active, b).phases == (Phase(4 * flops, active * 30 * b + rows),)
    assert work("gemm_dw", shape, t, active, b).phases == (Phase(4 * flops, 4 * 30 * b + rows),)
    assert work("route", shape, t, 0.0, 4).phases == (Phase(0.0, 7 * 4 * 4 + 14 * 12),)
    assert activated(shape, 1) == pytest.approx(2) and activated(shape, 2) == pytest.approx(3)


@pytest.mark.parametrize("routing", routings.NAMES)
def test_routings_name_distinct_experts(routing):
    found = routings.assign(routing, 4000, 32, 4, torch.Generator().manual_seed(3))
    ids = found.expert_ids
    assert ids.dtype == torch.int64 and ids.shape == (4000, 4) and ids.min() >= 0 and ids.max() < 32
    ordered = ids.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(4000))
    load = torch.bincount(ids.flatten(), minlength=32).sort(descending=True).values / 4000
    if routing == "uniform":
        assert load.max() < 0.16 and load.min() > 0.09
    elif routing == "one-hot":
        assert load.tolist() == [1.0] * 4 + [0.0] * 28
    else:
        assert load[0] > 0.6 and load[-1] < 0.06 and load[0] / load[7] > 3
    again = routings.assign(routing, 4000, 32, 4, torch.Generator().manual_seed(3))
    other = routings.assign(routing, 4000, 32, 4, torch.Generator().manual_seed(4))
    assert torch.equal(again.expert_ids, ids) and not torch.equal(other.expert_ids, ids)


def test_a_routing_file_is_taken_as_it_is(tmp_path):
    ids = torch.randint(8, (40, 2), dtype=torch.int32)
    weights = torch.rand(40, 2, dtype=torch.float64)
    file = tmp_path / "routing.npz"
    np.savez(file, expert_ids=ids.numpy(), weights=weights.numpy())
    found = routings.assign(str(file), 10, 8, 2, torch.Generator())
    assert found.expert_ids.tolist() == ids[:10].tolist()
    torch.testing.assert_close(found.weights, weights[:10].float())
    out = tmp_path / "out.jsonl"
    options = ("--shape", LAYER, "--op", "forward", "decode", "--routing", str(file), "--peers", "loop")
    assert layer_run(*options, "--json", str(out)) == 0
    assert [(r["op"], r["tokens"]) for r in records_of(out) if r["ours"]] == [
        ("forward", 40),
        ("decode", 1),
        ("decode", 4),
        ("decode", 16),
    ]
    assert records_of(out)[0]["activated_experts"] == len(set(ids.flatten().tolist()))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"ids": np.zeros((4, 2), int)}, "array missing; expected expert_ids; found ids"),
        ({"expert_ids": np.zeros(4, int)}, "expert_ids: wrong shape; expected [T, K]; found (4,)"),
        ({"expert_ids": np.zeros((4, 3), int)}, "expert_ids: wrong shape; expected [4 or more, 2]; found (4, 3)"),
        ({"expert_ids": np.zeros((4, 2))}, "expert_ids: wrong dtype; expected integers; found float64"),
        ({"expert_ids": np.full((4, 2), 8)}, "expert_ids: out of range; expected 0 to 7; found 8 to 8"),
        ({"expert_ids": np.full((4, 2), -1)}, "expert_ids: out of range; expected 0 to 7; found -1 to -1"),
        (
            {"expert_ids": np.zeros((4, 2), int), "weights": np.zeros((4, 1))},
            "weights: wrong shape; expected (4, 2); found (4, 1)",
        ),
        ({"expert_ids": np.zeros((4, 2), int), "weights": np.full((4, 2), np.nan)}, "expected finite numbers"),
        ({"expert_ids": np.array([[None, 1]])}, "expert_ids: not readable"),
        ({"expert_ids": np.zeros((0, 2), int)}, "expert_ids: no tokens; expected [T, K]; found (0, 2)"),
        ({"expert_ids": np.zeros((4, 0), int)}, "expert_ids: no tokens; expected [T, K]; found (4, 0)"),
        ({"expert_ids": np.zeros((4, 2), "m8[s]")}, "expert_ids: wrong dtype; expected integers; found timedelta64[s]"),
        ({"expert_ids": np.full((4, 2), 2**64 - 1, np.uint64)}, "expected 0 to 7"),
        ({"expert_ids": np.zeros((4, 2), bool)}, "expert_ids: wrong dtype; expected integers; found bool"),
        ({"expert_ids": np.zeros((4, 2), int), "weights": np.full((4, 2), 1e39)}, "in float32's range"),
        ({"expert_ids": np.zeros((4, 2), int), "weights": np.full((4, 2), -np.inf)}, "in float32's range"),
    ],
)
def test_a_routing_file_that_does_not_fit(tmp_path, capsys, arrays, says):
    file = tmp_path / "routing.npz"
    np.savez(file, **arrays)
    assert layer_run("--shape", LAYER, "--op", "forward", "--routing", str(file)) == 2
    error = capsys.readouterr().err
    assert says in error and str(file) in error and error.count("\n") == 1


def test_a_layer_of_a_trace_is_taken_as_it_is(tmp_path, capsys):
    rng, layers = np.random.default_rng(0), np.array(["layers.1.mlp", "mtp.0.block.mlp"])
    ids = rng.random((2, 20, 8)).argsort(axis=2)[:, :, :2].astype(np.uint8)
    weights = rng.random((2, 20, 2)).astype(np.float16)
    routed = np.arange(40).reshape(2, 20) % 40 != 30  # one token of the MTP module has no next token
    kept = [np.flatnonzero(row) for row in routed]
    one = np.array(["layers.0.mlp"])
    file = str(tmp_path / "trace.npz")
    Trace(layers, 8, 0, ids, weights, weights[:, :, 0], np.array([0]), routed).save(Path(file))
    np.savez(tmp_path / "flat.npz", expert_ids=ids[0])
    np.savez(tmp_path / "mask.npz", expert_ids=ids, layers=layers, routed=routed[:, :3])
    np.savez(tmp_path / "wrong.npz", expert_ids=ids, layers=one)
    for i, name in enumerate(layers):
        found = routings.assign(f"{file}:{name}", 15, 8, 2, torch.Generator())
        assert found.expert_ids.dtype == torch.int64 and found.expert_ids.tolist() == ids[i, kept[i][:15]].tolist()
        assert found.weights.dtype == torch.float32 and found.weights.tolist() == weights[i, kept[i][:15]].tolist()
        assert routings.tokens_in(f"{file}:{name}") == (20, 19)[i]
    out = tmp_path / "out.jsonl"
    options = ("--shape", LAYER, "--op", "forward", "--peers", "loop", "--json", str(out))
    assert layer_run(*options, "--routing", f"{file}:mtp.0.block.mlp") == 0
    record = records_of(out)[0]
    assert record["tokens"] == 19 and record["activated_experts"] == len(set(ids[1, kept[1]].flatten().tolist()))
    capsys.readouterr()
    names = "expected FILE.npz:LAYER with one of layers.1.mlp, mtp.0.block.mlp"
    for wrong, says in (
        (file, f"{file}: expert_ids: {names}"),
        (f"{file}:", f"{file}:: expert_ids: {names}"),
        (f"{file}:layers.3.mlp", f"{file}:layers.3.mlp: expert_ids: {names}"),
        (f"{tmp_path / 'flat.npz'}:layers.1.mlp", "array missing; expected layers; found expert_ids"),
        (f"{tmp_path / 'wrong.npz'}:layers.0.mlp", "wrong.npz:layers.0.mlp: expert_ids: expected FILE.npz:LAYER"),
        (f"{tmp_path / 'no.npz'}:layers.0.mlp", "no.npz: no such file"),
        (f"{tmp_path / 'mask.npz'}:layers.1.mlp", "mask.npz: routed: expected bool (2, 20); found bool (2, 3)"),
    ):
        assert layer_run(*options, "--routing", wrong) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def npy(shape: str, size: int = 64, version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + bytes(size)


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"not npy at all",
        b"\x93NUMPY\x07\x00",
        b"\x93NUMPY\x01\x00\xff\xff{",
        npy("(4, 2)", size=63),
        npy("(4, 2)", version=b"\x09\x00"),
        npy("(1000000000000, 2)"),
        npy("(-4, 2)"),
        npy("(4, 2"),
        npy("[4, 2]"),
        npy("(" * 5000),
    ],
    ids=range(11),
)
def test_a_routing_file_whose_member_is_no_array(tmp_path, capsys, member):
    file = tmp_path / "routing.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("expert_ids.npy", member)
    assert layer_run("--shape", LAYER, "--op", "forward", "--routing", str(file)) == 2
    shown = capsys.readouterr()
    assert f"--routing {file}: expert_ids: not readable (" in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_routing_file_that_is_damaged(tmp_path, capsys):
    file = tmp_path / "routing.npz"
    np.savez_compressed(file, expert_ids=np.arange(4000).reshape(2000, 2) % 8)
    whole = file.read_bytes()
    for at in (*range(0, 64, 3), len(whole) // 2, *range(len(whole) - 90, len(whole), 7)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            try:
                assert routings.tokens_in(str(file)) == 2000
            except BadInput as error:
                assert "\n" not in str(error) and str(file) in str(error)
    file.unlink()
    file.mkdir()
    assert layer_run("--shape", LAYER, "--routing", str(file)) == 2
    assert capsys.readouterr().err.count("\n") == 1


WRONG = """
import torch
from moe.ops import moe_mlp

def right(i):
    return moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids)

def zeros(i):
    return right(i) * 0

def one_zeroed_row(i):
    mask = torch.ones_like(i.x[:, :1])
    mask[5] = 0
    return right(i) * mask

def one_flipped_row(i):
    mask = torch.ones_like(i.x[:, :1])
    mask[-1] = -1
    return right(i) * mask

def scaled(i):
    return right(i) * 1.02

def not_a_number(i):
    return right(i).log()

def wrong_shape(i):
    return right(i)[:-1]

def fails(i):
    raise RuntimeError("of its own")

calls = {}

def fails_later(i):
    calls["later"] = calls.get("later", 0) + 1
    if calls["later"] > 3:
        raise RuntimeError("the fourth time")
    return right(i)

def leaves(i):
    raise SystemExit(0)

def remembers(i):
    calls["y"] = calls.get("y", right(i))
    return calls["y"]

def remembers_detached(i):
    calls["z"] = calls.get("z", right(i).detach().clone())
    return calls["z"]

def doubles_x(i):
    y = right(i)
    i.x.data.mul_(2)
    return y

def turns_x_around(i):
    y = right(i)
    i.x.copy_(i.x.flip(0))
    return y

def scales_weights_later(i):
    calls["weights"] = calls.get("weights", 0) + 1
    if calls["weights"] == 4:
        i.weights.mul_(2)
    return right(i)

def fills_in_secret_later(i):
    calls["secret"] = calls.get("secret", 0) + 1
    if calls["secret"] == 4:
        i.x.numpy()[:] = 0
    return right(i)

def complex_numbers(i):
    return right(i) + 0j

def integers(i):
    return right(i).long()

def nothing(i):
    return None

def shrinks_and_freezes_x(i):
    y = right(i)
    i.x.requires_grad_(not i.x.requires_grad)
    i.x.resize_(1, 1)
    return y

def right_forward_only(i):
    y = right(i)
    return y + (y * 0.02 - (y * 0.02).detach())
"""


@pytest.fixture
def peer_file(tmp_path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(WRONG)
    return file


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_peer_gets_no_number(peer_file, tmp_path, capsys, dtype):
    names = ["zeros", "one_zeroed_row", "one_flipped_row", "scaled", "not_a_number", "wrong_shape", "fails"]
    out = tmp_path / "out.jsonl"
    options = [part for name in ["right", *names] for part in ("--peer", f"{peer_file}:{name}")]
    shape = "24,128,64,8,2"
    assert layer_run("--shape", shape, "--op", "forward", "--dtype", dtype, *options, "--json", str(out)) == 0
    by_name = {r["candidate"].rpartition(":")[2]: r for r in records_of(out)}
    assert by_name["right"]["status"] == "right" and by_name["right"]["share"] > 0
    shown = capsys.readouterr().out
    for name in names:
        assert by_name[name]["status"] == ("failed" if name == "fails" else "wrong"), name
        assert not {"eager", "graph", "tflops", "share"} & set(by_name[name])
    assert "is failed: RuntimeError: of its own" in shown and "worst row 1.0e+00" in shown


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("fails_later", "failed", "during timing: RuntimeError: the fourth time"),
        ("complex_numbers", "wrong", "y: torch.complex64 instead of a floating point type"),
        ("integers", "wrong", "y: torch.int64 instead of a floating point type"),
        ("nothing", "wrong", "y: NoneType instead of a tensor"),
        ("leaves", "failed", "SystemExit: 0"),
        ("remembers_detached", "wrong", "with other values of its inputs: y: error"),
        ("doubles_x", "wrong", "it changes its inputs: x"),
        ("turns_x_around", "wrong", "it changes its inputs: x"),
        ("scales_weights_later", "wrong", "during timing: it changes its inputs: weights"),
        ("fills_in_secret_later", "failed", "a candidate changed the inputs during timing: x"),
        ("shrinks_and_freezes_x", "failed", ""),
    ],
)
def test_a_peer_spoils_nothing_but_its_own_result(peer_file, tmp_path, name, status, reason):
    out = tmp_path / "out.jsonl"
    options = ("--op", "forward", "--peers", "--peer", f"{peer_file}:{name}", "--peer", f"{peer_file}:right")
    assert layer_run("--shape", LAYER, *options, "--json", str(out)) == 0
    ours, wrong, right = records_of(out)
    assert ours["status"] == "right" and ours["eager"]
    assert wrong["status"] == status and reason in wrong["reason"] and "eager" not in wrong
    # Nobody can tell which of the two it was that wrote past torch.
    assert right["status"] == ("failed" if name == "fills_in_secret_later" else "right")


def test_a_peer_that_goes_back_twice_through_its_graph_fails_alone(peer_file, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--op", "train", "--peers", "loop", "--peer", f"{peer_file}:remembers", "--json", str(out))
    assert layer_run("--shape", LAYER, *options) == 0
    ours, loop, peer = records_of(out)
    assert ours["status"] == loop["status"] == "right"
    assert peer["status"] == "failed" and "backward through the graph a second time" in peer["reason"]


def test_one_wrong_row_of_many_is_seen():
    """The error of the whole is too small to show it."""
    rows = 100_000
    values = torch.randn(rows, 16, dtype=torch.float64)
    right, every = values.bfloat16(), torch.ones(rows, dtype=torch.bool)
    exact = correctness.Exact(
        (rows, 16), torch.arange(rows), values, right, every, inner=64, independent=16, errors=values.numel()
    )
    assert correctness.judge(right, exact, torch.bfloat16).right
    for factor in (0, -1, 0.8):
        found = right.clone()
        found[77] *= factor
        verdict = correctness.judge(found, exact, torch.bfloat16)
        assert not verdict.right and verdict.error < 2 * verdict.limit and verdict.row_error > verdict.row_limit


def made_inputs(entry: jobs.Entry) -> Any:
    made: list[Any] = []
    peer = dataclasses.replace(OURS, layer=lambda inputs: made.append(inputs) or (lambda: inputs.x))
    jobs.prepare(entry, "cpu", 0).build(peer)
    return made[0]


@pytest.mark.parametrize("dtype", list(jobs.DTYPES))
def test_small_defects_are_seen_in_every_dtype(dtype):
    """A factor of 1.01 in any tensor, and the least of a token's experts left out, in every shape of the registry."""
    for shape in map(shrink, SHAPES.values()):
        i = made_inputs(jobs.Entry("train", shape, 33, "uniform", dtype))
        exact = correctness.layer(i, 1e12)

        def judged(name: str, found: torch.Tensor, exact: Any = exact, i: Any = i) -> bool:
            return correctness.judge(found, exact[name], i.x.dtype).right

        y = moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids)
        found = dict(zip(exact, (y, *torch.autograd.grad(y, i.leaves, i.grad)), strict=True))
        for name, tensor in found.items():
            assert judged(name, tensor), (shape.name, name)
            for factor in (1.01, 0.99):
                assert not judged(name, (tensor.double() * factor).to(tensor.dtype)), (shape.name, name)
        ids = i.expert_ids.clone()
        ids[7, int(i.weights[7].argmin())] = -1
        assert not judged("y", moe_mlp(i.x, i.gate_up, i.down, i.weights, ids)), shape.name


@pytest.mark.parametrize("dtype", list(jobs.DTYPES))
def test_a_factor_of_1004_is_seen(dtype):
    shape = Shape("", 128, 64, 8, 2)
    i = made_inputs(jobs.Entry("forward", shape, 256, "uniform", dtype))
    exact = correctness.layer(i, 1e12)["y"]
    y = moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids)
    assert correctness.judge(y, exact, y.dtype).right
    for factor in (1.004, 0.996):
        verdict = correctness.judge((y.double() * factor).to(y.dtype), exact, y.dtype)
        assert verdict.scale_error > verdict.scale_limit and f", scale {verdict.scale_error:.1e} (" in str(verdict)


def test_wrong_gradients_get_no_number(peer_file, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--peer", f"{peer_file}:right_forward_only", "--peers", "torch", "--json", str(out))
    assert layer_run("--shape", LAYER, "--op", "train", "forward", *options) == 0
    status = {(r["op"], r["candidate"].rpartition(":")[2]): r["status"] for r in records_of(out)}
    assert status.pop(("train", "right_forward_only")) == "wrong"
    assert set(status.values()) == {"right"}
    train = next(r for r in records_of(out) if r["ours"])
    assert set(train["errors"]) == {"y", "dx", "dgate_up", "ddown", "dweights"}


@pytest.mark.parametrize("op", ["gemm", "gemm_dx", "gemm_dw"])
@pytest.mark.parametrize("budget", [0.0, 1e12])
def test_products_are_judged_in_every_form(op, budget):
    """Whole, and as a sample of rows or experts when all would be too much."""
    shape = Shape("", 32, 16, 64, 2)
    products: list[Any] = []
    peer = dataclasses.replace(OURS, gemm=lambda inputs: products.append(inputs) or (lambda: None))
    jobs.prepare(jobs.Entry(op, shape, 100, "zipf", "fp32"), "cpu", 0).build(peer)
    inputs = products[0]
    exact = correctness.gemm(inputs, budget)["out"]
    assert (exact.index.numel() == exact.shape[0]) == (budget > 0)
    right = grouped_mm(inputs.a, inputs.b, inputs.offs)
    assert correctness.judge(right, exact, torch.float32).right
    assert not correctness.judge(right * 1.02, exact, torch.float32).right
    reached = right.flatten(1).any(dim=1).nonzero().flatten().tolist()
    sampled = set(exact.index.tolist())
    for row in {next(i for i in reached if i in sampled), *(i for i in reached if i not in sampled)}:
        spoiled = right.clone()
        spoiled[row] = 0
        assert not correctness.judge(spoiled, exact, torch.float32).right
    right[reached[-1]] = torch.nan
    assert not correctness.judge(right, exact, torch.float32).right


def test_a_sample_of_the_layer_sees_what_the_whole_sees():
    shape = Shape("", 32, 16, 8, 2)
    inputs = made_inputs(jobs.Entry("train", shape, 90, "zipf", "fp32"))
    sampled, whole = correctness.layer(inputs, 0.0), correctness.layer(inputs, 1e12)
    for name, part in sampled.items():
        assert 0 < part.index.numel() < whole[name].index.numel() == part.shape[0]
        torch.testing.assert_close(part.values, whole[name].values[part.index])


@pytest.mark.parametrize(
    ("spoil", "right"),
    [
        (lambda w, i: (w, i), True),
        (lambda w, i: (w.flip(1), i.flip(1)), True),
        (lambda w, i: (w * 1.02, i), False),
        (lambda w, i: (w.flip(1), i), False),
        (lambda w, i: (w, i[:, :1].expand_as(i)), False),
        (lambda w, i: (w, i + 16), False),
        (lambda w, i: (w * 0 + 1 / 3, i * 0 + torch.arange(3)), False),
    ],
)
def test_routes_are_judged_by_the_scores_they_select(spoil, right):
    inputs = RouteInputs(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), 3)
    assert OURS.route is not None
    assert correctness.judge_route(spoil(*OURS.route(inputs)()), inputs).right == right


def test_a_route_to_worse_experts_is_wrong():
    inputs = RouteInputs(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), 3)
    ordered = inputs.logits.softmax(dim=1).sort(dim=1, descending=True)
    for selected, right in (([0, 1, 2], True), ([2, 0, 1], True), ([0, 1, 3], False), ([13, 14, 15], False)):
        weights, ids = ordered.values[:, selected], ordered.indices[:, selected]
        assert correctness.judge_route((weights / weights.sum(dim=1, keepdim=True), ids), inputs).right == right


def test_layer_records(tmp_path, capsys):
    out, png = tmp_path / "new" / "out.jsonl", tmp_path / "out.png"
    options = ("--shape", LAYER, "--tokens", "9", "--peers", "dense", "loop", "torch", "transformers-eager")
    run = ["layer", "--device", "cpu", "--seconds", "0", *options]
    assert main([*run, "--json", str(out), "--plot", str(png), "--profile"]) == 0
    records = records_of(out)
    assert {r["op"] for r in records} == set(jobs.OPS)
    assert len({r["run"] for r in records}) == 1
    for r in records:
        assert r["status"] == ("not the same work" if r["candidate"] == "dense" else "right"), r["reason"]
        assert r["commit"] and r["device"] and r["versions"]["torch"] == torch.__version__
        assert (r["tokens"], r["d"], r["n"], r["experts"], r["top_k"]) == (9, 32, 16, 8, 2)
        assert r["eager"]["rounds"] >= 5 and 0 < r["eager"]["min_s"] <= r["eager"]["median_s"]
        assert r["graph"] is None and r["peak_bytes"] is None and r["small"] is False
        assert r["other_cores"] is None or 0 <= r["other_cores"] <= r["cores"]
        assert r["share"] == r["limit_s"] / r["eager"]["median_s"]
        assert r["limit_s"] > 0 and r["flops"] / r["matmul_flops"] <= r["limit_s"] * 1.0001
    assert png.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "TFLOP/s" in shown and "profile of moesmith" in shown and "absent" not in shown
    assert report.SMOKE_TEST not in shown and fits_80_columns(shown)
    assert all(f"\n{name} " in shown for name in ("moesmith", "dense", "loop", "torch", "transformers-eager"))


def fits_80_columns(shown: str) -> bool:
    """Tables do; a line of text is for the terminal to wrap."""
    tables = [part for part in shown.split("\n\n") for line in part.splitlines()[:2] if line.startswith("candidate")]
    return all(len(line) <= 80 for table in tables for line in table.splitlines())


def test_a_small_run_prints_no_times(tmp_path, capsys):
    out, png = tmp_path / "out.jsonl", tmp_path / "out.png"
    options = ("--shape", "olmoe", "--op", "forward", "--peers", "dense", "transformers-grouped_mm", "--plot", str(png))
    assert layer_run(*options, "--json", str(out)) == 0
    assert all(r["small"] is True and r["eager"]["median_s"] > 0 for r in records_of(out))
    shown = capsys.readouterr().out
    assert report.SMOKE_TEST in shown and "forward olmoe (shrunk to T 33, d 32" in shown
    assert not any(word in shown for word in ("FLOP/s", " ms", "GB/s", "%", "limit", "disturbed"))
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    worst = max(records_of(out)[0]["errors"].values(), key=lambda e: e["row"] / e["row_limit"])
    assert rows["moesmith"] == ["right", f"{worst['row']:.1e}", f"{worst['row_limit']:.1e}"]
    assert rows["transformers-grouped_mm"][0] == "right" and rows["dense"] == ["not", "the", "same", "work"]


def test_on_a_cpu_registry_shapes_are_small_and_others_are_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer, "ceilings", lambda dtypes, *_: dict.fromkeys(dtypes, Ceilings(1e9, 1e9)))
    for shape, small in ((LAYER, False), ("olmoe", True)):
        out = tmp_path / f"{small}.jsonl"
        run = ["layer", "--device", "cpu", "--seconds", "0", "--op", "forward", "--peers"]
        assert main([*run, "--shape", shape, "--json", str(out)]) == 0
        assert [r["small"] for r in records_of(out)] == [small]
        assert (report.SMOKE_TEST in capsys.readouterr().out) is small


def plotted(**changes: Any) -> dict[str, Any]:
    record = {"op": "forward", "shape": "olmoe", "tokens": 4096, "routing": "uniform", "dtype": "bf16", "small": False}
    record |= {"candidate": "moesmith", "ours": True, "share": 0.5, "device": "a device", "commit": "c0ffee"}
    return record | {"eager": {"median_s": 0.004}, "graph": {"median_s": 0.002}, "disturbed": False} | changes


def test_the_plot_shows_shares_and_which_direction_is_better():
    pytest.importorskip("matplotlib")
    other = plotted(candidate="torch", ours=False, share=0.25)
    left_out = plotted(candidate="vllm", ours=False)
    del left_out["share"]
    figure = report.figure([other, plotted(), plotted(op="decode", tokens=1, share=0.125), left_out])
    forward, decode = figure.axes
    assert [bar.get_width() for bar in forward.patches] == [25, 50] and [b.get_width() for b in decode.patches] == [
        12.5
    ]
    assert [text.get_text() for text in forward.texts] == [" 25", " 50"]
    assert forward.get_title(loc="left") == "forward" and decode.get_xlabel() == "% of the limit (higher is better)"
    assert [label.get_text() for label in forward.get_yticklabels()] == ["olmoe\nT 4096, uniform, bf16"]
    assert figure.get_suptitle() == "a device; bf16; commit c0ffee"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["moesmith", "torch"]
    ours, theirs = (patch.get_facecolor() for patch in legend.get_patches())
    assert [bar.get_facecolor() for bar in forward.patches] == [theirs, ours] and ours != theirs


def test_the_plot_of_a_small_run_shows_times_and_says_what_it_is():
    pytest.importorskip("matplotlib")
    figure = report.figure([plotted(small=True), plotted(small=True, shape="32x16x8x2", candidate="a/b.py:f")])
    (panel,) = figure.axes
    assert [bar.get_width() for bar in panel.patches] == [2, 2]  # ms of the faster mode
    assert panel.get_xlabel() == "median time in ms (lower is better)"
    labels = [label.get_text().splitlines()[0] for label in panel.get_yticklabels()]
    assert labels == ["olmoe (shrunk)", "32x16x8x2"]
    assert figure.get_suptitle().endswith(report.SMOKE_TEST)


def test_many_candidates_have_looks_of_their_own():
    pytest.importorskip("matplotlib")
    figure = report.figure([plotted(candidate=str(i), ours=i == 20) for i in range(21)])
    looks = [(patch.get_facecolor(), patch.get_hatch()) for patch in figure.legends[0].get_patches()]
    assert len(set(looks)) == 21
    assert figure.legends[0].get_texts()[0].get_text() == "20", "ours is first"


def test_a_disturbed_run_says_so(monkeypatch, capsys, tmp_path):
    """Other processes use one and a half of two cores, by /proc/stat."""
    stat, clock, own = tmp_path / "stat", [0.0], [0.0]
    monkeypatch.setattr(harness, "STAT", stat)
    monkeypatch.setattr(harness.os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(harness.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(harness.os, "times", lambda: (own[0], 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def after(seconds: float, cpu0: int, cpu1: int, cpu2: int, mine: float) -> dict[str, Any]:
        """`record` after so many seconds, ticks of each core, and seconds of this process."""
        stat.write_text(
            "cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 9 9 0 0 0 0 0\ncpu1 5 0 0 9\ncpu2 5 5 5 9 9 5 5 5 7 7\nintr 1\n"
        )
        clock[0], own[0] = 0.0, 1.0
        others = harness.OtherProcesses()
        # User, nice, system, irq, softirq and stolen time count; idle, waiting and guest time do not.
        lines = [f"cpu0 {cpu0} 0 0 500 500 0 0 0 900 900", f"cpu1 {cpu1} 0 0 9", f"cpu2 5 5 5 700 9 5 5 {5 + cpu2} 7 7"]
        stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\n" + "\n".join(lines) + "\n")
        clock[0], own[0] = seconds, 1.0 + mine
        return others.record()

    assert after(10, 1200, 999, 800, 5.0) == {"cores": 2, "other_cores": 1.5, "disturbed": True}
    assert after(10, 300, 999, 280, 5.0) == {"cores": 2, "other_cores": 0.08, "disturbed": False}
    assert after(10, 290, 999, 200, 5.0) == {"cores": 2, "other_cores": 0.0, "disturbed": False}, "ticks are coarse"
    assert after(10, 0, 999, 0, 5.0) == {"cores": 2, "other_cores": None, "disturbed": False}, "counters stand still"
    assert after(0.1, 10, 0, 4, 0.1) == {"cores": 2, "other_cores": 0.4, "disturbed": False}, "ticks are coarse"
    stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 9 9 0 0 0 0 0\n")
    assert harness.OtherProcesses().record()["other_cores"] is None, "a core that is not listed"
    stat.unlink()
    unknown = harness.OtherProcesses().record()
    assert unknown == {"cores": 2, "other_cores": None, "disturbed": False}
    noisy = [unknown, after(10, 600, 0, 700, 5.0), after(10, 1200, 0, 800, 5.0)]
    assert harness.disturbance(noisy) == "disturbed: other processes used 1.5 of 2 cores"
    assert harness.disturbance([unknown, {}]) == ""


def test_own_work_is_not_by_other_processes():
    """CPU time of this process and of a child that has ended, however busy the machine is."""
    if harness.OtherProcesses().record()["other_cores"] is None:
        pytest.skip("this system has no /proc/stat")
    others, begun, used = harness.OtherProcesses(), time.perf_counter(), time.process_time()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: pass"], check=True)
    while time.process_time() < used + 0.6:
        pass
    other, busy = others.record()["other_cores"], others.record(own=0.0)["other_cores"]
    assert 1.1 < (busy - other) * (time.perf_counter() - begun) < 2


def test_a_disturbed_measurement_ends_with_a_line(monkeypatch, capsys, tmp_path):
    busy = {"cores": 2, "other_cores": 0.6, "disturbed": True}
    monkeypatch.setattr(layer, "OtherProcesses", lambda: SimpleNamespace(record=lambda: busy))
    monkeypatch.setattr(layer, "ceilings", lambda dtypes, *_: dict.fromkeys(dtypes, Ceilings(1e9, 1e9)))
    out = tmp_path / "out.jsonl"
    run = ["layer", "--device", "cpu", "--seconds", "0", "--op", "forward", "--peers", "--shape", LAYER]
    assert main([*run, "--json", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "disturbed: other processes used 0.6 of 2 cores"
    assert records_of(out)[0].items() >= busy.items()


def test_tables_fit_80_columns_with_every_name(capsys):
    name = "/a/very/long/folder/of/somebody/with/peers/and/more/peers/mine.py:a_function_that_has_a_long_name"
    times = {"eager": {"median_s": 0.012345}, "graph": {"median_s": 0.012345}, "peak_bytes": 123456 * 2**20}
    numbers = {"tflops": 612.34, "gbytes": 3141.5, "share": 0.9999, "limit_s": 0.01, "errors": {}, "reason": None}
    names = ["transformers-grouped_mm", name]
    rows = [{"candidate": n, "status": "right", "small": False, **times, **numbers} for n in names]
    report.print_layer("forward", [*rows, {**numbers, **rows[0], "candidate": "vllm"}])
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    for text in ("transformers-grouped_mm", "12.35", "123456", "612.3", "3142", "100.0", "unchecked"):
        assert text in shown
    assert name in "".join(line.split(" ")[0] for line in shown.splitlines())


def test_the_other_tables_fit_80_columns_with_every_name(capsys):
    base = {"small": False, "reason": None, "status": "right", "ours": True}
    packed = {"step": "destinations", "candidate": "torch: grouped_mm, -1 removed", "eager": {"median_s": 0.0123456}}
    report.print_packing("pack", [{**base, **packed, "bytes": 123456789, "gbytes": 1234.5, "share": 0.999}])
    sent = {"shape": "deepseek_v2_lite", "routing": "uniform", "payload": "same", "ranks": 64, "copies": 5.1234}
    sent |= {"bytes": 123456.0, "naive_bytes": 234567.0, "of_expected": 1.0002, "dedup": 1.56}
    report.print_bytes("bytes", [{**base, **sent, "expected_copies": 5.1235}])
    rates = dict.fromkeys(("tokens_per_s", "undivided_tokens_per_s", "limit_tokens_per_s"), 1234567.0)
    scaled = {"shape": "x", "ranks": 64, "fixed": "per rank", "tokens": 32768, "together": {"median_s": 1.2345}}
    report.print_scaling("scaling", [{**base, **scaled, **rates, "share": 0.98, "in_collectives": 0.5}])
    errors = {"logits": 1e-6, "gradients": 2e-5}
    timed = {"work": "batch 32", "dtype": "bf16", "backend": "batched_mm", "tokens": 1024, "limit_s": 0.5, "load": 1.0}
    timed |= {"errors": errors, "peer_errors": errors, "ours": {"median_s": 0.8}, "peer": {"median_s": 1.1}}
    timed |= {"variant": "packed", "beside": "transformers", "peer_limit_s": 0.5}
    about = {"preset": "bench_400m", "device": "d", "versions": {}, "commit": "c", "small": False, "ratio": 1.375}
    cpu.show([{**timed, **about, "matmul_flops": 1e12, "read_bytes": 1e10}])
    loaded = {"reader": "fastsafetensors", "median_s": 12.34, "gbytes_per_s": 12.35, "times_readinto": 12.36}
    load._show([{**loaded, "small": False, "bytes": 2**31, "peak_bytes": 2**31, "peak_share": 1.01}])
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    for row in (
        "destinations torch: grouped_mm, -1 removed 12.35 1.00 123.5 1234 99.9",
        "deepseek_v2_lite uniform bf16 5.123 5.123 123,456 234,567 1.000 1.56 x",
        "64 per rank 32,768 1234 1,234,567 1,234,567 1,234,567 98.0 50.0",
        "batch 32 packed batched_mm 1280.0 62 930.9 45 1.38 1.0e-06 1.0e-06",
        "fastsafetensors 12.34 12.35 12.36 2,048 1.01",
    ):
        assert row in [" ".join(line.split()) for line in shown.splitlines()], shown


def test_every_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], ["layer"], ["cpu"], ["load"], ["parallel"], ["qualify"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == 0 and lines and max(map(len, lines)) <= 80, max(lines, key=len)


def test_every_shape_of_the_registry_runs_small(tmp_path):
    out = tmp_path / "out.jsonl"
    assert layer_run("--op", "forward", "--peers", "--json", str(out)) == 0
    records = records_of(out)
    assert [r["shape"] for r in records] == list(SHAPES)
    assert all((r["experts"], r["top_k"]) == SHAPES[r["shape"]].sizes[2:] and r["d"] <= 112 for r in records)


def test_compare(tmp_path, capsys, peer_file):
    out = tmp_path / "old.jsonl"
    options = ("--shape", LAYER, "--op", "forward", "--peers", "loop")
    assert layer_run(*options, "--json", str(out)) == 0
    record = records_of(out)[0]

    def against(times: float, *more: str) -> int:
        changed = {**record, "eager": {**record["eager"], "median_s": record["eager"]["median_s"] * times}}
        out.write_text(json.dumps(changed) + "\n")
        return layer_run(*options, "--compare", str(out), *more)

    assert against(1000) == 0
    assert against(0.001) == 1
    assert "slower" in capsys.readouterr().out
    assert against(0.001, "--tolerance", "1e9") == 0
    capsys.readouterr()
    assert against(1, "--tokens", "5") == 2
    shown = capsys.readouterr()
    assert (
        "no case of this run; expected records with the same op, shape" in shown.err and not shown.out
    )  # said before anything is measured
    out.write_text(json.dumps({**record, "small": False}) + "\n")
    assert layer_run(*options, "--compare", str(out)) == 2
    shown = capsys.readouterr()
    assert "expected results of a small run; found those of a full run" in shown.err and not shown.out
    out.write_text(json.dumps({**record, "small": False}) + "\n" + json.dumps(record) + "\n")
    assert [r["small"] for r in report.read(out, True)] == [True]
    assert [r["small"] for r in report.read(out, False)] == [False]
    assert against(1, "--op", "forward", "decode", "--tokens", "12", "24") in (0, 1)  # what is new is not worse
    wrong = {**record, "status": "wrong", "reason": "y: of the test"}
    assert report.compare([wrong], [record], tolerance=0.1)
    assert not report.compare([{**wrong, "ours": False}], [record], tolerance=0.1)
    good = json.dumps(record)
    capsys.readouterr()
    for text, says in {
        "": "no records",
        "{": "line 1 is not a record of `layer --json`: not a JSON object",
        "[]\n": "not a JSON object",
        "[" * 100_000: "not a JSON object",
        '{"op": "forward"}\n': "shape is not of type str",
        good + "\n1": "line 2 is not a record",
        json.dumps({**record, "tokens": "24"}): "tokens is not of type int",
        json.dumps({**record, "op": ["forward"]}): "op is not of type str",
        json.dumps({**record, "ours": 1}): "ours is not of type bool",
        json.dumps({k: v for k, v in record.items() if k != "small"}): "small is not of type bool",
        json.dumps({**record, "eager": 3}): "the median_s of eager is not a positive number",
        json.dumps({**record, "graph": {}}): "the median_s of graph",
        **{
            json.dumps({**record, "eager": {"median_s": wrong}}): "the median_s of eager"
            for wrong in (0, -1, "1", None, float("nan"), float("inf"), 10**400, True)
        },
    }.items():
        out.write_text(text)
        assert layer_run(*options, "--compare", str(out)) == 2
        shown = capsys.readouterr()
        assert says in shown.err and shown.err.count("\n") == 1 and not shown.out, text[:200]
    assert layer_run(*options, "--compare", str(tmp_path / "none.jsonl")) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_what_could_be_measured_and_cannot_now_is_worse(tmp_path, capsys, monkeypatch):
    out = tmp_path / "old.jsonl"
    options = ("--shape", LAYER, "--op", "forward", "--peers")
    assert layer_run(*options, "--tokens", "4", "5", "--json", str(out)) == 0
    old, later = records_of(out)
    with_graph = {**old, "graph": old["eager"]}
    assert report.compare([old], [with_graph], tolerance=1e9)
    assert "forward 32x16x8x2 T 4 uniform fp32, moesmith: had a time, now none: graph\n" in capsys.readouterr().out
    assert not report.compare([{**old, "ours": False}], [{**with_graph, "ours": False}], tolerance=1e9)
    assert not report.compare([with_graph], [old], tolerance=1e9)
    assert not report.compare([old], [old, later], tolerance=1e9)  # which was not asked for
    assert report.compare([old], [old, later], tolerance=1e9, planned=[old, later])
    assert "T 5 uniform fp32, moesmith: had a time, now none: eager\n" in capsys.readouterr().out

    measure = layer.measure

    def too_large(entry: jobs.Entry, run: layer.Run) -> Any:
        if entry.tokens == 5:
            raise torch.OutOfMemoryError("of the test")
        return measure(entry, run)

    monkeypatch.setattr(layer, "measure", too_large)
    more = ("--compare", str(out), "--tolerance", "1e9")
    assert layer_run(*options, "--tokens", "4", *more) == 0
    assert layer_run(*options, "--tokens", "4", "5", *more) == 1


def test_ours_wrong_is_status_1(monkeypatch, capsys):
    def doubled(inputs: LayerInputs) -> Any:
        return lambda: 2 * moe_mlp(inputs.x, inputs.gate_up, inputs.down, inputs.weights, inputs.expert_ids)

    assert OURS.layer is not None
    monkeypatch.setitem(OURS.__dict__, "layer", doubled)
    assert layer_run("--shape", LAYER, "--op", "forward", "--peers", "loop") == 1
    assert "moesmith is wrong" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(tmp_path, capsys):
    peer, out = tmp_path / "stops.py", tmp_path / "out.jsonl"
    peer.write_text(
        "def stop(inputs):\n    if inputs.x.shape[0] == 7:\n        raise KeyboardInterrupt\n    return inputs.x\n"
    )
    options = ("--shape", LAYER, "--op", "forward", "--tokens", "5", "7", "9", "--peers", "--json", str(out))
    assert layer_run(*options, "--peer", f"{peer}:stop") == 130
    assert {r["tokens"] for r in records_of(out)} == {5}
    shown = capsys.readouterr()
    assert "T 5, d 32" in shown.out and "interrupted: 1 of 3 measured" in shown.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shape", "olmo"], "--shape olmo: unknown shape; expected T,d,n,E,K or one of deepseek_v3"),
        (["--shape", "1,2,3,4,x"], "not five integers; expected T,d,n,E,K"),
        (["--shape", "1,2,3,4,0"], "a size is out of range"),
        (["--shape", "1,2,3,4,5"], "K exceeds E; expected at most 4 experts per token; found 5"),
        (["--peers", "cublas"], "--peers cublas: unknown peer; expected one of dense"),
        (["--tokens", "0"], "expected an integer from 1 to 2147483647; found '0'"),
        (["--tokens", "2147483648"], "expected an integer from 1 to 2147483647; found '2147483648'"),
        (["--tokens", "9" * 5000], "expected an integer from 1 to 2147483647; found '999"),
        (["--shape", "2147483648,2,3,4,1"], "a size is out of range; expected integers from 1 to 2147483647"),
        (["--seed", "-1"], "expected an integer from 0 to 2^32 - 1; found '-1'"),
        (["--seed", "4294967296"], "expected an integer from 0 to 2^32 - 1; found '4294967296'"),
        (["--seconds", "-1"], "expected a finite number of at least 0; found '-1'"),
        (["--tolerance", "-0.1"], "expected a finite number of at least 0; found '-0.1'"),
        (["--tolerance", "nan"], "expected a finite number of at least 0; found 'nan'"),
        (["--tolerance", "inf"], "expected a finite number of at least 0; found 'inf'"),
        (["--op", "fly"], "invalid choice: 'fly'"),
        (["--routing", "zipff"], "--routing zipff: no such file; expected uniform, zipf, one-hot or"),
        (["--plot", "out.jpg"], "--plot out.jpg: not a PNG file; expected a name that ends in .png"),
        (["--plot", "no/such/out.png"], "no folder no/such"),
        (["--plot", "/proc/out.png"], "--plot /proc/out.png: "),
        (["--plot", "FOLDER.png"], "FOLDER.png: Is a directory"),
        (["--json", "/proc/none.jsonl"], "--json /proc/none.jsonl:"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    Path("FOLDER.png").mkdir()
    try:
        status: Any = layer_run(*options)
    except SystemExit as stop:
        status = stop.code
    shown = capsys.readouterr()
    assert status == 2 and says in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_a_peer_that_cannot_be_loaded_is_bad_input(tmp_path, peer_file, capsys):
    texts = {"broken": "1 / 0\n", "syntax": "def f(:\n", "leaves": "import sys\nsys.exit(0)\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    for spec, says in {
        f"{peer_file}:nobody": f"{peer_file} has no function nobody",
        f"{tmp_path}/none.py:f": f"no file {tmp_path}/none.py",
        f"{tmp_path}/broken.py:f": "ZeroDivisionError: division by zero",
        f"{tmp_path}/syntax.py:f": "SyntaxError: ",
        f"{tmp_path}/leaves.py:f": "SystemExit: 0",
        "nonsense": "expected FILE.py:FUNCTION",
    }.items():
        assert layer_run("--shape", LAYER, "--op", "forward", "--peer", spec) == 2
        shown = capsys.readouterr()
        assert f"benchmarks layer: --peer {spec}: " in shown.err and says in shown.err
        assert shown.err.count("\n") == 1 and not shown.out


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, None, RuntimeError])
def test_what_does_not_fit_is_left_out(monkeypatch, capsys, error):
    measure = layer.measure

    def too_large(entry: jobs.Entry, run: layer.Run) -> Any:
        if entry.tokens == 5 and error is None:
            return torch.empty(2**55)
        if entry.tokens == 5:
            raise error("of the test")
        return measure(entry, run)

    monkeypatch.setattr(layer, "measure", too_large)
    options = ("--shape", LAYER, "--op", "forward", "--peers", "--tokens", "5", "6")
    if error is RuntimeError:
        with pytest.raises(RuntimeError, match="of the test"):
            layer_run(*options)
        return
    assert layer_run(*options) == 1
    shown = capsys.readouterr()
    assert "T 5, d 32, n 16, E 8, K 2), uniform, fp32: not enough memory" in shown.err and "(T 6, d 32" in shown.out


@pytest.mark.parametrize("at_a_time", [1, 9, 2**26])
def test_sums_that_are_taken_in_parts_see_every_element(monkeypatch, at_a_time):
    monkeypatch.setattr(jobs, "AT_A_TIME", at_a_time)
    tensor = torch.randn(2, 3, 4).bfloat16()
    bits = tensor.view(torch.int16).long().view(6, 4)
    weighed = tuple(int((bits.sum(dim=d) * torch.arange(1, bits.shape[1 - d] + 1)).sum()) for d in (1, 0))
    assert jobs._sums(tensor) == weighed
    seen = {weighed}
    for i in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[i] += 1
        seen.add(jobs._sums(changed))
    seen.add(jobs._sums(tensor.flip(0)))
    assert len(seen) == tensor.numel() + 2


ILLEGAL = "CUDA error: an illegal memory access was encountered"
POISON = f"""
from benchmarks import jobs

def unusable(*_):
    raise RuntimeError("{ILLEGAL}")

def poison(inputs):
    if inputs.x.shape[0] == 7:
        jobs._sums = unusable
        unusable()
    return inputs.x
"""


@pytest.fixture
def poison(tmp_path, monkeypatch) -> str:
    """A peer that fails at 7 tokens, after which the inputs cannot be looked at, as after a kernel's error on a GPU."""
    monkeypatch.setattr(jobs, "_sums", jobs._sums)  # put back
    file = tmp_path / "poison.py"
    file.write_text(POISON)
    return f"{file}:poison"


def test_what_an_unusable_device_leaves(poison, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = ("--shape", LAYER, "--op", "forward", "--tokens", "5", "7", "9", "--peers", "loop", "--json", str(out))
    assert layer_run(*options, "--peer", poison) == 3
    found = {(r["tokens"], r["candidate"]): (r["status"], r["reason"]) for r in records_of(out)}
    after = f"{poison} left the device unusable: RuntimeError: {ILLEGAL}"
    assert found == {
        (5, "moesmith"): ("right", None),
        (5, "loop"): ("right", None),
        (5, poison): ("wrong", found[5, poison][1]),
        (7, "moesmith"): ("not measured", after),
        (7, "loop"): ("not measured", after),
        (7, poison): ("failed", f"RuntimeError: {ILLEGAL}"),
    }
    shown = capsys.readouterr()
    assert f"{after}; 1 of 3 measured\n" in shown.err and "T 9" not in shown.out + shown.err
    assert f"moesmith is not measured: {after}" in shown.out


def test_inputs_that_cannot_be_looked_at_after_a_candidate_are_its_fault():
    def unusable() -> list[str]:
        raise RuntimeError(ILLEGAL)

    job = jobs.prepare(jobs.Entry("forward", Shape("", 32, 16, 8, 2), 5, "uniform", "fp32"), "cpu", 0)
    for error, reason in ((None, ILLEGAL), (ValueError("its own"), "its own")):
        candidate = layer.Candidate(OURS)
        lost = pytest.raises(layer.Lost, match=f"moesmith left the device unusable: .*{reason}")
        with lost, layer._guarded(candidate, job, unusable):
            if error:
                raise error
        assert candidate.status == "failed" and reason in candidate.fault


@pytest.mark.parametrize("lacks_memory", [True, False])
def test_later_results_that_cannot_be_judged_get_no_number(tmp_path, monkeypatch, lacks_memory):
    layers, out = jobs._layer, tmp_path / "out.jsonl"

    def with_a_failing_renewal(given: LayerInputs, *rest: Any) -> jobs.Job:
        job = layers(given, *rest)
        if given.x.shape[0] != 7:
            return job

        def renew() -> None:
            raise torch.OutOfMemoryError("of the test") if lacks_memory else RuntimeError(ILLEGAL)

        return dataclasses.replace(job, renew=renew)

    monkeypatch.setattr(jobs, "_layer", with_a_failing_renewal)
    options = ("--shape", LAYER, "--op", "forward", "--tokens", "7", "9", "--peers", "loop", "--json", str(out))
    assert layer_run(*options) == (0 if lacks_memory else 3)
    by_tokens = {tokens: [r for r in records_of(out) if r["tokens"] == tokens] for tokens in (7, 9)}
    assert [r["status"] for r in by_tokens[7]] == ["not measured"] * 2
    assert all("later results could not be judged" in r["reason"] and "eager" not in r for r in by_tokens[7])
    assert [r["status"] for r in by_tokens[9]] == (["right"] * 2 if lacks_memory else [])


def test_a_device_that_fails_between_candidates_ends_the_run_in_a_line(monkeypatch, capsys):
    def failing(*_: Any) -> Any:
        raise torch.AcceleratorError(ILLEGAL)

    monkeypatch.setattr(layer, "measure", failing)
    assert layer_run("--shape", LAYER, "--op", "forward", "--peers", "--tokens", "5", "6") == 3
    assert capsys.readouterr().err.endswith(f"the device failed: {ILLEGAL}; 0 of 2 measured\n")


def test_a_profile_that_fails_costs_no_measurement(monkeypatch, capsys):
    def failing(*_: Any) -> Any:
        raise RuntimeError("of the test")

    monkeypatch.setattr(layer, "profile", failing)
    assert layer_run("--shape", LAYER, "--op", "forward", "--peers", "--tokens", "5", "6", "--profile") == 0
    shown = capsys.readouterr()
    assert shown.err.count("no profile: RuntimeError: of the test") == 2 and "(T 6, d 32" in shown.out


@pytest.mark.parametrize("fails", [False, True])
def test_no_waiting_hides_torchs_warning_and_nothing_else(monkeypatch, fails):
    modes = []

    def set_sync_debug_mode(mode: str) -> None:
        modes.append(mode)
        text = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        warnings.warn(text, UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    with contextlib.suppress(ZeroDivisionError), cuda.no_waiting():
        assert modes == ["error"]
        with pytest.warns(UserWarning, match="another"):
            warnings.warn("another", UserWarning, stacklevel=1)
        _ = 1 / (not fails)
    assert modes == ["error", "default"]


def test_on_a_gpu_ours_is_the_kernels_or_an_error(monkeypatch):
    """Never torch's operators in their place."""
    tiers = []

    def called(*_: Any, tier: str, **__: Any) -> Any:
        tiers.append(tier)
        return SimpleNamespace(weights=None, expert_ids=None)

    for name in ("moe_mlp", "grouped_mm", "route"):
        monkeypatch.setattr(peers, name, called)
    for device, tier in (("cuda:0", "triton"), ("cpu", "auto")):
        tensor: Any = SimpleNamespace(device=torch.device(device))
        assert OURS.layer and OURS.gemm and OURS.route
        OURS.layer(LayerInputs(*(tensor,) * 6, train=False))()
        OURS.gemm(peers.GemmInputs(tensor, tensor, tensor))()
        OURS.route(RouteInputs(tensor, 1))()
        assert [tiers.pop() for _ in range(3)] == [tier] * 3


def triton_kernels(with_matmul: bool) -> dict[str, Any]:
    """triton_kernels in plain torch, with the interface for triton 3.7 or for 3.6."""

    def metadata(counts: torch.Tensor, rows: int) -> torch.Tensor:
        assert counts.dtype == torch.int32 and int(counts.sum()) == rows
        return counts

    def product(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor, gammas: torch.Tensor | None) -> torch.Tensor:
        parts = a.split(counts.tolist())
        y = torch.cat([part @ matrix for part, matrix in zip(parts, b, strict=True)])
        return y if gammas is None else (y * gammas[:, None]).to(y.dtype)

    def matmul(a, b, bias, *, a_ragged_metadata, gather_indx=None, scatter_indx=None, gammas=None):
        assert bias is None and all(t is None or t.dtype == torch.int32 for t in (gather_indx, scatter_indx))
        y = product(a if gather_indx is None else a[gather_indx], b, a_ragged_metadata, gammas)
        return y if scatter_indx is None else torch.empty_like(y).index_copy_(0, scatter_indx.long(), y)

    def matmul_ogs(x, w, bias, routing_data, *, gather_indx=None, scatter_indx=None, gammas=None):
        assert bias is None and torch.equal(routing_data.expt_hist, routing_data.expt_data)
        for index in filter(None, (gather_indx, scatter_indx)):
            assert torch.equal(index.dst_indx[index.src_indx], torch.arange(len(index.src_indx), dtype=torch.int32))
        rows = x if gather_indx is None else x[gather_indx.src_indx // routing_data.n_expts_act]
        y = product(rows, w, routing_data.expt_data, gammas)
        if scatter_indx is None:
            return y
        return y[scatter_indx.src_indx].unflatten(0, (-1, routing_data.n_expts_act)).sum(dim=1)

    def record(*names: str) -> Any:
        return lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True)))

    indices = record("src_indx", "dst_indx")
    routing_data = record("gate_scal", "expt_hist", "n_expts_tot", "n_expts_act", "expt_data")
    older = {"GatherIndx": indices, "ScatterIndx": indices, "RoutingData": routing_data, "matmul_ogs": matmul_ogs}
    modules = {
        "tensor": {"make_ragged_tensor_metadata": metadata},
        "matmul": {"matmul": matmul} if with_matmul else None,
        "reduce": {"reduce": lambda x, dim: (x.sum(dim=dim), None)} if with_matmul else None,
        "matmul_ogs": None if with_matmul else older,
    }
    found = {f"triton_kernels.{name}": SimpleNamespace(**names) if names else None for name, names in modules.items()}
    return {"triton_kernels": SimpleNamespace(), **found}


@pytest.mark.parametrize("with_matmul", [True, False], ids=["matmul", "matmul_ogs"])
@pytest.mark.parametrize("op", ["forward", "gemm", "gemm_dx"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_triton_kernels_is_called_as_it_asks_for(monkeypatch, with_matmul, op, top_k):
    for name, module in triton_kernels(with_matmul).items():
        monkeypatch.setitem(sys.modules, name, module)
    peer = next(peer for peer in PEERS if peer.name == "triton_kernels")
    job = jobs.prepare(jobs.Entry(op, Shape("", 32, 16, 8, top_k), 24, "zipf", "fp32"), "cpu", 0)
    verdicts = job.judge(job.build(peer)())
    assert all(verdict.right for verdict in verdicts.values()), verdicts
    padded = jobs.prepare(jobs.Entry("gemm_dw", Shape("", 32, 16, 8, 2), 24, "uniform", "fp32"), "cpu", 0)
    with pytest.raises(ValueError, match="requires groups padded with zeros"):
        padded.build(peer)
    assert not jobs.able(peer, "train") and not jobs.able(peer, "route")


def configurations() -> dict[str, list[Any]]:
    """As Liger-Kernel 0.8.5 has them."""

    def made(stages: list[int], **sizes: list[int]) -> list[Any]:
        tiles = [dict(zip(sizes, tile, strict=True)) for tile in itertools.product(*sizes.values())]
        return [
            SimpleNamespace(kwargs=tile, num_stages=n, num_warps=w) for tile in tiles for n in stages for w in (4, 8)
        ]

    return {
        "_up": made([2, 3, 4, 5], BLOCK_N=[64, 128], BLOCK_K=[32, 64]),
        "_dw": made([2], BLOCK_M=[64, 128], BLOCK_N=[64, 128], BLOCK_K=[16, 32]),
        "_sum": made([4], BLOCK_H=[64, 128, 256, 512], BLOCK_K=[1, 2, 4, 8, 16]),
        "_other": made([1], SIZE=[1, 2]),
    }


def test_liger_is_tuned_over_a_part_of_its_configurations_and_says_so(monkeypatch):
    kernels = SimpleNamespace(**{name: SimpleNamespace(configs=found) for name, found in configurations().items()})
    kernels.triton, kernels.configs = sys, None  # what else a module may hold
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe_kernels", kernels)
    says = "autotuned over up 6 of 32, dw 4 of 16, sum 4 of 40, other 4 of 4 configurations"
    monkeypatch.setattr(peers, "_liger_tuning", peers._liger_tuning.__wrapped__)
    assert peers._liger_tuning() == says
    assert {(c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"]) for c in kernels._up.configs} == {(128, 64)}
    assert {(c.num_stages, c.num_warps) for c in kernels._up.configs} == {(n, w) for n in (2, 3, 4) for w in (4, 8)}
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe_kernels", None)
    assert peers._liger_tuning() == "autotuned over all configurations"


def test_a_note_on_a_peer_is_in_its_records(monkeypatch, capsys, tmp_path):
    noted = Peer("noted", OURS.layer, note=lambda: "of the test")
    monkeypatch.setattr(layer, "PEERS", (noted,))
    out = tmp_path / "out.jsonl"
    assert layer_run("--shape", LAYER, "--op", "forward", "--json", str(out)) == 0
    assert [r["note"] for r in records_of(out)] == [None, "of the test"]
    assert "noted: of the test\n" in capsys.readouterr().out


def test_packing_on_a_gpu_without_kernels_is_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "moe_triton", None)
    why_no_kernels.cache_clear()
    assert main(["parallel", "--device", "cuda", "--part", "pack"]) == 2
    why_no_kernels.cache_clear()
    assert "benchmarks parallel: --device cuda: cannot import moe_triton (" in capsys.readouterr().err


def test_a_full_disk_is_one_line(capsys):
    assert layer_run("--shape", LAYER, "--op", "forward", "--peers", "--json", "/dev/full") == 2
    assert capsys.readouterr().err.endswith("benchmarks layer: --json /dev/full: No space left on device\n")


def test_ctrl_c_at_any_time_is_one_line(capsys, monkeypatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    for module, name, arguments in (
        (layer, "ceilings", ["layer", "--device", "cpu"]),
        (layer, "parse_shape", ["layer", "--shape", LAYER]),
        (cpu, "reference", ["cpu", "--small"]),
        (cpu, "preset", ["cpu"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            assert main(arguments) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "benchmarks: interrupted"


def test_list_tells_what_is_here_and_what_is_not(capsys, monkeypatch):
    monkeypatch.setattr(
        layer, "PEERS", (*PEERS, Peer("elsewhere", needs="nowhere_at_all"), Peer("gpu", cuda_only=True))
    )
    assert layer_run("--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*SHAPES, *jobs.OPS)) and "present: torch (" in shown
    assert "absent: elsewhere (ModuleNotFoundError: No module named 'nowhere_at_all')" in shown
    assert "absent: gpu (needs CUDA)" in shown


def test_benchmarks_need_neither_tyro_nor_transformers_nor_matplotlib():
    refuse = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('tyro', 'transformers', 'matplotlib', 'triton', 'tokenizers'):\n"
        "            raise ImportError('refused ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from benchmarks.__main__ import main\n"
        f"assert main(['layer', '--device', 'cpu', '--shape', '{LAYER}', '--seconds', '0', '--op', 'train']) == 0\n"
        "assert main(['layer', '--plot', 'out.png']) == 2\n"
        f"assert main(['parallel', '--part', 'pack', '--device', 'cpu', '--small', '--shape', '{LAYER}']) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", refuse], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "absent: transformers-eager (ImportError: refused transformers)" in done.stdout
    assert "--plot: refused matplotlib; pip install matplotlib" in done.stderr


def test_help_shows_the_way_in(capsys):
    assert main([]) == 2
    assert "python -m benchmarks layer --small" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["layer", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"  {op} " in shown for op in jobs.OPS if not op.startswith("gemm_"))
