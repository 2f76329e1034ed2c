"""Tools and calls that the service could not hold are refused before training, by row, place and remedy."""

import json
from threading import Event

import pytest

from services.engines.calls import trial
from stages.common.chat.tools_template import adapt_template
from stages.common.messages import Message, Tool, ToolCall
from stages.common.records import make_row
from stages.preflight.call_checks import find_call_problems
from tests.stages.common.chat.tool_templates import WITH_TOOLS
from tests.stages.common.chat_templates import make_family_tokenizer

TEXT, WHOLE = {"type": "string"}, {"type": "integer"}


@pytest.fixture(scope="module", params=["qwen-2.5", "llama-3.1", "mistral"])
def tokenizer(request):
    made = make_family_tokenizer(WITH_TOOLS[request.param])
    made.chat_template = adapt_template(made, {}, True, "auto")
    return made


def make_tool(properties, name="book", **more):
    schema = {"type": "object", "properties": properties, **more}
    return Tool(json.dumps({"type": "function", "function": {"name": name, "parameters": schema}}))


def call_row(arguments, *tools, count=1, **more):
    calls = tuple(ToolCall("book", arguments, f"call0000{n}") for n in range(count))
    return make_row(
        [Message("user", "a"), Message("assistant", "", calls, **more)], "toy", "mit", tools=tools
    )


def problems_of(tokenizer, *rows, turns="all", engine="auto"):
    return find_call_problems(tokenizer, rows, turns, engine)


@pytest.mark.parametrize(
    ("properties", "arguments"),
    [
        ({"day": {"type": "string", "format": "date"}, "n": WHOLE}, '{"day":"2026-11-29","n":-5}'),
        ({"say": TEXT}, json.dumps({"say": 'é ☀ "\n\t\\ <|im_end|> </tool_call> [/INST]'})),
        ({"in": {"$ref": "#"}, "many": {"type": "array", "items": {"anyOf": [TEXT, WHOLE]}}},
         '{"in":{"in":{},"many":["a",1]},"many":[]}'),
        ({"none": {"type": ["string", "null"]}, "x": {"type": "number"}}, '{"none":null,"x":5.25}'),
        ({}, "{}"),
    ],
)  # fmt: skip
def test_what_the_grammar_holds_is_no_problem(tokenizer, properties, arguments):
    assert problems_of(tokenizer, call_row(arguments, make_tool(properties))) == []


@pytest.mark.parametrize(
    ("properties", "arguments", "place"),
    [
        ({"n": WHOLE, "day": {"type": "string", "format": "date"}}, '{"n":1,"day":"tomorrow"}', "$.day: "),
        ({"n": WHOLE}, '{"n":5.0}', "$.n: "),
        ({"a": TEXT, "b": WHOLE}, '{"b":2,"a":"x"}', "$.a: "),
        ({"é": TEXT, "n": {"enum": [1]}}, '{"é":"☀","n":2}', "$.n: "),
    ],
)
def test_a_call_that_the_grammar_cannot_write_is_named_with_its_argument(
    tokenizer, properties, arguments, place
):
    good, bad = call_row('{"n":1}', make_tool({"n": WHOLE})), call_row(arguments, make_tool(properties))
    (problem,) = problems_of(tokenizer, good, bad, bad)
    first, line = problem.what.splitlines()
    assert first == "1 rows have calls that the service's grammar cannot write:"
    assert line.startswith(f"  row {bad.id} from toy: message 2: book: {place}behind ")
    assert "correct these arguments" in problem.fix
    assert problems_of(tokenizer, call_row(arguments, make_tool(properties), is_learned=False)) == []


