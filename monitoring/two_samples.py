"""Statistics of two samples of sessions that are functions of sums, so that shuffling is a matrix product.

All of them have Welch's form: a squared difference of means over the sum of both sides' own variances,
where a mean is a ratio of sums over sessions. Dividing by the variance of each side is what keeps a
shuffle right when sessions of one side are longer than those of the other (users who name no session:
20 rows each in a reference of 2,000, 5 in a window of 500). See Janssen 1997, "Studentized permutation
tests for non-i.i.d. hypotheses", Statist. Probab. Lett. 36; Chung & Romano 2013, Ann. Statist. 41; for
vectors Alekseyenko 2016, "Multivariate Welch t-test on distances", Bioinformatics 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitoring.sketch import Floats, Places, Plan, Singles, Sketch

# How alike rows of one session are taken to be when a session is weighed: n rows count as n / (1 + (n-1) r)
# (Kish 1965, the design effect). So one busy client counts as at most 20 rows and not as half the traffic.
LIKENESS = 0.05
# The variance of a side is mixed with the pooled one as if that had been seen in so many sessions more:
# of 5 sessions alone it is so uncertain that chance makes huge ratios, which would drown real ones.
PRIOR_SESSIONS = np.float32(20.0)
CHUNK = 250  # splits at a time: bounds the memory


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions ready for comparing: [K, J] deviations from the pooled mean, [K, C] weighted counts of values.

    Attributes:
        column_of: [J] the column of each entry.
        starts: [C] where the columns start.
        worse: [C] the direction that counts of a flag: 1 up, -1 down, 0 both.
        vector: [C] whether the column is a vector: its entries are taken together.
    """

    deviations: Singles
    counts: Singles
    column_of: Places
    starts: Places
    worse: Floats
    vector: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.deviations)


def sessions(plan: Plan, *sketches: Sketch) -> Sessions:
    """Return the sessions of all sketches one after the other, pooled, centred and weighed."""
    rows = np.concatenate([sketch.session_rows for sketch in sketches])
    weights = (1.0 / (1.0 + (rows - 1.0) * LIKENESS)).astype(np.float32)[:, None]
    raw_counts = np.concatenate([sketch.counts for sketch in sketches])
    raw_sums = np.concatenate([sketch.sums for sketch in sketches])
    parts, sizes = [], []
    for start, stop, each in zip(plan.starts, plan.starts[1:], plan.columns, strict=False):
        part = raw_sums[:, start:stop]
        if each.column.kind == "number":
            # From bins to "above this edge": differences of those are what Kolmogorov and Smirnov compare.
            part = np.cumsum(part[:, :0:-1], axis=1)[:, ::-1]
            if not part.shape[1]:  # a column without a single value in the reference
                part = np.zeros((len(rows), 1), dtype=np.float32)
        parts.append(part)
        sizes.append(part.shape[1])
    column_of = np.repeat(np.arange(len(sizes)), sizes)
    sums = np.hstack(parts) * weights
    counts = raw_counts * weights
    means = (
        sums.sum(axis=0, dtype=np.float64) / np.maximum(counts.sum(axis=0, dtype=np.float64), 1e-9)[column_of]
    )
    deviations = sums - counts[:, column_of] * means.astype(np.float32)
    signs = {"up": 1.0, "down": -1.0, None: 0.0}
    return Sessions(
        deviations,
        counts,
        column_of,
        np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64),
        np.array([signs[each.column.worse] for each in plan.columns]),
        np.array([each.column.kind == "vector" for each in plan.columns]),
    )


def statistics(pool: Sessions, splits: NDArray[np.bool_]) -> Floats:
    """Return how different the two sides of each split are, column by column: [splits, C], 0 and above.

    The largest ratio over a column's bins, classes or edges; of a vector the ratio of the sums.

    Args:
        pool: K sessions.
        splits: [splits, K], True for the sessions of the window's side.
    """
    x, m = pool.deviations, pool.counts
    of = pool.column_of
    products = np.hstack([x, x * x, x * m[:, of], m, m * m, (m > 0).astype(np.float32)])
    all_sums = products.sum(axis=0, dtype=np.float64).astype(np.float32)
    x_size, m_size = x.shape[1], m.shape[1]
    cuts = np.cumsum([x_size, x_size, x_size, m_size, m_size])
    x_all, xx_all, xm_all, m_all, mm_all, k_all = np.split(all_sums, cuts)
    prior = (PRIOR_SESSIONS * xx_all / np.maximum(k_all, 1.0)[of]).astype(np.float32)
    found = np.empty((len(splits), m_size))
    for first in range(0, len(splits), CHUNK):
        side = splits[first : first + CHUNK].astype(np.float32) @ products
        x_in, xx_in, xm_in, m_in, mm_in, k_in = np.split(side, cuts, axis=1)
        mean_in, variance_in = _side(x_in, xx_in, xm_in, m_in, mm_in, k_in, prior, of)
        mean_out, variance_out = _side(
            x_all - x_in,
            xx_all - xx_in,
            xm_all - xm_in,
            m_all - m_in,
            mm_all - mm_in,
            k_all - k_in,
            prior,
            of,
        )
        found[first : first + CHUNK] = _ratios(pool, mean_in - mean_out, variance_in + variance_out)
        # A side without a single value says nothing.
        found[first : first + CHUNK][(k_in < 0.5) | (k_all - k_in < 0.5)] = 0.0
    return found


def _side(
    x: Singles, xx: Singles, xm: Singles, m: Singles, mm: Singles, k: Singles, prior: Singles, of: Places
) -> tuple[Singles, Singles]:
    """Return the mean deviation of one side and its variance, [splits, J] each."""
    weight = np.maximum(m, np.float32(1e-6))
    mean: Singles = np.divide(x, weight[:, of])
    residuals = np.maximum(xx - 2 * mean * xm + mean * mean * mm[:, of], np.float32(0.0))
    shrunk = k / (k + PRIOR_SESSIONS) / (weight * weight)
    variance: Singles = (residuals + prior) * shrunk[:, of]
    return mean, variance


def _ratios(pool: Sessions, difference: Singles, variance: Singles) -> Singles:
    direction = pool.worse[pool.column_of]
    counts = (direction == 0) | (np.sign(difference) == direction)
    squares = np.where(counts, difference * difference, np.float32(0.0))
    # What never varies cannot differ either: 0, not 0 / 0.
    ratios = np.divide(squares, variance, out=np.zeros_like(squares), where=variance > 1e-30)
    columns = np.maximum.reduceat(ratios, pool.starts, axis=1)
    if pool.vector.any():
        above = np.add.reduceat(squares, pool.starts, axis=1)[:, pool.vector]
        below = np.add.reduceat(variance, pool.starts, axis=1)[:, pool.vector]
        columns[:, pool.vector] = np.divide(above, below, out=np.zeros_like(above), where=below > 1e-30)
    return columns


def random_splits(rng: np.random.Generator, size: int, inside: int, count: int) -> NDArray[np.bool_]:
    """Return `count` ways to put `inside` of `size` sessions on the window's side, each equally likely."""
    splits = np.zeros((count, size), dtype=np.bool_)
    for first in range(0, count, CHUNK):
        keys = rng.random((min(CHUNK, count - first), size), dtype=np.float32)
        chosen = np.argpartition(keys, inside - 1, axis=1)[:, :inside]
        np.put_along_axis(splits[first : first + CHUNK], chosen, True, axis=1)
    return splits
