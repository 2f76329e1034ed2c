"""Read the evidence: the metrics of every stage, the rows of the split, the adapter, the code's revision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, reports
from stages.common.errors import InputError
from stages.common.model.adapter import PEFT, find_files, read_settings
from stages.common.records import Row, read_rows
from stages.common.repository.git import read_git

BEFORE = (
    *("fetch_base", "collect", "curate", "validate", "check_bias", "split"),
    *("finetune", "compress", "evaluate"),
)

SECTIONS = ("task", *BEFORE)  # of params.yaml

SIDES = ("train", "validation", "test")

CODE = ("stages", "dvc.yaml", "params.yaml", "pyproject.toml", "requirements.lock")

Evidence = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Revision:
    """The git commit of the code, and the files of the code that differ from it."""

    commit: str | None
    changed: tuple[str, ...] = ()


def read_evidence() -> tuple[Evidence, list[str]]:
    """Return the metrics of every stage, and a problem for each report that is missing or unreadable."""
    evidence: Evidence = {}
    problems = []
    for stage in BEFORE:
        path = reports(stage) / "metrics.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            problems.append(f"{path} does not exist (dvc repro {stage})")
            continue
        except ValueError as error:
            problems.append(f"{path} is not JSON: {error}")
            continue
        evidence[stage] = found
    return evidence, problems


def find_metric(evidence: Evidence, name: str) -> Any:
    """Return the metric of that dotted name, or None; `*` is the sum over all keys."""
    found: Any = evidence
    for key in name.split("."):
        if key == "*":
            return sum(found.values()) if isinstance(found, dict) else None
        found = found.get(key) if isinstance(found, dict) else None
    return found


def read_sides() -> tuple[dict[str, Sequence[Row]], list[str]]:
    """Return the rows of each side of the split, and a problem for each file that cannot be read."""
    sides: dict[str, Sequence[Row]] = {}
    problems = []
    for side in SIDES:
        try:
            sides[side] = read_rows(artifacts("split") / f"{side}.parquet")
        except InputError as error:
            problems.append(error.what)
    return sides, problems


def read_adapter() -> tuple[dict[str, Any], list[str]]:
    """Return the settings of the adapter and its base model, and the problem if they cannot be read."""
    folder = artifacts("finetune")
    path = folder / (find_files(folder) or PEFT).config
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {"base": config.get("base_model_name_or_path"), **read_settings(folder)}, []
    except FileNotFoundError:
        return {}, [f"{path} does not exist (dvc repro finetune)"]
    except ValueError as error:
        return {}, [f"{path} is not JSON: {error}"]


def list_plots(evidence: Evidence) -> dict[str, Path]:
    """Return the plots of the card, by their file names in its folder."""
    found = {
        "comparison.svg": reports("evaluate") / "plots" / "comparison.svg",
        "slices.svg": reports("evaluate") / "plots" / "slices.svg",
        "loss.svg": reports("finetune") / "loss.svg",
        "groups.svg": reports("check_bias") / "groups.svg",
    }
    if evidence.get("evaluate", {}).get("class_name"):
        found["confusion.svg"] = reports("evaluate") / "plots" / "confusion.svg"
    if evidence.get("evaluate", {}).get("calibration"):
        found["calibration.svg"] = reports("evaluate") / "plots" / "calibration.svg"
    return found


def read_revision() -> Revision:
    """Return the git commit of the code, and which of its files differ from it."""
    commit = read_git(Path(), "rev-parse", "HEAD")
    if commit is None:
        return Revision(None)
    status = read_git(Path(), "status", "--porcelain", "--untracked-files=all", "--", *CODE) or ""
    return Revision(commit, tuple(sorted(line[3:].strip('"') for line in status.splitlines())))
