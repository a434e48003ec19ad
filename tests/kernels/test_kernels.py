"""The Triton kernels without a GPU: interpreted, compiled for every target, launched on tensors without data.

The interpreter computes bfloat16 wrongly and cannot share a process with compilation, hence the subprocesses; what they
run are the operators' own tests, on the kernels (see tests/support/kernels.py).
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_triton import grouped_gemm, mlp, permutation, routing, tiling

import moe
from benchmarks.shapes import SHAPES as BENCHMARKED
from benchmarks.shapes import Shape
from moe import ops
from moe.ops.library import kernels_for
from tests.compiled import complaint, layer, meta, others, products, slow_on_hopper
from tests.support.cases import BY_NAME
from tests.support.launches import GPUS, Code, Gpu, Launch, Resources, copies_ahead, instructions, ptx, record

ROOT = Path(__file__).parents[2]


def test_the_operators_in_the_interpreter() -> None:
    """Values and gradients of every operator over the table of cases, between guard bands; offsets around 2^31."""
    files = ("tests/ops/test_ops.py", "tests/ops/test_routing.py", "tests/kernels/offsets.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.kernels"]
    command += ["-k", "not see"]  # without the tests of the tests ("the bounds see")
    running = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/2", *files],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate()[0] for process in running]
    passed = 0
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
        passed += int(re.search(r"(\d+) passed", output)[1])  # pyright: ignore[reportOptionalSubscript]
    assert passed > 400, passed  # what is left out is left out by dtype alone


def test_tier_triton_on_the_cpu() -> None:
    code = (
        "from unittest import mock\n"
        "import torch\n"
        "from moe_triton import mlp\n"
        "from tests.support.cases import BY_NAME\n"
        "from tests.support.running_error import beyond, moe_mlp_errors\n"
        "from tests.ops.test_ops import fused, gradients\n"
        "i = BY_NAME['ragged'].inputs(torch.float32)\n"
        "errors = moe_mlp_errors(i, torch.ones_like(i.x))\n"
        "for tier in ('triton', 'auto'):\n"
        "    names = ('moe_mlp_forward', 'moe_mlp_backward')\n"
        "    calls = [mock.patch.object(mlp, name, wraps=getattr(mlp, name)).start() for name in names]\n"
        "    found = gradients(lambda i: fused(i, tier=tier), i, torch.ones_like(i.x))\n"
        "    mock.patch.stopall()\n"
        "    assert all(call.called == (tier == 'triton') for call in calls), (tier, calls)\n"
        "    assert not beyond(found, errors), (tier, beyond(found, errors))\n"
        "try:\n"
        "    fused(BY_NAME['ragged'].inputs(torch.float64), tier='triton')\n"
        "except ValueError as error:\n"
        "    assert 'float64' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
        "from moe import ops\n"
        "from moe_triton import grouped_gemm, routing\n"
        "called = []\n"
        "for page, name in ((grouped_gemm, 'grouped_mm'), (routing, 'route'), (routing, 'route_backward')):\n"
        "    def counted(*args, kernel=getattr(page, name), name=name):\n"
        "        called.append(name)\n"
        "        return kernel(*args)\n"
        "    setattr(page, name, counted)\n"
        "offs = torch.tensor([2, 6], dtype=torch.int32)\n"
        "a, b = torch.randn(6, 16, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)\n"
        "ops.grouped_mm(a, b, offs, tier='triton').sum().backward()\n"
        "logits = torch.randn(6, 8, requires_grad=True)\n"
        "ops.route(logits, top_k=2, tier='triton').weights.sum().backward()\n"
        "assert called == ['grouped_mm'] * 3 + ['route', 'route_backward'], called\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    i = BY_NAME["ragged"].inputs(torch.float32)
    with pytest.raises(ValueError, match="tier = 'triton': tensors are on the CPU, where kernels run only in Triton's"):
        ops.moe_mlp(i.x, i.gate_up, i.down, i.weights, i.expert_ids, tier="triton")


def test_an_id_that_names_no_expert_stops_the_kernels() -> None:
    """The first kernel that reads the ids asserts, on the path for few tokens too; Triton keeps that with `debug`."""
    for save, kernel in ((True, "count_kernel"), (False, "combine_kernel")):
        asserting = [launch for launch in forward(32, save=save) if dict(launch.options).get("debug")]
        assert [launch.name for launch in asserting] == [kernel]
        assert "assertfail" in ptx(asserting[0], GPUS["sm_90"])
        (other,) = {launch.name: launch for launch in forward(32, save=save) if "up_kernel" in launch.name}.values()
        assert "assertfail" not in ptx(other, GPUS["sm_90"])


@pytest.mark.parametrize(("gpu", "shape"), [("sm_90", "deepseek_v3"), ("sm_80", "gpt_oss_20b")])
def test_compiles_without_spills(gpu: str, shape: str) -> None:
    """A part of what `python -m tests.compiled` does for every shape, dtype, token count and target."""
    found: dict[tuple, Launch] = {}
    for tokens in (64, 32768):
        chosen = layer(
            tokens, BENCHMARKED[shape], torch.bfloat16, GPUS[gpu].shared_memory, gpt_oss=shape.startswith("gpt_oss")
        )
        found |= {launch.key: launch for launch in chosen}
    assert {launch.name for launch in found.values()} >= {"up_kernel", "rows_kernel", "products_kernel"}
    wrong = [text for launch in found.values() if (text := complaint(launch, GPUS[gpu]))]
    assert not wrong


@pytest.mark.parametrize(
    ("tile", "expected"),
    [
        (tiling.Tile(128, 256, 64, 4, 3), "spills"),
        (tiling.Tile(128, 128, 128, 8, 5), "bytes of shared memory of"),
        (tiling.Tile(128, 256, 64, 8, 2), "wait for their operands"),
        (tiling.Tile(16, 64, 128, 4, 4), None),
    ],
    ids=str,
)
def test_the_complaints_see(monkeypatch: pytest.MonkeyPatch, tile: tiling.Tile, expected: str | None) -> None:
    monkeypatch.setattr(tiling, "rows_tile", lambda *_: tile)
    (up,) = (launch for launch in forward(32768) if launch.name == "up_kernel")
    found = complaint(up, GPUS["sm_90"])
    assert found is None if expected is None else expected in (found or "")


def test_the_limits_on_the_machine_code_see(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward() -> str | None:
        launches = layer(32768, BENCHMARKED["olmoe"], torch.bfloat16, 232448)
        return complaint(next(launch for launch in launches if launch.name == "hidden_backward_kernel"), GPUS["sm_90"])

    assert backward() is None
    monkeypatch.setattr(tiling, "hidden_backward_tile", lambda *_: tiling.Tile(128, 128, 64, 8, 4))
    assert backward() == "programs per multiprocessor: expected 2; found 1"
    launches = layer(32768, BENCHMARKED["olmoe"], torch.bfloat16, 232448)
    gradient = next(launch for launch in launches if launch.name == "products_kernel")
    fine = Resources(197376, 0, 209, 8, 0, 6, Code(500, 170, 400), 1)
    assert slow_on_hopper(gradient, fine) is None
    slow = dataclasses.replace(fine, code=Code(500, 171, 400))
    assert slow_on_hopper(gradient, slow) == f"instructions per step: expected at most 170; found {slow.code}"


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x1, PT ;
        /*0020*/              @!P0 BRA 0x70 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   IADD3 R2, R2, -0x1, RZ ;
        /*0060*/               @P1 BRA 0x30 ;
        /*0070*/                   STG.E.128 [R6.64], R24 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


TTGIR = """
  tt.func public @kernel() attributes {noinline = false} {
    %1 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (f32)  : i32 {
      %2 = ttg.async_wait %t {num = 3 : i32} loc(#loc1)
      %3 = ttng.warp_group_dot %p, %q, %x : f32
      %4 = scf.if %d -> (f32) {
        %5 = ttg.async_wait %t {num = 0 : i32}
        scf.yield %x : f32
      } else {
        scf.yield %y : f32
      } loc(#loc2)
      scf.yield %3 : f32 loc(#loc3)
    } loc(#loc4)
    %6 = scf.if %d -> (f32) {
      %7 = tt.load %p : f32
      %8 = ttng.warp_group_dot %7, %q, %1 : f32
      scf.yield %8 : f32
    } else {
      scf.yield %1 : f32
    }
    tt.return
  }
"""


def test_copies_under_way_are_counted_in_loops_only() -> None:
    assert copies_ahead(TTGIR) == 3
    assert copies_ahead(TTGIR.replace("%2 = ttg.async_wait %t {num = 3", "%2 = tt.load %t {num = 3")) == 0
    assert copies_ahead(TTGIR.replace("num = 3", "num = 0")) == 0
    assert copies_ahead(TTGIR.replace("scf.for", "scf.if")) is None


def test_instructions_are_counted() -> None:
    assert instructions(SASS) == Code(before=3, step=4, after=2)
    assert instructions(SASS.replace("HGMMA", "FFMA")) is None


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])
def test_gathering_takes_more_stages(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    def weight_gradient() -> str | None:
        launches = layer(32768, BENCHMARKED["olmoe"], torch.bfloat16, GPUS[gpu].shared_memory)
        return complaint(next(launch for launch in launches if launch.name == "products_kernel"), GPUS[gpu])

    assert weight_gradient() is None
    monkeypatch.setattr(tiling, "gathering", lambda tile: tile)
    assert weight_gradient() == "products wait for their operands"


def forward(tokens: int, *, shape: Shape = BENCHMARKED["olmoe"], save: bool = True) -> list[Launch]:
    d, n, experts, top_k = shape.sizes
    weights, ids = meta(tokens, top_k, dtype=torch.float32), meta(tokens, top_k, dtype=torch.int64)
    x, gate_up, down = (meta(*s, dtype=torch.bfloat16) for s in ((tokens, d), (experts, 2 * n, d), (experts, d, n)))
    return record(mlp.moe_mlp_forward, x, gate_up, down, weights, ids, None, None, None, 1.0, 0.0, save)


def test_no_launcher_waits_for_the_device() -> None:
    """Tensors on the meta device have no values to wait for: whatever passes here can be captured in a CUDA graph."""
    with pytest.raises(RuntimeError, match="meta"):
        record(lambda: meta(1, dtype=torch.float32).item())
    for tokens in (0, 1, 2, 63, 64, 65, 4096):
        for gpt_oss in (False, True):
            assert layer(tokens, BENCHMARKED["olmoe"], torch.bfloat16, 232448, gpt_oss=gpt_oss) or tokens == 0
    assert products(BENCHMARKED["olmoe"], torch.float16, 101376) and others(torch.float32)


def test_nothing_is_compiled_for_a_token_count() -> None:
    """At most three binaries for each kernel of the layer, whatever T is: one for each height of the row tiles, and of
    those for few tokens one for each length of the list of slots."""
    shape = BENCHMARKED["olmoe"]
    names: dict[str, set] = {}
    for tokens in (*range(1, 201), 1000, 1024, 4096, 4097, 32768, 40960):
        for launch in layer(tokens, shape, torch.bfloat16, 232448):
            names.setdefault(launch.name, set()).add(launch.key)
    tiled = {
        "up_kernel": 3 + 3,
        "rows_kernel": 3 + 3,
        "hidden_backward_kernel": 3,
        "small_up_kernel": 3,
        "small_down_kernel": 3,
    }  # with and without SAVE; down and up
    combined = {"combine_kernel": 3}  # by position, by slot, without weights
    for name, keys in names.items():
        limit = (tiled | combined | {"products_kernel": 2}).get(name, 1)
        assert len(keys) <= limit, (name, len(keys))
    before = {kind: len(keys) for kind, keys in names.items()}
    for tokens in range(65, 20000, 977):
        for launch in layer(tokens, shape, torch.bfloat16, 232448):
            names[launch.name].add(launch.key)
    assert before == {kind: len(keys) for kind, keys in names.items()}


def test_few_tokens_take_three_launches() -> None:
    for tokens in (1, 64):
        names = [launch.name for launch in forward(tokens, save=False)]
        assert names == ["small_up_kernel", "small_down_kernel", "combine_kernel"]
    assert len(forward(65, save=False)) == 7


def test_the_grid_covers_every_routing() -> None:
    """The number of tiles is bounded from shapes alone; no routing may need more."""
    for rows, groups in ((1, 1), (5, 3), (130, 4), (64, 64), (1000, 7)):
        for block in (16, 64, 128):
            _, tiles = permutation_layout(rows, groups, block)
            one_each = min(groups, rows)
            worst = (one_each - 1) + -(-(rows - one_each + 1) // block)
            spread = sum(-(-(rows // groups + (g < rows % groups)) // block) for g in range(groups))
            assert tiles >= max(worst, spread, -(-rows // block))


def permutation_layout(rows: int, groups: int, block: int) -> tuple[list[Launch], int]:
    counts = meta(groups + 1, dtype=torch.int32)
    found: list[int] = []

    def call() -> None:
        _, tiles = permutation.layout(counts, rows, groups, from_ends=False, block_m=block)
        assert tiles is not None
        found.append(tiles.count)

    return record(call), found[0]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_every_tile_fits_the_chip(gpu: Gpu) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for mean in (1, 16, 17, 64, 96, 97, 5000):
            block_m = tiling.row_block(dtype, mean * 8, 8)
            shared = gpu.shared_memory
            for tile in (
                tiling.rows_tile(dtype, block_m, shared),
                tiling.hidden_backward_tile(dtype, block_m, shared, False),
                tiling.hidden_backward_tile(dtype, block_m, shared, True),
                *(tiling.products_tile(dtype, m, n, shared) for m, n in ((4096, 1024), (64, 4096), (24, 24))),
            ):
                assert tile.shared_memory(dtype.itemsize) <= shared
                assert tile.block_n >= 32 and tile.block_k >= 16 and tile.num_stages >= 2
            assert tiling.rows_tile(dtype, block_m, shared).block_m == block_m


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_more_experts_than_shared_memory_counts_are_refused(gpu: Gpu) -> None:
    def launches(experts: int) -> list[Launch]:
        x, ids = meta(64, 8, dtype=torch.bfloat16), meta(64, 2, dtype=torch.int64)
        return record(permutation.permute, x, ids, experts, shared_memory=gpu.shared_memory)

    most = 32766 if gpu.shared_memory >= 4 * 32768 else 16382
    with pytest.raises(ValueError) as refused:
        launches(most + 1)
    expected = f"expected at most {most}; found {most + 1}"
    assert str(refused.value) == f"num_experts: more than the shared memory of meta can count; {expected}"
    count = next(launch for launch in launches(most) if launch.name == "count_kernel")
    assert dict(count.constants)["GROUPS"] * 4 <= gpu.shared_memory


def test_every_operator_has_kernels() -> None:
    for page, names in {
        grouped_gemm: ("grouped_mm",),
        mlp: ("moe_mlp_forward", "moe_mlp_backward"),
        permutation: ("permute", "unpermute", "unpermute_backward"),
        routing: ("route", "route_backward"),
    }.items():
        assert all(callable(getattr(page, name)) for name in names)
    assert kernels_for("mlp", [torch.zeros(1)]) is None  # CPU tensors


def test_the_compiled_layer_is_not_compiled_again_for_another_token_count() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    layer = moe.MoELayer(16, 8, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, seed=0)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in range(2, 202):
        x = torch.randn(tokens, 16, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y, layer(x))
        y.sum().backward()
        assert len(graphs) <= min(tokens - 1, 2), tokens
    for tokens in (0, 1):
        before = len(graphs)
        assert compiled(torch.randn(tokens, 16)).shape == (tokens, 16)
        assert len(graphs) <= before + 1
