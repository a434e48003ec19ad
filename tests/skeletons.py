"""Build released checkpoints at full size, with complete headers and sparse files, and read them.

    python -m tests.skeletons                     DeepSeek-V3 and Kimi-K2-Instruct; exit status 1 if a value is wrong
    python -m tests.skeletons --only kimi_k2      one of them
    python -m tests.skeletons --folder /data      build them there and keep them

Names, shapes and dtypes are defined here independently of `moe.checkpoint`, and their totals are first compared with
those of the releases. The files are sparse: 688 GB and 1,029 GB take a few MB of disk. Each task runs in its own
process; its result, seconds and peak memory are printed:

    plan       `moesmith plan` counts the values of each dtype in the headers
    inspect    `moesmith inspect` finds that files and configuration agree, and lists ignored tensors
    load       `moe.load(folder, device="meta")` creates every parameter and reads no weights
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
BLOCK = 128
MAX_SECONDS = 120.0
MAX_MEMORY = 2 * 2**30

# Keys of config.json that the releases have in common.
_SHARED: dict[str, Any] = dict(
    attention_bias=False,
    hidden_act="silu",
    hidden_size=7168,
    intermediate_size=18432,
    kv_lora_rank=512,
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    quantization_config={
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
)


@dataclass(frozen=True)
class Release:
    """A released checkpoint.

    Attributes:
        config: content of config.json.
        shard: file name of a shard, with {} for its number.
        shards, tensors, nbytes: totals of all files.
        parameters: number of values in the model, with MTP modules' copies of embedding and head, without scales and
            buffers.
        total_size: metadata.total_size in the index.
        inv_freq: length of the buffer in each layer, or 0.
    """

    config: dict[str, Any]
    shard: str
    shards: int
    tensors: int
    nbytes: int
    parameters: int
    total_size: int
    inv_freq: int = 0


RELEASES = {
    "deepseek_v3": Release(
        config=_SHARED
        | dict(
            model_type="deepseek_v3",
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            n_routed_experts=256,
            num_attention_heads=128,
            num_key_value_heads=128,
            num_nextn_predict_layers=1,
            routed_scaling_factor=2.5,
            vocab_size=129280,
        ),
        shard="model-{:05}-of-000163.safetensors",
        shards=163,
        tensors=91_991,
        nbytes=688_574_839_360,
        parameters=684_489_845_504,
        total_size=1_369_062_772_000,
    ),
    "kimi_k2": Release(
        config=_SHARED
        | dict(
            model_type="kimi_k2",
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            n_routed_experts=384,
            num_attention_heads=64,
            num_key_value_heads=64,
            num_nextn_predict_layers=0,
            routed_scaling_factor=2.827,
            vocab_size=163840,
        ),
        shard="model-{}-of-61.safetensors",
        shards=61,
        tensors=139_644,
        nbytes=1_029_173_256_720,
        parameters=1_026_408_232_448,
        total_size=1_029_173_256_720,
        inv_freq=56,
    ),
}

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def tensors(config: dict[str, Any], inv_freq: int = 0) -> Iterator[Tensor]:
    """Yield the tensors of an FP8 checkpoint with these sizes, in the order of the layers."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    layers = config["num_hidden_layers"]
    yield "model.embed_tokens.weight", "BF16", (vocabulary, width)
    for layer in range(layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        yield from _layer(prefix, config, dense=layer < config["first_k_dense_replace"])
        if inv_freq:
            yield f"{prefix}self_attn.rotary_emb.inv_freq", "BF16", (inv_freq,)
        if layer >= layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}{name}.weight", "BF16", (width,)
            yield f"{prefix}eh_proj.weight", "BF16", (width, 2 * width)
            yield f"{prefix}embed_tokens.weight", "BF16", (vocabulary, width)
            yield f"{prefix}shared_head.head.weight", "BF16", (vocabulary, width)
    yield "model.norm.weight", "BF16", (width,)
    yield "lm_head.weight", "BF16", (vocabulary, width)


