"""Faults of a distributed run: python -m tests.faults [--kind ...] [--point ...] [--timeout 10] [--json FILE]

Processes over gloo train the small model of `tests.parallel.cases`. In the second step one of them, at one of its
collectives, is killed, leaves, stops, fails, hangs, leaves the call out, or sends other numbers of rows or values than
it should. Measured is, on every other rank, the time until an error leaves `moe.parallel.start`, and whether the error
names the rank that did it, and the step, layer and operation. A rank without an error within the hard limit hangs.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moe import balance
from moe.errors import ParallelError
from moe.parallel import clip_grad_norm, make_mesh, parallelize, start
from moe.parallel.journal import Entry, Journal
from moe.train.optimizer import build_optimizers
from tests.parallel.cases import built, token_batch

LAYER, ROUTER, BLOCK = "layers.2.mlp", "layers.2.mlp.gate", "layers.2"
POINTS = {
    "exchange of counts": LAYER,
    "dispatch of routing": LAYER,
    "dispatch of rows": LAYER,
    "return of results": LAYER,
    "gradient of results": LAYER,
    "gradient of rows": LAYER,
    "gradient of weights": LAYER,
    "gather of parameters": BLOCK,
    "reduction of gradients": BLOCK,
    "sum of counts": "loss",
    "clip norm": "gradients",
    "bias update": "routers",
    "balance loss": "routers",
}
KINDS = ("SIGKILL", "exit(0)", "_exit(0)", "SIGSTOP", "exception", "skipped call", "wrong split", "hang")
# What the default suite runs.
FEW = (
    ("SIGKILL", "dispatch of rows"),
    ("SIGSTOP", "gradient of results"),
    ("exception", "clip norm"),
    ("skipped call", "reduction of gradients"),
    ("wrong split", "gradient of rows"),
)
CALLS = ("all_to_all_single", "all_gather_single", "all_gather", "reduce_scatter_single", "all_reduce")
STEP, STEPS = 1, 3
SLACK = 15.0  # seconds after the timeout within which everybody must have learned what happened


@dataclass(frozen=True)
class Fault:
    kind: str
    point: str
    rank: int


class Faulty:
    """Stands before the method `collective` of a journal, and does the deed when the point comes."""

    def __init__(self, journal: Journal, fault: Fault, mark: Path) -> None:
        self.journal, self.fault, self.mark, self.collective = journal, fault, mark, journal.collective
        self.done = False

    @contextlib.contextmanager
    def __call__(self, layer: str, operation: str, group: Any = None, **what: Any) -> Iterator[Entry]:
        here = (self.journal.step, operation, layer) == (STEP, self.fault.point, POINTS[self.fault.point])
        if self.done or not here:
            with self.collective(layer, operation, group, **what) as entry:
                yield entry
            return
        self.done = True
        self.mark.write_text(str(time.time()))
        kind = self.fault.kind
        if kind in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "exit(0)":
            sys.exit(0)
        elif kind == "_exit(0)":
            os._exit(0)
        elif kind == "exception":
            raise ValueError("made to fail")
        elif kind == "hang":
            time.sleep(1000)
        if kind == "skipped call":
            with contextlib.ExitStack() as stack:
                for name in CALLS:
                    stack.enter_context(mock.patch.object(dist, name, _nothing))
                yield Entry(self.journal.count + 1, STEP, layer, operation)
        elif kind == "wrong split":
            if what.get("sent"):
                what["sent"] = _moved(what["sent"])
            elif "size" in what:
                what["size"] += 1
            with self.collective(layer, operation, group, **what) as entry, _other_splits():
                yield entry
        else:  # continued after SIGSTOP
            with self.collective(layer, operation, group, **what) as entry:
                yield entry


def _moved(splits: Sequence[int]) -> list[int]:
    """One row less for the rank that gets most, and one more for its neighbour."""
    moved = list(splits)
    most = moved.index(max(moved))
    moved[most] -= 1
    moved[(most + 1) % len(moved)] += 1
    return moved


def _nothing(output: Tensor | list[Tensor], given: Tensor | None = None, *_: Any, **__: Any) -> Any:
    """In place of a collective: what is given comes back, as far as it fits."""
    for each in output if isinstance(output, list) else [output]:
        if isinstance(given, Tensor):
            each.zero_().flatten()[: given.numel()].copy_(given.flatten()[: each.numel()])
    work = mock.Mock()
    work.is_completed.return_value = True
    return work


@contextlib.contextmanager
def _other_splits() -> Iterator[None]:
    """The next exchange announces or moves what nobody expects. (The journal knows; what of it torch is told, too.)"""
    exchange = dist.all_to_all_single

    def changed(output: Tensor, given: Tensor, outs: Any = None, ins: Any = None, **more: Any) -> Any:
        if ins is None:  # the counts themselves
            given = given.clone()
            given[:, 0] = torch.tensor(_moved(given[:, 0].tolist()))
            return exchange(output, given, **more)
        return exchange(output, given, outs, _moved(ins), **more)

    with mock.patch.object(dist, "all_to_all_single", changed):
        yield


def keep_store(port: int) -> None:
    """What torchrun does for its ranks."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()
    del store


