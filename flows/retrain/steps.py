"""The steps of a retraining; each can be killed and run again.

A step takes the state of the retraining, does its work, and returns the next state or the result.
`flows.retrain.flow` runs them as Prefect tasks; `train` is the training flow itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.gate import evaluation, judge
from flows.registry import model_versions, record
from flows.release import actions, canary, journal
from flows.retrain import progress
from flows.retrain.progress import RetrainResult, RetrainState
from monitoring.feedback import rows
from monitoring.feedback.labels import read_served_task
from services.versions import __main__ as versions
from stages.common.adapter import FOLDER as START
from stages.common.adapter import clear_initial_adapter, put_initial_adapter
from stages.common.artifacts import STATE, artifacts, read_json, reports
from stages.common.errors import InputError
from stages.common.params.loading import Params

POLL_S = 5.0  # between two checks of a canary
LOG_S = 60.0  # between two log lines about it

logger = logging.getLogger("flows.retrain.steps")

StepFunction = Callable[[Path, Params, RetrainState], RetrainState | RetrainResult]


def resume_or_start(
    root: Path, params: Params, reason: str, verdict: str | None, since: float | None
) -> RetrainState:
    """Return the state of the retraining to continue, or of a new one; call with `progress.lock` held.

    One that was killed is abandoned if another version has become champion meanwhile: the candidate
    would be compared with a model that is no longer served.

    Args:
        since: unix s, where the new traffic begins; None: since the champion took over.

    Raises:
        InputError: the champion is pinned, or the registry cannot be reached.
    """
    actions.recover(root, params)
    actions.adopt(root, params)  # before the pipeline makes another: a service that restarts would follow it
    if (pin := model_versions.pinned(root, params)) is not None:
        raise InputError(f"the champion is pinned: {pin}", "perennial release unpin --why TEXT")
    champion = versions.read_aliases(root / versions.ALIASES).champion
    left = progress.read_state(root)
    if left is not None:
        if left.champion == champion or (left.step == "canary" and left.candidate == champion):
            logger.info("continuing the retraining %s (%s) at step %s", left.id, left.reason, left.step)
            return left
        progress.finish(root, left, "abandoned", f"{champion} became champion meanwhile")
    if since is None:
        since = model_versions.champion_since(root, params) or 0.0
    return progress.start(root, reason, verdict, champion, since)


def gather(root: Path, params: Params, run: RetrainState) -> RetrainState:
    """Write the rows to learn, the rows held out for the gate, and the adapter to start from."""
    evaluation.keep_test_rows(root)
    task = read_served_task(root, params)
    url, settings = params.services.events.url, params.monitoring.feedback
    held_out = rows.held_out_before(root)
    labelled = rows.labelled_rows(url, 0.0, run.until, settings, task, held_out)
    recent = rows.labelled_rows(url, run.since, run.until, settings, task, held_out)
    rows.write_labelled(root, replace(labelled, holdout=recent.holdout))
    logger.info("%s", rows.format_report(labelled.report))
    _put_start(root, params, run.champion)
    return progress.advance(root, run)


def _put_start(root: Path, params: Params, champion: str | None) -> None:
    """Put the adapter that `flows.retrain.warm_start_from` names where training starts, or none."""
    folder = root / START
    if champion is None or params.flows.retrain.warm_start_from == "base":
        clear_initial_adapter(folder)
        return
    _record_if_here(root, params, champion)
    if not any(info.tag == champion for info in model_versions.versions_table(root, params)):
        logger.warning(
            "%s is not in the registry and no longer in artifacts/: a new adapter is trained", champion
        )
        clear_initial_adapter(folder)
        return
    with TemporaryDirectory(dir=root / STATE) as name:
        model_versions.fetch_adapter(root, params, champion, Path(name))
        about = read_json(Path(name) / "origin.json")
        put_initial_adapter(Path(name), about["version"], about["base_sha256"], folder)


def _record_if_here(root: Path, params: Params, tag: str) -> None:
    """Record a version that was served before MLflow was set up, while its files still exist."""
    if pipeline_tag(root) == tag:
        record.record_training(root, params)


def pipeline_tag(root: Path) -> str | None:
    """Return the tag of the newest version of the pipeline; None if there is none."""
    path = root / artifacts("export") / "serving.json"
    if not path.exists():
        return None
    about = read_json(path)
    return f"{about['name']}:{about['version']}"


def record_candidate(root: Path, params: Params, run: RetrainState) -> RetrainState | RetrainResult:
    """Record the trained version, verify that it reloads unchanged, and add it to the store."""
    if pipeline_tag(root) == run.champion:
        return progress.finish(root, run, "unchanged", "training gave the champion again")
    candidate = record.record_training(root, params, trigger=run.verdict or run.reason)
    record.check_reload(candidate, root, params)
    tag = versions.add_pipeline_output(root)
    logger.info("%s is recorded, and in the store", tag)
    return progress.advance(root, run, candidate=tag)


def judge_candidate(root: Path, params: Params, run: RetrainState) -> RetrainState | RetrainResult:
    """Evaluate the candidate in the gate; a rejected one ends the retraining."""
    tag = _candidate(run)
    verdict = judge.read_verdict(root, tag)
    if verdict is None or verdict.champion != run.champion:
        verdict = judge.run_gate(root, params, tag)
    paths = [gate_path(tag), reports("parity") / gate_path(tag).name]
    model_versions.evidence(
        root,
        params,
        tag,
        *(path for path in paths if (root / path).exists()),
        gate="passed" if verdict.passed else "refused",
    )
    for criterion in verdict.criteria:
        logger.info("%s %s", "passed " if criterion.passed else "FAILED ", criterion.said)
    if not verdict.passed:
        failed = "; ".join(criterion.said for criterion in verdict.criteria if not criterion.passed)
        return progress.finish(root, run, "rejected", f"by the gate: {failed}")
    return progress.advance(root, run)


def gate_path(tag: str) -> Path:
    """Return where the gate's verdict on a version lies."""
    return reports("gate") / f"{tag.partition(':')[2]}.json"


