"""The results of a sweep: a table, a CSV file, one picture, and what `perennial sweep --apply` applies."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.sweep.plot import plot_parallel
from flows.sweep.space import Values, encode_choice
from flows.sweep.study import State, TrialResult, find_best
from stages.common.artifacts import read_json, reports, write_json, write_text
from stages.common.errors import InputError
from stages.common.escaping import escape_csv_cell

if TYPE_CHECKING:
    from rich.table import Table

FOLDER = reports("sweep")
TRIALS, SUMMARY, PICTURE = FOLDER / "trials.csv", FOLDER / "sweep.json", FOLDER / "trials.svg"
ORDER: tuple[State, ...] = ("complete", "pruned", "failed")  # in which trials are shown
DIGITS = 4  # significant ones, in tables


@dataclass(frozen=True)
class SweepReport:
    """What is reported of a sweep.

    Attributes:
        study: its name.
        direction: of the metric: lower or higher is better.
    """

    study: str
    metric: str
    lower_is_better: bool
    results: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The best complete trial."""
        return find_best(self.results, self.lower_is_better)

    def count(self) -> str:
        """Return how many trials ended how, in words."""
        counts = {state: sum(one.state == state for one in self.results) for state in ORDER}
        found = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        return f"{len(self.results)} trial{'s' * (len(self.results) != 1)}: {found or 'none'}"


def write_report(root: Path, report: SweepReport) -> None:
    """Write the files of the report."""
    write_text(root / TRIALS, _make_csv(report))
    plot_parallel(report.results, report.metric, report.lower_is_better, root / PICTURE)
    best = report.best
    write_json(
        root / SUMMARY,
        {
            "study": report.study,
            "metric": report.metric,
            "direction": "lower is better" if report.lower_is_better else "higher is better",
            "trials": len(report.results),
            "best": None
            if best is None
            else {
                "trial": best.number,
                "value": best.value,
                "values": dict(best.values),
                "experiment": best.experiment,
            },
        },
    )


def read_best(root: Path) -> tuple[int, Values]:
    """Return the number and the values of the best trial of the last sweep.

    Raises:
        InputError: there is none.
    """
    if not (root / SUMMARY).exists():
        raise InputError(f"{SUMMARY} does not exist: there was no sweep", "run: perennial sweep")
    best = read_json(root / SUMMARY)["best"]
    if best is None:
        raise InputError("no trial of the last sweep is complete", "see reports/sweep/trials.csv")
    return best["trial"], best["values"]


def _make_csv(report: SweepReport) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list_keys(report.results)
    writer.writerow(["trial", "state", *keys, report.metric, "points", "seconds", "experiment", "message"])
    for one in report.results:
        values = [_format_cell(one.values[key]) for key in keys]
        value = "" if one.value is None else f"{one.value:.6f}"
        ends = [one.points, one.seconds, *map(escape_csv_cell, (one.experiment or "", one.message))]
        writer.writerow([one.number, one.state, *values, value, *ends])
    return text.getvalue()


def _format_cell(value: Any) -> str:
    return escape_csv_cell(value) if isinstance(value, str) else encode_choice(value)


def list_keys(results: Sequence[TrialResult]) -> list[str]:
    """Return the keys that were tried."""
    return list(results[0].values) if results else []


def format_exact(value: Any) -> str:
    """Return a value as it is in params.yaml."""
    return value if isinstance(value, str) else encode_choice(value)


def format_short(value: Any) -> str:
    """Return a value as a table has it."""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else format_exact(value)


def build_rows(report: SweepReport) -> list[dict[str, str]]:
    """Return the rows of the table, the best trial first, then by the metric; failed ones last."""
    sign = 1 if report.lower_is_better else -1
    ranked = sorted(
        report.results,
        key=lambda one: (ORDER.index(one.state), one.value is None, sign * (one.value or 0.0), one.number),
    )
    return [
        {
            "trial": str(one.number),
            **{key: format_short(value) for key, value in one.values.items()},
            report.metric: "" if one.value is None else format_short(one.value),
            "points": str(one.points),
            "s": f"{one.seconds:.0f}",
            "": _describe(one),
        }
        for one in ranked
    ]


def _describe(one: TrialResult) -> str:
    if one.state == "failed":
        return f"failed: {one.message.splitlines()[0]}" if one.message else "failed"
    return one.experiment or one.state


def build_terminal_table(report: SweepReport) -> Table:
    """Return the same rows for a terminal."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    rows = build_rows(report)
    for column in rows[0] if rows else ():
        shown.add_column(column.removeprefix("finetune."), overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row.values()))
    return shown
