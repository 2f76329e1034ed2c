"""Rows with calls of tools: what is rejected, what is redacted, and what is equal."""

import json
from dataclasses import replace

import pytest

from stages.common.messages import Message, Tool, ToolCall
from stages.common.records import make_row
from stages.common.task.json_task import JsonTask
from stages.common.task.text_task import TextTask
from stages.common.task.tools_task import ToolsTask
from stages.curate.calls import check_calls
from stages.curate.duplicates import find_conflicting_answers, find_exact_duplicates, find_near_duplicates
from stages.curate.private import format_rejects
from stages.curate.rules import (
    Rejection,
    check_answer,
    find_personal_data,
    limit_answer_length,
    limit_repetition,
)
from stages.curate.spelling import spell_rows

KINDS = ["email", "phone", "secret"]


def make_tool(name="lamp", description="A lamp.", **properties):
    schema = {"type": "object", "properties": properties or {"on": {"type": "boolean"}}, "required": ["on"]}
    function = {"name": name, "description": description, "parameters": schema}
    return Tool(json.dumps({"type": "function", "function": function}, ensure_ascii=False))


LAMP = make_tool()
SLOW = {"type": "string", "pattern": "^(a|a)*$"}  # doubles with each letter


def talk(
    arguments='{"on":true}', name="lamp", id=None, result="done", answer="It is on.", tools=(LAMP,), **more
):
    messages = [
        Message("user", "lamp on"),
        Message("assistant", "", (ToolCall(name, arguments, id),), **more),
        Message("tool", result, tool_call_id=id),
        Message("assistant", answer),
    ]
    return make_row(messages, "toy", "mit", tools=tools)


def fault_of(row, task=None):
    rejection = check_calls(task or ToolsTask())(row)
    return (rejection.reason, rejection.detail) if rejection else None


def test_every_learned_answer_has_a_length_and_is_one_of_the_task():
    broken = '{"tool_calls": [{"function": "lamp"}]}'
    for first, rule, fault in (
        ("too long", limit_answer_length, ("long_answer", "message 2: 8 characters, at most 7 required")),
        ("\u200b", limit_answer_length, ("empty_answer", "message 2: no visible character")),
        (broken, check_answer, ("invalid_answer", "message 2: the answer begins a call that is none")),
    ):
        limit = 7 if rule is limit_answer_length else ToolsTask()
        turns = [Message("user", "a"), Message("assistant", first), Message("user", "b")]
        row = make_row([*turns, Message("assistant", "ok")], "toy", "mit")
        found = rule(limit, "all")(row)
        assert found is not None and (found.reason, found.detail[: len(fault[1])]) == fault
        assert rule(limit)(row) is None and rule(limit, "last")(row) is None
        turns[1] = replace(turns[1], is_learned=False)
        assert rule(limit, "all")(make_row([*turns, Message("assistant", "ok")], "toy", "mit")) is None


def test_a_call_that_fits_its_tool_is_kept():
    assert fault_of(talk()) is None


def test_a_call_of_a_tool_that_the_row_does_not_list():
    reason, detail = fault_of(talk(name="lamb"))
    assert reason == "unknown_tool"
    assert "did you mean lamp?" in detail
    assert fault_of(talk(tools=()))[0] == "unknown_tool"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("{}", "'on' is a required property"),
        ('{"on":"yes"}', "$.on: 'yes' is not of type 'boolean'"),
        ('{"on":true,"onn":1}', "'onn' is no argument of lamp; did you mean on?"),
        ('{"on":null}', "None is not of type 'boolean'"),
    ],
)
def test_arguments_outside_the_schema(arguments, part):
    reason, detail = fault_of(talk(arguments))
    assert reason == "wrong_arguments"
    assert part in detail


def test_further_arguments_pass_where_the_schema_allows_them():
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": True}
    tool = Tool(json.dumps({"type": "function", "function": {"name": "lamp", "parameters": schema}}))
    assert fault_of(talk('{"on":true,"more":1}', tools=[tool])) is None


