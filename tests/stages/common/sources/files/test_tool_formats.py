"""Conversations with tools as the field's files have them, each against the record that must come out."""

import json
import re
from pathlib import Path

import pytest

from services.api.tools import check_arguments
from services.engines.calls.allowed import check_schemas
from stages.common.messages import Message, Tool, ToolCall
from stages.common.sources.files.entries import BadRow
from stages.common.sources.files.messages import read_conversation
from stages.common.sources.files.rows import check_conversation
from stages.common.sources.files.shapes import Columns, detect_shape
from stages.common.sources.files.turns import CUT, REFUSAL, TEXT_JOINED, THOUGHTS_MOVED, THOUGHTS_WITHIN
from tests.stages.common.sources.files.test_shapes import PATH

SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
LAMP = {"type": "function", "function": {"name": "lamp", "description": "A lamp.", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"on": true}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "done"}
USER, DONE = {"role": "user", "content": "lamp on"}, {"role": "assistant", "content": "It is on."}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TALK = [
    Message("user", "lamp on"),
    Message("assistant", "", (ToolCall("lamp", '{"on":true}', "c1"),)),
    Message("tool", "done", tool_call_id="c1"),
    Message("assistant", "It is on."),
]
ROWS = re.compile(r"`(\{\"(?:messages|conversations|query)\".*\})` \|")
# The same without ids, which only OpenAI's format has.
PLAIN_TALK = [
    TALK[0],
    Message("assistant", "", (ToolCall("lamp", '{"on":true}'),)),
    Message("tool", "done"),
    TALK[3],
]


def read(record, **columns):
    """Return shape, messages, tools as values, and forms."""
    shape, forms = detect_shape(PATH, [record], Columns(**columns)), set()
    messages, tools = read_conversation(record, shape, forms)
    return shape, check_conversation(messages, tools, None), [tool.value for tool in tools], forms


def fault_of(record, **columns):
    with pytest.raises(BadRow) as error:
        read(record, **columns)
    assert str(error.value)
    return error.value.reason, error.value.detail


def chat(*turns, tools=(LAMP,), **more):
    return {"messages": list(turns), "tools": list(tools), **more}


# OpenAI


@pytest.mark.parametrize(
    "tools",
    [[LAMP], json.dumps([LAMP]), [LAMP["function"]], json.dumps([LAMP["function"]]), [json.dumps(LAMP)]],
)
def test_openai_chat_with_tools(tools):
    shape, messages, found, forms = read({"messages": [USER, ASKS, RESULT, DONE], "tools": tools})
    assert shape.columns == {"messages": "messages", "tools": "tools"}
    assert (messages, found, forms) == (TALK, [LAMP], {"tool_calls"})


def test_arguments_may_be_an_object_and_content_may_be_parts_or_absent():
    call = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": {"on": True}}}
    parts = [{"type": "text", "text": "do"}, {"type": "text", "text": "ne"}]
    turns = USER, {"role": "assistant", "tool_calls": [call]}, RESULT | {"content": parts}, DONE
    assert read(chat(*turns))[1] == TALK


def test_the_older_form_with_functions_is_read():
    asks = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "lamp", "arguments": '{"on": true}'},
    }
    result = {"role": "function", "name": "lamp", "content": "done"}
    shape, messages, tools, forms = read(
        {"messages": [USER, asks, result, DONE], "functions": [LAMP["function"]]}
    )
    assert (messages, tools, shape.tools) == (PLAIN_TALK, [LAMP], "functions")
    assert forms == {"function_call, the older form of tool_calls"}


def test_several_calls_in_one_turn_and_text_next_to_them():
    calls = [CALL, CALL | {"id": "c2"}]
    asks = {"role": "assistant", "content": "One moment.", "tool_calls": calls}
    found = read(chat(USER, asks, RESULT, RESULT | {"tool_call_id": "c2"}, DONE))[1]
    assert (found[1].content, [call.id for call in found[1].tool_calls]) == ("One moment.", ["c1", "c2"])


def test_a_conversation_may_end_with_a_call():
    assert read(chat(USER, ASKS))[1] == TALK[:2]


