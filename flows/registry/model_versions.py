"""Versions of the model in MLflow's registry: their aliases, their evidence, and their adapters.

A version's tag is `NAME:VERSION`, as the service and BentoML's store say it; MLflow numbers versions 1, 2, 3
by itself, and carries the tag as a tag of the version.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flows.registry.tracking import open_tracking, tracking_address, tracking_errors
from stages.common.adapter import CONFIG, FOLDER, WEIGHTS, InitialAdapter, put_initial_adapter
from stages.common.errors import InputError
from stages.common.params.loading import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

Alias = Literal["champion", "challenger"]
Gate = Literal["none", "passed", "refused"]
ADAPTER = "adapter"  # the folder of a run's artifacts that a version is made from
ADAPTER_FILES = (CONFIG, WEIGHTS)
EVIDENCE = "evidence"  # the folder of a run's artifacts for verdicts on its version
# Of the metrics of a run, what stands beside a version; the first three that are there.
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
    """A version as the registry knows it.

    Attributes:
        tag: `NAME:VERSION`.
        number: MLflow's own count of versions.
        run_id: the run that recorded it, where its evidence lies.
        created: when it was recorded, in unix seconds.
        gate: what the gate said of it.
        headline: the first figures of its evaluation, by name.
        tags: all tags of the version.
    """

    tag: str
    number: int
    run_id: str
    created: float
    aliases: tuple[str, ...]
    gate: str
    headline: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def registered_name(name: str) -> str:
    """Return a model's name as MLflow's registry takes it: no slash, no colon."""
    return re.sub(r"[^\w.-]", "-", name)


def alias_of(root: Path, params: Params, alias: Alias) -> str | None:
    """Return the tag that bears an alias, or None.

    Raises:
        InputError: MLflow cannot be reached, or the alias was given by hand to what is no version of ours.
    """
    with _registry(root, params) as client:
        version = _bearer(client, params.model_card.name, alias)
        if version is None:
            return None
        if "tag" not in version.tags:
            raise InputError(
                f"{alias} in MLflow is version {version.version} of {version.name}, which nobody recorded",
                "take the alias off it on MLflow's page; only python -m flows.release moves aliases",
            )
        return str(version.tags["tag"])


def set_alias(root: Path, params: Params, alias: Alias, tag: str | None) -> None:
    """Let an alias stand for a version, or for none; the same call again changes nothing.

    Only flows.release may call this: it holds the lock, has read the gate's verdict and keeps the journal.
    Nothing is checked here but that the version is recorded.

    Raises:
        InputError: MLflow cannot be reached, or has no such version.
    """
    name = registered_name(params.model_card.name)
    with _registry(root, params) as client:
        bearer = _aliases(client, params.model_card.name).get(alias)
        if tag is None:
            if bearer is not None:
                client.delete_registered_model_alias(name, alias)
            return
        version = _version(client, tag)
        if str(version.version) == str(bearer):
            return
        if version.name != name:
            raise InputError(f"{tag} is no version of {name}", "name a version of this model")
        if alias == "champion":  # before the alias moves, so that no champion is without it
            client.set_model_version_tag(
                name, version.version, "champion_since", datetime.now(UTC).isoformat()
            )
        client.set_registered_model_alias(name, alias, version.version)


def champion_since(root: Path, params: Params) -> float | None:
    """Return when the champion took over, in unix seconds; None without one."""
    with _registry(root, params) as client:
        version = _bearer(client, params.model_card.name, "champion")
        since = version.tags.get("champion_since") if version else None
        return datetime.fromisoformat(since).timestamp() if since else None


def pinned(root: Path, params: Params) -> str | None:
    """Return why the champion is pinned, or None."""
    with _registry(root, params) as client:
        model = _model(client, params.model_card.name)
        return model.tags.get("pinned") if model else None


def set_pinned(root: Path, params: Params, why: str | None) -> None:
    """Pin the champion, with the reason, or free it with None. Only flows.release may call this.

    Raises:
        InputError: MLflow cannot be reached, or no version is recorded yet.
    """
    name = registered_name(params.model_card.name)
    with _registry(root, params) as client:
        model = _model(client, params.model_card.name)
        if model is None:
            raise InputError(f"no version of {name} is recorded", "train one first: make run")
        if why is not None:
            client.set_registered_model_tag(name, "pinned", why)
        elif "pinned" in model.tags:
            client.delete_registered_model_tag(name, "pinned")


def versions_table(root: Path, params: Params) -> list[VersionInfo]:
    """Return every recorded version of the model, the newest first."""
    with _registry(root, params) as client:
        name = params.model_card.name
        bearers: dict[str, list[str]] = {}
        for alias, number in sorted(_aliases(client, name).items()):
            bearers.setdefault(str(number), []).append(alias)
        found = client.search_model_versions(f"name = '{registered_name(name)}'", max_results=1000)
        return [
            _info(client, version, tuple(bearers.get(str(version.version), ())))
            for version in sorted(found, key=lambda version: -int(version.version))
            if "tag" in version.tags
        ]


def candidates(root: Path, params: Params) -> list[VersionInfo]:
    """Return the versions that no gate has judged and that bear no alias, the newest first."""
    return [info for info in versions_table(root, params) if info.gate == "none" and not info.aliases]


def evidence(root: Path, params: Params, tag: str, *paths: Path, gate: Gate | None = None) -> None:
    """Attach files or folders to a version's run, and set what the gate said; done twice it is as done once.

    A file lies under `evidence/` as it does under the checkout's `reports/`, or by its name.

    Raises:
        InputError: MLflow cannot be reached, has no such version, or a path is not there.
    """
    for path in paths:
        if not (root / path).exists():
            raise InputError(f"{path} is not there", "give the file of a verdict, below reports/")
    with _registry(root, params) as client:
        version = _version(client, tag)
        for path in paths:
            source = root / path
            into = f"{EVIDENCE}/{_place(root, source)}".rstrip("/")
            if source.is_dir():
                client.log_artifacts(_run(version), str(source), f"{into}/{source.name}")
            else:
                client.log_artifact(_run(version), str(source), into)
        if gate is not None:  # last: a version with a verdict has its evidence
            client.set_model_version_tag(version.name, version.version, "gate", gate)


def find_version(root: Path, params: Params, tag: str) -> VersionInfo:
    """Return what the registry knows of one version.

    Raises:
        InputError: MLflow cannot be reached, or has no such version.
    """
    with _registry(root, params) as client:
        version = _version(client, tag)
        aliases = _aliases(client, tag.rpartition(":")[0])
        bears = tuple(sorted(alias for alias, number in aliases.items() if number == str(version.version)))
        return _info(client, version, bears)


def download_file(root: Path, params: Params, tag: str, name: str, folder: Path) -> Path:
    """Bring one file of a version's run into `folder`, and return where it lies.

    Args:
        name: as the run has it: `params.yaml`, `serving.json`, `card/README.md`.

    Raises:
        InputError: MLflow cannot be reached, or has no such version or file.
    """
    with _registry(root, params) as client:
        from mlflow.exceptions import MlflowException

        version = _version(client, tag)
        try:
            return Path(client.download_artifacts(_run(version), name, str(folder)))
        except (MlflowException, OSError) as error:
            raise InputError(f"{name} of {tag} cannot be read: {error}", _LOST) from None


def download_adapter(root: Path, params: Params, tag: str, folder: Path) -> Path:
    """Bring a version's adapter from the registry into `folder`, and return where it lies there.

    Raises:
        InputError: MLflow cannot be reached, has no such version, or what it keeps is another adapter.
    """
    with _registry(root, params) as client:
        version = _version(client, tag)
        uri = client.get_model_version_download_uri(version.name, version.version)
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        folder.mkdir(parents=True, exist_ok=True)
        address = tracking_address(root, params.flows.record.tracking_url)
        try:
            found = Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=address))
        except (MlflowException, OSError) as error:
            raise InputError(f"the adapter of {tag} cannot be read: {error}", _LOST) from None
    for name in ADAPTER_FILES:
        if not (found / name).is_file():
            raise InputError(f"the registry's copy of {tag} lacks {name}", _LOST)
    digest = hashlib.sha256((found / ADAPTER_FILES[1]).read_bytes()).hexdigest()
    if digest != version.tags["adapter_sha256"]:
        raise InputError(
            f"the registry's copy of {tag} has the hash {digest}, and {version.tags['adapter_sha256']} was "
            "recorded",
            _LOST,
        )
    return found


def fetch_adapter(root: Path, params: Params, tag: str, folder: Path = FOLDER) -> InitialAdapter:
    """Put a version's adapter, as the registry has it, where training goes on from.

    Args:
        folder: artifacts/initial_adapter, relative to the checkout.

    Raises:
        InputError: as `download_adapter`; then the folder is as it was.
    """
    with _registry(root, params) as client:
        tags = _version(client, tag).tags
    with tempfile.TemporaryDirectory(prefix="perennial-adapter-") as beside:
        found = download_adapter(root, params, tag, Path(beside))
        return put_initial_adapter(found, tags["serving_version"], tags["base_sha256"], root / folder)


_LOST = "record the version again from the pipeline that made it (dvc repro), or choose another version"


@contextmanager
def _registry(root: Path, params: Params) -> Iterator[MlflowClient]:
    client = open_tracking(root, params.flows.record.tracking_url)
    with tracking_errors(tracking_address(root, params.flows.record.tracking_url)):
        yield client


def _model(client: MlflowClient, name: str) -> RegisteredModel | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(registered_name(name))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    model = _model(client, name)
    return {alias: str(number) for alias, number in model.aliases.items()} if model else {}


def _bearer(client: MlflowClient, name: str, alias: Alias) -> ModelVersion | None:
    number = _aliases(client, name).get(alias)
    return client.get_model_version(registered_name(name), number) if number is not None else None


def version_of(client: MlflowClient, tag: str) -> ModelVersion | None:
    """Return MLflow's record of a version `NAME:VERSION`, or None; flows.record asks before it makes one."""
    name, _, version = tag.rpartition(":")
    found = client.search_model_versions(
        f"name = '{registered_name(name)}' and tags.`serving_version` = '{version}'"
    )
    return min(found, key=lambda version: int(version.version), default=None)


def _version(client: MlflowClient, tag: str) -> ModelVersion:
    if not re.fullmatch(r"[\w.-]+:[0-9a-f]{12}", tag):
        raise InputError(f"{tag!r} is no tag of a version", "give it as NAME:VERSION, twelve hex digits")
    found = version_of(client, tag)
    if found is None:
        raise InputError(
            f"{tag} is not in MLflow's registry", "record it (the training flow does), or choose another"
        )
    return found


def _run(version: ModelVersion) -> str:
    """Return the run that recorded a version; ours always have one."""
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


def _place(root: Path, path: Path) -> str:
    """Return the folder of a file below reports/, or nothing."""
    reports = (root / "reports").resolve()
    folder = path.resolve().parent
    return folder.relative_to(reports).as_posix() if folder.is_relative_to(reports) else ""
