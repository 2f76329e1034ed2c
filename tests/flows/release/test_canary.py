"""The canary and the bake period: as good, worse, and which requests count; read from a real event store."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from flows.common.clock import Moment
from flows.release import canary, comparison
from flows.release.canary import ANALYSES, Trial, analyse, judge_bake, judge_canary
from flows.release.outcomes import RequestOutcome, read_outcomes
from services.events import Feedback, open_store
from services.versions.aliases import ALIASES, Aliases, Challenger, write_aliases
from stages.common.artifacts import read_json
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from tests.exchanges import EXCHANGE
from tests.services.serving import ROOT

PARAMS = load_params(ROOT / "params.yaml")
SETTINGS = PARAMS.flows.retrain.canary
NEW, OLD = f"m:{'b' * 12}", f"m:{'a' * 12}"


def traffic(count, *, users, start=0.0, step=1.0, bad=0.0, prefix="u", seed=0, field="corrected"):
    """Return outcomes of users who ask several times each, with habits of their own."""
    rng = np.random.default_rng(seed)
    habit = rng.beta(2, 2, size=users) * 2 * bad if bad else np.zeros(users)
    found = []
    for n in range(count):
        user, at = int(rng.integers(users)), start + n * step
        hit = rng.random() < habit[user]
        found.append(
            RequestOutcome(
                at,
                f"{prefix}{user}",
                failed=hit and field == "failed",
                valid=not (hit and field == "valid"),
                thumb_down_at=at + 1 if hit and field == "thumb_down" else None,
                corrected_at=at + 1 if hit and field == "corrected" else None,
            )
        )
    return found


def judged(new, old, *, kind="canary", needed=100, now=6000.0, since=0.0, settings=SETTINGS):
    trial = Trial(kind, NEW, OLD, since, since, waited_s=now - since, needed=needed, settle_s=5.0)
    return analyse(trial, new, old, settings, now)


def test_a_challenger_as_good_as_the_champion_is_good_once_enough_have_asked():
    verdict = judged(traffic(100, users=12, bad=0.1), traffic(400, users=48, bad=0.1, prefix="o", seed=1))
    assert (verdict.state, verdict.requests, verdict.analyses) == ("good", 100, len(ANALYSES))
    assert {criterion.name for criterion in verdict.criteria} == {
        "failed",
        "invalid",
        "thumb_down",
        "corrected",
    }
    assert all(criterion.passed and criterion.p_value > 0.01 for criterion in verdict.criteria)


@pytest.mark.parametrize("field", ["failed", "valid", "thumb_down", "corrected"])
def test_a_challenger_that_is_much_worse_is_bad_whatever_is_worse(field):
    worse = traffic(100, users=15, bad=0.6, field=field)
    verdict = judged(worse, traffic(400, users=60, bad=0.05, prefix="o", seed=1, field=field))
    assert verdict.state == "bad"
    (criterion,) = [criterion for criterion in verdict.criteria if not criterion.passed]
    assert criterion.name == {"valid": "invalid"}.get(field, field)
    assert criterion.value > criterion.baseline and criterion.summary in verdict.summary


def test_a_disaster_ends_at_the_first_analysis():
    failing = [replace(one, failed=True) for one in traffic(25, users=10)]
    verdict = judged(failing, traffic(100, users=40, prefix="o", step=0.2))
    assert (verdict.state, verdict.analyses) == ("bad", 1)


def test_a_better_challenger_is_never_bad():
    better = traffic(100, users=15, bad=0.02)
    assert judged(better, traffic(400, users=60, bad=0.5, prefix="o", seed=1)).state == "good"


def test_two_users_are_too_few_to_deal_and_their_failing_requests_still_count():
    failing = [replace(one, failed=True) for one in traffic(100, users=1)]
    assert judged(failing, traffic(100, users=1, prefix="o")).state == "bad"


def test_too_few_requests_are_waited_for_and_feedback_has_time_to_come():
    some, others = traffic(20, users=5), traffic(100, users=40, prefix="o", step=0.2)
    assert judged(some, others).summary == "20 of 100 requests"
    full = traffic(100, users=12)
    assert judged(full, others, now=full[-1].at + 4).state == "wait"
    assert judged(full, others, now=full[-1].at + 6).state == "good"


def test_without_the_champions_traffic_there_is_nothing_to_compare_with():
    new = traffic(100, users=12)
    assert judged(new, traffic(10, users=5, prefix="o"), now=200.0).state == "wait"
    assert judged(new, traffic(30, users=5, prefix="o", start=101.0), now=200.0).state == "good"


def test_the_data_of_an_analysis_does_not_depend_on_when_it_is_run():
    new, old = traffic(100, users=12, bad=0.2), traffic(400, users=48, prefix="o", bad=0.1, seed=1, step=0.25)
    late = [replace(one, thumb_down_at=5000.0) for one in new]  # given long after the last analysis
    assert judged(new, old).criteria == judged(late, old).criteria


@pytest.mark.parametrize(("on_timeout", "state"), [("promote", "good"), ("reject", "bad")])
def test_a_canary_with_too_few_users_ends_at_its_timeout(on_timeout, state):
    settings = SETTINGS.model_copy(update={"on_timeout": on_timeout, "max_minutes": 10.0})
    few = traffic(5, users=5)
    assert judged(few, [], now=599.0, settings=settings).state == "wait"
    verdict = judged(few, [], now=601.0, settings=settings)
    assert (verdict.state, verdict.timed_out) == (state, True)
    assert f"on_timeout is {on_timeout}" in verdict.summary


def test_the_requests_before_the_timeout_can_still_reject_it():
    settings = SETTINGS.model_copy(update={"on_timeout": "promote", "max_minutes": 10.0})
    failing = [replace(one, failed=True) for one in traffic(20, users=10)]
    verdict = judged(failing, traffic(100, users=40, prefix="o"), now=700.0, settings=settings)
    assert (verdict.state, verdict.timed_out) == ("bad", False)


def test_feedback_that_had_longer_to_come_does_not_make_the_former_champion_worse():
    """Half of the old requests were corrected a day later; the new ones are a minute old."""
    new = traffic(100, users=20, start=100_000.0)
    slow = [
        replace(one, corrected_at=one.at + 86_400.0 if n % 2 else None)
        for n, one in enumerate(traffic(100, users=20))
    ]
    verdict = judged(new, slow, kind="bake", now=100_200.0, since=100_000.0)
    (corrected,) = [criterion for criterion in verdict.criteria if criterion.name == "corrected"]
    assert (verdict.state, corrected.baseline) == ("good", 0.0)


def test_a_good_one_is_sent_back_as_rarely_as_alpha_says():
    """At an alpha of 0.2: of 60 trials 12 are expected at most, and more than 20 once in 200 times."""
    settings = SETTINGS.model_copy(update={"alpha": 0.2})
    alarms = 0
    for seed in range(60):
        new = traffic(60, users=12, bad=0.2, seed=seed)
        old = traffic(180, users=36, bad=0.2, prefix="o", seed=1000 + seed, step=1 / 3)
        alarms += judged(new, old, needed=60, settings=settings).state == "bad"
    assert alarms <= 20


@pytest.mark.parametrize("bad", [0.1, 0.2, 0.25, 0.3, 0.6])
def test_permutations_that_end_early_decide_as_all_of_them(bad, monkeypatch):
    new, old = traffic(100, users=15, bad=bad), traffic(400, users=60, bad=0.1, prefix="o", seed=1, step=0.2)
    early = judged(new, old)
    monkeypatch.setattr(comparison, "FIRST_PERMUTATIONS", comparison.MAX_PERMUTATIONS)
    every = judged(new, old)
    assert (early.state, early.analyses) == (every.state, every.analyses)
    assert [one.passed for one in early.criteria] == [one.passed for one in every.criteria]


URL = "sqlite:///events.db"


@pytest.fixture
def record(tmp_path):
    """Return a function that records exchanges with feedback in the store of a checkout at `tmp_path`."""

    def add(rows):
        kept = open_store(
            f"sqlite:///{tmp_path / 'events.db'}", queue_size=1000, group_rows=256, group_wait_s=0.0
        )
        try:
            asyncio.run(_record(kept, rows))
        finally:
            kept.close()

    return add


async def _record(kept, rows):
    await asyncio.gather(*(kept.record(exchange) for exchange, _ in rows))
    await asyncio.gather(*(kept.record(one) for _, given in rows for one in given))


def exchange(n, at, tag, role, status=200, user=None, answer="on"):
    answered = status == 200
    return replace(
        EXCHANGE,
        request_id=f"r{n:05}",
        received_at=at,
        user=user or f"u{n % 20}",
        role=role,
        version=tag.partition(":")[2],
        status=status,
        answer=answer if answered else None,
        finish_reason="stop" if answered else None,
        valid_output=True if answered else None,
    )


def test_outcomes_are_read_with_feedback_and_without_rejected_requests_and_shadows(tmp_path, record):
    thumb = Feedback("f1", "r00001", 50.0, None, -1, None, None)
    same = Feedback("f2", "r00002", 51.0, None, None, "on", None)  # a correction that corrects nothing
    other = Feedback("f3", "r00002", 52.0, None, None, "off", None)
    record(
        [
            (exchange(1, 10.0, NEW, "challenger"), [thumb]),
            (exchange(2, 11.0, NEW, "challenger"), [same, other]),
            (exchange(3, 12.0, NEW, "challenger", status=500), []),
            (exchange(4, 13.0, NEW, "challenger", status=429), []),
            (exchange(5, 14.0, NEW, "shadow"), []),
            (exchange(6, 15.0, OLD, "champion"), []),
        ]
    )
    found = list(read_outcomes(f"sqlite:///{tmp_path / 'events.db'}", 0.0, 100.0, NEW, "challenger"))
    assert [(one.at, one.failed, one.valid, one.thumb_down_at, one.corrected_at) for one in found] == [
        (10.0, False, True, 50.0, None),
        (11.0, False, True, None, 52.0),
        (12.0, True, None, None, None),
    ]


def vote(n, at, thumb=None, correction=None, key=None):
    return Feedback(f"f{n}-{at}-{key}", f"r{n:05}", at, key, thumb, correction, None)


def of(rows, tmp_path, record):
    record(rows)
    return list(read_outcomes(f"sqlite:///{tmp_path / 'events.db'}", 0.0, 100.0, NEW, "challenger"))


def test_only_the_users_own_newest_feedback_counts(tmp_path, record):
    asked = [replace(exchange(n, float(n), NEW, "challenger", user="u"), key_id="a") for n in range(6)]
    given = [
        [vote(0, 50.0, -1, key="a"), vote(0, 51.0, 1, key="a")],  # taken back
        [vote(1, 50.0, 1, key="a"), vote(1, 51.0, -1, key="a")],
        [vote(2, 50.0, -1, key="mallory")],
        [vote(3, 50.0, -1)],
        [vote(4, 50.0, None, "off", "a"), vote(4, 51.0, None, "on", "a")],  # it was right after all
        [vote(5, 50.0, None, "off", "mallory")],
    ]
    found = of(list(zip(asked, given, strict=True)), tmp_path, record)
    assert [(one.thumb_down_at, one.corrected_at) for one in found] == [
        (None, None),
        (51.0, None),
        *[(None, None)] * 4,
    ]
    early = [one.known_at(50.5) for one in found]
    assert [(one.thumb_down_at, one.corrected_at) for one in early] == [
        (50.0, None),
        *[(None, None)] * 3,
        (None, 50.0),
        (None, None),
    ]


def test_users_of_one_name_under_two_keys_are_two(tmp_path, record):
    asked = [exchange(n, float(n), NEW, "challenger", user="u1") for n in range(2)]
    one, other = of([(replace(e, key_id=k), []) for e, k in zip(asked, "ab", strict=True)], tmp_path, record)
    assert one.assignment_key != other.assignment_key


def voting(count, key, *, users, field, bad=True, start=0.0):
    """Return outcomes of a key's users, who each ask once or more and vote against every answer."""
    return [
        RequestOutcome(
            start + n,
            f"{key}/u{n % users}",
            failed=False,
            valid=True,
            thumb_down_at=start + n + 1 if bad and field == "thumb_down" else None,
            corrected_at=start + n + 1 if bad and field == "corrected" else None,
            key=key,
        )
        for n in range(count)
    ]