def test_the_result_of_a_tool_may_be_json_or_nothing():
    assert read(chat(USER, ASKS, RESULT | {"content": {"on": True}}, DONE))[1][2].content == '{"on":true}'
    assert read(chat(USER, ASKS, RESULT | {"content": None}, DONE))[1][2].content == ""


def test_weights_are_kept_and_the_role_developer_is_counted():
    developer = {"role": "developer", "content": "Be brief."}
    turns = developer, USER, ASKS | {"weight": 0}, RESULT, DONE | {"weight": 1}
    _, messages, _, forms = read(chat(*turns))
    assert [m.is_learned for m in messages] == [None, None, False, None, True]
    assert messages[0] == Message("system", "Be brief.")
    assert forms == {"tool_calls", "weights of answers", "the role developer, read as system"}


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "loss"])
def test_turns_are_excluded_under_the_names_that_trainers_have(key):
    messages = read(chat(USER, ASKS | {key: 0}, RESULT, DONE | {key: True}))[1]
    assert [message.is_learned for message in messages] == [None, False, None, True]
    assert fault_of(chat(USER, DONE | {key: False}))[0] == "weight_zero"


@pytest.mark.parametrize(
    "after",
    [
        (USER,),
        (ASKS, RESULT | {"content": "one more"}),
        (USER, DONE | {"weight": 0}),
        (USER, DONE | {"weight": 0}, USER),
        ({"role": "system", "content": "Ask for a rating."},),
    ],
)
def test_a_log_is_read_up_to_its_last_answer_and_the_rest_is_counted(after):
    _, messages, _, forms = read(chat(USER, DONE, *after))
    answered = [message for message in after if message is ASKS]
    assert messages == [TALK[0], TALK[3], *([TALK[1]] if answered else [])]
    assert CUT in forms
    assert CUT not in read(chat(USER, DONE))[3]


def test_a_refusal_is_the_answer_where_there_is_no_other():
    refuses = {"role": "assistant", "content": None, "refusal": "I may not open that door."}
    _, messages, _, forms = read(chat(USER, refuses, tools=()))
    assert messages == [TALK[0], Message("assistant", "I may not open that door.")]
    assert forms == {REFUSAL}
    assert read(chat(USER, {"role": "assistant", "refusal": "No."}, tools=()))[1][1].content == "No."
    assert read(chat(USER, DONE | {"refusal": None}, tools=()))[3] == set()


@pytest.mark.parametrize(
    ("content", "answer", "thoughts", "form"),
    [
        ("<think>\nThey want light.\n</think>\n\nIt is on.", "It is on.", "They want light.", THOUGHTS_MOVED),
        ("<think>\n\n</think>\n\nIt is on.", "It is on.", None, THOUGHTS_MOVED),
        ("On. <think>a</think>", "On. <think>a</think>", None, THOUGHTS_WITHIN),
        ("They want light.</think>On.", "They want light.</think>On.", None, THOUGHTS_WITHIN),
    ],
)
def test_thoughts_before_an_answer_are_its_reasoning_and_others_are_counted(content, answer, thoughts, form):
    said = Message("assistant", answer, reasoning=thoughts)
    _, messages, _, forms = read(chat(USER, DONE | {"content": content}, tools=()))
    assert (messages[1], forms) == (said, {form})
    record = {"prompt": "lamp on", "completion": content}
    assert read(record)[1:] == ([TALK[0], said], [], {form})


def test_thoughts_are_taken_before_calls_are_looked_for():
    thought = "a <tool_call> would do"
    call = '<tool_call>\n{"name": "lamp", "arguments": {"on": true}}\n</tool_call>'
    messages = read(chat(USER, DONE | {"content": f"<think>{thought}</think>\n{call}"}))[1]
    assert messages[1] == Message("assistant", "", PLAIN_TALK[1].tool_calls, reasoning=thought)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_the_names_of_the_servers(key):
    messages = read(chat(USER, ASKS | {key: "They want light."}, RESULT, DONE))[1]
    assert messages[1].reasoning == "They want light."
    assert read(chat(USER, ASKS | {key: None}, RESULT, DONE))[1] == TALK


