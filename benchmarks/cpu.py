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
  batch B   the same for B sequences at once, after a prefill of 256 tokens
            each; errors are those of the first three sequences

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
are.

The limit, from ceilings measured in the same run:
  train    3 x forward FLOPs / dense matmul rate
  prefill  forward FLOPs / dense matmul rate
  decode   bytes of the activated parameters (without the input embedding;
           of a batch, those that uniform routing activates) and of the cache
           / memory read rate, or forward FLOPs / dense matmul rate if longer
with forward FLOPs = 2 x activated parameters without embeddings x S
+ S^2 H (qk_head_dim + v_head_dim) (causal) + 2 D V x positions with logits
(H heads, model width D, vocabulary size V).

--small is a smoke test: it shows that everything runs and is correct, and
prints no times or ratios. Its JSON lines have times and "small": true.
"disturbed: other processes used X of N cores" describes the most disturbed
measurement; JSON lines have "other_cores" and "disturbed".
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    RESULTS,
    BadInput,
    OtherProcesses,
    append,
    disturbance,
    environment,
    interleave,
    matmul_rate,
    once,
    read_rate,
    say,
    summary,
)
from benchmarks.report import SMOKE_TEST, print_line, print_table
from moe import Transformer
from moe.cache import Cache
from moe.checkpoint.format.config_json import render_config
from moe.config import ModelConfig
from moe.counts import count_parameters
from moe.presets import preset

BACKENDS = ("grouped_mm", "batched_mm", "eager")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHED_MM_LIMIT = 2**32  # bytes of weights that it may copy: it gathers an expert's weights for every routed row


@dataclass(frozen=True)
class Decoding:
    """Decoding of `batch` sequences after a prefill of `context` tokens each."""

    batch: int
    context: int


@dataclass(frozen=True)
class Sizes:
    """Amount of work: tokens of each kind, timed rounds, and sizes for the ceilings (matrix width, bytes)."""

    train: int = 512
    prefill: int = 1024
    decode: int = 16
    short: int = 64
    batches: tuple[int, ...] = (8, 32)
    batch_context: int = 256
    rounds: int = 7
    matmul: int = 4096
    read: int = 2**29

    @property
    def decodings(self) -> dict[str, Decoding]:
        batches = {f"batch {batch}": Decoding(batch, self.batch_context) for batch in self.batches}
        return {"decode": Decoding(1, self.prefill), "short": Decoding(1, self.short), **batches}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each kind of work."""
        decoded = {work: decoding.batch * self.decode for work, decoding in self.decodings.items()}
        return {"train": self.train, "prefill": self.prefill, **decoded}


SMALL = Sizes(
    train=32, prefill=48, decode=4, short=16, batches=(3,), batch_context=24, rounds=2, matmul=512, read=2**22
)

JUDGED = 3  # sequences of a batch whose logits are compared with the reference


class Ours:
    """The timed work on a `moe.Transformer`."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def train(self, ids: Tensor) -> None:
        self.model.train()
        loss = self.model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, logits_to_keep: int = 1) -> tuple[Tensor, Cache]:
        self.model.eval()
        cache = Cache(self.model.config)
        return self.model(ids, cache=cache, logits_to_keep=logits_to_keep).logits, cache

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits of ids [B, n], a token at a time; afterwards the cache is restored."""
        length = cache.length
        logits = [self.model(ids[:, i : i + 1], cache=cache).logits for i in range(ids.shape[1])]
        cache.truncate(length)
        return torch.cat(logits, dim=1)


class Theirs:
    """The same work on a transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # transformers 5.24 renames past_key_values.
        self.cache = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    def use(self, backend: str) -> None:
        self.model.set_experts_implementation(backend)

    def train(self, ids: Tensor) -> None:
        self.model.train()
        self.model(ids, labels=ids, use_cache=False).loss.backward()

    @torch.inference_mode()
    def prefill(self, ids: Tensor, logits_to_keep: int = 1) -> tuple[Tensor, Any]:
        from transformers import DynamicCache

        self.model.eval()
        cache = DynamicCache(config=self.model.config)
        return self.model(ids, **{self.cache: cache}, logits_to_keep=logits_to_keep).logits, cache

    @torch.inference_mode()
    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        logits = [self.model(ids[:, i : i + 1], **{self.cache: cache}).logits for i in range(ids.shape[1])]
        cache.crop(-ids.shape[1])
        return torch.cat(logits, dim=1)


