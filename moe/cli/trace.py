"""`moesmith trace`: which experts each token chooses, and what follows for other hardware."""

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.checkpoint import read_config
from moe.checkpoint.reading.hub import explain_cache_misses, find
from moe.cli import eval as scoring
from moe.cli.options import COMPUTE_DTYPES, option, read_dtype
from moe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moe.trace import Trace

SUMMARY, RECORD = "trace.json", "trace.npz"
PLOTS = ("load.png", "balance.png", "co-activation.png")
PAIRS = 3  # per layer, in the summary


@dataclass(frozen=True)
class WhatIf:
    """Balance and caches on other hardware."""

    ep: tuple[int, ...] = ()
    """Numbers of GPUs that divide the experts of each layer. For each, prints the load of the busiest GPU divided by
    the mean, for experts in order and as placed by `moesmith place`. Experts are placed for the first half of the
    tokens; the load is that of the second half."""
    replicas: tuple[int, ...] = ()
    """With --ep: numbers of additional physical experts per GPU, replicas of experts with a high load. Default: 0."""
    cache_experts: tuple[int, ...] = ()
    """Sizes of a cache in fast memory, in experts per layer, while tokens are decoded one after the other. Prints hit
    rate and misses, without MTP modules, for three policies: keep the experts used last (lru), keep the most frequent
    experts of the first half of the tokens (frequency), and the best possible (oracle). All begin with those most
    frequent experts; hits are those of the second half."""


@dataclass(frozen=True)
class Args(scoring.TextArgs):
    """Record and plot which experts each token of a text chooses; compute balance and cache hits on other hardware.

    Writes trace.json (summary: load per layer and expert, MaxVio, dead experts, tokens near a tie, experts chosen
    together), trace.npz (every choice) and plots. The text is divided into windows that do not overlap, as by
    `moesmith eval`. If FOLDER is a trace that this command wrote, --ep and --cache-experts use its record, and no model
    is loaded.

    A token is near a tie if rounding the router's input to bf16 once typically changes the gap between its last expert
    and the next one, or between the groups of experts, by more than the gap itself. Other hardware or kernels may then
    choose another expert.

    MTP modules are recorded with the inputs that they have in training. The last tokens of a window have none.
    """

    out: Path | None = None
    """Folder to write, new or empty. Default: traces/NAME, for a FOLDER called NAME."""
    overwrite: bool = False
    """Replace the trace in --out."""
    tokens: int = 16384
    """Maximum number of tokens to record, from the start of the text."""
    what_if: WhatIf = field(default_factory=WhatIf)

    def check(self) -> None:
        super().check()
        if self.tokens < 2:
            raise ConfigError("--tokens", self.tokens, "2 or more")
        for name, least in (("ep", 1), ("replicas", 0), ("cache_experts", 1)):
            for value in getattr(self.what_if, name):
                if value < least:
                    raise ConfigError(option(name), value, f"{least} or more")
        if self.what_if.replicas and not self.what_if.ep:
            raise ConfigError("--replicas", self.what_if.replicas[0], "none without --ep")


def run(args: Args) -> int:
    recorded = Path(args.folder) / RECORD
    out = args.out
    if recorded.is_file():
        _refuse_options_of_a_model(args)
    elif out is None:
        out = Path("traces") / Path(os.path.abspath(args.folder)).name

    from moe.trace import Trace

    plots = None
    with nullcontext() if out is None else _replacing(out, args.overwrite) as new:
        trace = Trace.read(recorded) if recorded.is_file() else _record(args)
        facts = {"folder": args.folder, **_summary(trace), **_answers(trace, args.what_if)}
        if new is not None:
            trace.save(new / RECORD)
            plots = _plot(new, facts, trace)
            (new / SUMMARY).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts)
        if out is not None:
            _print_files(out, plots)
    return 0


def _record(args: Args) -> "Trace":
    with explain_cache_misses(args.folder):
        config = read_config(find(args.folder))
    if not config.has_experts:
        found = f"{config.num_hidden_layers} dense layers"
        raise CheckpointError(args.folder, "no routing to record", expected="a model with experts", found=found)
    _check_sizes(args.what_if, config.n_routed_experts, decoded=config.num_moe_layers)
    folder, load, dataset, settings = scoring.prepared(args)
    with explain_cache_misses(args.folder):
        model = load(dtype=read_dtype(args.dtype, COMPUTE_DTYPES))

    import numpy as np
    import torch

    from moe.trace import record
    from moe.train.data import document_ids
    from moe.train.loop import deterministic

    dataset.check_vocabulary(model.config)
    device = next(model.parameters()).device
    tokens = torch.from_numpy(dataset.validation[: args.tokens].astype(np.int64)).to(device)

    def batches() -> Iterator[dict[str, Any]]:
        whole = len(tokens) // settings.seq_length * settings.seq_length
        windows = tokens[:whole].view(-1, settings.seq_length)
        at_once = min(settings.batch_size, max(len(windows), 1))
        for ids in (*windows.split(at_once), tokens[None, whole:]):
            if ids.numel():
                documents = document_ids(ids, dataset.end_of_text) if settings.document_mask else None
                yield {"input_ids": ids, "document_ids": documents, "logits_to_keep": 1}

    try:
        with deterministic(), torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
            return record(model, batches())
    except FloatingPointError as error:
        raise CheckpointError(folder, str(error)) from None


