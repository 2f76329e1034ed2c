"""Two-sample statistics that are functions of sums, so that permuting sessions is a matrix product.

Rows of a session resemble each other. How much, the intraclass correlation r of each column, is found in
the pooled sessions; n rows of a session then count as n / (1 + (n-1) r) (the design effect: Kish 1965,
"Survey sampling"). Sums with these weights are the most certain ones, one busy client cannot be half the
traffic, and the two sides may have sessions of different lengths: users who name no session have 20 rows
each in a reference of 2,000 and 5 in a window of 500. A difference divided by a variance that knows the
lengths of each side may be shuffled even then (Janssen 1997, "Studentized permutation tests for non-i.i.d.
hypotheses", Statist. Probab. Lett. 36; Chung & Romano 2013, Ann. Statist. 41).

- A share (of a class, of a flag, above an edge) gives the likelihood ratio G² of two binomials with effective
  counts. A class that vanishes is far more surprising than its squared difference over the variance
  suggests (16 instead of 28 for 8 % of 190), and a rare one that comes twice is less so.
- A number gives besides its edges the squared z of its mean rank, which sees a shift of all values better.
- A vector gives the squared distance of the means of its features, an MMD with random features, where
  directions in which sessions vary anyhow count less (regularised as in Li, Aue, Paul, Peng & Wang 2020,
  "An adaptable generalization of Hotelling's T² test in high dimension", Ann. Statist. 48).

What is estimated for a statistic comes from both sides pooled: no shuffle changes it, none is favoured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.bins import Binning, Bools, Floats, Places, Singles
from monitoring.drift.session_sums import SessionSums

LEAST_LIKENESS = 0.05  # so no session counts as more than 20 rows
CHUNK = 250  # splits at a time: bounds the memory
TINY = np.float32(1e-12)


@dataclass(frozen=True, slots=True)
class Sessions:
    """K pooled sessions of C columns with J shares, ranks or features in all.

    Attributes:
        deviations: [K, J] of weighed sums from the pooled mean.
        counts: [K, C] weighed counts of values.
        spread: [K, C] variance of a deviation, as a multiple of that of one row.
        means: [J] pooled.
        row_variance: [J] of one row, as sessions show it.
        shares: [J] whether the entry is a share.
        column_of: [J] the column of each entry.
        starts: [C] where the columns start.
        worse: [C] the direction that counts of a flag: 1 up, -1 down, 0 both.
        vector: [C] whether the column is a vector: its entries are taken together.
    """

    deviations: Singles
    counts: Singles
    spread: Singles
    means: Singles
    row_variance: Singles
    shares: Bools
    column_of: Places
    starts: Places
    worse: Floats
    vector: Bools

    def __len__(self) -> int:
        return len(self.deviations)


def pool_sessions(binning: Binning, *parts: SessionSums) -> Sessions:
    """Return the sessions of all parts one after the other, pooled, centred and weighed."""
    raw_sums = np.concatenate([part.sums for part in parts])
    raw_counts = np.concatenate([part.counts for part in parts])
    columns, means, variances, weighed, spreads = [], [], [], [], []
    for place, each in enumerate(binning.columns):
        sums = raw_sums[:, binning.starts[place] : binning.starts[place + 1]]
        if each.column.kind == "number":
            sums = _above_edges(sums)
        count = raw_counts[:, place]
        deviations, mean, weights, likeness = _centred(sums, count, each.column.kind == "vector")
        spread = weights**2 * count * (1.0 + (np.maximum(count, 1.0) - 1.0) * likeness)
        columns.append(deviations)
        means.append(mean)
        # What sessions vary by sets the scale; the likeness of their rows only sets how it grows with length.
        variances.append((deviations**2).sum(axis=0) / max(float(spread.sum()), 1e-9))
        weighed.append(weights * count)
        spreads.append(spread)
    sizes = [part.shape[1] for part in columns]
    vector = np.array([each.column.kind == "vector" for each in binning.columns])
    column_of = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    shares = ~vector[column_of]
    numbers = np.array([each.column.kind == "number" for each in binning.columns])
    shares[(starts + np.array(sizes) - 1)[numbers]] = False  # the mean rank
    signs = {"up": 1.0, "down": -1.0, None: 0.0}
    return Sessions(
        np.hstack(columns),
        np.stack(weighed, axis=1),
        np.stack(spreads, axis=1),
        np.concatenate(means),
        np.concatenate(variances).astype(np.float32),
        shares,
        column_of,
        starts,
        np.array([signs[each.column.worse] for each in binning.columns]),
        vector,
    )


def _above_edges(bins: Singles) -> Singles:
    """Return the count of values above each edge per session, and last their mean over the edges."""
    if bins.shape[1] == 1:  # a column without a single value in the reference has no edges
        return np.zeros((len(bins), 2), dtype=np.float32)
    above = np.cumsum(bins[:, :0:-1], axis=1)[:, ::-1]
    return np.hstack([above, above.mean(axis=1, keepdims=True)]).astype(np.float32)


def _centred(sums: Singles, count: Singles, vector: bool) -> tuple[Singles, Singles, Singles, float]:
    """Return weighed deviations, mean, weights and likeness of one column's sessions."""
    likeness, mean = 0.0, np.zeros(sums.shape[1], dtype=np.float32)
    weights = np.ones(len(count), dtype=np.float32)
    pairs = float((count.astype(np.float64) * (count - 1.0)).sum())
    # The mean depends on the weights, they on the likeness, that on the mean: twice is enough.
    for _ in range(2):
        mean = (weights @ sums) / max(float(weights @ count), 1e-9)
        deviations = sums - count[:, None] * mean
        squares = float((deviations.astype(np.float64) ** 2).sum())
        # One row: p (1 - p) of a share; features of a vector of length 1 have length 1, too.
        one_row = 1.0 - float(mean @ mean) if vector else float((mean * (1.0 - mean)).sum())
        if pairs > 0 and one_row > 1e-9:
            found = (squares - one_row * float(count.sum())) / (one_row * pairs)
            likeness = min(max(found, 0.0), 1.0)
        effective = max(likeness, LEAST_LIKENESS)
        weights = (1.0 / (1.0 + (np.maximum(count, 1.0) - 1.0) * effective)).astype(np.float32)
    mean = (weights @ sums) / max(float(weights @ count), 1e-9)
    deviations = (sums - count[:, None] * mean) * weights[:, None]
    return (_evened(deviations) if vector else deviations), mean, weights, likeness


