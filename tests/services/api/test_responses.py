"""The Responses API: items in, items out, whole and streamed, and what of it is not supported."""

import json
import sqlite3

import pytest
from pydantic import ValidationError

from services import errors
from services.answering.request import Delta, GenerationRequest
from services.api.items.formatting import ItemFormatter
from services.api.items.parsing import read_items
from services.api.items.schemas import Item, ResponsesRequest
from services.api.items.writing import ItemWriter
from services.engines.calls.reading import CallPiece
from services.engines.protocol import Sampling
from services.keys.access import Caller
from stages.common.messages import Message, ToolCall, find_call_problem
from tests.services.serving import load_paged, serving
from tests.services.tool_models import HEAT, LAMP, TOOLS, find_call_fault, tool_files

ROUTE = "/v1/responses"
FLAT = [
    {"type": "function", "name": name, "parameters": schema}
    for name, schema in [("lamp", LAMP), ("heat", HEAT)]
]
OPENING = ["response.created", "response.in_progress"]
TEXT = ["response.output_item.added", "response.content_part.added", "response.output_text.delta"]
TEXT += ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
CALL = ["response.output_item.added", "response.function_call_arguments.delta"]
CALL += ["response.function_call_arguments.done", "response.output_item.done"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("responses")
    answers = {"default_max_tokens": 8, "max_tokens": 2000}
    with serving(folder, tool_files(folder / "model"), load=load_paged, answers=answers) as running:
        yield running


def create(client, **body):
    answer = client.post(ROUTE, json={"input": "light on", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client, **body):
    """Return the events of a streamed response; each line with its type is that of its data."""
    with client.stream("POST", ROUTE, json={"input": "light on", "stream": True, **body}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def drop_repeats(names):
    return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


def test_an_answer_is_the_one_of_a_chat_completion(client):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "light on"}]
    chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8}).json()
    response = create(client, instructions="Be short.", max_output_tokens=8, metadata={"a": "b"})
    (item,) = response["output"]
    text = chat["choices"][0]["message"]["content"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", text)
    usage = response["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == tuple(
        chat["usage"].values()
    )
    is_cut = chat["choices"][0]["finish_reason"] == "length"
    assert response["status"] == item["status"] == ("incomplete" if is_cut else "completed")
    assert response["incomplete_details"] == ({"reason": "max_output_tokens"} if is_cut else None)
    assert response["metadata"] == {"a": "b"} and response["instructions"] == "Be short."
    assert response["store"] is False and response["id"].startswith("req_")


def test_the_events_of_a_text_are_those_of_openai(client):
    events = stream(client, max_output_tokens=8)
    names = drop_repeats([event["type"] for event in events])
    whole = create(client, max_output_tokens=8)
    assert names == [*OPENING, *TEXT, f"response.{whole['status']}"]
    final = events[-1]["response"]
    deltas = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    done = next(event["text"] for event in events if event["type"].endswith("text.done"))
    assert (
        deltas == done == final["output"][0]["content"][0]["text"] == whole["output"][0]["content"][0]["text"]
    )
    assert final["usage"] == whole["usage"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []


def test_calls_are_streamed_item_by_item(client):
    fields = {
        "tools": FLAT,
        "tool_choice": "required",
        "temperature": 1.0,
        "seed": 4,
        "max_output_tokens": 900,
    }
    events = stream(client, **fields)
    final = events[-1]["response"]
    whole = create(client, **fields)
    assert whole["status"] == final["status"] == "completed"
    calls = [(item["type"], item["name"], item["arguments"]) for item in whole["output"]]
    assert calls == [(item["type"], item["name"], item["arguments"]) for item in final["output"]]
    for item in final["output"]:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        assert find_call_fault(call, TOOLS) is None
    names = drop_repeats([event["type"] for event in events])
    assert names == [*OPENING, *CALL * len(calls), "response.completed"]
    done = [event["arguments"] for event in events if event["type"].endswith("arguments.done")]
    assert done == [arguments for _, _, arguments in calls]


def test_a_call_that_is_cut_is_never_told_as_whole(client):
    fields = {"tools": FLAT, "tool_choice": "required", "max_output_tokens": 12}
    events = stream(client, **fields)
    final = events[-1]
    assert final["type"] == "response.incomplete"
    assert final["response"]["output"][-1]["status"] == "incomplete"
    assert not any(event["type"] == "response.function_call_arguments.done" for event in events)


def test_a_named_tool_is_called_and_its_result_sent_back(client):
    choice = {"type": "function", "name": "heat"}
    fields = {"tools": FLAT, "temperature": 1.0, "seed": 4}
    first = create(client, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=900, **fields)
    (call,) = first["output"]
    assert call["name"] == "heat" and first["tool_choice"] == choice
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "done"}
    items = [{"role": "user", "content": "heat on"}, call, result]
    second = create(client, input=items, tool_choice="none", max_output_tokens=20, **fields)
    assert [item["type"] for item in second["output"]] == ["message"]
    third = create(
        client, input=[*items, *second["output"], {"role": "user", "content": "and now?"}], **fields
    )
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]


