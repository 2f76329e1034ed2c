"""Sources of rows: one module for each kind, all returning `Collected`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.common.records import Row


@dataclass(frozen=True, slots=True)
class Rejected:
    """An entry of a source that did not become a row.

    Attributes:
        file: the file that contains it; line: its line or row there, from 1, or None.
        reason: one word to count by; detail: what is wrong; content: the entry itself.
    """

    file: str
    line: int | None
    reason: str
    detail: str
    content: str


@dataclass(frozen=True, slots=True)
class Collected:
    """The rows of one source, the rejected entries, and metrics for the report."""

    rows: Sequence[Row]
    rejected: Sequence[Rejected] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
