"""Run stages that compute on all cores one at a time, and log beforehand how long they will take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from flows.training.stage_process import stage_environment
from stages.common.artifacts import reports

if TYPE_CHECKING:
    import logging

ESTIMATE_TIMEOUT_S = 60


class AllCores:
    """The cores of the machine, which one stage has at a time.

    Args:
        root: the checkout.
        stages: those that will compute on all cores in this run.
    """

    def __init__(self, root: Path, stages: Sequence[str]) -> None:
        self._root = root
        self._to_estimate = tuple(stages)
        self._lock = Lock()

    @contextmanager
    def hold(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> Iterator[None]:
        """Wait for the cores and hold them; the first holder logs the estimate of all."""
        with self._lock:
            stages, self._to_estimate = self._to_estimate, ()
            if stages:
                for line in estimate_lines(self._root, stages):
                    logger.info("%s", line)
            yield


def estimate_lines(root: Path, stages: Sequence[str]) -> list[str]:
    """Return how long stages will take, as lines; none if the rows are not counted yet.

    In a process of its own: torch would stay in the memory of this one.
    """
    if not (root / reports("preflight") / "metrics.json").exists():
        return []
    command = [sys.executable, "-m", "stages.common.run_estimate", *stages]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=stage_environment(),
            capture_output=True,
            text=True,
            timeout=ESTIMATE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"no estimate of the time: it took more than {ESTIMATE_TIMEOUT_S} s"]
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if not line.lstrip().startswith("fix:")]
        return [f"no estimate of the time: {reasons[-1] if reasons else 'no reason given'}"]
    return done.stdout.splitlines()
