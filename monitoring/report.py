"""Evidently's report on a window next to its reference, one HTML page per window.

Evidently draws and does not decide: its own tests raise an alarm in most checks of unchanged traffic once
there are this many columns. A "statistical test" of our own gives it the effects and decisions of our
verdict; its other tests stay off.

In: feature tables (`monitoring.traffic.columns`) and a verdict. Out:
`reports/watch/<window>/report.html` and a run of the project "perennial" in the workspace
`.perennial/evidently`.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from monitoring.report_texts import close_page, escape_texts
from monitoring.verdicts import ColumnChange, DriftVerdict
from stages.common.artifacts import atomic_write
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from evidently.core.report import Snapshot

# Evidently's figures of 5,000 rows a side take a second, and more rows show no more on a page.
MAX_ROWS = 5000
METHOD = "perennial_effect"
# Any one column decides for us; Evidently's "dataset drift" wants a share of them. One value for all
# reports, because a figure with other parameters is another line on the dashboard.
ANY_COLUMN = 0.001

logger = logging.getLogger("monitoring.report")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample of one side by whole sessions, and statistics of all its rows.

    Attributes:
        frame: one line a row drawn: numbers, flags and categories as they are, vectors still as vectors.
        rows, sessions: of the whole side.
        means: of each flag over the whole side, nulls excluded.
    """

    frame: pa.Table
    rows: int
    means: dict[str, float]


