"""Whether a window of traffic differs from the reference, by how much, and how sure that is.

In: feature tables of the reference and of a window (`monitoring.traffic.columns`). Out: for each question its
columns with effect and p-value. In a window of unchanged traffic any of the three deciding questions
drifts with a chance of at most `alpha`: sessions and not rows are shuffled, the largest statistic of a
question is compared with the largest of shuffled traffic, which keeps the correlation between columns
(Westfall & Young 1993, "Resampling-based multiple testing"), questions share alpha evenly (Bonferroni), and
what a quiet reference does by itself is taken off (`monitoring.drift.calibration`).

Effects are distances between 0 and 1, over all rows: of a number the largest difference between the shares
above any value (Kolmogorov-Smirnov), of a category the share that would have to change class (total
variation), of a flag the difference of the rates, of a vector 2 AUC - 1 along the direction in which the
two differ most (the witness function of Gretton et al. 2012), found in one half of the sessions and measured
in the other. What chance is expected to add is taken off. Each vector also gives a number, its novelty: a
few new things among many usual ones move no mean far, but they are far from everything usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from monitoring.drift.calibration import inflation
from monitoring.drift.session_sums import (
    OTHER,
    Bools,
    ColumnPlan,
    Floats,
    Plan,
    Singles,
    Sketch,
    features,
    plan,
    sketch,
)
from monitoring.drift.two_sample_tests import Sessions, chance_variance, random_splits, sessions, statistics
from monitoring.traffic.columns import DECIDING, Column, Question
from monitoring.verdicts import ColumnChange, Period, QuestionVerdict
from stages.common.params.loop import DriftSettings

if TYPE_CHECKING:
    import pyarrow as pa

# Fewer than this on either side, and a column is not judged.
MIN_VALUES = 20
MIN_SESSIONS = 10
# Most windows are quiet, and a few shuffles show it. Where the smallest p-value is above this, no more are
# made (sequential Monte Carlo p-values: Besag & Clifford 1991, Biometrika 78), and no calibration is needed:
# it only ever raises p-values.
FIRST_PERMUTATIONS = 500
PLAINLY_QUIET = 0.04
CHI_SQUARE_STEP = 1.8
TAIL = 0.9  # of the shuffled statistics; above it they are taken to fall off exponentially
NOUNS: dict[Question, str] = {
    "input": "questions",
    "output": "answers",
    "quality": "answers",
    "service": "requests",
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """The usual traffic, summed: what windows are compared with."""

    plan: Plan
    sketch: Sketch

    @property
    def period(self) -> Period:
        """Return from when to when the reference was, and how much it holds."""
        return period(self.sketch)


def period(summed: Sketch) -> Period:
    """Return from when to when some traffic was: first and last `received_at`, unix s."""
    return Period(summed.start, summed.end, summed.rows, summed.sessions)


def prepare(
    tables: Callable[[], Iterable[pa.Table]],
    columns: Sequence[Column],
    settings: DriftSettings,
    max_categories: int,
) -> Baseline:
    """Return the baseline of a reference.

    Args:
        tables: gives the reference's tables; called twice, once to find the bins, once to sum.

    Raises:
        InputError: the reference is empty.
    """
    summed_by = plan(tables(), columns, max_categories, settings.blocks, settings.seed)
    return Baseline(summed_by, sketch(tables(), summed_by))


def check(
    baseline: Baseline, tables: Iterable[pa.Table], settings: DriftSettings
) -> tuple[QuestionVerdict, ...]:
    """Return what changed in a window, question by question; `tables` are looked at once."""
    return compare(baseline, sketch(tables, baseline.plan), settings)


def compare(baseline: Baseline, window: Sketch, settings: DriftSettings) -> tuple[QuestionVerdict, ...]:
    """Return what changed in a window that is summed already."""
    columns = [each.column for each in baseline.plan.columns]
    p_values, factors, noise = _tested(baseline, window, settings)
    alpha = settings.alpha / len(DECIDING)
    questions = []
    for question in dict.fromkeys(column.question for column in columns):
        places = [place for place, column in enumerate(columns) if column.question == question]
        changes = sorted(
            (
                _change(
                    *(baseline, window, place, p_values[place], factors[place], noise[place]),
                    *(alpha, settings.min_effect),
                )
                for place in places
            ),
            key=lambda change: (not change.drifted, change.p_value, -change.effect),
        )
        questions.append(
            QuestionVerdict(
                question,
                any(change.drifted for change in changes),
                min(change.p_value for change in changes),
                tuple(changes),
            )
        )
    return tuple(questions)


def has_drifted(questions: Iterable[QuestionVerdict]) -> bool:
    """Return whether one of the questions that decide has drifted."""
    return any(each.drifted for each in questions if each.question in DECIDING)


def _tested(baseline: Baseline, window: Sketch, settings: DriftSettings) -> tuple[Floats, Floats, Floats]:
    """Return p-values, inflation factors and squares of the effects that chance makes: [C] each.

    A column that cannot be judged has p = 1.
    """
    reference, plan_ = baseline.sketch, baseline.plan
    size = len(plan_.columns)
    inside, outside = len(window.sums), len(reference.sums)
    judged = _enough(window) & _enough(reference)
    p_values, factors = np.ones(size), np.ones(size)
    if not judged.any():
        return p_values, factors, np.zeros(size)
    pool = sessions(plan_, reference, window)
    observed = np.arange(inside + outside)[None, :] >= outside
    seen = statistics(pool, observed)
    places_of = {
        question: places
        for question in dict.fromkeys(each.column.question for each in plan_.columns)
        if (
            places := [
                p for p, each in enumerate(plan_.columns) if each.column.question == question and judged[p]
            ]
        )
    }
    rng = np.random.default_rng([settings.seed, 1])
    first = min(FIRST_PERMUTATIONS, settings.permutations)
    shuffled = statistics(pool, random_splits(rng, inside + outside, inside, first))
    p_values = _p_values(seen, shuffled, places_of, pool.vector)
    if p_values.min() <= PLAINLY_QUIET:
        share = inside / outside
        usual = sessions(plan_, reference)
        factors = inflation(usual, share, settings.calibration_windows, settings.seed)
        seen /= factors
        more = random_splits(rng, inside + outside, inside, settings.permutations - first)
        shuffled = np.concatenate([shuffled, statistics(pool, more)])
        p_values = _p_values(seen, shuffled, places_of, pool.vector)
    return p_values, factors, _noise(baseline.plan, pool, observed[0])


def _p_values(seen: Floats, shuffled: Floats, places_of: dict[Question, list[int]], vector: Bools) -> Floats:
    comparable = _comparable(np.concatenate([seen, shuffled]), vector)
    p_values = np.ones(seen.shape[1])
    for places in places_of.values():
        largest = comparable[1:, places].max(axis=1)
        for place in places:
            # 1e-6: equal sums added in another order differ in the last digits, and a tie counts as extreme.
            beyond = np.count_nonzero(largest >= comparable[0, place] - 1e-6)
            p_values[place] = (1 + beyond) / (1 + len(shuffled))
    return p_values


def _noise(plan_: Plan, pool: Sessions, split: Bools) -> Floats:
    """Return the expected square of each column's effect without drift, to be taken off: [C].

    Forty classes of 500 rows are 0.15 apart by chance alone; a person would take that for a change.
    """
    variance = chance_variance(pool, split)
    squares = np.zeros(len(plan_.columns))
    for place, each in enumerate(plan_.columns):
        own = variance[pool.column_of == place]
        if each.column.kind == "number":
            # Kolmogorov's distribution has mean square pi²/12; the variance at the median is 1/4.
            squares[place] = np.pi**2 / 3 * own[:-1].max()
        elif each.column.kind == "category":
            squares[place] = (np.sqrt(2 * own / np.pi).sum() / 2) ** 2  # mean absolute normal deviates
        elif each.column.kind == "flag":
            squares[place] = own[0]
    return squares  # of a vector 0: its effect is measured on other sessions than its direction


def _enough(summed: Sketch) -> Bools:
    with_values = np.count_nonzero(summed.counts > 0, axis=0)
    enough: Bools = (summed.values >= MIN_VALUES) & (with_values >= MIN_SESSIONS)
    return enough


def _comparable(found: Floats, vector: Bools) -> Floats:
    """Return the statistics of all columns on one scale, that of surprise.

    The largest of 31 ratios is larger by chance than the one ratio of a flag. Ranks would put them on one
    scale but end at 1 / permutations, which ten columns share: nothing would ever be sure. So each column
    is measured in the steps in which its own shuffled tail falls off (peaks over a threshold with an
    exponential tail: Pickands 1975, Ann. Statist. 3). Whether that fits well decides how evenly columns
    share the alarms, never how many there are: observed and shuffled are scaled alike.
    """
    above = np.quantile(found, TAIL, axis=0)
    excess = np.where(found > above, found - above, np.nan)
    counted = ~np.isnan(excess)
    # The median of an exponential is its mean times ln 2; a strong drift in the observed one cannot move it.
    steps = np.array(
        [
            np.median(excess[counted[:, place], place]) / np.log(2) if counted[:, place].any() else 1.0
            for place in range(found.shape[1])
        ]
    )
    # Ratios of a rare flag take a few values only; between two of them the tail seems to end. A squared
    # normal deviate falls off in steps of 1.8 where it matters (around 10), nothing falls off faster.
    scaled: Floats = (found - above) / np.maximum(steps, np.where(vector, 1e-6, CHI_SQUARE_STEP))
    return scaled


def _change(
    baseline: Baseline,
    window: Sketch,
    place: int,
    p_value: float,
    factor: float,
    noise: float,
    alpha: float,
    min_effect: float,
) -> ColumnChange:
    each = baseline.plan.columns[place]
    column = each.column
    reference = baseline.sketch
    rows = round(window.values[place])
    if not (window.values[place] and reference.values[place]):
        where = "window" if reference.values[place] else "reference"
        told = _Told(0.0, "", "", f"no value in the {where}")
    else:
        start = baseline.plan.starts[place]
        old = reference.totals[start : start + each.size]
        new = window.totals[start : start + each.size]
        of = f"of {rows:,} {NOUNS[column.question]}"
        if column.kind == "number":
            told = _number(each, old, new, of)
        elif column.kind == "category":
            told = _category(each, reference, window, place, old, new, of)
        elif column.kind == "flag":
            told = _flag(each, old[0] / reference.values[place], new[0] / window.values[place], of)
        else:
            told = _vector(each, reference, window, place, slice(start, start + each.size), of)
    effect = float(np.sqrt(max(0.0, told.effect**2 - noise)))
    return ColumnChange(
        column=column.name,
        kind=column.kind,
        effect=effect,
        p_value=float(p_value),
        inflation=float(factor),
        drifted=bool(p_value <= alpha and effect >= min_effect),
        before=told.before,
        after=told.after,
        said=f"{column.name}: {told.said}",
    )


@dataclass(frozen=True, slots=True)
class _Told:
    effect: float
    before: str
    after: str
    said: str


def _number(each: ColumnPlan, old: Floats, new: Floats, of: str) -> _Told:
    above_old = np.cumsum(old[:0:-1])[::-1] / old.sum()
    above_new = np.cumsum(new[:0:-1])[::-1] / new.sum()
    if not len(above_old):
        return _Told(0.0, "", "", "no value in the reference")
    apart = above_new - above_old
    largest = int(np.argmax(np.abs(apart)))
    before, after = (f"median {_amount(_median(each.edges, bins), each.column.unit)}" for bins in (old, new))
    said = (
        f"above {_amount(each.edges[largest], each.column.unit)}"
        f" {_share(above_old[largest])} -> {_share(above_new[largest])} {of}"
    )
    return _Told(float(abs(apart[largest])), before, after, said)


def _median(edges: Floats, bins: Floats) -> float:
    """Return the edge that half of the values do not exceed."""
    place = int(np.searchsorted(np.cumsum(bins), bins.sum() / 2))
    return float(edges[min(place, len(edges) - 1)])


def _category(
    each: ColumnPlan, reference: Sketch, window: Sketch, place: int, old: Floats, new: Floats, of: str
) -> _Told:
    before, after = old / reference.values[place], new / window.values[place]
    names = [*each.categories, OTHER]
    # What a person wants to read is the name of the newcomer and not that there is one.
    others = window.others[each.column.name]
    first = max(others, key=lambda name: others[name], default=OTHER)
    if first != OTHER and others[first] > new[-1] / 2:
        known = reference.others[each.column.name].get(first, 0)
        names.append(first)
        before = np.concatenate([before, [known / reference.values[place]]])
        after = np.concatenate([after, [others[first] / window.values[place]]])
        before[-2] -= before[-1]
        after[-2] -= after[-1]
    apart = after - before
    most = [int(p) for p in np.argsort(-np.abs(apart), kind="stable")[:2]]
    shown = [p for p in most if abs(apart[p]) >= max(0.01, abs(apart[most[0]]) / 2)] or most[:1]
    return _Told(
        float(np.abs(apart).sum() / 2),
        ", ".join(f"{names[p]} {_share(before[p])}" for p in shown),
        ", ".join(f"{names[p]} {_share(after[p])}" for p in shown),
        ", ".join(f"{names[p]} {_share(before[p])} -> {_share(after[p])}" for p in shown) + f" {of}",
    )


def _flag(each: ColumnPlan, before: float, after: float, of: str) -> _Told:
    effect = abs(after - before)
    wrong_way = {"up": after < before, "down": after > before, None: False}[each.column.worse]
    return _Told(
        0.0 if wrong_way else float(effect),
        _share(before),
        _share(after),
        f"{_share(before)} -> {_share(after)} {of}",
    )


def _vector(each: ColumnPlan, reference: Sketch, window: Sketch, place: int, slices: slice, of: str) -> _Told:
    usual, usual_half = reference.samples[each.column.name]
    now, now_half = window.samples[each.column.name]
    found = []
    for half in (False, True):
        witness = _mean(window, place, slices, half) - _mean(reference, place, slices, half)
        sides = [
            features(rows[halves != half], each.waves) @ witness
            for rows, halves in ((usual, usual_half), (now, now_half))
        ]
        if len(sides[0]) and len(sides[1]):
            found.append(_separation(*sides))
    effect = max(0.0, float(np.mean(found))) if found else 0.0
    said = f"about {_share(effect)} {of} are worded unlike usual"
    return _Told(effect, "as usual", f"{_share(effect)} apart", said)


def _mean(summed: Sketch, place: int, slices: slice, half: bool) -> Singles:
    chosen = summed.halves == half
    values = max(float(summed.counts[chosen, place].sum()), 1.0)
    mean: Singles = summed.sums[chosen, slices].sum(axis=0) / values
    return mean


def _separation(usual: Singles, now: Singles) -> float:
    """Return 2 AUC - 1: how much more often `now` is above `usual` than below it."""
    ordered = np.sort(usual)
    ranks = np.searchsorted(ordered, now, "left") + np.searchsorted(ordered, now, "right")
    return float(ranks.mean() / len(ordered) - 1.0)


def _share(value: float) -> str:
    percent = 100 * float(value)
    tenths = f"{percent:.1f}"
    return f"{percent:.0f} %" if percent >= 9.95 or tenths.endswith("0") else f"{tenths} %"


def _amount(value: float, unit: str) -> str:
    shown = f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{shown} {unit}".rstrip() if unit != "share" else _share(value)