def peer(model: Transformer, dtype: torch.dtype) -> Theirs:
    """transformers' model of the same configuration, with a copy of the weights in `dtype`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config.from_dict(render_config(model.config, Path("config.json")))
    config._attn_implementation = "sdpa"
    theirs: Any = DeepseekV3ForCausalLM(config)
    theirs.to(dtype)
    state = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in model.state_dict().items()}
    if model.lm_head is None:
        state["lm_head.weight"] = model.embed_tokens.weight
    theirs.load_state_dict(state)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.float()  # as from_pretrained leaves it
    return Theirs(theirs)


@dataclass(frozen=True)
class Reference:
    """Results in float64.

    logits [1, prefill + decode, V]; those of the decoded tokens of the first sequences of a batch, [3, decode, V]; and
    gradients of the training work by parameter.
    """

    logits: Tensor
    batch: Tensor
    gradients: dict[str, Tensor]


def batch_of(ids: Tensor, sizes: Sizes) -> Tensor:
    """Different sequences for batches, [B, batch_context + decode], from ids [1, prefill + decode]."""
    length, most = sizes.batch_context + sizes.decode, max(sizes.batches)
    return torch.stack([ids[0].roll(-5 * row)[:length] for row in range(most)])


def texts(ids: Tensor, sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """(Prompt, tokens to decode after it) of each decoding."""
    many, texts = batch_of(ids, sizes), {}
    for work, decoding in sizes.decodings.items():
        text = ids if decoding.batch == 1 else many[: decoding.batch]
        end = decoding.context + sizes.decode
        texts[work] = text[:, : decoding.context], text[:, decoding.context : end]
    return texts


def reference(model: Transformer, ids: Tensor, sizes: Sizes) -> Reference:
    """Run transformers' model in float64 with its eager backend over ids [1, prefill + decode]."""
    exact = peer(model, torch.float64)
    exact.use("eager")
    logits = exact.prefill(ids, logits_to_keep=0)[0]
    batch = exact.prefill(batch_of(ids, sizes)[:JUDGED], logits_to_keep=sizes.decode)[0]
    # The eager backend slices one expert at a time out of the stacked parameter, and the gradient of each slice is as
    # large as the whole. A list of parameters is indexed alike, and 64 times cheaper.
    for module in list(exact.model.modules()):
        for name in ("gate_up_proj", "down_proj"):
            stacked = getattr(module, name, None)
            if isinstance(stacked, nn.Parameter):
                delattr(module, name)
                setattr(module, name, nn.ParameterList(stacked.detach().unbind()))
    exact.train(ids[:, : sizes.train])
    gradients = {}
    for name, module in exact.model.named_modules():
        parts = list(module.parameters(recurse=False))
        if isinstance(module, nn.ParameterList):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
            gradients[name.removeprefix("model.")] = torch.stack(grads).float()
        else:
            for leaf, p in module.named_parameters(recurse=False):
                assert p.grad is not None
                gradients[f"{name}.{leaf}".removeprefix("model.")] = p.grad.float()
    return Reference(logits, batch, gradients)


Errors = dict[str, float]


def logit_errors(found: Tensor, exact: Tensor) -> Errors:
    """Errors of logits [1, S, V], see the module's docstring."""
    difference, exact = found.double() - exact.double(), exact.double()
    tokens = (difference.norm(dim=-1) / exact.norm(dim=-1)).flatten()
    return {
        "logits": float(tokens.quantile(0.5)),
        "logits, quartile": float(tokens.quantile(0.75)),
        "logits, largest": float(difference.abs().max() / exact.abs().max()),
    }


def gradient_errors(model: nn.Module, exact: dict[str, Tensor]) -> Errors:
    """Norm of the difference over the norm, of each parameter: median and largest."""
    each = []
    for name, p in model.named_parameters():
        g = exact[name.removeprefix("model.")]
        assert p.grad is not None
        each.append((p.grad.float() - g).norm() / g.norm().clamp_min(1e-30))
    errors = torch.stack(each)
    return {"gradients": float(errors.quantile(0.5)), "gradients, largest": float(errors.max())}


def errors(side: Ours | Theirs, ids: Tensor, exact: Reference, sizes: Sizes) -> dict[str, Errors]:
    """Errors of each kind of work: of the logits, for training also of the gradients."""
    logits, _ = side.prefill(ids[:, : sizes.prefill], logits_to_keep=0)
    prefill = logit_errors(logits, exact.logits[:, : sizes.prefill])
    decodings = {}
    for work, (prompt, following) in texts(ids, sizes).items():
        start, end = prompt.shape[1], prompt.shape[1] + sizes.decode
        expected = exact.logits[:, start:end] if len(prompt) == 1 else exact.batch
        _, cache = side.prefill(prompt)
        decodings[work] = logit_errors(side.decode(following, cache)[:JUDGED], expected)
    side.train(ids[:, : sizes.train])
    gradients = gradient_errors(side.model, exact.gradients)
    side.model.zero_grad()
    return {"train": prefill | gradients, "prefill": prefill, **decodings}


