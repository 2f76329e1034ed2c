"""The retraining flow: from a reason to a promotion or a refusal, step by step.

`perennial retrain` runs it by hand; its deployment runs it when drift calls for it, or on a schedule.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows.common.notifications import notify
from flows.common.prefect_api import run_as_task
from flows.gate import judge
from flows.retrain import progress, steps
from flows.retrain.progress import Ended, Retraining
from flows.training.flow import training
from flows.training.stage_tasks import PipelineResult
from stages.common.params.loading import Params, load_params

NAMES = {
    "promoted": "Promoted",
    "rejected": "Rejected",
    "unchanged": "Unchanged",
    "abandoned": "Abandoned",
}


@flow(name="retrain")
def retrain(
    why: str = "by hand", verdict: str | None = None, since: float | None = None
) -> State[Ended | None]:
    """Train a candidate on what production taught, and let it replace the champion if it is better.

    A retraining that was killed is taken up where it stood. If one is at work already this one ends at once.

    Args:
        why: in words, for the record.
        verdict: the drift verdict that calls for it.
        since: unix s, where the new traffic begins; None: since the champion took over.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    with progress.lock(root) as mine:
        if not mine:
            return Completed(name="AlreadyRunning", message="another process retrains already")
        try:
            return _go_on(root, params, steps.open_retraining(root, params, why, verdict, since))
        except Exception as error:
            notify(params.flows.notify, "failed", "the retraining failed", f"{error}\nThe next one goes on.")
            raise


def _go_on(root: Path, params: Params, run: Retraining) -> State[Ended | None]:
    while True:
        moved = _train(root, run) if run.step == "train" else _step(root, params, run)
        if isinstance(moved, Retraining):
            run = moved
        elif isinstance(moved, Ended):
            _show(root, params, moved)
            return Completed(name=NAMES[moved.outcome], message=moved.said, data=moved)
        else:
            return moved


def _step(root: Path, params: Params, run: Retraining) -> Retraining | Ended:
    work = steps.STEPS[run.step]
    return run_as_task(run.step, lambda: work(root, params, run))


def _train(root: Path, run: Retraining) -> Retraining | State[Ended | None]:
    """Run the training flow; a failed stage ends the retraining, a stopped one leaves it to be taken up."""
    state = training(trigger=run.verdict or run.why, return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, PipelineResult) and result.failures:
        said = "; ".join(f"{failure.stage}: {failure.message}" for failure in result.failures)
        ended = progress.finish(root, run, "abandoned", said)
        return Failed(message=f"training failed: {said}", data=ended)
    if not state.is_completed():
        return Cancelled(message=f"training ended {state.name}; the next retraining goes on with it")
    return progress.advance(root, run)


def _show(root: Path, params: Params, ended: Ended) -> None:
    if ended.outcome == "promoted" or ended.outcome == "rejected":
        notify(params.flows.notify, ended.outcome, f"{ended.candidate} was {ended.outcome}", ended.said)
    verdict = judge.read_verdict(root, ended.candidate) if ended.candidate else None
    if verdict is not None:
        create_table_artifact(
            [
                {
                    "criterion": criterion.name,
                    "": "passed" if criterion.passed else "REFUSED",
                    "said": criterion.said,
                }
                for criterion in verdict.criteria
            ],
            key="gate",
            description=f"{verdict.tag} against {verdict.champion}",
        )
