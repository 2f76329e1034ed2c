"""Calibrate the drift test: how much the reference itself varies over time.

Shuffled sessions know nothing of time. Real traffic has mornings and Mondays: a contiguous stretch of it
differs from the rest by more than shuffled sessions do, and a test that trusts the shuffle cries wolf. So
stretches of the reference, as long as the window, are compared with the rest of the reference, and the
statistic of each column is divided by how much larger it comes out than after shuffling the order of the
sessions, as genomic control divides by the inflation of its test (Devlin & Roeder 1999, Biometrics 55).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.bins import Floats
from monitoring.drift.two_sample_tests import Sessions, compute_statistics

SHUFFLES = 40  # of the order of the sessions
# A factor is believed if no shuffled order makes as large a one (1 in 41 quiet columns has one by chance),
# and counts from what shuffled orders readily make: of few stretches it is so uncertain that believing all
# of it cost a window with 10 % German its alarm in 2 of 25 trials.
READILY = 0.8
MIN_SESSIONS = 10  # in a stretch, and in its rest


def estimate_inflation(pool: Sessions, share: float, windows: int, seed: int) -> Floats:
    """Return the inflation factor of each column, at least 1: [C].

    Args:
        pool: the sessions of the reference, in order of time.
        share: the window's sessions over the reference's; at most a third of the reference is one stretch.
        windows: stretches, evenly spread; they overlap in a short reference. 0: all factors are 1.
    """
    length = round(len(pool) * min(share, 1 / 3))
    if not windows or length < MIN_SESSIONS:
        return np.ones(pool.counts.shape[1])
    stretches = _stretches(len(pool), length, windows)
    rng = np.random.default_rng([seed, 2])
    orders = [np.arange(len(pool)), *(rng.permutation(len(pool)) for _ in range(SHUFFLES))]
    splits = np.concatenate([stretches[:, np.argsort(order)] for order in orders])
    found = compute_statistics(pool, splits).reshape(len(orders), windows, -1).mean(axis=1)
    seen, shuffled = found[0], found[1:]
    readily = np.quantile(shuffled, READILY, axis=0)
    factor = np.divide(seen, readily, out=np.ones_like(seen), where=readily > 0)
    return np.where(seen > shuffled.max(axis=0), np.maximum(factor, 1.0), 1.0)


def _stretches(size: int, length: int, windows: int) -> NDArray[np.bool_]:
    """Return evenly spread contiguous stretches of `length` sessions: [windows, size]."""
    firsts = np.linspace(0, size - length, windows).round().astype(int)
    places = np.arange(size)
    return (places >= firsts[:, None]) & (places < firsts[:, None] + length)