def test_whose_votes_do_not_decide_is_told_of_all_keys():
    honest = voting(80, "honest", users=80, field="thumb_down", bad=False)
    honest[:3] = voting(3, "honest", users=3, field="thumb_down")
    flood = voting(40, "mallory", users=40, field="thumb_down", start=200.0)
    champion = voting(400, "honest", users=300, field="thumb_down", bad=False)
    verdict = judged([*honest, *flood], champion, needed=120)
    assert verdict.state == "good"
    assert "(votes: 40 of the key mallory, 3 of the key honest)" in verdict.summary


@pytest.mark.parametrize("field", ["thumb_down", "corrected"])
@pytest.mark.parametrize("kind", ["canary", "bake"])
def test_one_key_with_invented_users_does_not_end_a_canary_and_two_do(field, kind):
    honest = voting(80, "honest", users=80, field=field, bad=False)
    champion = voting(400, "honest", users=300, field=field, bad=False)
    flood = voting(40, "mallory", users=40, field=field, start=200.0)
    one = judged([*honest, *flood], champion, kind=kind, needed=120)
    assert one.state == "good" and "by the votes of the key mallory alone: not decisive" in one.summary
    more = [replace(vote, key=f"k{n % 2}") for n, vote in enumerate(flood)]
    two = judged([*honest, *more], champion, kind=kind, needed=120)
    assert two.state == "bad" and field.replace("_", " ") in two.summary


