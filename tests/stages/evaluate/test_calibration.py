import numpy as np
import pytest

from stages.evaluate.calibration import calibrate, make_trie, read_probabilities
from tests.tiny import make_model


def test_the_expected_calibration_error_is_that_of_a_worked_table():
    probabilities = [0.95, 0.95, 0.92, 0.65, 0.61, 0.3]
    right = [True, True, False, True, False, False]
    # Bins 0.9-1.0: 3 rows, mean 0.94, 2/3 right; 0.6-0.7: 2 rows, 0.63, 1/2; 0.2-0.3: 1 row, 0.3, 0.
    expected = (3 * abs(0.94 - 2 / 3) + 2 * abs(0.63 - 0.5) + 1 * abs(0.3 - 0.0)) / 6
    found = calibrate(probabilities, right)
    assert found.ece == pytest.approx(expected, abs=1e-6)
    assert [one.rows for one in found.bins] == [0, 0, 1, 0, 0, 0, 2, 0, 0, 3]
    assert (found.rows, found.accuracy) == (6, 0.5)


def test_certain_and_impossible_answers_are_in_the_outer_bins():
    found = calibrate([1.0, 0.0], [True, False])
    assert (found.bins[0].rows, found.bins[-1].rows, found.ece) == (1, 1, 0.0)


def test_the_probabilities_of_all_answers_sum_to_one_whatever_the_batch():
    import torch

    torch.set_num_threads(1)
    answers = [[5, 6, 1], [5, 7, 1], [5, 1], [9, 1]]  # one is the beginning of two others
    trie, prompt = make_trie(answers), [0, 40, 41, 42]
    together = read_probabilities(make_model(), [(prompt, answer) for answer in answers], trie, 1)
    assert sum(together) == pytest.approx(1.0, abs=1e-5)
    alone = [read_probabilities(make_model(), [(prompt, answer)], trie, 1)[0] for answer in answers]
    assert np.allclose(together, alone, atol=1e-5)
