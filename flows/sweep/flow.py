"""The sweep flow: bring the rows up to date, train trial after trial, and report them.

`perennial sweep` runs it by hand. The best trial becomes a candidate like any other: its values are put into
`params.yaml`, and the training flow, or a retraining, does the rest.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import Trial
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.common.prefect_api import run_as_task
from flows.init.params_file import edit_params
from flows.sweep.baseline import CHECKED, STUDIES, TRAINED, Baseline, check_metric, make_baseline
from flows.sweep.experiments import save_experiment
from flows.sweep.report import SweepReport, build_rows, format_short, write_report
from flows.sweep.space import POINTS, encode_current, list_ends, to_changes
from flows.sweep.study import SweepStudy, TrialResult
from flows.sweep.trial import Outcome, run_trial
from flows.training.all_cores import estimate_lines
from flows.training.plan import lock_order, make_plan, sort_lock
from flows.training.prepared_run import prepare_run
from flows.training.stage_process import StageProcesses
from flows.training.stage_tasks import PipelineResult, StageLogger, run_stages
from stages.common.errors import InputError
from stages.common.escaping import escape_widget
from stages.common.params.loading import Params, load_params

EXPERIMENT_FILES = ("params.yaml", "dvc.lock")
MOST_FAILURES = 3  # first trials, one after the other: what is wrong is then not in their values


@dataclass(frozen=True)
class SweepEnd:
    """How a sweep ended; with a signal, if the user stopped it."""

    report: SweepReport | None
    stopped_by: signal.Signals | None = None


@flow(name="sweep")
def sweep(new: bool = False) -> State[SweepEnd]:
    """Train with other values of `finetune`, and compare the trainings on the validation rows.

    A sweep that was killed or stopped is continued, as long as space, rows, base model, code and commit are
    the same.

    Args:
        new: forget the trials of this space, and begin again.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    rows, stopped_by = _prepare_rows(root, params)
    if stopped_by is not None:
        return Completed(name="Stopped", data=SweepEnd(None, stopped_by))
    if rows.failures:
        failures = "\n".join(f"{one.stage}: {one.message}" for one in rows.failures)
        raise InputError(
            f"the rows of the sweep could not be made\n{failures}", "correct this, and run again"
        )
    task = check_metric(root, params.flows.sweep)
    baseline = make_baseline(root, params, make_plan(root, TRAINED))
    study = SweepStudy(
        root / STUDIES,
        baseline.name,
        params.flows.sweep,
        lower_is_better=task.is_lower_better(params.flows.sweep.metric),
        current=encode_current(params.finetune.model_dump(mode="json"), params.flows.sweep.space),
        new=new,
    )
    stopped_by = _run_trials(root, params, baseline, study)
    report = _report(root, params.flows.sweep.metric, baseline, study)
    if stopped_by is not None:
        return Completed(name="Stopped", data=SweepEnd(report, stopped_by))
    _check_complete(report)
    create_table_artifact(
        [{key: escape_widget(value) for key, value in row.items()} for row in build_rows(report)],
        key="sweep",
        description=f"{report.metric} on the validation rows, the best first",
    )
    return Completed(message=report.count(), data=SweepEnd(report))


def _prepare_rows(root: Path, params: Params) -> tuple[PipelineResult, signal.Signals | None]:
    """Run the stages before the training in the workspace, as far as they changed."""
    settings = params.flows.training
    with (
        prepare_run(root, force=False, until=CHECKED, wait=True) as run,
        run.processes.stopping_on(signal.SIGINT, signal.SIGTERM),
    ):
        before = lock_order(root)
        result = run_stages(run, retries=settings.retries, retry_delay_s=settings.retry_delay_s)
        sort_lock(root, before, run.plan)
        return result, run.processes.stopped_by


