import numpy as np
import pyarrow as pa
import pytest

from monitoring.drift.bins import OTHER, plan_bins
from monitoring.drift.session_sums import sum_sessions
from tests.monitoring.drift_tables import COLUMNS, pages, table


def planned(whole, columns=COLUMNS, max_categories=40, max_sessions=2000):
    return plan_bins(pages(whole), columns, max_categories, max_sessions, seed=7)


def summed(whole, by, rows=128):
    return sum_sessions(pages(whole, rows), by)


def part(by, name):
    place = next(place for place, each in enumerate(by.columns) if each.column.name == name)
    return slice(by.starts[place], by.starts[place + 1]), by.columns[place]


def test_totals_are_the_sums_over_sessions_and_do_not_depend_on_the_pages():
    whole = table(1)
    by = planned(whole)
    one, other = summed(whole, by), summed(whole, by, rows=999)
    np.testing.assert_allclose(one.sums.sum(axis=0), one.totals, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(one.sums, other.sums, rtol=1e-4, atol=1e-4)
    assert (one.rows, one.sessions, one.start, one.end) == (1000, 200, 0.0, 999.0)
    assert one.session_rows.sum() == 1000


def test_bins_of_a_number_count_every_value_once_and_the_middle_lies_at_the_median():
    whole = table(1)
    by = planned(whole)
    bins, each = part(by, "length")
    counts = summed(whole, by).totals[bins]
    assert counts.sum() == 1000
    below = counts[: np.searchsorted(each.edges, np.median(whole["length"].to_numpy())) + 1].sum()
    assert below == (whole["length"].to_numpy() <= np.median(whole["length"].to_numpy())).sum()


def test_null_and_not_finite_values_are_excluded_and_not_taken_for_zero():
    lengths = np.full(1000, 30.0)
    lengths[:100], lengths[100] = np.nan, np.inf
    whole = table(1, length=lengths, valid=np.where(np.arange(1000) < 400, np.nan, 1.0))
    by = planned(whole)
    result = summed(whole, by)
    values = {each.column.name: value for each, value in zip(by.columns, result.values, strict=True)}
    assert values["length"] == 899
    assert values["valid"] == 600
    assert result.totals[part(by, "valid")[0]] == 600


def test_a_class_of_few_sessions_shares_the_bin_of_unseen_classes():
    usual = np.array(["en"] * 960 + ["fr"] * 40, dtype=object)
    usual[:4] = "xx"  # one session
    whole = table(1, language=usual)
    by = planned(whole)
    bins, each = part(by, "language")
    assert each.categories == ("en", "fr")
    assert summed(whole, by).totals[bins].tolist() == [956.0, 40.0, 4.0]
    window = table(2, language=np.array(["en"] * 900 + ["de"] * 90 + [OTHER] * 10))
    result = summed(window, by)
    assert result.totals[bins].tolist() == [900.0, 0.0, 100.0]
    assert result.others["language"] == {"de": 90, OTHER: 10}


def test_only_the_most_frequent_classes_get_bins():
    whole = table(1, language=np.array([f"c{place % 10}" for place in range(1000)]))
    assert len(part(planned(whole, max_categories=3), "language")[1].categories) == 3


def test_a_reference_without_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        plan_bins([], COLUMNS, 40, 100, seed=7)


def test_a_column_without_any_value_is_planned_and_summed():
    whole = table(1, length=np.full(1000, np.nan))
    by = planned(whole)
    assert summed(whole, by).values[0] == 0
    assert summed(table(2), by).values[0] == 1000


def test_beyond_the_most_sessions_a_fixed_sample_is_kept_whole():
    whole = table(3, sessions=3000, each=4)
    by = planned(whole, max_sessions=100)
    result = summed(whole, by)
    assert len(result.sums) == 100
    assert (result.session_rows == 4).all()  # no session is torn
    assert result.rows == 12_000
    assert result.values[0] == 12_000  # totals know all rows
    assert 2000 < result.sessions < 4500  # an estimate, with a standard error of a tenth
    again = summed(whole, by, rows=1000)
    np.testing.assert_allclose(result.sums, again.sums, rtol=1e-4, atol=1e-4)


def test_sessions_lie_in_order_of_their_first_row():
    early, late = table(1, sessions=20, first_at=500.0), table(2, sessions=20, first_at=0.0)
    by = planned(early)
    together = sum_sessions([early, late], by)
    apart = sum_sessions([late], by)
    np.testing.assert_allclose(together.sums[:20], apart.sums, rtol=1e-5)


def test_sums_are_bounded_whatever_the_rows():
    by = planned(table(1), max_sessions=50)
    sizes = []
    for sessions in (100, 2000):
        result = summed(table(5, sessions=sessions), by)
        sizes.append(result.sums.nbytes + sum(rows.nbytes for rows, _ in result.samples.values()))
    assert sizes[1] <= sizes[0] * 2.01  # the sample of 1,000 vectors fills up, and that is all


def test_a_quarter_of_the_sessions_is_what_novelty_is_measured_from_and_has_none_itself():
    whole = table(1)
    by = planned(whole)
    place = next(place for place, each in enumerate(by.columns) if each.source)
    assert by.columns[place].column.name == "wording_novelty"
    assert by.columns[place].column.drift_type == "input"
    counts = summed(whole, by).counts[:, place]
    assert set(counts.tolist()) == {0.0, 5.0}
    assert 0.6 < (counts > 0).mean() < 0.9


def test_an_empty_table_changes_nothing():
    whole = table(1)
    by = planned(whole)
    empty = pa.Table.from_batches([], schema=whole.schema)
    assert sum_sessions([empty, whole, empty], by).rows == 1000
    assert sum_sessions([empty], by).rows == 0
