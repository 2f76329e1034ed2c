"""Fields that are not done: what changes an answer is named in a 4xx, what does not is ignored."""

import json

import pytest
from pydantic import ValidationError

from services.api.schemas import ChatRequest, CompletionRequest
from tests.services.serving import ask, serving, stream, tiny_files


@pytest.fixture(scope="module")
def changes():
    return {"answers": {"max_tokens": 12, "default_max_tokens": 4}, "guard": {"max_prompt_tokens": 200}}


def refused(answer):
    assert answer.status_code == 422, answer.text
    return answer.json()["error"]


# Of other servers' clients; what OpenAI's own API has is in openai_gaps.py.
CHANGES = [
    {"guided_json": {"type": "object"}},
    {"guided_json": {}},
    {"json_schema": {}},
    {"web_search_options": {}},
    {"guided_regex": "a+"},
    {"guided_choice": ["a"]},
    {"structured_outputs": {"json": {}}},
    {"grammar": 'root ::= "a"'},
    {"json_schema": {"type": "object"}},
    {"top_k": 5},
    {"top_k": True},
    {"min_p": 0.1},
    {"repetition_penalty": 1.2},
    {"min_tokens": 3},
    {"ignore_eos": True},
    {"stop_token_ids": [5]},
    {"bad_words": ["x"]},
    {"logits_processors": ["x"]},
    {"chat_template": "x"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"continue_final_message": True},
    {"echo": True},
    {"best_of": 3},
    {"max_new_tokens": 5},
    {"temprature": 0.5},
]


@pytest.mark.parametrize("fields", CHANGES, ids=lambda fields: json.dumps(fields)[:40])
def test_what_changes_answers_and_is_not_done_is_named(client, fields):
    (name,) = fields
    error = refused(ask(client, **fields))
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert error["message"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
            "response_format.schema",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "jane"}]}, "messages.0.name"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.function",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages.0.tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
            "messages.0.content.1.type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_text"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": "x"}, "messages"),
        ({}, "messages"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_field_that_was_sent_is_the_param(client, body, param):
    whole = {"messages": [{"role": "user", "content": "x"}], **body} if body else body
    error = refused(client.post("/v1/chat/completions", json=whole))
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ") and "Value error" not in error["message"]


def test_the_message_says_what_to_do_instead(client):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "chat template does not write the tools" in refused(ask(client, tools=tools))["message"]
    assert "tools" in refused(ask(client, functions=[{"name": "f"}]))["message"]
    assert "did you mean temperature?" in refused(ask(client, temprature=1))["message"]
    assert "did you mean max_tokens?" in refused(ask(client, max_new_tokens=1))["message"]
    feedback = {"request_id": "req_x", "thumb": "up", "corection": "better"}
    assert "did you mean correction?" in refused(client.post("/v1/feedback", json=feedback))["message"]


SAME = [
    {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "u"},
    {"prompt_cache_key": "k", "prediction": None, "parallel_tool_calls": True},
    {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "modalities": ["text"]},
    {"logit_bias": {}, "logit_bias_": None, "guided_json": None, "top_k": -1, "min_p": 0.0},
    {"repetition_penalty": 1.0, "tool_choice": "auto", "n": 1, "stream_options": None, "user": None},
    {"max_completion_tokens": 8},
    {"stop": None, "max_completion_tokens": None, "response_format": {"type": "text"}, "seed": None},
]


@pytest.mark.parametrize("fields", SAME, ids=lambda fields: ",".join(fields)[:40])
def test_what_changes_no_answer_is_ignored(client, fields):
    plain = ask(client, max_tokens=8).json()["choices"]
    assert ask(client, max_tokens=8, **fields).json()["choices"] == plain


def test_an_answer_can_be_sent_back_as_clients_keep_it(client):
    kept = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    messages = [{"role": "user", "content": "a"}, kept, {"role": "user", "content": "b"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_limit_are_clamped_to_it(client, field):
    whole = ask(client, **{field: 12}).json()
    for wanted in (13, 4096, 2**40):
        answer = ask(client, **{field: wanted}).json()
        assert answer["choices"] == whole["choices"]
        assert answer["usage"] == whole["usage"]


def test_more_tokens_than_the_limit_are_refused_under_the_name_that_was_sent(tmp_path):
    limits = {"max_tokens": 12, "above_max_tokens": "reject", "default_max_tokens": 4}
    served = serving(tmp_path, tiny_files(tmp_path / "model"), answers=limits)
    with served as server, server.client() as client:
        for field in ("max_tokens", "max_completion_tokens"):
            error = refused(ask(client, **{field: 13}))
            assert error["param"] == field and "13 is above the limit of 12" in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "x" * 300}]),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "x" * 30_000}]),
        ("/v1/completions", "prompt", "x" * 300),
        ("/v1/completions", "prompt", [5] * 300),
    ],
)
def test_a_context_that_is_exceeded_is_told_as_clients_recognise_it(client, path, field, value):
    answer = client.post(path, json={field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    assert error["message"].startswith("This model's maximum context length is 200 tokens. However, your ")
    assert f"reduce the length of the {field}" in error["message"]


def test_content_that_is_refused_is_told_under_the_field_that_was_sent(server, client):
    end_of_turn = server.handler.pool.champion.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = client.post("/v1/completions", json={"prompt": [end_of_turn]})
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("content_refused", "prompt")


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b'{"messages": []}', {"content-type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (b'{"messages": []}', {"content-type": "text/plain"}, 415, "'text/plain'"),
        (b'{"messages": []}', {}, 415, "application/json"),
        (b"", {"content-type": "application/json"}, 422, "The body is empty"),
        (b"[]", {"content-type": "application/json"}, 422, "must be a JSON object"),
        (b'"x"', {"content-type": "application/json"}, 422, "must be a JSON object"),
        (b"\x1f\x8b\x08", {"content-type": "application/json", "content-encoding": "gzip"}, 400, "'gzip'"),
        (b'{"a": "\xff"}', {"content-type": "application/json"}, 400, "byte 7 is not UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", {"content-type": "application/json"}, 400, "too many digits"),
        (b"[" * 100_000, {"content-type": "application/json"}, 400, "nested too deeply"),
        (b"{", {"content-type": "application/json"}, 400, "at position 1"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(client, content, headers, status, words):
    answer = client.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ],
)
def test_usage_is_streamed_once_and_only_where_it_is_asked_for(client, path, prompt):
    usage = client.post(path, json={**prompt, "max_tokens": 6}).json()["usage"]
    chunks = stream(client, path, **prompt, max_tokens=6, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [usage]
    assert [bool(chunk["choices"]) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    for options in ({}, {"stream_options": {"include_usage": False}}):
        assert all("usage" not in chunk for chunk in stream(client, path, **prompt, max_tokens=6, **options))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [1] * 300_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}] * 20_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text"}] * 50_000}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": "x"}], "stop": [1] * 300_000}),
        (CompletionRequest, {"prompt": [[0.5]] * 100_000}),
    ],
)
def test_of_a_large_body_the_first_error_is_enough(kind, body):
    """A hundred thousand errors take seconds in which no other request is answered."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() <= 3  # one a member of a union
