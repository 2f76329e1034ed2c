"""DVC stages as Prefect tasks: the one module that knows both.

Each stage of the plan becomes one task of the same name. Prefect shows and records; DVC decides
whether a stage runs, runs it, and keeps its outputs.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed

from flows.common.prefect_api import make_literal_name
from flows.training.all_cores import AllCores
from flows.training.plan import StagePlan
from flows.training.prepared_run import PreparedRun
from flows.training.stage_process import Progress, StageResult, is_chatter, parse_progress

PROGRESS_ARTIFACT_S = 2.0  # between two updates of the bar on Prefect's page
PROGRESS_LOG_S = 20.0  # between two lines of the log

StageLogger = logging.Logger | logging.LoggerAdapter[Any]


@dataclass(frozen=True)
class StageFailure:
    """A stage that failed, with its error."""

    stage: str
    message: str
    exit_code: int


@dataclass(frozen=True)
class PipelineResult:
    """How the stages of a run ended."""

    ran: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    not_run: tuple[str, ...] = ()
    failures: tuple[StageFailure, ...] = ()


@dataclass
class _Ledger:
    """The results of the tasks of a run, written from their threads."""

    results: dict[str, StageResult] = field(default_factory=dict)


def run_stages(run: PreparedRun, *, retries: int, retry_delay_s: float) -> PipelineResult:
    """Run the stages of a plan as tasks of the current flow, side by side where the graph allows.

    Stages that compute on all cores run one after the other.

    Args:
        run: the prepared run.
        retries: how often a stage is retried that ended with the exit code of a temporary failure.
        retry_delay_s: between two attempts.
    """
    ledger = _Ledger()
    stale = run.plan.stale()
    running = [stage for stage in run.plan.stages if stage.name in stale or run.force]
    cores = AllCores(run.root, [stage.name for stage in running if stage.all_cores])
    futures: dict[str, PrefectFuture[State[None]]] = {}
    for stage in run.plan.stages:
        body = _unchanged
        if stage in running:
            body = _stage_body(run, stage.name, cores if stage.all_cores else None)
        stage_task = task(
            name=stage.name,
            task_run_name=make_literal_name(stage.name),
            retries=retries,
            retry_delay_seconds=retry_delay_s,
            retry_condition_fn=_retry_condition(ledger, stage.name),
            cache_policy=NO_CACHE,
            persist_result=False,
        )(_recorded(run, body, ledger, stage))
        futures[stage.name] = stage_task.submit(
            return_state=False, wait_for=[futures[name] for name in stage.upstream]
        )
    for future in futures.values():
        future.wait()
    return _result(run, ledger)


def _unchanged() -> StageResult:
    return StageResult("unchanged")


def _stage_body(run: PreparedRun, stage: str, cores: AllCores | None) -> Callable[[], StageResult]:
    def run_stage() -> StageResult:
        lines = StageLines(stage, get_run_logger(), lambda: run.processes.stopped_by is not None)

        def on_blocked(result: StageResult) -> bool:
            holders = "; ".join(map(str, result.blockers))
            lines.logger.warning(
                "another DVC process writes the same files (%s)%s", holders, "; waiting" * run.wait
            )
            return run.wait

        with cores.hold(lines.logger) if cores else nullcontext(), run.lock.at_stage(stage):
            return run.processes.run(stage, lines.take, on_blocked)

    return run_stage


def _recorded(
    run: PreparedRun, body: Callable[[], StageResult], ledger: _Ledger, stage: StagePlan
) -> Callable[[], State[None]]:
    def run_and_record() -> State[None]:
        try:
            result = body()
        except InterruptedError as error:
            return Cancelled(message=str(error))
        if result.how == "failed" and (stopped_by := run.processes.stopped_by) is not None:
            return Cancelled(message=f"stopped by {stopped_by.name}")
        ledger.results[stage.name] = result
        return _state(result)

    return run_and_record


def _state(result: StageResult) -> State[None]:
    if result.how == "unchanged":
        return Completed(name="Unchanged", message="nothing changed")
    if result.how == "restored":
        return Completed(name="Restored", message="the outputs of an equal run were in DVC's cache")
    if result.how == "ran":
        return Completed(message="ran")
    return Failed(message=result.message)


def _retry_condition(ledger: _Ledger, stage: str) -> Callable[[Any, Any, Any], bool]:
    """Retry only a temporary failure: a gate, bad input or a wrong parameter would fail again."""

    def can_help(_task: Any, _run: Any, _state: Any) -> bool:
        result = ledger.results.get(stage)
        return result is not None and result.is_temporary

    return can_help


def _result(run: PreparedRun, ledger: _Ledger) -> PipelineResult:
    names = [stage.name for stage in run.plan.stages]

    def ended(how: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in ledger.results and ledger.results[name].how == how)

    failed = [name for name in names if name in ledger.results and name in ended("failed") + ended("blocked")]
    return PipelineResult(
        ran=ended("ran"),
        restored=ended("restored"),
        unchanged=ended("unchanged"),
        not_run=tuple(name for name in names if name not in ledger.results),
        failures=tuple(_failure(name, ledger.results[name]) for name in failed),
    )


def _failure(stage: str, result: StageResult) -> StageFailure:
    if result.how == "blocked":
        holders = "; ".join(map(str, result.blockers))
        message = f"another DVC process writes the same files ({holders})\n  fix: wait until it ends"
        return StageFailure(stage, message, 1)
    return StageFailure(stage, result.message, result.exit_code)


class StageLines:
    """Sends the lines of one stage to Prefect's log and its progress to a bar on Prefect's page."""

    def __init__(self, stage: str, logger: StageLogger, is_stopped: Callable[[], bool]) -> None:
        self._stage = stage
        self._is_stopped = is_stopped
        self.logger = logger
        self._artifact: UUID | None = None
        self._shown_at = self._logged_at = float("-inf")

    def take(self, line: str) -> None:
        """Take the next line."""
        if (progress := parse_progress(line)) is not None:
            self._show(progress)
        elif is_chatter(line) or self._is_stopped():  # an interrupted stage ends with a traceback
            self.logger.debug(line)
        elif line.startswith(("error:", "ERROR:")):
            self.logger.error(line)
        else:
            # Prefect names the task on each line; the stage need not do it again.
            self.logger.info(line.removeprefix(f"{self._stage}: "))

    def _show(self, progress: Progress) -> None:
        now, last = time.monotonic(), progress.done >= progress.total
        if last or now - self._logged_at >= PROGRESS_LOG_S:
            self._logged_at = now
            self.logger.info(f"{progress.done}/{progress.total} {progress.note}".rstrip())
        if last or now - self._shown_at >= PROGRESS_ARTIFACT_S:
            self._shown_at = now
            # A bar that cannot be drawn must not stop the stage.
            with suppress(Exception):
                self._draw(100.0 * progress.done / max(progress.total, 1), progress.note)

    def _draw(self, percent: float, note: str) -> None:
        if self._artifact is None:
            key = re.sub("[^a-z0-9]+", "-", f"{self._stage}-progress".lower())  # all that Prefect allows
            made = create_progress_artifact(progress=percent, key=key, description=note or self._stage)
            self._artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._artifact, progress=percent, description=note or self._stage)
