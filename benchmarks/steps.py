"""Steps of `qualify`, each in its own process: python -m benchmarks.steps STEP [--device D] [--lines FILE] ...

A step appends JSON lines to its file: facts of the machine, and checks, each a number beside the most that it may be.
Exit status: 0; 1 if a check or the step itself fails; 3 if something that the step needs is missing.

Checks compare the device with the CPU. Both round: a chain of N products with inner size K is off by at most N times
the tolerance of one product (benchmarks/correctness.py), relative to the norm of its result, on either side.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT, one_line

NOT_USABLE = 3  # exit status
NO_KERNELS = "torch's operators run on"  # how the warning begins that a GPU is used without the kernels
SLOW_PEERS = ("loop", "transformers-eager")  # never the best, and never in time
MORE_PEERS = (*SLOW_PEERS, "transformers-batched_mm")
PRODUCTS = 6  # chained in one block: two of the queries, attention, its output, two of the experts


class NotUsable(Exception):
    """A requirement of a step is missing."""


@dataclasses.dataclass
class Step:
    """Device, arguments and output file of a step."""

    device: str
    lines: Path | None
    words: list[str]
    failed: list[str] = dataclasses.field(default_factory=list)

    def write(self, **record: Any) -> None:
        print(", ".join(f"{name} {value}" for name, value in record.items()), flush=True)
        if self.lines is not None:
            with self.lines.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def fact(self, name: str, value: Any) -> None:
        self.write(fact=name, value=value)

    def check(self, what: str, found: float, most: float) -> None:
        """`found` must not be above `most`, and a NaN is."""
        right = found <= most
        self.write(check=what, found=found, most=most, right=right)
        if not right:
            self.failed.append(f"{what}: {found:.3g}, at most {most:.3g}")


def machine(step: Step) -> None:
    """Writes the fields common to all records, and facts about the machine."""
    from benchmarks.layer import about

    found = about(step.device)
    names = ("numpy", "pytest", "einops", "safetensors", "rich", "tokenizers", "matplotlib", "tyro", "hypothesis")
    for package in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][package] = importlib.metadata.version(package)
    step.write(about=found)
    step.fact("python", f"{platform.python_version()}, {platform.platform()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    step.fact("cpu", f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB")
    step.fact("C compiler", _first_line("cc", "--version") or "none, and Triton needs one")
    for folder in (Path.home(), Path(tempfile.gettempdir())):
        free, writable = shutil.disk_usage(folder).free, os.access(folder, os.W_OK)
        step.fact(f"free in {folder}", f"{free / 2**30:.0f} GiB, {'writable' if writable else 'not writable'}")
    if step.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        step.fact("gpu", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors")
        step.fact("gpu memory", f"{gpu.total_memory / 2**30:.1f} GiB")
        step.fact("cuda of torch", str(torch.version.cuda))
        fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "compute_mode")
        line = _first_line("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        for field, value in zip(fields, line.split(", "), strict=False):
            step.fact(field, value or "unknown")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def probe(step: Step) -> None:
    """A little work on the device, for tools that watch it."""
    x = torch.ones(1024, device=step.device)
    step.check("sum of ones", abs(float((x + x).sum()) - 2048), 0)


def kernel(step: Step) -> None:
    """Our kernels are found, compile and run; `tier="triton"` never falls back."""
    from tests.support.cases import BY_NAME
    from tests.support.operators import fused

    inputs = BY_NAME["ragged"].inputs(torch.float32)
    exact = fused(inputs.to(torch.float64), tier="reference")
    here = dataclasses.replace(inputs, **{name: t.to(step.device) for name, t in vars(inputs).items()})
    _near(step, "moe_mlp", fused(here, tier="triton"), exact, products=3)


def packages(step: Step) -> None:
    """Which optional packages and peers can be imported."""
    from benchmarks.peers import PEERS

    for name in ("transformers", "tokenizers", "matplotlib"):
        try:
            step.fact(name, importlib.import_module(name).__version__)
        except Exception as error:  # a package may fail in any way while it is imported
            step.fact(name, f"not usable: {one_line(error)}")
    for peer in PEERS:
        step.fact(f"peer {peer.name}", peer.absent(step.device) or "here")


def bound(products: int, inner: int = 256) -> float:
    from benchmarks.correctness import tolerance

    return 2 * products * tolerance(torch.float32, inner)


def _near(step: Step, what: str, found: Tensor, exact: Tensor, products: int) -> None:
    difference = found.detach().cpu().double() - exact.detach().cpu().double()
    step.check(what, float(difference.norm() / exact.detach().cpu().double().norm()), bound(products))


@contextlib.contextmanager
def _routed_alike(model: nn.Module, ids: list[Tensor], *, record: bool) -> Iterator[None]:
    """Records which experts the routers choose, or makes them choose what was recorded.

    Two devices may decide a near tie differently, and each is right: routing is compared by tests of its own.
    """
    from moe import balance

    waiting = iter(list(ids))

    def choose(router: Any) -> Callable[[Tensor], Any]:
        original = router.route

        def route(logits: Tensor) -> Any:
            if record:
                chosen = original(logits)
                ids.append(chosen.expert_ids.cpu())
                return chosen
            return router.replay(logits, next(waiting).to(logits.device))

        return route

    routers = [router for _, router in balance.routers(model)]
    for router in routers:
        router.route = choose(router)
    try:
        yield
    finally:
        for router in routers:
            del router.route


def _tiny(folder: Path) -> tuple[Any, Any]:
    """The tiny preset saved, and loaded on the CPU: (model, token ids)."""
    import moe

    moe.Transformer(moe.preset("tiny"), seed=1).save(folder)
    model = moe.load(folder)
    ids = torch.randint(model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    return model, ids


def _chain(model: Any) -> int:
    """Products that one logit has gone through, and its prediction of the token after the next."""
    return PRODUCTS * (len(model.layers) + len(model.mtp)) + 1


def load(step: Step) -> None:
    """`moe.load` on the device: the same parameters, and logits, loss and gradients near the CPU's."""
    import moe

    with tempfile.TemporaryDirectory() as folder:
        there, ids = _tiny(Path(folder))
        here = moe.load(folder, device=step.device)
    differing = [n for n, p in here.state_dict().items() if not torch.equal(p.cpu(), there.state_dict()[n])]
    step.check("tensors that differ from the file's", len(differing), 0)
    experts: list[Tensor] = []
    results = []
    for model, record in ((there, True), (here, False)):
        on = ids.to(next(model.parameters()).device)
        with _routed_alike(model.train(), experts, record=record):
            out = model(on, labels=on)
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        step.check("parameters without a gradient", sum(p.grad is None for p in model.parameters()), 0)
        results.append((out.logits, out.loss, torch.cat([g.flatten().cpu() for g in grads])))
    (logits, loss, grads), (found, found_loss, found_grads) = results
    _near(step, "logits", found, logits, _chain(there))
    _near(step, "loss", found_loss, loss, _chain(there))
    _near(step, "gradients", found_grads, grads, 3 * _chain(there))