def test_keys_without_a_value_are_left_out_of_a_tool():
    """Parquet writes every key of a column into every row."""
    padded = {**LAMP, "strict": None, "function": {**LAMP["function"], "strict": None}}
    assert read(chat(USER, ASKS, RESULT, DONE, tools=[padded]))[2] == [LAMP]


def test_a_column_of_other_tools_is_not_read():
    shape, _, tools, _ = read({"messages": [USER, DONE], "tools": ["hammer"]})
    assert (shape.tools, tools) == (None, [])


# ShareGPT and Hermes


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


CALL_TEXT = '{"name": "lamp", "arguments": {"on": true}}'


@pytest.mark.parametrize(
    "result", ["observation", "tool", "tool_response", "function_response", "tool result", "ipython"]
)
@pytest.mark.parametrize("arguments", ['{"on": true}', json.dumps('{"on": true}')])
def test_sharegpt_with_turns_of_calls(result, arguments):
    call = f'{{"name": "lamp", "arguments": {arguments}}}'
    turns = ("human", "lamp on"), ("function_call", call), (result, "done"), ("gpt", "It is on.")
    shape, messages, tools, forms = read(sharegpt(*turns, tools=json.dumps([LAMP["function"]])))
    assert (shape.name, messages, tools) == ("sharegpt", PLAIN_TALK, [LAMP])
    assert forms == {"turns of the role function_call"}


@pytest.mark.parametrize("role", ["function_call", "function-call", "tool call"])
@pytest.mark.parametrize(
    "call",
    [
        """{"name": "lamp", "arguments": '{"on": true}'}""",  # glaive's
        "{'name': 'lamp', 'arguments': {'on': True}}",
        {"name": "lamp", "arguments": {"on": True}},
    ],
)
def test_a_turn_of_calls_may_be_a_literal_of_python_or_an_object(role, call):
    turns = ("human", "lamp on"), (role, call), ("function-response", "done"), ("gpt", "It is on.")
    assert read(sharegpt(*turns, tools=[LAMP]))[1] == PLAIN_TALK


@pytest.mark.parametrize(
    "call", ["[lamp(on=True)]", "{'name': open('x')}", "<function=lamp>on</function>", ""]
)
def test_a_turn_of_calls_in_another_notation_is_rejected(call):
    assert fault_of(sharegpt(("human", "lamp on"), ("function_call", call), tools=[LAMP]))[0] == "wrong_call"


def test_thoughts_of_a_turn_of_calls_are_its_reasoning():
    thought = f"<think>They want light.</think>\n{CALL_TEXT}"
    _, messages, _, forms = read(sharegpt(("human", "lamp on"), ("function_call", thought), tools=[LAMP]))
    assert messages[1] == Message("assistant", "", PLAIN_TALK[1].tool_calls, reasoning="They want light.")
    assert forms == {"turns of the role function_call", THOUGHTS_MOVED}
    turns = [USER, {"role": "tool_call", "content": CALL_TEXT, "reasoning_content": "They want light."}]
    assert read(chat(*turns))[1][1].reasoning == "They want light."


