"""OpenAI's client against the real service: calls of tools, whole and streamed, and their results."""

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
