"""Runs programs under time limits, side by side. None outlives its limit, and none ends this process.

Each program leads a process group. It is killed with its group and with every process that has its mark in the
environment, because debuggers start the watched program in a group of its own. The beginning and the end of the output
are kept. JSON lines that a program appends to a file are returned while it runs.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

KEPT = 2**15  # bytes kept of the beginning of the output, and of its end
GRACE = 3.0  # seconds for a program to print its stack, and for its group to end


@dataclass(frozen=True)
class Ended:
    """The end of a program.

    Attributes:
        code: exit status; -N for signal N; None if it could not be started or survived SIGKILL.
        why: reason for killing or not starting it; empty if it ended by itself.
        output: beginning and end of its output.
        fault: defect of its JSON lines; empty if there is none.
    """

    code: int | None
    why: str
    seconds: float
    output: str
    fault: str = ""

    @property
    def reason(self) -> str:
        """The failure in one line; empty if there was none."""
        if self.why:
            return self.why
        if self.code is not None and self.code < 0:
            return f"ended by {_signal_name(-self.code)}"
        return f"exit status {self.code}" if self.code else self.fault


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Program:
    """A running program.

    Args:
        lines: file to which the program appends JSON objects, one per line.
        limit: seconds until the program is killed.
        quiet: seconds without a new line until the program is killed; None for no such limit.
    """

    def __init__(
        self, command: Sequence[str], *, lines: Path, env: Mapping[str, str], limit: float, quiet: float | None = None
    ) -> None:
        self.lines, self.limit, self.quiet = lines, limit, quiet
        self.started = self.heard = time.monotonic()
        self._read, self._fault = 0, ""
        self._head, self._tail, self._size = bytearray(), bytearray(), 0
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**env, "SUPERVISED": self._mark},
                cwd=ROOT,
                process_group=0,
            )
        except OSError as error:
            self._fault = f"{command[0]} cannot be started: {error.strerror}"
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def poll(self) -> tuple[list[dict[str, Any]], Ended | None]:
        """New JSON objects, and the end of the program if it has ended or reached a limit."""
        if self._process is None:
            return [], Ended(None, self._fault, 0.0, "")
        self._read_output()
        records, now = self._new_lines(), time.monotonic()
        if records:
            self.heard = now
        if self._process.poll() is not None:
            return self._end("", records)
        if now - self.started > self.limit:
            return self._end(f"not finished within {self.limit:g} s", records)
        if self.quiet is not None and now - self.heard > self.quiet:
            return self._end(f"no result for {self.quiet:g} s", records)
        return records, None

    def send_kill(self) -> None:
        """Kill the program and its descendants without waiting for them."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                if f"SUPERVISED={self._mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    os.kill(int(folder.name), signal.SIGKILL)

    def kill(self, why: str) -> tuple[list[dict[str, Any]], Ended | None]:
        """Kill the program at once and return its end."""
        return self._end(why, []) if self._process is not None else self.poll()

    def _end(self, why: str, records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Ended]:
        assert self._process is not None
        seconds = time.monotonic() - self.started
        if why and why != "stopped":
            self._process.send_signal(signal.SIGABRT)  # Python's fault handler prints the stack
            self._wait()
        self.send_kill()
        self._wait()
        records = records + self._new_lines()
        if self.lines.exists() and self.lines.stat().st_size > self._read:
            self._fault = self._fault or "the last line of its results is incomplete"
        assert self._process.stdout is not None
        self._process.stdout.close()
        code = self._process.poll()
        if code is None:
            why = f"{why}; it survived SIGKILL"
        return records, Ended(code, why, seconds, self._output(), self._fault)

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + GRACE
        while True:
            self._read_output()
            if self._process.poll() is not None or time.monotonic() > until:
                self._read_output()
                return
            time.sleep(0.02)

    def _read_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for _ in range(256):  # then other programs have their turn, however much this one prints
            try:
                read = os.read(self._process.stdout.fileno(), 2**16)
            except BlockingIOError:
                return
            if not read:
                return
            self._size += len(read)
            space = KEPT - len(self._head)
            self._head += read[:space]
            self._tail = (self._tail + read[space:])[-KEPT:]

    def _output(self) -> str:
        missing = self._size - len(self._head) - len(self._tail)
        cut = f"\n[{missing} bytes left out]\n".encode() if missing else b""
        return (self._head + cut + self._tail).decode(errors="replace")

    def _new_lines(self) -> list[dict[str, Any]]:
        try:
            with self.lines.open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        records = []
        if whole:
            self._read += len(whole) + 1
        for line in whole.split(b"\n") if whole else ():
            record = parse(line)
            if record is None:
                self._fault = f"{line[:60]!r} among its results is not a JSON object"
            else:
                records.append(record)
        return records


def parse(line: bytes | str) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
