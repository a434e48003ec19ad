"""What a load costs: memory, models that do not fit, the progress bar; and wrong arguments."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moe
from moe import CheckpointError
from moe.checkpoint.convert import convert
from moe.checkpoint.format.layout import layout
from moe.checkpoint.reading import load as reading
from moe.checkpoint.reading import memory
from tests import skeletons
from tests.support.checkpoint_cases import V3, configure
from tests.support.quantised_checkpoints import GPT_OSS, is_quantised

MIB = 2**20

# Stacked experts of 96 MiB each in bf16, which are the largest tensors of gpt-oss's layout.
WIDE = dataclasses.replace(GPT_OSS, moe_intermediate_size=2048, hidden_size=1024, n_routed_experts=12)
WIDE = dataclasses.replace(WIDE, intermediate_size=2048, num_hidden_layers=2)
MANY = dataclasses.replace(V3, hidden_size=1024, moe_intermediate_size=1024, vocab_size=30_000, num_hidden_layers=4)

MEASURED = """
import json, sys
from pathlib import Path
import torch, moe

def kib(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))

small, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype, dtype)
moe.load(small, dtype=dtype)  # imports and caches
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kib("VmRSS")
model = moe.load(folder, dtype=dtype)
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(json.dumps({"peak": (kib("VmHWM") - before) * 1024, "model": size}))
"""


def zeros(config: moe.ModelConfig, folder: Path) -> Path:
    with torch.device("meta"):
        model = moe.Transformer(config)
    state = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.save(folder)
    return folder


def fp8(config: moe.ModelConfig, folder: Path) -> Path:
    zeros(config, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, slot in layout(config).items():
        quantised = is_quantised(name)
        kind = torch.float32 if name.endswith("bias") else torch.float8_e4m3fn if quantised else torch.bfloat16
        tensors[name] = torch.zeros(slot.shape, dtype=kind)
        if quantised:
            tensors[name + "_scale_inv"] = torch.ones([-(-n // 128) for n in slot.shape])
    save_file(tensors, folder / "model.safetensors")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    configure(folder, quantization_config=quantization)
    return folder


def mxfp4(config: moe.ModelConfig, folder: Path) -> Path:
    wide = zeros(config, folder.with_name(folder.name + ".wide"))
    convert(wide, folder, table="mxfp4")
    return folder


@pytest.mark.parametrize(
    ("make", "config", "dtype"),
    [
        (zeros, MANY, "auto"),
        (zeros, MANY, "float32"),
        (fp8, MANY, "auto"),
        (fp8, MANY, "keep"),
        (zeros, WIDE, "auto"),
        (mxfp4, WIDE, "auto"),
        (mxfp4, WIDE, "keep"),
    ],
    ids=["bf16", "bf16 to fp32", "fp8", "fp8 kept", "stacked", "mxfp4", "mxfp4 kept"],
)
def test_peak_memory(tmp_path: Path, make: Any, config: moe.ModelConfig, dtype: str) -> None:
    """At most the model, 1.1 times the largest tensor of the files, and 64 MiB."""
    small = dict(hidden_size=128, moe_intermediate_size=64, vocab_size=100, intermediate_size=64)
    folder = make(config, tmp_path / "large")
    tiny = make(dataclasses.replace(config, **small), tmp_path / "tiny")
    largest = max(info.nbytes for info in reading.plan(folder).tensors.values())
    command = [sys.executable, "-c", MEASURED, str(tiny), str(folder), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread has a stack and an arena
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] > 64 * MIB
    assert found["peak"] <= found["model"] + 1.1 * largest + 64 * MIB, f"{found['peak'] / MIB:.0f} MiB"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    moe.Transformer(V3, seed=1).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(t.numel() * 4 for t in moe.load(saved).state_dict().values())
    monkeypatch.setattr(memory, "free_bytes", lambda device: (need, "memory"))
    moe.load(saved)
    monkeypatch.setattr(memory, "free_bytes", lambda device: (need - 1, "memory"))
    monkeypatch.setattr(reading, "Transformer", None)  # the first thing that is made
    expected = f"does not fit into memory; expected at most {need - 1:,} bytes, which are free; found {need:,} bytes"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        moe.load(saved)


def test_what_is_free() -> None:
    code = (
        "import resource, torch\n"
        "from moe.checkpoint.reading.memory import free_bytes\n"
        "free, what = free_bytes(torch.device('cpu'))\n"
        "assert 2**26 < free < 2**50, free\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\n"
        "assert free_bytes(torch.device('cpu'))[0] <= free\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
        "tight, why = free_bytes(torch.device('cpu'))\n"
        "assert 0 <= tight < 2**33, (tight, why)\n"
        "assert 'ulimit' in why or tight < 2**32, (tight, why)\n"  # or the machine has less than that left
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("group", "limits", "free"),
    [
        ("0::/", {"memory.max": 900, "memory.current": 500}, 400),
        ("0::/job/step", {"job/step/memory.max": 900, "job/step/memory.current": 500}, 400),
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": 900, "job/memory.current": 800}, 100),
        ("0::/job/step", {"job/memory.max": 900, "job/memory.current": 950}, 0),
        ("0::/job", {"job/memory.max": 900, "job/memory.current": 800, "job/memory.stat": "inactive_file 50"}, 150),
        (
            "4:cpu,memory:/job\n0::/",
            {"memory/job/memory.limit_in_bytes": 700, "memory/job/memory.usage_in_bytes": 100},
            600,
        ),
        ("4:memory:/elsewhere", {"memory/memory.limit_in_bytes": 700, "memory/memory.usage_in_bytes": 100}, 600),
        ("", {}, 2048),
    ],
)
def test_limits_of_control_groups(
    group: str, limits: dict[str, Any], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits of the process's group and of its parents; the machine has 2 KiB available."""
    files = {f"/sys/fs/cgroup/{name}": str(value) for name, value in limits.items()}
    files |= {"/proc/self/cgroup": group, "/proc/meminfo": "MemTotal: 4 kB\nMemAvailable: 2 kB"}
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, "").splitlines())
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    found, what = memory.free_bytes(torch.device("cpu"))
    assert (found, "container" in what) == (free, bool(limits))


