"""Read the output of a pipeline run as MLflow keeps it: identity, hashes, metrics, curves and parameters."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.registry.tracking import mask_password
from stages.common.artifacts import artifacts, hash_file, missing, read_json, reports
from stages.common.errors import InputError
from stages.common.model.adapter import PEFT, find_files
from stages.common.model.exported import SERVING, find_exported
from stages.common.params.loading import Params
from stages.common.repository.dvc_lock import LOCK, Lock, compute_dvc_hash, read_lock
from stages.common.repository.git import read_git
from stages.common.tag import Tag

logger = logging.getLogger("flows.registry")

# MLflow's limits.
KEY_CHARS = 250
PARAM_CHARS = 6000
TAG_CHARS = 5000
# The paths whose DVC hashes are tags of the run.
TRACED = {
    "dvc.rows": artifacts("collect"),
    "dvc.data": artifacts("split"),
    "dvc.base": artifacts("fetch_base"),
    "dvc.initial_adapter": artifacts("initial_adapter"),
    "dvc.adapter": artifacts("finetune"),
    "dvc.export": artifacts("export"),
    "dvc.compress": artifacts("compress"),
}


@dataclass(frozen=True, slots=True)
class Output:
    """The output of one pipeline run.

    Attributes:
        serving: `serving.json` of the exported model, or of the smaller one that was chosen.
        key: hash of the serving version and of the stages in dvc.lock: one output is one MLflow run.
        tags: of the run.
        metrics: of every metrics file in dvc.yaml, by `STAGE/NAME`.
    """

    serving: Mapping[str, Any]
    key: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]

    @property
    def tag(self) -> str:
        """Name and version."""
        return str(Tag(self.serving["name"], self.serving["version"]))


def read_output(root: Path, trigger: str) -> Output:
    """Read the output of the last pipeline run, and check that its parts are of one run.

    Args:
        trigger: what started the training, for the run's tags.

    Raises:
        InputError: a part is missing, or the export was made from another adapter.
    """
    adapter = artifacts("finetune")
    files = find_files(root / adapter) or PEFT
    export = (find_exported(root) / SERVING).relative_to(root)
    made = (export, adapter / files.config, adapter / files.weights)
    for path in (*made, Path("dvc.yaml"), Path("params.yaml")):
        if not (root / path).exists():
            raise missing(path)
    serving = read_json(root / export)
    trained = hash_file(root / adapter / files.weights)
    if trained != serving["adapter_sha256"]:
        raise InputError(
            f"{export} was made from the adapter {serving['adapter_sha256'][:12]}, and {adapter} holds "
            f"{trained[:12]}",
            "export the trained adapter: dvc repro",
        )
    lock_text = (root / LOCK).read_text(encoding="utf-8") if (root / LOCK).exists() else ""
    recorded = yaml.safe_load(lock_text) or {}
    stages = recorded.get("stages", {})
    canonical = json.dumps([serving["name"], serving["version"], stages], sort_keys=True, default=str)
    lock = read_lock(list(stages), root / LOCK)
    tags = {
        "serving_version": serving["version"],
        "trigger": trigger,
        "started_from": read_started_from(root),
        "base_model": f"{serving['base_model']} {serving['base_revision'] or ''}".strip(),
        **_hash_tags(root, lock),
        **read_git_tags(root),
    }
    return Output(serving, hashlib.sha256(canonical.encode()).hexdigest()[:32], tags, read_metrics(root))


def read_started_from(root: Path) -> str:
    """Return the version whose adapter the training started from, or `base`, from the trainer's report."""
    path = root / reports("finetune") / "metrics.json"
    return str(read_json(path).get("started_from", "base")) if path.exists() else "base"


def _hash_tags(root: Path, lock: Lock) -> dict[str, str]:
    """Return DVC's hashes of the model's inputs and outputs; computed from the files where dvc.lock has none.

    `dvc.agrees` is false where the adapter or the export differs from dvc.lock: a stage was run by hand.
    """
    tags = {name: lock.hash_of(path) or _actual_hash(root / path) for name, path in TRACED.items()}
    made = {name: _actual_hash(root / TRACED[name]) for name in ("dvc.adapter", "dvc.export")}
    agrees = all(lock.hash_of(TRACED[name]) == found for name, found in made.items())
    if not agrees:
        logger.warning("adapter or export differ from dvc.lock: a stage was run by hand")
        tags.update(made)
    return {**tags, "dvc.agrees": str(agrees).lower()}


def _actual_hash(path: Path) -> str:
    return compute_dvc_hash(path) if path.exists() else "none"


def read_git_tags(root: Path) -> dict[str, str]:
    """Return the revision of the code, and whether tracked files differ from it; dvc.lock is ignored.

    Every run writes dvc.lock.
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
    """Return every number in the metrics files of dvc.yaml, by `STAGE/NAME`.

    NAME is that of `dvc metrics show` and `dvc metrics diff`, so that MLflow and DVC can be compared: keys
    joined by dots, without lists and strings, true and false as 1 and 0. STAGE is the file's.
    """
    found: dict[str, float] = {}
    for path in find_metrics_files(root):
        if (root / path).exists():
            for name, value in _numbers(read_json(root / path)):
                found[make_key(f"{path.parent.name}/{name}")] = value
    return found


def find_metrics_files(root: Path) -> list[Path]:
    """Return the paths of the metrics files in dvc.yaml."""
    stages = (yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8")) or {}).get("stages", {})
    entries = [entry for stage in stages.values() for entry in stage.get("metrics", ())]
    return [Path(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _numbers(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float):
        yield name, float(value)


def make_key(name: str) -> str:
    """Return a name that MLflow accepts; a changed one ends with a hash, so that names stay different.

    MLflow allows letters, digits and `_-. :/`, at most 250 of them, and no path that resolves to another.
    """
    key = re.sub(r"[^\w.\- :/]", "_", name)
    if posixpath.normpath(key) != key or key.startswith(("/", "..")):
        stage, _, rest = key.partition("/")
        key = f"{stage}/{rest.replace('/', '_')}"
    if key == name and len(key) <= KEY_CHARS:
        return key
    return f"{key[: KEY_CHARS - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def read_curve(root: Path) -> Iterator[tuple[str, int, float]]:
    """Yield the points of the training's curves: name (`curve/loss`, `validation/loss`), step, value."""
    for curve, name in (("curve", "loss.csv"), ("validation", "validation.csv")):
        path = root / reports("finetune") / name
        if not path.exists():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                step = int(line.pop("step"))
                for metric, value in line.items():
                    if value:
                        yield f"{curve}/{metric}", step, float(value)


def flatten_params(params: Params) -> dict[str, str]:
    """Return every parameter by its dotted name, as text, without passwords in URLs.

    A list of plain values stays one value.
    """
    found: dict[str, str] = {}
    for name, value in _leaves(params.model_dump(mode="json", by_alias=True)):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        found[make_key(name)] = mask_password(text)[:PARAM_CHARS]
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
