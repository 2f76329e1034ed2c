"""The demo's conversations with tools: written from the packaged source, and held with a service."""

import json
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest

from flows.demo.__main__ import DemoRun
from flows.demo.replay import Habits, make_visits, mix_evenly, replay
from flows.demo.report import format_tools
from flows.demo.tool_replay import ToolCounts
from flows.demo.tool_traffic import (
    SIZE,
    TOOL_SHARE,
    Question,
    ToolConversation,
    count_tool_requests,
    list_tools,
    write_conversations,
)
from flows.demo.traffic import Request
from stages.common.messages import ToolCall, format_calls
from stages.common.sources.home_tools.tools import read_tools
from tests.flows.demo.test_traffic import WORLD, answering, chat, toy

ALWAYS = Habits(corrected=1.0, thumbs_up=1.0)
ON = ToolCall("set_state", '{"state":"on","area":"hall"}')
OFF = ToolCall("set_state", '{"state":"off","area":"hall"}')
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"


def test_conversations_have_as_many_requests_as_asked_for_and_questions_that_call_the_tools():
    made = write_conversations(31, 1)
    assert [one.size for one in made] == [SIZE] * 10 + [1]
    assert made == write_conversations(31, 1)
    assert len({one.session for one in made}) == len(made)
    assert {one.is_required for one in made} == {True, False}
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in list_tools()}
    assert list(schemas) == [tool.name for tool in read_tools()]
    questions = [question for one in made for question in one.questions]
    assert len(questions) == 2 * len(made)
    for question in questions:
        assert question.text
        for call in question.calls:
            jsonschema.validate(call.values, schemas[call.name])


def test_another_seed_gives_other_sentences_and_a_family_that_runs_out_is_asked_again():
    firsts = [{one.questions[0].text for one in write_conversations(30, seed)} for seed in (1, 2)]
    assert len(firsts[0] & firsts[1]) < 5
    many = write_conversations(1500, 1, families=1)
    assert len(many) == 500
    assert len({one.questions for one in many}) < 500


def test_no_text_or_number_of_a_call_is_endless():
    for tool in list_tools():
        for schema in tool["function"]["parameters"]["properties"].values():
            assert "enum" in schema or "maxLength" in schema or {"minimum", "maximum"} <= schema.keys()
            assert schema.get("type") != "number"


def test_few_requests_have_tools_as_often_as_many():
    assert [count_tool_requests(count, 1) for count in (800, 400, 100)] == [80, 40, 10]
    assert 200 < sum(count_tool_requests(3, seed) for seed in range(1000)) < 400
    assert TOOL_SHARE == 0.1


def test_every_window_of_the_traffic_has_its_share_of_requests_with_tools():
    mixed = mix_evenly(make_visits(toy(1080), 60, 3), write_conversations(120, 3))
    offered = [isinstance(one, ToolConversation) for one in mixed for _ in range(one.size)]
    assert (len(offered), sum(offered)) == (1200, 120)
    for start, end in pairwise(range(0, 1201, 200)):
        assert 17 <= sum(offered[start:end]) <= 23
    assert mix_evenly([], write_conversations(6, 3)) == write_conversations(6, 3)


def talk(*, is_required=True, size=SIZE):
    questions = Question("on in the hall", (ON,)), Question("and off again", (OFF,))
    return ToolConversation("agent-1", "tools-1-0", questions, is_required, size)


def calling(call, finish_reason="tool_calls"):
    function = {"name": call.name, "arguments": call.arguments}
    made = [{"id": "call_1", "type": "function", "function": function}]
    message = {"role": "assistant", "content": None, "tool_calls": made}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return 200, {"id": "r", "model": "home", "system_fingerprint": "a" * 12, "choices": [choice]}


def hold(reply, conversation):
    """Hold a conversation with a service that answers by `reply(body)`; return counts and what was sent."""

    def answer(path, body):
        return (200, {"id": "f"}) if path == FEEDBACK else reply(body)

    with answering(answer) as (url, seen, _):
        result = replay(url, [], conversations=[conversation], habits=ALWAYS)
    asked, given = ([body for path, body, _ in seen if path == one] for one in (CHAT, FEEDBACK))
    return result, asked, given


