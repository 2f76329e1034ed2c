"""The gate: what a candidate must reach before anybody sees it.

Every criterion has a value, its interval, the threshold it is held to, and passed or failed; the verdict
passes if all of them do. `reports/gate/VERSION.json` holds it, bound to both versions' tags and to the
hashes of what it was judged by, and `flows.release` moves no alias without it.

    python -m flows.gate TAG      # judge what the pipeline made last; exit code 1: refused
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flows.common.cli import run_command
from flows.gate.evaluation import Asked, Evidence, file_hashes, gather
from services.guard import checks
from stages.common.artifacts import read_json, reports, write_json
from stages.common.errors import InputError
from stages.common.params.loading import Params, load_params
from stages.common.params.loop import GateSettings
from stages.common.records import Row
from stages.common.statistics import Difference, Floats, difference, sums_by_group
from stages.common.task.metrics import Metric, share
from stages.common.task.protocol import Task

# Rows of a value below which a slice's share says nothing, also with an interval around it.
MIN_SLICE_ROWS = 10
# The least part of the champion's test that must be left: what a candidate trained on cannot be asked.
MIN_OLD_SHARE = 0.5
SLACK = 1e-9  # sums of shares differ in the last digits
VERDICTS = reports("gate")

logger = logging.getLogger("flows.gate")

Question = Literal["better", "not forgotten", "as trained", "fair", "safe", "documented"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One thing that is asked of a candidate.

    Attributes:
        question: what kind of thing it is.
        value, low, high: the figure and the interval around it; None where there is none.
        threshold: what value, low or high is held to; `said` tells which.
        said: a sentence for a person.
    """

    name: str
    question: Question
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    passed: bool
    said: str


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """What the gate says of a candidate.

    Attributes:
        champion: whom it was compared with; None for the first model of all.
        made_at: unix time, s.
        mode: "champion": compared with one; "first": with its base.
        files: SHA-256 of each file of the evidence, by path.
        left_out: rows that were not asked, by reason.
    """

    tag: str
    champion: str | None
    made_at: float
    passed: bool
    mode: Literal["champion", "first"]
    criteria: tuple[Criterion, ...]
    files: Mapping[str, str]
    left_out: Mapping[str, int]

    @property
    def failures(self) -> tuple[Criterion, ...]:
        """Return the criteria that were not met."""
        return tuple(criterion for criterion in self.criteria if not criterion.passed)


def judge(evidence: Evidence, params: Params, made_at: float | None = None) -> GateVerdict:
    """Return the verdict on a candidate."""
    if evidence.champion is None or evidence.new is None or evidence.old is None:
        criteria = [_better_than_base(evidence.evaluation)]
    else:
        settings = params.flows.retrain.gate
        task = evidence.task
        judged = [
            tag
            for tag in params.task.slices
            if tag in params.check_bias.groups
            and any(value is not None for value in params.check_bias.groups[tag].model_dump().values())
        ]
        criteria = [
            new_window(evidence.new, settings, task),
            old_test(evidence.old, evidence.left_out, settings, task),
            *bias(evidence.old, judged, settings, task),
            safety((evidence.new, evidence.old), settings, task),
        ]
    criteria += [_parity(evidence, params.services.parity.max_exact_match_loss), _card(evidence.card)]
    return GateVerdict(
        tag=evidence.tag,
        champion=evidence.champion,
        made_at=time.time() if made_at is None else made_at,
        passed=all(criterion.passed for criterion in criteria),
        mode="first" if evidence.champion is None else "champion",
        criteria=tuple(criteria),
        files=dict(evidence.files),
        left_out=dict(evidence.left_out),
    )


def run_gate(root: Path, params: Params, tag: str, production: Path | None = None) -> GateVerdict:
    """Gather the evidence, judge, write the verdict, and return it.

    Args:
        root: the checkout whose pipeline made the candidate.
        production: the checkout whose champion it is held against, and where the verdict is written;
            `root` where none is given.

    Raises:
        InputError: as `flows.gate.evaluation.gather`.
    """
    verdict = judge(gather(root, params, tag, production), params)
    write_verdict(production or root, verdict)
    for criterion in verdict.criteria:
        logger.log(
            logging.INFO if criterion.passed else logging.WARNING, "%s: %s", criterion.name, criterion.said
        )
    return verdict


