"""Judge production: compare every closed window since the last run with the champion's reference traffic.

In: the event store. Out: a verdict per window, with Evidently's report and the quarantined events, under
`reports/watch/<window>/`. The caller decides what follows.

A closed window is passed in any case. Its verdict is written first; what follows (the report, the run in
Evidently's workspace) fails alone, and the verdict records it. Only a store or a package that is not there
raises.
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
from monitoring.drift.power import explain_too_few_sessions
from monitoring.drift.session_sums import sum_sessions
from monitoring.report import write_report
from monitoring.traffic.columns import DECIDING, Column
from monitoring.traffic.features import compute_feature_tables, list_watched_columns
from monitoring.traffic.service_metrics import ServiceSums, tap_service_sums
from monitoring.traffic.sessions import count_session_turns
from monitoring.traffic.windows import (
    QuarantinedEvent,
    Window,
    count_late_rows,
    find_closed_windows,
    find_reference_window,
    quarantine_to,
    read_window,
)
from monitoring.verdicts import (
    NOT_DECIDED,
    DriftVerdict,
    Period,
    TriggerDecision,
    get_window_folder,
    move_broken_verdicts,
    read_verdicts,
    write_verdict,
)
from monitoring.workspace import add_to_workspace
from stages.common.errors import InputError
from stages.common.params.loop import Monitoring
from stages.common.tag import Tag

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("monitoring.watching")

MAX_ERROR_CHARS = 300
SESSIONS_A_BLOCK = 4  # whose turns are counted: more than the sums by session keep
RECOUNTED = 20  # of the last windows, looked at again for late events

Decide = Callable[[Sequence[DriftVerdict]], TriggerDecision]


@dataclass(frozen=True, slots=True)
class ReferenceTraffic:
    """The champion's reference traffic, prepared for comparison.

    Attributes:
        tag: NAME:VERSION of the champion.
        columns: what is looked at.
        baseline: its sums, by session; or why no window can be compared with it.
    """

    tag: str
    window: Window
    columns: tuple[Column, ...]
    baseline: Baseline | str


def read_reference(url: str, tag: str, settings: Monitoring, now: float) -> ReferenceTraffic | None:
    """Return the champion's reference traffic until `now` (unix s), or None while there is too little of it.

    Raises:
        InputError: the store cannot be read, or a package is not installed.
    """
    window = find_reference_window(url, tag, settings.reference, now)
    if window is None:
        return None
    columns: tuple[Column, ...] = ()
    try:
        batches = (page.batch for page in read_window(url, window, tag))
        columns = list_watched_columns(batches, settings.features)
        baseline: Baseline | str = prepare_baseline(
            lambda: _tables(url, window, tag, columns, settings),
            columns,
            settings.drift,
            settings.features.max_categories,
        )
    except InputError:
        raise
    except Exception as error:  # of any kind: it would end the watching until these events are pruned
        logger.warning("the reference traffic of %s cannot be used", tag, exc_info=error)
        baseline = (
            f"the first {window.rows} exchanges cannot be compared with: {describe_failure(error)}; "
            "set monitoring.reference.rows higher"
        )
    return ReferenceTraffic(tag, window, columns, baseline)


def judge_new_windows(
    root: Path,
    url: str,
    reference: ReferenceTraffic,
    settings: Monitoring,
    decide: Decide,
    *,
    now: float,
    limit: int,
) -> Iterator[DriftVerdict]:
    """Judge the windows closed since the last run; write and yield the verdict on each.

    Windows that end after `now` do not count as judged: the clock was wrong when they were cut.

    Args:
        decide: whether a retraining is called for, given all verdicts on this champion, the newest last.
        now: unix s.
        limit: windows at most; the next look goes on.

    Raises:
        InputError: the store cannot be read, or a package is not installed.
    """
    move_broken_verdicts(root)
    known = [verdict for verdict in read_verdicts(root) if verdict.tag == reference.tag]
    known = [verdict for verdict in known if verdict.window.end <= now]
    _recount(root, url, reference.tag, known[-RECOUNTED:])
    after = max([reference.window.end, *(verdict.window.end for verdict in known)])
    for window in find_closed_windows(url, after, reference.tag, settings.window, now, limit):
        verdict = _write(root, _decide(judge(root, url, reference, window, settings, now), known, decide))
        if verdict.judged and (problems := _draw(root, url, reference, window, verdict, settings)):
            verdict = _write(root, replace(verdict, problems=(*verdict.problems, *problems)))
        known.append(verdict)
        yield verdict


def _decide(verdict: DriftVerdict, known: Sequence[DriftVerdict], decide: Decide) -> DriftVerdict:
    """Return the verdict with the decision on a retraining; one that fails is a problem of the verdict."""
    try:
        return replace(verdict, trigger=decide([*known, verdict]))
    except Exception as error:
        logger.warning("%s: whether to retrain could not be decided", verdict.id, exc_info=error)
        why = f"whether to retrain could not be decided: {describe_failure(error)}"
        return replace(verdict, trigger=TriggerDecision(False, why, ()), problems=(*verdict.problems, why))


def _write(root: Path, verdict: DriftVerdict) -> DriftVerdict:
    """Write a verdict and return it; of one that cannot be written, that the window was not judged."""
    try:
        write_verdict(root, verdict)
    except ValueError as error:
        logger.warning("%s: the verdict cannot be written", verdict.id, exc_info=error)
        why = f"its verdict could not be written: {describe_failure(error)}"
        verdict = replace(
            verdict, judged=False, why_not=why, drifted=False, drift_types=(), service={}, trigger=NOT_DECIDED
        )
        write_verdict(root, verdict)
    return verdict


def _draw(
    root: Path,
    url: str,
    reference: ReferenceTraffic,
    window: Window,
    verdict: DriftVerdict,
    settings: Monitoring,
) -> tuple[str, ...]:
    """Write the report on a window, and add it to the workspace; return what failed."""
    step = "the report could not be drawn"
    try:
        snapshot = write_report(
            _tables(url, reference.window, reference.tag, reference.columns, settings),
            _tables(url, window, reference.tag, reference.columns, settings),
            verdict,
            get_window_folder(root, verdict.id) / "report.html",
        )
        step = "the report could not be added to Evidently's workspace"
        add_to_workspace(root, verdict, snapshot)
    except Exception as error:
        logger.warning("%s: %s", verdict.id, step, exc_info=error)
        return (f"{step}: {describe_failure(error)}",)
    return ()


def describe_failure(error: Exception) -> str:
    """Return an error in one line of at most `MAX_ERROR_CHARS`, which can be written anywhere."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_ERROR_CHARS]
    return text.encode("utf-8", "replace").decode("utf-8")


