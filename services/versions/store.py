"""Model versions in BentoML's store, under the tag `NAME:VERSION`.

The store holds copies, so that the pipeline can overwrite its output while its last model is served.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.versions.aliases import ALIASES, read_aliases
from stages.common.artifacts import artifacts, hash_files, missing, read_json
from stages.common.errors import InputError
from stages.common.model.adapter import PEFT, find_files
from stages.common.model.exported import GGUF, SERVING, find_exported
from stages.common.tag import Tag

logger = logging.getLogger("services.versions")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one version.

    Attributes:
        name: what clients ask for.
        version: content hash, 12 hex digits.
        tokenizer: folder with the tokenizer and its chat template.
        gguf: the tuned model in one file, for engines on the CPU; None if the pipeline wrote none.
        base, adapter: folders of safetensors, for the other engines; None where the version has none, and of
            a compressed one.
        about: what the stage `export` recorded about the model (`serving.json`).
    """

    name: str
    version: str
    tokenizer: Path
    gguf: Path | None
    base: Path | None
    adapter: Path | None
    about: dict[str, Any]

    @property
    def tag(self) -> str:
        """Name and version, as the model store writes them."""
        return f"{self.name}:{self.version}"


def get_version(tag: str) -> ModelFiles:
    """Return the files of a version in the store.

    Raises:
        InputError: the store has no such version, or it was not added by this project.
    """
    import bentoml

    try:
        model = bentoml.models.get(tag)
    except (bentoml.exceptions.NotFound, bentoml.exceptions.BentoMLException, ValueError):
        raise InputError(
            f"the model store has no {tag}",
            "see perennial versions list; perennial versions add stores the newest model",
        ) from None
    base_tag = str(model.info.metadata.get("base") or "")
    folder = Path(model.path)
    if not (folder / "export" / SERVING).exists():
        raise InputError(f"{tag} in the model store is not a model of this pipeline", "choose another")
    base = Path(bentoml.models.get(base_tag).path) if base_tag and _is_stored(base_tag) else None
    return _files(folder / "export", base, folder / "adapter")


def _files(export: Path, base: Path | None, adapter: Path) -> ModelFiles:
    about = read_json(export / SERVING)
    gguf = export / GGUF
    # Of a compressed model only the GGUF is what was judged: no engine may serve the whole weights for it.
    whole = "compression" not in about
    return ModelFiles(
        about["name"],
        about["version"],
        export,
        gguf if gguf.exists() else None,
        base if whole else None,
        adapter if whole and adapter.exists() else None,
        about,
    )


def add_pipeline_output(root: Path = Path()) -> str:
    """Copy the pipeline's newest model into the store, unless it is there; return its tag.

    Raises:
        InputError: the pipeline has made no model yet.
    """
    export, base, adapter = find_exported(root), root / artifacts("fetch_base"), root / artifacts("finetune")
    config = adapter / (find_files(adapter) or PEFT).config
    for needed in (export / SERVING, base / "config.json", config):
        if not needed.exists():
            raise missing(needed.relative_to(root) if root.parts else needed)
    files = _files(export, base, adapter)
    if _is_stored(files.tag):
        return files.tag
    if "compression" in files.about:
        _store(files.tag, {"export": export, "adapter": adapter}, {})
        return files.tag
    # Named by its files, so that versions with the same base model share one copy.
    base_tag = f"{files.name}-base:{hash_files(sorted(base.iterdir()))[:12]}"
    if not _is_stored(base_tag):
        _store(base_tag, {".": base}, {})
    _store(files.tag, {"export": export, "adapter": adapter}, {"base": base_tag})
    return files.tag


def _store(tag: str, folders: dict[str, Path], metadata: dict[str, Any]) -> None:
    import bentoml

    with bentoml.models.create(tag, metadata=metadata, labels={"made-by": "perennial"}) as model:
        for name, source in folders.items():
            shutil.copytree(source, Path(model.path) / name, dirs_exist_ok=True)


def _is_stored(tag: str) -> bool:
    import bentoml

    try:
        bentoml.models.get(tag)
    except bentoml.exceptions.NotFound:
        return False
    return True


def list_versions(name: str) -> list[str]:
    """Return the tags of a model's versions in the store, oldest first."""
    import bentoml

    models = [model for model in bentoml.models.list() if model.tag.name == name]
    return [str(model.tag) for model in sorted(models, key=lambda model: model.info.creation_time)]


def read_stored_at(tag: str) -> float:
    """Return when a version was put into the store, in unix s."""
    import bentoml

    return float(bentoml.models.get(tag).info.creation_time.timestamp())


def read_pipeline_tag(root: Path = Path()) -> str | None:
    """Return the tag of the pipeline's newest model; None if it has made none."""
    serving = find_exported(root) / SERVING
    if not serving.exists():
        return None
    about = read_json(serving)
    return str(Tag(about["name"], about["version"]))


def find_served(name: str, follow_pipeline: bool, root: Path = Path()) -> str:
    """Return the tag of the version to serve; the aliases do not move.

    That is the champion. Before the first release it is the pipeline's newest model, which is copied into the
    store, or the newest one there while the pipeline is writing its next. Once there is a champion, only a
    release replaces it.

    Args:
        name: of the model, without a version.
        follow_pipeline: false: without a champion nothing is served.

    Raises:
        InputError: there is nothing to serve, or parity rejected the pipeline's newest model.
    """
    champion = read_aliases(root / ALIASES).champion
    if champion is not None:
        get_version(champion)
        newest = read_pipeline_tag(root)
        if newest not in (None, champion):
            logger.info(
                "the pipeline's newest model is %s; it is served once it is released: "
                "perennial gate %s, then perennial release promote %s",
                *[newest] * 3,
            )
        return champion
    if not follow_pipeline:
        raise InputError("no version is champion", "perennial release promote TAG --first --reason TEXT")
    try:
        tag = add_pipeline_output(root)
    except InputError:
        stored = list_versions(name)
        if not stored:
            raise
        tag = stored[-1]
    check_parity(tag, root)
    return tag


def check_parity(tag: str, root: Path = Path()) -> None:
    """Reject a version whose served answers were found to differ from its trainer's.

    Raises:
        InputError: the report of services.parity on this version has reasons.
    """
    report = root / Tag.parse(tag).report("parity")
    if not report.exists():
        return
    found = read_json(report)
    if not found["agrees"]:
        raise InputError(
            f"{tag} does not answer as it was trained to: {'; '.join(found['reasons'])}",
            f"see {report}; serve another version, or fix the cause and compare again: make parity",
        )
