"""Clients of OpenAI's API against a running service, each in the test of its name.

`tests/services/api/test_clients.py` starts the service and runs them in an environment of their own
(`.venv-clients`, pinned in `requirements.lock` here): their pins and the project's exclude each other.
`conftest.py` gives the address of the service and what it answers without a client.
"""

import json

import pytest

QUESTION = "turn on the lights"
SCHEMA = {
    "type": "object",
    "properties": {"intent": {"enum": ["on", "off"]}, "now": {"type": "boolean"}},
    "required": ["intent", "now"],
    "additionalProperties": False,
}


def test_langchain(url, plain):
    import langchain_openai as langchain
    from langchain_core.exceptions import ContextOverflowError

    shared = {"base_url": url, "api_key": "none", "model": "tiny", "max_retries": 0}
    chat = langchain.ChatOpenAI(**shared, stream_usage=True, max_tokens=8, temperature=0)
    whole = None
    for chunk in chat.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    asked = chat.invoke(QUESTION)
    assert whole.content == asked.content == plain[0]
    assert whole.usage_metadata["total_tokens"] == asked.usage_metadata["total_tokens"]
    assert asked.usage_metadata["output_tokens"] == plain[1]["completion_tokens"]
    roomy = langchain.ChatOpenAI(**shared, max_tokens=4096, temperature=0)
    titled = {"title": "call", "description": "What to do.", **SCHEMA}
    structured = roomy.with_structured_output(titled, method="json_schema")
    assert set(structured.invoke(QUESTION)) == {"intent", "now"}
    with pytest.raises(ContextOverflowError):
        chat.invoke("x" * 400)
    texts = langchain.OpenAI(**shared, max_tokens=4, temperature=0)
    assert texts.batch(["a", "b"]) == [texts.invoke("a"), texts.invoke("b")]
    assert [[one.text for one in row] for row in texts.generate(["a", "b"]).generations] == [
        [texts.invoke("a")],
        [texts.invoke("b")],
    ]


def test_litellm(url, plain, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    shared = {"model": "openai/tiny", "api_base": url, "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(**shared, messages=messages, max_tokens=8)
    assert answer.choices[0].message.content == plain[0]
    assert answer.usage.total_tokens == plain[1]["total_tokens"]
    chunks = list(
        litellm.completion(
            **shared, messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usages = [usage for chunk in chunks if (usage := getattr(chunk, "usage", None)) is not None]
    assert text == plain[0]
    assert [usage.total_tokens for usage in usages] == [plain[1]["total_tokens"]]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**shared, messages=[{"role": "user", "content": "x" * 400}])
    texts = litellm.text_completion(
        model="text-completion-openai/tiny", prompt=["a", "b"], max_tokens=4, api_base=url, api_key="none"
    )
    assert len(texts.choices) == 2


def test_instructor(url):
    from typing import Literal

    import instructor
    import openai
    from pydantic import BaseModel, ConfigDict

    class Call(BaseModel):
        """What to do."""

        # Else random weights under the schema's grammar add other keys for ever.
        model_config = ConfigDict(extra="forbid")
        intent: Literal["on", "off"]
        now: bool

    client = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=instructor.Mode.JSON_SCHEMA
    )
    messages = [{"role": "user", "content": QUESTION}]
    call = client.chat.completions.create(
        model="tiny", messages=messages, response_model=Call, max_tokens=4096, max_retries=0
    )
    assert isinstance(call, Call)
    tools = instructor.from_openai(
        openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=instructor.Mode.TOOLS
    )
    with pytest.raises(Exception, match="chat template"):
        tools.chat.completions.create(model="tiny", messages=messages, response_model=Call, max_retries=0)


def test_pydantic_ai(url, plain):
    from typing import Literal

    import pydantic_ai
    from pydantic import BaseModel
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Call(BaseModel):
        """What to do."""

        intent: Literal["on", "off"]
        now: bool

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = pydantic_ai.Agent(model, model_settings={"max_tokens": 8, "temperature": 0.0})
    asked = agent.run_sync(QUESTION)
    assert asked.output == plain[0]

    async def stream():
        async with agent.run_stream(QUESTION) as running:
            return await running.get_output(), running.usage

    import asyncio

    text, usage = asyncio.run(stream())
    usage = usage() if callable(usage) else usage
    assert text == plain[0]
    assert (usage.input_tokens, usage.output_tokens) == (
        plain[1]["prompt_tokens"],
        plain[1]["completion_tokens"],
    )
    typed = pydantic_ai.Agent(
        model, output_type=pydantic_ai.NativeOutput(Call), model_settings={"max_tokens": 4096}, retries=0
    )
    assert isinstance(typed.run_sync(QUESTION).output, Call)


def test_llm(url, plain):
    from llm.default_plugins.openai_models import Chat, Completion

    chat = Chat("tiny", key="none", model_name="tiny", api_base=url, supports_schema=True)
    for stream in (False, True):
        answer = chat.prompt(QUESTION, stream=stream, max_tokens=8, temperature=0, key="none")
        assert answer.text() == plain[0]
        usage = answer.usage()
        assert (usage.input, usage.output) == (plain[1]["prompt_tokens"], plain[1]["completion_tokens"])
    structured = chat.prompt(QUESTION, schema=SCHEMA, stream=False, max_tokens=4096, key="none")
    assert set(json.loads(structured.text())) == {"intent", "now"}
    texts = Completion("tiny", key="none", model_name="tiny", api_base=url)
    assert texts.prompt("a", stream=False, max_tokens=4, key="none").text() is not None


@pytest.mark.parametrize("sent", [{"batch_size": 1}, {"batch_size": 4}, {"tokenized_requests": False}])
def test_lm_eval(url, expected, sent):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="tiny",
        tokenizer=expected["tokenizer"],
        tokenizer_backend="huggingface",
        max_length=256,
        **sent,
    )
    asked = [
        Instance("loglikelihood", {}, tuple(pair), place) for place, pair in enumerate(expected["pairs"])
    ]
    found = model.loglikelihood(asked, disable_tqdm=True)
    for (nats, greedy), (expected_nats, expected_greedy) in zip(found, expected["scores"], strict=True):
        assert nats == pytest.approx(expected_nats, abs=1e-2)
        assert greedy == expected_greedy
    generated = model.generate_until(
        [
            Instance("generate_until", {}, (text, {"until": ["\n\n"], "max_gen_toks": 4}), place)
            for place, text in enumerate(["a", "bc"])
        ],
        disable_tqdm=True,
    )
    assert generated == expected["completions"]