@pytest.mark.parametrize(
    ("part", "place", "reason"),
    [
        ({"type": "array", "items": TEXT, "uniqueItems": True}, "", "uniqueItems"),
        ({"not": TEXT}, "", "not"),
        ({"type": "object", "properties": {"x": {"if": TEXT, "then": TEXT}}}, ".properties.x", "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "", "dependentRequired"),
        ({"type": "array", "items": {"type": "array", "contains": TEXT}}, ".items", "contains"),
        ({"anyOf": [TEXT, {"oneOf": [{"type": "number"}, WHOLE]}]}, ".anyOf[1]", "oneOf"),
        ({"type": "string", "pattern": "^(?=a)b"}, "", "regex"),
        ({"type": "string", "format": "zip"}, "", "Unknown format: zip"),
    ],
)
def test_a_schema_that_no_grammar_holds_is_named_with_the_place(tokenizer, part, place, reason):
    good, bad = make_tool({"n": WHOLE}), make_tool({"b": WHOLE, "a": part}, name="other")
    rows = [call_row("{}", good, bad), call_row('{"n":1}', good, bad), call_row("{}", good)]
    (problem,) = problems_of(tokenizer, *rows)
    first, line = problem.what.splitlines()
    assert first == "2 rows have tools that the service refuses in any request:"
    assert line.startswith(f"  other: $.properties.a{place}: ")
    assert reason in line and line.endswith(f"(rows {rows[0].id}, {rows[1].id} from toy)")
    assert "source of these rows" in problem.fix


def test_a_fault_of_all_tools_together_is_named_as_such(tokenizer):
    long = [make_tool({"a": {"enum": ["x" * 20_000]}}, name=name) for name in ("book", "b", "c", "d")]
    (problem,) = problems_of(tokenizer, call_row("{}", *long))
    assert "all 4 tools together: the JSON schema has" in problem.what


def test_lists_have_a_time_in_all_and_their_tools_are_tried_nevertheless(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(trial, "MAX_LISTS_S", 0.0)
    good, bad = make_tool({"n": WHOLE}), make_tool({"a": {"not": TEXT}}, name="other")
    long = [make_tool({"a": {"enum": ["x" * 20_000]}}, name=name) for name in ("book", "b", "c", "d")]
    rows = [
        call_row("{}", good, make_tool({}, name="stop")),
        call_row("{}", good, bad),
        call_row("{}", *long),
    ]
    (problem,) = problems_of(tokenizer, *rows)
    assert "other: $.properties.a: " in problem.what
    assert "all 4 tools together: the JSON schema has" in problem.what
    assert "2 lists of tools were tried tool by tool" in caplog.text


def test_more_calls_than_an_answer_may_have(tokenizer):
    (problem,) = problems_of(tokenizer, call_row("{}", make_tool({}), count=33))
    assert "message 2: 33 calls, and an answer has at most 32" in problem.what


def test_a_schema_that_takes_too_long_is_refused(tokenizer, monkeypatch):
    """The compiler cannot be interrupted: its thread is left behind."""
    released = Event()
    monkeypatch.setattr(trial, "MAX_COMPILE_S", 0.2)
    monkeypatch.setattr(trial, "_compile", lambda marks, tools, uses_tags: released.wait())
    (problem,) = problems_of(tokenizer, call_row("{}", make_tool({"n": WHOLE})))
    released.set()
    assert "it takes more than 0.2 s to compile" in problem.what


def test_rows_without_tools_need_no_grammar():
    row = make_row([Message("user", "a"), Message("assistant", "b")], "toy", "mit")
    assert find_call_problems(None, [row], "all", "auto") == []


def test_the_engine_that_serves_decides_what_is_held(caplog):
    """Each tool is held by llguidance; the limits of OpenVINO's pipeline are narrower."""
    tokenizer = make_family_tokenizer(WITH_TOOLS["qwen-2.5"])
    tokenizer.chat_template = adapt_template(tokenizer, {}, True, "auto")
    day = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    rows = [call_row("{}", make_tool({"n": WHOLE}), make_tool({"a": day}, name="plan"))]
    assert problems_of(tokenizer, *rows) == [] and not caplog.text
    (problem,) = problems_of(tokenizer, *rows, engine="openvino")
    assert (
        "  plan: $.properties.a.properties.day: the openvino engine does not support format" in problem.what
    )
    assert problem.fix.endswith("or set services.engine.kind: paged, which holds more")
    assert "by XGrammar: that cannot be asked without a model, and was not tried" in caplog.text
    assert problems_of(tokenizer, call_row("{}", make_tool({"n": WHOLE})), engine="openvino") == []


@pytest.mark.parametrize("family", ["mistral", "llama-3.1"])
def test_a_notation_that_the_engine_cannot_hold_is_one_problem(family):
    tokenizer = make_family_tokenizer(WITH_TOOLS[family])
    tokenizer.chat_template = adapt_template(tokenizer, {}, True, "auto")
    (problem,) = problems_of(tokenizer, call_row("{}", make_tool({})), engine="openvino")
    assert "the openvino engine cannot tell calls of this model from other text" in problem.what
    assert "services.engine.kind: paged" in problem.fix