def test_a_tool_without_parameters_takes_no_arguments():
    tool = Tool('{"type":"function","function":{"name":"lamp"}}')
    assert fault_of(talk("{}", tools=[tool])) is None
    assert fault_of(talk(tools=[tool]))[0] == "wrong_arguments"


@pytest.mark.parametrize("schema", [SLOW, {"not": SLOW}, {"anyOf": [SLOW, {"type": "string"}]}])
def test_a_pattern_that_backtracks_forever_rejects_the_row_in_time(schema):
    tool = make_tool(on=schema)
    reason, detail = fault_of(talk(json.dumps({"on": "a" * 60 + "!"}), tools=[tool]))
    assert reason == "wrong_arguments"
    assert "lamp: a text takes too long to match the pattern '^(a|a)*$'" in detail


def test_a_call_that_the_grammar_could_not_write_is_rejected_as_one_row():
    tool = make_tool(on={"type": "string", "format": "date"})
    assert fault_of(talk('{"on":"2026-11-29"}', tools=[tool])) is None
    reason, detail = fault_of(talk('{"on":"tomorrow"}', tools=[tool]))
    assert (reason, "$.on: behind" in detail) == ("wrong_arguments", True)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "number"}, 1e-7),
        ({"type": "number"}, 1e22),
        ({"type": "number", "minimum": 0}, 0.5),
        ({"type": "integer"}, -3),
        ({"type": "string", "minLength": 1}, 'ü "quoted" \\ \n\u0007 😀'),
        ({"type": "array", "items": {"type": "object"}}, [{}, {"a": [None, True]}]),
        ({"type": ["string", "null"]}, None),
        ({"enum": ["a", 1, None, 2.5]}, 2.5),
        ({"type": "string", "format": "email"}, "ann@example.org"),
        ({"type": "string", "format": "of-ones-own"}, "any"),
        ({}, {"any": ["thing", 1]}),
    ],
)
def test_a_call_that_the_grammar_can_write_is_kept(schema, value):
    arguments = json.dumps({"on": value}, ensure_ascii=False, separators=(",", ":"))
    assert fault_of(talk(arguments, tools=[make_tool(on=schema)])) is None


def test_decimals_are_multiples_as_they_are_written():
    tool = make_tool(on={"type": "number", "multipleOf": 0.01})
    assert fault_of(talk('{"on":4.47}', tools=[tool])) is None
    assert fault_of(talk('{"on":4.475}', tools=[tool]))[0] == "wrong_arguments"


def test_a_wrong_call_of_weight_zero_is_not_learned_and_stays():
    assert fault_of(talk(name="lamb", is_learned=False)) is None


@pytest.mark.parametrize(
    "text",
    ['{"tool_calls":[{"name":"lamp","arguments":{"on":true}}]}', ' {"malformed_call":"x"} ',
     'I call it: <tool_call>{"name": "lamp"', '[TOOL_CALLS] [{"name": "lamp"}]', '<|python_tag|>lamp()',
     '<functioncall> {"name": "lamp", "arguments": \'{"on": true}\'}', "<|tool_call_start|>[lamp(on=True)]",
     "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>lamp"],
)  # fmt: skip
def test_a_text_that_is_a_call(text):
    assert fault_of(talk(answer=text))[0] == "call_as_text"
    plain = make_row([Message("user", "a"), Message("assistant", text)], "toy", "mit")
    assert fault_of(plain)[0] == "call_as_text"
    assert fault_of(plain, TextTask()) is None  # without tools it is a text like any other


@pytest.mark.parametrize("task", [TextTask(), JsonTask(None)])
def test_calls_are_learned_by_tasks_of_the_kind_tools_alone(task):
    reason, detail = fault_of(talk(), task)
    assert reason == "tool_call"
    assert "task.kind: tools" in detail


