"""Processes that a killed run left behind: found by the run's id in their environment, then ended.

The id is a random number that only the run and what it started carry, so a process that
happens to have got an old process number is never touched. Run as a script this is the watchdog of
a run: it ends what is left as soon as the run is gone, however it went.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

RUN_ID_VARIABLE = "PERENNIAL_RUN_ID"

# An interrupt lets a stage remove its half-written files and DVC release its locks.
ENDING = ((signal.SIGINT, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))

logger = logging.getLogger("flows.common.processes")


def find(run_id: str) -> list[psutil.Process]:
    """Return the living processes of a run, but for this one."""
    own = os.getpid()
    return [process for process in psutil.process_iter() if process.pid != own and _is_of(process, run_id)]


def _is_of(process: psutil.Process, run_id: str) -> bool:
    try:
        return process.environ().get(RUN_ID_VARIABLE) == run_id
    except (psutil.Error, OSError):
        return False  # another user's, or gone meanwhile


def end(run_id: str, ending: Sequence[tuple[signal.Signals, float]] = ENDING) -> int:
    """End every process of a run, gently first; return how many there were.

    Raises:
        TimeoutError: one of them is still alive after the last signal (it hangs in the kernel).
    """
    seen: set[int] = set()
    for number, patience_s in ending:
        # Looked up anew each time: a process that was asked to end may have started another.
        processes = find(run_id)
        seen.update(process.pid for process in processes)
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=patience_s)
        if not find(run_id):
            return len(seen)
    alive = ", ".join(str(process.pid) for process in find(run_id))
    raise TimeoutError(f"processes {alive} of a killed run do not end, even by SIGKILL")


@contextmanager
def watchdog(run_id: str) -> Iterator[None]:
    """Have another process end what this run started if this process dies inside the block.

    The other process holds the reading end of a pipe; the kernel closes the writing end when this
    process ends, for whatever reason. (Linux could tell each child by PR_SET_PDEATHSIG, but not the
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


def _watch(run_id: str) -> None:
    sys.stdin.read()
    end(run_id)


if __name__ == "__main__":
    _watch(sys.argv[1])