def test_the_form_of_a_text_is_held(client):
    schema = {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    }
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = create(client, text=wanted, max_output_tokens=900)
    assert set(json.loads(response["output"][0]["content"][0]["text"])) == {"on"}
    assert response["text"] == wanted
    wrong = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}
    refused = client.post(ROUTE, json={"input": "x", "text": wrong})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "text.format")


def test_the_event_store_has_the_conversation(server, client):
    response = create(client, instructions="Be short.", user="ann", session="s1", max_output_tokens=8)
    with sqlite3.connect(server.handler.settings.events.url.removeprefix("sqlite:///")) as store:
        store.row_factory = sqlite3.Row
        wanted = "SELECT * FROM exchanges WHERE request_id = ?"
        row = dict(store.execute(wanted, (response["id"],)).fetchone())
    assert (row["route"], row["user"], row["session"], row["status"]) == (ROUTE, "ann", "s1", 200)
    assert [turn["content"] for turn in json.loads(row["messages"])] == ["Be short.", "light on"]
    assert row["answer"] == response["output"][0]["content"][0]["text"]


def test_a_stream_that_fails_ends_with_the_items_so_far(server):
    model = server.handler.pool.champion
    body = ResponsesRequest(input="light on")
    request = GenerationRequest(
        "req_1", ROUTE, (Message("user", "light on"),), Sampling(8), Caller("c", None, None, None)
    )
    formatter = ItemFormatter(body, request, model)
    formatter.format_opening(Delta("a"))
    formatter.format_chunk(Delta("a"))
    sent = formatter.format_error(errors.engine_failed("req_1")).decode()
    event = json.loads(sent.splitlines()[1].removeprefix("data: "))
    assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"]["code"] == "server_error"
    assert event["response"]["output"][0]["content"][0]["text"] == "a"
    assert event["response"]["output"][0]["status"] == "incomplete"


def test_a_prompt_that_is_too_long_is_told_under_input(client):
    refused = client.post(ROUTE, json={"input": "x" * 30_000})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")


