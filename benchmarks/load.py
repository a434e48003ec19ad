"""Compares moe.load with other readers of a checkpoint that is in the page cache:
seconds and peak memory.

The checkpoint has random weights, by default 2 GiB in bfloat16, in the layout
of Qwen3-MoE, in several shards. Each load runs in its own process, and the
readers take turns. The timing includes touching every page of the loaded
tensors. Memory is the peak growth of the process's anonymous pages.

  readinto         bytes of the files into buffers, nothing else: the minimum
                   cost of reading
  moesmith         moe.load
  safetensors      safetensors.torch.load_file of each shard: tensors in a dict,
                   no model; recent releases map the files and copy nothing, so
                   this is the cost of touching the page cache
  transformers     from_pretrained(dtype="auto")
  fastsafetensors  its loader into CPU tensors, if it is installed

Before any timing, every tensor of moe.load is compared with the file's, as the
safetensors library reads it.

--small is a smoke test: it shows that everything runs and is correct, and
prints no times. Its JSON lines have times and "small": true. "disturbed: other
processes used X of N cores" describes the whole run; JSON lines have
"other_cores" and "disturbed".

Exit status: 0; 1 if a tensor differs or moe.load fails; 2 for bad input; 130
after Ctrl-C.
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
from torch import Tensor

from benchmarks.harness import RESULTS, ROOT, BadInput, OtherProcesses, append, disturbance, environment, say
from benchmarks.report import SMOKE_TEST, print_line, print_table
from moe import ModelConfig, Transformer, load
from moe.checkpoint import save
from moe.checkpoint.format.layout import layout
from moe.checkpoint.format.sizes import parse_size
from moe.errors import ConfigError

READERS = ("readinto", "moesmith", "safetensors", "transformers", "fastsafetensors")


def config(nbytes: int) -> ModelConfig:
    """A model of about `nbytes` in bfloat16."""
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


class Differs(Exception):
    """A loaded tensor is wrong; the message names it."""


def check(folder: Path) -> int:
    """Number of tensors in the files. Raises Differs for one that moe.load reads differently."""
    from safetensors import safe_open

    state = load(folder, progress=False).state_dict()
    model = layout(config_of(folder))
    compared = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                slot = model[name]
                if not torch.equal(shard.get_tensor(name), state[slot.parameter][slot.index]):
                    raise Differs(f"moe.load: {name} differs from the value in {file.name}")
                compared += 1
    return compared


def config_of(folder: Path) -> ModelConfig:
    from moe.checkpoint import read_config

    return read_config(folder)


def reader(name: str, folder: Path) -> Callable[[], list[Tensor]]:
    """The call to time. Its packages are imported here, so that importing is not timed."""
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
    """Peak in bytes, sampled every 2 ms, so that shorter peaks are missed."""

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
    add = parser.add_argument
    add("--size", default="2GiB", help="Size of the checkpoint; default: 2GiB")
    add("--small", action="store_true", help="Smoke test with 16 MiB and two rounds")
    add("--rounds", type=int, default=7, metavar="N", help="Loads per reader; default: 7")
    add(
        "--json",
        nargs="?",
        type=Path,
        const=RESULTS / "load.jsonl",
        metavar="FILE",
        help="Append a JSON line per reader; default: benchmarks/results/load.jsonl",
    )


def run(args: argparse.Namespace) -> int:
    try:
        size = parse_size("16MiB" if args.small else args.size, "--size")
        if args.json:
            append(args.json, [])
    except (ConfigError, OSError) as error:
        raise BadInput(str(error)) from None
    if args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: out of range; expected at least 1")
    return _run(size, 2 if args.small else args.rounds, args.json, args.small)


def _run(size: int, rounds: int, file: Path | None, small: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="benchmark-load-") as root:
        folder = Path(root) / "checkpoint"
        say(f"writing a checkpoint of about {size / 2**20:,.0f} MiB")
        model = Transformer(config(size)).bfloat16()
        save(model, folder, max_shard_bytes=max(size // 4, 1))
        del model
        nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        try:
            compared = check(folder)
        except Differs as error:
            say(str(error))
            return 1
        names = [n for n in READERS if n != "fastsafetensors" or importlib.util.find_spec("fastsafetensors")]
        loads: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        others = OtherProcesses()
        for number in range(rounds + 1):
            for name in names:
                say(f"round {number} of {rounds}: {name}")
                found = one_load(name, folder)
                if number:  # the first fills caches
                    loads[name].append(found)
        about = environment(small) | others.record() | {"bytes": nbytes, "rounds": rounds}
    records = [about | _record(name, found, nbytes, loads["readinto"]) for name, found in loads.items()]
    print_line(f"{compared:,} tensors of moe.load are equal to the files'")
    _show(records)
    for name in READERS:
        if name not in names:
            print_line(f"{name}: not installed")
    if file:
        append(file, records)
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


def _show(records: list[dict[str, Any]]) -> None:
    title = f"loading {records[0]['bytes'] / 2**20:,.0f} MiB from the page cache"
    if records[0]["small"]:
        rows = [(r["reader"], "failed" if "fault" in r else "ran") for r in records]
        print_table(title, ("reader", "result"), rows, names=2)
    else:
        headings = ("reader", "median\ns", "GB/s", "time /\nreadinto", "peak\nMiB", "peak /\nsize")
        rows = [(r["reader"], "failed") if "fault" in r else _cells(r) for r in records]
        print_table(title, headings, rows)
    for r in records:
        if "fault" in r:
            print_line(f"{r['reader']} failed: {r['fault']}")
    line = SMOKE_TEST if records[0]["small"] else disturbance(records)
    if line:
        print_line(line)


def _cells(r: dict[str, Any]) -> tuple[str, ...]:
    numbers = (f"{r['median_s']:.2f}", f"{r['gbytes_per_s']:.2f}", f"{r['times_readinto']:.2f}")
    return (r["reader"], *numbers, f"{r['peak_bytes'] / 2**20:,.0f}", f"{r['peak_share']:.2f}")


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], Path(sys.argv[2]))))
