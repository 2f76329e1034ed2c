"""Prepare a run of the pipeline: take the lock, clear DVC's own locks, make the plan.

Nothing here imports Prefect: the command line prepares a run while Prefect's server starts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from flows.training import dvc_locks, run_lock
from flows.training.plan import Plan, make_plan
from flows.training.stage_process import StageProcesses
from flows.training.task_params import use_task
from stages.common.errors import InputError

POLL_S = 1.0

logger = logging.getLogger("flows.training.prepared_run")


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start, and the options it was started with."""

    root: Path
    lock: run_lock.RunLock
    plan: Plan
    processes: StageProcesses
    force: bool
    wait: bool

    @property
    def name(self) -> str:
        """The name of the run: what changed."""
        return self.plan.run_name(forced=self.force)

    def start_early(self) -> None:
        """Start the stages that depend on none, before Prefect is ready to show them."""
        stale = self.plan.stale()
        for stage in self.plan.stages:
            if (self.force or stage.name in stale) and not stage.upstream:
                self.processes.start_early(stage.name)


_current: ContextVar[PreparedRun | None] = ContextVar("prepared_run", default=None)


@contextmanager
def prepare_run(
    root: Path, *, force: bool, until: str | None, wait: bool, task: str | None = None
) -> Iterator[PreparedRun]:
    """Prepare a run of the checkout at `root`, or return the one that this process has prepared.

    Args:
        task: the shipped task whose parameters are to be those of the checkout; None to keep its own.

    Raises:
        InputError: another run is at work and `wait` is false, the graph cannot be read, or `params.yaml` has
            changes that `task` would replace.
    """
    if (current := _current.get()) is not None:
        yield current
        return
    with run_lock.hold(root, wait=wait) as lock:
        dvc_locks.clear_dead(root)
        _wait_for_writers(root, wait)
        if task is not None:
            use_task(root, task)
        processes = StageProcesses(root, force=force)
        with processes.ending():
            run = PreparedRun(root, lock, make_plan(root, until), processes, force, wait)
            lock.name(run.name)
            token = _current.set(run)
            try:
                yield run
            finally:
                _current.reset(token)


def _wait_for_writers(root: Path, wait: bool) -> None:
    """Wait for a plain `dvc repro` to end: while it writes, no plan can be made."""
    reported: list[dvc_locks.Holder] = []
    while holders := dvc_locks.find_writers(root):
        described = f"DVC is at work in this folder ({'; '.join(map(str, holders))})"
        if not wait:
            raise InputError(described, "wait until it ends, or run without --no-wait")
        if holders != reported:
            logger.warning("%s; waiting for it, Ctrl-C stops waiting", described)
            reported = holders
        time.sleep(POLL_S)
