"""Model versions in MLflow's registry: their evidence, their adapters, and a mirror of the aliases.

A version's tag is `NAME:VERSION`, as in the service and in BentoML's store. MLflow numbers versions 1, 2, 3;
the tag is stored as a tag of the MLflow version.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flows.registry.tracking import Registry, convert_errors, open_tracking
from stages.common.artifacts import hash_file
from stages.common.errors import InputError
from stages.common.model.adapter import FOLDER, PEFT, InitialAdapter, find_files, put_initial_adapter
from stages.common.tag import Tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger("flows.registry")

Alias = Literal["champion", "challenger"]
Gate = Literal["none", "passed", "rejected"]
ADAPTER = "adapter"  # folder of a run's artifacts that a version is made from
EVIDENCE = "evidence"  # folder of a run's artifacts for verdicts on its version
TAG = re.compile(r"[\w.-]+:[0-9a-f]{12}")
# The metrics of a run that are listed with its version: the first three that it has.
HEADLINES = (
    "evaluate/tuned.accuracy.value",
    "evaluate/tuned.macro_f1.value",
    "evaluate/tuned.chrf.value",
    "evaluate/tuned.exact_match.value",
    "evaluate/tuned.intent_accuracy.value",
    "evaluate/tuned.slot_f1.value",
    "evaluate/tuned.valid_output.value",
    "evaluate/tuned.perplexity.value",
)


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A version in MLflow's registry.

    Attributes:
        tag: `NAME:VERSION`.
        number: MLflow's version number.
        run_id: the run that trained it and holds its evidence.
        created: when it was registered, unix time, s.
        gate: the gate's result: none, passed or rejected.
        headline: the first metrics of its evaluation, by name.
        tags: all tags of the MLflow version.
    """

    tag: str
    number: int
    run_id: str
    created: float
    aliases: tuple[str, ...]
    gate: str
    headline: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def make_registered_name(name: str) -> str:
    """Return a model's name as MLflow's registry accepts it: without slash and colon."""
    return re.sub(r"[^\w.-]", "-", name)


def push_aliases(registry: Registry, aliases: Mapping[Alias, str | None]) -> None:
    """Make MLflow's aliases point to these versions, or to none; without a difference nothing is written.

    Only flows.release calls this: MLflow mirrors the alias file. A version that MLflow does not have (it was
    down when the version was trained) leaves its alias without a version.

    Raises:
        InputError: MLflow cannot be reached.
    """
    name = make_registered_name(registry.model)
    with _connect(registry) as client:
        current = _aliases(client, registry.model)
        for alias, tag in aliases.items():
            version = find_model_version(client, tag) if tag is not None else None
            if version is not None and version.name == name:
                if str(version.version) != current.get(alias):
                    client.set_registered_model_alias(name, alias, version.version)
                continue
            if tag is not None:
                logger.warning("MLflow has no version %s of %s: the alias %s is removed", tag, name, alias)
            if alias in current:
                client.delete_registered_model_alias(name, alias)


def list_recorded(registry: Registry) -> list[VersionInfo]:
    """Return every version of the model in MLflow, newest first."""
    with _connect(registry) as client:
        aliases: dict[str, list[str]] = {}
        for alias, number in sorted(_aliases(client, registry.model).items()):
            aliases.setdefault(number, []).append(alias)
        found = client.search_model_versions(
            f"name = '{make_registered_name(registry.model)}'", max_results=1000
        )
        return [
            _info(client, version, tuple(aliases.get(str(version.version), ())))
            for version in sorted(found, key=lambda version: -int(version.version))
            if "tag" in version.tags
        ]


def attach_evidence(registry: Registry, tag: str, *paths: Path, gate: Gate | None = None) -> None:
    """Attach files or folders to a version's run, and set the gate's result; idempotent.

    The path below `evidence/` is that below the checkout's `reports/`; for other files it is the name.

    Raises:
        InputError: MLflow cannot be reached, has no such version, or a path does not exist.
    """
    root = registry.root
    for path in paths:
        if not (root / path).exists():
            raise InputError(f"{path} does not exist", "name a report below reports/")
    with _connect(registry) as client:
        version = _version(client, tag)
        for path in paths:
            source = root / path
            into = f"{EVIDENCE}/{_folder_of(root, source)}".rstrip("/")
            if source.is_dir():
                client.log_artifacts(_run(version), str(source), f"{into}/{source.name}")
            else:
                client.log_artifact(_run(version), str(source), into)
        if gate is not None:  # last, so that a version with a result has its evidence
            client.set_model_version_tag(version.name, version.version, "gate", gate)


def find_version(registry: Registry, tag: str) -> VersionInfo:
    """Return one version of the model in MLflow.

    Raises:
        InputError: MLflow cannot be reached, or has no such version.
    """
    with _connect(registry) as client:
        version = _version(client, tag)
        aliases = _aliases(client, Tag.parse(tag).name)
        own = tuple(sorted(alias for alias, number in aliases.items() if number == str(version.version)))
        return _info(client, version, own)


