"""Locks between processes that change the same files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stages.common.artifacts import make_folder


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block; wait for its holder without a limit.

    The kernel releases it when the process ends, however that happens. The file stays and is empty: its
    existence means nothing. Threads exclude each other too; taken again inside the block, it waits forever.
    """
    make_folder(path.parent)
    with FileLock(path):
        yield


@contextmanager
def try_file_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` for the block if it is free; yield whether it is held."""
    make_folder(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