PRIVATE = "anna.berger@web.de"


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (talk(result=f"sent to {PRIVATE}"), "the message of the tool"),
        (talk(json.dumps({"to": [PRIVATE]})), "the arguments of a call"),
        (talk(json.dumps({"to": f"call:\n{PRIVATE}"})), "the arguments of a call"),
        (talk(reasoning=f"They are {PRIVATE}."), "the reasoning of the assistant"),
        (talk(tools=[make_tool(description=f"Ask {PRIVATE}.")]), "the description of a tool"),
    ],
)
def test_personal_data_is_found_and_redacted_wherever_it_is(row, place):
    rejection = find_personal_data(KINDS)(row)
    assert rejection == Rejection("personal_email", f"in {place}")
    (line,) = format_rejects([(row, rejection)], KINDS)
    assert PRIVATE not in line
    assert "[email]" in line
    shown = json.loads(line)["row"]
    for message in shown["messages"]:
        for call in message["tool_calls"]:
            assert isinstance(json.loads(call["arguments"]), dict)
    assert all(isinstance(json.loads(tool["text"]), dict) for tool in shown["tools"])


def test_a_secret_next_to_its_key_in_arguments_is_found():
    row = talk(json.dumps({"password": "tr0ub4dor-and-3"}))
    assert find_personal_data(KINDS)(row).reason == "personal_secret"


def test_a_phone_number_behind_an_escape_is_found():
    assert find_personal_data(KINDS)(talk(json.dumps({"to": "\n+49 171 2345678"}))).reason == "personal_phone"


def test_results_may_repeat_words():
    assert limit_repetition(30, 8)(talk(result="nan " * 20)) is None


def test_spelling_keeps_arguments_valid_and_tools_with_the_row():
    """In the text, NFC would make one character of the n of an escape and the accent after it."""
    arguments = '{"on":true,"say":"\\n\u0303","e\u0301":"a\\r\\nb"}'
    row = talk(arguments, reasoning="e\u0301", is_learned=True)
    rows, changes = spell_rows([row], ["nfc", "line_ends"])
    (spelled,) = rows
    call = spelled.messages[1].tool_calls[0]
    assert call.values == {"on": True, "say": "\n\u0303", "é": "a\nb"}
    assert (spelled.messages[1].reasoning, spelled.messages[1].is_learned) == ("é", True)
    assert spelled.tools == row.tools
    assert {change.role for change in changes} == {"assistant"}
    described = replace(row, tools=(make_tool(description="e\u0301"),))
    assert spell_rows([described], ["nfc"])[0][0].tools[0].value["function"]["description"] == "é"


def test_keys_that_would_become_one_are_left_as_they_are():
    arguments = '{"é":1,"e\u0301":2}'
    assert spell_rows([talk(arguments)], ["nfc"])[0][0].messages[1].tool_calls[0].arguments == arguments


def test_rows_that_differ_in_the_ids_of_calls_are_duplicates():
    rows = [talk(id="c1"), talk(id="c2"), talk(), talk('{"on":false}'), talk(tools=[LAMP, make_tool("fan")])]
    assert set(find_exact_duplicates(rows)) == {1, 2}
    near = find_near_duplicates(0.9, ToolsTask())
    assert set(near(rows)) == set()  # equal rows are not its concern


def test_earlier_calls_are_part_of_what_is_compared():
    """The questions and answers are equal, and what was called in between is not."""
    one, two = talk(answer="Done."), talk('{"on":false}', answer="Done.")
    assert find_near_duplicates(0.9, ToolsTask())([one, two]) == {}


def test_two_calls_for_one_prompt_conflict_unless_the_tools_differ():
    def ask(arguments, tools=(LAMP,)):
        turns = [Message("user", "lamp"), Message("assistant", "", (ToolCall("lamp", arguments),))]
        return make_row(turns, "toy", "mit", tools=tools)

    rule = find_conflicting_answers(ToolsTask())
    assert set(rule([ask('{"on":true}'), ask('{"on":false}')])) == {0, 1}
    assert rule([ask('{"on":true}'), ask('{"on":false}', [LAMP, make_tool("fan")])]) == {}
