"""Corrections of answers to requests with tools: their calls have to fit the tools of the request."""

import json
from dataclasses import replace

import pytest

from services.events import read_feedback
from stages.common.chat.template import fix_argument
from stages.common.messages import read_calls
from stages.common.model.loading import load_tokenizer
from tests.exchanges import EXCHANGE
from tests.services.api.test_routes import events
from tests.services.schemas.test_trials import fork
from tests.services.serving import ask, load_paged, serving, tiny_files
from tests.services.tool_models import TOOLS, make_tool, tool_files

# A model that thinks first, and whose prompt ends with what begins its thoughts.
THINKING = (
    fix_argument("enable_thinking", True) + "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
RIGHT = {"name": "lamp", "arguments": {"room": "hall", "level": 3}}
PLAN = make_tool("plan", {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}})
COUNT = make_tool("count", {"type": "object", "properties": {"to": {"type": "integer"}}})
MAIL = make_tool("mail", {"type": "object", "properties": {"to": {"enum": ["ann@example.org"]}}})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrected")
    guard = {"max_schema_cpu_s": 0.5}
    with serving(folder, tool_files(folder / "model"), load=load_paged, guard=guard) as running:
        yield running


def correct(client, correction, **asked):
    """Ask with tools, correct the answer, and return its id and the response to the correction."""
    request_id = ask(client, max_tokens=4, **asked).headers["x-request-id"]
    body = {"request_id": request_id, "thumb": "down", "correction": correction}
    return request_id, client.post("/v1/feedback", json=body)


def find_stored(server, request_id):
    return [row["correction"] for row in events(server, read_feedback) if row["request_id"] == request_id]


def write(*calls):
    return json.dumps({"tool_calls": calls})


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("correction", "told"),
    [
        (write(call("lmp", room="hall")), ["'lmp'", "4 tools", "did you mean lamp?"]),
        (write(call("lamp", room="hall", level=12)), ["lamp: $.level: 12", "maximum of 9"]),
        (write(call("lamp", room="cellar", level=1)), ["lamp: $.room: 'cellar'", "'kitchen'"]),
        (write(call("lamp", room="hall")), ["lamp: $: 'level' is a required property"]),
        (write(call("heat", on=True, onn=1)), ["'onn' is no argument of heat; did you mean on?"]),
        (write(RIGHT, call("stop", now=True)), ["'now' is no argument of stop"]),
        (write({"name": "lamp", "arguments": '{"room": "hall"}'}), ["a call that is none", '"arguments":{}']),
        ('{"tool_calls": [{"name": "stop", "arguments": {},}]}', ["a call that is none"]),
        (write(), ["a call that is none"]),
        (write(call(" ")), ["a call names no tool"]),
        # What `curate` would reject: a value that no grammar writes, and a call as text.
        (write(call("plan", day="tomorrow")), ["plan: $.day: behind", "schema"]),
        ('I call it: <tool_call>{"name": "lamp"', ["a call in the text", "tool_calls"]),
        ('[TOOL_CALLS] [{"name": "lamp"}]', ["a call in the text"]),
        *(
            (write(call("stop", x="DEEP")).replace('"DEEP"', "[" * depth + "]" * depth), [])
            for depth in (64, 900, 970, 980, 990, 9_000)
        ),
    ],
)
def test_a_correction_that_could_not_be_run_is_refused_and_not_stored(client, server, correction, told):
    request_id, response = correct(client, correction, tools=[*TOOLS, PLAN])
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, "invalid_value", "correction")
    assert all(text in error["message"] for text in [*told, "fix: "]), error["message"]
    assert find_stored(server, request_id) == []


@pytest.mark.parametrize(
    "correction",
    [
        write(RIGHT),
        write(RIGHT, call("stop")),
        write({"name": "lamp", "arguments": {"level": 3.0, "room": "hall"}}),  # curate spells it
        write(call("plan", day="2026-11-29")),
        json.dumps({"tool_calls": [RIGHT], "content": "At once."}, indent=2),
        "Which room?",
        '{"room": "hall"}',
    ],
)
def test_a_correction_that_fits_the_tools_is_stored_as_given(client, server, correction):
    request_id, response = correct(client, correction, tools=[*TOOLS, PLAN])
    assert response.status_code == 200, response.text
    assert find_stored(server, request_id) == [correction]


@pytest.mark.parametrize("normalize", [[], ["argument_order"], ["whole_numbers"]])
def test_a_correction_is_spelled_only_as_the_rows_of_the_model_were(client, server, monkeypatch, normalize):
    monkeypatch.setitem(server.handler.pool.champion.files.about, "normalize", normalize)
    spelled = {"argument_order": call("lamp", level=3, room="hall"), "whole_numbers": call("count", to=3.0)}
    for name, made in spelled.items():
        compact = write(made).replace(" ", "")  # the numbers of another spelling are read as values
        response = correct(client, compact, tools=[*TOOLS, COUNT])[1]
        assert response.status_code == (200 if name in normalize else 422), response.text
    assert correct(client, write(RIGHT), tools=TOOLS)[1].status_code == 200


