"""Decide whether drift starts a retraining: enough windows have drifted, and there are enough labels.

In: the verdicts on the champion's windows, and the state of retrainings. Out: a decision that lists
exactly what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from monitoring.verdicts import DriftVerdict, TriggerDecision
from stages.common.params.loop import TriggerSettings

__all__ = ["Readiness", "TriggerDecision", "decide", "find_drift_start"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a retraining needs besides drift.

    Attributes:
        labelled_rows: rows that it could learn from; excluded: why there are not more, in words.
        since_retraining_s: since the end of the last one, whatever came of it; None if there was none.
        running: one is under way.
        pinned: the champion is held by hand; a text is the reason.
    """

    labelled_rows: int
    since_retraining_s: float | None
    running: bool
    pinned: str | bool | None
    excluded: str = ""


def decide(
    verdicts: Sequence[DriftVerdict], readiness: Readiness, settings: TriggerSettings, now: float
) -> TriggerDecision:
    """Return whether a retraining starts.

    `drifted` of the last `of` windows must have drifted: a window that is unusual by chance (`drift.alpha`)
    is then followed by quiet ones, and two such in three come once in 1 / (3 alpha²) checks.

    Args:
        verdicts: on the windows of the champion that serves now, oldest first. Windows that were not judged
            neither count nor break a row of drifted ones.
        now: unix s.
    """
    recent = _recent(verdicts, settings)
    drifted = [verdict for verdict in recent if _counts(verdict, settings)]
    missing = settings.drifted - len(drifted)
    seen = (
        f"{len(drifted)} of the last {len(recent)} judged windows drifted in {_listed(settings.drift_types)}"
    )
    if missing > 0:
        # Nothing else matters yet: with labels, without a pin and at any time, quiet traffic is left alone.
        windows = "window" if missing == 1 else "windows"
        return TriggerDecision(False, seen, (f"{missing} more drifted {windows} of the next ones",))
    needs = []
    if readiness.labelled_rows < settings.min_labelled_rows:
        lacking = settings.min_labelled_rows - readiness.labelled_rows
        why = f" ({readiness.excluded})" if readiness.excluded else ""
        needs.append(f"{lacking:,} more labelled {'row' if lacking == 1 else 'rows'}{why}")
    if readiness.since_retraining_s is not None:
        left_s = settings.cooldown_hours * 3600.0 - readiness.since_retraining_s
        if left_s > 0:
            needs.append(f"cooldown until {_clock(now + left_s, now)}")
    if readiness.running:
        needs.append("the running retraining to end")
    if readiness.pinned:
        reason = f" ({readiness.pinned})" if isinstance(readiness.pinned, str) else ""
        needs.append(f"the champion to be unpinned{reason}: perennial release unpin")
    return TriggerDecision(not needs, seen, tuple(needs))


def find_drift_start(verdicts: Sequence[DriftVerdict], settings: TriggerSettings) -> float | None:
    """Return when the traffic that a retraining should learn began, unix s; None if no recent window drifted.

    That is the first of the drifted windows that lead up to now without a quiet one between them, or, where
    the recent ones are mixed, the oldest of those that drifted.
    """
    began = None
    for number, verdict in enumerate(reversed([verdict for verdict in verdicts if verdict.judged])):
        drifted = _counts(verdict, settings)
        if number >= settings.of and (began is None or not drifted):
            break
        if drifted:
            began = verdict.window.start
    return began


def _recent(verdicts: Sequence[DriftVerdict], settings: TriggerSettings) -> list[DriftVerdict]:
    return [verdict for verdict in verdicts if verdict.judged][-settings.of :]


def _counts(verdict: DriftVerdict, settings: TriggerSettings) -> bool:
    return any(each.drifted and each.drift_type in settings.drift_types for each in verdict.drift_types)


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _clock(unix_s: float, now: float) -> str:
    instant, today = datetime.fromtimestamp(unix_s, UTC), datetime.fromtimestamp(now, UTC)
    return instant.strftime("%H:%M UTC" if instant.date() == today.date() else "%Y-%m-%d %H:%M UTC")
