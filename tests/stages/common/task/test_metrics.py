import numpy as np
import pytest

from stages.common.task.metrics import Metric, compute_perplexity, compute_ratio, compute_share


def test_perplexity_weighs_every_token_alike():
    assert compute_perplexity([10.0, 2.0], [9, 3]).value() == pytest.approx(np.exp(1.0))


def test_a_metric_as_a_share_is_its_value_over_its_scale():
    percent = Metric(np.array([[30.0, 1.0], [50.0, 1.0]]), compute_ratio, 100.0)
    assert percent.as_share().value() == pytest.approx(0.4)
    assert list(percent.as_share().by_row()) == pytest.approx([0.3, 0.5])
    assert compute_share([True, False]).as_share().value() == 0.5
