"""Turns between processes that change the same files."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(lock: Path) -> Iterator[None]:
    """Hold the lock file `lock` for the block; wait for whoever holds it, for as long as that takes.

    The kernel lets go of it when the process ends, however it ends. So the file stays, empty, and says
    nothing by being there: were it removed, two could hold a lock of that name at once. Threads take turns
    too; taken a second time inside the block, it waits forever.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
