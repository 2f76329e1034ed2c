"""Conversations run in a simulator: a world with a lamp, and answers that are given."""

import json
import time
from itertools import count

import pytest

from stages.common.chat.turns import unroll
from stages.common.errors import InputError
from stages.common.messages import Message, Tool, ToolCall, format_calls, format_malformed
from stages.common.model.generation import Answer
from stages.common.model.results import Sampling
from stages.common.records import make_row
from stages.common.sources.home_tools.home import Home
from stages.common.task.text_task import TextTask
from stages.common.task.tools_task import ToolsTask
from stages.evaluate import simulation
from stages.evaluate.__main__ import find_simulator
from stages.evaluate.simulation import MAX_ROUNDS, list_conversations, load_simulator, simulate
from stages.evaluate.simulation_report import choose_conversations, summarise_simulation
from tests.stages.common.sources.home_tools.test_collect import few
from tests.tiny import make_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"area": {"type": "string"}, "on": {"type": "boolean"}},
    "required": ["area", "on"],
}
LAMP = Tool(json.dumps({"type": "function", "function": {"name": "lamp", "parameters": SCHEMA}}))


def lamp(area, on=True):
    return ToolCall("lamp", json.dumps({"area": area, "on": on}))


def conversation(number=0, turns=2):
    """A row in which each of the user's turns switches another lamp."""
    messages = []
    for turn in range(turns):
        messages += [
            Message("user", f"light {number} {turn}"),
            Message("assistant", "", (lamp(f"room {turn}"),)),
            Message("tool", '{"ok":true}'),
            Message("assistant", "done"),
        ]
    return make_row(messages, "toy", "mit", group=f"g{number}", tools=[LAMP])


class Lamps:
    """A world of lamps; the area "stairs" fails, and "cellar" takes long."""

    def __init__(self, seed):
        self.state = {}

    def run(self, name, arguments):
        area = arguments["area"]
        if area == "stairs":
            raise KeyError(area)
        if area == "cellar":
            time.sleep(30)
        if area == "attic":
            return {"value": float("nan")}
        self.state[str(area)] = arguments.get("on", True)
        return {"ok": True}


def run(answers, rows=None, seconds=60.0, simulator=Lamps, max_prompt_tokens=None):
    """Run conversations with these answers of the model, the last of them for ever."""
    texts = iter(answers)
    asked = []

    def ask(prompts):
        asked.append(prompts)
        return [Answer(next(texts, answers[-1]), 1, True, 0.0) for _ in prompts]

    rows = [conversation()] if rows is None else rows
    found = simulate(rows, simulator, ask, make_tokenizer(), ToolsTask(), max_prompt_tokens, seconds)
    return found, asked


def call(*calls):
    return format_calls("", calls)


def test_the_calls_of_the_reference_end_as_it_does():
    (one,), asked = run([call(lamp("room 0")), "done", call(lamp("room 1")), "ok"])
    assert (one.end, one.state_matches, one.has_results) == ("finished", True, True)
    assert (one.calls, one.ran, len(asked), one.turns) == (2, 2, 4, 2)
    assert [message.role for message in one.messages] == ["user", "assistant", "tool", "assistant"] * 2
    assert one.messages[2].content == '{"ok":true}'
    assert json.loads(one.state) == {"room 0": True, "room 1": True}


def test_other_calls_that_end_alike_match_and_missing_ones_do_not():
    detour = [call(lamp("room 0"), lamp("room 1", on=False)), "done", call(lamp("room 1")), "ok"]
    (one,), _ = run(detour)
    assert one.state_matches and one.has_results and one.calls == 3
    (one,), _ = run([call(lamp("room 0")), "done", "done"])
    assert (one.end, one.state_matches, one.has_results) == ("finished", False, False)


@pytest.mark.parametrize(
    "wrong",
    [
        ToolCall("stove", "{}"),
        ToolCall("lamp", '{"area":"room 0"}'),
        ToolCall("lamp", '{"area":1,"on":true}'),
    ],
)
def test_a_call_that_fits_no_tool_does_not_run_and_the_model_is_told(wrong):
    (one,), _ = run([call(wrong), call(lamp("room 0")), "done", call(lamp("room 1")), "ok"])
    assert (one.calls, one.ran, one.state_matches) == (3, 2, True)
    assert "error" in json.loads(one.messages[2].content)


@pytest.mark.parametrize(
    ("answers", "end"),
    [
        ([format_malformed("<tool_call>{")], "malformed call"),
        ([" "], "empty answer"),
        ([call(lamp("hall"))], f"{MAX_ROUNDS} answers with calls to one question"),
    ],
)
def test_a_conversation_that_goes_wrong_ends_with_its_reason(answers, end):
    (one,), asked = run(answers)
    assert (one.end, one.error, one.state_matches) == (end, None, False)
    assert len(asked) <= MAX_ROUNDS


