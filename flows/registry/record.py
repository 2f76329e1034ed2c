"""What a training run leaves in MLflow: everything that made a model, the adapter, and a version to judge.

A run is the record of one output of the pipeline; recorded again it is the same run. A record that was killed
goes on where it was: the run counts as finished only when the version is there.

    python -m flows.registry record            # what the pipeline made last, by hand
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import posixpath
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from flows.common.cli import run_command
from flows.common.summary import read_results, table
from flows.registry.model_versions import (
    ADAPTER,
    ADAPTER_FILES,
    alias_of,
    download_adapter,
    registered_name,
    version_of,
)
from flows.registry.tracking import (
    ARTIFACTS,
    SQLITE,
    open_tracking,
    tracking_address,
    tracking_errors,
    without_password,
)
from stages.common.adapter import list_adapter_files
from stages.common.artifacts import STATE, artifacts, missing, read_json, reports
from stages.common.dvc_lock import LOCK, Lock, dvc_hash, read_lock
from stages.common.errors import InputError
from stages.common.git import read_git
from stages.common.locks import file_lock
from stages.common.params.loading import Params, load_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger("flows.record")

RECORD_LOCK = STATE / "record.lock"
RELOAD_TIMEOUT_S = 600
RELOAD_PROMPTS = 4  # a wrong adapter differs in every one of them
# MLflow's own limits.
KEY_CHARS = 250
PARAM_CHARS = 6000
TAG_CHARS = 5000
PARAMS_AT_ONCE = 100
METRICS_AT_ONCE = 1000
# Whose DVC hashes a run carries, by the tag's name.
TRACED = {
    "dvc.rows": artifacts("collect"),
    "dvc.data": artifacts("split"),
    "dvc.base": artifacts("fetch_base"),
    "dvc.initial_adapter": artifacts("initial_adapter"),
    "dvc.adapter": artifacts("finetune"),
    "dvc.export": artifacts("export"),
}

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recorded version that may become champion.

    Attributes:
        tag: `NAME:VERSION`, by which services and gate know it.
        name: the model's, as the service says it.
        version: content hash, 12 hex digits.
        run_id: MLflow's run of this output of the pipeline.
        model_version: MLflow's number of the version.
    """

    tag: str
    name: str
    version: str
    run_id: str
    model_version: str


@dataclass(frozen=True, slots=True)
class Output:
    """What the pipeline made, read from its folders.

    Attributes:
        serving: `artifacts/export/serving.json`.
        key: hash of the serving version and of all that dvc.lock says: one output, one run.
        tags: of the run.
        metrics: of every metrics file of dvc.yaml, by `STAGE/NAME`.
    """

    serving: Mapping[str, Any]
    key: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def tag(self) -> str:
        """Name and version."""
        return f"{self.serving['name']}:{self.serving['version']}"


def record_training(root: Path, params: Params, trigger: str = "hand") -> Candidate:
    """Record the pipeline's newest output in MLflow, if it is not, and make its adapter a version.

    Args:
        trigger: the id of the verdict that started the training, or `hand`, or `schedule`.

    Raises:
        InputError: the pipeline has not finished, its parts are not of one run, or MLflow cannot be reached.
    """
    output = read_output(root, trigger)
    url = params.flows.record.tracking_url
    client = open_tracking(root, url)
    champion = alias_of(root, params, "champion")
    # Two processes of this checkout that record at once would make two runs of one output.
    with file_lock(root / RECORD_LOCK), tracking_errors(tracking_address(root, url)):
        experiment = _experiment(client, root, params)
        run = _run_of(client, experiment, output, champion)
        if run.info.status != "FINISHED":
            _log_figures(client, run, root, params, output)
            _log_files(client, run, root)
        version = version_of(client, output.tag) or _make_version(client, run, output)
        if run.info.status != "FINISHED":
            client.set_tag(run.info.run_id, "model_version", version.version)
            client.set_terminated(run.info.run_id, "FINISHED")
    log.info("%s is version %s of %s in MLflow", output.tag, version.version, version.name)
    return Candidate(
        output.tag,
        output.serving["name"],
        output.serving["version"],
        run.info.run_id,
        str(version.version),
    )


