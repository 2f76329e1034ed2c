"""Compare a window of traffic with the reference: effect size and p-value per column.

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

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from monitoring.drift.baseline import Baseline
from monitoring.drift.bins import Binning, Bools, Floats
from monitoring.drift.calibration import estimate_inflation
from monitoring.drift.effects import measure_change
from monitoring.drift.power import MIN_SESSIONS, MIN_VALUES, compute_smallest_changes
from monitoring.drift.session_sums import SessionSums
from monitoring.drift.two_sample_tests import (
    Sessions,
    compute_chance_variance,
    compute_statistics,
    draw_splits,
    pool_sessions,
)
from monitoring.traffic.columns import DECIDING, DriftType
from monitoring.verdicts import DriftTypeVerdict
from stages.common.params.loop import DriftSettings

# Most windows are quiet, and a few shuffles show it. Where the smallest p-value is above this, no more are
# made (sequential Monte Carlo p-values: Besag & Clifford 1991, Biometrika 78), and no calibration is needed:
# it only ever raises p-values.
FIRST_PERMUTATIONS = 500
PLAINLY_QUIET = 0.04
CHI_SQUARE_STEP = 1.8
TAIL = 0.9  # of the shuffled statistics; above it they are taken to fall off exponentially


def compare_window(
    baseline: Baseline, window: SessionSums, settings: DriftSettings
) -> tuple[DriftTypeVerdict, ...]:
    """Return what changed in a summed window, by drift type."""
    columns = [each.column for each in baseline.binning.columns]
    judged = _enough(window) & _enough(baseline.sums)
    pool = pool_sessions(baseline.binning, baseline.sums, window)
    split = np.arange(len(pool)) >= len(baseline.sums.sums)
    usual = pool_sessions(baseline.binning, baseline.sums)
    share = len(window.sums) / len(baseline.sums.sums)
    inflation = estimate_inflation(usual, share, settings.calibration_windows, settings.seed)
    p_values, factors, noise = _tested(baseline.binning, pool, split, judged, inflation, settings)
    alpha = settings.alpha / len(DECIDING)
    drift_types = []
    for drift_type in dict.fromkeys(column.drift_type for column in columns):
        places = [place for place, column in enumerate(columns) if column.drift_type == drift_type]
        changes = sorted(
            (
                replace(
                    measure_change(
                        *(baseline, window, place, p_values[place], factors[place], noise[place]),
                        *(alpha, settings.min_effect),
                    ),
                    judged=bool(judged[place]),
                )
                for place in places
            ),
            key=lambda change: (not change.drifted, change.p_value, -change.effect),
        )
        drift_types.append(
            DriftTypeVerdict(
                drift_type,
                any(change.drifted for change in changes),
                min(change.p_value for change in changes),
                tuple(changes),
                _find_smallest_change(pool, split, [p for p in places if judged[p]], inflation, alpha),
            )
        )
    return tuple(drift_types)


def _find_smallest_change(
    pool: Sessions, split: Bools, tested: list[int], inflation: Floats, alpha: float
) -> float | None:
    """Return the smallest change that the best column of a drift type would show; None if none is judged."""
    if not tested:
        return None
    return round(float(compute_smallest_changes(pool, split, tested, inflation, alpha).min()), 4)


def has_drifted(drift_types: Iterable[DriftTypeVerdict]) -> bool:
    """Return whether one of the deciding drift types has drifted."""
    return any(each.drifted for each in drift_types if each.drift_type in DECIDING)


def _tested(
    binning: Binning,
    pool: Sessions,
    split: Bools,
    judged: Bools,
    inflation: Floats,
    settings: DriftSettings,
) -> tuple[Floats, Floats, Floats]:
    """Return p-values, inflation factors and squared effects of pure chance: [C] each.

    A column that is not judged has p = 1.

    Args:
        pool: the K sessions of the reference and of the window; split: [K], True for the window's.
        judged: [C]; inflation: [C] by how much calibration divides, unless the window is plainly quiet.
    """
    size = len(binning.columns)
    inside, outside = int(split.sum()), int((~split).sum())
    p_values, factors = np.ones(size), np.ones(size)
    if not judged.any():
        return p_values, factors, np.zeros(size)
    seen = compute_statistics(pool, split[None, :])
    places_of = {
        drift_type: places
        for drift_type in dict.fromkeys(each.column.drift_type for each in binning.columns)
        if (
            places := [
                p
                for p, each in enumerate(binning.columns)
                if each.column.drift_type == drift_type and judged[p]
            ]
        )
    }
    rng = np.random.default_rng([settings.seed, 1])
    first = min(FIRST_PERMUTATIONS, settings.permutations)
    shuffled = compute_statistics(pool, draw_splits(rng, inside + outside, inside, first))
    p_values = _p_values(seen, shuffled, places_of, pool.vector)
    if p_values.min() <= PLAINLY_QUIET:
        factors = inflation
        seen /= factors
        more = draw_splits(rng, inside + outside, inside, settings.permutations - first)
        shuffled = np.concatenate([shuffled, compute_statistics(pool, more)])
        p_values = _p_values(seen, shuffled, places_of, pool.vector)
    return p_values, factors, _noise(binning, pool, split)


def _p_values(seen: Floats, shuffled: Floats, places_of: dict[DriftType, list[int]], vector: Bools) -> Floats:
    comparable = _comparable(np.concatenate([seen, shuffled]), vector)
    p_values = np.ones(seen.shape[1])
    for places in places_of.values():
        largest = comparable[1:, places].max(axis=1)
        for place in places:
            # 1e-6: equal sums added in another order differ in the last digits, and a tie counts as extreme.
            beyond = np.count_nonzero(largest >= comparable[0, place] - 1e-6)
            p_values[place] = (1 + beyond) / (1 + len(shuffled))
    return p_values


def _noise(binning: Binning, pool: Sessions, split: Bools) -> Floats:
    """Return the expected squared effect of each column without drift, to be subtracted: [C].

    Forty classes of 500 rows are 0.15 apart by chance alone; a person would take that for a change.
    """
    variance = compute_chance_variance(pool, split)
    squares = np.zeros(len(binning.columns))
    for place, each in enumerate(binning.columns):
        own = variance[pool.column_of == place]
        if each.column.kind == "number":
            # Kolmogorov's distribution has mean square pi²/12; the variance at the median is 1/4.
            squares[place] = np.pi**2 / 3 * own[:-1].max()
        elif each.column.kind == "category":
            squares[place] = (np.sqrt(2 * own / np.pi).sum() / 2) ** 2  # mean absolute normal deviates
        elif each.column.kind == "flag":
            squares[place] = own[0]
    return squares  # of a vector 0: its effect is measured on other sessions than its direction


def _enough(summed: SessionSums) -> Bools:
    with_values = np.count_nonzero(summed.counts > 0, axis=0)
    enough: Bools = (summed.values >= MIN_VALUES) & (with_values >= MIN_SESSIONS)
    return enough


def _comparable(found: Floats, vector: Bools) -> Floats:
    """Return the statistics of all columns on one common scale.

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