ROUNDINGS = {"logits": 64, "gradients": 128}


def acceptable(ours: Errors, theirs: Errors, dtype: torch.dtype) -> bool:
    """Whether no error of ours is NaN, above twice theirs, or, for a median, above its number of roundings."""
    unit = torch.finfo(dtype).eps / 2
    most = {name: min(2 * theirs[name], ROUNDINGS.get(name, math.inf) * unit) for name in ours}
    return all(ours[name] <= most[name] for name in ours)


def limits(config: ModelConfig, sizes: Sizes, itemsize: int, matmul: float, read: float) -> dict[str, float]:
    """Seconds of each kind of work at the ceilings, see the module's docstring."""
    counts = count_parameters(config)
    vocabulary = config.vocab_size * config.hidden_size
    active = counts.activated - counts.embedding - counts.head
    per_pair = config.num_attention_heads * (config.qk_head_dim + (config.v_head_dim or 0)) * config.num_hidden_layers

    def forward(tokens: int, positions: int) -> int:
        return 2 * active * tokens + per_pair * tokens**2 + 2 * vocabulary * positions

    experts, k = counts.routed_experts, config.num_experts_per_tok / config.n_routed_experts
    per_token = ((config.kv_lora_rank or 0) + config.rope_dim) * config.num_hidden_layers

    def decoding(batch: int, context: int) -> float:
        used = active + experts * ((1 - (1 - k) ** batch) - k)
        values = used + vocabulary + batch * per_token * (context + sizes.decode / 2)
        flops = 2 * (active + vocabulary) + 2 * per_pair * context
        return sizes.decode * max(itemsize * values / read, batch * flops / matmul)

    return {
        "train": 3 * forward(sizes.train, sizes.train) / matmul,
        "prefill": forward(sizes.prefill, 1) / matmul,
        **{work: decoding(d.batch, d.context) for work, d in sizes.decodings.items()},
    }