def train(rank: int, size: int, port: int, fault: Fault, timeout: float, folder: Path, own_store: bool) -> None:
    """A rank: writes what it has learned to a file of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(own_store)
    torch.set_num_threads(1)
    learned: dict[str, Any] = {}
    try:
        with start(timeout=timeout, device="cpu") as watch:
            mesh = make_mesh(ep=2, journal=watch.journal)
            model = parallelize(built({"config": {"seq_aux": False}}), mesh)
            optimizers = build_optimizers(model, "adamw", 0.01, 0.1)
            balance.attach(model, optimizers[-1])
            if fault.rank == rank:
                faulty = Faulty(watch.journal, fault, folder / "injected")
                watch.journal.collective = faulty  # pyright: ignore[reportAttributeAccessIssue]
            for step in range(STEPS):
                watch.journal.begin(step)
                loss = model(**token_batch(step, rank)).loss
                assert loss is not None
                loss.backward()
                clip_grad_norm(model.parameters(), 1.0, journal=watch.journal)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                (folder / f"{rank}.steps").write_text(str(step + 1))
        learned = {"error": None}
    except ParallelError as error:
        learned = {"error": str(error), "named": [error.rank, error.step, error.layer, error.operation]}
    except BaseException as error:
        learned = {"error": f"{type(error).__name__}: {error}", "named": None}
    learned["time"] = time.time()
    (folder / f"{rank}.json").write_text(json.dumps(learned))
    os._exit(0)  # gloo's threads may wait for others until the timeout


@dataclass(frozen=True)
class Outcome:
    """Of one fault: what the `survivors` that should get an error got.

    Attributes:
        seconds: until the last of them had it; infinite where one hung.
        rank, operation: how many name the culprit, and the step, layer and operation.
        stepped: ranks whose optimizer stepped on after the fault, though it came before the norm.
        messages: the errors.
    """

    fault: Fault
    survivors: int
    seconds: float
    rank: int
    operation: int
    stepped: int
    messages: list[str]

    @property
    def good(self) -> bool:
        return self.rank == self.operation == self.survivors and not self.stepped and self.seconds < float("inf")


def inject(fault: Fault, *, ranks: int = 4, timeout: float, own_store: bool = True) -> Outcome:
    """With `own_store` the launcher keeps the ranks' store, as torchrun does; otherwise rank 0 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        processes = [
            context.Process(target=train, args=(rank, ranks, port, fault, timeout, folder, own_store))
            for rank in range(ranks)
        ]
        if own_store:
            processes.append(context.Process(target=keep_store, args=(port,)))
        for process in processes:
            process.start()
        others = [rank for rank in range(ranks) if rank != fault.rank]
        deadline = time.monotonic() + 60 + timeout + SLACK
        for rank in others:
            processes[rank].join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        mark = folder / "injected"
        assert mark.exists(), f"the run never came to {fault.point}"
        begun = float(mark.read_text())
        learned = [_read(folder / f"{rank}.json") for rank in others]
        steps = [int((folder / f"{rank}.steps").read_text()) for rank in others]
    # Wrong counts are as good as others, until the rows come.
    seen_at = "dispatch of routing" if fault == Fault("wrong split", "exchange of counts", fault.rank) else fault.point
    place = [STEP, POINTS[fault.point], seen_at]
    errors = [each for each in learned if each is not None and each["error"] is not None]
    named = [each["named"] for each in errors if each["named"]]
    before_norm = fault.point != "bias update"
    return Outcome(
        fault,
        len(others),
        max(each["time"] - begun for each in errors) if len(errors) == len(others) else float("inf"),
        sum(each[0] == fault.rank for each in named),
        sum(each[1:] == place for each in named),
        sum(count > STEP for count in steps) if before_norm else 0,
        [each["error"] if each else "hang, or killed" for each in learned],
    )


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4, help="processes, an even number")
    parser.add_argument("--rank", type=int, default=1, help="the one that fails")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds, of a collective")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--point", nargs="+", choices=POINTS, default=list(POINTS), metavar="POINT", help="operations")
    parser.add_argument("--few", action="store_true", help="what the default suite runs, of all kinds and points")
    parser.add_argument("--store", choices=("launcher", "rank 0"), default="launcher", help="who keeps the store")
    parser.add_argument("--json", type=Path, help="write the outcomes here, too")
    parser.add_argument("--verbose", action="store_true", help="print every error, not only of what failed")
    args = parser.parse_args()
    outcomes = []
    print(f"{'kind':13} {'point':23} {'seconds':>8}  {'rank':>5}  {'operation':>9}")
    for kind, point in FEW if args.few else itertools.product(args.kind, args.point):
        fault = Fault(kind, point, args.rank)
        outcome = inject(fault, ranks=args.ranks, timeout=args.timeout, own_store=args.store == "launcher")
        outcomes.append(outcome)
        n = outcome.survivors
        row = f"{kind:13} {point:23} {outcome.seconds:8.1f}  {outcome.rank}/{n:<3}  {outcome.operation:>7}/{n}"
        print(row + (f"  {outcome.stepped} stepped on" if outcome.stepped else ""), flush=True)
        if args.verbose or not outcome.good:
            print("\n".join(f"    {message}" for message in outcome.messages), flush=True)
    told = sum(outcome.survivors for outcome in outcomes)
    print(
        f"{len(outcomes)} faults, {told} survivors: worst {max(o.seconds for o in outcomes):.1f} s, "
        f"rank named by {sum(o.rank for o in outcomes)}/{told}, "
        f"step, layer and operation by {sum(o.operation for o in outcomes)}/{told}, "
        f"stepped on by {sum(o.stepped for o in outcomes)}"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