def run_canary(root: Path, params: Params, run: RetrainState, *, poll_s: float = POLL_S) -> RetrainResult:
    """Serve the candidate to a share of users, compare their feedback, and promote or reject it."""
    tag = _candidate(run)
    if run.champion is not None and versions.read_aliases(root / versions.ALIASES).champion != tag:
        if run.canary_since is None:
            actions.release(root, params, "try", tag, "retrain", run.reason)
            run = progress.save_state(root, replace(run, canary_since=time.time()))
        logged_at = float("-inf")
        while (verdict := _judge_trial(root, params, tag)) is not None and verdict.state == "wait":
            if time.monotonic() - logged_at > LOG_S:
                logged_at = time.monotonic()
                logger.info("%s", verdict.said)
            time.sleep(poll_s)
        if verdict is None:
            return _trial_ended(root, run, tag)
        logger.info("%s", verdict.said)
        model_versions.evidence(root, params, tag, reports("canary") / gate_path(tag).name)
        if verdict.state == "bad":
            actions.release(root, params, "refuse", tag, "canary", verdict.said)
            return progress.finish(root, run, "rejected", f"in the canary: {verdict.said}")
    actions.release(root, params, "promote", tag, "retrain", run.reason)
    return _promoted(root, run, tag)


def _judge_trial(root: Path, params: Params, tag: str) -> canary.CanaryVerdict | None:
    """Judge the canary; None if the version is no longer the challenger."""
    challenger = versions.read_aliases(root / versions.ALIASES).challenger
    return canary.judge_trial(root, params) if challenger is not None and challenger.tag == tag else None


def _trial_ended(root: Path, run: RetrainState, tag: str) -> RetrainResult:
    """Finish after another release ended the canary: one by hand, or one before this was killed."""
    if versions.read_aliases(root / versions.ALIASES).champion == tag:
        return _promoted(root, run, tag)
    releases = journal.done_releases(root)
    begun = max(place for place, one in enumerate(releases) if one.action == "try" and one.tag == tag)
    ended = next(one for one in releases[begun:] if one.challenger != tag)
    summary = f"its canary was ended ({ended.action} by {ended.by}): {ended.why}"
    return progress.finish(root, run, "rejected", summary)


def _promoted(root: Path, run: RetrainState, tag: str) -> RetrainResult:
    return progress.finish(root, run, "promoted", f"{tag} took over from {run.champion or 'no model'}")


def _candidate(run: RetrainState) -> str:
    if run.candidate is None:
        raise InputError(
            f"the retraining {run.id} is at {run.step}, but names no candidate",
            f"remove {progress.RECORD} and start again",
        )
    return run.candidate


STEPS: dict[str, StepFunction] = {
    "gather": gather,
    "record": record_candidate,
    "gate": judge_candidate,
    "canary": run_canary,
}