def test_a_text_before_a_turn_of_calls_is_of_the_same_turn():
    """The model must not learn to stop behind it."""
    announces = {"role": "assistant", "content": "One moment.", "reasoning_content": "Light."}
    calls = {"role": "tool_call", "content": CALL_TEXT}
    result = {"role": "tool_response", "content": "done"}
    _, messages, _, forms = read(chat(USER, announces, calls, calls, result, result, DONE))
    assert messages[1] == Message(
        "assistant", "One moment.", PLAIN_TALK[1].tool_calls * 2, reasoning="Light."
    )
    assert [message.role for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert forms == {"reasoning", "turns of the role function_call", TEXT_JOINED}
    apart = read(chat(USER, announces | {"weight": 0}, calls | {"weight": 1}, result, DONE))[1]
    assert [message.content for message in apart] == ["lamp on", "One moment.", "", "done", "It is on."]


def test_calls_that_follow_each_other_are_one_turn():
    turns = ("human", "both on"), ("function_call", CALL_TEXT), ("function_call", f"[{CALL_TEXT}]")
    assert len(read(sharegpt(*turns, tools=[LAMP]))[1][1].tool_calls) == 2


HERMES = """\
You are a function calling AI model. You are provided with function signatures within <tools> </tools> tags. \
You may call one or more functions.
<tools>
{}
</tools>
For each function call return a json object within <tool_call> </tool_call> tags:
<tool_call>
{{'arguments': <args-dict>, 'name': <function-name>}}
</tool_call>"""
QWEN = """\
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>}}
</tool_call>"""


@pytest.mark.parametrize(
    ("prompt", "own"), [(HERMES, "You are a function calling AI model."), (QWEN, "Be brief.")]
)
@pytest.mark.parametrize(
    "tools",
    [
        json.dumps([LAMP]),
        json.dumps(LAMP),
        f"{json.dumps(LAMP)}\n{json.dumps(LAMP).replace('lamp', 'fan')}",
        str([LAMP]),
    ],
)
def test_the_tools_in_the_system_message_of_hermes(prompt, own, tools):
    turns = (
        ("system", prompt.format(tools)),
        ("human", "lamp on"),
        ("gpt", f"<tool_call>\n{CALL_TEXT}\n</tool_call>"),
    )
    _, messages, found, forms = read(sharegpt(*turns))
    assert messages == [Message("system", own), *PLAIN_TALK[:2]]
    assert found[0] == LAMP
    assert forms == {"Hermes <tool_call> in texts", "Hermes <tools> in the system message"}


def test_a_system_message_of_tools_alone_is_left_out():
    turns = ("system", f"<tools>{json.dumps([LAMP])}</tools>"), ("human", "hi"), ("gpt", "hello")
    assert read(sharegpt(*turns))[1] == [Message("user", "hi"), Message("assistant", "hello")]


def test_tools_that_the_row_does_not_list_are_an_error_of_the_row():
    turns = ("system", HERMES.format(json.dumps([LAMP]))), ("human", "hi"), ("gpt", "hello")
    fan = json.loads(json.dumps(LAMP).replace("lamp", "fan"))
    assert fault_of(sharegpt(*turns, tools=[fan]))[0] == "wrong_tools"
    assert read(sharegpt(*turns, tools=[LAMP]))[2] == [LAMP]


@pytest.mark.parametrize("call", [CALL_TEXT, "{'name': 'lamp', 'arguments': {'on': True}}"])
@pytest.mark.parametrize("role", ["tool", "user"])
def test_calls_and_results_in_the_text_of_turns(call, role):
    block = f"<tool_call>\n{call}\n</tool_call>"
    turns = [
        ("human", "both on"),
        ("gpt", f"One moment.\n{block}\n{block}"),
        (role, "<tool_response>\ndone\n</tool_response>\n<tool_response>\ndone\n</tool_response>"),
        ("gpt", "They are on."),
    ]
    messages = read(sharegpt(*turns, tools=[LAMP]))[1]
    assert messages[1] == Message("assistant", "One moment.", (ToolCall("lamp", '{"on":true}'),) * 2)
    assert messages[2:4] == [Message("tool", "done")] * 2


def test_a_text_that_mentions_the_notation_is_text():
    text = "Write <tool_call> and then the call."
    assert read(sharegpt(("human", "how?"), ("gpt", text)))[1][1].content == text


# xLAM and APIGen


ARGUMENTS = {
    "on": {"description": "State.", "type": "bool"},
    "rooms": {"description": "Where.", "type": "List[str], optional"},
    "level": {"description": "How much.", "type": "int", "default": 3},
}


@pytest.mark.parametrize("as_text", [True, False])
def test_xlam_is_read_and_its_arguments_become_a_schema(as_text):
    tools = [{"name": "lamp", "description": "A lamp.", "parameters": ARGUMENTS}]
    answers = [{"name": "lamp", "arguments": {"on": True}}]
    record = {"id": 1, "query": "lamp on", "tools": tools, "answers": answers}
    if as_text:
        record |= {"tools": json.dumps(tools), "answers": json.dumps(answers)}
    shape, messages, found, forms = read(record)
    assert shape.name == "calls"
    assert shape.columns == {"prompt": "query", "completion": "answers", "tools": "tools"}
    assert messages == PLAIN_TALK[:2]
    assert found[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "on": {"type": "boolean", "description": "State."},
            "rooms": {"type": "array", "items": {"type": "string"}, "description": "Where."},
            "level": {"type": "integer", "description": "How much.", "default": 3},
        },
        "required": ["on"],
    }
    assert forms == {"calls in a column (xLAM)", "tools with xLAM's arguments"}


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("str", {"type": "string"}),
        ("Dict[str, float]", {"type": "object", "additionalProperties": {"type": "number"}}),
        ("List[List[int]]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        ("Tuple[int, ...]", {"type": "array", "items": {"type": "integer"}}),
        ("Tuple[int, str]", {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}),
        ("Union[int, str]", {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        ("Any", {}),
        ("list", {"type": "array"}),
    ],
)
def test_types_of_python_are_types_of_json(kind, schema):
    tool = {"name": "f", "description": "", "parameters": {"a": {"type": kind}}}
    record = {"query": "q", "tools": [tool], "answers": [{"name": "f", "arguments": {}}]}
    assert read(record)[2][0]["function"]["parameters"]["properties"] == {"a": schema}


@pytest.mark.parametrize(
    "kind", ["int, optional", "int (optional)", "int, default=3", "int, optional, default: 3"]
)
def test_an_argument_may_be_left_out_by_its_type(kind):
    tool = {"name": "f", "description": "", "parameters": {"a": {"type": kind}, "b": {"type": "str "}}}
    record = {"query": "q", "tools": [tool], "answers": [{"name": "f", "arguments": {}}]}
    assert read(record)[2][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        "required": ["b"],
    }


def test_an_argument_may_say_itself_whether_it_is_required_and_have_more_of_a_json_schema():
    arguments = {
        "room": {"type": "string", "required": True, "default": "bath"},
        "level": {"type": "int", "required": False, "minimum": 0},
        "names": {"type": "array", "items": {"type": "string"}},
        "at": {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]},
    }
    tool = {"name": "f", "description": "", "parameters": arguments}
    record = {"query": "q", "tools": [tool], "answers": [{"name": "f", "arguments": {}}]}
    assert read(record)[2][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "room": {"type": "string", "default": "bath"},
            "level": {"type": "integer", "minimum": 0},
            "names": {"type": "array", "items": {"type": "string"}},
            "at": {"type": "object", "properties": {"hour": {"type": "integer"}}, "required": ["hour"]},
        },
        "required": ["room", "names", "at"],
    }


