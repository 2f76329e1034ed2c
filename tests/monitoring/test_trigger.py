from dataclasses import replace

import pytest

from monitoring.trigger import Readiness, decide, find_drift_start
from monitoring.verdicts import DriftTypeVerdict, DriftVerdict, Period
from stages.common.params.loop import TriggerSettings

NOON = 1_764_072_000.0  # 2025-11-25 12:00 UTC
SETTINGS = TriggerSettings(
    drift_types=("input", "quality"), drifted=2, of=3, min_labelled_rows=100, cooldown_hours=12
)


def window(place, *drifted, judged=True):
    drift_types = tuple(DriftTypeVerdict(name, True, 0.001, ()) for name in drifted)
    return DriftVerdict(
        id=f"w{place}",
        model="home",
        version="abc",
        made_at=0.0,
        window=Period(place * 100.0, place * 100.0 + 100, 500, 100),
        reference=None,
        judged=judged,
        why_not=None if judged else "too few rows",
        drifted=bool(drifted),
        drift_types=drift_types,
    )


def decided(verdicts, **changed):
    known = {
        "labelled_rows": 150,
        "since_retraining_s": None,
        "running": False,
        "pinned": None,
    }
    return decide(verdicts, Readiness(**{**known, **changed}), SETTINGS, NOON)


DRIFT = [window(1), window(2, "input"), window(3, "quality")]


def test_two_drifted_windows_of_the_last_three_start_a_retraining():
    decision = decided(DRIFT)
    assert decision.fires
    assert decision.why == "2 of the last 3 judged windows drifted in input or quality"
    assert decision.needs == ()


def test_one_drifted_window_does_not():
    decision = decided([window(1), window(2), window(3, "input")])
    assert not decision.fires
    assert decision.needs == ("1 more drifted window of the next ones",)


def test_old_drift_falls_out_of_the_last_windows():
    assert not decided([window(1, "input"), window(2, "input"), window(3), window(4)]).fires


def test_a_window_that_was_not_judged_neither_counts_nor_breaks_the_row():
    assert decided([window(1, "input"), window(2, judged=False), window(3, "input")]).fires
    assert not decided([window(1, "input"), window(2, "input", judged=False)]).fires


def test_a_question_that_is_not_asked_for_does_not_count():
    assert not decided([window(1, "output"), window(2, "output"), window(3, "service")]).fires


def test_no_windows_at_all_is_no_drift():
    decision = decided([])
    assert not decision.fires
    assert decision.needs == ("2 more drifted windows of the next ones",)


@pytest.mark.parametrize(
    ("changed", "need"),
    [
        ({"labelled_rows": 77}, "23 more labelled rows"),
        ({"labelled_rows": 99}, "1 more labelled row"),
        (
            {"labelled_rows": 40, "excluded": "most of another prompt"},
            "60 more labelled rows (most of another prompt)",
        ),
        ({"since_retraining_s": 9.5 * 3600}, "cooldown until 14:30 UTC"),
        ({"since_retraining_s": 60.0}, "cooldown until 23:59 UTC"),
        ({"since_retraining_s": 0.0}, "cooldown until 2025-11-26 00:00 UTC"),
        ({"running": True}, "the running retraining to end"),
        ({"pinned": "audit"}, "the champion to be unpinned (audit): perennial release unpin"),
    ],
)
def test_what_is_missing_is_named_exactly(changed, need):
    decision = decided(DRIFT, **changed)
    assert not decision.fires
    assert decision.needs == (need,)


def test_exclusions_are_not_named_where_rows_are_enough():
    assert decided(DRIFT, excluded="most of another prompt").needs == ()


def test_everything_that_is_missing_is_named_at_once():
    assert len(decided(DRIFT, labelled_rows=0, running=True, pinned="audit").needs) == 3


def test_the_cooldown_ends_on_the_second():
    assert decided(DRIFT, since_retraining_s=12 * 3600).fires
    assert not decided(DRIFT, since_retraining_s=12 * 3600 - 1).fires


def test_new_traffic_begins_with_the_oldest_drifted_window_that_counts():
    assert find_drift_start(DRIFT, SETTINGS) == 200.0
    assert find_drift_start([window(1, "input"), *[replace(window(p)) for p in (2, 3, 4)]], SETTINGS) is None


def test_the_new_traffic_begins_with_the_first_of_the_drifted_windows_that_lead_up_to_now():
    steady = [window(1), *(window(place, "input") for place in range(2, 9))]
    assert find_drift_start(steady, SETTINGS) == 200.0
    mixed = [window(1, "input"), window(2), window(3), window(4, "input"), window(5), window(6, "input")]
    assert find_drift_start(mixed, SETTINGS) == 400.0
