"""Loading a checkpoint from files in the page cache: seconds and peak memory, beside other readers of the same bytes.

A checkpoint of random weights is generated, by default of 2 GiB in bfloat16, Qwen3-MoE's layout, several shards. Each
reader loads it in a process of its own, all of them taking turns; every page of what it returns is touched within the
time that is measured. Memory is the peak of the process's anonymous pages above what it had before.

  readinto        the bytes of the files into buffers, nothing else: what reading costs at least
  moesmith        moe.load
  safetensors     safetensors.torch.load_file of each shard: tensors in a dict, no model; recent releases map the files
                  and copy nothing, so that this is the cost of touching the page cache
  transformers    from_pretrained(dtype="auto")
  fastsafetensors its loader into CPU tensors, if it is installed

Before any timing, every tensor that moe.load has is compared with the file's as the safetensors library reads it.

Exit status: 0; 1 if a tensor differs or ours fails; 2 for bad input; 130 after Ctrl-C.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import RESULTS, ROOT, BadInput, append, environment, say
from moe import ModelConfig, Transformer, load
from moe.checkpoint import save
from moe.checkpoint.format.layout import layout
from moe.checkpoint.format.sizes import parse_size
from moe.errors import ConfigError

READERS = ("readinto", "moesmith", "safetensors", "transformers", "fastsafetensors")


def config(nbytes: int) -> ModelConfig:
    """A model of about so many bytes in bfloat16."""
    width, hidden, experts = (1024, 768, 64) if nbytes >= 2**29 else (128, 96, 16)
    each = 2 * 3 * width * hidden * experts
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=32000 if nbytes >= 2**29 else 1000,
        hidden_size=width,
        num_hidden_layers=max(round(nbytes / each), 1),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=width // 8,
        qk_norm="head",
        intermediate_size=width,
        moe_intermediate_size=hidden,
        n_routed_experts=experts,
        num_experts_per_tok=4,
        scoring_func="softmax",
        topk_method="greedy",
        seq_aux=False,
    )


def check(folder: Path) -> int:
    """How many tensors of the files are what moe.load has. Raises AssertionError for one that is not."""
    from safetensors import safe_open

    state = load(folder, progress=False).state_dict()
    model = layout(config_of(folder))
    compared = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                slot = model[name]
                assert torch.equal(shard.get_tensor(name), state[slot.parameter][slot.index]), name
                compared += 1
    return compared


def config_of(folder: Path) -> ModelConfig:
    from moe.checkpoint import read_config

    return read_config(folder)


def reader(name: str, folder: Path) -> Callable[[], list[Tensor]]:
    """Imports what it needs, so that importing is not timed."""
    files = sorted(folder.glob("*.safetensors"))
    if name == "readinto":

        def call() -> list[Tensor]:
            buffers = []
            for file in files:
                buffers.append(torch.empty(file.stat().st_size, dtype=torch.uint8))
                view = buffers[-1].numpy().data
                with file.open("rb", buffering=0) as opened:
                    while view:
                        view = view[opened.readinto(view) :]  # pyright: ignore[reportAttributeAccessIssue]
            return buffers

        return call
    if name == "moesmith":
        return lambda: list(load(folder, progress=False).state_dict().values())
    if name == "safetensors":
        from safetensors.torch import load_file

        return lambda: [tensor for file in files for tensor in load_file(file).values()]
    if name == "transformers":
        from transformers import Qwen3MoeForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return lambda: list(Qwen3MoeForCausalLM.from_pretrained(folder, dtype="auto").state_dict().values())
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # pyright: ignore[reportMissingImports]

    def fast() -> list[Tensor]:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        loader.add_filenames({0: [str(file) for file in files]})
        buffer = loader.copy_files_to_device()
        return [buffer.get_tensor(key).clone() for key in loader.get_keys()]

    return fast


@contextmanager
def peak_of_anonymous_pages() -> Iterator[dict[str, int]]:
    """Sampled every two milliseconds; what lives for less is not seen."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024

    found, done = {"before": now(), "peak": 0}, threading.Event()

    def sample() -> None:
        while not done.is_set():
            found["peak"] = max(found["peak"], now())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["peak"] = max(found["peak"], now())


