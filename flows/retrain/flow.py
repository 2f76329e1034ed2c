"""The retraining flow: train a candidate, evaluate it, and promote or reject it, step by step.

`perennial retrain` runs it by hand; its deployment runs it when drift triggers it, or on a schedule.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows.common.notifications import notify
from flows.common.prefect_api import run_as_task
from flows.gate.verdict import read_verdict
from flows.retrain import progress, steps
from flows.retrain.progress import RetrainResult, RetrainState
from flows.training.flow import training
from flows.training.stage_tasks import PipelineResult
from stages.common.escaping import escape_widget
from stages.common.params.loading import Params, load_params
from stages.common.params.loop import Notify


@flow(name="retrain")
def retrain(
    reason: str = "by hand", verdict: str | None = None, since: float | None = None
) -> State[RetrainResult | None]:
    """Train a candidate on feedback from production, and promote it if it is better than the champion.

    A retraining that was killed is continued at its step. If one is running already this one ends at once.

    Args:
        reason: free text, for the record.
        verdict: the drift verdict that triggered it.
        since: unix s, where the new traffic begins; None: since the champion took over.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    with progress.lock(root) as held:
        if not held:
            return Completed(name="AlreadyRunning", message="another process is retraining already")
        try:
            return _run_steps(root, params, steps.resume_or_start(root, params, reason, verdict, since))
        except Exception as error:
            notify(
                params.flows.notify, "failed", "the retraining failed", f"{error}\nThe next one continues it."
            )
            raise


def _run_steps(root: Path, params: Params, state: RetrainState) -> State[RetrainResult | None]:
    while True:
        result = _train(root, state) if state.step == "train" else _run_step(root, params, state)
        if isinstance(result, RetrainState):
            state = result
        elif isinstance(result, RetrainResult):
            _report(root, params.flows.notify, result)
            return Completed(name=result.outcome.capitalize(), message=result.summary, data=result)
        else:
            return result


def _run_step(root: Path, params: Params, state: RetrainState) -> RetrainState | RetrainResult:
    work = steps.STEPS[state.step]
    return run_as_task(state.step, lambda: work(root, params, state))


def _train(root: Path, state: RetrainState) -> RetrainState | State[RetrainResult | None]:
    """Run the training flow; a failed stage ends the retraining, a stopped one leaves it to be continued."""
    ended = training(trigger=state.verdict or state.reason, return_state=True)
    result = ended.result(raise_on_failure=False)
    if isinstance(result, PipelineResult) and result.failures:
        message = "; ".join(f"{failure.stage}: {failure.message}" for failure in result.failures)
        abandoned = progress.finish(root, state, "abandoned", message)
        return Failed(message=f"training failed: {message}", data=abandoned)
    if not ended.is_completed():
        return Cancelled(message=f"training ended {ended.name}; the next retraining continues it")
    return progress.advance(root, state)


def _report(root: Path, settings: Notify, result: RetrainResult) -> None:
    if result.outcome == "promoted" or result.outcome == "rejected":
        subject = f"{result.candidate} was {result.outcome}"
        notify(settings, result.outcome, subject, result.summary)
    verdict = read_verdict(root, result.candidate) if result.candidate else None
    if verdict is not None:
        create_table_artifact(
            [
                {
                    "criterion": criterion.name,
                    "": "passed" if criterion.passed else "FAILED",
                    "result": escape_widget(criterion.summary),
                }
                for criterion in verdict.criteria
            ],
            key="gate",
            description=f"{verdict.tag} against {verdict.champion}",
        )
