"""The lock that allows one run of the pipeline at a time in a checkout, and the record of its holder.

`.perennial/run.lock` is locked by the kernel as long as the run lives. `.perennial/run.json` records the
process and its current stages; it is removed at a clean end, so a record without a lock belongs to a run
that was killed. A sweep has a lock of the same kind, `sweep.lock`, besides those of its runs.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from flows.common import processes
from stages.common.artifacts import STATE, make_folder, write_json
from stages.common.errors import InputError

POLL_S = 0.5

Kind = Literal["run", "sweep"]

logger = logging.getLogger("flows.training.run_lock")


@dataclass(frozen=True)
class RunRecord:
    """The run that holds the lock."""

    pid: int
    run_id: str
    started: str  # ISO 8601, to the second
    name: str
    stages: tuple[str, ...]  # being run now

    def __str__(self) -> str:
        at = f", at {', '.join(self.stages)}" if self.stages else ""
        return f"pid {self.pid}, started {self.started}{at}"


class RunLock:
    """The lock of this run, held; it keeps the record up to date."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self._path = path
        self._record = record
        self._guard = threading.Lock()
        write_json(self._path, asdict(record))

    @property
    def run_id(self) -> str:
        """The id that every process of this run carries."""
        return self._record.run_id

    def name(self, name: str) -> None:
        """Record the name of the run."""
        self._change(lambda record: replace(record, name=name))

    @contextmanager
    def at_stage(self, stage: str) -> Iterator[None]:
        """Record that `stage` runs inside the block."""
        self._change(lambda record: replace(record, stages=(*record.stages, stage)))
        try:
            yield
        finally:
            self._change(
                lambda record: replace(record, stages=tuple(name for name in record.stages if name != stage))
            )

    def _change(self, change: Callable[[RunRecord], RunRecord]) -> None:
        with self._guard:
            self._record = change(self._record)
            write_json(self._path, asdict(self._record))


@contextmanager
def hold(root: Path, *, wait: bool = True, kind: Kind = "run") -> Iterator[RunLock]:
    """Hold the lock of the checkout at `root`; first clean up after a holder that was killed.

    Args:
        root: the folder of the checkout.
        wait: whether to wait for another holder to end.
        kind: of what runs one at a time.

    Raises:
        InputError: another one holds the lock, and `wait` is false.
    """
    folder = root / STATE
    make_folder(folder)
    with _locked(folder, wait, kind):
        _clean_up(folder, kind)
        path = folder / f"{kind}.json"
        lock = RunLock(path, _own_record())
        with processes.set_variable(processes.RUN_ID_VARIABLE, lock.run_id):
            try:
                with processes.run_watchdog(lock.run_id):
                    yield lock
            finally:
                path.unlink(missing_ok=True)


def read_record(folder: Path, kind: Kind = "run") -> RunRecord | None:
    """Return the record of the run that holds the lock or was killed; None if there is none."""
    try:
        fields = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        return RunRecord(**{**fields, "stages": tuple(fields["stages"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def _locked(folder: Path, wait: bool, kind: Kind) -> Iterator[None]:
    lock, reported = FileLock(folder / f"{kind}.lock"), ""
    while True:
        try:
            lock.acquire(timeout=POLL_S if reported else 0)
            break
        except Timeout:
            holder = read_record(folder, kind)
        problem = f"another {kind} is at work in this folder ({holder or 'it is just starting'})"
        if not wait:
            raise InputError(problem, f"wait until it ends{', or run without --no-wait' * (kind == 'run')}")
        if problem != reported:
            logger.warning("%s; waiting for it, Ctrl-C stops waiting", problem)
            reported = problem
    try:
        yield
    finally:
        lock.release()


def _clean_up(folder: Path, kind: Kind) -> None:
    killed = read_record(folder, kind)
    if killed is None:
        return
    during = f" during {', '.join(killed.stages)}" if killed.stages else ""
    logger.warning("the last %s (pid %d, started %s) was killed%s", kind, killed.pid, killed.started, during)
    ended = processes.terminate_orphans(killed.run_id)
    if ended:
        logger.warning("ended %d process%s that it left behind", ended, "" if ended == 1 else "es")
    logger.warning("going on from what it finished")


def _own_record() -> RunRecord:
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return RunRecord(os.getpid(), uuid.uuid4().hex, started, "starting", ())
