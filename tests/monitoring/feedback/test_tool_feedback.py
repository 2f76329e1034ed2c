"""Feedback on calls of tools: corrections are compared by structure, and rows have the calls before them."""

import json
from dataclasses import replace

import pytest

from monitoring.feedback.rows import HELD_OUT, ROWS, format_report, format_rows, read_labelled, write_labelled
from stages.common.messages import Message, ToolCall, format_arguments, format_malformed
from stages.common.sources.feedback import collect_feedback
from stages.common.task.json_task import JsonTask
from stages.common.task.tools_task import ToolsTask
from tests.monitoring.feedback.test_feedback import ON, TASK, TEXT, Events

TOOLS = replace(TASK, answers=ToolsTask(), answer_schema=None, system_prompt=None)
FREE_JSON = replace(TASK, answers=JsonTask(None), answer_schema=None)
LIGHT = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
BLIND = {"type": "function", "function": {"name": "blind"}}
PARAMETERS = {"json_schema": None, "tools": [LIGHT, BLIND], "tool_choice": "auto"}


def turn(*calls, text=""):
    return Message(
        "assistant", text, tuple(ToolCall(name, format_arguments(values)) for name, values in calls)
    ).answer


HALL = turn(("light", {"area": "hall"}))
TOLD = [
    {"role": "user", "content": "light"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "a", "name": "light", "arguments": {"on": 1, "area": "hall"}}],
    },
    {"role": "tool", "content": "done", "tool_call_id": "a"},
]


@pytest.fixture
def events(tmp_path):
    return Events(tmp_path)


def ask(events, question, answer, parameters=PARAMETERS, **given):
    events.add_exchange(question, answer=answer, parameters=json.dumps(parameters), **given)


def test_a_corrected_call_becomes_a_row_with_its_tools_and_what_was_wrong(events):
    by_hand = '{"tool_calls": [{"name": "light", "arguments": {"area": "attic"}}]}'
    ask(events, "right tool", HALL, correction=by_hand)
    ask(events, "wrong tool", HALL, correction=turn(("blind", {"area": "hall"})))
    ask(events, "no call", "On.", correction=HALL)
    ask(events, "broken", format_malformed("<tool_call>"), correction=HALL)
    ask(events, "needless", HALL, correction="Which room?")
    ask(events, "up", HALL, thumb=1, finish_reason="tool_calls")
    labelled = events.rows(task=TOOLS)
    rows = {row.question: row for row in (*labelled.train, *labelled.holdout)}
    row = rows["right tool"]
    assert row.messages[-1].tool_calls == (ToolCall("light", '{"area":"attic"}'),)
    assert [tool.value for tool in row.tools] == [LIGHT, BLIND]
    assert row.tags == {"feedback": "correction", "tool": "light"}
    assert rows["needless"].answer == "Which room?" and rows["up"].answer == HALL
    assert labelled.report["by_error"] == {
        "wrong value": 1,
        "wrong tool": 1,
        "missing call": 1,
        "malformed call": 1,
        "needless call": 1,
    }
    assert "| wrong value | 1 |" in format_report(labelled.report)


def test_corrections_that_call_the_same_agree(events):
    both = turn(("light", {"area": "hall", "on": True}), ("blind", {}))
    ask(events, "a", HALL, correction=both, user="x")
    again = turn(("blind", {}), ("light", {"on": True, "area": "hall"}), text="Yes.")
    ask(events, "a", HALL, correction=again, user="y")
    labelled = events.rows(task=TOOLS)
    assert labelled.report["excluded"] == {"duplicate": 1} and labelled.report["labelled_rows"] == 1


@pytest.mark.parametrize(
    ("parameters", "answer", "correction", "reason"),
    [
        (PARAMETERS | {"tool_choice": "required"}, HALL, HALL, "own_choice"),
        (PARAMETERS | {"tool_choice": "light"}, HALL, HALL, "own_choice"),
        (PARAMETERS | {"tools": [{"function": {}}]}, HALL, HALL, "corrupt"),
        (PARAMETERS | {"tools": 7}, HALL, HALL, "corrupt"),
        (PARAMETERS, HALL, '{"tool_calls": [{"function": "light"}]}', "invalid"),
        (PARAMETERS, HALL, turn(("light", {"to": "[email]"})), "redacted"),
    ],
)
def test_what_cannot_be_learned_from_is_excluded_with_its_reason(
    events, parameters, answer, correction, reason
):
    ask(events, "a", answer, parameters, correction=correction)
    assert events.rows(task=TOOLS).report["excluded"] == {reason: 1}


