"""Messages as an exchange stores them: JSON objects in which arguments of calls are values, not texts.

So they are redacted as values, and stay JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stages.common.messages import Message, ToolCall, format_arguments


def write_turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return messages as an exchange stores them; a turn without calls has a role and a content only."""
    return [_write_turn(message) for message in messages]


def read_turn(turn: Mapping[str, Any]) -> Message:
    """Return a message that `write_turns` wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    role, content, reasoning = turn["role"], turn["content"], turn.get("reasoning_content")
    calls = tuple(
        ToolCall(_text(call["name"]), format_arguments({**call["arguments"]}), _text_or_none(call.get("id")))
        for call in turn.get("tool_calls", ())
    )
    number = turn.get("tool_call_id")
    return Message(_text(role), _text(content), calls, _text_or_none(number), _text_or_none(reasoning))


def _write_turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "name": call.name, "arguments": call.values} for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:
        turn["reasoning_content"] = message.reasoning
    return turn


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)
