"""Clients of OpenAI's API in conversations with tools that run: part `clients` of `benchmarks.conversations`.

Each conversation has several questions. A question gets calls, each call is run in a home of its own
(`stages.common.sources.home_tools.home`), and the results get an answer in words. Every second conversation
is streamed. A conversation is finished if every question got a call, every call could be read, fitted the
schema of its tool and ran, and its result was answered.

With `required` the calls are forced, and the answers have `tool_choice: none`: a model of random weights
finishes, too. With `auto` the model decides, as one that was trained for these tools can.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from stages.common.errors import InputError
from stages.common.sources.home_tools.home import Home
from stages.common.sources.home_tools.tools import read_tools

Choice = Literal["required", "auto"]
QUESTIONS = (
    ("set_state", "turn on the kitchen lights"),
    ("get_temperature", "how warm is it in the bedroom?"),
    ("timer", "start a timer for 5 minutes"),
    ("list", "add eggs and milk to my shopping list"),
    ("set_light", "make the hall light blue and the desk lamp red"),
    ("get_state", "is the front door locked?"),
    ("media", "play some jazz and turn it up"),
    ("set_temperature", "20 degrees in the office"),
)
TURNS = 3  # questions of a conversation
MAX_ROUNDS = 4  # of calls before an answer, or of empty answers
COUNTED = ("finished", "streamed", "turns", "rounds", "parallel", "calls", "empty")
MAX_TEXT, MAX_NUMBER = 16, 99  # of arguments: random weights end no text by themselves
CALL_TOKENS, ANSWER_TOKENS = 900, 24


@dataclass(slots=True)
class Conversation:
    """One conversation: its questions, the tools that run, and what has been counted."""

    number: int
    choice: Choice
    home: Home = field(init=False)
    found: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.home = Home(self.number)

    @property
    def is_streamed(self) -> bool:
        """Whether its answers are streamed."""
        return self.number % 2 == 1

    @property
    def questions(self) -> list[str]:
        """What the user asks."""
        return [text for _, text in self._script()]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools as a request has them: those of its questions, or all that a model was trained with."""
        if self.choice == "auto":
            return [tool.value for tool in read_tools()]
        asked = [name for name, _ in self._script()]
        return [_bound(tool.value) for tool in read_tools() if tool.name in asked]

    def run(self, name: str, arguments: str | Mapping[str, Any]) -> str:
        """Run a call and return its result.

        Raises:
            ValueError: it is no JSON object, its tool is unknown, or it does not fit the schema.
        """
        from jsonschema import Draft202012Validator

        values = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in self.tools}
        if name not in schemas:
            raise ValueError(f"unknown tool {name}")
        if not Draft202012Validator(schemas[name]).is_valid(values):
            raise ValueError(f"arguments outside the schema of {name}")
        result = json.dumps(self.home.run(name, values))
        self.found["calls"] += 1
        return result

    def count_round(self, calls: int, is_due: bool) -> None:
        """Count one answer of the model that calls tools.

        Raises:
            ValueError: the question needs a call, and there is none.
        """
        if is_due and not calls:
            raise ValueError("no call, though the question needs one")
        self.found["rounds"] += bool(calls)
        self.found["parallel"] += calls > 1

    def end_turn(self, text: str | None) -> None:
        """Count a question that has its answer.

        Raises:
            ValueError: the answer is empty.
        """
        if not text:
            raise ValueError("the results got no answer")
        self.found["turns"] += 1

    def _script(self) -> list[tuple[str, str]]:
        return [QUESTIONS[(self.number + step) % len(QUESTIONS)] for step in range(TURNS)]


@dataclass(frozen=True, slots=True)
class Server:
    """A service: its API's address with `/v1`, the model to ask, and a key."""

    url: str
    model: str
    key: str = "none"


Talk = Callable[[Server, Conversation], None]
Send = Callable[..., Any]


def find_server(url: str, key: str = "none") -> Server:
    """Return the service at an address, with the first model that it serves.

    Raises:
        InputError: it does not answer.
    """
    import httpx

    try:
        found = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}).raise_for_status()
    except httpx.HTTPError as error:
        raise InputError(f"{url}/models does not answer: {error}", "make serve, or --url URL/v1") from None
    return Server(url, found.json()["data"][0]["id"], key)


def run_client(name: str, server: Server, count: int, choice: Choice) -> dict[str, Any]:
    """Hold conversations with one client of `CLIENTS`; return what was counted."""
    package, talk = CLIENTS[name]
    try:
        found: dict[str, Any] = {"version": version(package)}
    except PackageNotFoundError:
        return {"missing": f"pip install {package}"}
    total, failures = Counter[str](), Counter[str]()
    for number in range(count):
        conversation = Conversation(number, choice)
        try:
            talk(server, conversation)
            total["finished"] += 1
            total["streamed"] += conversation.is_streamed
        except Exception as error:  # of the client, of any kind: each ends one conversation and is counted
            failures[f"{type(error).__name__}: {error}"[:200]] += 1
        total.update(conversation.found)
    counted = {key: total[key] for key in COUNTED}
    return {**found, "conversations": count, **counted, "failures": dict(failures)}


def _talk_openai(server: Server, conversation: Conversation) -> None:
    import openai

    with openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0) as client:

        def send(**fields: Any) -> Any:
            if not conversation.is_streamed:
                return client.chat.completions.create(model=server.model, **fields)
            try:
                with client.chat.completions.stream(model=server.model, **fields) as stream:
                    return stream.get_final_completion()
            except openai.LengthFinishReasonError as cut:  # a long answer: the client refuses to read it
                return cut.completion

        _talk(send, conversation)


