import pytest
from scipy.stats import binomtest, norm

from stages.common.statistics.intervals import Interval
from stages.common.statistics.sizes import (
    choose_max_test_rows,
    choose_min_rows,
    choose_min_test_rows,
    choose_min_train_rows,
    describe_resolution,
)


def test_the_smallest_test_is_the_first_that_can_be_significant():
    rows = choose_min_test_rows("auto")
    assert binomtest(rows, rows).pvalue < 0.05 < binomtest(rows - 1, rows - 1).pvalue


def test_training_needs_a_row_of_each_class():
    assert choose_min_train_rows("auto", 0) == 10
    assert choose_min_train_rows("auto", 77) == 77


@pytest.mark.parametrize("classes", [0, 6, 77])
def test_the_least_rows_give_both_sides_enough(classes):
    rows = choose_min_rows("auto", 0.15, 0.04, classes)
    assert rows * 0.15 >= choose_min_test_rows("auto")
    assert rows * 0.81 >= choose_min_train_rows("auto", classes)
    assert rows <= 60 or classes == 77


def test_the_largest_test_has_an_interval_of_two_points_at_its_widest():
    rows = choose_max_test_rows("auto")
    interval = binomtest(rows // 2, rows).proportion_ci(method="wilson")
    assert (interval.high - interval.low) / 2 == pytest.approx(0.02, abs=2e-4)


def test_a_number_overrides_every_rule():
    assert choose_min_test_rows(300) == choose_min_train_rows(300, 9) == choose_max_test_rows(300) == 300
    assert choose_min_rows(300, 0.15, 0.04, 9) == 300
    assert choose_max_test_rows(None) is None


def test_the_detectable_difference_is_that_of_the_normal_approximation():
    error = 0.02
    half = norm.ppf(0.975) * error
    found = describe_resolution("accuracy", Interval(0.8, 0.8 - half, 0.8 + half), 1.0, 0.95, 400, ["a", "b"])
    assert found.width == pytest.approx(2 * half, abs=1e-6)
    assert found.detectable == pytest.approx((norm.ppf(0.975) + norm.ppf(0.8)) * 2**0.5 * error, abs=1e-6)
    assert "400 test rows in 2 groups" in found.statement and "7.9 points" in found.statement


def test_a_tiny_test_sees_nothing_and_says_so():
    found = describe_resolution("accuracy", Interval(0.5, 0.0, 1.0), 1.0, 0.95, 6, list("abcdef"))
    assert found.detectable == 1.0
