"""Calls under OpenVINO's own grammars, in the notations of known families, by a model with random weights."""

import asyncio
import json

import pytest

from services.engines.calls.allowed import AllowedCalls
from services.engines.calls.grammar import write_grammar
from services.engines.calls.notation import read_marks, read_thoughts
from services.engines.calls.reading import AnswerReader, join_pieces
from services.engines.openvino_grammar import write_tags
from services.engines.protocol import Sampling, SchemaUnsupported
from stages.common.messages import Tool
from tests.services.engines.calls.test_grammar import EVERY, READ, adapt
from tests.services.engines.makers import make_openvino, tiny
from tests.services.engines.test_contract import answer, ids_of
from tests.services.tool_models import TOOLS, find_call_fault, make_tool

# Calls with ids, which structural tags cannot vary; bare JSON, which only the whole answer tells from text.
REFUSED = {"mistral": ("required", "auto", "none"), "llama-3.1": ("auto", "none")}
ANY_TEXT = r"start: /[\s\S]*/"  # llguidance's grammar has the ids of the family's own vocabulary


def describe(tokenizer, **allowed):
    return write_grammar(read_marks(tokenizer), AllowedCalls(READ, **allowed)).form


@pytest.fixture(scope="module")
def engine():
    made = make_openvino()
    yield made
    made.close()


def write(engine, form, seed):
    """Return an answer of the random model as the service reads it."""
    sampling = Sampling(420, temperature=1.0, seed=seed, grammar=ANY_TEXT, calls=form)
    ids, reason, _ = asyncio.run(answer(engine, ids_of("hello"), sampling))
    return tiny().tokenizer.decode(ids), reason


def read(tokenizer, text):
    reader = AnswerReader(read_marks(tokenizer).calls, read_thoughts(tokenizer))
    piece = join_pieces([reader.push(text, is_last=True)])
    return piece, reader


@pytest.mark.parametrize("family", EVERY)
def test_required_calls_of_every_notation_are_whole(engine, family):
    tokenizer = adapt(EVERY[family])
    if "required" in REFUSED.get(family, ()):
        with pytest.raises(SchemaUnsupported, match="paged can"):
            write_tags(describe(tokenizer, mode="required"))
        return
    finished = 0
    for seed in range(4):
        text, reason = write(engine, describe(tokenizer, mode="required"), seed)
        if reason != "stop":  # endless white space
            continue
        finished += 1
        piece, reader = read(tokenizer, text)
        assert reader.has_calls, text
        for number, call in enumerate(piece.calls):
            known = {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            assert find_call_fault(known, TOOLS) is None, text
    assert finished


@pytest.mark.parametrize("family", EVERY)
def test_text_begins_no_call_unless_it_is_whole(engine, family):
    tokenizer = adapt(EVERY[family])
    for mode in ("auto", "none"):
        if mode in REFUSED.get(family, ()):
            with pytest.raises(SchemaUnsupported, match="paged can"):
                write_tags(describe(tokenizer, mode=mode))
            continue
        text, _ = write(engine, describe(tokenizer, mode=mode), 1)
        opener = read_marks(tokenizer).calls.opener.strip()
        assert opener not in text or (mode == "auto" and read(tokenizer, text)[1].has_calls), text


def test_a_tool_whose_schema_the_pipeline_cannot_hold_is_refused():
    tokenizer = adapt(next(iter(EVERY.values())))
    for schema, problem in (
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "a+"}}}, "pattern"),
        ({"type": "object", "properties": {f"k{n}": {"type": "null"} for n in range(101)}}, "10201 pairs"),
    ):
        tool = Tool(json.dumps(make_tool("odd", schema)))
        form = write_grammar(read_marks(tokenizer), AllowedCalls((tool,), mode="required")).form
        with pytest.raises(SchemaUnsupported, match=problem):
            write_tags(form)


def test_schemas_with_references_and_odd_names_end_no_engine(engine):
    """The pipeline compiles in the middle of a step: what it cannot read would end all answers."""
    tokenizer = adapt(next(iter(EVERY.values())))
    pair = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"]}
    pair["$defs"] = {"b": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/b"}}]}}
    tools = [make_tool("a-b_C", pair), make_tool("x" * 64, {"type": "object", "additionalProperties": True})]
    tools.append(make_tool("free", None))
    allowed = AllowedCalls(tuple(Tool(json.dumps(tool)) for tool in tools), mode="required")
    form = write_grammar(read_marks(tokenizer), allowed).form
    for seed in range(6):
        text, reason = write(engine, form, seed)
        piece, _ = read(tokenizer, text)
        for call in piece.calls if reason == "stop" else ():
            function = {"name": call.name, "arguments": call.arguments}
            assert (
                find_call_fault({"id": "call_", "type": "function", "function": function}, tools) is None
            ), text
    assert engine.broken is None
