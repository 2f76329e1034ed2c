"""End a process when the one that started it is gone: a parent that is killed can tell its children nothing.

A thread looks who the parent is, which works on Linux and macOS. (Linux could signal a child by
PR_SET_PDEATHSIG, but does so when the *thread* that started it ends, and pools end threads at any time.)
For programs that are not ours, and for trees of processes, there is `flows.common.processes.run_watchdog`.
"""

from __future__ import annotations

import os
import signal
import threading
import time

VARIABLE = "PERENNIAL_PARENT"  # its process number, for the child alone
POLL_S = 0.5
PATIENCE_S = 10.0  # from SIGTERM to SIGKILL: a service finishes its answers


def make_parent_variable() -> dict[str, str]:
    """Return what goes into the environment of a child that calls `end_with_parent`."""
    return {VARIABLE: str(os.getpid())}


def end_with_parent(parent: int | None = None) -> None:
    """End this process when its parent ends, however that happens; call it first of all.

    Args:
        parent: its process number; None: the starter's, from the environment. Without one, as when a person
            starts the program, nothing happens.
    """
    named = os.environ.pop(VARIABLE, None)  # what this process starts has another parent
    parent = parent if parent is not None else int(named) if named else None
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_S)
    os.kill(os.getpid(), signal.SIGKILL)
