"""The watch flow: test new windows of production for drift, and trigger a retraining or a rollback.

`perennial watch` runs it by hand; its deployment runs it on a schedule. Then the trigger of a retraining is
an event on the Prefect server, which starts the deployment of the retraining flow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed

from flows.common.clock import read_moment
from flows.common.guarded_task import label_traffic
from flows.common.notifications import notify
from flows.common.prefect_api import run_as_task
from flows.registry.tracking import Registry
from flows.release.actions import Order, release, settle
from flows.release.canary import judge_bake
from flows.retrain import progress
from flows.watch.event import DRIFT_EVENT
from monitoring import trigger
from monitoring.feedback import rows
from monitoring.verdicts import DriftVerdict, TriggerDecision, read_verdicts
from monitoring.watching import describe_failure, judge_new_windows, read_reference
from services.versions.aliases import ALIASES, read_aliases
from services.versions.store import find_served
from stages.common.escaping import escape_widget
from stages.common.params.loading import Params, load_params


@dataclass(frozen=True, slots=True)
class WatchResult:
    """The result of a check of production.

    Attributes:
        summary: one line.
        verdicts: of the new windows.
        retrain_verdict: the verdict that triggers a retraining; None if none does, or retraining is off.
        since: unix s, where the new traffic begins, if a retraining is triggered.
        rolled_back: the version that was worse than the former champion in its bake period.
        problems: what failed, and kept nothing else from being done.
    """

    summary: str
    verdicts: tuple[DriftVerdict, ...] = ()
    retrain_verdict: str | None = None
    since: float | None = None
    rolled_back: str | None = None
    problems: tuple[str, ...] = ()


@flow(name="watch")
def watch() -> State[WatchResult]:
    """Check production: roll back a champion that does worse, trigger a retraining if traffic drifts."""
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    try:
        result = _watch(root, params)
    except Exception as error:
        notify(params.flows.notify, "failed", "production could not be checked", str(error))
        raise
    problems = list(result.problems)
    if result.retrain_verdict is not None:
        notify(params.flows.notify, "drift", result.summary, result.verdicts[-1].summary)
        if runtime.deployment.id:
            with _going_on("the retraining could not be started (perennial retrain starts it)", problems):
                _emit_drift(result)
    if problems:
        result = replace(result, problems=tuple(problems))
        subject = f"production was checked; {len(problems)} of the steps failed"
        notify(params.flows.notify, "failed", subject, "\n".join(problems))
    return Completed(message=result.summary, data=result)


@contextmanager
def _going_on(what: str, problems: list[str]) -> Iterator[None]:
    """Run a step that nothing else depends on: an error in it is logged and added to `problems`."""
    try:
        yield
    except Exception as error:  # of any kind: a page that is down must not end the watching
        problem = f"{what}: {describe_failure(error)}"
        get_run_logger().warning("%s", problem)
        problems.append(problem)


def _watch(root: Path, params: Params) -> WatchResult:
    logger = get_run_logger()
    problems: list[str] = []
    with _going_on("the release journal could not be brought up to date", problems):
        settle(Registry.of(root, params))
    champion = read_aliases(root / ALIASES).champion or find_served(
        params.model_card.name, params.services.versions.follow_pipeline, root
    )
    regression = None
    with _going_on("the bake period could not be judged", problems):
        regression = run_as_task("bake", lambda: _check_bake(root, params))
    if regression is not None:
        summary = f"{champion} was rolled back: {regression}"
        return WatchResult(summary, rolled_back=champion, problems=tuple(problems))
    now = time.time()
    reference = run_as_task(
        "read_reference", lambda: read_reference(params.services.events.url, champion, params.monitoring, now)
    )
    if reference is None:
        wanted = params.monitoring.reference.rows
        summary = f"{champion} has not answered {wanted} requests yet: nothing to compare with"
        return WatchResult(summary, problems=tuple(problems))
    verdicts = []
    for verdict in judge_new_windows(
        root,
        params.services.events.url,
        reference,
        params.monitoring,
        lambda known: _decide(root, params, champion, known),
        now=now,
        limit=params.flows.watch.max_windows,
    ):
        logger.info("%s %s", verdict.id, verdict.summary)
        verdicts.append(verdict)
        problems += [f"{verdict.id}: {problem}" for problem in verdict.problems]
    if not verdicts:
        return WatchResult("no window has closed since the last check", problems=tuple(problems))
    with _going_on("the verdicts could not be shown in Prefect", problems):
        _show(verdicts)
    last = verdicts[-1]
    summary = (
        f"{len(verdicts)} new windows, {sum(one.drifted for one in verdicts)} drifted; {last.trigger.summary}"
    )
    logger.info("%s", summary)
    result = WatchResult(summary, tuple(verdicts), problems=tuple(problems))
    if not (last.trigger.fires and params.flows.watch.retrain):
        return result
    since = trigger.find_drift_start(read_verdicts_of(root, champion), params.monitoring.trigger)
    return replace(result, retrain_verdict=last.id, since=since)


def _check_bake(root: Path, params: Params) -> str | None:
    """Roll back a champion that is worse in its bake period; return the reason, or None."""
    verdict = judge_bake(
        root,
        params.services.events.url,
        params.flows.retrain.canary,
        params.monitoring.window.settle_s,
    )
    if verdict is None or verdict.state != "bad":
        return None
    release(Registry.of(root, params), Order("rollback", verdict.tag, "bake", verdict.summary))
    notify(params.flows.notify, "rolled_back", f"{verdict.tag} was rolled back", verdict.summary)
    return verdict.summary


def _decide(root: Path, params: Params, champion: str, known: Sequence[DriftVerdict]) -> TriggerDecision:
    """Decide whether the last verdict triggers a retraining; count labelled rows only if it may."""
    settings = params.monitoring.trigger
    now = read_moment()
    since_retraining_s = progress.measure_pause(root, now)

    def decide(labelled_rows: int, excluded: str = "") -> TriggerDecision:
        readiness = trigger.Readiness(
            labelled_rows,
            since_retraining_s,
            progress.is_running(root),
            read_aliases(root / ALIASES).pinned,
            excluded,
        )
        return trigger.decide(known, readiness, settings, now.at)

    # Reading all feedback takes longer than the verdict itself.
    if not decide(settings.min_labelled_rows).fires:
        return decide(0)
    report = label_traffic(root, params, 0.0, now.at).report
    return decide(report["labelled_rows"], rows.summarise_exclusions(report))


def _emit_drift(result: WatchResult) -> None:
    last = result.verdicts[-1]
    emit_event(
        DRIFT_EVENT,
        resource={"prefect.resource.id": f"perennial.model.{last.model}"},
        payload={"reason": result.summary, "verdict": last.id, "since": result.since},
    )


def _show(verdicts: Sequence[DriftVerdict]) -> None:
    rows = [
        {
            "window": verdict.id,
            "rows": verdict.window.rows,
            "verdict": escape_widget(verdict.summary),
            "late": verdict.late_rows,
            "quarantined": sum(verdict.quarantined.values()),
        }
        for verdict in verdicts
    ]
    create_table_artifact(rows, key="windows", description="drift verdicts on new windows")


def read_verdicts_of(root: Path, tag: str) -> list[DriftVerdict]:
    """Return the verdicts on a version's windows, the oldest first."""
    return [verdict for verdict in read_verdicts(root) if verdict.tag == tag]
