"""A look at production, over a real event store: windows, verdicts, reports, late and corrupt events."""

import json
import random
from dataclasses import replace

import pytest

from monitoring.traffic.windows import find_closed_windows
from monitoring.verdicts import NOT_DECIDED, get_window_folder, read_verdicts
from monitoring.watching import judge, judge_new_windows, read_reference
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from tests.exchanges import VERSION
from tests.monitoring.store import add, exchange, stored

TAG = f"toy:{VERSION}"
NOW = 1e6
USUAL = (
    "turn on the {} light",
    "is the {} door locked",
    "what is the temperature in the {}",
    "close the {} blind",
)
ROOMS = ("kitchen", "hall", "attic", "bath", "office")
GERMAN = ("schalte bitte das Licht im Zimmer {} ein", "ist die Haustür neben dem Zimmer {} verschlossen")


def some(first, rows, phrases=USUAL, seed=7):
    """Exchanges in sessions of five, each about one room."""
    rng = random.Random(f"{seed}/{first}")
    made = []
    for number in range(first, first + rows):
        if number % 5 == 0 or not made:
            room = rng.choice(ROOMS)
        words = [{"role": "user", "content": rng.choice(phrases).format(room)}]
        answer = json.dumps({"intent": "On" if rng.random() < 0.5 else "Off", "area": room})
        made.append(exchange(number, session=f"s{number // 5}", messages=json.dumps(words), answer=answer))
    return made


@pytest.fixture
def settings():
    shipped = load_params("params.yaml").monitoring
    return shipped.model_copy(
        update={
            "reference": shipped.reference.model_copy(update={"rows": 600}),
            "window": shipped.window.model_copy(update={"rows": 200, "settle_s": 10.0}),
            "drift": shipped.drift.model_copy(update={"permutations": 1000}),
        }
    )


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/events.db"


def look_once(root, url, usual, settings, now=NOW, limit=50):
    return list(judge_new_windows(root, url, usual, settings, lambda _: NOT_DECIDED, now=now, limit=limit))


def test_while_the_champion_has_answered_too_little_there_is_no_usual_traffic(url, settings):
    stored(url, *some(0, 599))
    assert read_reference(url, TAG, settings, NOW) is None


def test_without_a_store_the_look_fails_loudly(url, settings):
    with pytest.raises(InputError, match=r"events\.db"):
        read_reference(url, TAG, settings, NOW)


def converse(first, sessions, turns):
    """Exchanges of agents with tools: each request repeats the history of its session."""
    tool = {"type": "function", "function": {"name": "light"}}
    asked = [{"role": "user", "content": "light on"}, {"role": "assistant", "content": "It is on."}]
    return [
        exchange(
            first + session * turns + turn,
            session=f"s{first + session}",
            messages=json.dumps([*asked * turn, asked[0]]),
            parameters=json.dumps({"tools": [tool]}),
            answer="It is on.",
        )
        for session in range(sessions)
        for turn in range(turns)
    ]


def test_longer_sessions_are_found_by_their_turns(tmp_path, url, settings):
    rows = {"reference": 120, "window": 120}
    settings = settings.model_copy(
        update={
            name: getattr(settings, name).model_copy(update={"rows": count}) for name, count in rows.items()
        }
    )
    stored(url, *converse(0, 60, turns=2), *converse(200, 60, turns=2), *converse(400, 30, turns=4))
    usual = read_reference(url, TAG, settings, NOW)
    windows = find_closed_windows(url, usual.window.end, TAG, settings.window, NOW, 2)
    verdicts = [judge(tmp_path, url, usual, window, settings, NOW) for window in windows]
    same, longer = (
        {change.column: change for each in one.drift_types for change in each.columns} for one in verdicts
    )
    found = longer["session_turns"]
    assert found.drifted and found.effect > 0.9 and found.before == "median 2 turns"
    assert same["session_turns"].judged and not same["session_turns"].drifted


@pytest.mark.slow
def test_each_window_is_judged_once_and_a_change_is_found_in_its_first_window(tmp_path, url, settings):
    stored(url, *some(0, 600), *some(600, 400), *some(1000, 200, GERMAN))
    usual = read_reference(url, TAG, settings, NOW)
    (first,) = look_once(tmp_path, url, usual, settings, limit=1)
    assert (first.judged, first.drifted, first.window.rows) == (True, False, 200)

    second, third = look_once(tmp_path, url, usual, settings)
    assert (second.drifted, third.drifted) == (False, True)
    assert "language" in {change.column for change in third.changes}
    assert "de" in third.summary
    assert look_once(tmp_path, url, usual, settings) == []
    assert read_verdicts(tmp_path) == [first, second, third]
    for verdict in (first, second, third):
        page = (get_window_folder(tmp_path, verdict.id) / "report.html").read_text()
        assert verdict.id in page and "<script src" not in page


@pytest.mark.slow
def test_a_window_that_is_not_closed_waits(tmp_path, url, settings):
    stored(url, *some(0, 800))
    usual = read_reference(url, TAG, settings, NOW)
    assert look_once(tmp_path, url, usual, settings, now=1000.0 + 799 + 9) == []
    assert len(look_once(tmp_path, url, usual, settings, now=1000.0 + 799 + 11)) == 1


