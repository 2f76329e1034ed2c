"""The grammar of calls under the templates of known families, against llguidance itself."""

import json

import pytest

from services.engines.calls.allowed import AllowedCalls, check_schemas, read_schema
from services.engines.calls.grammar import MAX_CALLS, write_grammar
from services.engines.calls.notation import read_marks, read_thoughts
from services.engines.calls.reading import AnswerReader, join_pieces
from services.engines.grammar import Grammars, compile_grammar
from services.engines.protocol import Sampling, SchemaUnsupported
from stages.common.chat.template import render_example
from stages.common.chat.tools_template import adapt_template
from stages.common.messages import Message, Tool, ToolCall, format_calls, read_calls
from stages.common.tools import references
from tests.services.tool_models import TOOLS
from tests.stages.common.chat.tool_templates import WITH_TOOLS
from tests.stages.common.chat_templates import FAMILIES, make_family_tokenizer

EVERY = {**{f"{name}, default": family for name, family in FAMILIES.items()}, **WITH_TOOLS}
READ = tuple(Tool(json.dumps(tool)) for tool in TOOLS)
USER = Message("user", "light on")
LAMP = ToolCall("lamp", '{"room": "hall", "level": 3}', "x1")
STOP = ToolCall("stop", "{}", "x2")


def adapt(family):
    made = make_family_tokenizer(family)
    made.chat_template = adapt_template(made, {}, True, "auto")
    return made


@pytest.fixture(scope="module", params=EVERY)
def tokenizer(request):
    return adapt(EVERY[request.param])


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Grammars(tokenizer, len(tokenizer), tokenizer.eos_token_id or 0)._tokens


def takes(vocabulary, tokenizer, text, **allowed):
    """Return whether a grammar accepts a whole answer."""
    grammar = write_grammar(read_marks(tokenizer), AllowedCalls(READ, **allowed))
    matcher = compile_grammar(grammar.text, vocabulary)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(tokenizer, text, *calls):
    return render_example(tokenizer, [USER, Message("assistant", text, calls)], READ)[1].lstrip()


def test_what_the_template_writes_is_accepted(tokenizer, vocabulary):
    call = written(tokenizer, "", LAMP)
    for mode, name in (("auto", None), ("required", None), ("required", "lamp")):
        assert takes(vocabulary, tokenizer, call, mode=mode, name=name)
    assert not takes(vocabulary, tokenizer, call, mode="none")
    assert not takes(vocabulary, tokenizer, call, mode="required", name="stop")
    found = read_marks(tokenizer).calls
    if found.separator:
        both = written(tokenizer, "", LAMP, STOP)
        assert takes(vocabulary, tokenizer, both)
        assert not takes(vocabulary, tokenizer, both, is_parallel=False)
    if found.text_separator is not None:
        assert takes(vocabulary, tokenizer, written(tokenizer, "A moment.", LAMP))
        assert not takes(vocabulary, tokenizer, written(tokenizer, "A moment.", LAMP), mode="required")


def test_no_other_call_is_accepted(tokenizer, vocabulary):
    """Nor one in another order than the schema's: curate writes what is learned in that order."""
    for name, arguments in (
        ("lamp", '{"room": "attic", "level": 3}'),
        ("lamp", '{"room": "hall"}'),
        ("lamp", '{"level": 3, "room": "hall"}'),
        ("lamp", '{"room": "hall", "level": 3, "more": 1}'),
        ("lam", "{}"),
        ("stop", '{"a": 1}'),
    ):
        assert not takes(vocabulary, tokenizer, written(tokenizer, "", ToolCall(name, arguments, "x1")))


def test_text_is_accepted_unless_a_call_is_required(tokenizer, vocabulary):
    for text in ("It is on.", "", "<b>{}</b> ☀ [x]\n", '{"nam'):
        for mode in ("auto", "none"):
            assert takes(vocabulary, tokenizer, text, mode=mode)
        assert not takes(vocabulary, tokenizer, text, mode="required")