def draw(tables: Iterable[pa.Table], max_rows: int = MAX_ROWS) -> Drawn:
    """Sample at most `max_rows` rows by whole sessions, deterministically.

    The sessions with the smallest hashes are kept, so one pass is enough and memory stays flat. A single
    session with more rows than that is cut.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kept: dict[int, list[pa.Table]] = {}
    largest: list[int] = []  # the hashes that are kept, negated: a heap with the largest on top
    held, rows = 0, 0
    bound = math.inf
    schema: pa.Schema | None = None
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for table in tables:
        schema = schema or table.schema
        rows += table.num_rows
        for name in table.column_names:
            if name != "received_at" and pa.types.is_float64(table.schema.field(name).type):
                sums[name] = sums.get(name, 0.0) + float(pc.sum(table[name]).as_py() or 0.0)
                counts[name] = counts.get(name, 0) + table.num_rows - table[name].null_count
        sessions = table["session"].combine_chunks()
        order = pc.sort_indices(sessions)
        for session, where in _runs(sessions.take(order), order):
            number = _hash(session)
            if number > bound:
                continue
            if number not in kept:
                heapq.heappush(largest, -number)
            part = table.take(where).slice(0, max_rows)
            kept.setdefault(number, []).append(part)
            held += part.num_rows
            while held > max_rows and len(kept) > 1:
                bound = -heapq.heappop(largest)
                held -= sum(gone.num_rows for gone in kept.pop(int(bound)))
                bound -= 1
    if schema is None:
        raise InputError("there are no rows to report on", "wait for traffic")
    parts = [part for number in sorted(kept) for part in kept[number]]
    frame = pa.concat_tables(parts) if parts else schema.empty_table()
    means = {name: sums[name] / counts[name] for name in sums if counts[name]}
    return Drawn(frame.slice(0, max_rows), rows, means)


def _runs(sessions: pa.Array, order: pa.Array) -> Iterable[tuple[str, pa.Array]]:
    """Yield each session of a sorted column with the places of its rows."""
    encoded = sessions.dictionary_encode()
    codes = encoded.indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(codes)], strict=True):
        yield encoded.dictionary[int(codes[start])].as_py(), order.slice(int(start), int(end - start))


def _hash(session: str) -> int:
    return int.from_bytes(hashlib.blake2b(session.encode(), digest_size=6).digest(), "big")


def make_report(
    reference: Iterable[pa.Table], window: Iterable[pa.Table], verdict: DriftVerdict, max_rows: int = MAX_ROWS
) -> Snapshot:
    """Return Evidently's report on a window: our verdict first, then every column next to its reference.

    Args:
        reference, window: feature tables, read once.
        verdict: its columns are the ones that are shown; one that was not judged shows figures alone.

    Raises:
        InputError: a side has no rows, or Evidently is not installed.
    """
    set_quiet_environment()
    try:
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset
    except ImportError:
        raise InputError("Evidently is not installed", "pip install '.[monitor]'") from None
    before, now = draw(reference, max_rows), draw(window, max_rows)
    verdict, frames = escape_texts(verdict, [before.frame, now.frame])
    before, now = replace(before, frame=frames[0]), replace(now, frame=frames[1])
    changes = {
        change.column: change
        for one in verdict.drift_types
        for change in one.columns
        if {change.column} <= {*before.frame.column_names} & {*now.frame.column_names}
    }
    centre = {
        name: _centre(before.frame, name) for name, change in changes.items() if change.kind == "vector"
    }
    tables = [_frame(drawn.frame, changes, centre) for drawn in (now, before)]
    empty = [name for name in changes if any(frame[name].notna().sum() == 0 for frame in tables)]
    shown = {name: change.kind for name, change in changes.items() if name not in empty}
    definition = DataDefinition(
        numerical_columns=[name for name, kind in shown.items() if kind != "category"],
        categorical_columns=[name for name, kind in shown.items() if kind == "category"],
    )
    current, usual = (
        Dataset.from_pandas(frame[[*shown]].copy(), data_definition=definition) for frame in tables
    )
    _register(changes)
    preset = DataDriftPreset(drift_share=ANY_COLUMN, method=METHOD, include_tests=False)
    report = Report(
        [_words(verdict, before, now, empty), *([preset] if shown else [])],
        include_tests=False,
    )
    snapshot: Snapshot = report.run(
        current,
        usual,
        name=verdict.id,
        timestamp=datetime.fromtimestamp(verdict.window.end, UTC).replace(tzinfo=None),
    )
    _add_figures(snapshot, verdict, now)
    return snapshot


def write_report(
    reference: Iterable[pa.Table],
    window: Iterable[pa.Table],
    verdict: DriftVerdict,
    path: Path,
    max_rows: int = MAX_ROWS,
) -> Snapshot:
    """Write the report as one self-contained page; return it for `add_to_workspace`.

    Raises:
        InputError: as `make_report`.
    """
    snapshot = make_report(reference, window, verdict, max_rows)
    with atomic_write(path) as temporary:
        snapshot.save_html(str(temporary))
        temporary.write_text(close_page(temporary.read_text(encoding="utf-8")), encoding="utf-8")
    return snapshot


def _centre(table: pa.Table, name: str) -> NDArray[np.float64]:
    vectors, _ = _vectors(table, name)
    middle = vectors.mean(axis=0) if len(vectors) else np.zeros(vectors.shape[1])
    return np.asarray(middle / max(float(np.linalg.norm(middle)), 1e-12), dtype=np.float64)


def _vectors(table: pa.Table, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the vectors that are not null, shape (values, size), and their rows."""
    column = table[name].combine_chunks()
    there = np.asarray(column.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)
    flat = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, column.type.list_size).astype(np.float64), there


