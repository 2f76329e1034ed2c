"""Schemas are tried in a process that ends with its budget."""

import asyncio
import json
import os
import signal
from dataclasses import replace

import pytest

from services.answering.checking import check_calls
from services.answering.request import GenerationRequest
from services.engines.calls.allowed import AllowedCalls, check_schemas
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks
from services.engines.protocol import QueueFull, Sampling, SchemaUnsupported
from services.keys.access import Caller
from services.schemas import trials
from services.schemas.trials import SchemaTrials
from stages.common.chat.tools_template import adapt_template
from stages.common.messages import Tool, ToolCall, format_calls
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
CALLER = make_tokenizer()  # the tokenizer of a model that knows tools
CALLER.chat_template = adapt_template(CALLER, {}, True, "default")


def fork(depth):
    """Return a schema whose references make 2 ** depth ways to read a value."""
    definitions = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {"enum": ["x"]}}}


# Each takes minutes or gigabytes if it is let.
WORST = {
    "2 ** 30 ways to read a value": fork(30),
    "a common multiple": {"allOf": [{"type": "integer", "multipleOf": n} for n in (4999, 4993)]},
    "a pattern with many states": {"type": "string", "pattern": "^(a|b)*a(a|b){300}$", "minLength": 3000},
    "patterns that exclude each other": {"allOf": [{"type": "string", "pattern": c} for c in "abcdefghijk"]},
    "a multiple too large": {"type": "integer", "multipleOf": 9999991},
}


@pytest.fixture
def tried():
    made = SchemaTrials(0.5)
    yield made
    made.close()


def check(tried, schema):
    asyncio.run(tried.check_schema(json.dumps(schema), "tiny", TOKENIZER))


@pytest.mark.parametrize("schema", WORST.values(), ids=WORST)
def test_the_worst_schemas_are_refused_and_the_next_one_is_tried(tried, schema):
    with pytest.raises(SchemaUnsupported):
        check(tried, schema)
    check(tried, {"type": "object", "properties": {"a": {"type": "integer"}}})


async def check_tool(tried, schema):
    """Check the schema of a tool, or that of its argument; return how often the event loop ran meanwhile."""
    argument = {"properties": {"x": schema}, "required": ["x"]}
    parameters = {"type": "object", **(schema if "$ref" in schema else argument)}
    tool = Tool(json.dumps({"function": {"name": "f", "parameters": parameters}}))
    check_schemas([tool])
    grammar = write_grammar(read_marks(CALLER), AllowedCalls((tool,), "required"))
    trial = asyncio.ensure_future(
        tried.check_grammar(grammar.text, grammar.schemas, grammar.probes, "caller", CALLER)
    )
    turns = 0
    while not trial.done():
        turns += 1
        await asyncio.sleep(0 if turns < 10 else 0.001)  # a trial may be over within a millisecond
    trial.result()
    return turns


@pytest.mark.parametrize("schema", WORST.values(), ids=WORST)
def test_the_worst_schemas_of_tools_are_refused_and_the_next_one_is_tried(tried, schema):
    with pytest.raises(SchemaUnsupported):
        asyncio.run(check_tool(tried, schema))
    assert asyncio.run(check_tool(tried, {"type": "integer"})) > 1, "the trial ran on the event loop"


def test_the_calls_of_an_answer_are_checked_within_the_budget(tried):
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": fork(30)["$defs"]}
    answer = format_calls("", [ToolCall("f", '{"x": "y"}')])
    tool = Tool(json.dumps({"function": {"name": "f", "parameters": schema}}))
    request = GenerationRequest("x", "/v1/chat/completions", (), Sampling(9), Caller("c", None, None, None))
    request = replace(request, allowed=AllowedCalls((tool,)))
    assert asyncio.run(check_calls(request, answer, tried)).reason == "schema_too_slow"


def test_what_takes_too_long_says_so_and_is_not_tried_again(tried, monkeypatch):
    for _ in range(2):
        with pytest.raises(SchemaUnsupported, match=r"more than 0\.5 s of CPU time"):
            check(tried, fork(30))
        monkeypatch.setattr(trials, "_Process", None)  # a second trial would need a new one


def test_an_answer_is_checked_within_the_budget_too(tried):
    assert asyncio.run(tried.check_answer('{"a": 1}', '{"type": "object"}')).allow
    assert asyncio.run(tried.check_answer("1", '{"type": "object"}')).reason == "schema_mismatch"
    assert asyncio.run(tried.check_answer('"y"', json.dumps(fork(30)))).reason == "schema_too_slow"
    items = {"type": "array", "items": {"$ref": "#/$defs/d0"}, "$defs": fork(30)["$defs"]}
    check(tried, items)  # no answer has been seen yet that takes long
    assert asyncio.run(tried.check_answer('["y"]', json.dumps(items))).reason == "schema_too_slow"
    assert asyncio.run(tried.check_answer('"x"', json.dumps(fork(3)))).allow


def test_a_process_that_something_else_ended_is_started_again(tried):
    check(tried, {"type": "integer"})
    os.kill(tried._compiling._process._process.pid, signal.SIGKILL)
    tried._compiling._process._process.wait()
    check(tried, {"type": "string"})


def test_a_caller_that_is_gone_leaves_the_queue_and_more_than_may_wait_are_refused(tried, monkeypatch):
    monkeypatch.setattr(trials, "MAX_WAITING", 3)

    async def crowd():
        asked = [
            asyncio.ensure_future(tried.check_schema(json.dumps(fork(30 + n)), "tiny", TOKENIZER))
            for n in range(4)
        ]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert [type(task.exception()) for task in done] == [QueueFull]
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        await tried.check_schema('{"type": "null"}', "tiny", TOKENIZER)

    asyncio.run(crowd())


def test_the_processes_end_with_the_service(tried):
    check(tried, {"type": "integer"})
    process = tried._compiling._process._process
    tried.close()
    assert process.poll() is not None