def _refuse_options_of_a_model(args: Args) -> None:
    for each in fields(Args):
        changed = getattr(args, each.name) != each.default
        if changed and each.name not in ("folder", "json", "out", "overwrite", "what_if"):
            raise ConfigError(option(each.name), None, f"no such option, because {args.folder} is a trace")


def _check_sizes(asked: WhatIf, experts: int, *, decoded: int) -> None:
    """Raise ConfigError for a size that layers with this many experts do not have.

    `decoded` is the number of layers with experts that are not those of MTP modules.
    """
    from moe.planning.placement import MAX_PHYSICAL_EXPERTS

    for size in asked.cache_experts:
        if not decoded:
            raise ConfigError("--cache-experts", size, "none for a model with experts in MTP modules only")
        if size > experts:
            raise ConfigError("--cache-experts", size, f"at most the {experts} experts of a layer")
    for gpus in asked.ep:
        if gpus > experts:
            raise ConfigError("--ep", gpus, f"at most the {experts} experts of a layer")
        own = -(-experts // gpus)
        room = experts - own, "with which each GPU holds all experts"
        room = min(room, (MAX_PHYSICAL_EXPERTS // gpus - own, f"for {MAX_PHYSICAL_EXPERTS:,} experts on {gpus} GPUs"))
        for replicas in asked.replicas:
            if replicas > room[0]:
                raise ConfigError("--replicas", replicas, f"at most {room[0]}, {room[1]}")


def _summary(trace: "Trace") -> dict[str, Any]:
    import numpy as np

    from moe.trace import predicted_pairs
    from moe.train.scoring import load_rows

    k = trace.expert_ids.shape[2]
    layers = load_rows(trace.load)
    for row, share, pairs in zip(layers, trace.near_ties, trace.co_activation, strict=True):
        predicted = predicted_pairs(pairs.diagonal(), k)
        # The lift alone is highest for pairs that are rare.
        beyond = np.triu(pairs - predicted, 1)
        most = [divmod(int(at), trace.experts) for at in (-beyond).argsort(axis=None, kind="stable")[:PAIRS]]
        row["near_ties"] = share
        row["pairs"] = [
            {"experts": pair, "tokens": int(pairs[pair]), "lift": float(pairs[pair] / predicted[pair])}
            for pair in most
            if beyond[pair] > 0
        ]
    return {
        "tokens": trace.tokens,
        "windows": len(trace.starts),
        "experts": trace.experts,
        "experts_per_token": k,
        "expert_bytes": trace.expert_bytes,
        "layers": layers,
    }


def _answers(trace: "Trace", asked: WhatIf) -> dict[str, Any]:
    from moe.planning.expert_cache import POLICIES, simulate

    _check_sizes(asked, trace.experts, decoded=int(trace.routed.all(axis=1).sum()))
    k = trace.expert_ids.shape[2]
    placed = []
    for gpus in asked.ep:
        for replicas in asked.replicas or (0,):
            report = trace.placed(gpus, replicas)
            overall = {
                name: None if values is None else report.overall(values)
                for name, values in (("before", report.before), ("after", report.after), ("bound", report.bound))
            }
            placed.append({"gpus": gpus, "replicas": replicas, "overall": overall, "report": asdict(report)})
    before, after = trace.halves
    cached = [
        {
            "experts": report.capacity,
            "policy": policy,
            "hit_rate": report.hit_rate(policy),
            "misses_per_token": report.misses_per_token(policy, k),
            "bytes_per_token": report.misses_per_token(policy, k) * trace.expert_bytes,
            "hits": report.hits[policy].tolist(),
            "requests": report.requests,
        }
        for report in simulate(before, after, trace.experts, asked.cache_experts)
        for policy in POLICIES
    ]
    return {"ep": placed, "cache": cached}


def _plot(folder: Path, facts: dict[str, Any], trace: "Trace") -> list[str] | None:
    """Names of the plots; None without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from moe.train.plots import plot_trace

    return [file.name for file in plot_trace(folder, _title(facts), trace)]


def _title(facts: dict[str, Any]) -> str:
    windows = f"{facts['windows']:,} {'window' if facts['windows'] == 1 else 'windows'}"
    experts = f"{facts['experts_per_token']} of {facts['experts']} experts per token"
    return f"{facts['folder']}: {facts['tokens']:,} tokens in {windows}, {experts}"


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console

    from moe.train.report import print_table, print_text

    console, rows = Console(), []
    for row in facts["layers"]:
        pair = ("-", "-")
        if row["pairs"]:
            a, b = row["pairs"][0]["experts"]
            pair = f"{a} + {b}", f"{row['pairs'][0]['lift']:.2f}"
        tokens = f"{min(row['tokens']):,}", f"{max(row['tokens']):,}"
        rows.append(
            (
                row["layer"],
                f"{row['max_vio']:.3f}",
                str(row["dead_experts"]),
                *tokens,
                f"{row['near_ties']:.2%}",
                *pair,
            )
        )
    headings = ("layer", "MaxVio", "dead", "fewest", "most", "near ties", "top pair", "lift")
    print_table(console, _title(facts), headings, rows)
    if facts["ep"]:
        rows = []
        for each in facts["ep"]:
            report, overall = each["report"], each["overall"]
            worst = max(a / mean if mean else 1.0 for a, mean in zip(report["after"], report["mean"], strict=True))
            ratios = ("-" if value is None else f"{value:.3f}" for value in (*overall.values(), worst))
            rows.append((str(each["gpus"]), f"{report['physical_experts'] / each['gpus']:g}", *ratios))
        headings = ("GPUs", "experts per GPU", "in order", "placed", "lower bound", "worst layer, placed")
        print_table(console, "load of the busiest GPU / mean load", headings, rows, text_columns=0)
    if facts["cache"]:
        headings = ("policy", "experts per layer", "hit rate", "misses per token", "MiB per token")
        rows = [
            (
                each["policy"],
                str(each["experts"]),
                f"{each['hit_rate']:.2%}",
                f"{each['misses_per_token']:.2f}",
                f"{each['bytes_per_token'] / 2**20:,.2f}" if facts["expert_bytes"] else "-",
            )
            for each in facts["cache"]
        ]
        layers = len(facts["cache"][0]["hits"])
        print_table(console, f"cache of experts; all {layers} layers together", headings, rows)
    if facts["ep"] or facts["cache"]:
        print_text(console, "Placements and caches: first half of the tokens. Results: second half.")


def _print_files(out: Path, plots: list[str] | None) -> None:
    from rich.console import Console

    from moe.train.report import say

    none = 'none: matplotlib is not installed; pip install -e ".[plot]"'
    console = Console()
    say(console, f"record       {out / RECORD}, {SUMMARY}")
    say(console, f"plots        {none if plots is None else ', '.join(plots)}")


def _check_target(folder: Path, overwrite: bool) -> None:
    """Raise ConfigError if the folder is not new or empty, nor a trace that may be replaced."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names - {SUMMARY, RECORD, *PLOTS}:
        raise ConfigError("--out", str(folder), "a new or empty folder, or a trace with --overwrite")
    if names and not overwrite:
        raise ConfigError("--out", str(folder), "a new folder, or --overwrite to replace the trace")
    if folder.is_mount() or not os.access(folder, os.W_OK):  # renaming needs both
        raise ConfigError("--out", str(folder), "a folder that may be replaced; found a mount point or read-only one")


@contextmanager
def _replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the place of `folder` at the end of the block; after an exception nothing has changed.

    Raises ConfigError, before the block, if `folder` cannot be replaced or created.
    """
    target = Path(os.path.realpath(folder))
    missing = [parent for parent in target.parents if not os.path.lexists(parent)]
    with ExitStack() as stack:
        try:
            _check_target(target, overwrite)
            if not target.exists():
                for parent in reversed(missing):
                    parent.mkdir()
                    stack.callback(_remove_if_empty, parent)
                target.mkdir()  # tests the name
                target.rmdir()
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".trace.", dir=target.parent)))
        except OSError as error:
            where = str(folder) if error.filename is None else error.filename
            raise ConfigError("--out", f"{where}: {error.strerror}", "a folder that can be written") from None
        new = place / "new"
        new.mkdir()
        yield new
        _check_target(target, overwrite)
        if target.exists():
            os.replace(target, place / "old")
        os.replace(new, target)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