def test_a_prompt_longer_than_the_context_is_not_asked():
    (one,), asked = run(["done"], max_prompt_tokens=5)
    assert one.end == "longer than the model's context" and not asked


@pytest.mark.parametrize(
    ("area", "error"),
    [("stairs", "KeyError: 'stairs'"), ("cellar", "it took longer than 0.5 s"), ("attic", "no JSON")],
)
def test_an_error_of_the_simulator_ends_one_conversation_and_is_counted(area, error, monkeypatch):
    monkeypatch.setattr(simulation, "RUN_S", 0.5)
    rows = [conversation(0, 1), conversation(1, 1)]
    outcomes, _ = run([call(lamp(area)), call(lamp("room 0")), "done"], rows)
    assert [one.error is None for one in outcomes] == [False, True]
    assert error in outcomes[0].error
    found = summarise_simulation("toy:Lamps", outcomes, 2, Sampling(0.95, 100, 7))
    assert list(found["simulator_errors"].values()) == [1]
    assert (found["judged"], found["out_of_time"]) == (1, 0)
    assert found["tuned"]["end_state_match"]["value"] == 1.0


def test_a_simulator_that_makes_no_world_ends_every_conversation():
    numbers = count()

    def broken(seed):
        raise ValueError(f"world {next(numbers) % 1}")

    outcomes, asked = run(["done"], [conversation(n) for n in range(3)], simulator=broken)
    assert {one.error for one in outcomes} == {"ValueError: world 0"} and not asked
    found = summarise_simulation("toy:broken", outcomes, 3, Sampling(0.95, 100, 7))
    assert found["simulator_errors"] == {"ValueError: world 0": 3} and found["tuned"] == {}


def test_no_step_begins_after_the_time():
    outcomes, asked = run(["done"], seconds=0.0)
    assert outcomes == [] and asked == []
    assert summarise_simulation("toy:Lamps", outcomes, 1, Sampling(0.95, 100, 7))["out_of_time"] == 1


def test_results_are_reported_by_turns():
    rows = [conversation(0, 1), conversation(1, 2), conversation(2, 2)]
    outcomes, _ = run([call(lamp("room 0"))] * 3 + ["done"], rows)
    found = summarise_simulation("toy:Lamps", outcomes, 3, Sampling(0.95, 100, 7))
    assert {turns: part["end_state_match"]["value"] for turns, part in found["by_turns"].items()} == {
        "1": 1.0,
        "2": 0.0,
    }
    assert found["tuned"]["end_state_match"]["n"] == 3
    assert found["tuned"]["calls_ran"]["value"] == 1.0 and found["ends"] == {"finished": 3}


def test_a_conversation_is_its_longest_test_row():
    whole = [conversation(number, 3) for number in range(4)]
    rows = list(unroll(whole, "all"))
    assert len(rows) == 24
    assert {row.messages for row in list_conversations(rows)} == {row.messages for row in whole}
    assert len(choose_conversations(rows, 2, 7)) == 2


def test_the_packaged_conversations_end_as_the_reference_does_in_the_packaged_home():
    rows = list_conversations(unroll(few().rows, "all"))[::7]
    assert len({row.tags["shape"] for row in rows}) == 4
    for row in rows:
        answers = [message.answer for message in row.messages if message.role == "assistant"]
        (one,), asked = run(answers, [row], simulator=Home)
        assert (one.end, one.error) == ("finished", None), row
        assert one.state_matches and one.has_results and one.ran == one.calls
        assert len(asked) == len(answers)


def test_a_model_that_calls_nothing_does_not_match_where_something_is_set():
    rows = [row for row in list_conversations(few().rows) if row.tags.get("tool") == "set_state"][:20]
    outcomes, _ = run(["done"], rows, simulator=Home)
    assert len(outcomes) == 20 and not any(one.has_results for one in outcomes)
    # Those that find no device change nothing either.
    assert sum(one.state_matches for one in outcomes) < 5


def test_what_is_no_simulator_is_named():
    assert load_simulator("stages.common.sources.home_tools.home:Home")(1).state
    for name in ("no_such.module:Home", "stages.common.sources.home_tools.home:House", "json:__name__"):
        with pytest.raises(InputError, match=name):
            load_simulator(name)
    with pytest.raises(InputError, match="calls no tools"):
        find_simulator("stages.common.sources.home_tools.home:Home", TextTask())
    assert find_simulator(None, TextTask()) is None
