"""Log a pipeline run in MLflow with everything that made the model, and register its adapter as a version.

One output of the pipeline is one MLflow run; logged again, it is the same run. A process that was killed is
continued by the next: the run counts as finished only when its version is registered.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flows.common.summary import build_table, read_results
from flows.registry.model_versions import (
    ADAPTER,
    download_adapter,
    find_model_version,
    make_registered_name,
)
from flows.registry.output import (
    TAG_CHARS,
    Output,
    find_metrics_files,
    flatten_params,
    read_curve,
    read_output,
)
from flows.registry.tracking import (
    ARTIFACTS,
    SQLITE,
    Registry,
    convert_errors,
    mask_password,
    open_tracking,
)
from services.versions.aliases import ALIASES, read_aliases
from stages.common.artifacts import STATE, artifacts, reports
from stages.common.errors import InputError
from stages.common.escaping import escape_markdown
from stages.common.locks import hold_lock
from stages.common.machine.parent import make_parent_variable
from stages.common.model.adapter import list_adapter_files
from stages.common.model.exported import SERVING, find_exported
from stages.common.params.loading import Params
from stages.common.repository.dvc_lock import LOCK

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger("flows.registry")

RUN_LOCK = STATE / "mlflow-run.lock"
VERIFY_TIMEOUT_S = 600
VERIFY_PROMPTS = 4  # a wrong adapter changes the logits of every one of them
# MLflow's limits.
PARAMS_AT_ONCE = 100
METRICS_AT_ONCE = 1000

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A registered version that may become champion.

    Attributes:
        tag: `NAME:VERSION`.
        run_id: MLflow's run.
        model_version: MLflow's number of the version.
    """

    tag: str
    run_id: str
    model_version: str


def register_candidate(registry: Registry, params: Params, trigger: str = "hand") -> Candidate:
    """Log the newest pipeline run in MLflow, and register its adapter as a version; idempotent.

    Args:
        params: logged with the run.
        trigger: the id of the drift verdict that started the training, or `hand`, or `schedule`.

    Raises:
        InputError: the pipeline has not finished, its parts are not of one run, or MLflow cannot be reached.
    """
    root = registry.root
    output = read_output(root, trigger)
    client = open_tracking(root, registry.tracking_url)
    champion = read_aliases(root / ALIASES).champion
    # Two processes of this checkout at once would make two runs of one output.
    with hold_lock(root / RUN_LOCK), convert_errors(registry.address):
        run = _find_or_create_run(client, _experiment(client, registry), output, champion)
        finished = run.info.status == "FINISHED"
        if not finished:
            log_run(client, run, root, flatten_params(params), output)
        version = find_model_version(client, output.tag) or _create_version(client, run, output)
        if not finished:
            client.set_tag(run.info.run_id, "model_version", version.version)
            client.set_terminated(run.info.run_id, "FINISHED")
    logger.info("%s is version %s of %s in MLflow", output.tag, version.version, version.name)
    return Candidate(output.tag, run.info.run_id, str(version.version))


def verify_candidate(registry: Registry, candidate: Candidate) -> None:
    """Download the adapter from MLflow, and compare its logits with the trained one's, bit by bit.

    They must also differ from the base model's: an adapter whose weights are not found on loading is
    initialised again without a warning, and changes nothing. This runs in a process of its own, which frees
    torch's memory.

    Raises:
        InputError: MLflow cannot be reached, or its adapter is not the trained one.
    """
    root = registry.root
    with tempfile.TemporaryDirectory(prefix="perennial-verify-") as folder:
        downloaded = download_adapter(registry, candidate.tag, Path(folder))
        command = [
            *(sys.executable, "-m", "flows.registry.verify_adapter"),
            *("--base", str((root / artifacts("fetch_base")).resolve())),
            *("--trained", str((root / artifacts("finetune")).resolve())),
            *("--reloaded", str(downloaded.resolve())),
            *("--rows", str((root / artifacts("split") / "train.parquet").resolve())),
            *("--prompts", str(VERIFY_PROMPTS)),
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=VERIFY_TIMEOUT_S,
                check=False,
                cwd=Path(__file__).parents[2],
                env={**os.environ, **make_parent_variable()},
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{candidate.tag} could not be loaded from the registry within {VERIFY_TIMEOUT_S} s",
                "try again when the machine is less busy: perennial registry register",
            ) from None
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise InputError(
            f"the registry's copy of {candidate.tag} is not the trained adapter: {why}",
            "do not serve it; register it again, and report a bug if that does not help",
        )
    logger.info("%s: %s", candidate.tag, done.stdout.strip())


