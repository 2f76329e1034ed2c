import numpy as np
import pytest
from scipy import stats

from stages.common.statistics.intervals import (
    compute_clopper_pearson,
    estimate_difference,
    estimate_interval,
    sum_by_group,
)


def share(sums):
    return sums[..., 0] / sums[..., 1]


def answers(right, groups):
    """Column sums by group of a model that got `right` (0 or 1 a row)."""
    rows = np.stack([np.asarray(right, dtype=float), np.ones(len(right))], axis=1)
    return sum_by_group(rows, groups)


def test_rows_are_summed_by_group():
    assert answers([1, 0, 1, 1], ["b", "a", "b", "a"]).tolist() == [[1.0, 2.0], [2.0, 2.0]]


def test_the_interval_of_single_rows_agrees_with_the_normal_one():
    right = np.arange(400) % 10 < 7
    found = estimate_interval(
        answers(right, [f"{i:03}" for i in range(400)]), share, 0.95, 4000, seed=1, scale=1.0
    )
    half_width = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert found.value == pytest.approx(0.7)
    assert found.low == pytest.approx(0.7 - half_width, abs=0.005)
    assert found.high == pytest.approx(0.7 + half_width, abs=0.005)


def test_rows_that_go_together_give_a_wider_interval():
    right = np.repeat(np.arange(100) % 10 < 7, 4)
    alone = estimate_interval(
        answers(right, [f"{i:03}" for i in range(400)]), share, 0.95, 2000, seed=1, scale=1.0
    )
    together = estimate_interval(
        answers(right, [f"{i // 4:03}" for i in range(400)]), share, 0.95, 2000, seed=1, scale=1.0
    )
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("groups", [10, 40, 100])
def test_intervals_hold_the_truth_about_as_often_as_they_say(groups):
    """400 samples of groups of 4 rows whose chance of a right answer varies by group, mean 0.7."""
    rng = np.random.default_rng(3)
    names = [f"{i // 4:03}" for i in range(4 * groups)]
    held = 0
    for _ in range(400):
        chance = np.repeat(rng.beta(1.4, 0.6, size=groups), 4)
        found = estimate_interval(
            answers(rng.random(4 * groups) < chance, names),
            share,
            0.95,
            300,
            seed=int(rng.integers(1 << 30)),
            scale=1.0,
        )
        held += found.low <= 0.7 <= found.high
    assert held / 400 >= 0.92


def test_intervals_that_ignore_groups_would_miss_the_truth():
    """The reason for drawing groups: where four rows always go together, plain intervals miss a third."""
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        right = np.repeat(rng.random(100) < 0.7, 4)
        found = estimate_interval(
            answers(right, [f"{i:03}" for i in range(400)]), share, 0.95, 300, seed=0, scale=1.0
        )
        held += found.low <= 0.7 <= found.high
    assert held / 300 < 0.8


def test_none_right_still_leaves_room_for_some():
    found = estimate_interval(
        answers(np.zeros(300), [f"{i // 3:03}" for i in range(300)]), share, 0.95, 500, 0, scale=1.0
    )
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 100))


def test_all_right_still_leaves_room_for_doubt():
    found = estimate_interval(
        answers(np.ones(300), [f"{i // 3:03}" for i in range(300)]), share, 0.95, 500, 0, scale=1.0
    )
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 100))


def test_one_group_says_almost_nothing():
    found = estimate_interval(answers([1, 1, 1, 1], ["a"] * 4), share, 0.95, 500, 0, scale=1.0)
    assert found.low < 0.03
    assert found.high == 1.0


def test_a_score_of_another_scale_keeps_it():
    found = estimate_interval(
        answers(np.zeros(100), [str(i) for i in range(100)]), share, 0.95, 500, 0, scale=100.0
    )
    assert found.high == pytest.approx(100 * (1 - 0.025 ** (1 / 100)))


def test_the_exact_interval_is_that_of_scipy():
    for right, trials in ((0, 10), (3, 10), (10, 10), (57, 400)):
        low, high = stats.binomtest(right, trials).proportion_ci(0.95, method="exact")
        assert compute_clopper_pearson(right, trials, 0.95) == (pytest.approx(low), pytest.approx(high))


def test_two_equal_models_do_not_differ():
    same = answers(np.arange(100) % 2, [str(i) for i in range(100)])
    found = estimate_difference(same, same, share, 0.95, 500, 0, scale=1.0)
    assert found.value == 0.0
    assert found.p_value == 1.0
    assert found.low < 0.0 < found.high


def test_a_model_that_is_always_better_gets_the_smallest_p_value():
    groups = [str(i) for i in range(100)]
    found = estimate_difference(
        answers(np.zeros(100), groups), answers(np.ones(100), groups), share, 0.95, 999, 0, scale=1.0
    )
    assert found.value == 1.0
    assert found.p_value == pytest.approx(1 / 1000)
    assert found.low < 1.0 <= found.high + 1e-12


def test_the_p_value_is_that_of_the_exact_sign_test():
    """30 groups differ, 20 of them for the better: the permutation test is then McNemar's exact test."""
    groups = [f"{i:02}" for i in range(60)]
    before = np.r_[np.zeros(20), np.ones(10), np.zeros(30)]
    after = np.r_[np.ones(20), np.zeros(10), np.zeros(30)]
    found = estimate_difference(
        answers(before, groups), answers(after, groups), share, 0.95, 20_000, 0, scale=1.0
    )
    assert found.p_value == pytest.approx(stats.binomtest(20, 30).pvalue, abs=0.01)


def test_chance_alone_is_called_a_difference_as_seldom_as_agreed():
    rng = np.random.default_rng(5)
    groups = [f"{i // 3:03}" for i in range(90)]
    found = 0
    for _ in range(400):
        chance = np.repeat(rng.random(30), 3)
        before, after = (answers(rng.random(90) < chance, groups) for _ in range(2))
        found += (
            estimate_difference(
                before, after, share, 0.95, 199, int(rng.integers(1 << 30)), scale=1.0
            ).p_value
            <= 0.05
        )
    assert found / 400 <= 0.08


def test_the_same_seed_gives_the_same_figures():
    sums = answers(np.arange(90) % 3 == 0, [str(i // 2) for i in range(90)])
    assert estimate_interval(sums, share, 0.9, 500, seed=7) == estimate_interval(
        sums, share, 0.9, 500, seed=7
    )
