"""The statistics of balance, against known values and against simulated chance."""

import tracemalloc

import numpy as np
import pytest

from stages.common.statistics.association import (
    apply_holm,
    compute_cramers_v,
    compute_permutation_p,
    encode_names,
)
from stages.common.statistics.intervals import compute_wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_agrees_with_published_values(successes, trials, low, high):
    assert compute_wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_cramers_v_is_one_for_a_full_tie_and_zero_for_none():
    assert compute_cramers_v(np.diag([50, 50, 50])) == pytest.approx(1.0, abs=0.01)
    assert compute_cramers_v(np.full((3, 4), 25)) == 0.0


def test_cramers_v_with_one_value_or_no_rows_is_zero():
    assert compute_cramers_v(np.array([[10, 20, 30]])) == 0.0
    assert compute_cramers_v(np.zeros((2, 2), dtype=int)) == 0.0


def test_cramers_v_ignores_empty_rows_and_columns():
    table = np.array([[30, 10], [12, 28]])
    padded = np.array([[30, 0, 10], [0, 0, 0], [12, 0, 28]])
    assert compute_cramers_v(padded) == compute_cramers_v(table)


def test_cramers_v_corrects_what_the_plain_one_finds_in_chance():
    """Independent variables with many cells: the plain V is far from 0, the corrected one is not."""
    from scipy.stats.contingency import association

    rng = np.random.default_rng(1)
    plain, corrected = [], []
    for _ in range(100):
        table = np.zeros((10, 20), dtype=int)
        np.add.at(table, (rng.integers(0, 10, 300), rng.integers(0, 20, 300)), 1)
        plain.append(association(table, method="cramer"))
        corrected.append(compute_cramers_v(table))
    assert np.mean(plain) > 0.2
    assert np.mean(corrected) < 0.05


def test_cramers_v_finds_the_strength_that_a_large_sample_has():
    from scipy.stats.contingency import association

    table = np.array([[3000, 1000], [1500, 2500]])
    assert compute_cramers_v(table) == pytest.approx(association(table, method="cramer"), abs=0.005)


def test_a_permutation_test_of_independent_rows_agrees_with_chi_squared():
    from scipy.stats import chi2_contingency

    table = np.array([[60, 40], [45, 55]])
    values = [v for v in (0, 1) for o in (0, 1) for _ in range(table[v, o])]
    outcomes = [o for v in (0, 1) for o in (0, 1) for _ in range(table[v, o])]
    found = compute_permutation_p(
        [str(v) for v in values], [str(o) for o in outcomes], [str(n) for n in range(200)], 5000, 1
    )
    assert found == pytest.approx(chi2_contingency(table, correction=False).pvalue, abs=0.02)


def clustered(rng, tie, clusters=60, size=8):
    """Rows in clusters that share value and outcome; with `tie` the value decides the outcome as often."""
    values, outcomes, names = [], [], []
    for cluster in range(clusters):
        value = rng.integers(0, 2)
        outcome = value if rng.random() < tie else rng.integers(0, 2)
        values += [str(value)] * size
        outcomes += [str(outcome)] * size
        names += [str(cluster)] * size
    return values, outcomes, names


def test_the_test_keeps_its_level_where_rows_come_in_clusters():
    """Nothing is tied: at level 0.05 about 5 of 100 may be found; rows taken as independent find most."""
    rng = np.random.default_rng(2)
    samples = [clustered(rng, tie=0.0) for _ in range(100)]
    by_cluster = [compute_permutation_p(v, o, c, 199, seed) for seed, (v, o, c) in enumerate(samples)]
    by_row = [compute_permutation_p(v, o, [str(n) for n in range(len(v))], 199, 0) for v, o, _ in samples]
    assert sum(p <= 0.05 for p in by_cluster) <= 10
    assert sum(p <= 0.05 for p in by_row) >= 40


def test_a_real_tie_between_clusters_is_found():
    values, outcomes, clusters = clustered(np.random.default_rng(3), tie=0.7)
    assert compute_permutation_p(values, outcomes, clusters, 999, 1) < 0.01


def test_a_tie_within_clusters_is_found_too():
    rng = np.random.default_rng(4)
    values = [str(v) for v in rng.integers(0, 2, 400)]
    outcomes = [v if rng.random() < 0.4 else str(rng.integers(0, 2)) for v in values]
    assert compute_permutation_p(values, outcomes, [str(n // 40) for n in range(400)], 999, 1) < 0.01


def test_the_same_seed_gives_the_same_p_value():
    values, outcomes, clusters = clustered(np.random.default_rng(5), tie=0.2)
    assert compute_permutation_p(values, outcomes, clusters, 499, 7) == compute_permutation_p(
        values, outcomes, clusters, 499, 7
    )


def test_holm_agrees_with_the_worked_example():
    assert apply_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert apply_holm([]) == []


def test_a_name_as_long_as_a_passage_takes_no_memory_in_every_row():
    names = ["passage " * 2000, *(f"group {number % 50}" for number in range(20_000))]
    tracemalloc.start()
    try:
        codes = encode_names(names)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000  # bytes; an array of text of that width has 1.3 GB
    order = {name: code for code, name in enumerate(sorted(set(names)))}
    assert codes.tolist() == [order[name] for name in names]
