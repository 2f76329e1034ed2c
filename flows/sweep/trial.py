"""One trial: the stages `preflight` and `finetune` in the checkout of the sweep, stopped where it is pruned.

The stage writes each validation point to a file before the line of its log that tells of it; the trial reads
the file at every line, reports new points, and stops the stage by its own process id.
"""

from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flows.sweep.baseline import CHECKED, TRAINED, Baseline, write_trial
from flows.sweep.study import State
from flows.training import dvc_locks
from flows.training.stage_process import StageProcesses, StageResult
from flows.training.stage_tasks import StageLines, StageLogger
from stages.common.artifacts import read_json, reports
from stages.common.errors import InputError
from stages.common.task.metrics import LOSS

POINTS = reports(TRAINED) / "validation.csv"

# In the line of the log that tells of a point.
_UPDATES = re.compile(r"validation rows after \d+ of (\d+) updates")

BLOCKED = "another DVC process writes the same files"

OnPoint = Callable[[int, float], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended.

    Attributes:
        value: the metric of a complete trial.
        message: why it failed.
    """

    state: State
    seconds: float
    value: float | None = None
    message: str = ""


def run_trial(
    baseline: Baseline,
    processes: StageProcesses,
    text: str,
    metric: str,
    planned: int,
    on_point: OnPoint,
    logger: StageLogger,
) -> Outcome | None:
    """Train with the parameters `text`, and return how it ended; None if the user stopped it.

    Args:
        processes: of the checkout.
        metric: what is compared.
        planned: points of a whole training; at the last one nothing is left to save.
        on_point: gets the number of each point among the planned ones and its value; true stops the
            training. A training with fewer updates than points has only some of the numbers, and the last.
    """
    started = time.monotonic()

    def end(state: State, value: float | None = None, message: str = "") -> Outcome:
        return Outcome(state, time.monotonic() - started, value, message)

    try:
        write_trial(baseline, text)
        points = Points(baseline.checkout / POINTS, metric, planned, on_point, processes)
        for stage in (CHECKED, TRAINED):
            dvc_locks.clear_dead(baseline.checkout)
            result = _run_stage(stage, processes, points, logger)
            if processes.stopped_by is not None:
                return None
            if points.pruned:
                return end("pruned")
            if result.how in ("failed", "blocked"):
                return end("failed", message=f"{stage}: {result.message or BLOCKED}")
        points.read()
        return end("complete", read_value(baseline.checkout, metric))
    except InterruptedError:  # stopped before a stage could start
        return None
    except InputError as error:
        return end("failed", message=str(error))


def _run_stage(stage: str, processes: StageProcesses, points: Points, logger: StageLogger) -> StageResult:
    lines = StageLines(stage, logger, lambda: points.pruned or processes.stopped_by is not None)

    def take(line: str) -> None:
        lines.take(line)
        points.take(line)

    return processes.run(stage, take, lambda _result: False)


class Points:
    """The validation points of a training, read while they come."""

    def __init__(
        self, path: Path, metric: str, planned: int, on_point: OnPoint, processes: StageProcesses
    ) -> None:
        self._path, self._metric, self._planned = path, metric, planned
        self._on_point = on_point
        self._processes = processes
        self._updates: int | None = None  # of the whole training; None where no line has told yet
        self._seen = 0
        self.pruned = False

    def take(self, line: str) -> None:
        """Take a line of the stage's log, behind which new points may be in the file."""
        if told := _UPDATES.search(line):
            self._updates = int(told[1])
            self.read(may_stop=True)

    def read(self, may_stop: bool = False) -> None:
        """Report the points that are new, and stop the training if it is not worth its time."""
        if self.pruned:
            return
        points = read_points(self._path, self._metric)
        for place, (step, value) in enumerate(points[self._seen :], self._seen + 1):
            self._seen = place
            number = round(step * self._planned / self._updates) if self._updates else place
            if self._on_point(number, value) and may_stop and number < self._planned:
                self.pruned = True
                self._processes.interrupt()
                return


def read_points(path: Path, metric: str) -> list[tuple[int, float]]:
    """Return the update and the value of a metric at each point so far; none if there is no file yet."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line.get(metric)]
            return [(int(line["step"]), float(line[metric])) for line in lines]
    except FileNotFoundError:
        return []


def read_value(checkout: Path, metric: str) -> float:
    """Return what a training is compared by: the loss of all validation rows, or a metric of the sample.

    The metric is that at the point whose weights were kept.

    Raises:
        InputError: it was not measured.
    """
    found = read_json(checkout / reports(TRAINED) / "metrics.json")
    kept = [point for point in found["validation_points"] if point["step"] == found["kept_step"]]
    value = found["validation_loss"] if metric == LOSS else next((p.get(metric) for p in kept), None)
    if value is None or not math.isfinite(value):
        raise InputError(
            f"the training measured no {metric}",
            "choose another flows.sweep.metric, or raise validation_rows",
        )
    return float(value)
