"""Messages: the turns of a conversation, with calls of tools, and a turn as the text that is judged."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ROLES = ("system", "user", "assistant", "tool")
LearnedTurns = Literal["all", "last", "weight"]
CALLS_KEY = "tool_calls"
MALFORMED_KEY = "malformed_call"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool; `arguments` is the text of a JSON object, its keys in the order of writing."""

    name: str
    arguments: str
    id: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by their names."""
        values: dict[str, Any] = json.loads(self.arguments)
        return values


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        content: its text; empty in a turn that only calls tools.
        tool_calls: the calls that the assistant makes in this turn, in order.
        tool_call_id: the id of the call whose result a message of the role `tool` is.
        reasoning: what the assistant thought before it answered (OpenAI-like servers: `reasoning_content`).
        is_learned: whether the data set wants this turn to be learned; None where it does not mention it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None
    is_learned: bool | None = None

    @property
    def answer(self) -> str:
        """The turn as the text that is judged: its content, or `format_calls` if it calls tools."""
        return format_calls(self.content, self.tool_calls) if self.tool_calls else self.content

    @property
    def has_tools(self) -> bool:
        """Whether there is more to the turn than its role and content."""
        return self != Message(self.role, self.content)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call, as OpenAI's API describes it.

    Attributes:
        text: the JSON text `{"type": "function", "function": {"name": ..., "parameters": {...}}}`.
    """

    text: str

    @property
    def value(self) -> dict[str, Any]:
        """The description as plain values."""
        value: dict[str, Any] = json.loads(self.text)
        return value

    @property
    def name(self) -> str:
        """The name by which the model calls it."""
        return str(self.value["function"]["name"])

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of its arguments; that of an empty object if none is given."""
        found = self.value["function"].get("parameters")
        return found or {"type": "object", "properties": {}}


def format_calls(content: str, calls: Sequence[ToolCall]) -> str:
    """Return a turn that calls tools as one JSON text, whatever the model's own notation of calls is.

    `{"content": "...", "tool_calls": [{"name": "...", "arguments": {...}}]}`; without text, no `content`.
    Ids are left out: no model can know the right one.
    """
    text = f'"content":{_to_json(content)},' if content else ""
    written = ",".join(f'{{"name":{_to_json(call.name)},"arguments":{call.arguments}}}' for call in calls)
    return f'{{{text}"{CALLS_KEY}":[{written}]}}'


def read_calls(answer: str) -> tuple[str, tuple[ToolCall, ...]] | None:
    """Return content and calls of a text that `format_calls` wrote; None for any other text."""
    if not answer.startswith(('{"content":', f'{{"{CALLS_KEY}":[')):
        return None
    try:
        return _read_turn(json.loads(answer))
    except (ValueError, RecursionError):
        return None


def format_malformed(text: str) -> str:
    """Return, as the text that is judged, what a model wrote that begins as a call of a tool and is none."""
    return f'{{"{MALFORMED_KEY}":{_to_json(text)}}}'


def is_malformed(answer: str) -> bool:
    """Return whether a text is one of `format_malformed`."""
    return answer.startswith(f'{{"{MALFORMED_KEY}":"') and answer.endswith('"}')


def format_arguments(values: Mapping[str, Any]) -> str:
    """Return arguments as JSON text, in their order.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def find_conversation_problem(messages: Sequence[Message]) -> str | None:
    """Return why `messages` cannot be learned from, or None."""
    if not messages:
        return "no messages"
    for message in messages:
        if message.role not in ROLES:
            return f"unknown role {message.role!r} (known: {', '.join(ROLES)})"
    if problem := find_system_problem(messages):
        return problem
    if not any(m.role == "user" for m in messages):
        return "no user message"
    if messages[-1].role != "assistant":
        return "no answer: the last message is not the assistant's"
    if not messages[-1].content.strip() and not messages[-1].tool_calls:
        return "no answer: the last message is empty"
    return find_call_problem(messages)


def join_system(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation whose first system messages are one, joined by a blank line.

    Rows and requests have two where OpenAI's `developer`, read as system, comes with a `system` message; chat
    templates and training know one.
    """
    first = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    if first < 2:
        return list(messages)
    texts = (message.content for message in messages[:first])
    return [Message("system", "\n\n".join(filter(str.strip, texts))), *messages[first:]]


def find_system_problem(messages: Sequence[Message]) -> str | None:
    """Return that there is a system message after the first place, or None."""
    if all(message.role != "system" for message in messages[1:]):
        return None
    return (
        "a system message after the first place: those of the roles system and developer come before all "
        "others; fix: write its text into the first"
    )


def find_call_problem(messages: Sequence[Message]) -> str | None:
    """Return what is wrong with the calls of a conversation and their results, or None."""
    return next(_find_call_problems(messages), None)


def _find_call_problems(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what is wrong with calls and results: each result answers one call that is still open."""
    open_ids: list[str | None] = []
    for place, message in enumerate(messages, start=1):
        if message.role == "tool":
            if not open_ids:
                yield f"message {place} is the result of no call"
                return
            if message.tool_call_id is None:
                open_ids.pop(0)
            elif message.tool_call_id in open_ids:
                open_ids.remove(message.tool_call_id)
            elif None in open_ids:
                open_ids.remove(None)
            else:
                yield f"message {place} is the result of {message.tool_call_id!r}, the id of no open call"
            continue
        if open_ids and message.role == "assistant":
            yield f"message {place} comes before the results of all calls"
        if message.role == "user":
            open_ids = []  # the user went on without waiting
        if message.tool_calls and message.role != "assistant":
            yield f"message {place} calls a tool and is not the assistant's"
        ids = [call.id for call in message.tool_calls if call.id is not None]
        if len(set(ids)) < len(ids):
            yield f"message {place} has two calls with one id"
        if message.tool_calls:
            open_ids = [call.id for call in message.tool_calls]
        elif message.role == "assistant" and not message.content.strip():
            yield f"message {place} has neither text nor a call"


def _read_turn(value: Any) -> tuple[str, tuple[ToolCall, ...]]:
    """Return content and calls of a value of `format_calls`; a ValueError for any other."""
    content, calls = value.get("content", ""), value.get(CALLS_KEY)
    is_turn = set(value) <= {"content", CALLS_KEY} and isinstance(content, str) and isinstance(calls, list)
    if not is_turn or not calls:
        raise ValueError
    return content, tuple(map(_read_call, calls))


def _read_call(call: Any) -> ToolCall:
    if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        raise ValueError
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        raise ValueError
    return ToolCall(call["name"], format_arguments(call["arguments"]))


def _to_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def read_strict_json(text: str) -> Any:
    """Return the value of a JSON text that every reader takes for the same.

    Raises:
        ValueError: it is not JSON, has a key twice or a number that JSON lacks.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=refuse_repeated_keys, parse_constant=refuse_constant)


def refuse_repeated_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its pairs; the hook of `json.loads` that takes no key twice.

    Raises:
        ValueError: a key is given twice, and readers disagree about which value counts.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def refuse_constant(name: str) -> Any:
    """Take neither NaN nor infinity; the hook of `json.loads` for what Python reads and JSON does not have.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not JSON")
