"""A supervisor: starts programs, probes them, restarts those that die, and ends all in order.

A program that dies is restarted after 1 s, then 2, 4 … 60; after a minute of running the pause is short
again. The state of each is written to a file that the dashboard reads.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from flows.common import processes
from flows.common.up_state import Condition, ProgramState, UpState, write_up_state
from stages.common import network
from stages.common.artifacts import make_folder
from stages.common.errors import InputError

POLL_S = 0.1
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STABLE_S = 60.0  # of running, after which the next pause is the first again
PROBE_EVERY_S = 1.0  # while it starts
PROBE_UP_EVERY_S = 10.0  # afterwards: it may stop answering
MAX_LOG_BYTES = 10_000_000  # a longer log is rotated when its program starts
LAST_LINE_BYTES = 4000

logger = logging.getLogger("flows.up.supervisor")


def nothing_missing() -> str | None:
    """Return None: a program that needs nothing can start."""
    return None


@dataclass(frozen=True, slots=True)
class Program:
    """A program and how it is supervised.

    Attributes:
        name: of its log and its line on the page.
        command: what is started.
        page: its address for people; None if it has none.
        probe: an address that answers with a status below 500 as soon as the program works; None: it
            counts as up while its process lives.
        environment: added to this process's own.
        missing: returns what it still waits for (a model, an extra), or None.
        after: programs that must be up before it starts; it ends before they do.
        end_signal: what asks it to end; patience_s: until it is killed.
    """

    name: str
    command: tuple[str, ...]
    page: str | None = None
    probe: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], str | None] = nothing_missing
    after: tuple[str, ...] = ()
    end_signal: signal.Signals = signal.SIGTERM
    patience_s: float = 10.0


@dataclass(slots=True)
class _Supervised:
    """A program and its state."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    state: Condition = "waiting"
    since: float = 0.0  # unix s
    started: float = 0.0  # monotonic s
    restarts: int = 0
    pause_s: float = FIRST_PAUSE_S
    try_at: float = 0.0  # monotonic s
    reason: str = ""
    answer: Future[bool] | None = None
    asked: float = 0.0  # monotonic s