def works(side: Ours | Theirs, ids: Tensor, sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """The calls to time, by name."""

    def train() -> None:
        side.train(ids[:, : sizes.train])
        side.model.zero_grad()

    def decoding(prompt: Tensor, following: Tensor) -> Callable[[], Any]:
        _, cache = side.prefill(prompt)
        return lambda: side.decode(following, cache)

    decodings = {work: decoding(*text) for work, text in texts(ids, sizes).items()}
    return {"train": train, "prefill": lambda: side.prefill(ids[:, : sizes.prefill]), **decodings}


def fastest_backend(theirs: Theirs, call: Callable[[], Any], work: str, sizes: Sizes) -> str:
    """The backend with the fastest of two calls; of one call if that takes three times as long as another's best.

    batched_mm is left out if its copies of the weights would exceed `BATCHED_MM_LIMIT`.
    """
    config = theirs.model.config
    tokens = sizes.decodings[work].batch if work in sizes.decodings else sizes.tokens[work]
    rows = tokens * config.num_experts_per_tok
    copied = rows * 3 * config.hidden_size * config.moe_intermediate_size * 4
    seconds: dict[str, float] = {}
    for backend in BACKENDS:
        if backend == "batched_mm" and copied > BATCHED_MM_LIMIT:
            continue
        theirs.use(backend)
        seconds[backend] = once(call)
        if seconds[backend] < 3 * min(seconds.values()):
            seconds[backend] = min(seconds[backend], once(call))
    return min(seconds, key=lambda backend: seconds[backend])


def compare(ours: Ours, theirs: Theirs, ids: Tensor, exact: Reference, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One record for each kind of work: errors, and times if ours are acceptable."""
    mine, other = works(ours, ids, sizes), works(theirs, ids, sizes)
    our_errors = errors(ours, ids, exact, sizes)
    dtype = next(ours.model.parameters()).dtype
    peer_errors: dict[str, dict[str, Errors]] = {}
    for work in mine:
        say(f"{work}: looking for the fastest backend")
        backend = fastest_backend(theirs, other[work], work, sizes)
        theirs.use(backend)
        if backend not in peer_errors:
            peer_errors[backend] = errors(theirs, ids, exact, sizes)
        record: dict[str, Any] = {"work": work, "backend": backend}
        record |= {"errors": our_errors[work], "peer_errors": peer_errors[backend][work]}
        if acceptable(record["errors"], record["peer_errors"], dtype):
            say(f"{work}: {sizes.rounds} rounds, compared with {backend}")
            others = OtherProcesses()
            seconds = interleave({"ours": mine[work], "peer": other[work]}, sizes.rounds)
            record |= others.record()
            record["ours"], record["peer"] = summary(seconds["ours"]), summary(seconds["peer"])
            record["ratio"] = record["peer"]["median_s"] / record["ours"]["median_s"]
        yield record


def measure(name: str, dtype: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Records of all work with the preset's model in one dtype."""
    # Without parts that transformers' model does not have in training.
    config = dataclasses.replace(preset(name), num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    model = Transformer(config).to(DTYPES[dtype])
    ids = torch.randint(
        config.vocab_size, (1, sizes.prefill + sizes.decode), generator=torch.Generator().manual_seed(0)
    )
    say(f"{name} {dtype}: float64 reference")
    exact = reference(model, ids, sizes)
    matmul, read = matmul_rate(DTYPES[dtype], sizes.matmul), read_rate(DTYPES[dtype], sizes.read)
    at_limit = limits(config, sizes, DTYPES[dtype].itemsize, matmul, read)
    about = {"preset": name, "dtype": dtype, "matmul_flops": matmul, "read_bytes": read}
    about |= environment(small=sizes is SMALL)
    records = compare(Ours(model), peer(model, DTYPES[dtype]), ids, exact, sizes)
    return [{**about, "tokens": sizes.tokens[r["work"]], "limit_s": at_limit[r["work"]], **r} for r in records]


def show(records: list[dict[str, Any]]) -> None:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    print_line(f"{first['device']}; {versions}; commit {first['commit']}, load average {first['load']}")
    headings = ("work", "dtype", "backend", *(("result",) if first["small"] else RATES), "errors\nours", "theirs")
    rows, notes = [], []
    for r in records:
        found, theirs = (
            "\n".join(f"{r[key][name]:.1e}" for name in ROUNDINGS if name in r[key])
            for key in ("errors", "peer_errors")
        )
        if "ratio" not in r:
            worse = [name for name, error in r["errors"].items() if not error <= 2 * r["peer_errors"][name]]
            notes.append(f"{r['work']} {r['dtype']} is wrong: error of {'; '.join(worse) or 'both'}")
            cells = ["wrong"] + [""] * (0 if first["small"] else len(RATES) - 1)
        elif first["small"]:
            cells = ["right"]
        else:
            cells = [cell for side in ("ours", "peer") for cell in _rate(r, r[side]["median_s"])]
            cells.append(f"{r['ratio']:.2f}")
        rows.append((r["work"], r["dtype"], r["backend"], *cells, found, theirs))
    print_table(f"{first['preset']} beside transformers", headings, rows, names=3)
    for note in notes:
        print_line(note)
    print_line("errors are medians: of logits, and for train below them of gradients")
    if first["small"]:
        print_line(SMOKE_TEST)
        return
    print_line("tokens/s are medians; ratio: our tokens/s over theirs (higher is better)")
    for dtype in {r["dtype"]: r for r in records}.values():
        matmul, read = dtype["matmul_flops"] / 1e9, dtype["read_bytes"] / 1e9
        print_line(f"{dtype['dtype']} ceilings: matmul {matmul:.0f} GFLOP/s, memory read {read:.1f} GB/s")
    if line := disturbance(records):
        print_line(line)


RATES = ("tokens/s\nours", "% of\nlimit", "tokens/s\ntheirs", "% of\nlimit", "ratio")


def _rate(record: dict[str, Any], seconds: float) -> tuple[str, str]:
    """Tokens/s, and % of the limit."""
    return f"{record['tokens'] / seconds:.1f}", f"{100 * record['limit_s'] / seconds:.0f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", metavar="NAME", help="Preset of family deepseek_v3; default: bench_400m; with --small: tiny")
    add("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="Parameter dtypes; default: both")
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
    sizes = SMALL if args.small else Sizes()
    name = args.preset or ("tiny" if args.small else "bench_400m")
    try:
        family = preset(name).model_type
    except ValueError as error:
        raise BadInput(f"--preset: {error}") from None
    if family != "deepseek_v3":
        raise BadInput(f"--preset {name}: wrong family; expected deepseek_v3; found {family}")
    if args.json:
        append(args.json, [])
    records = []
    for dtype in dict.fromkeys(args.dtype):
        records += measure(name, dtype, sizes)
    show(records)
    if args.json:
        append(args.json, records)
    return 0
