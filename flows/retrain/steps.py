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

from flows.common.guarded_task import label_traffic
from flows.gate.evaluation import keep_test_rows
from flows.gate.judge import run_gate
from flows.gate.verdict import read_verdict
from flows.registry.model_versions import attach_evidence, fetch_adapter, list_recorded
from flows.registry.runs import register_candidate, verify_candidate
from flows.registry.tracking import Registry
from flows.release.actions import Order, promote_first, release, settle
from flows.release.canary import CanaryVerdict, judge_canary
from flows.retrain import progress
from flows.retrain.progress import RetrainResult, RetrainState
from monitoring.feedback import rows
from services.versions.aliases import ALIASES, read_aliases
from services.versions.releases import read_releases
from services.versions.store import add_pipeline_output, read_pipeline_tag
from stages.common.artifacts import STATE, read_json
from stages.common.errors import InputError
from stages.common.model.adapter import FOLDER as START
from stages.common.model.adapter import clear_initial_adapter, put_initial_adapter
from stages.common.params.loading import Params
from stages.common.tag import Tag

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
        InputError: the champion is pinned.
    """
    registry, left = Registry.of(root, params), progress.read_state(root)
    settle(registry)
    if left is None and read_pipeline_tag(root) is not None:
        # Before the pipeline makes another model, which has not passed the gate.
        promote_first(registry, params.services.versions.follow_pipeline, "retrain")
    aliases = read_aliases(root / ALIASES)
    if aliases.pinned is not None:
        raise InputError(f"the champion is pinned: {aliases.pinned}", "perennial release unpin --reason TEXT")
    champion = aliases.champion
    if left is not None:
        if left.champion == champion or (left.step == "canary" and left.candidate == champion):
            logger.info("continuing the retraining %s (%s) at step %s", left.id, left.reason, left.step)
            return left
        progress.finish(root, left, "abandoned", f"{champion} became champion meanwhile")
    if since is None:
        # Not after now, even if the clock was set back: no traffic would be new.
        since = min(aliases.champion_since or 0.0, time.time())
    return progress.start(root, reason, verdict, champion, since)


def gather(root: Path, params: Params, run: RetrainState) -> RetrainState:
    """Write the rows to learn, the rows held out for the gate, and the adapter to start from."""
    keep_test_rows(root)
    labelled = label_traffic(root, params, 0.0, run.until)
    recent = label_traffic(root, params, run.since, run.until)
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
    registry = Registry.of(root, params)
    if read_pipeline_tag(root) == champion:  # MLflow may have been down when it was trained
        register_candidate(registry, params)
    if not any(info.tag == champion for info in list_recorded(registry)):
        logger.warning(
            "%s is not in the registry and no longer in artifacts/: a new adapter is trained", champion
        )
        clear_initial_adapter(folder)
        return
    with TemporaryDirectory(dir=root / STATE) as name:
        fetch_adapter(registry, champion, Path(name))
        about = read_json(Path(name) / "origin.json")
        put_initial_adapter(Path(name), about["version"], about["base_sha256"], folder)


def record_candidate(root: Path, params: Params, run: RetrainState) -> RetrainState | RetrainResult:
    """Register the trained version, verify the registry's copy, and add it to the store."""
    if read_pipeline_tag(root) == run.champion:
        return progress.finish(root, run, "unchanged", "training gave the champion again")
    registry = Registry.of(root, params)
    candidate = register_candidate(registry, params, trigger=run.verdict or run.reason)
    verify_candidate(registry, candidate)
    tag = add_pipeline_output(root)
    logger.info("%s is registered, and in the store", tag)
    return progress.advance(root, run, candidate=tag)


def judge_candidate(root: Path, params: Params, run: RetrainState) -> RetrainState | RetrainResult:
    """Evaluate the candidate in the gate; a rejected one ends the retraining."""
    tag = _candidate(run)
    verdict = read_verdict(root, tag)
    if verdict is None or verdict.champion != run.champion:
        verdict = run_gate(root, params, tag)
    paths = [Tag.parse(tag).report(folder) for folder in ("gate", "parity")]
    attach_evidence(
        Registry.of(root, params),
        tag,
        *(path for path in paths if (root / path).exists()),
        gate="passed" if verdict.passed else "rejected",
    )
    if not verdict.passed:
        failed = "; ".join(criterion.summary for criterion in verdict.failures)
        return progress.finish(root, run, "rejected", f"by the gate: {failed}")
    return progress.advance(root, run)


def run_canary(root: Path, params: Params, run: RetrainState, *, poll_s: float = POLL_S) -> RetrainResult:
    """Serve the candidate to a share of users, compare their feedback, and promote or reject it."""
    tag, registry = _candidate(run), Registry.of(root, params)
    if run.champion is not None and read_aliases(root / ALIASES).champion != tag:
        if run.canary_since is None:
            share = params.flows.retrain.canary.share
            release(registry, Order("canary", tag, "retrain", run.reason, share))
            run = progress.save_state(root, replace(run, canary_since=time.time()))
        logged_at = float("-inf")
        while (verdict := _judge_canary(root, params, tag)) is not None and verdict.state == "wait":
            if time.monotonic() - logged_at > LOG_S:
                logged_at = time.monotonic()
                logger.info("%s", verdict.summary)
            time.sleep(poll_s)
        if verdict is None:
            return _finish_after_release(root, run, tag)
        logger.info("%s", verdict.summary)
        _attach_canary_report(registry, tag)
        if verdict.state == "bad":
            release(registry, Order("reject", tag, "canary", verdict.summary))
            return progress.finish(root, run, "rejected", f"in the canary: {verdict.summary}")
    release(registry, Order("promote", tag, "retrain", run.reason))
    return _promoted(root, run, tag)


def _judge_canary(root: Path, params: Params, tag: str) -> CanaryVerdict | None:
    """Judge the canary; None if the version is no longer the challenger."""
    challenger = read_aliases(root / ALIASES).challenger
    if challenger is None or challenger.tag != tag:
        return None
    settle_s = params.monitoring.window.settle_s
    return judge_canary(root, params.services.events.url, params.flows.retrain.canary, settle_s)


def _attach_canary_report(registry: Registry, tag: str) -> None:
    """Attach the canary's report in MLflow; a registry that is down does not hold up the decision."""
    try:
        attach_evidence(registry, tag, Tag.parse(tag).report("canary"))
    except InputError as error:
        logger.warning("the canary's report on %s is not in MLflow: %s", tag, error)


def _finish_after_release(root: Path, run: RetrainState, tag: str) -> RetrainResult:
    """Finish after another release ended the canary: one by hand, or one before this was killed."""
    if read_aliases(root / ALIASES).champion == tag:
        return _promoted(root, run, tag)
    releases = read_releases(root)
    start = max(place for place, one in enumerate(releases) if one.action == "canary" and one.tag == tag)
    ended = next(one for one in releases[start:] if one.challenger != tag)
    summary = f"its canary was ended ({ended.action} by {ended.by}): {ended.reason}"
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
