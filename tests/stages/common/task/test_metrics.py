import numpy as np
import pytest

from stages.common.task.metrics import Metric, perplexity, ratio, share


def test_perplexity_weighs_every_token_alike():
    assert perplexity([10.0, 2.0], [9, 3]).value() == pytest.approx(np.exp(1.0))


def test_a_metric_as_a_share_is_its_value_over_its_scale():
    percent = Metric(np.array([[30.0, 1.0], [50.0, 1.0]]), ratio, 100.0)
    assert percent.as_share().value() == pytest.approx(0.4)
    assert list(percent.as_share().by_row()) == pytest.approx([0.3, 0.5])
    assert share([True, False]).as_share().value() == 0.5