class Supervisor:
    """Keeps programs running until `stop`.

    Args:
        programs: in the order in which they are started.
        root: where they are started.
        logs: folder of NAME.log.
        status: the JSON file of the states.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        root: Path,
        logs: Path,
        status: Path,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._items = {program.name: _Supervised(program, pause_s=first_pause_s) for program in programs}
        self._root, self._logs, self._status = root, logs, status
        self._first_pause_s = first_pause_s
        # Not an Event: a signal may come while this very thread holds the lock that setting one takes.
        self._times_stopped = 0
        self._probes = ThreadPoolExecutor(max(1, len(programs)), thread_name_prefix="probe")
        self._written: object = None
        self._started_at = time.time()

    def stop(self) -> None:
        """Ask `run` to end everything; asked twice, it kills what still runs."""
        self._times_stopped += 1

    def run(self) -> None:
        """Start the programs and keep them running until `stop`; then end them, the last first."""
        try:
            while not self._times_stopped:
                for item in self._items.values():
                    self._check(item)
                self._write_status()
                time.sleep(POLL_S)
        finally:
            self._end_all()
            self._probes.shutdown(wait=False, cancel_futures=True)
            self._status.unlink(missing_ok=True)

    def _check(self, item: _Supervised) -> None:
        if item.process is None:
            self._start_if_due(item)
        elif (code := item.process.poll()) is not None:
            self._handle_exit(item, code)
        else:
            self._probe(item)

    def _start_if_due(self, item: _Supervised) -> None:
        program = item.program
        if time.monotonic() < item.try_at:
            return
        waits = next((name for name in program.after if self._items[name].state != "up"), None)
        missing = f"waits for {waits}" if waits else program.missing()
        if missing:
            self._change(item, "waiting", missing)
            item.try_at = time.monotonic() + (POLL_S if waits else PROBE_EVERY_S)
            return
        item.started = time.monotonic()
        item.asked, item.answer = 0.0, None
        try:
            item.process = self._start(program)
        except OSError as error:
            self._pause(item, f"cannot be started: {error}")
            return
        self._change(item, "starting" if program.probe else "up", "")

    def _start(self, program: Program) -> subprocess.Popen[bytes]:
        log = self._logs / f"{program.name}.log"
        make_folder(log.parent)
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            os.replace(log, log.with_suffix(".log.1"))
        with log.open("ab") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} started\n".encode())
        # Ctrl-C in the terminal reaches this process alone, which then ends the others in order.
        environment = {**os.environ, **program.environment}
        return processes.start(program.command, log, folder=self._root, environment=environment)

    def _handle_exit(self, item: _Supervised, code: int) -> None:
        if item.process is not None:
            processes.kill_session(item.process)
        item.process, item.answer = None, None
        item.restarts += 1
        if time.monotonic() - item.started >= STABLE_S:
            item.pause_s = self._first_pause_s
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        words = read_last_line(self._logs / f"{item.program.name}.log")
        self._pause(item, f"{how}{': ' + words if words else ''}")

    def _pause(self, item: _Supervised, reason: str) -> None:
        item.try_at = time.monotonic() + item.pause_s
        self._change(item, "down", f"{reason}; tried again in {item.pause_s:.3g} s")
        item.pause_s = min(item.pause_s * 2, LONGEST_PAUSE_S)

    def _probe(self, item: _Supervised) -> None:
        if item.program.probe is None:
            return
        if item.answer is not None:
            if not item.answer.done():
                return
            answered, item.answer = item.answer.result(), None
            if answered:
                self._change(item, "up", "")
            elif item.state == "up":
                self._change(item, "starting", "its process lives and does not answer")
        if time.monotonic() - item.asked >= (PROBE_UP_EVERY_S if item.state == "up" else PROBE_EVERY_S):
            item.asked = time.monotonic()
            item.answer = self._probes.submit(network.is_up, item.program.probe)

    def _change(self, item: _Supervised, state: Condition, reason: str) -> None:
        if (item.state, item.reason) == (state, reason) and item.since:
            return
        if item.state != state or not item.since:
            item.since = time.time()
        item.state, item.reason = state, reason
        page = f" at {item.program.page}" if item.program.page and state == "up" else ""
        level = logging.WARNING if state == "down" else logging.INFO
        if state != "starting" or reason:
            logger.log(level, "%s is %s%s%s", item.program.name, state, page, f": {reason}" if reason else "")

    def _write_status(self) -> None:
        programs = {
            name: ProgramState(
                state=item.state,
                since=item.since,
                restarts=item.restarts,
                reason=item.reason,
                page=item.program.page,
                log=str(self._logs / f"{name}.log"),
                pid=item.process.pid if item.process else None,
            )
            for name, item in self._items.items()
        }
        if programs != self._written:
            write_up_state(self._status, UpState(os.getpid(), self._started_at, programs))
            self._written = programs

    def _end_all(self) -> None:
        left = [item for item in self._items.values() if item.process is not None]
        while left:
            needed = {name for item in left for name in item.program.after}
            wave = [item for item in left if item.program.name not in needed] or left
            for item in wave:
                _ask_to_end(item)
            for item in wave:
                self._wait_for_end(item)
            left = [item for item in left if item not in wave]

    def _wait_for_end(self, item: _Supervised) -> None:
        process = item.process
        if process is None:
            return
        deadline = time.monotonic() + item.program.patience_s
        while process.poll() is None and time.monotonic() < deadline and self._times_stopped < 2:
            time.sleep(0.02)
        if process.poll() is None:
            logger.warning("%s did not end; killing it", item.program.name)
        processes.kill_session(process)
        process.wait()
        item.process = None


def _ask_to_end(item: _Supervised) -> None:
    if item.process is not None:
        with suppress(ProcessLookupError):
            item.process.send_signal(item.program.end_signal)


def read_last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, shortened; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_LINE_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = [line.strip() for line in lines if line.strip()]
    line = found[-1] if found and not found[-1].startswith("--- ") else ""
    return line if len(line) <= 200 else line[:199] + "…"


def check_ports(wanted: Mapping[str, tuple[str, int]]) -> None:
    """Check that the ports that programs will take are free.

    Args:
        wanted: what sets the port (a key of params.yaml) -> host and port.

    Raises:
        InputError: some are taken, or two keys name the same one; all are named.
    """
    problems: list[str] = []
    seen: dict[int, str] = {}
    for key, (host, port) in wanted.items():
        if port in seen:
            problems.append(f"{key} and {seen[port]} are both {port}")
        elif not _is_free(host, port):
            problems.append(f"port {port} ({key}) is taken{_holder(port)}")
        seen.setdefault(port, key)
    if problems:
        raise InputError(
            "\n".join(problems), "stop the program that uses the port, or set another port in params.yaml"
        )


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port that only waits for the last packets of closed connections is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    """Return the process that listens on a port, as text; "" if unknown."""
    import psutil

    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return ""
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by pid {connection.pid}: {command[:80]}"
    return ""


@contextmanager
def call_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `stop`, even in a background job of a shell."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
