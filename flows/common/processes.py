"""Start, stop and find processes: all that a run starts carry the run's id in their environment.

The id is a random number, so a process that was given an old process number is never touched.
Run as a script, this module is the watchdog of a run: it terminates what is left when the run is gone.
So it imports nothing of this project.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from stages.common.artifacts import make_folder

RUN_ID_VARIABLE = "PERENNIAL_RUN_ID"

# An interrupt lets a stage remove its half-written files and DVC release its locks.
TERMINATION = ((signal.SIGINT, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
POLL_S = 0.1

logger = logging.getLogger("flows.common.processes")


def start(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, its output appended to `log`.

    The session keeps the terminal's Ctrl-C from it: whoever starts it stops it, in order.

    Args:
        command: the program and its arguments.
        log: a file; its folder is created.
        folder: the working folder; None for this process's own.
        environment: the whole environment; None for this process's own.
    """
    make_folder(log.parent)
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_up(
    is_up: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float
) -> str | None:
    """Wait until a process that was started answers; return None, or the reason why it does not."""
    deadline = time.monotonic() + timeout_s
    while not is_up():
        if process.poll() is not None:
            return f"ended with exit code {process.returncode}"
        if time.monotonic() > deadline:
            return f"did not answer within {timeout_s:.0f} s"
        time.sleep(POLL_S)
    return None


def stop(
    process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM, patience_s: float = 5.0
) -> None:
    """Ask a process to end; after `patience_s`, kill it and what is left of its session."""
    with suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        logger.warning("process %d did not end in %.0f s; killing it", process.pid, patience_s)
    kill_session(process)
    process.wait()


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `start` and what it has started in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def find_orphans(run_id: str) -> list[psutil.Process]:
    """Return the living processes of a run, except this one."""
    own = os.getpid()
    return [process for process in psutil.process_iter() if process.pid != own and _is_of(process, run_id)]


def _is_of(process: psutil.Process, run_id: str) -> bool:
    try:
        return process.environ().get(RUN_ID_VARIABLE) == run_id
    except (psutil.Error, OSError):
        return False  # another user's, or ended meanwhile


def terminate_orphans(run_id: str, termination: Sequence[tuple[signal.Signals, float]] = TERMINATION) -> int:
    """Terminate every process of a run except this one, by signals of rising force; return their number.

    Args:
        run_id: of the run.
        termination: the signals, each with the seconds to wait after it.

    Raises:
        TimeoutError: a process is still alive after the last signal (it is blocked in the kernel).
    """
    seen: set[int] = set()
    for number, patience_s in termination:
        # Searched again each time: a process that was asked to end may have started another.
        orphans = find_orphans(run_id)
        seen.update(process.pid for process in orphans)
        for process in orphans:
            with suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(orphans, timeout=patience_s)
        if not find_orphans(run_id):
            return len(seen)
    alive = ", ".join(str(process.pid) for process in find_orphans(run_id))
    raise TimeoutError(f"processes {alive} of a killed run do not end, even by SIGKILL")


@contextmanager
def run_watchdog(run_id: str) -> Iterator[None]:
    """Have another process terminate what this run started if this process dies inside the block.

    The watchdog holds the reading end of a pipe; the kernel closes the writing end when this process
    ends, for whatever reason. (Linux could signal each child by PR_SET_PDEATHSIG, but not the
    grandchildren, which do the work.)
    """
    environment = {name: value for name, value in os.environ.items() if name != RUN_ID_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, run_id],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


@contextmanager
def set_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process for the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _watch(run_id: str) -> None:
    sys.stdin.read()
    terminate_orphans(run_id)


if __name__ == "__main__":
    _watch(sys.argv[1])
