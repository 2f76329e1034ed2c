"""Intervals and tests for metrics that are sums over rows, when rows of one group resemble each other.

Every metric here is a function of column sums: accuracy is right rows over rows, F1 is made of three
counts, perplexity of two sums, BLEU of ten. So a sample of rows is a matrix with one line a row, a
resample is a weighting of its groups, and no row is scored twice.

Groups, not rows, are drawn, because rows of one template succeed and fail together; treating them as
independent makes intervals too narrow (Field & Welsh 2007, "Bootstrapping clustered data", JRSS B 69;
for language models: Miller 2024, "Adding error bars to evals", arXiv:2411.00640).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# From column sums, shape (..., columns), to the value, shape (...).
Statistic = Callable[[Floats], Floats]

# A percentile bootstrap of few groups is too narrow. Of 1,000 simulated samples of a share of 0.9, in
# groups of four rows that resemble each other, a "95 %" interval held the truth in 81 % with 8 groups,
# 87 % with 16, 91 % with 20 and 93 % with 100.
MIN_BOOTSTRAP_GROUPS = 20


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference, the interval around it, and how often chance alone makes one as large."""

    value: float
    low: float
    high: float
    p_value: float


def sum_by_group(rows: Floats, groups: Sequence[str]) -> Floats:
    """Return the column sums of each group: shape (groups, columns), groups in sorted order."""
    # By a dict: numpy's text has the width of the longest name in every cell, and a name may be a passage.
    places = {name: place for place, name in enumerate(sorted(set(groups)))}
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, [places[group] for group in groups], rows)
    return sums


def estimate_interval(
    sums: Floats,
    statistic: Statistic,
    confidence: float,
    resamples: int,
    seed: int,
    scale: float | None = None,
) -> Interval:
    """Return the value with a percentile interval of the bootstrap over groups.

    For a score between 0 and `scale` there are two cases in which the bootstrap would claim more than
    is known: every resample gives the same value (0 of 300 right, or all of them), and there are fewer
    than `MIN_BOOTSTRAP_GROUPS` groups. Both get the interval of Clopper & Pearson with groups as trials,
    as if the rows of a group always went the same way: wider than needed rather than too narrow.

    Args:
        sums: column sums by group, as `sum_by_group` gives them.
        scale: the best possible score where the worst is 0; None for a value without bounds.
    """
    value = float(statistic(sums.sum(axis=0)))
    drawn = statistic(_draws(len(sums), resamples, seed) @ sums)
    if scale is not None and (len(sums) < MIN_BOOTSTRAP_GROUPS or np.ptp(drawn) == 0.0):
        low, high = compute_clopper_pearson(value / scale * len(sums), len(sums), confidence)
        return Interval(value, low * scale, high * scale)
    low, high = _percentiles(drawn, confidence)
    return Interval(value, low, high)


def estimate_difference(
    before: Floats,
    after: Floats,
    statistic: Statistic,
    confidence: float,
    resamples: int,
    seed: int,
    scale: float | None = None,
) -> Difference:
    """Return `after` minus `before`, both answering the same groups, with interval and p-value.

    The interval draws groups and takes both models' rows with them. Where `estimate_interval` falls back, so
    does this: the two intervals are combined as for independent samples (Newcombe 1998, Statistics in
    Medicine 17, method 10), which is wider than needed for paired ones.

    The p-value is that of a two-sided paired permutation test: under the null hypothesis the two models'
    answers of a whole group may be exchanged. It is (1 + as extreme) / (1 + resamples) and so never 0
    (Phipson & Smyth 2010, "Permutation p-values should never be zero").
    """
    value = float(statistic(after.sum(axis=0)) - statistic(before.sum(axis=0)))
    draws = _draws(len(before), resamples, seed)
    drawn = statistic(draws @ after) - statistic(draws @ before)
    if scale is not None and (len(before) < MIN_BOOTSTRAP_GROUPS or np.ptp(drawn) == 0.0):
        low, high = _newcombe(
            estimate_interval(before, statistic, confidence, resamples, seed, scale),
            estimate_interval(after, statistic, confidence, resamples, seed, scale),
        )
    else:
        low, high = _percentiles(drawn, confidence)
    return Difference(value, low, high, _permutation_p(before, after, statistic, value, resamples, seed))


def compute_clopper_pearson(successes: float, trials: int, confidence: float) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper & Pearson 1934); `successes` need not be whole.

    With 0 successes the upper end is 1 - (alpha / 2) ** (1 / trials): the "rule of three", two-sided.
    """
    from scipy.special import betaincinv  # scipy.stats takes a second to import

    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes <= 0 else float(betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes >= trials else float(betaincinv(successes + 1, trials - successes, 1.0 - tail))
    return low, high


def compute_wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion (Wilson 1927, JASA 22); without trials, 0 to 1."""
    from scipy.stats import binomtest

    if trials == 0:
        return 0.0, 1.0
    found = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return float(found.low), float(found.high)


def compute_sequential_p_values(
    count_exceedances: Callable[[int], Floats],
    permutations: int,
    enough: float,
    first: int,
    at_once: int | None = None,
) -> Floats:
    """Return permutation p-values, and stop early where more permutations would change no decision.

    Most hypotheses are true, and a few permutations show it: once each has `enough` exceedances, drawing ends
    (sequential Monte Carlo p-values: Besag & Clifford 1991, Biometrika 78). A p-value is
    (1 + exceedances) / (1 + drawn) and so never 0 (Phipson & Smyth 2010).

    Args:
        count_exceedances: draws so many permutations, and returns for each hypothesis how many of them
            were as extreme as the data: shape (hypotheses,).
        permutations: the most to draw.
        enough: exceedances of a hypothesis that is not to be rejected.
        first: permutations of the first batch; each further batch doubles their number.
        at_once: largest batch, to bound memory.
    """
    batch = min(first, permutations, at_once or permutations)
    exceedances, drawn = count_exceedances(batch), batch
    while drawn < permutations and exceedances.min() < enough:
        batch = min(permutations - drawn, drawn, at_once or permutations)
        exceedances = exceedances + count_exceedances(batch)
        drawn += batch
    found: Floats = (1.0 + exceedances) / (1.0 + drawn)
    return found


def _draws(groups: int, resamples: int, seed: int) -> Floats:
    """Return how often each group is drawn in each resample: shape (resamples, groups)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1.0 / groups), size=resamples).astype(np.float64)


def _percentiles(drawn: Floats, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return float(low), float(high)


def _newcombe(before: Interval, after: Interval) -> tuple[float, float]:
    value = after.value - before.value
    down = np.hypot(after.value - after.low, before.high - before.value)
    up = np.hypot(after.high - after.value, before.value - before.low)
    return float(value - down), float(value + up)


def _permutation_p(
    before: Floats, after: Floats, statistic: Statistic, observed: float, resamples: int, seed: int
) -> float:
    # A stream of its own: the signs must not follow the draws of the bootstrap.
    exchanged = (
        np.random.default_rng([seed, 1]).integers(0, 2, size=(resamples, len(before))).astype(np.float64)
    )
    moved = exchanged @ (before - after)
    shuffled = statistic(after.sum(axis=0) + moved) - statistic(before.sum(axis=0) - moved)
    # Equal sums added in another order differ in the last digits, and a tie counts as extreme.
    slack = 1e-9 * max(1.0, abs(observed))
    return float((1 + np.count_nonzero(np.abs(shuffled) >= abs(observed) - slack)) / (1 + resamples))
