"""One text of a tool at the door and in the service: what is trained is what is served."""

import json
from pathlib import Path

import pytest

from services.api.tools import FlatTool, FunctionTool
from services.parity import write_body
from stages.common.chat.template import encode_prompt
from stages.common.sources.files.formats import FormatOptions
from stages.common.sources.files.rows import collect_file
from stages.common.sources.files.shapes import Columns
from stages.common.sources.files.tools.schemas import NULLABLE
from stages.common.tools.schemas import find_argument_problem
from tests.stages.common.chat.tool_templates import WITH_TOOLS
from tests.stages.common.chat_templates import make_family_tokenizer

SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
PLAIN = {"type": "function", "function": {"name": "lamp", "description": "A lamp.", "parameters": SCHEMA}}
STRICT = {"type": "function", "function": {**PLAIN["function"], "strict": True}}
TURNED = {"function": {"parameters": SCHEMA, "description": "A lamp.", "name": "lamp"}, "type": "function"}
MORE = {
    "category": "home",
    "type": "function",
    "function": {"returns": {"type": "null"}, **PLAIN["function"], "required": ["on"]},
}
FLAT = {"strict": False, **PLAIN["function"], "type": "function"}


def collect(tmp_path: Path, *tools):
    call = {"type": "function", "id": "c1", "function": {"name": "lamp", "arguments": '{"on": true}'}}
    turns = [{"role": "user", "content": "on"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": turns, "tools": [tool]}) + "\n" for tool in tools))
    return collect_file(path, "mit", "human", FormatOptions(), Columns(), None, "stop")


@pytest.mark.parametrize("family", ["qwen-2.5", "llama-3.1", "mistral"])
def test_a_rows_prompt_is_that_of_the_same_request_through_the_service(tmp_path, family):
    tokenizer = make_family_tokenizer(next(t for name, t in WITH_TOOLS.items() if name.startswith(family)))
    rows = collect(tmp_path, PLAIN, STRICT, TURNED, MORE, FLAT).rows
    prompts = [encode_prompt(tokenizer, row.prompt, row.tools) for row in rows]
    assert [prompt == prompts[0] for prompt in prompts] == [True] * 5
    assert len({row.id for row in rows}) == 1
    for row in rows:
        served = [FunctionTool.model_validate(tool).function.read() for tool in write_body(row)["tools"]]
        assert encode_prompt(tokenizer, row.prompt, served) == prompts[0]
    sent = [FunctionTool.model_validate(tool).function.read() for tool in (PLAIN, STRICT, TURNED)]
    assert {*sent, FlatTool.model_validate(FLAT).read()} == {*rows[0].tools}


def test_keys_that_no_prompt_has_are_reported_as_columns_are(tmp_path):
    metrics = collect(tmp_path, PLAIN, STRICT, STRICT, TURNED, MORE, FLAT).metrics
    assert metrics["unread_columns"] == {
        "tools[].category": 1,
        "tools[].function.required": 1,
        "tools[].function.returns": 1,
        "tools[].function.strict": 2,
        "tools[].strict": 1,
    }
    assert metrics["forms"] == {"tool_calls": 6}


NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
        ({"type": "string", "nullable": False}, {"type": "string"}),
        ({"type": ["string", "null"], "nullable": True}, {"type": ["string", "null"]}),
        ({"enum": ["a"], "nullable": True}, {"enum": ["a", None]}),
        ({"type": "string", "enum": ["a"], "nullable": True},
         {"type": ["string", "null"], "enum": ["a", None]}),
        ({"$ref": "#/$defs/d", "nullable": True}, {"anyOf": [{"$ref": "#/$defs/d"}, NULL]}),
        ({"anyOf": [{"type": "string"}], "nullable": True},
         {"anyOf": [{"anyOf": [{"type": "string"}]}, NULL]}),
        ({"type": "array", "items": {"type": "integer", "nullable": True}},
         {"type": "array", "items": {"type": ["integer", "null"]}}),
    ],
)  # fmt: skip
def test_nullable_is_the_type_null_for_rows_and_requests(tmp_path, before, after):
    defs = {"$defs": {"d": {"type": "string"}}}
    tool = {"name": "lamp", "parameters": {"type": "object", "properties": {"on": {}, "a": before}, **defs}}
    collected = collect(tmp_path, {"type": "function", "function": tool})
    (read,) = collected.rows[0].tools
    assert read.parameters == {"type": "object", "properties": {"on": {}, "a": after}, **defs}
    assert collected.metrics["forms"] == {"tool_calls": 1, NULLABLE: 1}
    sent = FunctionTool.model_validate({"type": "function", "function": tool}).function.read()
    assert sent == read
    if before.get("nullable"):
        assert find_argument_problem(read, {"a": None}) is None


def test_a_property_or_a_value_of_that_name_stays(tmp_path):
    schema = {
        "type": "object",
        "properties": {"nullable": {"type": "boolean", "default": {"nullable": True}}, "on": {}},
    }
    tool = {"type": "function", "function": {"name": "lamp", "parameters": schema}}
    collected = collect(tmp_path, tool)
    assert collected.rows[0].tools[0].value == tool
    assert collected.metrics["forms"] == {"tool_calls": 1}