def _experiment(client: MlflowClient, registry: Registry) -> str:
    """Return the id of the experiment, created if there is none."""
    found = client.get_experiment_by_name(registry.experiment)
    if found is not None and found.lifecycle_stage == "active":
        return str(found.experiment_id)
    if found is not None:
        raise InputError(
            f"the experiment {registry.experiment!r} was deleted in MLflow",
            "restore it there, or give another flows.tracking.experiment",
        )
    local = registry.tracking_url.startswith(SQLITE)
    where = (registry.root / ARTIFACTS).resolve().as_uri() if local else None
    return str(client.create_experiment(registry.experiment, artifact_location=where))


def _find_or_create_run(client: MlflowClient, experiment: str, output: Output, champion: str | None) -> Run:
    """Return the run of this output, created if there is none."""
    found = client.search_runs([experiment], f"tags.`output` = '{output.key}'", max_results=1)
    if found:
        return found[0]
    tags = {**output.tags, "output": output.key, "champion": champion or "none"}
    return client.create_run(
        experiment, tags={name: value[:TAG_CHARS] for name, value in tags.items()}, run_name=output.tag
    )


def log_run(client: MlflowClient, run: Run, root: Path, params: Mapping[str, str], output: Output) -> None:
    """Log everything that made the model; the caller closes the run."""
    _log_figures(client, run, root, params, output)
    _log_files(client, run, root)


def _log_figures(
    client: MlflowClient, run: Run, root: Path, params: Mapping[str, str], output: Output
) -> None:
    """Log parameters, metrics and training curves; those that a killed process logged are not changed.

    Metrics have the time of their file, so that a second logging adds no second point.
    """
    from mlflow.entities import Metric, Param

    client.set_tag(run.info.run_id, "mlflow.note.content", format_note(root, output))
    known = run.data.params
    values = [Param(name, value) for name, value in params.items() if name not in known]
    for batch in _batches(values, PARAMS_AT_ONCE):
        client.log_batch(run.info.run_id, params=batch)
    at = _time_ms(find_exported(root) / SERVING)
    metrics = [Metric(name, value, at, 0) for name, value in output.metrics.items()]
    metrics += [Metric(name, value, at, step) for name, step, value in read_curve(root)]
    for points in _batches(metrics, METRICS_AT_ONCE):
        client.log_batch(run.info.run_id, metrics=points)


def format_note(root: Path, output: Output) -> str:
    """Return the run's description on MLflow's page: its origin, and the base model against the tuned one."""
    start, trigger = output.tags["started_from"], output.tags["trigger"]
    origin = "a new adapter" if start == "base" else f"trained on from {start}"
    line = f"{output.tag}: {origin}; started by {trigger}."
    results = build_table(read_results(root) or ())
    if not results:
        return line
    cells = [[escape_markdown(cell) for cell in row.values()] for row in results]
    rows = [list(results[0]), ["---"] * len(results[0]), *cells]
    return "\n".join([line, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _log_files(client: MlflowClient, run: Run, root: Path) -> None:
    """Log the files that describe the run, and the adapter last."""
    run_id = run.info.run_id
    # The event store's URL may contain a password.
    client.log_text(run_id, mask_password((root / "params.yaml").read_text(encoding="utf-8")), "params.yaml")
    for path in (root / "dvc.yaml", root / LOCK, find_exported(root) / SERVING):
        if path.exists():
            client.log_artifact(run_id, str(path))
    curves = [reports("finetune") / name for name in ("loss.csv", "validation.csv")]
    for path in (*find_metrics_files(root), *curves):
        if (root / path).exists():
            client.log_artifact(run_id, str(root / path), f"reports/{path.parent.name}")
    for path in sorted((root / "reports").rglob("*.svg")):
        stage = path.relative_to(root / "reports").parts[0]
        if stage != reports("model_card").name:
            client.log_artifact(run_id, str(path), f"plots/{stage}")
    card = root / reports("model_card")
    if card.is_dir():
        client.log_artifacts(run_id, str(card), "card")
    adapter = root / artifacts("finetune")
    for name in list_adapter_files(adapter):
        client.log_artifact(run_id, str(adapter / name), ADAPTER)


def _create_version(client: MlflowClient, run: Run, output: Output) -> ModelVersion:
    """Register the run's adapter as a version of the model, with no result of the gate yet."""
    from mlflow.exceptions import MlflowException

    name = make_registered_name(output.serving["name"])
    try:
        client.create_registered_model(name, description="Adapters; each version's tag names its base model.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "tag": output.tag,
        "serving_version": output.serving["version"],
        "base_sha256": output.serving["base_sha256"] or "",
        "adapter_sha256": output.serving["adapter_sha256"],
        "started_from": output.tags["started_from"],
        "trigger": output.tags["trigger"],
        "gate": "none",
    }
    return client.create_model_version(
        name,
        source=f"{run.info.artifact_uri}/{ADAPTER}",
        run_id=run.info.run_id,
        tags=tags,
        description=f"The adapter of {output.tag}, on {output.tags['base_model']}.",
    )


def _time_ms(path: Path) -> int:
    return int(path.stat().st_mtime * 1000)


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