@pytest.mark.parametrize("task", [TASK, TEXT, FREE_JSON])
def test_a_task_without_tools_learns_nothing_from_requests_with_tools(events, task):
    ask(events, "up", HALL, thumb=1, finish_reason="tool_calls")
    ask(events, "a call", ON, correction=HALL)
    ask(events, "an answer", HALL, correction=ON)
    ask(events, "required", HALL, PARAMETERS | {"tool_choice": "required"}, correction=HALL)
    # The tools are not sent again with the result of the call.
    ask(events, "", ON, {"json_schema": None}, correction=ON, messages=json.dumps(TOLD))
    ask(events, "without tools", ON, {"json_schema": None}, thumb=1)
    labelled = events.rows(task=task)
    assert labelled.report["excluded"] == {"with_tools": 5}
    assert [row.question for row in (*labelled.train, *labelled.holdout)] == ["without tools"]


@pytest.mark.parametrize("place", [1, 2])
def test_calls_and_results_before_the_answer_are_looked_at_too(events, place):
    messages = json.loads(json.dumps(TOLD))
    if place == 1:
        messages[1]["tool_calls"][0]["arguments"] = {"to": "eve@example.org"}
    else:
        messages[2]["content"] = "sent to eve@example.org"
    ask(events, "a", "It is on.", correction="Done.", messages=json.dumps(messages))
    assert events.rows(task=TOOLS).report["excluded"] == {"redacted": 1}


def test_an_answer_after_a_result_is_learned_with_the_call_before_it_and_nothing_else(events, tmp_path):
    ask(events, "", "It is on.", correction="It is on in the hall.", messages=json.dumps(TOLD))
    labelled = events.rows(task=TOOLS)
    (row,) = (*labelled.train, *labelled.holdout)
    assert [message.role for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1].tool_calls == (ToolCall("light", '{"on":1,"area":"hall"}', "a"),)
    assert [message.is_learned for message in row.messages] == [None, False, None, None]
    write_labelled(tmp_path, labelled)
    read = [*read_labelled(tmp_path / ROWS), *read_labelled(tmp_path / HELD_OUT)]
    assert read == [row]


def test_a_confirmed_answer_is_learned_with_its_thoughts_and_a_corrected_one_without(events, tmp_path):
    ask(events, "hall", HALL, thumb=1, reasoning="A light, in the hall.")
    ask(events, "attic", HALL, correction=turn(("light", {"area": "attic"})), reasoning="The hall?")
    ask(events, "eve", HALL, thumb=1, reasoning="It is for [email].")
    labelled = events.rows(task=TOOLS)
    write_labelled(tmp_path, labelled)
    read = [*read_labelled(tmp_path / ROWS), *read_labelled(tmp_path / HELD_OUT)]
    assert {row.question: row.messages[-1].reasoning for row in read} == {
        "hall": "A light, in the hall.",
        "attic": None,
    }
    assert labelled.report["excluded"] == {"redacted": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(format_rows(read))
    assert [row.messages for row in collect_feedback(path, None, "stop").rows] == [
        row.messages for row in read
    ]


def test_the_pipeline_collects_the_rows_that_were_written(events, tmp_path):
    ask(events, "", "Hm.", correction="It is on.", messages=json.dumps(TOLD), user="x")
    ask(events, "attic too", "Hm.", correction=HALL, user="y")
    labelled = events.rows(task=TOOLS)
    rows = [*labelled.train, *labelled.holdout]
    path = tmp_path / "rows.jsonl"
    path.write_text(format_rows(rows))
    assert len(rows) == 2 and read_labelled(path) == rows
    collected = collect_feedback(path, None, "stop").rows
    assert [row.id for row in collected] == [row.id for row in rows]
    assert [row.tools for row in collected] == [row.tools for row in rows]


def test_two_answers_to_one_question_with_other_results_are_two_rows(events):
    for result in ("done", "failed"):
        messages = [*TOLD[:2], TOLD[2] | {"content": result}]
        ask(events, "", "Hm.", correction=f"It is {result}.", messages=json.dumps(messages), user=result)
    assert events.rows(task=TOOLS).report["labelled_rows"] == 2