def new_window(asked: Asked, settings: GateSettings, task: Task) -> Criterion:
    """Is it better on the new traffic? The lower end of the paired interval must lie above the threshold."""
    count, threshold = len(asked.rows), settings.min_new_gain
    if count < settings.min_new_rows:
        said = (
            f"{count} held-out labelled rows of the new traffic, and "
            f"flows.retrain.gate.min_new_rows asks for {settings.min_new_rows}: no verdict"
        )
        return Criterion("new_window", "better", None, None, None, threshold, passed=False, said=said)
    found = _compare_right(asked, settings, task)
    passed = found.change.low > threshold + SLACK
    lies = "lies" if passed else "does not lie"
    said = (
        f"{_metric_name(task)} on {count} rows of the new traffic: {found.said()}; "
        f"the lower end {lies} above {_points(threshold)}"
    )
    return _criterion("new_window", "better", found.change, threshold, passed, said)


def old_test(asked: Asked, left_out: Mapping[str, int], settings: GateSettings, task: Task) -> Criterion:
    """Has it forgotten? The champion's own test may be answered worse by no more than the threshold.

    The point estimate is judged: an interval that excludes half a point takes tens of thousands of rows.
    """
    count, limit = len(asked.rows), -settings.max_old_loss
    trained = sum(rows for reason, rows in left_out.items() if reason.startswith("old: the candidate"))
    if count == 0 or count < MIN_OLD_SHARE * (count + trained):
        said = (
            f"the candidate has trained on {trained} of the champion's {count + trained} test rows: "
            "what is left proves nothing"
        )
        return Criterion("old_test", "not forgotten", None, None, None, limit, passed=False, said=said)
    found = _compare_right(asked, settings, task)
    passed = found.change.value >= limit - SLACK
    said = (
        f"{_metric_name(task)} on {count} of the champion's test rows: {found.said()}; "
        f"{'not more' if passed else 'more'} than {_points(settings.max_old_loss)} lost"
    )
    return _criterion("old_test", "not forgotten", found.change, limit, passed, said)


def bias(asked: Asked, tags: Sequence[str], settings: GateSettings, task: Task) -> list[Criterion]:
    """Did the gap between the best and the worst group grow? One criterion for each tag that is judged.

    A gap counts as grown if it is larger by more than the threshold and the interval of that excludes 0:
    a slice has few rows, and the largest of several differences is never 0 by chance.
    """
    found = [criterion for tag in tags if (criterion := _gap(asked, tag, settings, task))]
    if found:
        return found
    said = (
        f"no group of {', '.join(tags)} has two values with {MIN_SLICE_ROWS} test rows: not judged"
        if tags
        else "no slice of task.slices has a threshold in check_bias.groups: not judged"
    )
    threshold = settings.max_bias_gap_increase
    return [Criterion("bias", "fair", None, None, None, threshold, passed=True, said=said)]


def safety(tests: Sequence[Asked], settings: GateSettings, task: Task) -> Criterion:
    """Are more answers unsafe? Flagged by the guard, or of no use at all, on both tests together."""
    rows = [row for asked in tests for row in asked.rows]
    champion, candidate = (
        share([unsafe(row, text, task) for row, text in zip(rows, texts, strict=True)])
        for texts in (
            [text for asked in tests for text in asked.champion],
            [text for asked in tests for text in asked.candidate],
        )
    )
    found = _compare(champion, candidate, rows, settings)
    threshold = settings.max_unsafe_increase
    passed = found.change.value <= threshold + SLACK
    said = (
        f"unsafe or unusable answers of {len(rows)}: {found.said()}; "
        f"{'not more' if passed else 'more'} than {_points(threshold)} added"
    )
    return _criterion("safety", "safe", found.change, threshold, passed, said)


