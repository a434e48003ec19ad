"""Times a whole model on the CPU, and transformers' model with the same weights.
The two take turns in one process.

Work:
  train     forward and backward of S = 512 tokens, both models in train mode,
            loss from all logits in float32; parameters and gradients in
            --dtype, gradients allocated and freed within the timing, no
            optimizer
  prefill   1,024 tokens into an empty cache, logits of the last one
  decode    one token at a time after that prefill, logits of each
  short     the same after a prefill of 64 tokens
  batch     the same for B = 8 and 32 sequences at once, after a prefill of
            256 tokens each; errors are those of the first three sequences

The peer is DeepseekV3ForCausalLM with SDPA attention and the fastest of its
expert backends for that work (eager, batched_mm, grouped_mm). A ratio is
printed only if each of moesmith's errors is at most twice the peer's. Errors
are relative to the peer's model in float64 (whose norms, router and RoPE still
compute in float32):

  logits     ||found - exact|| / ||exact|| of each token, its median and upper
             quartile over the tokens, and the largest difference divided by
             the largest logit
  gradients  for training also the same quotient of each parameter, its median
             and maximum

In bfloat16 a token may be routed differently than in float64. Such tokens
dominate the largest errors of both models, so the largest errors say little
about the other tokens. The medians are therefore also limited to 64 roundings
of the dtype for logits and 128 for gradients, whatever the errors of the peer
are. If the work has few tokens, chance decides which model has such a token:
the largest error is compared with the peer's largest in this and earlier work.

Variants of moesmith's model, timed in the same rounds:
  plain   as it is
  packed  after model.pack(), in bfloat16; not trained
  int8    after moe.quantize(model, "int8"); not trained. Its errors are mostly
          those of rounding the weights to int8, so they may be more than
          twice the peer's. It is timed if their median is at most 0.2.

--against COMMIT also times the plain model of an older commit of this
repository, in the same rounds, in a process that only computes while this one
waits. Its weights are equal, its errors are subject to the same limits, and
the difference of its logits from those of this checkout is printed.

--llama FILE also times llama.cpp's model of the same weights, converted to
float32 or bfloat16, at prefill, decode and short, with a cache in float32 or
float16 and the same number of threads. It needs llama-cpp-python, and FILE is
the convert_hf_to_gguf.py of the llama.cpp version that it contains. Its errors
are subject to the same limits.

The limit, from ceilings measured in the same run:
  train    3 x forward FLOPs / dense matmul rate
  prefill  forward FLOPs / dense matmul rate
  decode   bytes of the activated parameters (without the input embedding;
           of a batch, those that uniform routing activates) and of the cache
           / memory read rate, or forward FLOPs / dense matmul rate if longer
with forward FLOPs = 2 x activated parameters without embeddings x S
+ S^2 H (qk_head_dim + v_head_dim) (causal) + 2 D V x positions with logits
(H heads, model width D, vocabulary size V).

A last table shows where our time goes, from one profiled call of each work:
  products    matrix products, also those of attention while decoding
  attention   fused attention and softmax
  other operators, and what is outside operators: Python, NumPy and dispatch

--small is a smoke test: it shows that everything runs and is correct, and
prints no times or ratios. Its JSON lines have times and "small": true.
"disturbed: other processes used X of N cores" describes the most disturbed
measurement; JSON lines have "other_cores" and "disturbed".
"""

import argparse
import contextlib
import copy
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe
from benchmarks.cpu_against import OtherCommit, other_commit, resolve
from benchmarks.cpu_peers import (
    ROUNDINGS,
    Errors,
    Reference,
    Theirs,
    acceptable,
    bytes_copied,
    errors,
    fastest_backend,
    logit_errors,
    peer,
    reference,
)
from benchmarks.cpu_profile import PARTS, parts
from benchmarks.cpu_work import DTYPES, KINDS, Ours, Sizes, Task
from benchmarks.harness import (
    RESULTS,
    BadInput,
    OtherProcesses,
    append,
    disturbance,
    environment,
    interleave,
    matmul_rate,
    one_line,
    read_rate,
    say,
    summary,
)
from benchmarks.llama_cpp_model import LlamaCpp, find
from benchmarks.report import SMOKE_TEST, print_line, print_table
from moe import Transformer
from moe.config import ModelConfig
from moe.counts import count_parameters
from moe.presets import preset