@pytest.mark.slow
def test_corrupt_events_are_set_aside_and_late_ones_counted(tmp_path, url, settings):
    broken = [exchange(700 + n, at=1700.5 + n, request_id=f"broken{n}", messages="no JSON") for n in range(3)]
    stored(url, *some(0, 600), *some(600, 197), *broken)
    usual = read_reference(url, TAG, settings, NOW)
    (verdict,) = look_once(tmp_path, url, usual, settings)
    assert sum(verdict.quarantined.values()) == 3 and verdict.window.rows == 197
    lines = (get_window_folder(tmp_path, verdict.id) / "quarantined.jsonl").read_text().splitlines()
    assert {json.loads(line)["request_id"] for line in lines} == {"broken0", "broken1", "broken2"}

    add(url, exchange(650, at=1650.25, request_id="late"))
    assert look_once(tmp_path, url, usual, settings) == []
    (noted,) = read_verdicts(tmp_path)
    assert noted.late_rows == 1


def with_tools(events, every):
    """Exchanges of which one session in `every` offers tools: a call, or an answer to its result."""
    tool = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
    parameters = json.dumps({"tools": [tool], "tool_choice": "auto"})
    call = {"id": "a", "name": "light", "arguments": {}}
    told = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "on", "tool_call_id": "a"},
    ]
    made = []
    for number, one in enumerate(events):
        session, place = int(one.session.removeprefix("s")), number % 2
        if session % every == 0:
            messages = json.dumps([*json.loads(one.messages), *told * place])
            answer = one.answer if place else '{"tool_calls":[{"name":"light","arguments":{}}]}'
            one = replace(one, messages=messages, answer=answer, parameters=parameters)
        made.append(one)
    return made


@pytest.mark.slow
def test_a_steady_share_of_requests_with_tools_is_no_drift_and_another_share_is(tmp_path, url, settings):
    events = [*with_tools(some(0, 1000), every=10), *with_tools(some(1000, 200), every=2)]
    stored(url, *events)
    usual = read_reference(url, TAG, settings, NOW)
    assert {"calls", "called_tools"} <= {column.name for column in usual.columns}
    same, again, more = look_once(tmp_path, url, usual, settings)
    assert (same.judged, same.drifted, again.drifted, more.drifted) == (True, False, False, True)
    assert {"answer_form", "turns"} <= {change.column for change in more.changes}


def of_users(events, users):
    return [
        replace(one, session=None, user=f"app{number % users}", key_id="k")
        for number, one in enumerate(events)
    ]


@pytest.mark.parametrize("users", [1, 3])
def test_a_window_of_too_few_sessions_says_that_it_shows_nothing_and_what_to_send(
    tmp_path, url, settings, users
):
    stored(url, *of_users([*some(0, 600), *some(600, 200, GERMAN)], users))
    (verdict,) = look_once(tmp_path, url, read_reference(url, TAG, settings, NOW), settings)
    assert not verdict.judged and not verdict.drifted
    assert verdict.why_not.startswith(f"{users} session{'s' * (users > 1)}; needs 10: send the field session")
    assert "not judged" in verdict.summary


def test_a_reference_of_too_few_sessions_says_how_to_get_another(tmp_path, url, settings):
    stored(url, *of_users(some(0, 600), 1), *some(600, 200))
    (verdict,) = look_once(tmp_path, url, read_reference(url, TAG, settings, NOW), settings)
    assert verdict.why_not.startswith("1 session in the reference; needs 10")
    assert "monitoring.reference.rows" in verdict.why_not


@pytest.mark.slow
def test_ten_users_are_enough_to_find_another_language_and_the_power_is_told(tmp_path, url, settings):
    stored(url, *of_users([*some(0, 600), *some(600, 200), *some(800, 200, GERMAN)], 10))
    quiet, german = look_once(tmp_path, url, read_reference(url, TAG, settings, NOW), settings)
    assert german.drifted and "language" in {change.column for change in german.changes}
    power = {one.drift_type: one.smallest_change for one in quiet.drift_types}
    assert all(0.0 < power[name] <= 1.0 for name in ("input", "output", "quality"))
    assert not quiet.drifted and "changes that would be found: input from" in quiet.summary


NO_ANSWER = {
    "answer": None,
    "finish_reason": None,
    "status": 503,
    "mean_logprob": None,
    "valid_output": None,
    "first_token_s": None,
}


@pytest.mark.slow
def test_a_window_of_failures_is_judged_and_drawn_and_the_next_one_is_looked_at(tmp_path, url, settings):
    outage = [exchange(number, session=f"s{number // 5}", **NO_ANSWER) for number in range(600, 800)]
    stored(url, *some(0, 600), *outage, *some(800, 200))
    usual = read_reference(url, TAG, settings, NOW)
    bad, good = look_once(tmp_path, url, usual, settings)
    assert bad.drifted and "failed: 0 % -> 100 %" in bad.summary
    assert (bad.problems, good.problems, good.drifted) == ((), (), False)
    assert (get_window_folder(tmp_path, bad.id) / "report.html").exists()
    assert look_once(tmp_path, url, usual, settings) == []


