"""The files of a model that transformers reads: which these are in a folder, and how the hub gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Weights as safetensors only: a .bin is a pickle, which can run code when it is read.
WEIGHTS = "model.safetensors"  # of a model in one file
INDEX = "model.safetensors.index.json"  # or which file has which weight
FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def download_model(name: str, revision: str | None, others: Sequence[str] = (), **options: Any) -> Path:
    """Return the folder of a model on the hub, which is downloaded as far as the hub's cache lacks it.

    Some models have their weights a second time, in a file that transformers does not read.

    Args:
        others: patterns of further files.
        options: of `snapshot_download`.
    """
    from huggingface_hub import snapshot_download

    def download(revision: str | None, patterns: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"], **options
            )
        )

    folder = download(revision, [*FILES, *others, WEIGHTS])
    if not (folder / WEIGHTS).is_file():
        download(folder.name, read_index(folder) or ["*.safetensors"])
    return folder


def read_index(folder: Path) -> list[str]:
    """Return the names of the files that have the weights of a model; none where no index names them."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted({Path(name).name for name in index["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def list_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder that transformers reads.

    Others may have the same weights again, as the `consolidated.safetensors` of Mistral's models.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    named = [folder / name for name in read_index(folder)]
    return [path for path in named if path.is_file()] or sorted(folder.glob("*.safetensors"))
