"""Count what collect and curate rejected, for errors about too few rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.common.artifacts import artifacts, read_json, reports

REJECTING = ("collect", "curate")  # the stages that reject rows, in their order


def read_rejected_counts() -> dict[str, dict[str, int]]:
    """Return how many rows collect and curate rejected, by stage and reason; only of those with a report."""
    return {stage: report["rejected_by_reason"] for stage, report in _read_reports().items()}


def describe_rejects() -> list[str]:
    """Return a line for each stage: rows left, reasons why others are not, and the file that has them."""
    lines = []
    for stage, report in _read_reports().items():
        left = report["rows"] if stage == "collect" else report["kept"]
        rejected = report["rejected"]
        line = f"{stage}: {left:,} of {left + rejected:,} rows left"
        if rejected:
            reasons = describe_counts(report["rejected_by_reason"])
            line += f"; rejected: {reasons} ({artifacts(stage) / 'rejects.jsonl'} has each with its reason)"
        lines.append(line)
    return lines


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts by reason, the most first."""
    most_first = sorted(((count, reason) for reason, count in counts.items() if count), reverse=True)
    return ", ".join(f"{count:,} {reason}" for count, reason in most_first)


def _read_reports() -> dict[str, Any]:
    paths = {stage: reports(stage) / "metrics.json" for stage in REJECTING}
    return {stage: read_json(path) for stage, path in paths.items() if path.exists()}