def judge(
    root: Path, url: str, reference: ReferenceTraffic, window: Window, settings: Monitoring, now: float
) -> DriftVerdict:
    """Compare a window with the reference; write the quarantined events, return the verdict.

    Raises:
        InputError: the store cannot be read, or a package is not installed.
    """
    tag = Tag.parse(reference.tag)
    blank = DriftVerdict(
        id=window.name,
        model=tag.name,
        version=tag.version,
        made_at=now,
        window=Period(window.start, window.end, window.rows, 0),
        reference=None if isinstance(reference.baseline, str) else reference.baseline.period,
        judged=False,
        why_not=None,
        drifted=False,
        alpha=settings.drift.alpha,
    )
    if isinstance(reference.baseline, str):
        return replace(blank, why_not=reference.baseline)
    try:
        return _compare(root, url, reference, reference.baseline, window, settings, blank)
    except InputError as error:
        if not _alone_cannot_be_read(url, window, reference):
            raise
        logger.warning("%s: %s", window.name, error)
        why_not = f"its rows cannot be read: {describe_failure(error)}"
        return replace(blank, why_not=why_not, problems=(why_not,))
    except Exception as error:  # of any kind: the next window must be judged
        logger.warning("%s: the comparison failed", window.name, exc_info=error)
        why_not = f"the comparison failed: {describe_failure(error)}"
        return replace(blank, why_not=why_not, problems=(why_not,))


def _alone_cannot_be_read(url: str, window: Window, reference: ReferenceTraffic) -> bool:
    """Return whether the rows of a window cannot be read though the store can: those of the reference are."""
    return not _can_be_read(url, window, reference.tag) and _can_be_read(url, reference.window, reference.tag)


def _can_be_read(url: str, window: Window, tag: str) -> bool:
    try:
        for _ in read_window(url, window, tag):
            pass
    except InputError:
        return False
    return True


def _compare(
    root: Path,
    url: str,
    reference: ReferenceTraffic,
    baseline: Baseline,
    window: Window,
    settings: Monitoring,
    blank: DriftVerdict,
) -> DriftVerdict:
    """Return `blank` with what the comparison of the window with the reference found."""
    quarantined: Counter[str] = Counter()
    unreadable: list[QuarantinedEvent] = []
    service = ServiceSums()
    pages = read_window(url, window, reference.tag)
    path = get_window_folder(root, window.name) / "quarantined.jsonl"
    batches = quarantine_to(path, pages, quarantined, unreadable)
    tables = compute_feature_tables(
        batches,
        reference.columns,
        settings.features,
        session_turns=_count_turns(url, window, reference.tag, reference.columns, settings),
        unreadable=unreadable,
    )
    summed = sum_sessions(tap_service_sums(tables, service), baseline.binning)
    why_not = None
    if summed.rows < settings.window.min_rows:
        why_not = f"{summed.rows} rows; monitoring.window.min_rows is {settings.window.min_rows}"
    else:
        alpha = settings.drift.alpha / len(DECIDING)
        why_not = explain_too_few_sessions(summed.sessions, baseline.sums.sessions, alpha)
    drift_types = () if why_not else compare_window(baseline, summed, settings.drift)
    return replace(
        blank,
        window=replace(get_period(summed), start=window.start, end=window.end),
        judged=why_not is None,
        why_not=why_not,
        drifted=has_drifted(drift_types),
        drift_types=drift_types,
        quarantined=dict(quarantined),
        service=service.metrics(settings.features.cost_per_hour),
    )


def _tables(
    url: str, window: Window, tag: str, columns: Sequence[Column], settings: Monitoring
) -> Iterator[pa.Table]:
    batches = (page.batch for page in read_window(url, window, tag))
    turns = _count_turns(url, window, tag, columns, settings)
    return compute_feature_tables(batches, columns, settings.features, session_turns=turns)


def _count_turns(
    url: str, window: Window, tag: str, columns: Sequence[Column], settings: Monitoring
) -> dict[str, int]:
    """Return the turns of each session of a window; nothing is read where no column has them."""
    if "session_turns" not in {column.name for column in columns}:
        return {}
    batches = (page.batch for page in read_window(url, window, tag))
    return count_session_turns(batches, SESSIONS_A_BLOCK * settings.drift.blocks)


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
