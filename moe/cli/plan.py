"""`moesmith plan`: memory per GPU of a model, before a byte is moved."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from rich.console import Console

from moe.checkpoint import read_config
from moe.checkpoint.format.contents import Contents, read_contents, stated_dtype
from moe.checkpoint.format.dtypes import ALIASES, Dtype
from moe.checkpoint.format.folder import INDEX, has_weights, read_config_values
from moe.checkpoint.format.quantized_formats import Quantization, read_quantization
from moe.checkpoint.format.sizes import parse_size
from moe.checkpoint.reading.hub import CONFIGS, explain_cache_misses, find, headers_on_hub
from moe.cli.options import DTYPES, Option, dtype_option, read_dtype
from moe.cli.plan_cluster import (
    ClusterArgs,
    find_gpu,
    plan_facts,
    print_assumptions,
    print_fit,
    print_plan,
    print_published,
    published_facts,
)
from moe.cli.source import MODEL, unknown
from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError, one_line
from moe.planning import footprint
from moe.planning.cluster.settings import Mesh, Run
from moe.planning.footprint import Deployment, Estimate
from moe.presets import PRESETS
from moe.train.report import print_table, print_text


@dataclass(frozen=True)
class Args:
    """Print the memory that a model takes on each GPU, for inference and for training, and whether it fits.

    Sizes of weights are read from the headers of the files, also on the Hub. If there are no files, or if --dtype
    differs from theirs, they are computed from the configuration. The numbers are those of the GPU that needs the most
    memory. The assumptions are printed.

    With --gpu, plan a training run on a cluster: memory per rank, all-to-all bytes, time per step, days and cost.
    """

    model: Annotated[str | None, Option("MODEL", positional=True, text=MODEL)] = None
    gpus: int = 1
    """Number of GPUs: those that share one copy of the model; with --gpu, those of the whole cluster."""
    gpu: Annotated[str | None, Option("NAME")] = None
    """Plan a training run on a cluster of GPUs of this type: a100, h100, h800, h200, b200 or mi300x."""
    memory: Annotated[str | None, Option("SIZE")] = None
    """Memory per GPU. Default: that of --gpu, otherwise 80GiB."""
    ep: int = 1
    """Number of GPUs that divide the experts of each layer."""
    dtype: Annotated[str | None, dtype_option(DTYPES)] = None
    """Dtype of the weights; with --gpu, of the matrix products (fp8 or bf16). Default: that of the files, otherwise
    bf16; with --gpu, bf16."""
    tokens: int | None = None
    """Tokens per GPU: in the KV cache (inference) or in a micro-batch (training). Default: 8192; with --gpu, one
    sequence."""
    json: bool = False
    """Print one JSON object instead of tables."""
    published: bool = False
    """Fit the cost model to DeepSeek-V3's published GPU hours, and compare it with other published runs."""
    cluster: ClusterArgs = field(default_factory=ClusterArgs)


@dataclass(frozen=True)
class _Model:
    """A configuration, the dtype and the quantisation that config.json states, and the headers if they can be read."""

    config: ModelConfig
    stated: Dtype = "bf16"
    quantization: Quantization | None = None
    files: Contents | None = None


def run(args: Args) -> int:
    console = Console(highlight=False)
    if args.published:
        if args != Args(published=True, json=args.json):
            raise ConfigError("--published", None, "no other option than --json")
        facts = published_facts()
        print(json.dumps(facts)) if args.json else print_published(console, facts)
        return 0
    if args.model is None:
        raise ConfigError("MODEL", None, f"a folder, or one of the presets {', '.join(PRESETS)}")
    model = _find(args.model)
    memory = None if args.memory is None else parse_size(args.memory, "--memory")
    if memory is not None and memory < 2**20:
        raise ConfigError("--memory", args.memory, "at least 1MiB, with a unit such as GiB")
    dtype: Any = None if args.dtype is None else read_dtype(args.dtype, DTYPES)
    if args.gpu is not None:
        facts = _cluster(args, args.model, args.gpu, model.config, dtype, memory)
        print(json.dumps(facts, default=dict)) if args.json else print_plan(console, facts)
        return 0
    if args.cluster != ClusterArgs():
        raise ConfigError("--gpu", None, "a GPU, which the options of a training run require")
    return _tables(args, args.model, model, dtype, memory or 80 * 2**30, console)