def check_reload(candidate: Candidate, root: Path, params: Params) -> None:
    """Load the adapter as the registry gives it back, and compare its logits with the pipeline's, bit by bit.

    They must also differ from the base's: an adapter whose weights are not found on loading is silently
    begun anew, and then does nothing. A process of its own does it, so that torch's memory ends with it.

    Raises:
        InputError: MLflow cannot be reached, or the version is not what was trained.
    """
    with tempfile.TemporaryDirectory(prefix="perennial-reload-") as folder:
        downloaded = download_adapter(root, params, candidate.tag, Path(folder))
        command = [
            *(sys.executable, "-m", "flows.registry.verify_adapter"),
            *("--base", str((root / artifacts("fetch_base")).resolve())),
            *("--trained", str((root / artifacts("finetune")).resolve())),
            *("--reloaded", str(downloaded.resolve())),
            *("--rows", str((root / artifacts("split") / "train.parquet").resolve())),
            *("--prompts", str(RELOAD_PROMPTS)),
        ]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=RELOAD_TIMEOUT_S,
                check=False,
                cwd=Path(__file__).parents[2],
            )
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{candidate.tag} was not loaded from the registry within {RELOAD_TIMEOUT_S} s",
                "run again when the machine has less to do: python -m flows.registry record",
            ) from None
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise InputError(
            f"{candidate.tag} does not come back from the registry as it was trained: {why}",
            "it must not be served; record it again, and report it if it stays so",
        )
    log.info("%s: %s", candidate.tag, done.stdout.strip())


def read_output(root: Path, trigger: str) -> Output:
    """Read what the pipeline made, and check that its parts belong together.

    Raises:
        InputError: a part is missing, or the export is of another adapter.
    """
    export, adapter = artifacts("export") / "serving.json", artifacts("finetune")
    for path in (export, *(adapter / name for name in ADAPTER_FILES), Path("dvc.yaml"), Path("params.yaml")):
        if not (root / path).exists():
            raise missing(path)
    serving = read_json(root / export)
    with (root / adapter / ADAPTER_FILES[1]).open("rb") as file:
        trained = hashlib.file_digest(file, "sha256").hexdigest()
    if trained != serving["adapter_sha256"]:
        raise InputError(
            f"{export} is of the adapter {serving['adapter_sha256'][:12]}, not of {adapter} ({trained[:12]})",
            "export what was trained: dvc repro",
        )
    lock_text = (root / LOCK).read_text(encoding="utf-8") if (root / LOCK).exists() else ""
    recorded = yaml.safe_load(lock_text) or {}
    stages = recorded.get("stages", {})
    canonical = json.dumps([serving["name"], serving["version"], stages], sort_keys=True, default=str)
    lock = read_lock(list(stages), root / LOCK)
    tags = {
        "serving_version": serving["version"],
        "trigger": trigger,
        "started_from": started_from(root),
        "base_model": f"{serving['base_model']} {serving['base_revision'] or ''}".strip(),
        **_hash_tags(root, lock),
        **git_tags(root),
    }
    return Output(serving, hashlib.sha256(canonical.encode()).hexdigest()[:32], tags, read_metrics(root))


def started_from(root: Path) -> str:
    """Return the version whose adapter learned on, or `base`, as the trainer says."""
    path = root / reports("finetune") / "metrics.json"
    return str(read_json(path).get("started_from", "base")) if path.exists() else "base"


