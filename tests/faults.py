"""Inject faults into a distributed run.

Several processes train the small model of `tests.parallel.cases` over gloo. In the second step, at one collective, one
of them is killed, exits, stops, fails, hangs, skips the call, or sends a wrong number of rows or values. For every
other rank, the program measures the time until `moe.parallel.start` raises an error, and checks that the error names
the failed rank, step, layer and operation. A rank without an error within the limit counts as hanging.
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
from moe.parallel.collective_log import CollectiveLog, Entry
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
# Run by the default test suite.
FEW = (
    ("SIGKILL", "dispatch of rows"),
    ("SIGSTOP", "gradient of results"),
    ("exception", "clip norm"),
    ("skipped call", "reduction of gradients"),
    ("wrong split", "gradient of rows"),
)
CALLS = ("all_to_all_single", "all_gather_single", "all_gather", "reduce_scatter_single", "all_reduce")
STEP, STEPS = 1, 3
SLACK = 15.0  # seconds after the timeout within which every rank must have an error


@dataclass(frozen=True)
class Fault:
    kind: str
    point: str
    rank: int


class Faulty:
    """Replacement for the method `collective` of a log that injects the fault at its point."""

    def __init__(self, log: CollectiveLog, fault: Fault, mark: Path) -> None:
        self.log, self.fault, self.mark, self.collective = log, fault, mark, log.collective
        self.done = False

    @contextlib.contextmanager
    def __call__(self, layer: str, operation: str, group: Any = None, **what: Any) -> Iterator[Entry]:
        here = (self.log.step, operation, layer) == (STEP, self.fault.point, POINTS[self.fault.point])
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
            raise ValueError("injected")
        elif kind == "hang":
            time.sleep(1000)
        if kind == "skipped call":
            with contextlib.ExitStack() as stack:
                for name in CALLS:
                    stack.enter_context(mock.patch.object(dist, name, _no_communication))
                yield Entry(self.log.count + 1, STEP, layer, operation)
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
    """One row fewer for the rank that receives most, and one more for the next rank."""
    moved = list(splits)
    most = moved.index(max(moved))
    moved[most] -= 1
    moved[(most + 1) % len(moved)] += 1
    return moved


def _no_communication(output: Tensor | list[Tensor], given: Tensor | None = None, *_: Any, **__: Any) -> Any:
    """Replacement for a collective that copies its input to its output, as far as it fits."""
    for each in output if isinstance(output, list) else [output]:
        if isinstance(given, Tensor):
            each.zero_().flatten()[: given.numel()].copy_(given.flatten()[: each.numel()])
    work = mock.Mock()
    work.is_completed.return_value = True
    return work


@contextlib.contextmanager
def _other_splits() -> Iterator[None]:
    """Change the counts or splits of the next `all_to_all_single`, as the log's entry was changed."""
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
    """Keep the store of the ranks in a process of its own, as torchrun does."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    signal.pause()
    del store


def train(rank: int, size: int, port: int, fault: Fault, timeout: float, folder: Path, own_store: bool) -> None:
    """Run one rank; writes its error to `RANK.json` in `folder`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(own_store)
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    try:
        with start(timeout=timeout, device="cpu") as job:
            mesh = make_mesh(ep=2, log=job.log)
            model = parallelize(built({"config": {"seq_aux": False}}), mesh)
            optimizers = build_optimizers(model, "adamw", 0.01, 0.1)
            balance.attach(model, optimizers[-1])
            if fault.rank == rank:
                faulty = Faulty(job.log, fault, folder / "injected")
                job.log.collective = faulty  # pyright: ignore[reportAttributeAccessIssue]
            for step in range(STEPS):
                job.log.set_step(step)
                loss = model(**token_batch(step, rank)).loss
                assert loss is not None
                loss.backward()
                clip_grad_norm(model.parameters(), 1.0, log=job.log)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                (folder / f"{rank}.steps").write_text(str(step + 1))
        result = {"error": None}
    except ParallelError as error:
        result = {"error": str(error), "named": [error.rank, error.step, error.layer, error.operation]}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}", "named": None}
    result["time"] = time.time()
    (folder / f"{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # gloo's threads may wait for others until the timeout


@dataclass(frozen=True)
class Outcome:
    """Errors of the ranks other than the failed one.

    Attributes:
        survivors: number of those ranks.
        seconds: time until the last of them had an error; infinite if one hung.
        rank, operation: number of errors that name the failed rank; and its step, layer and operation.
        stepped: number of ranks whose optimizer stepped after a fault that preceded the norm.
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
    """Run the ranks with one fault. With `own_store`, a separate process keeps their store; otherwise rank 0 does."""
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
        assert mark.exists(), f"the run never reached {fault.point}"
        begun = float(mark.read_text())
        results = [_read(folder / f"{rank}.json") for rank in others]
        steps = [int((folder / f"{rank}.steps").read_text()) for rank in others]
    # Wrong counts cannot be told from right ones until rows are sent.
    seen_at = "dispatch of routing" if fault == Fault("wrong split", "exchange of counts", fault.rank) else fault.point
    place = [STEP, POINTS[fault.point], seen_at]
    errors = [each for each in results if each is not None and each["error"] is not None]
    named = [each["named"] for each in errors if each["named"]]
    before_norm = fault.point != "bias update"
    return Outcome(
        fault,
        len(others),
        max(each["time"] - begun for each in errors) if len(errors) == len(others) else float("inf"),
        sum(each[0] == fault.rank for each in named),
        sum(each[1:] == place for each in named),
        sum(count > STEP for count in steps) if before_norm else 0,
        [each["error"] if each else "hangs or was killed" for each in results],
    )


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--ranks", type=int, metavar="N", default=4, help="Number of processes, even (default: 4)")
    parser.add_argument("--rank", type=int, metavar="N", default=1, help="Rank that fails (default: 1)")
    parser.add_argument(
        "--timeout", type=float, metavar="S", default=10.0, help="Timeout of a collective in seconds (default: 10)"
    )
    parser.add_argument(
        "--kind",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        metavar="KIND",
        help=f"Faults: {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument(
        "--point",
        nargs="+",
        choices=POINTS,
        default=list(POINTS),
        metavar="POINT",
        help=f"Operations: {', '.join(POINTS)} (default: all)",
    )
    parser.add_argument("--few", action="store_true", help="Inject only the faults of the default test suite")
    parser.add_argument(
        "--store",
        choices=("launcher", "rank 0"),
        default="launcher",
        help="Process that hosts the rendezvous store (default: launcher)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the outcomes to this file")
    parser.add_argument("--verbose", action="store_true", help="Print all errors, not only those of failed cases")
    args = parser.parse_args()
    outcomes = []
    print(f"{'kind':13} {'point':23} {'seconds':>8}  {'rank':>5}  {'operation':>9}")
    for kind, point in FEW if args.few else itertools.product(args.kind, args.point):
        fault = Fault(kind, point, args.rank)
        outcome = inject(fault, ranks=args.ranks, timeout=args.timeout, own_store=args.store == "launcher")
        outcomes.append(outcome)
        n = outcome.survivors
        row = f"{kind:13} {point:23} {outcome.seconds:8.1f}  {outcome.rank}/{n:<3}  {outcome.operation:>7}/{n}"
        print(row + (f"  {outcome.stepped} stepped after the fault" if outcome.stepped else ""), flush=True)
        if args.verbose or not outcome.good:
            print("\n".join(f"    {message}" for message in outcome.messages), flush=True)
    survivors = sum(outcome.survivors for outcome in outcomes)
    print(
        f"{len(outcomes)} faults, {survivors} survivors: worst {max(o.seconds for o in outcomes):.1f} s, "
        f"rank named by {sum(o.rank for o in outcomes)}/{survivors}, "
        f"step, layer and operation by {sum(o.operation for o in outcomes)}/{survivors}, "
        f"stepped after the fault by {sum(o.stepped for o in outcomes)}"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
