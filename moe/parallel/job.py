"""Join the ranks of a job, and report which rank failed, and where, when the job fails.

In each rank, a thread writes a heartbeat and the last entry of its collective log to the job's store once a second, and
checks whether another rank has failed. While none has, no rank reads more than that one key. A failed collective shows
only that some other rank has failed; which one and where is found from the reports of all ranks.
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
from moe.parallel.collective_log import (
    CollectiveError,
    CollectiveLog,
    SplitError,
    StoppedError,
    format_ranks,
    is_communication_error,
    summarize,
)
from moe.parallel.diagnosis import RankReport, diagnose, error_at

HEARTBEAT = 1.0  # seconds between heartbeats
HEARTBEAT_TIMEOUT = 3.5  # seconds until a heartbeat is overdue
REPORT_TIMEOUT = 7.0  # seconds to wait for the reports of all ranks after a failure
FAILED = "failed"


@dataclass(frozen=True)
class Job:
    """The job of torchrun that this process belongs to.

    Attributes:
        rank, size: this process's rank, and the number of ranks.
        log: collective log of this rank, for `make_mesh` and `clip_grad_norm`. Call `log.set_step` in each step.
    """

    rank: int
    size: int
    log: CollectiveLog


@contextlib.contextmanager
def start(*, timeout: float = 600.0, device: str | None = None) -> Iterator[Job]:
    """Join the ranks that torchrun has started, for the length of the block.

    An exception that leaves the block on one rank ends the block on all ranks. The failed rank raises the exception
    itself; the others raise a `ParallelError` with its rank, step, layer and operation. The same happens if a rank
    dies, stops, hangs or skips a collective. After a failure, this process cannot rejoin the job and should exit.

    Args:
        timeout: seconds after which a collective fails if another rank has not joined it.
        device: "cuda" (NCCL; uses the GPU of the local rank) or "cpu" (gloo). Default: cuda if it is available.

    Raises:
        ParallelError: the process was not started by torchrun, or another rank has failed.
    """
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ParallelError(f"{lacking[0]} is not set: start with torchrun --nproc-per-node N ...")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Abort a collective that has timed out, but not the process, so that its next collective can raise.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        # The dump request stays in the store, which torchrun keeps over restarts, and would end the next attempt too.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    bound = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=bound))
        attempt = _agree_on_attempt(store, rank, size, timeout)
    except dist.DistError as error:
        raise ParallelError(f"not all ranks joined within {timeout:g} s: {summarize(error)}") from error
    log = CollectiveLog(rank, check_order=device == "cpu")
    monitor = _Monitor(log, size, attempt)
    monitor.start()
    try:
        backend = "nccl" if device == "cuda" else "gloo"
        store = PrefixStore(f"{attempt}/default_pg", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=bound)
        yield Job(rank, size, log)
    except Exception as error:
        failure = monitor.fail(error)
        if failure is None:
            raise
        raise failure from error
    except BaseException as error:  # exit and Ctrl-C
        monitor.fail(error)
        raise
    # Not after a failure: gloo would wait for collectives that the other ranks never finish.
    dist.destroy_process_group()
    monitor.leave()


def _agree_on_attempt(store: Store, rank: int, size: int, timeout: float) -> str:
    """Agree on a name for this attempt that only the ranks running now know; rank 0 chooses it.

    torchrun keeps one store over restarts, and each node counts restarts separately. Without such a name, an early rank
    could read the address of a rank of the previous attempt.
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
    raise ParallelError(f"{format_ranks(absent)} did not join within {timeout:g} s", rank=rank)


