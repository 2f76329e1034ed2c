"""The home that carries out calls, with the calls of the packaged conversations."""

import json

from stages.common.messages import ToolCall
from stages.common.sources.home_tools.follow_ups import OPPOSITE
from stages.common.sources.home_tools.home import Home
from stages.common.sources.home_tools.replies import MISSING, answer_result
from tests.stages.common.sources.home_tools.test_collect import few


def test_every_call_of_the_rows_runs_and_its_result_is_like_that_of_the_row():
    missing = calls = 0
    for number, row in enumerate(few().rows):
        home, open_calls = Home(number), []
        for message in row.messages:
            open_calls += message.tool_calls
            if message.role != "tool":
                continue
            call, expected = open_calls.pop(0), json.loads(message.content)
            found = home.run(call.name, call.values)
            calls += 1
            missing += found == MISSING
            if MISSING not in (found, expected):
                assert found.keys() == expected.keys(), (call, found, expected)
                assert {k: isinstance(v, str) for k, v in found.items()} == {
                    k: isinstance(v, str) for k, v in expected.items()
                }
            assert answer_result(ToolCall(call.name, call.arguments), json.dumps(found))
    assert calls > 500 and 0 < missing < calls / 10


def test_one_seed_is_one_home():
    ask = {"name": "candelabra", "area": "hall"}
    answers = [[Home(seed).run("get_temperature", ask) for _ in range(2)] for seed in range(20)]
    assert all(first == second for first, second in answers)
    assert len({json.dumps(first) for first, _ in answers}) > 5


def test_what_is_set_is_found_and_a_kind_covers_its_devices():
    home = next(home for home in map(Home, range(99)) if not home._is_missing({"name": "candelabra"}))
    assert home.state == {"things": {}, "timers": {}, "lists": {}}
    for state in ("on", "off"):
        lights = {"state": state, "kind": "light"}
        home.run("set_state", {"name": "candelabra", "state": OPPOSITE[state]})
        asked = {"name": "candelabra", "state": state}
        assert home.run("get_state", asked) == {"state": OPPOSITE[state]}
        assert home.run("set_state", lights) == {"ok": True}
        assert home.run("get_state", asked) == {"state": state}
        assert len(home.run("get_state", lights)["devices"]) == 3
        assert home.run("get_state", {**lights, "state": OPPOSITE[state]}) == {"devices": []}
    assert home.state["things"] == {"light / ": {"state": "off"}}


def test_timers_lists_and_media_remember_what_they_were_told():
    home = Home(1)
    home.run("timer", {"action": "start", "minutes": 10})
    home.run("timer", {"action": "add", "minutes": 5})
    left = home.run("timer", {"action": "status"})
    assert 14 <= left["minutes"] + left["seconds"] / 60 < 15
    home.run("timer", {"action": "cancel", "minutes": 10})
    for action in ("add", "complete"):
        home.run("list", {"action": action, "item": "eggs"})
    home.run("media", {"action": "volume", "percent": 95})
    home.run("media", {"action": "louder"})
    state = home.state
    assert state["timers"] == {"600 s": {"seconds": 900, "action": "cancel"}}
    assert state["lists"] == {"shopping": {"eggs": "complete"}}
    assert state["things"] == {"media_player / ": {"volume": 100}}
