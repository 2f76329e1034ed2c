"""Test whether two properties of rows are associated, when rows of one template resemble each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.common.statistics.intervals import Floats, compute_sequential_p_values

# With this many exceedances the p-value is known to about a fifth, and far above any threshold.
ENOUGH_EXCEEDANCES = 30


def compute_cramers_v(table: NDArray[np.int64]) -> float:
    """Return Cramer's V of a contingency table, corrected for bias (Bergsma 2013, J. Korean Stat. Soc. 42).

    The plain V of two independent variables grows with the number of cells over rows: with 42 intents and ten
    origins it would find a tie in pure chance.
    """
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    total = int(table.sum())
    values, outcomes = table.shape
    if total < 2 or min(values, outcomes) < 2:
        return 0.0
    phi2 = max(0.0, _chi2(table) / total - (values - 1) * (outcomes - 1) / (total - 1))
    corrected = [size - (size - 1) ** 2 / (total - 1) for size in (values, outcomes)]
    smaller = min(corrected) - 1
    return min(1.0, math.sqrt(phi2 / smaller)) if smaller > 0 else 0.0


def _chi2(table: NDArray[np.int64]) -> float:
    """Pearson's chi-squared, as n (sum of n_ij^2 / (n_i n_j) - 1)."""
    margins = np.outer(table.sum(axis=1), table.sum(axis=0)).astype(float)
    return float(table.sum() * ((table.astype(float) ** 2 / margins).sum() - 1.0))


def compute_permutation_p(
    values: Sequence[str], outcomes: Sequence[str], clusters: Sequence[str], permutations: int, seed: int
) -> float:
    """Return how often chance alone ties values and outcomes as strongly as seen.

    Rows of one cluster (expansions of one template) share words and mostly the outcome, so rows must not be
    shuffled freely: that would make every tie look certain. Whole clusters of the same size are exchanged,
    and rows within them (multi-level block permutation: Winkler et al. 2015, NeuroImage 123). Where every row
    is its own cluster this is the plain permutation test. Never 0: the observed order is one of the orders.
    """
    value_codes, outcome_codes = encode_names(values), encode_names(outcomes)
    shape = (int(value_codes.max()) + 1, int(outcome_codes.max()) + 1)
    blocks = _blocks_of_equal_size(clusters)

    def tie(shuffled: NDArray[np.int64]) -> float:
        cells = np.bincount(value_codes * shape[1] + shuffled, minlength=shape[0] * shape[1])
        return _chi2(cells.reshape(shape))

    observed = tie(outcome_codes) - 1e-9
    rng = np.random.default_rng(seed)
    shuffled = outcome_codes.copy()

    def count_exceedances(rows: int) -> Floats:
        exceeding = 0.0
        for _ in range(rows):
            for block in blocks:
                exchanged = outcome_codes[block[rng.permutation(len(block))]]
                shuffled[block] = rng.permuted(exchanged, axis=1)
            exceeding += tie(shuffled) >= observed
        return np.array([exceeding])

    return float(
        compute_sequential_p_values(
            count_exceedances, permutations, enough=ENOUGH_EXCEEDANCES, first=ENOUGH_EXCEEDANCES
        )[0]
    )


def encode_names(names: Sequence[str]) -> NDArray[np.int64]:
    """Return each name's place among the sorted different names.

    By a dict: numpy's text has the width of the longest name in every cell, and a name may be a passage.
    """
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.fromiter((places[name] for name in names), dtype=np.int64, count=len(names))


def _blocks_of_equal_size(clusters: Sequence[str]) -> list[NDArray[np.int64]]:
    """Return matrices of row positions, a line a cluster, one matrix for each size of cluster."""
    codes = encode_names(clusters)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    sizes = sorted({len(member) for member in members})
    return [np.stack([member for member in members if len(member) == size]) for size in sizes]


def apply_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979, Scand. J. Statist. 6)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = running
    return corrected
