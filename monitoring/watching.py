"""Judge production: compare every closed window since the last run with the champion's reference traffic.

In: the event store. Out: a verdict per window, with Evidently's report and the quarantined events, under
`reports/watch/<window>/`. The caller decides what follows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from monitoring.drift.baseline import Baseline, get_period, prepare_baseline
from monitoring.drift.compare import compare_window, has_drifted
from monitoring.drift.session_sums import sum_sessions
from monitoring.report import write_report
from monitoring.traffic.columns import Column
from monitoring.traffic.features import compute_feature_tables, list_watched_columns
from monitoring.traffic.service_metrics import ServiceSums, tap_service_sums
from monitoring.traffic.windows import (
    Window,
    count_late_rows,
    find_closed_windows,
    find_reference_window,
    quarantine_to,
    read_window,
)
from monitoring.verdicts import DriftVerdict, TriggerDecision, get_window_folder, read_verdicts, write_verdict
from monitoring.workspace import add_to_workspace
from stages.common.params.loop import Monitoring

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("monitoring.watching")

RECOUNTED = 20  # of the last windows, looked at again for late events

Decide = Callable[[Sequence[DriftVerdict]], TriggerDecision]


@dataclass(frozen=True, slots=True)
class ReferenceTraffic:
    """The champion's reference traffic, prepared for comparison.

    Attributes:
        tag: NAME:VERSION of the champion.
        columns: what is looked at.
        baseline: its sums, by session.
    """

    tag: str
    window: Window
    columns: tuple[Column, ...]
    baseline: Baseline


def read_reference(url: str, tag: str, settings: Monitoring) -> ReferenceTraffic | None:
    """Return the champion's reference traffic, or None while there is too little of it.

    Raises:
        InputError: the store cannot be read.
    """
    window = find_reference_window(url, tag, settings.reference)
    if window is None:
        return None
    columns = list_watched_columns((page.batch for page in read_window(url, window, tag)), settings.features)
    baseline = prepare_baseline(
        lambda: _tables(url, window, tag, columns, settings),
        columns,
        settings.drift,
        settings.features.max_categories,
    )
    return ReferenceTraffic(tag, window, columns, baseline)


def judge_new_windows(
    root: Path,
    url: str,
    usual: ReferenceTraffic,
    settings: Monitoring,
    decide: Decide,
    *,
    now: float,
    limit: int,
) -> Iterator[DriftVerdict]:
    """Judge the windows closed since the last run; write and yield the verdict on each.

    Args:
        decide: whether a retraining is called for, given all verdicts on this champion, the newest last.
        now: unix s.
        limit: windows at most; the next look goes on.

    Raises:
        InputError: the store cannot be read, or a verdict cannot be written.
    """
    known = [verdict for verdict in read_verdicts(root) if verdict.tag == usual.tag]
    _recount(root, url, usual.tag, known[-RECOUNTED:])
    after = max([usual.window.end, *(verdict.window.end for verdict in known)])
    for window in find_closed_windows(url, after, usual.tag, settings.window, now, limit):
        verdict = judge(root, url, usual, window, settings, now)
        verdict = replace(verdict, trigger=decide([*known, verdict]))
        if verdict.judged:
            snapshot = write_report(
                _tables(url, usual.window, usual.tag, usual.columns, settings),
                _tables(url, window, usual.tag, usual.columns, settings),
                verdict,
                get_window_folder(root, verdict.id) / "report.html",
            )
            add_to_workspace(root, verdict, snapshot)
        write_verdict(root, verdict)  # last: a window with a verdict is done
        known.append(verdict)
        yield verdict


def judge(
    root: Path, url: str, usual: ReferenceTraffic, window: Window, settings: Monitoring, now: float
) -> DriftVerdict:
    """Compare a window with the reference; write the quarantined events, return the verdict."""
    quarantined: Counter[str] = Counter()
    service = ServiceSums()
    pages = read_window(url, window, usual.tag)
    batches = quarantine_to(get_window_folder(root, window.name) / "quarantined.jsonl", pages, quarantined)
    tables = compute_feature_tables(batches, usual.columns, settings.features)
    summed = sum_sessions(tap_service_sums(tables, service), usual.baseline.binning)
    why_not = None
    if summed.rows < settings.window.min_rows:
        why_not = f"{summed.rows} rows; monitoring.window.min_rows is {settings.window.min_rows}"
    drift_types = () if why_not else compare_window(usual.baseline, summed, settings.drift)
    name, _, version = usual.tag.rpartition(":")
    return DriftVerdict(
        id=window.name,
        model=name,
        version=version,
        made_at=now,
        window=replace(get_period(summed), start=window.start, end=window.end),
        reference=usual.baseline.period,
        judged=why_not is None,
        why_not=why_not,
        drifted=has_drifted(drift_types),
        drift_types=drift_types,
        quarantined=dict(quarantined),
        alpha=settings.drift.alpha,
        service=service.metrics(settings.features.cost_per_hour),
    )


def _tables(
    url: str, window: Window, tag: str, columns: Sequence[Column], settings: Monitoring
) -> Iterator[pa.Table]:
    batches = (page.batch for page in read_window(url, window, tag))
    return compute_feature_tables(batches, columns, settings.features)


def _recount(root: Path, url: str, tag: str, verdicts: Sequence[DriftVerdict]) -> None:
    """Record in older verdicts the events that arrived after they were made."""
    for verdict in verdicts:
        period = verdict.window
        counted = period.rows + sum(verdict.quarantined.values())
        window = Window(period.start, period.end, counted, verdict.id)
        late = count_late_rows(url, window, tag, counted)
        if late != verdict.late_rows:
            logger.info("%s: %d events came late", verdict.id, late)
            write_verdict(root, replace(verdict, late_rows=late))
