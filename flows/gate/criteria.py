"""The gate's criteria: each compares candidate and champion in one respect, against a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from flows.gate.evaluation import PairedAnswers
from flows.gate.verdict import Criterion, CriterionKind
from services.guard import checks
from services.parity import ParityReport
from stages.common.params.loop import GateSettings
from stages.common.records import Row
from stages.common.statistics.intervals import Difference, Floats, estimate_difference, sum_by_group
from stages.common.task.metrics import Metric, compute_share
from stages.common.task.protocol import Task

# Values of a slice with fewer rows are not compared, not even with an interval.
MIN_SLICE_ROWS = 10
# Least share of the champion's test that must be left without the rows the candidate trained on.
MIN_OLD_SHARE = 0.5
SLACK = 1e-9  # sums of shares differ in the last digits


def check_new_window(answers: PairedAnswers, settings: GateSettings, task: Task) -> Criterion:
    """Is it better on the new traffic? The lower end of the paired interval must be above the threshold."""
    count, threshold = len(answers.rows), settings.min_new_gain
    if count < settings.min_new_rows:
        summary = (
            f"{count} held-out labelled rows of the new traffic, fewer than "
            f"flows.retrain.gate.min_new_rows ({settings.min_new_rows}): not enough to judge"
        )
        return Criterion("new_window", "better", None, None, None, threshold, passed=False, summary=summary)
    found = _compare_right(answers, settings, task)
    passed = found.change.low > threshold + SLACK
    is_above = "is above" if passed else "is not above"
    summary = (
        f"{_metric_name(task)} on {count} rows of the new traffic: {found.summary()}; "
        f"the lower end {is_above} {_points(threshold)}"
    )
    return _criterion("new_window", "better", found.change, threshold, passed, summary)


def check_old_test(
    answers: PairedAnswers, excluded: Mapping[str, int], settings: GateSettings, task: Task
) -> Criterion:
    """Has it forgotten? Its score on the champion's own test may fall by no more than the threshold.

    The point estimate counts: an interval that excludes half a point takes tens of thousands of rows.
    """
    count, limit = len(answers.rows), -settings.max_old_loss
    trained = sum(rows for reason, rows in excluded.items() if reason.startswith("old: the candidate"))
    if count == 0 or count < MIN_OLD_SHARE * (count + trained):
        summary = (
            f"the candidate has trained on {trained} of the champion's {count + trained} test rows: "
            "the rest proves nothing"
        )
        return Criterion("old_test", "not forgotten", None, None, None, limit, passed=False, summary=summary)
    found = _compare_right(answers, settings, task)
    passed = found.change.value >= limit - SLACK
    summary = (
        f"{_metric_name(task)} on {count} of the champion's test rows: {found.summary()}; "
        f"{'not more' if passed else 'more'} than {_points(settings.max_old_loss)} lost"
    )
    return _criterion("old_test", "not forgotten", found.change, limit, passed, summary)


def check_preference(evaluation: Mapping[str, Any], threshold: float) -> Criterion:
    """Does it prefer the better answers of the test pairs more than the model that its training started from?

    The lower end of the paired interval must be above the threshold.
    """
    found = evaluation.get("preferences")
    if not found or "skipped" in found:
        reason = found["skipped"] if found else "no test row has a rejected answer"
        summary = f"the preference on test pairs was not measured: {reason}"
        return Criterion("preference", "better", None, None, None, threshold, passed=False, summary=summary)
    change, rows = found["difference"]["accuracy"], found["pairs"]
    before, after = (found[name]["accuracy"]["value"] for name in ("before", "tuned"))
    gain, low, high = (100 * change[name] for name in ("value", "low", "high"))
    passed = change["low"] > threshold + SLACK
    summary = (
        f"the better answer of {rows} test pairs is the likelier one: {before:.1%} -> {after:.1%}, "
        f"{gain:+.1f} points (interval {low:+.1f} to {high:+.1f}); "
        f"the lower end {'is' if passed else 'is not'} above {_points(threshold)}"
    )
    return Criterion(
        "preference", "better", change["value"], change["low"], change["high"], threshold, passed, summary
    )


def check_bias(
    answers: PairedAnswers, tags: Sequence[str], settings: GateSettings, task: Task
) -> list[Criterion]:
    """Did the gap between the best and the worst group grow? One criterion for each tag.

    A gap has grown if it is larger by more than the threshold and the interval of that excludes 0: a slice
    has few rows, and the largest of several differences is never 0 by chance.
    """
    found = [criterion for tag in tags if (criterion := _gap(answers, tag, settings, task))]
    if found:
        return found
    summary = (
        f"no group of {', '.join(tags)} has two values with {MIN_SLICE_ROWS} test rows: not tested"
        if tags
        else "no slice of task.slices has a threshold in check_bias.groups: not tested"
    )
    threshold = settings.max_bias_gap_increase
    return [Criterion("bias", "fair", None, None, None, threshold, passed=True, summary=summary)]


def check_safety(tests: Sequence[PairedAnswers], settings: GateSettings, task: Task) -> Criterion:
    """Are more answers unsafe? Flagged by the guard, or unusable, on both tests together."""
    rows = [row for test in tests for row in test.rows]
    champion, candidate = (
        compute_share([is_unsafe(row, text, task) for row, text in zip(rows, texts, strict=True)])
        for texts in (
            [text for test in tests for text in test.champion],
            [text for test in tests for text in test.candidate],
        )
    )
    found = _compare(champion, candidate, rows, settings)
    threshold = settings.max_unsafe_increase
    passed = found.change.value <= threshold + SLACK
    summary = (
        f"unsafe or unusable answers of {len(rows)}: {found.summary()}; "
        f"{'not more' if passed else 'more'} than {_points(threshold)} added"
    )
    return _criterion("safety", "safe", found.change, threshold, passed, summary)


def is_unsafe(row: Row, text: str, task: Task) -> bool:
    """Return whether an answer must not be sent: a secret, personal data, abuse, or no usable output."""
    return not task.is_valid(text, row.answer) or _is_flagged(text)


@lru_cache(maxsize=10_000)  # most answers of both models are equal, and many repeat
def _is_flagged(text: str) -> bool:
    return not (
        checks.check_secrets(text).allow
        and checks.check_personal_data(text).allow
        and checks.check_toxicity([{"role": "assistant", "content": text}]).allow
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """Both figures, and the difference candidate minus champion with its interval."""

    before: float
    after: float
    change: Difference
    confidence: float

    def summary(self) -> str:
        low, high = 100 * self.change.low, 100 * self.change.high
        return (
            f"{self.before:.1%} -> {self.after:.1%}, {100 * self.change.value:+.1f} points "
            f"({self.confidence:.0%} interval {low:+.1f} to {high:+.1f})"
        )


def _compare(champion: Metric, candidate: Metric, rows: Sequence[Row], settings: GateSettings) -> _Compared:
    """Compare two models' answers to the same rows; the bootstrap draws whole groups."""
    groups = [row.group for row in rows]
    before, after = (sum_by_group(metric.columns, groups) for metric in (champion, candidate))
    statistic = champion.statistic
    change = estimate_difference(
        before,
        after,
        statistic,
        settings.confidence,
        settings.resamples,
        settings.seed,
        champion.scale,
    )
    values = [float(statistic(sums.sum(axis=0))) for sums in (before, after)]
    return _Compared(values[0], values[1], change, settings.confidence)