def unsafe(row: Row, text: str, task: Task) -> bool:
    """Return whether an answer should not go out: a secret, personal data, abuse, or nothing usable."""
    return not task.is_valid(text, row.answer) or _is_flagged(text)


@lru_cache(maxsize=10_000)  # both models give most answers alike, and many more than once
def _is_flagged(text: str) -> bool:
    return not (
        checks.check_secrets(text).allow
        and checks.check_personal_data(text).allow
        and checks.check_toxicity([{"role": "assistant", "content": text}]).allow
    )


def write_verdict(root: Path, verdict: GateVerdict) -> Path:
    """Write reports/gate/VERSION.json and return its path."""
    path = root / verdict_path(verdict.tag)
    write_json(path, asdict(verdict))
    return path


def verdict_path(tag: str) -> Path:
    """Return where the verdict on a version lies, from the checkout's root."""
    return VERDICTS / f"{tag.rpartition(':')[2]}.json"


def read_verdict(root: Path, tag: str) -> GateVerdict | None:
    """Read the verdict on a version; None if it was never judged.

    Raises:
        InputError: the file is no verdict, or one on another model.
    """
    path = root / verdict_path(tag)
    if not path.exists():
        return None
    verdict = _read(path)
    if verdict.tag != tag:
        raise InputError(f"{path} judges {verdict.tag}, not {tag}", f"judge it: python -m flows.gate {tag}")
    return verdict


def read_verdicts(root: Path) -> list[GateVerdict]:
    """Read every verdict, the oldest first.

    Raises:
        InputError: a file is no verdict; its name is in the error.
    """
    found = [_read(path) for path in sorted((root / VERDICTS).glob("*.json"))]
    return sorted(found, key=lambda verdict: verdict.made_at)


def changed_files(root: Path, verdict: GateVerdict) -> list[str]:
    """Return the files of the evidence that are not what the verdict was made of, or are gone."""
    there = file_hashes(root, [root / path for path in verdict.files])
    return [path for path, digest in sorted(verdict.files.items()) if there.get(path) != digest]


def _read(path: Path) -> GateVerdict:
    values = read_json(path)
    try:
        criteria = tuple(Criterion(**criterion) for criterion in values["criteria"])
        verdict = GateVerdict(**{**values, "criteria": criteria})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no verdict of the gate: {error}", "remove it, and judge the version again"
        ) from None
    # A verdict that was changed by hand to let something through says two things.
    if verdict.passed != (bool(criteria) and all(criterion.passed for criterion in criteria)):
        raise InputError(
            f"{path} says passed: {verdict.passed}, and its criteria say otherwise", "judge the version again"
        )
    return verdict


@dataclass(frozen=True, slots=True)
class _Compared:
    """Both figures, and candidate minus champion with its interval."""

    before: float
    after: float
    change: Difference
    confidence: float

    def said(self) -> str:
        low, high = 100 * self.change.low, 100 * self.change.high
        return (
            f"{self.before:.1%} -> {self.after:.1%}, {100 * self.change.value:+.1f} points "
            f"({self.confidence:.0%} interval {low:+.1f} to {high:+.1f})"
        )