def test_without_tools_a_correction_may_be_any_text(client, server):
    request_id, response = correct(client, write(call("lmp")))
    assert response.status_code == 200
    assert find_stored(server, request_id) == [write(call("lmp"))]


ASKED = {"messages": [{"role": "user", "content": "on"}]}


def ask_and_correct(client, correction, path="/v1/chat/completions", **asked):
    asked = {"max_tokens": 2, **(asked or ASKED)}
    request_id = client.post(path, json=asked).headers["x-request-id"]
    body = {"request_id": request_id, "correction": correction}
    return client.post("/v1/feedback", json=body)


LABELS = {"kind": "label", "label_key": None, "labels": ["heat", "lamp"]}
OBJECTS = {"kind": "json", "label_key": "intent", "labels": None}
CALLS = {"kind": "tools", "label_key": None, "labels": None}


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        (LABELS, "lamp", {"lamb": "is not one of the 2 labels"}),
        (OBJECTS, '{"intent": "on"}', {"on": "not one JSON value", '{"a": 1}': "no key 'intent'"}),
        (CALLS, "On.", {write(RIGHT): "there are no tools", "<tool_call>{": "a call in the text"}),
    ],
)
def test_a_correction_is_an_answer_of_the_models_task(tmp_path, task, right, wrong):
    with serving(tmp_path, tiny_files(tmp_path / "model", task=task)) as running, running.client() as client:
        assert ask_and_correct(client, right).status_code == 200
        for correction, told in wrong.items():
            response = ask_and_correct(client, correction)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (422, "correction"), error
            assert told in error["message"] and "; fix: " in error["message"]
            # Asked for a text or a form of its own, which no task has: nothing is learned from it.
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}
            assert ask_and_correct(client, correction, response_format=form, **ASKED).status_code == 200
            assert ask_and_correct(client, correction, "/v1/completions", prompt="on").status_code == 200


def test_an_argument_that_the_store_redacts_fits_its_redacted_schema(client, server):
    request_id, response = correct(client, write(call("mail", to="ann@example.org")), tools=[MAIL])
    assert response.status_code == 200, response.text
    (stored,) = find_stored(server, request_id)
    assert read_calls(json.dumps(json.loads(stored), separators=(",", ":")))[1][0].values == {"to": "[email]"}
    assert correct(client, write(call("mail", to="someone")), tools=[MAIL])[1].status_code == 422


def test_a_schema_that_takes_too_long_refuses_its_own_corrections_only(client, server):
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": fork(30)["$defs"]}
    parameters = json.dumps({"tools": [make_tool("slow", schema)]})
    server.run(server.handler.store.record(replace(EXCHANGE, request_id="slow", parameters=parameters)))
    body = {"request_id": "slow", "correction": write(call("slow", x="y"))}
    response = client.post("/v1/feedback", json=body)
    assert response.status_code == 422
    assert "more than 0.5 s of CPU time" in response.json()["error"]["message"]
    assert find_stored(server, "slow") == []
    assert correct(client, write(RIGHT), tools=TOOLS)[1].status_code == 200


@pytest.mark.parametrize("parameters", ["", "[]", '{"tools": 3}', '{"tools": [{"function": {}}]}'])
def test_a_damaged_event_has_no_tools(client, server, parameters):
    request_id = f"damaged {parameters}"
    server.run(server.handler.store.record(replace(EXCHANGE, request_id=request_id, parameters=parameters)))
    body = {"request_id": request_id, "correction": write(RIGHT)}
    assert client.post("/v1/feedback", json=body).status_code == 200
    assert find_stored(server, request_id) == [write(RIGHT)]


def test_thoughts_are_stored_with_their_answer(tmp_path):
    files = tiny_files(tmp_path / "model")
    tokenizer = load_tokenizer(files.tokenizer)
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(files.tokenizer)
    with serving(tmp_path, files) as running, running.client() as client:
        thought = ask(client, max_tokens=12)
        plain = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 12})
        stored = {row["request_id"]: row for row in events(running)}
    thoughts = thought.json()["choices"][0]["message"]["reasoning_content"]
    row = stored[thought.headers["x-request-id"]]
    assert thoughts and (row["reasoning"], row["answer"]) == (thoughts, "")
    row = stored[plain.headers["x-request-id"]]
    assert row["answer"] and row["reasoning"] is None