class _Monitor(threading.Thread):
    """Thread that exchanges reports with the other ranks. Only it uses the store, because a stopped store blocks."""

    def __init__(self, log: CollectiveLog, size: int, attempt: str) -> None:
        super().__init__(name="moe.parallel.monitor", daemon=True)
        self.log, self.size, self.attempt = log, size, attempt
        # torchrun keeps the store in a process of its own. Otherwise rank 0 keeps it, and its end is that of the store.
        self.store_rank = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
        self.report = RankReport("running")
        self.reports: dict[int, RankReport] | None = None
        self.heartbeat = 0
        self.seen: dict[int, tuple[int, float]] = {}  # by rank: its last heartbeat, and when it was first read
        self.wake = threading.Event()

    def leave(self) -> None:
        """Report that this rank has ended without an error."""
        self.report = RankReport("left")
        self.wake.set()
        self.join(REPORT_TIMEOUT + HEARTBEAT_TIMEOUT)

    def fail(self, error: BaseException) -> ParallelError | None:
        """Report an error; returns the diagnosis, or None if `error` is this rank's own."""
        self.report = RankReport(
            "failed",
            waiting=is_communication_error(error) and not isinstance(error, StoppedError),
            error=_describe(error),
            own=not is_communication_error(error),
            failed_rank=error.rank if isinstance(error, SplitError) else None,
        )
        self.wake.set()
        me = self.log.rank
        # Python aborts if it exits while this thread is in the store's C++ code. The rank that keeps the store waits
        # longer, because the other ranks need it until they have finished.
        self.join(2 * REPORT_TIMEOUT if me == self.store_rank else REPORT_TIMEOUT + HEARTBEAT_TIMEOUT)
        if self.report.own:
            return None
        if self.reports is not None:
            return diagnose(self.reports, self.size)
        last = self.log.entries[-1] if self.log.entries else None
        if self.store_rank is None or me == self.store_rank:
            return error_at(last, f"{self.report.error}; the store does not answer", me)
        lost = "sent no heartbeat, and its store does not answer: killed, stopped or disconnected"
        return error_at(last, lost, self.store_rank)

    def run(self) -> None:
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=HEARTBEAT_TIMEOUT),
            )
            self._monitor(PrefixStore(f"{self.attempt}/monitor", store))
        except RuntimeError:
            pass  # the store is gone, and `reports` stays None

    def _monitor(self, store: Store) -> None:
        while self._write(store).state == "running":
            if self.log.stopped is None and store.check([FAILED]):
                self.log.stop("another rank has failed")
            self.wake.wait(HEARTBEAT)
        end = self.report
        if end.state == "failed":
            store.set(FAILED, "")
            if not end.own:
                self.reports = self._read(store, lambda report: report.state != "running")
        self.report = dataclasses.replace(end, finished=True)
        self._write(store)
        if self.log.rank == self.store_rank:
            # A rank that was still running when the reports were read hangs, and will not finish.
            has_read = self.reports is not None
            self._read(store, lambda report: report.finished or (has_read and report.state == "running"))

    def _write(self, store: Store) -> RankReport:
        report, entries = self.report, tuple(self.log.entries)
        if report.state == "running" and self.log.stopped is None:
            entries = entries[-1:]
        self.heartbeat += 1
        report = dataclasses.replace(
            report, heartbeat=self.heartbeat, time=time.time(), count=self.log.count, entries=entries
        )
        store.set(str(self.log.rank), report.dump())
        return report

    def _read(self, store: Store, enough: Callable[[RankReport], bool]) -> dict[int, RankReport]:
        """Read the reports of all ranks until each is `enough` or overdue, for at most REPORT_TIMEOUT seconds."""
        keys = [str(rank) for rank in range(self.size)]
        begun = time.monotonic()
        while True:
            self._write(store)
            there = keys if store.check(keys) else [key for key in keys if store.check([key])]
            reports = {int(key): RankReport.load(text) for key, text in zip(there, store.multi_get(there), strict=True)}
            now = time.monotonic()
            for rank, report in reports.items():
                heartbeat, since = self.seen.get(rank, (0, now))
                if report.heartbeat != heartbeat:
                    self.seen[rank] = report.heartbeat, now
                elif not enough(report) and now - since > HEARTBEAT_TIMEOUT:
                    reports[rank] = dataclasses.replace(report, overdue=time.time() - report.time)
            others = [report for rank, report in reports.items() if rank != self.log.rank]
            if all(enough(other) or other.overdue is not None for other in others) or now - begun > REPORT_TIMEOUT:
                return reports
            time.sleep(HEARTBEAT / 4)


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"exit({one_line(error.code)})"
    if isinstance(error, CollectiveError):
        return error.problem
    return f"{type(error).__name__}: {summarize(error)}" if str(error) else type(error).__name__
