"""A model's answers to the test rows, and those of the base kept from one training to the next.

The base model does not change when an adapter is trained anew, and untuned it writes to the limit: asking it
takes longer than asking the tuned one. So its answers are kept in `checkpoints/evaluate`, under a hash of
everything they hang on, and a retraining that asks the same rows asks only the tuned model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.common import generation, models
from stages.common.artifacts import read_json, write_json
from stages.common.errors import InputError
from stages.common.generation import Answer, Question
from stages.common.records import canonical_json

KEPT = Path("checkpoints") / "evaluate"
NEWEST = 3  # files that stay: changed test rows often change back

logger = logging.getLogger("evaluate")


@dataclass(frozen=True, slots=True)
class Judged:
    """One model's answers to all rows, and what asking cost: seconds, and those of some asked alone."""

    answers: list[Answer]
    seconds: float
    latencies: list[float]


def fingerprint(base: Path, questions: Sequence[Question], **settings: Any) -> str:
    """Return a hash of all that a base model's answers hang on.

    Args:
        base: the model's folder; every file in it counts.
        questions: as token ids.
        settings: how they are asked; with the libraries, the threads and the code that asks.
    """
    import torch
    import transformers

    digest = hashlib.sha256()
    files = sorted(path for path in base.rglob("*") if path.is_file())
    for path in (*files, Path(generation.__file__), Path(models.__file__)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    machine = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    asked = [asdict(question) for question in questions]
    digest.update(canonical_json([settings, machine, asked]).encode())
    return digest.hexdigest()[:32]


def recall(name: str, folder: Path = KEPT) -> Judged | None:
    """Return what was kept under a fingerprint; None if nothing was, or nothing that can be read."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        kept = read_json(path)
        answers = [Answer(**answer) for answer in kept["answers"]]
        return Judged(answers, kept["seconds"], kept["latencies"])
    except (InputError, TypeError, KeyError) as error:
        logger.warning("%s is of no use, and the base model is asked again: %s", path, error)
        return None


def keep(name: str, judged: Judged, folder: Path = KEPT) -> None:
    """Keep a model's answers under a fingerprint; the oldest go. Losing them costs only time."""
    try:
        write_json(folder / f"{name}.json", asdict(judged))
        newest_first = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first[NEWEST:]:
            path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a full disk; a loss that is no number
        logger.warning("the base model's answers are not kept: %s", error)
