"""OpenAI's client against the real service: calls of tools, whole and streamed, results, and responses."""

import json

import pytest

from tests.services.serving import load_paged, serving
from tests.services.tool_models import TOOLS, tool_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    answers = {"default_max_tokens": 900, "max_tokens": 2000}
    with serving(folder, tool_files(folder / "model"), load=load_paged, answers=answers) as server:
        yield f"{server.url}/v1"


def test_openai_makes_a_round_trip(url):
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    shared = {"model": "tiny", "tools": TOOLS, "temperature": 1.0, "seed": 4}
    messages = [{"role": "user", "content": "light on, then stop"}]
    for _ in range(3):
        answer = client.chat.completions.create(messages=messages, tool_choice="required", **shared)
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        assert reason == "tool_calls" and message.tool_calls
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            assert isinstance(json.loads(call.function.arguments), dict)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    last = client.chat.completions.create(messages=messages, tool_choice="none", max_tokens=20, **shared)
    assert last.choices[0].message.content and not last.choices[0].message.tool_calls


def test_openai_puts_a_stream_together(url):
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    fields = {"model": "tiny", "tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": 7}
    messages = [{"role": "user", "content": "light on"}]
    with client.chat.completions.stream(messages=messages, **fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    whole = client.chat.completions.create(messages=messages, **fields).choices[0]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in streamed.message.tool_calls] == [
        (call.function.name, call.function.arguments) for call in whole.message.tool_calls
    ]


def make_flat_tools():
    """Return the tools as the Responses API has them."""
    return [{"type": "function", **tool["function"]} for tool in TOOLS]


def test_openai_makes_a_round_trip_of_responses(url):
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    shared = {"model": "tiny", "tools": make_flat_tools(), "temperature": 1.0, "store": False}
    items = [{"role": "user", "content": "light on, then stop"}]
    for _ in range(3):
        response = client.responses.create(input=items, tool_choice="required", **shared)
        calls = [item for item in response.output if item.type == "function_call"]
        assert response.status == "completed" and calls == response.output
        items += response.output
        for call in calls:
            assert isinstance(json.loads(call.arguments), dict)
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": "done"})
    last = client.responses.create(input=items, tool_choice="none", max_output_tokens=20, **shared)
    assert last.output_text and not any(item.type == "function_call" for item in last.output)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.responses.create(model="tiny", input="x", previous_response_id=last.id)
    assert refused.value.param == "previous_response_id"


def test_openai_puts_a_streamed_response_together(url):
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    own = {"tool_choice": "required", "temperature": 1.0, "extra_body": {"seed": 7}}
    fields = {"model": "tiny", "input": "light on", "tools": make_flat_tools(), **own}
    whole = client.responses.create(**fields)
    *_, last = client.responses.create(stream=True, **fields)
    with client.responses.stream(**fields) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert last.type == events[-1] == "response.completed" and events[0] == "response.created"
    found = [[(call.name, call.arguments) for call in one.output] for one in (whole, last.response, streamed)]
    assert found[0] and found == [found[0]] * 3
    assert whole.usage == last.response.usage == streamed.usage


def test_openai_reads_a_response_in_a_form(url):
    import openai
    from pydantic import BaseModel, ConfigDict

    class Call(BaseModel):
        model_config = ConfigDict(extra="forbid")
        on: bool

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    parsed = client.responses.parse(model="tiny", input="light on", text_format=Call)
    with client.responses.stream(model="tiny", input="light on", text_format=Call) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        streamed = stream.get_final_response()
    assert isinstance(parsed.output_parsed, Call) and streamed.output_parsed == parsed.output_parsed
    assert deltas == parsed.output_text == streamed.output_text