def test_the_progress_bar(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe.load(saved)
    assert capsys.readouterr() == ("", "")  # not on a terminal
    moe.load(saved, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "loading" in err


def test_a_load_on_meta_reads_no_weights(tmp_path: Path) -> None:
    """The data of this checkpoint are holes: its scales of 0 would be refused if they were read."""
    sizes: dict[str, Any] = dict(hidden_size=160, intermediate_size=140, moe_intermediate_size=130, vocab_size=300)
    sizes |= dict(num_hidden_layers=5, n_routed_experts=8, n_group=2, topk_group=1, num_attention_heads=3)
    sizes |= dict(num_key_value_heads=3, num_experts_per_tok=2, q_lora_rank=136, kv_lora_rank=144)
    release = skeletons.RELEASES["deepseek_v3"]
    release = dataclasses.replace(release, config=release.config | sizes, shard="model-{}-of-11.safetensors", shards=11)
    skeletons.build(release, tmp_path)
    model = moe.load(tmp_path, device="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.embed_tokens.weight.dtype == torch.bfloat16 and len(model.mtp) == 1
    stored = {name: shape for name, _, shape in skeletons.tensors(release.config) if "scale" not in name}
    of_model = {name: slot.shape for name, slot in layout(model.config).items()}
    assert stored == of_model
    with pytest.raises(CheckpointError, match="weight_scale_inv: scale; expected finite numbers above 0"):
        moe.load(tmp_path)
    kept = moe.load(tmp_path, device="meta", dtype="keep").state_dict()
    assert kept["layers.4.mlp.experts.down_proj"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "bogus"}, "device = 'bogus': expected a device of this machine .Expected one of cpu"),
        ({"device": 1.5}, "device = 1.5: expected a device of this machine"),
        ({"device": "cpu:x"}, "device = 'cpu:x': expected a device of this machine"),
        ({"dtype": 5}, "dtype = 5: expected one of auto, keep, bf16"),
        ({"experts": 5}, "experts = 5: expected a range within the "),
        ({"experts": range(0)}, r"experts = range.0, 0.: expected a range within the "),
        ({"max_header_bytes": "16MB"}, "max_header_bytes = '16MB': expected 2 to "),
        ({"max_header_bytes": 1}, "max_header_bytes = 1: expected 2 to "),
        ({"folder": 5}, "folder = 5: expected a path, or a name on the Hub"),
        ({"folder": None}, "folder = None: expected a path, or a name on the Hub"),
    ],
)
def test_a_wrong_argument_is_named(saved: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(moe.ConfigError, match=f"^{message}"):
        moe.load(**{"folder": saved, **arguments})