def test_one_key_that_asks_the_champion_without_votes_does_not_end_a_canary():
    """Its requests make the champion's share of votes small, and the new version's the larger one."""
    new = voting(120, "honest", users=120, field="thumb_down", bad=False)
    new[:36] = voting(36, "honest", users=36, field="thumb_down")
    new = [replace(one, key=f"honest {n % 3}") for n, one in enumerate(new)]
    old = [replace(one, assignment_key=f"other {one.assignment_key}") for one in new]
    assert judged(new, old, needed=120).state == "good"
    flood = voting(300, "mallory", users=300, field="thumb_down", bad=False)
    flood = [replace(one, at=one.at / 3) for one in flood]
    flooded = judged(new, [*old, *flood], needed=120)
    assert flooded.state == "good"
    assert "by the requests of the key mallory alone: not decisive" in flooded.summary
    worse = [replace(one, thumb_down_at=one.at + 1) for one in new]
    assert judged(worse, [*old, *flood], needed=120).state == "bad"


def test_the_only_key_that_asks_is_heard():
    unhappy = voting(100, "app", users=50, field="thumb_down")
    assert judged(unhappy, voting(400, "app", users=200, field="thumb_down", bad=False)).state == "bad"


def test_one_user_of_few_has_one_vote():
    new = voting(100, "a", users=2, field="thumb_down")
    one = [replace(each, thumb_down_at=None) if "u1" in each.assignment_key else each for each in new]
    old = voting(100, "a", users=2, field="thumb_down", bad=False)
    assert judged(one, old).state == "good"


