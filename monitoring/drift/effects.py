"""The effect of drift on one column, as a distance between 0 and 1 and in a sentence.

Over all rows: of a number the largest difference between the shares above any value (Kolmogorov-Smirnov), of
a category the share that would have to change class (total variation), of a flag the difference of the
rates, of a vector 2 AUC - 1 along the direction in which the two differ most (the witness function of Gretton
et al. 2012), found in one half of the sessions and measured in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitoring.drift.baseline import Baseline
from monitoring.drift.bins import OTHER, ColumnBinning, Floats, Singles, compute_fourier_features
from monitoring.drift.session_sums import SessionSums
from monitoring.traffic.columns import DriftType
from monitoring.verdicts import ColumnChange
from stages.common.escaping import clean_line

NOUNS: dict[DriftType, str] = {
    "input": "prompts",
    "output": "answers",
    "quality": "answers",
    "service": "requests",
}


def measure_change(
    baseline: Baseline,
    window: SessionSums,
    place: int,
    p_value: float,
    factor: float,
    noise: float,
    alpha: float,
    min_effect: float,
) -> ColumnChange:
    """Return how a column of the window differs from the reference, with its p-value.

    Args:
        place: of the column in the binning.
        factor: by how much calibration divided the statistic.
        noise: square of the effect that chance alone makes, subtracted here.
        alpha, min_effect: p-value and effect at which the column has drifted.
    """
    each = baseline.binning.columns[place]
    column = each.column
    reference = baseline.sums
    rows = round(window.values[place])
    if not (window.values[place] and reference.values[place]):
        where = "window" if reference.values[place] else "reference"
        found = Effect(0.0, "", "", f"no value in the {where}")
    else:
        start = baseline.binning.starts[place]
        old = reference.totals[start : start + each.size]
        new = window.totals[start : start + each.size]
        of = f"of {rows:,} {NOUNS[column.drift_type]}"
        if column.kind == "number":
            found = _number(each, old, new, of)
        elif column.kind == "category":
            found = _category(each, reference, window, place, old, new, of)
        elif column.kind == "flag":
            found = _flag(each, old[0] / reference.values[place], new[0] / window.values[place], of)
        else:
            found = _vector(each, reference, window, place, slice(start, start + each.size), of)
    effect = float(np.sqrt(max(0.0, found.effect**2 - noise)))
    return ColumnChange(
        column=column.name,
        kind=column.kind,
        effect=effect,
        p_value=float(p_value),
        inflation=float(factor),
        drifted=bool(p_value <= alpha and effect >= min_effect),
        # One line each: they go to terminals and logs, and a category is what a user wrote.
        before=clean_line(found.before),
        after=clean_line(found.after),
        summary=clean_line(f"{column.name}: {found.summary}"),
    )


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect of one column, and the reference and the window in a few words."""

    effect: float
    before: str
    after: str
    summary: str


def _number(each: ColumnBinning, old: Floats, new: Floats, of: str) -> Effect:
    above_old = np.cumsum(old[:0:-1])[::-1] / old.sum()
    above_new = np.cumsum(new[:0:-1])[::-1] / new.sum()
    if not len(above_old):
        return Effect(0.0, "", "", "no value in the reference")
    apart = above_new - above_old
    largest = int(np.argmax(np.abs(apart)))
    before, after = (f"median {_amount(_median(each.edges, bins), each.column.unit)}" for bins in (old, new))
    summary = (
        f"above {_amount(each.edges[largest], each.column.unit)}"
        f" {_share(above_old[largest])} -> {_share(above_new[largest])} {of}"
    )
    return Effect(float(abs(apart[largest])), before, after, summary)


def _median(edges: Floats, bins: Floats) -> float:
    """Return the edge that half of the values do not exceed."""
    place = int(np.searchsorted(np.cumsum(bins), bins.sum() / 2))
    return float(edges[min(place, len(edges) - 1)])


def _category(
    each: ColumnBinning,
    reference: SessionSums,
    window: SessionSums,
    place: int,
    old: Floats,
    new: Floats,
    of: str,
) -> Effect:
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
    return Effect(
        float(np.abs(apart).sum() / 2),
        ", ".join(f"{names[p]} {_share(before[p])}" for p in shown),
        ", ".join(f"{names[p]} {_share(after[p])}" for p in shown),
        ", ".join(f"{names[p]} {_share(before[p])} -> {_share(after[p])}" for p in shown) + f" {of}",
    )


def _flag(each: ColumnBinning, before: float, after: float, of: str) -> Effect:
    effect = abs(after - before)
    wrong_way = {"up": after < before, "down": after > before, None: False}[each.column.worse]
    return Effect(
        0.0 if wrong_way else float(effect),
        _share(before),
        _share(after),
        f"{_share(before)} -> {_share(after)} {of}",
    )


def _vector(
    each: ColumnBinning, reference: SessionSums, window: SessionSums, place: int, slices: slice, of: str
) -> Effect:
    usual, usual_half = reference.samples[each.column.name]
    now, now_half = window.samples[each.column.name]
    found = []
    for half in (False, True):
        witness = _mean(window, place, slices, half) - _mean(reference, place, slices, half)
        sides = [
            compute_fourier_features(rows[halves != half], each.waves) @ witness
            for rows, halves in ((usual, usual_half), (now, now_half))
        ]
        if len(sides[0]) and len(sides[1]):
            found.append(_separation(*sides))
    effect = max(0.0, float(np.mean(found))) if found else 0.0
    summary = f"about {_share(effect)} {of} are worded unlike usual"
    return Effect(effect, "as usual", f"{_share(effect)} apart", summary)


def _mean(summed: SessionSums, place: int, slices: slice, half: bool) -> Singles:
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
