"""The gate's verdict on a version: its criteria, and `reports/gate/VERSION.json`, where it is kept.

A verdict names both versions and the hashes of the evidence; `flows.release` checks them before it moves an
alias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from stages.common.artifacts import hash_file, read_json, reports, write_json
from stages.common.errors import InputError
from stages.common.tag import Tag

CriterionKind = Literal["better", "not forgotten", "as trained", "fair", "safe", "documented"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One requirement on a candidate.

    Attributes:
        value, low, high: the figure and its interval; None where there is none.
        threshold: the limit on value, low or high; `summary` names which.
        summary: one sentence with the figures.
    """

    name: str
    kind: CriterionKind
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    passed: bool
    summary: str


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """The gate's decision on a candidate.

    Attributes:
        champion: the version it was compared with; None for the first model.
        made_at: unix time, s.
        mode: "champion": compared with one; "first": compared with its base model.
        files: SHA-256 of each file of the evidence, by path from the checkout's root.
        excluded: test rows that were not used, by reason.
    """

    tag: str
    champion: str | None
    made_at: float
    passed: bool
    mode: Literal["champion", "first"]
    criteria: tuple[Criterion, ...]
    files: Mapping[str, str]
    excluded: Mapping[str, int]

    @property
    def failures(self) -> tuple[Criterion, ...]:
        """The criteria that were not met."""
        return tuple(criterion for criterion in self.criteria if not criterion.passed)


def write_verdict(root: Path, verdict: GateVerdict) -> Path:
    """Write reports/gate/VERSION.json; return its path."""
    path = root / Tag.parse(verdict.tag).report("gate")
    write_json(path, asdict(verdict))
    return path


def read_verdict(root: Path, tag: str) -> GateVerdict | None:
    """Read the verdict on a version; None if the gate has not judged it.

    Raises:
        InputError: the file is broken, was edited, or is about another model.
    """
    path = root / Tag.parse(tag).report("gate")
    if not path.exists():
        return None
    verdict = read_verdict_file(path)
    if verdict.tag != tag:
        raise InputError(
            f"{path} is the verdict on {verdict.tag}, not on {tag}", f"judge it: perennial gate {tag}"
        )
    return verdict


def find_changed_files(root: Path, verdict: GateVerdict) -> list[str]:
    """Return the files of the evidence that have changed since the verdict, or are missing."""
    present = hash_files(root, [root / path for path in verdict.files])
    return [path for path, digest in sorted(verdict.files.items()) if present.get(path) != digest]


def hash_files(root: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path from the root; folders are skipped."""
    return {path.relative_to(root).as_posix(): hash_file(path) for path in paths if path.is_file()}


def list_verdict_files(root: Path) -> list[Path]:
    """Return the files of all verdicts, one a version."""
    return sorted((root / reports("gate")).glob("*.json"))


def read_verdict_file(path: Path) -> GateVerdict:
    """Read one file of reports/gate.

    Raises:
        InputError: it is broken or was edited.
    """
    values = read_json(path)
    try:
        criteria = tuple(Criterion(**criterion) for criterion in values["criteria"])
        verdict = GateVerdict(**{**values, "criteria": criteria})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a valid verdict: {error}", "remove it and judge the version again"
        ) from None
    # A verdict that was edited to pass contradicts its criteria.
    if verdict.passed != (bool(criteria) and all(criterion.passed for criterion in criteria)):
        raise InputError(
            f"{path}: passed is {verdict.passed}, which contradicts its criteria", "judge the version again"
        )
    return verdict


def format_verdict(verdict: GateVerdict) -> str:
    """Return the verdict as text: a line for each criterion."""
    against = f" against {verdict.champion}" if verdict.champion else ", the first model"
    head = f"{verdict.tag}{against}: {'passed' if verdict.passed else 'rejected'}"
    width = max(len(criterion.name) for criterion in verdict.criteria)
    lines = [
        f"  {'ok    ' if criterion.passed else 'FAILED'}  {criterion.name:<{width}}  {criterion.summary}"
        for criterion in verdict.criteria
    ]
    return "\n".join([head, *lines, f"  written to {Tag.parse(verdict.tag).report('gate')}", ""])
