"""A look at production: every closed window since the last look, compared with the champion's usual traffic.

Enters: the event store. Leaves: a verdict for each window, with Evidently's report and what was set aside,
under `reports/watch/<window>/`. What is to be done about it is decided by who calls this.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from monitoring.drift import compare
from monitoring.drift.session_sums import sketch
from monitoring.report import add_to_workspace, write_report
from monitoring.traffic.columns import Column
from monitoring.traffic.features import ServiceSums, counted_for_service, feature_tables, watched_columns
from monitoring.traffic.windows import (
    Window,
    closed_windows,
    late_rows,
    read_window,
    reference_window,
    set_aside_to,
)
from monitoring.verdicts import TriggerDecision, Verdict, folder, read_verdicts, write_verdict
from stages.common.params.loop import Monitoring

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("monitoring.watching")

RECOUNTED = 20  # of the last windows, looked at again for late events

Decide = Callable[[Sequence[Verdict]], TriggerDecision]


@dataclass(frozen=True, slots=True)
class Usual:
    """The champion's usual traffic, ready to be compared with.

    Attributes:
        tag: NAME:VERSION of the champion.
        columns: what is looked at.
        baseline: its sums, by session.
    """

    tag: str
    window: Window
    columns: tuple[Column, ...]
    baseline: compare.Baseline


def usual_traffic(url: str, tag: str, settings: Monitoring) -> Usual | None:
    """Return the champion's usual traffic, or None while it has answered too little.

    Raises:
        InputError: the store cannot be read.
    """
    window = reference_window(url, tag, settings.reference)
    if window is None:
        return None
    columns = watched_columns((page.batch for page in read_window(url, window, tag)), settings.features)
    baseline = compare.prepare(
        lambda: _tables(url, window, tag, columns, settings),
        columns,
        settings.drift,
        settings.features.max_categories,
    )
    return Usual(tag, window, columns, baseline)


def look(
    root: Path, url: str, usual: Usual, settings: Monitoring, decide: Decide, *, now: float, limit: int
) -> Iterator[Verdict]:
    """Judge the windows that have closed since the last look, and yield the verdict on each, written.

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
    for window in closed_windows(url, after, usual.tag, settings.window, now, limit):
        verdict = judge(root, url, usual, window, settings, now)
        verdict = replace(verdict, trigger=decide([*known, verdict]))
        if verdict.judged:
            snapshot = write_report(
                _tables(url, usual.window, usual.tag, usual.columns, settings),
                _tables(url, window, usual.tag, usual.columns, settings),
                verdict,
                folder(root, verdict.id) / "report.html",
            )
            add_to_workspace(root, verdict, snapshot)
        write_verdict(root, verdict)  # last: a window with a verdict is done
        known.append(verdict)
        yield verdict


def judge(root: Path, url: str, usual: Usual, window: Window, settings: Monitoring, now: float) -> Verdict:
    """Compare a window with the usual traffic; write what was set aside, return the verdict."""
    set_aside: Counter[str] = Counter()
    service = ServiceSums()
    pages = read_window(url, window, usual.tag)
    batches = set_aside_to(folder(root, window.name) / "set_aside.jsonl", pages, set_aside)
    tables = feature_tables(batches, usual.columns, settings.features)
    summed = sketch(counted_for_service(tables, service), usual.baseline.plan)
    why_not = None
    if summed.rows < settings.window.min_rows:
        why_not = f"{summed.rows} rows; monitoring.window.min_rows is {settings.window.min_rows}"
    questions = () if why_not else compare.compare(usual.baseline, summed, settings.drift)
    name, _, version = usual.tag.rpartition(":")
    return Verdict(
        id=window.name,
        model=name,
        version=version,
        made_at=now,
        window=replace(compare.period(summed), start=window.start, end=window.end),
        reference=usual.baseline.period,
        judged=why_not is None,
        why_not=why_not,
        drifted=compare.has_drifted(questions),
        questions=questions,
        set_aside=dict(set_aside),
        alpha=settings.drift.alpha,
        service=service.figures(settings.features.cost_per_hour),
    )


def _tables(
    url: str, window: Window, tag: str, columns: Sequence[Column], settings: Monitoring
) -> Iterator[pa.Table]:
    batches = (page.batch for page in read_window(url, window, tag))
    return feature_tables(batches, columns, settings.features)


def _recount(root: Path, url: str, tag: str, verdicts: Sequence[Verdict]) -> None:
    """Note in older verdicts what reached the store after they were made."""
    for verdict in verdicts:
        period = verdict.window
        counted = period.rows + sum(verdict.set_aside.values())
        window = Window(period.start, period.end, counted, verdict.id)
        late = late_rows(url, window, tag, counted)
        if late != verdict.late_rows:
            log.info("%s: %d events came late", verdict.id, late)
            write_verdict(root, replace(verdict, late_rows=late))
