"""Check the candidate's model card: it exists, describes this adapter, and is complete."""

from __future__ import annotations

from pathlib import Path

from stages.common.artifacts import artifacts, hash_file, read_json, reports
from stages.common.model.adapter import find_weights
from stages.common.model.exported import SERVING, find_exported
from stages.common.repository.dvc_lock import compute_dvc_hash

CARD = reports("model_card") / "README.md"
# Sections of the card that are written from evidence; none may be missing or empty.
CARD_SECTIONS = ("Use", "Results", "Limits", "Data", "Bias", "Training", "Lineage")


def find_card_problems(root: Path) -> list[str]:
    """Return the problems of the model card: missing, about another adapter, or incomplete."""
    path = root / CARD
    if not path.exists():
        return [f"{CARD} does not exist"]
    text = path.read_text(encoding="utf-8")
    adapter = root / artifacts("finetune")
    problems = []
    if compute_dvc_hash(adapter) not in text:
        problems.append(
            f"{CARD} does not contain the hash of {artifacts('finetune')}: it describes another adapter"
        )
    weights = find_weights(adapter)
    exported = read_json(find_exported(root) / SERVING).get("adapter_sha256")
    if not weights.exists() or hash_file(weights) != exported:
        problems.append(f"{artifacts('export')} was not made from the adapter in {artifacts('finetune')}")
    parts = _sections(text)
    problems += [f"{CARD} has no section {name}" for name in CARD_SECTIONS if name not in parts]
    problems += [f"section {name} of {CARD} is empty" for name in CARD_SECTIONS if parts.get(name) == ""]
    return problems


def _sections(text: str) -> dict[str, str]:
    """Return the text of each section with a heading of the second level."""
    parts = [part.partition("\n") for part in f"\n{text}".split("\n## ")[1:]]
    return {heading.strip(): body.strip() for heading, _, body in parts}
