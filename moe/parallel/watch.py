"""Joining the other ranks, and saying which of them is missing, and where it was, when something fails.

Every rank has a thread that writes a sign of life and its place in the journal to the run's store once a second, and
looks whether another has failed; no rank reads more than that one key as long as none has. What a collective tells is
only that some other rank is gone, stopped, late or elsewhere: who and where is found by reading what all have written.
"""

import contextlib
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moe.errors import ParallelError, one_line
from moe.parallel.inquest import Account, error_at, find_culprit
from moe.parallel.journal import (
    CollectiveError,
    Journal,
    SplitError,
    StoppedError,
    is_communication,
    name_ranks,
    reason,
)

BEAT, SILENCE, PATIENCE = 1.0, 3.5, 7.0  # seconds: between signs of life, until one is missed, for all to be heard
FAILED = "failed"


@dataclass(frozen=True)
class Watch:
    """This process among the ranks of a run.

    Attributes:
        journal: for `make_mesh`; who trains sets its `step`, and gives it to `clip_grad_norm`.
    """

    rank: int
    size: int
    journal: Journal


@contextlib.contextmanager
def start(*, timeout: float = 600.0, device: str | None = None) -> Iterator[Watch]:
    """Join the ranks that torchrun has started, for the length of the block.

    An exception that leaves the block on one rank ends it on all: on that rank as it is, on the others as a
    `ParallelError` that says which rank failed, in which step, layer and operation; as does a rank that dies, stops,
    hangs, or leaves out a collective. Afterwards this process belongs to no run, and should end.

    Args:
        timeout: seconds after which a collective that another rank does not join is an error.
        device: "cuda" (NCCL; this process takes the GPU of its local rank) or "cpu" (gloo); by default what there is.

    Raises:
        ParallelError: not started by torchrun, or another rank has failed.
    """
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ParallelError(f"{lacking[0]} is not set: start with torchrun --nproc-per-node N ...")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Abort a collective that has timed out, but not the process: its next one raises then, and can say why.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        # It asks for a dump in the store that torchrun keeps over restarts, where it would end the next attempt, too.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    bound = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=bound))
        attempt = _meet(store, rank, size, timeout)
    except dist.DistError as error:
        raise ParallelError(f"not all ranks have come within {timeout:g} s: {reason(error)}") from error
    journal = Journal(rank, roll_call=device == "cpu")
    lookout = _Lookout(journal, size, attempt)
    lookout.start()
    try:
        backend = "nccl" if device == "cuda" else "gloo"
        store = PrefixStore(f"{attempt}/default_pg", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=bound)
        yield Watch(rank, size, journal)
    except Exception as error:
        told = lookout.fail(error)
        if told is None:
            raise
        raise told from error
    except BaseException as error:  # exit and Ctrl-C
        lookout.fail(error)
        raise
    # Not after a failure: gloo's groups wait for what they have begun, and others are not there to end it.
    dist.destroy_process_group()
    lookout.leave()