def test_a_call_is_run_its_result_told_and_the_next_question_asked():
    def reply(body):
        if body["messages"][-1]["role"] == "tool":
            return chat("It is on.")
        return calling(ON)

    result, asked, feedback = hold(reply, talk())
    assert [body["tool_choice"] for body in asked] == ["required", "none", "auto"]
    assert [message["role"] for message in asked[2]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    call, told = asked[2]["messages"][1:3]
    assert told["tool_call_id"] == call["tool_calls"][0]["id"]
    assert json.loads(told["content"]) in ({"ok": True}, {"error": "not found"})
    assert all(body["tools"] == list(list_tools()) and body["session"] == "tools-1-0" for body in asked)
    assert result.tools == ToolCounts(1, 3, calls=2, right=1, results=1, told=1)
    assert (result.asked, result.failed, result.scores) == (3, 0, ())
    assert [one["thumb"] for one in feedback] == ["up", "down"]
    assert feedback[1]["correction"] == format_calls("", [OFF])
    assert (result.corrections, result.thumbs_up) == (0, 0)


def test_a_question_that_was_answered_without_a_call_is_followed_by_one_that_requires_it():
    result, asked, _ = hold(
        lambda body: calling(OFF) if body["tool_choice"] == "required" else chat('{"intent":"On"}'),
        talk(is_required=False),
    )
    assert [body["tool_choice"] for body in asked] == ["auto", "required", "none"]
    assert result.tools == ToolCounts(1, 3, calls=1, right=1, results=1, told=1)


def test_conversations_held_at_the_same_time_are_all_counted():
    def reply(path, body):
        if path == FEEDBACK:
            return 200, {"id": "f"}
        return calling(ON) if body["tool_choice"] != "none" else chat("It is on.")

    waiting = [replace(talk(), session=f"tools-1-{number}") for number in range(24)]
    with answering(reply) as (url, _, _):
        tools = replay(url, [], conversations=waiting, habits=ALWAYS, concurrency=8).tools
    assert tools == ToolCounts(24, 72, calls=48, right=24, results=24, told=24)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (calling(ToolCall("explode", "{}")), {"calls": 1, "malformed": 1}),
        (calling(ToolCall("set_state", '{"state":"purple"}')), {"calls": 1, "malformed": 1}),
        (calling(ToolCall("set_state", '{"state":"on"')), {"calls": 1, "malformed": 1}),
        (calling(ToolCall("set_state", "[]")), {"calls": 1, "malformed": 1}),
        (calling(ToolCall("set_state", '{"state":"on","state":"off"}')), {"calls": 1, "malformed": 1}),
        # Longer than the text that the demo's own schema allows.
        (
            calling(ToolCall("set_state", f'{{"state":"on","name":"{41 * "x"}"}}')),
            {"calls": 1, "malformed": 1},
        ),
        (chat("I will not."), {"malformed": 1}),
        (calling(ON, finish_reason="length"), {"cut": 1}),
        ((503, {"error": {}}), {}),
    ],
)
def test_a_call_that_cannot_be_run_is_counted_and_ends_the_conversation(answer, found):
    result, asked, feedback = hold(lambda body: answer, talk())
    assert result.tools == ToolCounts(conversations=1, asked=1, **found)
    assert (len(asked), feedback, result.failed) == (1, [], int(answer[0] != 200))


def test_the_demo_sends_as_many_requests_as_before_a_tenth_of_them_with_tools():
    def reply(path, body):
        if path == FEEDBACK:
            return 200, {"id": "f"}
        return calling(ON) if body.get("tool_choice") in ("required", "auto") else chat("{}")

    with answering(reply) as (url, seen, _):
        demo = DemoRun(Path(), url, WORLD)
        results = [demo.ask({"known": 1.0}, 60), demo.ask({"known": 1.0}, 40)]
    assert [result.asked for result in results] == [60, 40]
    offering = Counter("tools" in body for path, body, _ in seen if path == CHAT)
    assert offering == {False: 90, True: 10}
    assert demo.tools.asked == 10
    assert demo.tools.conversations == 4
    assert sum(score.asked for result in results for score in result.scores) == 90


def test_the_report_has_a_line_about_tools():
    counts = ToolCounts(5, 14, calls=9, right=1, results=5, told=4)
    line = "5 conversations with tools (14 requests): 9 calls, 0 malformed; 4 of 5 results answered"
    assert format_tools(counts) == line
    counts.add(ToolCounts(1, 1, malformed=1, cut=2))
    assert "6 conversations with tools (15 requests): 9 calls, 1 malformed, 2 cut off" in format_tools(counts)


@pytest.mark.slow
def test_the_default_engine_answers_the_demos_conversations_and_stores_their_calls(tmp_path):
    from services.events import read_exchanges, read_feedback
    from tests.services.serving import load_paged, serving
    from tests.services.tool_models import tool_files

    files = tool_files(
        tmp_path / "model",
        task={"kind": "json", "label_key": "intent", "labels": None},
        answer_schema={"type": "object", "properties": {"intent": {"enum": ["On"]}}, "required": ["intent"]},
    )
    conversations = write_conversations(12, 1)
    guard = {"max_prompt_tokens": 4096}  # each byte is a token
    with serving(tmp_path, files, load=load_paged, guard=guard) as server:
        url = server.handler.settings.events.url
        result = replay(
            server.url,
            [Request("known 0", '{"intent":"On"}', "known", "A/b/c")],
            conversations=conversations,
            habits=ALWAYS,
            max_tokens=600,
            concurrency=2,
        )

        def stored(read):
            return [row for batch in read(url, 0.0, time.time() + 60) for row in batch.to_pylist()]

        exchanges, feedback = stored(read_exchanges), stored(read_feedback)
    tools = result.tools
    assert (result.failures, tools.malformed, tools.cut) == ({}, 0, 0)
    assert tools.conversations == 4 and tools.calls >= 4 and tools.results >= 4
    assert len(exchanges) == result.asked == tools.asked + 1
    called = [row for row in exchanges if row["finish_reason"] == "tool_calls"]
    assert len(called) == tools.calls
    names = {tool.name for tool in read_tools()}
    for row in called:
        assert re.match(r'\{"tool_calls":\[\{"name":"(\w+)"', row["answer"])[1] in names
        assert row["valid_output"] is True  # a call is no invalid JSON answer
    told = [
        json.loads(row["messages"]) for row in exchanges if json.loads(row["messages"])[-1]["role"] == "tool"
    ]
    assert len(told) == tools.results
    assert all(turns[-2]["tool_calls"][0]["name"] in names for turns in told)
    assert len(feedback) >= tools.calls
