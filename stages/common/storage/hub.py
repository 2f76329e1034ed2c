"""A model of the hub as a folder on this disk: what transformers reads of it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.model.loading import WEIGHTS, read_index

# Weights as safetensors only: a .bin is a pickle, which can run code when it is read.
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