USER, THOUGHTS = {"role": "user", "content": "x"}, {"type": "reasoning", "content": []}
F = {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}
REFUSED = [
    ({}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"role": "assistant", "content": "x"}]}, "input"),
    ({"input": [{"content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "output_text"}]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
    ({"input": [{"role": "user", "content": "x", "call_id": "1"}]}, "input.0.call_id"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{**F, "arguments": "on"}]}, "input.0.arguments"),
    ({"input": [{**F, "arguments": '{"a": 1, "a": 2}'}]}, "input.0.arguments"),
    ({"input": [{**F, "arguments": r'{"a": "\ud83d"}'}]}, "input.0.arguments"),
    ({"input": [{**F, "name": "a.b"}]}, "input.0.name"),
    ({"input": [USER, {"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input"),
    ({"input": [{"type": "reasoning", "content": "x"}]}, "input.0.content"),
    ({"input": [{**THOUGHTS, "summary": [{"text": "x"}]}]}, "input.0.summary"),
    ({"input": [{**THOUGHTS, "encrypted_content": "x"}]}, "input.0.encrypted_content"),
    ({"input": [USER, THOUGHTS]}, "input"),
    ({"input": [USER, {"role": "assistant", "content": ""}, USER]}, "input"),
    ({"tools": [{"type": "function", "name": "f"}, {"type": "function", "name": "f"}]}, "tools.1.name"),
    ({"tools": [{"type": "function", "name": "a.b"}]}, "tools.0.name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda part: json.dumps(part)[:60])
def test_the_field_that_is_wrong_is_named(client, body, param):
    refused = client.post(ROUTE, json={"input": "x", **body} if body else body)
    assert refused.status_code == 422, refused.text
    error = refused.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ")


def test_the_first_system_and_developer_messages_are_one(client):
    user, kind = {"role": "user", "content": "light on"}, {"role": "developer", "content": "Be kind."}
    texts, tokens = set(), set()
    for before in (
        [{"role": "system", "content": "Be short.\n\nBe kind."}],
        [{"role": "system", "content": "Be short."}, kind],
        [{"role": "developer", "content": "Be short."}, {**kind, "role": "system"}],
    ):
        chat = client.post("/v1/chat/completions", json={"messages": [*before, user], "max_tokens": 8}).json()
        texts.add(chat["choices"][0]["message"]["content"])
        tokens.add(chat["usage"]["prompt_tokens"])
    response = create(client, instructions="Be short.", input=[kind, user], max_output_tokens=8)
    texts.add(response["output"][0]["content"][0]["text"])
    assert len(texts) == 1 and tokens == {response["usage"]["input_tokens"]}


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_in_the_middle_is_left_to_the_template(client, role):
    user, late = {"role": "user", "content": "light on"}, {"role": role, "content": "Be kind."}
    messages = [user, {"role": "assistant", "content": "Done."}, late, user]
    chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8}).json()
    response = create(client, input=messages, max_output_tokens=8)
    assert chat["usage"]["prompt_tokens"] == response["usage"]["input_tokens"] > 0


def test_of_a_large_body_the_first_error_is_enough():
    for items in ([1] * 300_000, [{"role": "user", "content": [{"type": "x"}] * 50_000}]):
        with pytest.raises(ValidationError) as refused:
            ResponsesRequest.model_validate({"input": items})
        assert refused.value.error_count() <= 3  # one a member of a union


def test_items_that_follow_each_other_are_one_turn():
    items = [
        {"role": "developer", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "now", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": ""},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"a":1}', "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    calls = (ToolCall("f", "{}", "1"), ToolCall("g", '{"a":1}', "2"))
    assert list(read_items(map(Item.model_validate, items))) == [
        Message("system", "Be short."),
        Message("user", "ab"),
        Message("assistant", "now", calls, reasoning="hm"),
        Message("tool", "x", tool_call_id="1"),
        Message("tool", "y", tool_call_id="2"),
        Message("assistant", "done"),
        Message("assistant", "really"),
    ]


def test_what_is_between_a_call_and_its_result_belongs_to_the_turn_of_the_call():
    """As OpenAI takes it: models write texts, and thoughts, behind calls."""
    items = [
        {"role": "user", "content": "a"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": "One moment."},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
    ]
    calls = (ToolCall("f", "{}", "1"), ToolCall("f", "{}", "2"))
    read = list(read_items(map(Item.model_validate, items)))
    assert read == [
        Message("user", "a"),
        Message("assistant", "One moment.", calls, reasoning="hm"),
        Message("tool", "y", tool_call_id="2"),
        Message("tool", "x", tool_call_id="1"),
    ]
    assert find_call_problem(read) is None


def test_thoughts_text_and_calls_are_items_in_this_order():
    writer = ItemWriter("req_1")
    pieces = [
        Delta("", reasoning="a"),
        Delta("t", reasoning="b", calls=(CallPiece(0, "", "call_1", "f"), CallPiece(0, "{}"))),
        Delta("", calls=(CallPiece(1, '{"a"', "call_2", "g"),)),
    ]
    events = [event for piece in pieces for event in writer.push(piece)] + list(writer.finish("incomplete"))
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item["type"] for item in writer.items] == kinds
    assert [item["status"] for item in writer.items] == ["completed"] * 3 + ["incomplete"]
    assert [item.get("arguments") for item in writer.items[2:]] == ["{}", '{"a"']
    assert writer.reasoning == "ab"
    reasoning = [name.replace("output_text", "reasoning_text") for name in TEXT]
    names = drop_repeats([name for name, _ in events])
    assert names == [*reasoning, *TEXT, *CALL, *CALL[:2], "response.output_item.done"]
    assert [fields["output_index"] for name, fields in events if name.endswith("item.added")] == [0, 1, 2, 3]


def test_an_answer_of_nothing_is_an_empty_text():
    writer = ItemWriter("req_1")
    assert [name for name, _ in writer.finish("completed")] == [name for name in TEXT if "delta" not in name]
    assert writer.items[0]["content"][0]["text"] == ""
