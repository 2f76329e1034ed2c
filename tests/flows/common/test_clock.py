from dataclasses import replace

import pytest

from flows.common import clock
from flows.common.clock import Moment, compute_elapsed_s, read_moment

BEGAN = Moment(1_800_000_000.0, "boot", 100.0)
YEAR_S = 365 * 86_400.0


@pytest.mark.parametrize("set_by_s", [-YEAR_S, 0.0, YEAR_S])
def test_a_clock_that_is_set_changes_no_time_that_passed(set_by_s):
    assert compute_elapsed_s(BEGAN, replace(BEGAN, at=BEGAN.at + set_by_s, up_s=107.0)) == 7.0


def test_across_a_start_of_the_machine_the_clock_counts_and_never_backwards():
    later = Moment(BEGAN.at + 60.0, "another", 1.0)
    assert compute_elapsed_s(BEGAN, later) == 60.0
    assert compute_elapsed_s(BEGAN, replace(later, at=BEGAN.at - YEAR_S)) == 0.0


def test_where_no_one_names_the_start_of_the_machine_the_clock_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "BOOT_ID", tmp_path / "none")
    assert compute_elapsed_s(read_moment(5.0), read_moment(65.0)) == 60.0


def test_two_looks_of_one_machine_are_of_one_start():
    first, second = read_moment(), read_moment()
    assert first.boot == second.boot and second.up_s >= first.up_s