def generate(step: Step) -> None:
    """Greedy tokens are the CPU's, up to a tie of the two best."""
    import moe

    new = 24
    with tempfile.TemporaryDirectory() as folder:
        there, ids = _tiny(Path(folder))
        here = moe.load(folder, device=step.device)
    prompt, experts = ids[:1, :12], []
    with _routed_alike(there, experts, record=True):
        expected = moe.generate(there, prompt, max_new_tokens=new)[0]
    with _routed_alike(here, experts, record=False):
        found = moe.generate(here, prompt.to(step.device), max_new_tokens=new)[0].cpu()
    step.check("tokens that are missing", len(expected) - len(found), 0)
    differing = (expected != found).nonzero()
    if len(differing):
        # The CPU's logits where the two part: only a tie within what both round is a reason.
        at = int(differing[0])
        with torch.no_grad():
            logits = there(expected[None, :at]).logits[0, -1].double()
        best, other = logits[expected[at]], logits[found[at]]
        step.check(f"gap of the logits at token {at}", float((best - other) / logits.norm()), 2 * bound(_chain(there)))
    step.fact("tokens alike", int(differing[0]) if len(differing) else len(expected))


def train(step: Step) -> None:
    """The tiny preset trained, and resumed with the same bits; the CPU finds the same validation loss."""
    try:
        from moe.train.run import train as run
    except ImportError as error:
        raise NotUsable(one_line(error)) from None
    from rich.console import Console
    from safetensors.torch import load_file

    import moe
    from moe.train.data import open_dataset
    from moe.train.loop import Trainer
    from moe.train.settings import Settings

    sizes: dict[str, Any] = {
        "device": step.device,
        "steps": 8,
        "save_every": 4,
        "eval_every": 0,
        "warmup": 2,
        "seq_length": 64,
    }
    data = (ROOT / "CONTRIBUTING.md", ROOT / "LICENSE")
    settings = Settings(preset="tiny", data=data, **sizes)
    with tempfile.TemporaryDirectory() as temporary:
        whole, again = Path(temporary, "whole"), Path(temporary, "again")
        summary = run(settings, whole, console=Console(stderr=True))
        assert summary is not None
        shutil.copytree(whole, again)
        for later in ("states/step-000008", "checkpoint", "summary.json"):
            path = again / later
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        run(settings, again, resume=True, console=Console(stderr=True))
        states = [load_file(folder / "states/step-000008/tensors.safetensors") for folder in (whole, again)]
        differing = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
        step.check("tensors that differ after the run was resumed", len(differing), 0)
        nats = {when: summary["validation"][when]["nats_per_token"] for when in ("before", "after")}
        step.check("validation loss after training, of before", nats["after"] / nats["before"], 0.99)
        model = moe.load(whole / "checkpoint")
        there = Trainer(model, open_dataset(whole / "data"), dataclasses.replace(settings, device="cpu"))
        found = there.evaluate().nats_per_token
    # Few tokens have a near tie, and one that is routed differently changes the mean by less than what all round.
    step.check("validation loss on the CPU", abs(found / nats["after"] - 1), bound(_chain(model)))


