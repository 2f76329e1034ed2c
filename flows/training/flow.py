"""The training flow: the DVC graph as a Prefect flow, with its results as artifacts.

`perennial run` runs it by hand; its deployment runs it on a schedule.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows.common import summary
from flows.training.plan import lock_order, sort_lock
from flows.training.prepared_run import PreparedRun, prepare_run
from flows.training.stage_tasks import PipelineResult, run_stages
from stages.common.artifacts import artifacts
from stages.common.errors import InputError
from stages.common.params.loading import Params, load_params


@flow(name="training")
def training(force: bool = False, until: str | None = None, trigger: str = "hand") -> State[PipelineResult]:
    """Bring the model, its evaluation and its card up to date with code, parameters and data.

    Args:
        force: run every stage, changed or not.
        until: run this stage and what it needs; None for all stages.
        trigger: what started the run, for the record.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    settings = params.flows.training
    with ExitStack() as stack:
        run = stack.enter_context(prepare_run(root, force=force, until=until, wait=True))
        if runtime.deployment.id:
            _rename(run.name)
        else:
            # By hand: a stopped run ends in good order. A deployment's run is stopped by Prefect.
            stack.enter_context(run.processes.stopping_on(signal.SIGINT, signal.SIGTERM))
        before = lock_order(root)
        result = run_stages(run, retries=settings.retries, retry_delay_s=settings.retry_delay_s)
        sort_lock(root, before, run.plan)
        state = _final_state(run, result)
        if state.is_completed() and (result.ran or result.restored):
            _record(root, params, trigger)
        return state


def _rename(name: str) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(runtime.flow_run.id, name=name)


def _record(root: Path, params: Params, trigger: str) -> None:
    """Record the run in MLflow. The model exists already, so an unreachable registry is only a warning."""
    logger = get_run_logger()
    if not (root / artifacts("export") / "serving.json").exists():
        return
    if find_spec("mlflow") is None:
        logger.info("not recorded: MLflow is not installed (pip install 'perennial[monitor]')")
        return
    from flows.registry.runs import register_candidate
    from flows.registry.tracking import Registry

    try:
        register_candidate(Registry.of(root, params), params, trigger)
    except InputError as error:
        logger.warning("not registered in MLflow: %s\n  later: perennial registry register", error)


def _final_state(run: PreparedRun, result: PipelineResult) -> State[PipelineResult]:
    if run.processes.stopped_by is not None:
        return Cancelled(message=f"stopped by {run.processes.stopped_by.name}", data=result)
    if result.failures:
        messages = "\n".join(f"{failure.stage}: {failure.message}" for failure in result.failures)
        return Failed(message=messages, data=result)
    _show_results(run.root)
    return Completed(message=run.name, data=result)


def _show_results(root: Path) -> None:
    results = summary.read_results(root)
    if results is not None:
        create_table_artifact(
            summary.build_table(results), key="results", description="base against tuned, on the test rows"
        )
    card = summary.get_card_path(root)
    if card.exists():
        create_markdown_artifact(card.read_text(encoding="utf-8"), key="model-card", description=str(card))