def test_a_canary_is_judged_from_the_store_and_its_report_is_written(tmp_path, record):
    with pytest.raises(InputError, match="no version is in canary"):
        judge_canary(tmp_path, URL, SETTINGS, 30.0)
    write_aliases(tmp_path / ALIASES, Aliases(OLD, Challenger(NEW, 0.2, "canary", since=100.0)))
    rows = [(exchange(n, 50.0 + n, NEW, "challenger", 500, f"c{n % 10}"), []) for n in range(100)]
    rows += [(exchange(1000 + n, 50.25 + n, OLD, "champion", 200, f"o{n % 30}"), []) for n in range(100)]
    record(rows)
    verdict = judge_canary(tmp_path, URL, SETTINGS, 30.0, now=1000.0)
    # 50 of each came before the canary began.
    assert (verdict.state, verdict.requests, verdict.baseline_requests) == ("bad", 50, 50)
    report = read_json(tmp_path / "reports/canary" / f"{'b' * 12}.json")
    assert report["tag"] == NEW and report["bake"] is None
    assert (report["canary"]["state"], report["canary"]["since"]) == ("bad", 100.0)


PROMOTED = Aliases(NEW, None, (OLD,), champion_since=1000.0, replaced=OLD)


def test_the_bake_period_compares_with_the_former_champions_last_requests_and_ends(tmp_path, record):
    settings = SETTINGS.model_copy(update={"bake_requests": 40})
    write_aliases(tmp_path / ALIASES, PROMOTED)
    record([(exchange(n, 900.0 + n, OLD, "champion"), []) for n in range(60)])
    waiting = judge_bake(tmp_path, URL, settings, 30.0, now=1001.0)
    assert (waiting.state, waiting.requests) == ("wait", 0)
    record([(exchange(100 + n, 1001.0 + n, NEW, "champion"), []) for n in range(60)])
    verdict = judge_bake(tmp_path, URL, settings, 30.0, now=2000.0)
    assert (verdict.state, verdict.requests, verdict.baseline_requests) == ("good", 40, 40)
    assert judge_bake(tmp_path, URL, settings, 30.0, now=2001.0) is None, "it is over"


@pytest.mark.parametrize(
    "aliases",
    [
        Aliases(),
        Aliases(NEW, champion_since=1000.0),
        Aliases(OLD, None, (), champion_since=1000.0),
    ],
    ids=["no champion", "the first", "after a rollback"],
)
def test_only_a_champion_that_replaced_another_has_a_bake_period(tmp_path, aliases):
    write_aliases(tmp_path / ALIASES, aliases)
    assert judge_bake(tmp_path, URL, SETTINGS, 30.0) is None