def _evened(deviations: Singles) -> Singles:
    """Return deviations along their principal axes, high-variance axes shrunk.

    Half-way between distance (topics that always come and go drown what is new) and Hotelling's T²
    (axes that hold nothing but noise count as much as all others): the ridge is the mean variance.
    """
    covariance = deviations.T.astype(np.float64) @ deviations
    values, axes = np.linalg.eigh(covariance)
    ridge = max(float(values.mean()), 1e-12)
    scale = np.sqrt(ridge / (np.maximum(values, 0.0) + ridge))
    turned: Singles = deviations @ (axes * scale).astype(np.float32)
    return turned


def compute_statistics(pool: Sessions, splits: Bools) -> Floats:
    """Return the test statistic of each split and column: [splits, C], not negative.

    Of a number or category the largest over its edges or classes, of a vector the ratio of the sums.

    Args:
        pool: K sessions.
        splits: [splits, K], True for the sessions of the window's side.
    """
    values = np.hstack([pool.deviations, pool.counts, pool.spread])
    cuts = [pool.deviations.shape[1], pool.deviations.shape[1] + pool.counts.shape[1]]
    everything = values.sum(axis=0, dtype=np.float64).astype(np.float32)
    found = np.empty((len(splits), pool.counts.shape[1]))
    for first in range(0, len(splits), CHUNK):
        inside = splits[first : first + CHUNK].astype(np.float32) @ values
        found[first : first + CHUNK] = _compare(
            pool, np.split(inside, cuts, axis=1), np.split(everything - inside, cuts, axis=1)
        )
    return found