def transformers(step: Step) -> None:
    """A transformers model with our experts on the device, beside its own eager ones on the CPU."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM

        import moe.integrations.transformers as integration
    except ImportError as error:
        raise NotUsable(one_line(error)) from None
    integration.register()
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(config).eval()
    ids = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(0))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_router_logits=True)
        # A near tie could be decided either way; these ids have none.
        ranked = torch.cat([logits.flatten(0, -2) for logits in out.router_logits]).sort(dim=-1, descending=True).values
        gap = float((ranked[:, 1] - ranked[:, 2]).min() / ranked.abs().max())
        model.set_experts_implementation("moesmith")
        found = model.to(step.device)(ids.to(step.device)).logits
    step.fact("smallest gap between a chosen expert and the next", gap)
    _near(step, "logits", found, out.logits, PRODUCTS * 2 + 1)


def compiled(step: Step) -> None:
    """A layer under torch.compile, by Inductor: output and gradients near eager's on the CPU."""
    import moe

    if step.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise NotUsable("Inductor needs a C++ compiler on the CPU")
    there = moe.MoELayer(64, 48, 16, 4, n_shared_experts=1, initializer_range=0.2, seed=0)
    here = moe.MoELayer(64, 48, 16, 4, n_shared_experts=1, initializer_range=0.2, seed=0)
    here.load_state_dict(there.state_dict())
    here.to(step.device)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    ids = there.gate(x.flatten(0, 1)).expert_ids
    results = []
    for layer, call in ((there, there), (here, torch.compile(here))):
        on = x.to(next(layer.parameters()).device, copy=True).requires_grad_()
        y = call(on, routing=ids.to(on.device))
        y.square().sum().backward()
        grads = [on.grad, *(p.grad for p in layer.parameters())]
        results.append((y, torch.cat([g.flatten().cpu() for g in grads if g is not None])))
    _near(step, "output", results[1][0], results[0][0], 4)
    _near(step, "gradients", results[1][1], results[0][1], 3 * 4)


