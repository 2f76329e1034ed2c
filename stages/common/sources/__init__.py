"""Where rows come from: one module a kind of source, all returning `Collected`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.common.records import Row


@dataclass(frozen=True, slots=True)
class Rejected:
    """One thing at the door that did not become a row.

    Attributes:
        file: the file it stood in; line: its line or row there, from 1, or None.
        reason: one word to count by; detail: what was seen; content: the thing itself.
    """

    file: str
    line: int | None
    reason: str
    detail: str
    content: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What one source gave: rows, what was turned away, and plain figures for the report."""

    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