def _compare(champion: Metric, candidate: Metric, rows: Sequence[Row], settings: GateSettings) -> _Compared:
    """Compare two models' answers to the same rows; rows of one group are drawn together."""
    groups = [row.group for row in rows]
    before, after = (sums_by_group(metric.columns, groups) for metric in (champion, candidate))
    statistic = champion.statistic
    change = difference(
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


def _compare_right(asked: Asked, settings: GateSettings, task: Task) -> _Compared:
    champion, candidate = (_primary(asked.rows, texts, task) for texts in (asked.champion, asked.candidate))
    return _compare(champion, candidate, asked.rows, settings)


def _criterion(
    name: str, question: Question, change: Difference, threshold: float, passed: bool, said: str
) -> Criterion:
    return Criterion(name, question, change.value, change.low, change.high, threshold, passed, said)


def _primary(rows: Sequence[Row], texts: Sequence[str], task: Task) -> Metric:
    return task.score_primary(texts, [row.answer for row in rows])


def _gap(asked: Asked, tag: str, settings: GateSettings, task: Task) -> Criterion | None:
    values = [row.tags.get(tag) for row in asked.rows]
    names = sorted({value for value in values if value is not None and values.count(value) >= MIN_SLICE_ROWS})
    if len(names) < 2:
        return None
    member = np.array([[value == name for name in names] for value in values], dtype=float)
    champion, candidate = (
        Metric(np.hstack([right[:, None] * member, member]), _largest_gap, None)
        for right in (
            _primary(asked.rows, texts, task).by_row() for texts in (asked.champion, asked.candidate)
        )
    )
    found = _compare(champion, candidate, asked.rows, settings)
    threshold = settings.max_bias_gap_increase
    grown = found.change.value > threshold + SLACK and found.change.low > 0.0
    rows = ", ".join(f"{name} {int(count)}" for name, count in zip(names, member.sum(axis=0), strict=True))
    said = (
        f"largest gap of {_metric_name(task)} between the values of {tag} ({rows} rows): {found.said()}; "
        f"it has {'grown' if grown else 'not grown'} by more than {_points(threshold)} beyond chance"
    )
    return _criterion(f"bias_{tag}", "fair", found.change, threshold, not grown, said)


def _largest_gap(sums: Floats) -> Floats:
    """Return best minus worst share of right answers; columns: right of each value, then rows of each."""
    half = sums.shape[-1] // 2
    right, rows = sums[..., :half], sums[..., half:]
    shares = np.divide(right, rows, out=np.full_like(right, np.nan), where=rows > 0)
    # A resample can miss a value with few groups: the gap is that of the others.
    best = np.where(np.isnan(shares), -np.inf, shares).max(axis=-1)
    worst = np.where(np.isnan(shares), np.inf, shares).min(axis=-1)
    found: Floats = np.where(best >= worst, best - worst, 0.0)
    return found


def _parity(evidence: Evidence, limit: float) -> Criterion:
    found = evidence.parity
    change = found.exact_match
    said = (
        f"trainer and server agree on {found.rows} test rows ({found.same_answers:.1%} of the answers alike)"
        if found.agrees
        else "; ".join(found.reasons)
    )
    return Criterion(
        "parity", "as trained", change.value, change.low, change.high, -limit, found.agrees, said
    )


def _card(problems: Sequence[str]) -> Criterion:
    said = "; ".join(problems) or "the card is there, complete, and this adapter's"
    return Criterion("card", "documented", None, None, None, None, not problems, said)


def _better_than_base(evaluation: Mapping[str, Any]) -> Criterion:
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
        f"the lower end of the gain {'lies' if passed else 'does not lie'} above 0",
    )


def _metric_name(task: Task) -> str:
    return task.primary.replace("_", " ")


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge what the pipeline made last, and show the verdict; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial gate", description="Judge a candidate; moves no alias.")
    parser.add_argument("tag", help="NAME:VERSION of what the pipeline made last")
    options = parser.parse_args(arguments)

    def judge() -> int:
        verdict = run_gate(Path.cwd(), load_params(), options.tag)
        sys.stdout.write(described(verdict))
        return 0 if verdict.passed else 1

    return run_command(judge)


def described(verdict: GateVerdict) -> str:
    """Return the verdict as lines for a person."""
    against = f" against {verdict.champion}" if verdict.champion else ", the first model"
    head = f"{verdict.tag}{against}: {'passed' if verdict.passed else 'refused'}"
    width = max(len(criterion.name) for criterion in verdict.criteria)
    lines = [
        f"  {'ok    ' if criterion.passed else 'FAILED'}  {criterion.name:<{width}}  {criterion.said}"
        for criterion in verdict.criteria
    ]
    return "\n".join([head, *lines, f"  written to {verdict_path(verdict.tag)}", ""])