def _meet(store: Store, rank: int, size: int, timeout: float) -> str:
    """A name that only the ranks which run now have: -> rank 0's for this attempt.

    torchrun keeps one store over its restarts, and counts them on each node for itself. A rank that is early would take
    from it the address that a rank of the attempt before has left there.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    while time.monotonic() < deadline:
        if rank == 0:
            store.set("attempt", me)
            keys = [f"{me}/{other}" for other in range(1, size)]
            if not keys or store.check(keys):
                store.set(f"{me}/all", " ".join(name.decode() for name in store.multi_get(keys)))
                return me
        elif store.check(["attempt"]):
            attempt = store.get("attempt").decode()
            store.set(f"{attempt}/{rank}", me)
            if store.check([f"{attempt}/all"]) and me in store.get(f"{attempt}/all").decode().split():
                return attempt
        time.sleep(0.02)
    absent = [other for other in range(1, size) if not store.check([f"{me}/{other}"])] if rank == 0 else [0]
    raise ParallelError(f"{name_ranks(absent)} did not come within {timeout:g} s", rank=rank)


class _Lookout(threading.Thread):
    """Whatever concerns the store happens in this thread: a store that has been stopped blocks who asks it."""

    def __init__(self, journal: Journal, size: int, attempt: str) -> None:
        super().__init__(name="moe.parallel.watch", daemon=True)
        self.journal, self.size, self.attempt = journal, size, attempt
        # torchrun keeps the store itself; otherwise rank 0 does, and the others lose it with rank 0.
        self.keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self.account = Account("running")
        self.accounts: dict[int, Account] | None = None
        self.beat = 0
        self.beats: dict[int, tuple[int, float]] = {}  # of each rank, its last and when it was new
        self.wake, self.answered = threading.Event(), threading.Event()

    def leave(self) -> None:
        self.account = Account("left")
        self.wake.set()
        self.join(PATIENCE + SILENCE)

    def fail(self, error: BaseException) -> ParallelError | None:
        """Tells the others; -> what they have told, or None where `error` says it all."""
        self.account = Account(
            "failed",
            waiting=is_communication(error) and not isinstance(error, StoppedError),
            error=_named(error),
            own=not is_communication(error),
            blamed=error.rank if isinstance(error, SplitError) else None,
        )
        self.wake.set()
        me = self.journal.rank
        # The others' accounts are nothing to a rank with an error of its own; but rank 0 may keep the store for them.
        if me == self.keeper:
            self.join(2 * PATIENCE)
        else:
            self.answered.wait(PATIENCE + SILENCE)
        if self.account.own:
            return None
        if self.accounts is not None:
            return find_culprit(self.accounts, self.size)
        last = self.journal.entries[-1] if self.journal.entries else None
        if self.keeper is None or me == self.keeper:
            return error_at(last, f"{self.account.error}; the store does not answer", me)
        lost = "no sign of life of it, nor of the store that it keeps: killed, stopped or cut off"
        return error_at(last, lost, self.keeper)

    def run(self) -> None:
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=SILENCE),
            )
            self._watch(PrefixStore(f"{self.attempt}/watch", store))
        except RuntimeError:
            pass  # the store is gone, and its keeper with it: `accounts` stays None
        finally:
            self.answered.set()

    def _watch(self, store: Store) -> None:
        while self._write(store).state == "running":
            if self.journal.stopped is None and store.check([FAILED]):
                self.journal.stop("another rank has failed")
            self.wake.wait(BEAT)
        end = self.account
        if end.state == "failed":
            store.set(FAILED, "")
            if not end.own:
                self.accounts = self._ask(store, lambda account: account.state != "running")
        self.account = dataclasses.replace(end, heard=True)
        self._write(store)
        self.answered.set()
        if self.journal.rank == self.keeper:
            # A rank that has not come until now hangs; but where nobody was asked, they have yet to come.
            hangs = self.accounts is not None
            self._ask(store, lambda account: account.heard or (hangs and account.state == "running"))

    def _write(self, store: Store) -> Account:
        account, entries = self.account, tuple(self.journal.entries)
        if account.state == "running" and self.journal.stopped is None:
            entries = entries[-1:]
        self.beat += 1
        account = dataclasses.replace(
            account, beat=self.beat, time=time.time(), count=self.journal.count, entries=entries
        )
        store.set(str(self.journal.rank), account.dump())
        return account

    def _ask(self, store: Store, enough: Callable[[Account], bool]) -> dict[int, Account]:
        """The accounts of all ranks, when each is `enough` or has missed its signs of life, or PATIENCE is over."""
        keys = [str(rank) for rank in range(self.size)]
        begun = time.monotonic()
        while True:
            self._write(store)
            there = keys if store.check(keys) else [key for key in keys if store.check([key])]
            accounts = {int(key): Account.load(text) for key, text in zip(there, store.multi_get(there), strict=True)}
            now = time.monotonic()
            for rank, account in accounts.items():
                beat, since = self.beats.get(rank, (0, now))
                if account.beat != beat:
                    self.beats[rank] = account.beat, now
                elif not enough(account) and now - since > SILENCE:
                    accounts[rank] = dataclasses.replace(account, silent=time.time() - account.time)
            others = [account for rank, account in accounts.items() if rank != self.journal.rank]
            if all(enough(other) or other.silent is not None for other in others) or now - begun > PATIENCE:
                return accounts
            time.sleep(BEAT / 4)


def _named(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"exit({one_line(error.code)})"
    if isinstance(error, CollectiveError):
        return error.problem
    return f"{type(error).__name__}: {reason(error)}" if str(error) else type(error).__name__