def _layer(prefix: str, c: dict[str, Any], *, dense: bool) -> Iterator[Tensor]:
    width, heads, rope = c["hidden_size"], c["num_attention_heads"], c["qk_rope_head_dim"]
    yield f"{prefix}input_layernorm.weight", "BF16", (width,)
    yield f"{prefix}post_attention_layernorm.weight", "BF16", (width,)
    attention = f"{prefix}self_attn."
    yield from _quantised(f"{attention}q_a_proj", c["q_lora_rank"], width)
    yield f"{attention}q_a_layernorm.weight", "BF16", (c["q_lora_rank"],)
    yield from _quantised(f"{attention}q_b_proj", heads * (c["qk_nope_head_dim"] + rope), c["q_lora_rank"])
    yield from _quantised(f"{attention}kv_a_proj_with_mqa", c["kv_lora_rank"] + rope, width)
    yield f"{attention}kv_a_layernorm.weight", "BF16", (c["kv_lora_rank"],)
    yield from _quantised(f"{attention}kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
    yield from _quantised(f"{attention}o_proj", width, heads * c["v_head_dim"])
    if dense:
        yield from _mlp(f"{prefix}mlp.", width, c["intermediate_size"])
        return
    yield f"{prefix}mlp.gate.weight", "BF16", (c["n_routed_experts"], width)
    yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (c["n_routed_experts"],)
    for expert in range(c["n_routed_experts"]):
        yield from _mlp(f"{prefix}mlp.experts.{expert}.", width, c["moe_intermediate_size"])
    yield from _mlp(f"{prefix}mlp.shared_experts.", width, c["n_shared_experts"] * c["moe_intermediate_size"])


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[Tensor]:
    yield from _quantised(f"{prefix}gate_proj", hidden, width)
    yield from _quantised(f"{prefix}up_proj", hidden, width)
    yield from _quantised(f"{prefix}down_proj", width, hidden)


def _quantised(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * BYTES[tensor[1]]


def build(release: Release, folder: Path) -> None:
    """Write config.json, the index and shards with holes instead of data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(release.config))
    found = list(tensors(release.config, release.inv_freq))
    total, done = sum(map(nbytes, found)), 0
    shards: list[list[Tensor]] = [[] for _ in range(release.shards)]
    for tensor in found:
        shards[done * release.shards // total].append(tensor)
        done += nbytes(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = release.shard.format(number)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor in shard:
            name, dtype, shape = tensor
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes(tensor)]}
            weight_map[name] = file
            at += nbytes(tensor)
        text = json.dumps(header, separators=(",", ":")).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + at)
    index = {"metadata": {"total_size": release.total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index))


def check(task: str, folder: Path, release: Release) -> dict[str, tuple[Any, Any]]:
    """Run one task on a skeleton; return (expected, found) for each checked value."""
    every = list(tensors(release.config, release.inv_freq))
    buffers = [tensor for tensor in every if tensor[0].endswith("inv_freq")]
    if task == "plan":
        stored = json.loads(_command("plan", str(folder)))["stored"]
        values = {kind: sum(math.prod(s) for _, d, s in every if d == kind) for kind in BYTES}
        return {"values": (values, stored["values"])}
    if task == "inspect":
        stored = json.loads(_command("inspect", str(folder)))["stored"]
        ignored = sorted(name for name, *_ in buffers)
        problems = [stored[kind] for kind in ("missing", "unexpected", "misshaped", "unscaled")]
        return {
            "files": (release.shards, stored["files"]),
            "tensors": (release.tensors, stored["tensors"]),
            "bytes": (release.nbytes, stored["bytes"]),
            "ignored": (ignored, sorted(stored["ignored"])),
            "problems": ([[]] * 4, problems),
            "parameters": (stored["expected_parameters"], stored["parameters"]),
        }
    import moe

    state = moe.load(folder, device="meta").state_dict()
    copies = 2 * release.config["num_nextn_predict_layers"]
    copied = copies * release.config["vocab_size"] * release.config["hidden_size"]
    return {
        "parameters": (release.parameters - copied, sum(tensor.numel() for tensor in state.values())),
        "devices": (["meta"], sorted({str(tensor.device) for tensor in state.values()})),
        "dtypes": (["torch.bfloat16", "torch.float32"], sorted({str(tensor.dtype) for tensor in state.values()})),
    }


def _command(*args: str) -> str:
    import contextlib
    import io

    from moe.cli import main as moesmith

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = moesmith([*args, "--json"])
    if status:
        raise SystemExit(f"moesmith {' '.join(args)}: exit status {status}")
    return out.getvalue()


def work(task: str, folder: Path, release: Release) -> int:
    """Run one task in this process, print the result, and return the exit status."""
    bytes_read = _bytes_read()
    started = time.perf_counter()
    figures = check(task, folder, release)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bytes_read = _bytes_read() - bytes_read
    print(f"  {task}: {seconds:.1f} s, peak memory {peak / 2**20:,.0f} MiB, {bytes_read / 2**20:,.0f} MiB read")
    wrong = [f"{name}: expected {e}, found {f}" for name, (e, f) in figures.items() if e != f]
    if seconds > MAX_SECONDS:
        wrong.append(f"seconds: expected at most {MAX_SECONDS:g}")
    if peak > MAX_MEMORY:
        wrong.append(f"memory: expected at most {MAX_MEMORY / 2**20:,.0f} MiB")
    if bytes_read > 2**28:
        wrong.append("bytes read: expected at most 256 MiB")
    for problem in wrong:
        print(f"    {problem[:400]}")
    return int(bool(wrong))


def _bytes_read() -> int:
    """Return the bytes that this process has read from files and libraries, including holes."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def run(name: str, folder: Path) -> int:
    release = RELEASES[name]
    found = list(tensors(release.config, release.inv_freq))
    weights = sum(math.prod(shape) for key, _, shape in found if not key.endswith(("_scale_inv", "inv_freq")))
    correct = (len(found), sum(map(nbytes, found)), weights) == (release.tensors, release.nbytes, release.parameters)
    print(f"{name}: {len(found):,} tensors, {sum(map(nbytes, found)):,} bytes, {release.shards} shards")
    if not correct:
        print(f"  expected {release.tensors:,} tensors, {release.nbytes:,} bytes, {release.parameters:,} parameters")
        print(f"  found {weights:,} parameters")
        return 1
    build(release, folder)
    disk = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    print(f"  on disk {disk / 2**20:,.0f} MiB")
    command = [sys.executable, "-m", "tests.skeletons", "--only", name, "--folder", str(folder), "--task"]
    return max(subprocess.run([*command, task]).returncode for task in ("plan", "inspect", "load"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.skeletons", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", choices=RELEASES, help="Check only this release (default: both)")
    parser.add_argument("--folder", type=Path, help="Folder to build them in and keep (default: temporary)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task is not None:
        raise SystemExit(work(options.task, options.folder, RELEASES[options.only]))
    with ExitStack() as stack:
        place = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skeletons-")))
        names = [options.only] if options.only else list(RELEASES)
        raise SystemExit(max(run(name, place / name) for name in names))


if __name__ == "__main__":
    main()
