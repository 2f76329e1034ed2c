"""The power of a comparison: the smallest change that it would have detected.

Two limits. Sessions are shuffled, and where there are few of them, there are too few shuffles for a small
p-value: such a window is not judged. Where there are enough, a change must be large enough to be seen next to
what chance makes. That size follows from the effective rows of both sides, for a share of one half (the
hardest), at the level that one column of a drift type has (Bonferroni), after calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from monitoring.drift.bins import Bools, Floats
from monitoring.drift.two_sample_tests import Sessions

CHANCE = 0.8  # of finding a change of the size that is stated, by the normal approximation; 2 in 3 when tried
# Fewer than this on either side, and a column is not judged. With this many a complete change of a column
# was found in each of 120 trials, next to references of 10 to 400 sessions.
MIN_VALUES = 20
MIN_SESSIONS = 10


def count_needed_sessions(others: int, alpha: float) -> int:
    """Return how many sessions a window needs next to `others` for p to reach `alpha` at all."""
    needed = MIN_SESSIONS
    while math.comb(needed + max(others, MIN_SESSIONS), needed) * alpha < 1.0:
        needed += 1
    return needed


def explain_too_few_sessions(window: int, reference: int, alpha: float) -> str | None:
    """Return why a window of so many sessions cannot be judged and what to send, or None if it can.

    Args:
        alpha: the level of one drift type.
    """
    needed = count_needed_sessions(reference, alpha)
    send = "send the field session, or a user of its own for each person, with every request"
    if window < needed:
        return f"{_count(window)}; needs {needed}: {send}"
    if reference < MIN_SESSIONS:
        return (
            f"{_count(reference)} in the reference; needs {MIN_SESSIONS}: {send}, then raise"
            " monitoring.reference.rows or promote another version, and the reference is a new one"
        )
    return None


def compute_smallest_changes(
    pool: Sessions, split: Bools, tested: Sequence[int], factors: Floats, alpha: float
) -> Floats:
    """Return the smallest change of a share that is found with `CHANCE`, at most 1: [columns tested].

    Args:
        split: [K], True for the sessions of the window's side.
        tested: the columns of one drift type that are judged.
        factors: [C] by how much calibration divides a statistic.
        alpha: the level of the drift type, which its columns share.
    """
    sizes = [
        pool.counts[side][:, tested].sum(axis=0, dtype=np.float64) ** 2
        / np.maximum(pool.spread[side][:, tested].sum(axis=0, dtype=np.float64), 1e-9)
        for side in (split, ~split)
    ]
    variance = 0.25 * sum(1.0 / np.maximum(size, 1e-9) for size in sizes)
    normal = NormalDist()
    threshold = normal.inv_cdf(1.0 - alpha / len(tested) / 2.0) * np.sqrt(factors[tested])
    deviates = threshold + normal.inv_cdf(CHANCE)
    changes: Floats = np.minimum(deviates * np.sqrt(variance), 1.0)
    return changes


def _count(sessions: int) -> str:
    return f"{sessions} session{'s' * (sessions != 1)}"