def test_the_reader_returns_what_was_written_however_it_is_cut(tokenizer):
    found = read_marks(tokenizer).calls
    for calls in [(LAMP,), (LAMP, STOP)][: 2 if found.separator else 1]:
        for content in ["", "A moment.\n"][: 2 if found.text_separator is not None else 1]:
            text = written(tokenizer, content.strip(), *calls)
            for size in (1, 2, 3, 7, 1000):
                reader = AnswerReader(found, None)
                parts = [text[at : at + size] for at in range(0, len(text), size)]
                read = join_pieces([*map(reader.push, parts), reader.push("", is_last=True)])
                assert read.text == content.strip() and reader.has_calls
                assert [(call.name, json.loads(call.arguments)) for call in read.calls] == [
                    (call.name, call.values) for call in calls
                ]
                assert reader.judge() == format_calls(content.strip(), calls).replace('": ', '":').replace(
                    ', "', ',"'
                )


def test_text_that_begins_no_call_is_released():
    found = read_marks(adapt(WITH_TOOLS["qwen-2.5"])).calls
    reader = AnswerReader(found, None)
    assert reader.push("one <tool").text == "one"
    assert reader.push("box> two \n").text == " <toolbox> two"
    assert reader.push("", is_last=True).text == " \n"
    assert reader.answer == "one <toolbox> two \n" == reader.judge()


@pytest.mark.parametrize(
    ("text", "stops", "left", "calls"),
    [
        ("one STOP two", ["STOP"], "one ", 0),
        ("one ST", ["STOP"], "one ST", 0),
        ("A moment.", ["<", "{"], "A moment.", 1),  # signs of the call alone
        ("A moment. ST", ["STOP", "hall"], "A moment. ST", 1),
        ("A STOP moment.", ["STOP"], "A ", 0),  # with a call behind it
        ("", ["l", "{", "<tool_call>"], "", 1),
    ],
)
def test_a_stop_string_ends_text_alone_however_it_is_cut(text, stops, left, calls):
    tokenizer = adapt(WITH_TOOLS["qwen-2.5"])
    has_call = "STOP t" not in text and text != "one ST"
    whole = written(tokenizer, text, LAMP) if has_call else text
    for size in (1, 2, 3, 7, 1000):
        reader = AnswerReader(read_marks(tokenizer).calls, None, stops)
        pieces = [reader.push(whole[at : at + size]) for at in range(0, len(whole), size)]
        read = join_pieces([*pieces, reader.push("", is_last=True)])
        assert (read.text, len(read.calls)) == (left, calls)
        assert reader.stopped == (calls == 0 and left != text)


def test_thoughts_come_before_text_and_calls():
    tokenizer = make_family_tokenizer(WITH_TOOLS["qwen-3"])
    tokenizer.chat_template = adapt_template(tokenizer, {"enable_thinking": True}, True, "auto")
    marks, thoughts = read_marks(tokenizer), read_thoughts(tokenizer)
    vocabulary = Grammars(tokenizer, len(tokenizer), tokenizer.eos_token_id)._tokens
    for behind, calls in (
        ("It is on.", 0),
        (written(tokenizer, "", LAMP).rpartition("</think>")[2].lstrip(), 1),
    ):
        text = f"<think>\nA lamp.\n</think>\n\n{behind}"
        assert takes(vocabulary, tokenizer, text)
        assert takes(vocabulary, tokenizer, text, mode="required") == bool(calls)
        for size in (1, 5, 1000):
            reader = AnswerReader(marks.calls, thoughts)
            parts = [text[at : at + size] for at in range(0, len(text), size)]
            read = join_pieces([*map(reader.push, parts), reader.push("", is_last=True)])
            assert (read.reasoning, len(read.calls)) == ("A lamp.", calls)
            assert reader.judge() == (
                format_calls("", (ToolCall("lamp", '{"room":"hall","level":3}'),)) if calls else behind
            )
    plain = AnswerReader(None, thoughts)
    assert join_pieces([plain.push("<thi"), plain.push("s> is text")]).text == "<this> is text"


def test_no_more_calls_than_the_most():
    tokenizer = adapt(WITH_TOOLS["qwen-2.5"])
    vocabulary = Grammars(tokenizer, len(tokenizer), tokenizer.eos_token_id)._tokens
    most = [ToolCall("stop", "{}", f"x{n}") for n in range(MAX_CALLS)]
    assert takes(vocabulary, tokenizer, written(tokenizer, "", *most))
    assert not takes(vocabulary, tokenizer, written(tokenizer, "", *most, STOP))