def work(name: str, folder: Path) -> dict[str, float]:
    """One load, in this process."""
    call = reader(name, folder)
    with peak_of_anonymous_pages() as memory:
        start = time.perf_counter()
        tensors = call()
        for tensor in tensors:
            tensor.reshape(-1).view(torch.uint8)[::4096].sum()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": memory["peak"] - memory["before"]}


def one_load(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.load", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return {"fault": last[0][:160]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="2GiB", help="of the checkpoint; default: 2GiB")
    parser.add_argument("--small", action="store_true", help="16 MiB and two rounds, to see that it works")
    parser.add_argument("--rounds", type=int, default=7, help="loads of each reader; default: 7")
    parser.add_argument("--json", nargs="?", type=Path, const=RESULTS / "load.jsonl", help="append a line a reader")


def run(args: argparse.Namespace) -> int:
    try:
        size = parse_size("16MiB" if args.small else args.size, "--size")
        if args.json:
            append(args.json, [])
    except (ConfigError, OSError) as error:
        raise BadInput(str(error)) from None
    if args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: expected a positive number")
    return _run(size, 2 if args.small else args.rounds, args.json)


def _run(size: int, rounds: int, file: Path | None) -> int:
    with tempfile.TemporaryDirectory(prefix="benchmark-load-") as root:
        folder = Path(root) / "checkpoint"
        say(f"writing a checkpoint of about {size / 2**20:,.0f} MiB")
        model = Transformer(config(size)).bfloat16()
        save(model, folder, max_shard_bytes=max(size // 4, 1))
        del model
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        say(f"comparing {check(folder):,} tensors: equal")
        names = [n for n in READERS if n != "fastsafetensors" or importlib.util.find_spec("fastsafetensors")]
        loads: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in names:
                say(f"round {number} of {rounds}: {name}")
                found = one_load(name, folder)
                if number:  # the first fills caches
                    loads[name].append(found)
    records = [_record(name, found, nbytes, loads["readinto"]) for name, found in loads.items()]
    _show(records, nbytes, [name for name in READERS if name not in names])
    if file:
        about = environment()
        append(file, [about | {"bytes": nbytes, "rounds": rounds} | record for record in records])
    return 1 if "fault" in records[1] else 0


def _record(name: str, found: list[dict[str, Any]], nbytes: int, plain: list[dict[str, Any]]) -> dict[str, Any]:
    fault = next((load["fault"] for load in found if "fault" in load), None)
    if fault:
        return {"reader": name, "fault": fault}
    seconds = median(load["seconds"] for load in found)
    return {
        "reader": name,
        "median_s": seconds,
        "min_s": min(load["seconds"] for load in found),
        "gbytes_per_s": nbytes / seconds / 1e9,
        "times_readinto": seconds / median(load["seconds"] for load in plain),
        "peak_bytes": max(load["peak_bytes"] for load in found),
        "peak_share": max(load["peak_bytes"] for load in found) / nbytes,
    }


def _show(records: list[dict[str, Any]], nbytes: int, absent: list[str]) -> None:
    console = Console(highlight=False)
    table = Table(title=f"loading {nbytes / 2**20:,.0f} MiB from the page cache", title_justify="left")
    for heading in ("reader", "median s", "GB/s", "times readinto", "peak MiB", "of the files"):
        table.add_column(heading, justify="left" if heading == "reader" else "right", no_wrap=True)
    for r in records:
        if "fault" in r:
            table.add_row(r["reader"], "failed", r["fault"][:60])
            continue
        numbers = (f"{r['median_s']:.2f}", f"{r['gbytes_per_s']:.2f}", f"{r['times_readinto']:.2f}")
        table.add_row(r["reader"], *numbers, f"{r['peak_bytes'] / 2**20:,.0f}", f"{r['peak_share']:.2f}")
    console.print(table)
    for name in absent:
        console.print(f"{name}: not installed")


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