def _talk_litellm(server: Server, conversation: Conversation) -> None:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import fetches a list of prices
    import litellm

    litellm.suppress_debug_info = True  # else it prints advice for each error

    def send(**fields: Any) -> Any:
        answer = litellm.completion(
            model=f"openai/{server.model}",
            api_base=server.url,
            api_key=server.key,
            num_retries=0,
            stream=conversation.is_streamed,
            **fields,
        )
        if not conversation.is_streamed:
            return answer
        return litellm.stream_chunk_builder(list(answer), messages=fields["messages"])

    _talk(send, conversation)


def _talk(send: Send, conversation: Conversation) -> None:
    """Hold a conversation with a client that leaves running the tools to its user."""
    messages: list[dict[str, Any]] = []
    shared = {"tools": conversation.tools, "temperature": 1.0}
    for question in conversation.questions:
        messages.append({"role": "user", "content": question})
        has_results = False
        for seed in range(conversation.number, conversation.number + MAX_ROUNDS + 1):
            choice = _choose(conversation.choice, has_results)
            limit = ANSWER_TOKENS if choice == "none" else CALL_TOKENS
            answer = send(messages=list(messages), tool_choice=choice, max_tokens=limit, seed=seed, **shared)
            message = answer.choices[0].message
            calls = message.tool_calls or []
            conversation.count_round(len(calls), is_due=not has_results)
            if not calls and not message.content:  # the model's own choice: it is asked again
                conversation.found["empty"] += 1
                continue
            messages.append(_write_turn(message.content, calls))
            if not calls:
                conversation.end_turn(message.content)
                break
            for call in calls:
                result = conversation.run(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            has_results = True
        else:
            raise ValueError(f"no answer after {MAX_ROUNDS + 1} requests")


def _choose(choice: Choice, has_results: bool) -> str:
    """Return the `tool_choice` of a request: forced calls first, then the answer."""
    if choice == "auto":
        return "auto"
    return "none" if has_results else "required"


def _write_turn(content: str | None, calls: Sequence[Any]) -> dict[str, Any]:
    written = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in calls
    ]
    return {"role": "assistant", "content": content, **({"tool_calls": written} if written else {})}


def _talk_pydantic_ai(server: Server, conversation: Conversation) -> None:
    asyncio.run(_talk_with_agent(server, conversation))


async def _talk_with_agent(server: Server, conversation: Conversation) -> None:
    """Hold a conversation with an agent that runs the tools by itself."""
    import openai
    import pydantic_ai
    from pydantic_ai.messages import ModelResponse
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0) as client:
        agent = pydantic_ai.Agent(
            OpenAIChatModel(server.model, provider=OpenAIProvider(openai_client=client)),
            tools=[_make_tool(conversation, tool["function"]) for tool in conversation.tools],
            model_settings=lambda context: _make_settings(context.messages, conversation),
            retries=MAX_ROUNDS,  # of empty answers, with another seed
        )
        history: list[Any] = []
        for question in conversation.questions:
            if conversation.is_streamed:
                async with agent.run_stream(question, message_history=history) as running:
                    text = await running.get_output()
                    new = running.new_messages()
            else:
                answered = await agent.run(question, message_history=history)
                text, new = answered.output, answered.new_messages()
            is_due = True
            for message in new:
                _check_retries(message, conversation)
                if isinstance(message, ModelResponse):
                    conversation.count_round(len(message.tool_calls), is_due)
                    is_due = False
            conversation.end_turn(text)
            history += new


def _make_tool(conversation: Conversation, function: Mapping[str, Any]) -> Any:
    import pydantic_ai

    name = function["name"]
    return pydantic_ai.Tool.from_schema(
        lambda **arguments: conversation.run(name, arguments),
        name,
        function.get("description", name),
        function["parameters"],
        sequential=True,
    )


def _make_settings(messages: Sequence[Any], conversation: Conversation) -> Any:
    """Return the settings of an agent's next request, which depend on what came before it."""
    question = max(place for place, message in enumerate(messages) if _has_part(message, "user-prompt"))
    has_results = any(_has_part(message, "tool-return") for message in messages[question:])
    choice = _choose(conversation.choice, has_results)
    limit = ANSWER_TOKENS if choice == "none" else CALL_TOKENS
    return {"tool_choice": choice, "max_tokens": limit, "temperature": 1.0, "seed": len(messages)}


def _check_retries(message: Any, conversation: Conversation) -> None:
    """Count the empty answers after which an agent asked again.

    Raises:
        ValueError: it asked again because a call could not be run.
    """
    for part in message.parts:
        if part.part_kind == "retry-prompt" and part.tool_name:
            raise ValueError(f"a call of {part.tool_name} could not be run")
        conversation.found["empty"] += part.part_kind == "retry-prompt"


def _has_part(message: Any, kind: str) -> bool:
    return any(part.part_kind == kind for part in message.parts)


def _bound(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool whose arguments end in time, whatever the model writes."""
    for schema in tool["function"]["parameters"]["properties"].values():
        if schema.get("type") == "string":
            schema["maxLength"] = MAX_TEXT
        elif "type" in schema:
            schema |= {"minimum": 0, "maximum": MAX_NUMBER}
    return tool


# By their names here: the package, and how to hold a conversation with it.
CLIENTS: dict[str, tuple[str, Talk]] = {
    "openai": ("openai", _talk_openai),
    "pydantic-ai": ("pydantic-ai-slim", _talk_pydantic_ai),
    "litellm": ("litellm", _talk_litellm),
}