@pytest.mark.parametrize(
    "kind", ["Foo", "List[Foo]", "list of str", "Dict[str]", "", "List[" * 99 + "int" + "]" * 99]
)
def test_an_unknown_type_is_rejected_with_what_may_be_there(kind):
    tool = {"name": "f", "description": "", "parameters": {"a": {"type": kind}}}
    reason, detail = fault_of({"query": "q", "tools": [tool], "answers": [{"name": "f", "arguments": {}}]})
    assert reason == "wrong_tools"
    assert "'a'" in detail
    assert "fix:" in detail


@pytest.mark.parametrize("answers", ["[]", [], "", None])
def test_answers_without_a_call_are_none(answers):
    record = {"query": "q", "tools": [LAMP], "answers": answers}
    assert fault_of(record, shape="calls", prompt="query", completion="answers")[0] in (
        "no_answer",
        "missing_field",
    )


# What is broken


@pytest.mark.parametrize(
    "arguments",
    ["on", "[1]", '"{}"', '{"on": NaN}', '{"on": 1, "on": 2}', '{"a": {"b": 1, "b": 2}}', [1], 3,
     {"on": float("nan")}, {"on": float("inf")}, "[" * 100_000, "9" * 5000, '{"on": 1e999}'],
)  # fmt: skip
def test_arguments_that_are_no_object_or_would_lose_a_value(arguments):
    call = CALL | {"function": {"name": "lamp", "arguments": arguments}}
    reason, detail = fault_of(chat(USER, ASKS | {"tool_calls": [call]}))
    assert reason == "wrong_call"
    assert "message 2, call 1" in detail