def _compare(pool: Sessions, inside: list[Singles], outside: list[Singles]) -> Floats:
    (x, counts, spread), (other_x, other_counts, other_spread) = inside, outside
    found = np.zeros(counts.shape)
    stops = [*pool.starts[1:].tolist(), x.shape[1]]
    for place, (start, stop) in enumerate(zip(pool.starts.tolist(), stops, strict=True)):
        there = (counts[:, place] > 1e-3) & (other_counts[:, place] > 1e-3)
        varies = pool.row_variance[start:stop] > TINY
        # A side without a single value gives no evidence; what never varies cannot differ.
        if not there.any() or not varies.any():
            continue
        own = slice(start, stop)
        weight, other_weight = counts[there, place, None], other_counts[there, place, None]
        size = weight**2 / spread[there, place, None]  # effective rows
        other_size = other_weight**2 / other_spread[there, place, None]
        mean, other_mean = x[there, own] / weight, other_x[there, own] / other_weight
        squares = (mean - other_mean) ** 2
        harmonic = size * other_size / (size + other_size)
        variance = pool.row_variance[own]
        if pool.vector[place]:
            found[there, place] = squares.sum(axis=1) * harmonic[:, 0] / variance.sum()
            continue
        ratios = np.divide(squares * harmonic, variance, out=np.zeros_like(squares), where=varies)
        shares = np.flatnonzero(pool.shares[own] & varies)
        p = pool.means[own][shares]
        # Effective rows again, of a share that varies more or less than its column does as a whole.
        scale = np.maximum(p * (1 - p), TINY) / variance[shares]
        ratios[:, shares] = _likelihood_ratio(
            p + mean[:, shares], p + other_mean[:, shares], size * scale, other_size * scale
        )
        if pool.worse[place]:
            ratios[(mean - other_mean) * pool.worse[place] <= 0] = 0.0
        found[there, place] = ratios.max(axis=1)
    return found


def _likelihood_ratio(p: Singles, q: Singles, n: Singles, m: Singles) -> Singles:
    """Return G² of two shares of n and m rows: twice the log-likelihood ratio against one common share."""
    p, q = np.clip(p, 0.0, 1.0), np.clip(q, 0.0, 1.0)
    both = (n * p + m * q) / (n + m)
    lost = n * (_x_log(p, both) + _x_log(1 - p, 1 - both)) + m * (_x_log(q, both) + _x_log(1 - q, 1 - both))
    ratio: Singles = np.maximum(2 * lost, np.float32(0.0))
    return ratio


def _x_log(p: Singles, q: Singles) -> Singles:
    logarithm: Singles = np.log(np.maximum(p, TINY) / np.maximum(q, TINY))
    return p * logarithm


def compute_chance_variance(pool: Sessions, split: Bools) -> Floats:
    """Return the variance that chance alone gives the difference of the two sides' means: [J]."""
    lengths = np.zeros(pool.counts.shape[1])
    for side in (split, ~split):
        weights = pool.counts[side].sum(axis=0, dtype=np.float64)
        lengths += pool.spread[side].sum(axis=0, dtype=np.float64) / np.maximum(weights, 1e-3) ** 2
    variance: Floats = pool.row_variance * lengths[pool.column_of]
    return variance


def draw_splits(rng: np.random.Generator, size: int, inside: int, count: int) -> NDArray[np.bool_]:
    """Return `count` uniformly random splits with `inside` of `size` sessions on the window's side."""
    splits = np.zeros((count, size), dtype=np.bool_)
    for first in range(0, count, CHUNK):
        keys = rng.random((min(CHUNK, count - first), size), dtype=np.float32)
        chosen = np.argpartition(keys, inside - 1, axis=1)[:, :inside]
        np.put_along_axis(splits[first : first + CHUNK], chosen, True, axis=1)
    return splits