def _hash_tags(root: Path, lock: Lock) -> dict[str, str]:
    """Return DVC's hashes of what made the model; where the lock is silent, of the files themselves.

    `dvc.agrees` is false where the adapter or the export is not what DVC saw: somebody ran a stage by hand.
    """
    tags = {name: lock.hash_of(path) or _actual_hash(root / path) for name, path in TRACED.items()}
    made = {name: _actual_hash(root / TRACED[name]) for name in ("dvc.adapter", "dvc.export")}
    agrees = all(lock.hash_of(TRACED[name]) == found for name, found in made.items())
    if not agrees:
        log.warning("adapter or export are not what dvc.lock recorded: a stage ran by hand")
        tags.update(made)
    return {**tags, "dvc.agrees": str(agrees).lower()}


def _actual_hash(path: Path) -> str:
    return dvc_hash(path) if path.exists() else "none"


def git_tags(root: Path) -> dict[str, str]:
    """Return the revision of the code, and whether tracked files differ from it.

    dvc.lock does not count: every run writes it.
    """
    revision = read_git(root, "rev-parse", "HEAD")
    if revision is None:
        return {"git.revision": "none", "git.dirty": "unknown"}
    changed = read_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock")
    tags = {"git.revision": revision, "git.dirty": str(bool(changed)).lower()}
    if changed:
        tags["git.changed"] = " ".join(line[2:].strip() for line in changed.splitlines())[:TAG_CHARS]
    return {**tags, "mlflow.source.git.commit": revision}


def read_metrics(root: Path) -> dict[str, float]:
    """Return every number of the metrics files that dvc.yaml names, by `STAGE/NAME`.

    NAME is what `dvc metrics show` and `dvc metrics diff` call it, so that both say the same: keys joined by
    dots, lists and texts left out, true and false as 1 and 0. STAGE stands for the file, since DVC's names
    are a file's own.
    """
    found: dict[str, float] = {}
    for path in metrics_files(root):
        if (root / path).exists():
            for name, value in _numbers(read_json(root / path)):
                found[metric_key(f"{path.parent.name}/{name}")] = value
    return found