@pytest.mark.parametrize(
    "call",
    ["text", 3, None, {}, {"id": "1"}, {"function": 3}, {"function": {"arguments": "{}"}},
     {"function": {"name": "a.b"}}, {"function": {"name": "a b"}}, {"function": {"name": "x" * 65}},
     {"type": "custom", "custom": {"name": "x"}}, {"id": {}, "function": {"name": "a"}}],
)  # fmt: skip
def test_what_is_no_call(call):
    assert fault_of(chat(USER, ASKS | {"tool_calls": [call]}))[0] == "wrong_call"


def test_an_empty_text_is_a_call_without_arguments_as_in_the_service():
    call = CALL | {"function": {"name": "lamp", "arguments": ""}}
    assert read(chat(USER, ASKS | {"tool_calls": [call]}))[1][1].tool_calls[0].arguments == "{}"
    assert check_arguments("") == "{}"


def test_a_name_with_a_dot_is_rejected_with_a_better_one():
    call = CALL | {"function": {"name": "home.lamp", "arguments": "{}"}}
    assert "fix: call it 'home_lamp'" in fault_of(chat(USER, ASKS | {"tool_calls": [call]}))[1]
    tool = {"name": "home lamp", "parameters": SCHEMA}
    assert "fix: call it 'home_lamp'" in fault_of(chat(USER, DONE, tools=[tool]))[1]


def with_parameters(parameters):
    return {"type": "function", "function": {"name": "lamp", "parameters": parameters}}


@pytest.mark.parametrize(
    ("parameters", "part"),
    [
        ([], "a list"),
        ("text", "Expecting value"),
        ({"type": "array"}, "'array'"),
        ({"type": "dict"}, "'dict'"),
        ({"type": "object", "properties": {"a": {"type": "str"}}}, "'str'"),
        ({"type": "object", "properties": {"a": None}}, "None"),
        ({"city": {"description": "where"}}, "neither"),
        ({"$ref": "#"}, "back to itself"),
        ({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}}, "back to itself"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}},
             "$defs": {"b": {"$ref": "#/$defs/c"}, "c": {"$ref": "#/$defs/b"}}},
            "back to itself",
        ),
        ({"type": "object", "properties": {"a": {"$ref": "https://example.org/x.json"}}}, "outside"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "not there"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "pattern"),
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ({"type": "object", "properties": {"a": {"enum": [float("nan")]}}}, "not finite"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_held_to(parameters, part):
    reason, detail = fault_of(chat(USER, DONE, tools=[with_parameters(parameters)]))
    assert reason == "wrong_tools"
    assert part in detail
    assert "lamp" in detail


def test_a_schema_that_is_nested_too_deeply():
    deep = {"type": "string"}
    for _ in range(900):
        deep = {"type": "array", "items": deep}
    schema = {"type": "object", "properties": {"a": deep}}
    assert fault_of(chat(USER, DONE, tools=[with_parameters(schema)]))[0] == "wrong_tools"


def test_references_within_a_schema_are_taken():
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/b"}, "c": {"$ref": "#/$defs/b"}, "default": {"type": "string"}},
        "$defs": {"b": {"type": "string"}},
    }
    assert read(chat(USER, DONE, tools=[with_parameters(schema)]))[2][0]["function"]["parameters"] == schema


@pytest.mark.parametrize(
    ("own", "defs"),
    [
        ({"$ref": "#"}, {}),
        ({"$ref": "#/$defs/b"},
         {"b": {"items": {"$ref": "#/$defs/c"}}, "c": {"items": {"$ref": "#/$defs/b"}}}),
    ],
)  # fmt: skip
def test_a_schema_that_holds_itself_is_taken_as_the_service_takes_it(own, defs):
    schema = {"type": "object", "properties": {"a": own}, "$defs": defs}
    assert read(chat(USER, DONE, tools=[with_parameters(schema)]))[2][0]["function"]["parameters"] == schema
    check_schemas([Tool(json.dumps(with_parameters(schema)))])