def test_a_grammar_is_compiled_once():
    tokenizer = adapt(WITH_TOOLS["qwen-2.5"])
    grammars = Grammars(tokenizer, len(tokenizer), tokenizer.eos_token_id)
    text = write_grammar(read_marks(tokenizer), AllowedCalls(READ)).text
    first, second = (grammars.compile_for(Sampling(9, grammar=text)) for _ in range(2))
    assert len(grammars._compiled) == 1
    begin, other = (tokenizer(t)["input_ids"] for t in ('<tool_call>\n{"name": "lamp', "It"))
    for token in begin:
        assert first.allowed()[token]
        first.take(token)
    for token in other:
        assert second.allowed()[token]
        second.take(token)


def test_states_of_other_answers_are_no_fault_of_this_one(monkeypatch):
    """Copies of a matcher share their states: what earlier answers needed must refuse no later one."""
    monkeypatch.setattr("services.engines.grammar.MAX_LEXER_STATES", 7500)
    tokenizer = adapt(WITH_TOOLS["qwen-2.5"])
    names = [f"k{n}" for n in range(4)]
    texts = {name: {"type": "string", "maxLength": 900 + n} for n, name in enumerate(names)}
    tool = Tool(
        json.dumps({"function": {"name": "f", "parameters": {"properties": texts, "required": names}}})
    )
    text = write_grammar(read_marks(tokenizer), AllowedCalls((tool,), "required")).text
    grammars = Grammars(tokenizer, len(tokenizer), tokenizer.eos_token_id)
    for long in names:
        values = {name: "y" * (800 if name == long else 0) for name in names}
        grammar = grammars.compile_for(Sampling(9, grammar=text))
        call = ToolCall("f", json.dumps(values), "x")
        for token in tokenizer(written(tokenizer, "", call))["input_ids"]:
            assert grammar.allowed()[token]
            grammar.take(token)


def test_arguments_are_an_object_with_the_named_properties():
    assert read_schema(READ[2]) == {"type": "object", "properties": {}, "additionalProperties": False}
    own = Tool(json.dumps({"function": {"name": "f", "parameters": {"allOf": [{"required": ["a"]}]}}}))
    assert read_schema(own) == {"type": "object", "allOf": [{"required": ["a"]}]}
    with pytest.raises(SchemaUnsupported, match="type object"):
        check_schemas([Tool('{"function": {"name": "f", "parameters": {"type": "array"}}}')])


def chain(length, end):
    """Return a tool whose references form a chain, each the one before the next."""
    links = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    parameters = {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": end}}
    return Tool(json.dumps({"function": {"name": "f", "parameters": parameters}}))


@pytest.fixture
def followed(monkeypatch):
    """The references that a check has followed."""
    found, follow = [], references._follow

    def count(schema, reference):
        found.append(reference)
        return follow(schema, reference)

    monkeypatch.setattr(references, "_follow", count)
    return found


def test_each_reference_of_a_chain_is_followed_once(followed):
    check_schemas([chain(1500, {"type": "object"})])
    assert len(followed) == 1501
    followed.clear()
    with pytest.raises(SchemaUnsupported, match="refers to itself"):
        check_schemas([chain(1500, {"$ref": "#/$defs/d7"})])
    assert len(followed) <= 1502


def test_a_chain_beyond_the_bounds_is_refused_before_it_is_followed(followed):
    with pytest.raises(SchemaUnsupported, match="characters; at most"):
        check_schemas([chain(27_000, {"type": "object"})])
    assert followed == []


def test_a_form_of_text_cannot_be_told_from_a_call_without_a_mark():
    tokenizer = adapt(WITH_TOOLS["llama-3.1"])
    with pytest.raises(SchemaUnsupported, match="without a mark"):
        write_grammar(read_marks(tokenizer), AllowedCalls(READ), json_schema="{}")


def test_a_cut_call_is_no_call():
    found = read_marks(adapt(WITH_TOOLS["qwen-2.5"])).calls
    reader = AnswerReader(found, None)
    reader.push('<tool_call>\n{"name": "lamp", "arguments": {"room": "hall"', is_last=True)
    assert reader.has_calls and read_calls(reader.judge()) is None