def _run_trials(root: Path, params: Params, baseline: Baseline, study: SweepStudy) -> signal.Signals | None:
    """Run trials until there are enough, none is left, or the time is over; return the signal of a stop."""
    settings, logger, started = params.flows.sweep, get_run_logger(), time.monotonic()
    results = study.list_results()
    logger.info("study %s: %d of %d trials are done", baseline.name, len(results), settings.trials)
    if len(results) < settings.trials:
        for line in estimate_lines(root, [TRAINED]):
            logger.info("each trial that is not stopped early: %s", line)
        logger.info("%d trials are left", settings.trials - len(results))
    processes = StageProcesses(baseline.checkout)
    with processes.ending(), processes.stopping_on(signal.SIGINT, signal.SIGTERM):
        while len(results) < settings.trials and processes.stopped_by is None:
            _check_failures(results)
            if settings.timeout_minutes and time.monotonic() - started >= 60 * settings.timeout_minutes:
                logger.warning("flows.sweep.timeout_minutes is over after %d trials", len(results))
                break
            trial = study.ask()
            if trial is None:
                logger.warning("every value of the space was tried, in %d trials", len(results))
                break
            _run_trial(root, params, baseline, study, processes, trial, len(results) + 1)
            results = study.list_results()
            _report(root, settings.metric, baseline, study)
    return processes.stopped_by


def _run_trial(
    root: Path,
    params: Params,
    baseline: Baseline,
    study: SweepStudy,
    processes: StageProcesses,
    trial: Trial,
    number: int,
) -> None:
    """Train with the values of a trial and record how it ended; a trial that the user stops is no result."""
    metric, values = params.flows.sweep.metric, study.read_values(trial)

    def report_point(point: int, value: float) -> bool:
        trial.report(value, point)
        return trial.should_prune()

    def train() -> Outcome | None:
        logger = get_run_logger()
        logger.info("%s", ", ".join(f"{key} {format_short(value)}" for key, value in values.items()))
        text = edit_params(baseline.params, to_changes(values))
        outcome = run_trial(baseline, processes, text, metric, _count_points(params), report_point, logger)
        if outcome is not None:
            _log_end(logger, metric, outcome)
        return outcome

    outcome = run_as_task(f"trial {number}", train)
    if outcome is None:
        return
    experiment = None
    if outcome.state == "complete":
        experiment = f"sweep-{baseline.name}-{number:02d}"
        files = {file: (baseline.checkout / file).read_text(encoding="utf-8") for file in EXPERIMENT_FILES}
        save_experiment(root, baseline.head, experiment, files)
    study.finish(trial, outcome.state, outcome.value, outcome.seconds, experiment, outcome.message)


def _count_points(params: Params) -> int:
    """Return the number of points of a whole training."""
    tried = params.flows.sweep.space.get(POINTS)
    every = list_ends(tried)[0] if tried else params.finetune.validate_every
    assert every is not None  # `check_space` refuses it
    return max(1, round(1 / every))


def _log_end(logger: StageLogger, metric: str, outcome: Outcome) -> None:
    if outcome.state == "complete":
        logger.info("complete: %s %.4f in %.0f s", metric, outcome.value, outcome.seconds)
    elif outcome.state == "pruned":
        logger.info("stopped early: worse than the median of the other trials, after %.0f s", outcome.seconds)
    else:
        logger.warning("failed: %s", outcome.message)


def _report(root: Path, metric: str, baseline: Baseline, study: SweepStudy) -> SweepReport:
    report = SweepReport(baseline.name, metric, study.lower_is_better, tuple(study.list_results()))
    write_report(root, report)
    return report


def _check_failures(results: Sequence[TrialResult]) -> None:
    """Check that the first trials did not all fail.

    Raises:
        InputError: they did, with the reason of the last one.
    """
    if len(results) >= MOST_FAILURES and all(one.state == "failed" for one in results):
        raise InputError(
            f"all {len(results)} trials failed; the last one: {results[-1].message}",
            "correct this and run `perennial sweep --new`; reports/sweep/trials.csv has every message",
        )


def _check_complete(report: SweepReport) -> None:
    """Check that a trial is complete.

    Raises:
        InputError: none is.
    """
    if report.best is None:
        last = report.results[-1].message if report.results else "none was started"
        raise InputError(
            f"no trial is complete ({report.count()}); the last one: {last}",
            "correct this and run `perennial sweep --new`; reports/sweep/trials.csv has every message",
        )