def test_too_many_tools_and_two_of_one_name():
    many = [{"type": "function", "function": {"name": f"f{n}", "parameters": SCHEMA}} for n in range(500)]
    assert fault_of(chat(USER, DONE, tools=many)) == (
        "wrong_tools", "500 tools, and at most 128 are allowed in a row",
    )  # fmt: skip
    assert len(read(chat(USER, DONE, tools=many[:128]))[2]) == 128
    assert "2 tools have the name 'lamp'" in fault_of(chat(USER, DONE, tools=[LAMP, LAMP]))[1]


@pytest.mark.parametrize(
    "tools",
    [[LAMP, "text"], [LAMP, None], [LAMP, {"type": "web_search"}], [LAMP, {"function": {"parameters": {}}}]],
)
def test_what_is_no_tool(tools):
    assert fault_of({"messages": [USER, DONE], "tools": tools}, tools="tools")[0] == "wrong_tools"


@pytest.mark.parametrize("tools", ["[", '"text"', "3", 3])
def test_what_is_no_list_of_tools(tools):
    assert fault_of({"messages": [USER, DONE], "tools": tools}, tools="tools")[0] == "wrong_tools"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((USER, RESULT, DONE), "orphan_result"),
        ((USER, ASKS, RESULT | {"tool_call_id": "c9"}, DONE), "orphan_result"),
        ((USER, ASKS, RESULT, RESULT, DONE), "orphan_result"),
        ((USER, ASKS, DONE), "missing_result"),
        ((USER, ASKS | {"tool_calls": [CALL, CALL]}, RESULT, DONE), "repeated_id"),
        ((USER, {"role": "assistant", "content": ""}, USER, DONE), "empty_turn"),
        ((USER, {"role": "assistant", "content": "", "tool_calls": []}), "no_answer"),
        ((USER, USER), "no_answer"),
        ((USER, {"role": "assistant", "content": None}), "wrong_messages"),
        ((USER, DONE | {"weight": 1, "loss": False}), "wrong_messages"),
        ((USER, DONE | {"training": "no"}), "wrong_messages"),
        ((USER | {"tool_calls": [CALL]}, DONE), "wrong_call"),
        ((USER, ASKS | {"reasoning": ["a"]}), "wrong_messages"),
        ((USER, ASKS, RESULT | {"content": [{"type": "image_url", "image_url": "x"}]}, DONE), "not_text"),
        ((USER, ASKS | {"reasoning": "\ud800"}), "not_text"),
        ((USER, ASKS, RESULT | {"content": {"a": float("nan")}}, DONE), "wrong_messages"),
    ],
)
def test_conversations_that_cannot_be_learned(turns, reason):
    assert fault_of(chat(*turns))[0] == reason


@pytest.mark.parametrize(
    "text",
    ["<tool_call>{", "<tool_call>{}</tool_call>", "<tool_call>{'a': b}</tool_call>",
     f"<tool_call>{CALL_TEXT}</tool_call> I did it.", "<tool_call>{'name': 'a', 'name': 'b'}</tool_call>",
     "<tool_call>{'name': 'f', 'arguments': {'a': 1, 'a': 2}}</tool_call>",
     "<tool_call>{'name': 'f', 'arguments': {1: 2}}</tool_call>",
     "<tool_call>{'name': 'f', 'arguments': {**a}}</tool_call>"],
)  # fmt: skip
def test_broken_calls_in_a_text(text):
    assert fault_of(sharegpt(("human", "hi"), ("gpt", text), tools=[LAMP]))[0] == "wrong_call"


def test_the_examples_of_the_how_to_are_read():
    page = (Path(__file__).parents[5] / "docs/how-to/own-data.md").read_text(encoding="utf-8")
    table = page[page.index("### Conversations with tools") :]
    examples = [text.replace("[…]", json.dumps([LAMP]).replace('"', '\\"')) for text in ROWS.findall(table)]
    assert len(examples) == 4
    for text in examples:
        _, messages, tools, _ = read(json.loads(text))
        assert [call.arguments for message in messages for call in message.tool_calls] == ['{"on":true}']
        assert tools[0]["function"]["name"] == "lamp"
