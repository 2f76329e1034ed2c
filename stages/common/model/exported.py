"""The folder of a model as it is served: `artifacts/export`, or the smaller one that `compress` has chosen.

model.gguf        the merged model; missing with export.gguf: false
serving.json      what a server must know; `version` names the contents
Modelfile         for Ollama
and the tokenizer's files, draft_corpus.npz
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, hash_files, read_json, write_text
from stages.common.errors import InputError

GGUF = "model.gguf"
SERVING = "serving.json"
CHOSEN = artifacts("compress") / "chosen"
# What load_tokenizer reads, where a base model has it.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def find_exported(root: Path = Path()) -> Path:
    """Return the folder of the pipeline's newest model: what is evaluated, registered and served.

    Raises:
        InputError: the smaller model was made from another one than that in `artifacts/export`.
    """
    exported, chosen = root / artifacts("export"), root / CHOSEN
    if not (chosen / SERVING).exists():
        return exported
    made_from = read_json(chosen / SERVING)["compression"]["made_from"]
    version = read_json(exported / SERVING)["version"]
    if made_from != version:
        raise InputError(
            f"{CHOSEN} was made from version {made_from}, and {artifacts('export')} has {version}",
            "make it again: dvc repro compress",
        )
    return chosen


def find_tokenizer(root: Path = Path()) -> Path:
    """Return the folder with the tokenizer of the pipeline's newest model: its own, or the base model's.

    Raises:
        InputError: as `find_exported`.
    """
    exported = find_exported(root)
    return exported if exported == root / CHOSEN else root / artifacts("fetch_base")


def compute_version(folder: Path, base: Path, adapter: Path) -> str:
    """Return 12 hex digits that name what is served: the tokenizer, and the GGUF or base and adapter."""
    files = [path for path in sorted(folder.iterdir()) if path.name in (GGUF, *TOKENIZER_FILES)]
    if not (folder / GGUF).exists():
        files += [*sorted(base.glob("*.safetensors")), *sorted(adapter.iterdir())]
    return hash_files(files)[:12]


def write_serving(path: Path, serving: dict[str, Any]) -> None:
    """Write serving.json: its own keys sorted, the schema's in the order in which answers are written."""
    ordered = dict(sorted(serving.items()))
    write_text(path, json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