def one_rank(step: Step) -> None:
    """A training step through moe.parallel on a process group of one rank: NCCL on a GPU, gloo on a CPU."""
    import moe
    from moe.parallel import clip_grad_norm, make_mesh, parallelize, start

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    there = moe.Transformer(moe.preset("tiny"), seed=1).train()
    here = moe.Transformer(moe.preset("tiny"), seed=1).train().to(step.device)
    ids = torch.randint(there.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    experts: list[Tensor] = []
    with _routed_alike(there, experts, record=True):
        expected = there(ids, labels=ids).loss
    expected.backward()
    norm = nn.utils.get_total_norm([p.grad for p in there.parameters() if p.grad is not None])
    with start(timeout=60, device=step.device):
        mesh = make_mesh()
        parallelize(here, mesh)
        on = ids.to(step.device)
        with _routed_alike(here, experts, record=False):
            found = here(on, labels=on).loss
        found.backward()
        found_norm = clip_grad_norm(here.parameters(), float("inf"), journal=mesh.journal)
        _near(step, "loss", found, expected, _chain(there))
        _near(step, "norm of the gradient", found_norm, norm, 3 * _chain(there))


OPERATORS = (
    "moe_mlp ragged",
    "moe_mlp empty_experts",
    "moe_mlp one_token",
    "moe_mlp absent",
    "moe_mlp skew",
    "moe_mlp 128x64_rows_64_63_65",
    "moe_mlp 127x129_rows_127_0_129_128",
    "grouped_mm ragged",
    "permute absent",
    "route deepseek_v3",
)


def operator(step: Step) -> None:
    """One operator forward and backward in bfloat16, and without a gradient, on a case of the tests."""
    from benchmarks.peers import tier_for
    from moe import ops
    from tests.support.cases import BY_NAME, ROUTING_CASES
    from tests.support.operators import fused

    name, case = step.words
    if name == "route":
        routing = next(each for each in ROUTING_CASES if each.name == case)
        logits, bias = routing.inputs(torch.float32)
        logits = logits.to(step.device).requires_grad_()
        routed = ops.route(logits, None if bias is None else bias.to(step.device), **routing.settings)
        routed.weights.sum().backward()
        results = [routed.weights, logits.grad]
    else:
        found = BY_NAME[case].inputs(torch.bfloat16)
        inputs = dataclasses.replace(found, **{n: t.to(step.device) for n, t in vars(found).items()}).leaves()
        if name == "moe_mlp":
            tier = tier_for(inputs.x)
            y = fused(inputs, tier=tier)
            with torch.no_grad():
                results = [fused(inputs, tier=tier)]
        else:
            rows = ops.permute(inputs.x, inputs.expert_ids, BY_NAME[case].experts)
            y = rows.rows
            if name == "grouped_mm":
                y = ops.grouped_mm(rows.rows, inputs.gate_up.mT, rows.offsets)
            results = [ops.unpermute(rows.rows, rows.position, inputs.weights)]
        y.square().sum().backward()
        results += [y, inputs.x.grad]
    step.check("results that are not finite", sum(not bool(t.isfinite().all()) for t in results if t is not None), 0)


def benchmark(step: Step) -> None:
    """One shape beside its peers: forward and training, then decode. On a CPU, or with the word "small", small ones."""
    from benchmarks.__main__ import main
    from benchmarks.peers import PEERS
    from benchmarks.shapes import SONIC

    shape, *words = step.words
    small = step.device == "cpu" or "small" in words
    peers = [peer.name for peer in PEERS if peer.name not in (SLOW_PEERS if not small else MORE_PEERS)]
    command = ["layer", "--device", step.device, "--shape", shape, "--peers", *peers]
    command += ["--small", "--seconds", "0"] if small else ["--seconds", "0.1"]
    command += [] if step.lines is None else ["--json", str(step.lines)]
    own = small or shape in {each.name for each in SONIC}
    tokens = {"forward train": [] if own else ["4096", "32768"], "decode": ["1", "4"] if small else ["1", "16", "64"]}
    for ops, counts in tokens.items():
        status = main([*command, "--op", *ops.split(), *(["--tokens", *counts] if counts else [])])
        if status == 1:
            step.failed.append(f"{ops}: ours is wrong, fails or lacks memory; the benchmark's output says why")
        elif status:  # the device is lost, for one
            step.failed.append(f"{ops}: ended with status {status}")
            return


def profile(step: Step) -> None:
    """One training step of the expert MLP in bfloat16, for a profiler."""
    from benchmarks.jobs import Entry, prepare
    from benchmarks.peers import OURS
    from benchmarks.shapes import parse_shape

    shape, tokens = step.words
    job = prepare(Entry("train", parse_shape(shape), int(tokens), "uniform", "bf16"), step.device, seed=0)
    results = job.build(OURS)()
    step.check("results that are not finite", sum(not bool(t.isfinite().all()) for t in results), 0)


STEPS = {
    step.__name__: step
    for step in (
        machine,
        probe,
        kernel,
        packages,
        load,
        generate,
        train,
        transformers,
        compiled,
        one_rank,
        operator,
        benchmark,
        profile,
    )
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lines", type=Path)
    args = parser.parse_args(argv)
    warnings.filterwarnings("error", message=NO_KERNELS)
    step = Step(args.device, args.lines, args.words)
    try:
        STEPS[args.step](step)
        if step.device == "cuda":
            torch.cuda.synchronize()
    except NotUsable as error:
        step.write(unusable=str(error))
        return NOT_USABLE
    except Exception as error:
        traceback.print_exc()
        step.failed.append(f"{type(error).__name__}: {one_line(error)}")
    if step.failed:
        step.write(failed=step.failed[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
