import numpy as np
import pytest

from monitoring.drift.baseline import prepare_baseline
from monitoring.drift.bins import plan_bins
from monitoring.drift.calibration import estimate_inflation
from monitoring.drift.compare import compare_window, has_drifted
from monitoring.drift.power import count_needed_sessions, explain_too_few_sessions
from monitoring.drift.session_sums import sum_sessions
from monitoring.drift.two_sample_tests import compute_statistics, draw_splits, pool_sessions
from stages.common.params.loop import DriftSettings
from tests.monitoring.drift_tables import COLUMNS, pages, table

SETTINGS = DriftSettings(
    alpha=0.005, min_effect=0.05, permutations=2000, calibration_windows=20, blocks=2000, seed=7
)


@pytest.fixture(scope="module")
def baseline():
    usual = pages(table(1, sessions=400))
    return prepare_baseline(lambda: usual, COLUMNS, SETTINGS, 40)


def check(baseline, tables, settings):
    return compare_window(baseline, sum_sessions(tables, baseline.binning), settings)


def judged(baseline, window, settings=SETTINGS):
    return {each.drift_type: each for each in check(baseline, pages(window), settings)}


def column(verdicts, name):
    return next(c for each in verdicts.values() for c in each.columns if c.column == name)


def test_the_same_traffic_has_not_drifted(baseline):
    verdicts = judged(baseline, table(2, sessions=100))
    assert set(verdicts) == {"input", "quality", "service"}
    assert not has_drifted(verdicts.values())


def test_a_new_language_is_found_named_and_measured(baseline):
    german = np.repeat(np.random.default_rng(3).random(100) < 0.2, 5)
    verdicts = judged(baseline, table(3, sessions=100, language=np.where(german, "de", "en")))
    change = column(verdicts, "language")
    assert verdicts["input"].drifted and change.drifted and change.p_value < 0.001
    assert change.before.startswith("de 0 %")
    assert f"de 0 % -> {100 * german.mean():.0f} %" in change.summary
    assert change.summary.endswith("of 500 prompts")
    assert abs(change.effect - german.mean()) < 0.05
    assert not verdicts["quality"].drifted


def test_a_quality_that_gets_better_is_no_drift_and_one_that_gets_worse_is(baseline):
    better = judged(baseline, table(4, sessions=100, valid=np.ones(500)))
    worse = judged(baseline, table(4, sessions=100, valid=(np.arange(500) % 5 > 0).astype(float)))
    assert not better["quality"].drifted and column(better, "valid").effect == 0.0
    assert worse["quality"].drifted and column(worse, "valid").summary.endswith("80 % of 500 answers")


def test_a_sure_change_below_the_least_effect_does_not_count(baseline):
    window = table(5, sessions=100, length=table(5, sessions=100)["length"].to_numpy() + 6)
    assert judged(baseline, window)["input"].drifted
    large = SETTINGS.model_copy(update={"min_effect": 0.9})
    change = column(judged(baseline, window, large), "length")
    assert change.p_value < 0.001 and not change.drifted


def test_new_wording_is_found(baseline):
    rng = np.random.default_rng(9)
    vectors = rng.standard_normal(64) * 1.5 + rng.standard_normal((500, 64))
    assert judged(baseline, table(6, sessions=100, wording_vector=vectors))["input"].drifted


def test_the_service_is_reported_and_never_decides(baseline):
    verdicts = judged(baseline, table(7, sessions=100, wait_s=np.full(500, 9.0)))
    assert verdicts["service"].drifted
    assert not has_drifted(verdicts.values())


def test_one_busy_session_is_no_drift(baseline):
    # 300 of 500 rows are German, all of one session: row by row that would be beyond doubt.
    window = table(8, sessions=40, each=5)
    bot = table(9, sessions=1, each=300, language=np.array(["de"] * 300))
    verdicts = {each.drift_type: each for each in check(baseline, [window, bot], SETTINGS)}
    assert not column(verdicts, "language").drifted


def test_a_column_with_too_few_values_is_not_judged(baseline):
    thumbs = np.full(500, np.nan)
    thumbs[:15] = 0.0
    change = column(judged(baseline, table(10, sessions=100, valid=thumbs)), "valid")
    assert change.p_value == 1.0 and not change.drifted

    assert not change.judged and column(judged(baseline, table(10, sessions=100)), "valid").judged


