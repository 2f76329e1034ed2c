"""Arguments of calls are written as the grammar of the service takes them, whatever the order of the row."""

import json

import pytest

from services.engines.grammar import Grammars, compile_schema
from stages.common.messages import Message, Tool, ToolCall
from stages.common.records import make_row
from stages.common.task.tools_task import ToolsTask
from stages.curate.calls import check_calls
from stages.curate.spelling import count_changes, spell_rows
from tests.tiny import make_tokenizer

CHANGES = ["argument_order", "whole_numbers"]
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
INNER = {"type": "object", "properties": {"x": WHOLE, "y": TEXT}}


def of(more=(), **properties):
    return {"type": "object", "properties": properties, **dict(more)}


def call_row(schema, arguments, name="f"):
    function = {"name": "f", "parameters": schema}
    tool = Tool(json.dumps({"type": "function", "function": function}))
    call = Message("assistant", "", (ToolCall(name, arguments),))
    return make_row([Message("user", "a"), call], "toy", "mit", tools=[tool])


@pytest.fixture(scope="module")
def takes():
    """Return whether the grammar of a schema takes a text."""
    tokenizer = make_tokenizer()
    tokens = Grammars(tokenizer, len(tokenizer), tokenizer.eos_token_id or 0)._tokens

    def check(schema, text):
        matcher = compile_schema(json.dumps(schema), tokens)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.mark.parametrize(
    ("schema", "before", "after", "names"),
    [
        (of(a=TEXT, b=WHOLE), '{"b":2,"a":"x"}', '{"a":"x","b":2}', {"argument_order"}),
        (of({"required": ["a", "b"]}, a=TEXT, b=WHOLE), '{"b":2,"a":"x"}', '{"a":"x","b":2}',
         {"argument_order"}),
        (of(a=INNER), '{"a":{"y":"z","x":5.0}}', '{"a":{"x":5,"y":"z"}}',
         {"argument_order", "whole_numbers"}),
        (of(a={"type": "array", "items": INNER}), '{"a":[{"y":"z","x":1}]}', '{"a":[{"x":1,"y":"z"}]}',
         {"argument_order"}),
        (of(a={"type": "array", "prefixItems": [INNER]}), '{"a":[{"y":"z","x":1}]}',
         '{"a":[{"x":1,"y":"z"}]}', {"argument_order"}),
        (of({"$defs": {"d": INNER}}, a={"$ref": "#/$defs/d"}), '{"a":{"y":"z","x":1}}',
         '{"a":{"x":1,"y":"z"}}', {"argument_order"}),
        (of(a={"anyOf": [TEXT, of({"required": ["p"]}, p=TEXT, q=TEXT), INNER]}), '{"a":{"y":"z","x":1}}',
         '{"a":{"x":1,"y":"z"}}', {"argument_order"}),
        (of({"allOf": [of(b=TEXT)]}, a=TEXT), '{"b":"z","a":"y"}', '{"a":"y","b":"z"}', {"argument_order"}),
        ({"allOf": [of(b=TEXT)], **of(a=TEXT)}, '{"a":"y","b":"z"}', '{"b":"z","a":"y"}', {"argument_order"}),
        (of({"additionalProperties": INNER}, a=TEXT), '{"n":{"y":"z","x":1},"a":"b"}',
         '{"a":"b","n":{"x":1,"y":"z"}}', {"argument_order"}),
        (of({"required": ["z"], "additionalProperties": True}, a=TEXT), '{"n":1,"z":2,"a":"b"}',
         '{"a":"b","z":2,"n":1}', {"argument_order"}),
        (of(a={"type": ["integer", "null"]}, b={"enum": [1, "b"]}, c={"const": 0}),
         '{"a":-3.0,"b":1.0,"c":0.0}', '{"a":-3,"b":1,"c":0}', {"whole_numbers"}),
        (of(a={"type": "array", "items": WHOLE}), '{"a":[1.0,2]}', '{"a":[1,2]}', {"whole_numbers"}),
    ],
)  # fmt: skip
def test_arguments_are_written_as_the_grammar_of_the_service_writes_them(takes, schema, before, after, names):
    row = call_row(schema, before)
    (changed,), changes = spell_rows([row], CHANGES)
    assert changed.messages[-1].tool_calls[0].arguments == after
    assert (takes(schema, before), takes(schema, after)) == (False, True)
    (change,) = changes
    assert (change.before, change.after, set(change.names)) == (before, after, names)
    assert change.row == changed.id != row.id
    assert count_changes(changes)["messages_changed_by"] == dict.fromkeys(sorted(names), 1)


def test_without_the_changes_what_the_grammar_cannot_write_is_a_rejected_row():
    row = call_row(of(a=TEXT, b=WHOLE), '{"b":2.0,"a":"x"}')
    assert spell_rows([row], ["nfc", "line_ends"]) == ([row], [])
    rejection = check_calls(ToolsTask())(row)
    assert rejection is not None
    assert rejection.reason == "wrong_arguments"
    (ordered,), _ = spell_rows([row], ["argument_order"])
    assert ordered.messages[-1].tool_calls[0].arguments == '{"a":"x","b":2.0}'


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (of(a=TEXT, b={"type": "number"}), '{"a":"x","b":5.0}'),  # a number may have a fraction
        (of(a=WHOLE, b=WHOLE), '{"b":2.5}'),
        (of(a=WHOLE), "{}"),
        (of({"additionalProperties": True}, a=WHOLE), '{"a":1,"z":5.0,"b":2}'),
    ],
)
def test_what_the_grammar_takes_as_it_is_stays_with_its_id(schema, arguments):
    row = call_row(schema, arguments)
    assert spell_rows([row], ["nfc", *CHANGES]) == ([row], [])


def test_a_call_of_an_unknown_tool_is_left_to_the_rule_that_rejects_it():
    row = call_row(of(a=TEXT, b=WHOLE), '{"b":2,"a":"x"}', name="g")
    assert spell_rows([row], CHANGES) == ([row], [])


def test_the_worse_answer_of_a_pair_is_written_alike():
    row = call_row(of(a=TEXT, b=WHOLE), '{"a":"x","b":2}')
    worse = Message("assistant", "", (ToolCall("f", '{"b":3,"a":"x"}'),))
    pair = make_row(row.messages, "toy", "mit", tools=row.tools, rejected=worse)
    (changed,), _ = spell_rows([pair], CHANGES)
    assert changed.rejected.tool_calls[0].arguments == '{"a":"x","b":3}'


def test_names_that_are_composed_find_their_place_in_the_schema():
    row = call_row({"type": "object", "properties": {"e\u0301": TEXT, "a": TEXT}}, '{"a":"x","e\u0301":"y"}')
    (changed,), _ = spell_rows([row], ["nfc", *CHANGES])
    assert changed.messages[-1].tool_calls[0].arguments == '{"é":"y","a":"x"}'
