"""The teacher of a distillation: a folder with a model, or a model on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.common.artifacts import hash_file
from stages.common.errors import InputError, TransientError
from stages.common.storage.hub import download_model, list_weight_files

FIRST_ANSWER_S = 10  # a hub that is silent for this long counts as no network


def find_teacher(name: str) -> Path:
    """Return the folder of the teacher: the named one, or the hub's snapshot, which is downloaded if need be.

    Args:
        name: a folder, or a hub id such as `owner/model`, also with a revision: `owner/model@revision`.

    Raises:
        InputError: there is no such folder or model, or it has no safetensors.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(name)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InputError(
            f"finetune.teacher: {folder} has no config.json with *.safetensors",
            "name a folder with both, or a hub model with safetensors",
        )
    return folder


def _fetch(name: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    model, _, revision = name.partition("@")
    try:
        return download_model(model, revision or None, etag_timeout=FIRST_ANSWER_S)
    except HFValidationError:
        raise InputError(
            f"finetune.teacher: {name!r} is neither a folder nor a hub id", "write it as owner/model"
        ) from None
    except LocalEntryNotFoundError as error:
        raise TransientError(
            f"finetune.teacher: {name} cannot be fetched, and the hub's cache does not have it: {error}",
            "connect to a network, or copy the model to a folder and name that",
        ) from None
    except HfHubHTTPError as error:
        raise InputError(
            f"finetune.teacher: the hub does not provide {name}: {str(error).splitlines()[0]}",
            "check the name; for a gated model accept its terms on the hub and set HF_TOKEN",
        ) from None


def check_same_tokens(teacher: Any, tokenizer: Any, name: str) -> None:
    """Check that two tokenizers have the same tokens under the same ids, so that logits can be compared.

    Raises:
        InputError: with the first that differs.
    """
    theirs, ours = teacher.get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return
    odd = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    raise InputError(
        f"the teacher {name} has other tokens than the base model, {len(odd):,} of them: {odd[0]!r} is "
        f"{theirs.get(odd[0])} there and {ours.get(odd[0])} here",
        "distill its answers instead (finetune.distill: answers), or choose a teacher of the same family",
    )


def describe_teacher(folder: Path) -> dict[str, str]:
    """Return the hash of each file that decides what a teacher answers."""
    files = [*folder.glob("*.json"), *list_weight_files(folder), *folder.glob("*.jinja")]
    return {path.name: hash_file(path) for path in sorted(files)}