def metrics_files(root: Path) -> list[Path]:
    """Return the metrics files of dvc.yaml."""
    stages = (yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8")) or {}).get("stages", {})
    entries = [entry for stage in stages.values() for entry in stage.get("metrics", ())]
    return [Path(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _numbers(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float):
        yield name, float(value)


def metric_key(name: str) -> str:
    """Return a name as MLflow takes it; one that must be changed gets a mark, so that no two become one.

    MLflow allows letters, digits and `_-. :/`, at most 250 of them, and no path that resolves to another.
    """
    key = re.sub(r"[^\w.\- :/]", "_", name)
    if posixpath.normpath(key) != key or key.startswith(("/", "..")):
        stage, _, rest = key.partition("/")
        key = f"{stage}/{rest.replace('/', '_')}"
    if key == name and len(key) <= KEY_CHARS:
        return key
    return f"{key[: KEY_CHARS - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def flat_params(params: Params) -> dict[str, str]:
    """Return every parameter by its dotted name, as text; lists of plain values stay one value.

    A password inside a URL is left out.
    """
    found: dict[str, str] = {}
    for name, value in _leaves(params.model_dump(mode="json", by_alias=True)):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        found[metric_key(name)] = without_password(text)[:PARAM_CHARS]
    return found


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        inner: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        inner = iter(enumerate(value))
    else:
        yield name, value
        return
    for key, inside in inner:
        yield from _leaves(inside, f"{name}.{key}" if name else str(key))


def _experiment(client: MlflowClient, root: Path, params: Params) -> str:
    record = params.flows.record
    found = client.get_experiment_by_name(record.experiment)
    if found is not None and found.lifecycle_stage == "active":
        return str(found.experiment_id)
    if found is not None:
        raise InputError(
            f"the experiment {record.experiment!r} was deleted in MLflow",
            "restore it there, or give another flows.record.experiment",
        )
    local = record.tracking_url.startswith(SQLITE)
    where = (root / ARTIFACTS).resolve().as_uri() if local else None
    return str(client.create_experiment(record.experiment, artifact_location=where))


def _run_of(client: MlflowClient, experiment: str, output: Output, champion: str | None) -> Run:
    """Return the run of this output, made if there is none."""
    found = client.search_runs([experiment], f"tags.`output` = '{output.key}'", max_results=1)
    if found:
        return found[0]
    tags = {**output.tags, "output": output.key, "champion": champion or "none"}
    return client.create_run(
        experiment, tags={name: value[:TAG_CHARS] for name, value in tags.items()}, run_name=output.tag
    )


def _log_figures(client: MlflowClient, run: Run, root: Path, params: Params, output: Output) -> None:
    """Log parameters, metrics and the loss; what a killed record had logged already stays as it is.

    Metrics bear the time of their file, so that logged twice they are once in the store.
    """
    from mlflow.entities import Metric, Param

    client.set_tag(run.info.run_id, "mlflow.note.content", note_of(root, output))
    known = run.data.params
    values = [Param(name, value) for name, value in flat_params(params).items() if name not in known]
    for some in _portions(values, PARAMS_AT_ONCE):
        client.log_batch(run.info.run_id, params=some)
    at = _time_ms(root / artifacts("export") / "serving.json")
    metrics = [Metric(name, value, at, 0) for name, value in output.metrics.items()]
    metrics += [Metric(name, value, at, step) for name, step, value in read_curve(root)]
    for portion in _portions(metrics, METRICS_AT_ONCE):
        client.log_batch(run.info.run_id, metrics=portion)


def read_curve(root: Path) -> Iterator[tuple[str, int, float]]:
    """Yield the points of the training curves: `curve/loss` and its like, step, value."""
    path = root / reports("finetune") / "loss.csv"
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            step = int(line.pop("step"))
            for name, value in line.items():
                if value:
                    yield f"curve/{name}", step, float(value)


def note_of(root: Path, output: Output) -> str:
    """Return what MLflow's page shows first of a run: where it came from, and base against tuned."""
    start, trigger = output.tags["started_from"], output.tags["trigger"]
    whence = "a new adapter" if start == "base" else f"learned on from {start}"
    line = f"{output.tag}: {whence}; started by {trigger}."
    results = table(read_results(root) or ())
    if not results:
        return line
    rows = [list(results[0]), ["---"] * len(results[0]), *(list(row.values()) for row in results)]
    return "\n".join([line, "", *(f"| {' | '.join(row)} |" for row in rows)])


def _log_files(client: MlflowClient, run: Run, root: Path) -> None:
    """Log the adapter, the card, pictures, figures, and what names every input; the adapter comes last."""
    run_id = run.info.run_id
    # A URL of the event store may hold a password.
    client.log_text(
        run_id, without_password((root / "params.yaml").read_text(encoding="utf-8")), "params.yaml"
    )
    for path in (Path("dvc.yaml"), LOCK, artifacts("export") / "serving.json"):
        if (root / path).exists():
            client.log_artifact(run_id, str(root / path))
    for path in (*metrics_files(root), reports("finetune") / "loss.csv"):
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


def _make_version(client: MlflowClient, run: Run, output: Output) -> ModelVersion:
    """Make the run's adapter a version of the registered model, not yet judged."""
    from mlflow.exceptions import MlflowException

    name = registered_name(output.serving["name"])
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


def _portions(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def main(arguments: Sequence[str] | None = None) -> int:
    """Record what the pipeline made last, and check that it comes back; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial registry record", description=__doc__)
    parser.add_argument("--trigger", default="hand", help="what started the training")
    options = parser.parse_args(arguments)

    def record() -> int:
        params = load_params()
        candidate = record_training(Path(), params, options.trigger)
        check_reload(candidate, Path(), params)
        sys.stdout.write(f"{candidate.tag}: version {candidate.model_version}, run {candidate.run_id}\n")
        return 0

    return run_command(record)