SMALL = Sizes(
    train=32, prefill=48, decode=4, short=16, batches=(3,), batch_context=24, rounds=2, matmul=512, read=2**22
)
VARIANTS = ("plain", "packed", "int8")
INT8_MOST = 0.2  # median error of logits; a wrong layer causes more


def variant_of(model: Transformer, variant: str) -> Transformer:
    """The model itself if plain, otherwise a converted copy. Raises RuntimeError or ValueError if unsupported."""
    if variant == "plain":
        return model
    converted: Any = copy.deepcopy(model).eval()
    if variant == "packed":
        converted.pack()
        return converted
    return moe.quantize(converted, "int8")


def stored_bytes(model: Transformer) -> tuple[int, int]:
    """Bytes of the routed experts, and of all other parameters that a token may use."""
    state = {name: t.nbytes for name, t in model.state_dict().items()}
    experts = sum(size for name, size in state.items() if ".experts." in name)
    embedding = state["embed_tokens.weight"] if model.lm_head is not None else 0
    return experts, sum(state.values()) - experts - embedding


def limits(
    config: ModelConfig,
    sizes: Sizes,
    itemsize: int,
    matmul: float,
    read: float,
    stored: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Seconds of each work at the ceilings, see the module's docstring; `stored` as of `stored_bytes`, if converted."""
    counts = count_parameters(config)
    vocabulary = config.vocab_size * config.hidden_size
    active = counts.activated - counts.embedding - counts.head
    per_pair = config.num_attention_heads * (config.qk_head_dim + (config.v_head_dim or 0)) * config.num_hidden_layers

    def forward(tokens: int, positions: int) -> int:
        return 2 * active * tokens + per_pair * tokens**2 + 2 * vocabulary * positions

    experts, k = counts.routed_experts, config.num_experts_per_tok / config.n_routed_experts
    per_token = ((config.kv_lora_rank or 0) + config.rope_dim) * config.num_hidden_layers

    stored = stored or (itemsize * experts, itemsize * round(active - k * experts + vocabulary))

    def decoding(batch: int, context: int) -> float:
        used = stored[1] + stored[0] * (1 - (1 - k) ** batch)
        cached = itemsize * batch * per_token * (context + sizes.decode / 2)
        flops = 2 * (active + vocabulary) + 2 * per_pair * context
        return sizes.decode * max((used + cached) / read, batch * flops / matmul)

    return {
        "train": 3 * forward(sizes.train, sizes.train) / matmul,
        "prefill": forward(sizes.prefill, 1) / matmul,
        **{work: decoding(d.batch, d.context) for work, d in sizes.decodings.items()},
    }


def compare(
    ours: Mapping[str, Ours],
    theirs: Theirs,
    ids: Tensor,
    exact: Reference,
    sizes: Sizes,
    others: Sequence[OtherCommit | LlamaCpp] = (),
) -> Iterator[dict[str, Any]]:
    """One record for each work, variant and peer: errors, and times if the errors of both are acceptable.

    The peers are transformers' model and `others`.
    """
    tasks = {variant: Task(side, ids, sizes) for variant, side in ours.items()}
    peers = {"transformers": Task(theirs, ids, sizes)} | {other.name: other for other in others}
    dtype, largest = theirs.model.dtype, 0.0

    def cpu_seconds() -> float:
        """CPU time of the benchmark: of this process, its ended children, and the processes of `others`."""
        return sum(os.times()[:4]) + sum(other.cpu for other in others)

    for work, tokens in sizes.tokens.items():
        say(f"{work}: looking for the fastest backend")
        peer_call = peers["transformers"].call(work)
        decoding = sizes.decodings.get(work)
        backend = fastest_backend(theirs, peer_call, decoding.batch if decoding else tokens)
        theirs.use(backend)
        present = [other for other in others if work.partition(" ")[0] in other.kinds]
        names = ["transformers", *(other.name for other in present)]
        peer_errors = {name: errors(peers[name], work, exact, sizes) for name in names}
        largest = max(largest, peer_errors["transformers"]["logits, largest"])
        allowed = {**peer_errors["transformers"], "logits, largest": largest}
        variants = [variant for variant in tasks if work != "train" or variant == "plain"]
        our_errors = {variant: errors(tasks[variant], work, exact, sizes) for variant in variants}

        calls: dict[str, Callable[[], Any]] = {
            v: tasks[v].call(work) for v in variants if _is_right(v, our_errors[v], allowed, dtype)
        }
        timed, seconds = {}, {}
        if calls:
            calls["transformers"] = peer_call
            calls |= {
                other.name: other.call(work)
                for other in present
                if _is_right(other.name, peer_errors[other.name], allowed, dtype)
            }
            say(f"{work}: {sizes.rounds} rounds, compared with {backend}")
            load, begun = OtherProcesses(), cpu_seconds()
            seconds = interleave(calls, sizes.rounds, _seconds)
            timed = load.record(cpu_seconds() - begun)
        where = {v: parts(calls[v], summary(seconds[v])["median_s"]) for v in variants if v in calls}
        for variant in variants:
            for name, peer_error in peer_errors.items():
                record: dict[str, Any] = {"work": work, "variant": variant, "beside": name}
                record |= {"backend": backend} if name == "transformers" else {}
                record |= {"errors": our_errors[variant], "peer_errors": peer_error}
                if name != "transformers" and variant == "plain":
                    record["difference"] = logit_errors(peers[name].logits(work), tasks["plain"].logits(work))
                wrong = [each for each in (variant, name) if each not in calls]
                if wrong:
                    record["wrong"] = wrong[0]
                else:
                    record |= timed | {"ours": summary(seconds[variant]), "peer": summary(seconds[name])}
                    record["parts"] = where[variant]
                    record["ratio"] = record["peer"]["median_s"] / record["ours"]["median_s"]
                yield record


def _is_right(name: str, found: Errors, theirs: Errors, dtype: torch.dtype) -> bool:
    return found["logits"] <= INT8_MOST if name == "int8" else acceptable(found, theirs, dtype)


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call, which may have measured them itself in another process."""
    start = time.perf_counter()
    found = call()
    return found if isinstance(found, float) else time.perf_counter() - start


def measure(
    name: str,
    dtype: str,
    sizes: Sizes,
    variants: Sequence[str],
    other: OtherCommit | None,
    converter: Path | None,
    *,
    small: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of the work with the preset's model in one dtype, and notes."""
    config = config_of(name)
    model = Transformer(config).to(DTYPES[dtype])
    ids = torch.randint(
        config.vocab_size, (1, sizes.prefill + sizes.decode), generator=torch.Generator().manual_seed(0)
    )
    say(f"{name} {dtype}: float64 reference")
    exact = reference(model, ids, sizes)
    ours, notes = {}, []
    for variant in variants:
        try:
            ours[variant] = Ours(variant_of(model, variant))
        except (RuntimeError, ValueError) as error:
            notes.append(f"{variant} {dtype} is left out: {one_line(error)}")
    if not ours:
        return [], notes
    others: list[OtherCommit | LlamaCpp] = []
    if other is not None:
        say(f"{name} {dtype}: building the model of {other.name}")
        other.build(model, dtype, ids, sizes)
        others.append(other)
    if converter is not None:
        say(f"{name} {dtype}: converting for llama.cpp")
        try:
            others.append(LlamaCpp(model, ids, sizes, converter, dtype))
        except RuntimeError as error:
            notes.append(f"llama.cpp {dtype} is left out: {one_line(error)}")
    theirs = peer(model)
    matmul, read = matmul_rate(DTYPES[dtype], sizes.matmul), read_rate(DTYPES[dtype], sizes.read)
    itemsize = DTYPES[dtype].itemsize
    at_limit = {
        variant: limits(config, sizes, itemsize, matmul, read, stored_bytes(side.model) if variant == "int8" else None)
        for variant, side in ours.items()
    }
    plain = limits(config, sizes, itemsize, matmul, read)
    del model  # of no use any more if it is not to be timed
    about = {"preset": name, "dtype": dtype, "matmul_flops": matmul, "read_bytes": read, **environment(small)}
    records = []
    for r in compare(ours, theirs, ids, exact, sizes, others):
        work, at_most = r["work"], at_limit[r["variant"]]
        records.append(
            {**about, "tokens": sizes.tokens[work], "limit_s": at_most[work], "peer_limit_s": plain[work], **r}
        )
    return records, notes


def config_of(name: str) -> ModelConfig:
    """The preset's configuration, without parts that transformers' model does not have in training."""
    return dataclasses.replace(preset(name), num_nextn_predict_layers=0, aux_loss_alpha=0.0)


def memory_needed(config: ModelConfig, dtype: str, sizes: Sizes, variants: Sequence[str], others: int) -> int:
    """Estimate of the bytes that the run needs at once, with so many older commits and llama.cpp."""
    parameters, size, trains = count_parameters(config).total, DTYPES[dtype].itemsize, "train" in sizes.kinds
    # Gradients in float64 and float32 beside the reference; these and those of one model beside the timed models.
    exact = parameters * (8 + 12 * trains)
    # The plain model, from which the others are made, and the peer's are always there.
    models = 2 + others + ("packed" in variants and dtype == "bf16")
    timed = parameters * (size * models + ("int8" in variants) + (4 + size) * trains)
    logits = 3 * 8 * sizes.judged * config.vocab_size  # exact, found and their difference, in float64
    lengths = [sizes.decodings[work].batch if work in sizes.decodings else n for work, n in sizes.tokens.items()]
    return max(exact, timed) + logits + max(bytes_copied(config, n) for n in lengths) + others * 2**29


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def check_memory(name: str, dtypes: Sequence[str], sizes: Sizes, variants: Sequence[str], others: int) -> None:
    """Raise BadInput if the run probably needs more memory than is available."""
    config, available = config_of(name), available_memory()

    def needed(sizes: Sizes) -> int:
        return max(memory_needed(config, dtype, sizes, variants, others) for dtype in dtypes)

    most = needed(sizes)
    if available is None or most <= available:
        return
    hint = ""
    if "train" in sizes.kinds and len(sizes.kinds) > 1:
        rest = tuple(kind for kind in sizes.kinds if kind != "train")
        hint = f"; --work {' '.join(rest)} needs {needed(dataclasses.replace(sizes, kinds=rest)) / 1e9:.1f} GB"
    raise BadInput(
        f"--preset {name}: not enough memory; expected about {most / 1e9:.1f} GB; "
        f"found {available / 1e9:.1f} GB available{hint}"
    )


def show(records: list[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    notes = list(notes)
    if records:
        first = records[0]
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        print_line(f"{first['device']}; {versions}; commit {first['commit']}, load average {first['load']}")
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        _show_dtype([r for r in records if r["dtype"] == dtype], notes)
    for note in notes:
        print_line(note)
    if not records:
        return
    print_line("errors are medians: of logits, and for train below them of gradients")
    if records[0]["small"]:
        print_line(SMOKE_TEST)
        return
    print_line("tokens/s are medians; ratio: our tokens/s over theirs (higher is better)")
    _show_parts(records)
    for dtype in {r["dtype"]: r for r in records}.values():
        matmul, read = dtype["matmul_flops"] / 1e9, dtype["read_bytes"] / 1e9
        print_line(f"{dtype['dtype']} ceilings: matmul {matmul:.0f} GFLOP/s, memory read {read:.1f} GB/s")
    if line := disturbance(records):
        print_line(line)


RATES = ("tokens/s\nours", "% of\nlimit", "tokens/s\ntheirs", "% of\nlimit", "ratio")


def _show_dtype(records: Sequence[Mapping[str, Any]], notes: list[str]) -> None:
    """Print a table, and add notes to be printed below it."""
    small, dtype, rows = records[0]["small"], records[0]["dtype"], []
    for r in records:
        found, theirs = (
            "\n".join(f"{r[key][name]:.1e}" for name in ROUNDINGS if name in r[key])
            for key in ("errors", "peer_errors")
        )
        if "ratio" not in r:
            notes += _fault(r)
            cells = ["wrong"] + [""] * (0 if small else len(RATES) - 1)
        elif small:
            cells = ["right"]
        else:
            cells = [*_rate(r, "ours", "limit_s"), *_rate(r, "peer", "peer_limit_s"), f"{r['ratio']:.2f}"]
        rows.append((r["work"], r["variant"], r.get("backend", r["beside"]), *cells, found, theirs))
    headings = ("work", "model", "beside", *(("result",) if small else RATES), "errors\nours", "theirs")
    print_table(f"{records[0]['preset']} in {dtype}", headings, rows, names=3)
    for name in dict.fromkeys(r["beside"] for r in records if "difference" in r):
        most = max(r["difference"]["logits"] for r in records if r["beside"] == name and "difference" in r)
        notes.append(f"{dtype}: logits of {name} differ from ours by at most {most:.1e}, median of each work")


def _show_parts(records: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (f"{r['work']} {r['dtype']}", r["variant"], *(f"{100 * r['parts'][part]:.0f}" for part in PARTS))
        for r in records
        if r["beside"] == "transformers" and "parts" in r
    ]
    if rows:
        print_table("% of our time", ("work", "model", *(part.replace(" ", "\n") for part in PARTS)), rows, names=2)


def _fault(record: Mapping[str, Any]) -> list[str]:
    """A line on a record without a ratio; none if the reason is in the record of transformers."""
    where = f"{record['work']} {record['dtype']}"
    if record["wrong"] != record["variant"]:
        return [f"{where}: {record['wrong']} is wrong"]
    if record["beside"] != "transformers":
        return []
    worse = [name for name, error in record["errors"].items() if not error <= 2 * record["peer_errors"][name]]
    return [f"{where}: {record['variant']} is wrong: error of {'; '.join(worse) or 'both'}"]


def _rate(record: Mapping[str, Any], side: str, limit: str) -> tuple[str, str]:
    """Tokens/s, and % of the limit."""
    seconds = record[side]["median_s"]
    return f"{record['tokens'] / seconds:.1f}", f"{100 * record[limit] / seconds:.0f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", metavar="NAME", help="Preset of family deepseek_v3; default: bench_400m; with --small: tiny")
    add("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="Parameter dtypes; default: both")
    add(
        "--work",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="NAME",
        help=f"Work to do, one or more of {', '.join(KINDS)}; default: all",
    )
    add(
        "--variant",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS[:1],
        metavar="NAME",
        help=f"Variants of our model, one or more of {', '.join(VARIANTS)}; default: plain",
    )
    add("--against", metavar="COMMIT", help="Also time the model of this older commit")
    add("--llama", type=Path, metavar="FILE", help="Also time llama.cpp, with its convert_hf_to_gguf.py at this path")
    add("--small", action="store_true", help="Smoke test with the tiny preset and few tokens")
    add(
        "--json",
        nargs="?",
        type=Path,
        const=RESULTS / "cpu.jsonl",
        metavar="FILE",
        help="Append a JSON line per measurement; default: benchmarks/results/cpu.jsonl",
    )


def run(args: argparse.Namespace) -> int:
    name = args.preset or ("tiny" if args.small else "bench_400m")
    try:
        family = preset(name).model_type
    except ValueError as error:
        raise BadInput(f"--preset: {error}") from None
    if family != "deepseek_v3":
        raise BadInput(f"--preset {name}: wrong family; expected deepseek_v3; found {family}")
    variants, dtypes = list(dict.fromkeys(args.variant)), list(dict.fromkeys(args.dtype))
    kinds = tuple(kind for kind in KINDS if kind in args.work and (kind != "train" or "plain" in variants))
    if not kinds:
        raise BadInput(f"--work train: only plain is trained; expected --variant plain; found {' '.join(variants)}")
    commit = None if args.against is None else resolve(args.against)
    sizes = dataclasses.replace(SMALL if args.small else Sizes(), kinds=kinds)
    if args.llama is not None and (missing := find(args.llama)):
        raise BadInput(missing)
    check_memory(name, dtypes, sizes, variants, others=(commit is not None) + (args.llama is not None))
    if args.json:
        append(args.json, [])
    records, notes = [], []
    with contextlib.nullcontext() if commit is None else other_commit(commit) as other:
        for dtype in dtypes:
            measured, more = measure(name, dtype, sizes, variants, other, args.llama, small=args.small)
            records += measured
            notes += more
    show(records, notes)
    if args.json:
        append(args.json, records)
    return 0
