"""The turns of a session, whatever its requests repeat."""

import json

import pytest

from monitoring.traffic.sessions import count_session_turns, hash_text
from tests.monitoring.store import exchange
from tests.monitoring.traffic.test_features import batch

CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "name": "light", "arguments": {}}]}
RESULT = {"role": "tool", "content": "on", "tool_call_id": "a"}


def user(text):
    return {"role": "user", "content": text}


def told(text):
    return {"role": "assistant", "content": text}


def turns_of(*requests, session="s"):
    """Return the turns of one session whose requests have these messages."""
    events = [exchange(n, session=session, messages=json.dumps(one)) for n, one in enumerate(requests)]
    return count_session_turns([batch(event) for event in events], most=10)


ASKED = [user("light")]
CALLED = [*ASKED, CALL, RESULT]
SECOND = [*CALLED, told("It is on."), user("thanks")]


@pytest.mark.parametrize(
    ("requests", "turns"),
    [
        ([ASKED], 1),
        ([ASKED, CALLED, SECOND], 2),  # each repeats the history
        ([ASKED, ASKED, CALLED, CALLED, SECOND, SECOND], 2),  # each is sent again
        ([ASKED, [user("heat")], [user("blind")]], 3),  # none repeats it
        ([SECOND], 2),  # the window begins behind the first turn
        ([ASKED, SECOND, [SECOND[-1], told("Bye."), user("bye")]], 3),  # the history is cut
        ([ASKED, [user("heat")], CALLED, [user("heat"), CALL, RESULT]], 2),  # two agents side by side
    ],
)
def test_a_turn_counts_once_at_the_last_request(requests, turns):
    assert turns_of(*requests) == {f"r{len(requests) - 1:05d}": turns}


@pytest.mark.parametrize("session", [None, ""])
def test_exchanges_without_a_session_have_no_turns(session):
    assert turns_of(ASKED, SECOND, session=session) == {}


def test_beyond_the_most_a_sample_by_hash_is_kept_with_all_its_turns():
    questions = [[user(f"question {number}")] for number in range(3)]
    events = [
        exchange(3 * n + turn, session=f"s{n}", messages=json.dumps(questions[turn]))
        for turn in range(3)
        for n in range(200)
    ]
    found = count_session_turns([batch(*events)], most=40)
    assert 10 <= len(found) <= 40 and set(found.values()) == {3}
    by_hash = sorted((hash_text(f"s{n}"), f"r{3 * n + 2:05d}") for n in range(200))
    assert set(found) == {request for _, request in by_hash[: len(found)]}


def test_an_exchange_that_cannot_be_read_is_no_turn():
    broken = [exchange(n, session="s", messages=text) for n, text in enumerate(("[]", "{", "[3]", "null"))]
    whole = exchange(4, session="s", messages=json.dumps(ASKED))
    assert count_session_turns([batch(whole, *broken)], most=10) == {"r00004": 1}