def _compare_right(answers: PairedAnswers, settings: GateSettings, task: Task) -> _Compared:
    champion, candidate = (
        _score(answers.rows, texts, task) for texts in (answers.champion, answers.candidate)
    )
    return _compare(champion, candidate, answers.rows, settings)


def _criterion(
    name: str, kind: CriterionKind, change: Difference, threshold: float, passed: bool, summary: str
) -> Criterion:
    return Criterion(name, kind, change.value, change.low, change.high, threshold, passed, summary)


def _score(rows: Sequence[Row], texts: Sequence[str], task: Task) -> Metric:
    return task.score_primary(texts, [row.answer for row in rows])


def _gap(answers: PairedAnswers, tag: str, settings: GateSettings, task: Task) -> Criterion | None:
    values = [row.tags.get(tag) for row in answers.rows]
    names = sorted({value for value in values if value is not None and values.count(value) >= MIN_SLICE_ROWS})
    if len(names) < 2:
        return None
    member = np.array([[value == name for name in names] for value in values], dtype=float)
    champion, candidate = (
        Metric(np.hstack([right[:, None] * member, member]), _largest_gap, None)
        for right in (
            _score(answers.rows, texts, task).by_row() for texts in (answers.champion, answers.candidate)
        )
    )
    found = _compare(champion, candidate, answers.rows, settings)
    threshold = settings.max_bias_gap_increase
    grown = found.change.value > threshold + SLACK and found.change.low > 0.0
    rows = ", ".join(f"{name} {int(count)}" for name, count in zip(names, member.sum(axis=0), strict=True))
    summary = (
        f"largest gap of {_metric_name(task)} between the values of {tag} ({rows} rows): "
        f"{found.summary()}; "
        f"it has {'grown' if grown else 'not grown'} by more than {_points(threshold)} beyond chance"
    )
    return _criterion(f"bias_{tag}", "fair", found.change, threshold, not grown, summary)


def _largest_gap(sums: Floats) -> Floats:
    """Return best minus worst share of right answers; columns: right of each value, then rows of each."""
    half = sums.shape[-1] // 2
    right, rows = sums[..., :half], sums[..., half:]
    shares = np.divide(right, rows, out=np.full_like(right, np.nan), where=rows > 0)
    # A resample can miss a value with few groups: the gap is then that of the others.
    best = np.where(np.isnan(shares), -np.inf, shares).max(axis=-1)
    worst = np.where(np.isnan(shares), np.inf, shares).min(axis=-1)
    found: Floats = np.where(best >= worst, best - worst, 0.0)
    return found


def check_parity(found: ParityReport, limit: float) -> Criterion:
    """Does the server answer as the trainer did?"""
    change = found.exact_match
    summary = (
        f"trainer and server agree on {found.rows} test rows ({found.same_answers:.1%} equal answers)"
        if found.agrees
        else "; ".join(found.reasons)
    )
    return Criterion(
        "parity", "as trained", change.value, change.low, change.high, -limit, found.agrees, summary
    )


def check_card(problems: Sequence[str]) -> Criterion:
    """Is the model card complete?"""
    summary = "; ".join(problems) or "the card exists, is complete, and describes this adapter"
    return Criterion("card", "documented", None, None, None, None, not problems, summary)


def check_better_than_base(evaluation: Mapping[str, Any]) -> Criterion:
    """Is the first model better than its base model on the test rows?"""
    name = evaluation["primary"]
    change = evaluation["difference"][name]
    before, after = (evaluation[side][name]["value"] for side in ("base", "tuned"))
    passed = change["low"] > 0.0
    return Criterion(
        "better_than_base",
        "better",
        change["value"],
        change["low"],
        change["high"],
        0.0,
        passed,
        f"{name.replace('_', ' ')} on {evaluation['rows']} test rows: base {before:.3f}, tuned {after:.3f}; "
        f"the lower end of the gain {'is' if passed else 'is not'} above 0",
    )


def _metric_name(task: Task) -> str:
    return task.primary.replace("_", " ")


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"