def test_a_pin_neither_ends_nor_restarts_a_bake_period(tmp_path, record):
    settings = SETTINGS.model_copy(update={"bake_requests": 40})
    write_aliases(tmp_path / ALIASES, replace(PROMOTED, pinned="audit"))
    record([(exchange(n, 900.0 + n, OLD, "champion"), []) for n in range(60)])
    record([(exchange(100 + n, 1001.0 + n, NEW, "champion"), []) for n in range(20)])
    verdict = judge_bake(tmp_path, URL, settings, 30.0, now=2000.0)
    assert (verdict.since, verdict.state, verdict.analyses) == (1000.0, "wait", 2)


def test_a_champion_that_fails_in_its_bake_period_stays_bad_until_a_rollback(tmp_path, record):
    write_aliases(tmp_path / ALIASES, PROMOTED)
    record([(exchange(n, 500.0 + n, OLD, "champion"), []) for n in range(150)])
    record([(exchange(200 + n, 1001.0 + n, NEW, "champion", 503), []) for n in range(130)])
    verdict = judge_bake(tmp_path, URL, SETTINGS, 30.0, now=3000.0)
    assert (verdict.state, verdict.analyses) == ("bad", 1)
    assert "failed: 100.0% of its requests, 0.0% of the baseline's" in verdict.summary
    assert judge_bake(tmp_path, URL, SETTINGS, 30.0, now=3001.0).state == "bad"


YEAR_S = 365 * 86_400.0
BEGAN = 2 * YEAR_S


def canary_traffic(first, start, count):
    """Return a challenger's and its champion's requests, one of each a second."""
    new = [(exchange(first + n, start + n, NEW, "challenger"), []) for n in range(count)]
    return new + [(exchange(first + 500 + n, start + n, OLD, "champion"), []) for n in range(count)]


def look(root, now, passed_s):
    """Look at the canary when `passed_s` have passed, at a time of its clock."""
    moment = Moment(now, "boot", passed_s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary, "read_moment", lambda _: moment)
        return judge_canary(root, URL, SETTINGS, 30.0)


@pytest.mark.parametrize("set_by_s", [-YEAR_S, YEAR_S])
def test_a_clock_that_is_set_neither_ends_a_canary_nor_holds_it_up(tmp_path, record, set_by_s):
    write_aliases(tmp_path / ALIASES, Aliases(OLD, Challenger(NEW, 0.2, "canary", since=BEGAN)))
    record(canary_traffic(0, BEGAN + 1.0, 10))
    assert look(tmp_path, BEGAN + 20.0, 20.0).requests == 10
    first = look(tmp_path, BEGAN + set_by_s + 30.0, 30.0)
    assert (first.state, first.timed_out) == ("wait", False)
    record(canary_traffic(1000, BEGAN + set_by_s + 40.0, 110))
    verdict = look(tmp_path, BEGAN + set_by_s + 300.0, 300.0)
    assert (verdict.state, verdict.timed_out, verdict.since) == ("good", False, BEGAN)


@pytest.mark.parametrize("set_by_s", [-YEAR_S, 0.0, YEAR_S])
def test_a_canary_with_too_few_users_ends_after_the_time_that_really_passed(tmp_path, record, set_by_s):
    write_aliases(tmp_path / ALIASES, Aliases(OLD, Challenger(NEW, 0.2, "canary", since=BEGAN)))
    record(canary_traffic(0, BEGAN + 1.0, 10))
    longest = SETTINGS.max_minutes * 60.0
    assert look(tmp_path, BEGAN + 20.0, 20.0).state == "wait"
    assert look(tmp_path, BEGAN + set_by_s + longest, longest).state == "wait"
    verdict = look(tmp_path, BEGAN + set_by_s + longest + 30.0, longest + 30.0)
    assert (verdict.state, verdict.timed_out) == ("bad", True)


def test_a_bake_period_goes_on_when_the_clock_is_set_back(tmp_path, record):
    settings = SETTINGS.model_copy(update={"bake_requests": 80})
    write_aliases(tmp_path / ALIASES, replace(PROMOTED, champion_since=BEGAN))
    record([(exchange(n, BEGAN - 100.0 + n, OLD, "champion"), []) for n in range(60)])
    back = BEGAN - YEAR_S
    assert judge_bake(tmp_path, URL, settings, 30.0, now=back).state == "wait"
    record([(exchange(100 + n, back + 1.0 + n, NEW, "champion", 503), []) for n in range(40)])
    verdict = judge_bake(tmp_path, URL, settings, 30.0, now=back + 100.0)
    assert (verdict.state, verdict.requests, verdict.baseline_requests) == ("bad", 40, 40)