@pytest.fixture(scope="module")
def coin_baseline():
    """A reference half of whose answers are valid."""
    coins = np.random.default_rng(30).permutation(2000) < 1000
    usual = pages(table(30, sessions=400, valid=coins.astype(float)))
    return prepare_baseline(lambda: usual, COLUMNS, SETTINGS, 40)


@pytest.mark.parametrize(("part", "least", "most"), [(1.0, 5, 10), (0.25, 0, 3)])
def test_a_change_of_the_size_that_is_stated_is_mostly_found_and_a_quarter_of_it_hardly(
    coin_baseline, part, least, most
):
    found = 0
    for seed in range(31, 41):
        random = np.random.default_rng(seed).random(300)
        valid = (random < 0.5).astype(float)
        stated = judged(coin_baseline, table(seed, sessions=60, valid=valid))["quality"].smallest_change
        valid = (random < 0.5 - part * stated).astype(float)
        found += judged(coin_baseline, table(seed, sessions=60, valid=valid))["quality"].drifted
    assert 0.05 < stated < 0.25
    assert least <= found <= most


def test_a_drift_type_without_a_column_that_could_be_judged_has_no_power(baseline):
    thumbs = np.full(500, np.nan)
    thumbs[:15] = 0.0
    verdicts = judged(baseline, table(10, sessions=100, valid=thumbs))
    assert verdicts["quality"].smallest_change is None and verdicts["input"].smallest_change < 0.3


@pytest.mark.parametrize("sessions", [10, 16])
def test_as_many_sessions_as_are_needed_show_a_complete_change(baseline, sessions):
    rows = 4 * sessions
    window = table(41, sessions=sessions, each=4, language=np.array(["de"] * rows), valid=np.zeros(rows))
    verdicts = judged(baseline, window)
    assert verdicts["input"].drifted and verdicts["quality"].drifted
    assert explain_too_few_sessions(sessions, 400, SETTINGS.alpha / 3) is None


def test_the_smaller_alpha_is_the_more_sessions_are_needed():
    assert count_needed_sessions(0, 0.0025) == count_needed_sessions(4000, 0.0025) == 10
    assert count_needed_sessions(10, 1e-6) == 13  # of 23 sessions 1.1 million splits, of 22 only 0.6


def test_a_window_or_column_without_values_is_reported_and_not_judged(baseline):
    change = column(judged(baseline, table(11, sessions=100, length=np.full(500, np.nan))), "length")
    assert change.summary == "length: no value in the window" and change.p_value == 1.0


def test_the_same_window_gives_the_same_verdict(baseline):
    window = table(12, sessions=100)
    assert check(baseline, pages(window), SETTINGS) == check(baseline, pages(window, 500), SETTINGS)


def test_shuffled_sessions_of_other_lengths_give_statistics_of_the_right_size():
    # 100 users with 20 rows in the reference and 5 in the window: ratios of about 1 on average all the same.
    columns = tuple(one for one in COLUMNS if one.name == "valid")
    means = []
    for seed in range(60):
        usual, now = table(seed, sessions=100, each=20), table(1000 + seed, sessions=100, each=5)
        by = plan_bins([usual], columns, 40, 2000, 7)
        pool = pool_sessions(by, sum_sessions([usual], by), sum_sessions([now], by))
        two_sided = compute_statistics(pool, np.arange(200)[None, :] >= 100)[0, 0]
        means.append(two_sided)
    # A flag that counts one way only: half of the squared deviates, whose mean is 1.
    assert 0.2 < np.mean(means) < 0.95


def test_random_splits_hold_the_right_number_of_sessions():
    splits = draw_splits(np.random.default_rng(1), 40, 7, 600)
    assert (splits.sum(axis=1) == 7).all()
    assert 0.1 < splits.mean(axis=0).min() < splits.mean(axis=0).max() < 0.25


def test_a_reference_that_swings_raises_the_bar_and_a_steady_one_hardly():
    columns = tuple(one for one in COLUMNS if one.name in ("length", "wait_s"))
    swing = 10 * np.sin(np.arange(1500) / 150)
    lengths = np.round(np.random.default_rng(1).normal(30, 6, 1500) + swing)
    usual = table(1, sessions=300, columns=columns, length=lengths)
    by = plan_bins([usual], columns, 40, 2000, 7)
    factors = estimate_inflation(pool_sessions(by, sum_sessions([usual], by)), 0.25, 20, seed=7)
    assert factors[0] > 3.0
    assert factors[1] < 2.0
    assert (estimate_inflation(pool_sessions(by, sum_sessions([usual], by)), 0.25, 0, seed=7) == 1.0).all()