@pytest.mark.slow
def test_a_reference_without_a_whole_answer_can_be_compared_with(tmp_path, url, settings):
    outage = [exchange(number, session=f"s{number // 5}", **NO_ANSWER) for number in range(600)]
    stored(url, *outage, *some(600, 200))
    (verdict,) = look_once(tmp_path, url, read_reference(url, TAG, settings, NOW), settings)
    assert verdict.judged and verdict.problems == ()


HALF = r'{"intent": "On", "area": "\ud83d", "\udc00": 1}'
HALF_ASKED = r'[{"role": "user", "content": "turn on the \ud83d lamp in the kitchen of the house"}]'


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 600], ids=["in the reference", "in the window"])
def test_half_of_a_surrogate_pair_ends_neither_the_reference_nor_a_window(tmp_path, url, settings, first):
    usual = some(0, 800)
    usual[first : first + 150] = [
        replace(one, answer=HALF, messages=HALF_ASKED) for one in usual[first : first + 150]
    ]
    stored(url, *usual)
    (verdict,) = look_once(tmp_path, url, read_reference(url, TAG, settings, NOW), settings)
    assert verdict.judged and verdict.problems == ()
    assert read_verdicts(tmp_path) == [verdict]


def no_report(root):
    """Where the next report belongs there is a folder."""
    (get_window_folder(root, "19700101T002640.000-200") / "report.html").mkdir(parents=True)


def no_workspace(root):
    (root / ".perennial").mkdir()
    (root / ".perennial/evidently").write_text("a file where a folder should be")


@pytest.mark.slow
@pytest.mark.parametrize("breaking", [no_report, no_workspace])
def test_a_page_that_cannot_be_written_is_told_and_the_verdict_is_there(tmp_path, url, settings, breaking):
    stored(url, *some(0, 600), *some(600, 400))
    usual = read_reference(url, TAG, settings, NOW)
    breaking(tmp_path)
    first, second = look_once(tmp_path, url, usual, settings)
    (problem,) = first.problems
    assert first.judged and problem.startswith("the report could not be ")
    assert second.judged
    assert read_verdicts(tmp_path) == [first, second]
    assert look_once(tmp_path, url, usual, settings) == []


def test_a_decision_that_fails_is_told_and_the_verdict_is_there(tmp_path, url, settings):
    few = settings.model_copy(
        update={"window": settings.window.model_copy(update={"rows": 20, "min_rows": 100})}
    )
    stored(url, *some(0, 640))
    usual = read_reference(url, TAG, few, NOW)

    def decide(_):
        raise OSError("the disk is full")

    made = list(judge_new_windows(tmp_path, url, usual, few, decide, now=1e6, limit=5))
    assert [verdict.judged for verdict in made] == [False, False]
    for verdict in made:
        (problem,) = verdict.problems
        assert "the disk is full" in problem and not verdict.trigger.fires
    assert read_verdicts(tmp_path) == made


def test_a_broken_verdict_is_set_aside_and_its_window_judged_again(tmp_path, url, settings):
    few = settings.model_copy(
        update={"window": settings.window.model_copy(update={"rows": 20, "min_rows": 100})}
    )
    stored(url, *some(0, 640))
    usual = read_reference(url, TAG, few, NOW)
    first, second = look_once(tmp_path, url, usual, few)
    path = get_window_folder(tmp_path, second.id) / "verdict.json"
    path.write_text('{"id": ')
    (again,) = look_once(tmp_path, url, usual, few)
    assert again == second and read_verdicts(tmp_path) == [first, second]
    assert (path.parent / "verdict.broken.json").read_text() == '{"id": '


def test_windows_that_end_in_the_future_do_not_end_the_watching(tmp_path, url, settings):
    few = settings.model_copy(
        update={"window": settings.window.model_copy(update={"rows": 20, "min_rows": 100})}
    )
    stored(url, *some(0, 620))
    usual = read_reference(url, TAG, few, NOW)
    add(url, *(exchange(2000 + n, at=5e8 + n) for n in range(20)))  # the clock is wrong by years,
    assert len(look_once(tmp_path, url, usual, few, now=6e8)) == 2
    add(url, *(exchange(3000 + n) for n in range(40)))  # and right again
    assert len(look_once(tmp_path, url, usual, few, now=1e6)) == 2
    assert look_once(tmp_path, url, usual, few, now=1e6) == []


@pytest.mark.slow
def test_a_window_with_too_few_rows_is_set_down_and_not_judged(tmp_path, url, settings):
    by_time = settings.window.model_copy(update={"kind": "time", "hours": 0.05, "min_rows": 100})
    settings = settings.model_copy(update={"window": by_time})
    stored(url, *some(0, 600), *some(600, 50), *some(1000, 200))
    usual = read_reference(url, TAG, settings, NOW)
    verdicts = look_once(tmp_path, url, usual, settings)
    few = [verdict for verdict in verdicts if not verdict.judged]
    assert few and "min_rows" in few[0].why_not and not few[0].drifted
    assert any(verdict.judged for verdict in verdicts)
