"""An adapter as it travels: the text of its settings, and its tensors by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from stages.common.artifacts import atomic_write, write_text
from stages.common.errors import InputError
from stages.common.model.adapter import PEFT, REPLACED, find_files

Arrays = Mapping[str, Any]  # numpy arrays by the names of the tensors


@dataclass(frozen=True, slots=True)
class Adapter:
    """What `stages.finetune` writes, without the ids of the rows: they are hashes of what was learned.

    Attributes:
        settings: the text of its configuration file.
    """

    settings: str
    weights: Arrays


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter in a folder.

    Raises:
        InputError: there is none.
    """
    names = find_files(folder)
    if names is None:
        raise InputError(f"{folder} contains no adapter", "train one: python -m stages.finetune")
    return Adapter((folder / names.config).read_text(encoding="utf-8"), load_file(folder / names.weights))


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files of an adapter as `stages.finetune` does, the weights last."""
    names = PEFT if "peft_type" in json.loads(adapter.settings) else REPLACED
    write_text(folder / names.config, adapter.settings)
    with atomic_write(folder / names.weights) as temporary:
        save_file(dict(adapter.weights), temporary, metadata={"format": "pt"})
