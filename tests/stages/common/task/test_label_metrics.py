import numpy as np
import pytest

from stages.common.task.label_metrics import count_confusions, list_classes, score_f1

# scikit-learn 1.5: f1_score and precision_recall_fscore_support(expected, answered, labels=[a, b, c]).
EXPECTED = ["a", "a", "a", "a", "b", "b", "b", "c", "c", "c"]
ANSWERED = ["a", "a", "b", None, "b", "b", "a", "c", "a", "b"]
TABLE = {"a": (2 / 4, 2 / 4), "b": (2 / 4, 2 / 3), "c": (1 / 1, 1 / 3)}


def f1(precision, recall):
    return 2 * precision * recall / (precision + recall)


def test_precision_recall_and_f1_of_each_class_are_those_of_the_table():
    found = {one.name: one for one in list_classes(ANSWERED, EXPECTED)}
    for name, (precision, recall) in TABLE.items():
        assert (found[name].precision, found[name].recall) == pytest.approx((precision, recall))
        assert found[name].f1 == pytest.approx(f1(precision, recall))
    assert {name: one.rows for name, one in found.items()} == {"a": 4, "b": 3, "c": 3}
    assert {name: one.answered for name, one in found.items()} == {"a": 4, "b": 4, "c": 1}


def test_macro_f1_counts_classes_alike_and_weighted_f1_by_their_rows():
    each = [f1(*pair) for pair in TABLE.values()]
    metrics = score_f1(ANSWERED, EXPECTED)
    assert metrics["macro_f1"].value() == pytest.approx(np.mean(each))
    assert metrics["weighted_f1"].value() == pytest.approx(np.average(each, weights=[4, 3, 3]))


def test_a_class_that_a_resample_misses_is_excluded_from_the_mean():
    metric = score_f1(["a", "b"], ["a", "b"])["macro_f1"]
    only_a = metric.columns[:1].sum(axis=0)
    assert float(metric.statistic(only_a)) == 1.0


def test_a_class_that_no_reference_has_is_in_the_table_and_in_no_mean():
    assert score_f1(["x", "a"], ["a", "a"])["macro_f1"].value() == pytest.approx(f1(1.0, 0.5))
    assert [one.name for one in list_classes(["x", "a"], ["a", "a"])] == ["a", "x"]


def test_confusions_count_wrong_classes_and_answers_without_one():
    answered = ["Off", "Off", None, "On"]
    assert count_confusions(answered, ["On"] * 4) == [("On", "Off", 2), ("On", "(invalid)", 1)]