def _cluster(args: Args, model: str, name: str, config: ModelConfig, dtype: Any, memory: int | None) -> dict[str, Any]:
    dtype = dtype or "bf16"
    if dtype not in ("fp8", "bf16"):
        raise ConfigError("dtype", dtype, "fp8 or bf16 with --gpu")
    cluster = args.cluster
    mesh = Mesh(args.gpus, cluster.pp, args.ep, cluster.gpus_per_node)
    tokens = cluster.training.sequence if args.tokens is None else args.tokens
    training_run = Run(config, mesh, cluster.training, tokens, dtype)
    return plan_facts(model, training_run, name, find_gpu(name, cluster.rated, memory), cluster)


def _dtype(model: _Model) -> Dtype:
    """Dtype of the files of a folder, or of the files that the configuration describes."""
    found = model.quantization
    if model.files is not None:
        return footprint.dtype_of(model.files)
    if found is None:
        return model.stated
    if found.error is not None:
        error = found.error
        expected = f"{error.expected}, or --dtype to plan for other files"
        raise CheckpointError(error.path, error.problem, expected=expected, found=error.found)
    return "fp8" if found.method == "fp8" else "mxfp4"


def _tables(args: Args, name: str, model: _Model, asked: Dtype | None, memory: int, console: Console) -> int:
    config, found = model.config, model.quantization
    dtype = asked or _dtype(model)
    files = model.files if model.files is not None and dtype == footprint.dtype_of(model.files) else None
    block_size = footprint.FP8_BLOCK if found is None or found.block_size is None else found.block_size
    placement = Deployment(args.gpus, args.ep, dtype, 8192 if args.tokens is None else args.tokens, block_size)
    estimates = {
        "inference": footprint.inference(config, placement, model.files),
        "training": footprint.training(config, placement),
    }
    stored = footprint.stored_in(files) if files else footprint.stored(config, dtype, block_size, model.files)
    if args.json:
        facts: dict[str, Any] = {"model": name, "memory": memory, "placement": dataclasses.asdict(placement)}
        facts["stored"] = dataclasses.asdict(stored)
        facts["stored_from"] = "config.json" if files is None else "headers"
        facts["quantization"] = None if found is None else found.name
        for purpose, estimate in estimates.items():
            fits = estimate.total <= memory
            facts[purpose] = dataclasses.asdict(estimate) | {"total": estimate.total, "fits": fits}
        print(json.dumps(facts, default=dict))
        return 0
    if found is not None and found.error is not None:
        print_text(
            console, f"{one_line(name)}: {found.name} files, which cannot be loaded; the plan is for {dtype} files."
        )
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in stored.values.items())
    source = "from the headers of its files" if files is not None else f"in {dtype}, computed from its configuration"
    print_text(
        console, f"{one_line(name)}: {stored.tensors:,} tensors, {stored.bytes:,} bytes ({kinds} values), {source}."
    )
    for purpose, estimate in estimates.items():
        console.print()
        _print(console, purpose, estimate, placement, memory, config)
    return 0


def _find(name: str) -> _Model:
    """A preset, or the headers, otherwise config.json, of a folder or of a model on the Hub."""
    if name in PRESETS:
        return _Model(PRESETS[name])
    try:
        folder = find(name, files=(*CONFIGS, INDEX))
    except CheckpointError as error:
        raise unknown(error, name, "MODEL") from error
    with explain_cache_misses(name):
        values = read_config_values(folder)
    found = read_quantization(folder, values)
    if found is not None and found.error is not None:
        return _Model(read_config(folder), _stated(values), found)
    headers = headers_on_hub(folder, name, optional=True)
    if not (has_weights(folder) if headers is None else headers):
        return _Model(read_config(folder), _stated(values), found)
    files = read_contents(folder, headers=headers)
    return _Model(files.config, _stated(values), found, files)


def _stated(values: Mapping[str, Any]) -> Dtype:
    return cast(Dtype, ALIASES.get(f"torch.{stated_dtype(values)}", "bf16"))


def _print(
    console: Console, name: str, estimate: Estimate, placement: Deployment, memory: int, config: ModelConfig
) -> None:
    where = f"{name} on {placement.gpus:,} GPU{'s' if placement.gpus > 1 else ''}, EP {placement.ep}"
    if config.n_routed_experts:
        where += f": {estimate.experts} of {config.n_routed_experts} experts per GPU"
    parts = {**estimate.parts, "total": estimate.total}
    rows = [(part, f"{nbytes / 2**30:,.2f}") for part, nbytes in parts.items() if part != "experts" or nbytes]
    print_table(console, where, ("part", "GiB per GPU"), rows)
    print_fit(console, estimate.total, memory)
    print_assumptions(console, estimate.assumptions)