def download_file(registry: Registry, tag: str, name: str, folder: Path) -> Path:
    """Download one file of a version's run into `folder`; return its path.

    Args:
        name: its path in the run: `params.yaml`, `serving.json`, `card/README.md`.

    Raises:
        InputError: MLflow cannot be reached, or has no such version or file.
    """
    with _connect(registry) as client:
        from mlflow.exceptions import MlflowException

        version = _version(client, tag)
        try:
            return Path(client.download_artifacts(_run(version), name, str(folder)))
        except (MlflowException, OSError) as error:
            raise InputError(f"{name} of {tag} cannot be read: {error}", _LOST) from None


def download_adapter(registry: Registry, tag: str, folder: Path) -> Path:
    """Download a version's adapter into `folder`; return its path.

    Raises:
        InputError: MLflow cannot be reached, has no such version, or its copy of the adapter has changed.
    """
    with _connect(registry) as client:
        version = _version(client, tag)
        uri = client.get_model_version_download_uri(version.name, version.version)
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = Path(
                download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=registry.address)
            )
        except (MlflowException, OSError) as error:
            raise InputError(f"the adapter of {tag} cannot be read: {error}", _LOST) from None
    files = find_files(found) or PEFT
    for name in (files.config, files.weights):
        if not (found / name).is_file():
            raise InputError(f"the registry's copy of {tag} lacks {name}", _LOST)
    digest = hash_file(found / files.weights)
    if digest != version.tags["adapter_sha256"]:
        raise InputError(
            f"the registry's copy of {tag} has the hash {digest}, but {version.tags['adapter_sha256']} was "
            "registered",
            _LOST,
        )
    return found


def fetch_adapter(registry: Registry, tag: str, folder: Path = FOLDER) -> InitialAdapter:
    """Put a version's adapter from MLflow where the next training starts from.

    Args:
        folder: relative to the checkout.

    Raises:
        InputError: as `download_adapter`; then the folder has not changed.
    """
    with _connect(registry) as client:
        tags = _version(client, tag).tags
    into = registry.root / folder
    with tempfile.TemporaryDirectory(prefix="perennial-adapter-") as name:
        found = download_adapter(registry, tag, Path(name))
        return put_initial_adapter(found, tags["serving_version"], tags["base_sha256"], into)


_LOST = "register the version again from the pipeline that made it (dvc repro), or choose another version"


@contextmanager
def _connect(registry: Registry) -> Iterator[MlflowClient]:
    client = open_tracking(registry.root, registry.tracking_url)
    with convert_errors(registry.address):
        yield client


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Return MLflow's aliases of a model, each with MLflow's number of the version."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(make_registered_name(name))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {alias: str(number) for alias, number in model.aliases.items()}


def find_model_version(client: MlflowClient, tag: str) -> ModelVersion | None:
    """Return MLflow's version of a tag `NAME:VERSION`, or None."""
    if not TAG.fullmatch(tag):  # it becomes part of a query
        return None
    parsed = Tag.parse(tag)
    found = client.search_model_versions(
        f"name = '{make_registered_name(parsed.name)}' and tags.`serving_version` = '{parsed.version}'"
    )
    return min(found, key=lambda version: int(version.version), default=None)


def _version(client: MlflowClient, tag: str) -> ModelVersion:
    if not TAG.fullmatch(tag):
        raise InputError(f"{tag!r} is not a valid tag", "write it as NAME:VERSION, with twelve hex digits")
    found = find_model_version(client, tag)
    if found is None:
        raise InputError(
            f"{tag} is not in MLflow's registry", "register it (the training flow does), or choose another"
        )
    return found


def _run(version: ModelVersion) -> str:
    """Return the run of a version; those of this project always have one."""
    return version.run_id or ""


def _info(client: MlflowClient, version: ModelVersion, aliases: tuple[str, ...]) -> VersionInfo:
    metrics = client.get_run(_run(version)).data.metrics
    return VersionInfo(
        tag=version.tags["tag"],
        number=int(version.version),
        run_id=_run(version),
        created=version.creation_timestamp / 1000,
        aliases=aliases,
        gate=version.tags.get("gate", "none"),
        headline={
            name.removeprefix("evaluate/tuned.").removesuffix(".value"): metrics[name]
            for name in [name for name in HEADLINES if name in metrics][:3]
        },
        tags=dict(version.tags),
    )


def _folder_of(root: Path, path: Path) -> str:
    """Return the folder of a file below reports/; empty if it is elsewhere."""
    reports = (root / "reports").resolve()
    folder = path.resolve().parent
    return folder.relative_to(reports).as_posix() if folder.is_relative_to(reports) else ""