def _frame(
    table: pa.Table, changes: dict[str, ColumnChange], centre: dict[str, NDArray[np.float64]]
) -> pd.DataFrame:
    """Return the columns of the verdict; a vector as its cosine to the middle of the reference's vectors."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in changes:
        if name in centre:
            vectors, there = _vectors(table, name)
            cosine = np.full(len(there), np.nan)
            norms = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12) if len(vectors) else np.ones(0)
            cosine[there] = vectors @ centre[name] / norms if len(vectors) else 0.0
            columns[name] = cosine
        else:
            columns[name] = table[name].to_pandas()
    return pd.DataFrame(columns)


def _register(changes: dict[str, ColumnChange]) -> None:
    """Register an Evidently "test" that returns our effects and decisions."""
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    def verdict_of(
        reference: pd.Series[Any], _current: pd.Series[Any], _kind: Any, _threshold: float
    ) -> tuple[float, bool]:
        change = changes[str(reference.name)]
        return change.effect, change.drifted

    kinds = [ColumnType.Numerical, ColumnType.Categorical]
    register_stattest(StatTest(METHOD, "effect (0 to 1), by Perennial's verdict", kinds), verdict_of)


def _words(verdict: DriftVerdict, before: Drawn, now: Drawn, empty: Sequence[str]) -> Any:
    """Return the widgets above Evidently's plots: the verdict as a sentence and a table."""
    from evidently.core.container import MetricContainer
    from evidently.legacy.renderers.html_widgets import CounterData, counter, table_data, text_widget

    drawn = "; ".join(
        f"{side}: {part.frame.num_rows:,} of {part.rows:,} rows drawn, whole sessions"
        if part.frame.num_rows < part.rows
        else f"{side}: all {part.rows:,} rows"
        for side, part in (("window", now), ("reference", before))
    )
    notes = [
        drawn,
        "The verdict is Perennial's and counts every row. Evidently draws the pictures; its score is the "
        "effect of a column (0: unchanged, 1: nothing in common), and whether a column drifted is decided "
        "by the verdict's p-value and effect together.",
        "A vector is drawn as its cosine to the middle of the reference's vectors.",
    ]
    if empty:
        notes.append(f"Not drawn, because one side has no value: {', '.join(empty)}.")

    class VerdictInWords(MetricContainer):  # type: ignore[misc]
        """Widgets without a metric of their own: a stored run never names this class."""

        def generate_metrics(self, context: Any) -> Sequence[Any]:
            return []

        def render(self, context: Any, child_widgets: Any = None) -> list[Any]:
            return [
                counter(counters=[CounterData(verdict.summary, f"Window {verdict.id} of {verdict.tag}")]),
                *([table_data(column_names=_HEADER, data=_lines(verdict))] if verdict.drift_types else []),
                text_widget(text="\n\n".join(notes)),
            ]

    return VerdictInWords()


_HEADER = ("DriftType", "Column", "Drifted", "Effect", "p", "Inflation", "Reference", "Window")


def _lines(verdict: DriftVerdict) -> list[tuple[str, ...]]:
    return [
        (
            one.drift_type,
            change.column,
            "yes" if change.drifted else "no",
            f"{change.effect:.3f}",
            f"{change.p_value:.4f}",
            f"{change.inflation:.2f}",
            change.before,
            change.after,
        )
        for one in verdict.drift_types
        for change in one.columns
    ]


def _add_figures(snapshot: Snapshot, verdict: DriftVerdict, now: Drawn) -> None:
    """Add metrics of the whole window to the run, for the dashboard's lines.

    They use the names of Evidently's own metrics, because a stored run can hold no other kinds.
    """
    from evidently.metrics import MeanValue, QuantileValue, RowCount

    figures: list[tuple[Any, float | None]] = [
        (RowCount(), float(verdict.window.rows)),
        (MeanValue(column="valid_output"), now.means.get("valid_output")),
        (MeanValue(column="thumb"), now.means.get("thumb")),
        (MeanValue(column="corrected"), now.means.get("corrected")),
        (MeanValue(column="failed"), now.means.get("failed")),
        (QuantileValue(column="total_s", quantile=0.95), verdict.service.get("total_p95_s")),
    ]
    for metric, value in figures:
        if value is None or not math.isfinite(value):
            continue
        calculation = metric.to_calculation()
        result = calculation.result(value)
        result.set_metric_location(calculation.to_metric_config())
        snapshot.metric_results[calculation.id] = result
        snapshot._top_level_metrics.append(calculation.id)
