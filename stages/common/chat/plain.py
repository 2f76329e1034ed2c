"""Conversations and tools as the plain values that chat templates take, control tokens in their texts hidden.

Ids of calls are written by their number in the conversation, `call00001`: templates that write ids want nine
letters or digits (Mistral), and random ones are nothing that a model could learn. Results follow in the order
of their calls, because most templates write results without ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any

from stages.common.chat.control_tokens import ControlTokens
from stages.common.messages import Message, Tool

NOTHING_HIDDEN = ControlTokens({}, None, normalized=False)  # where no template reads the values


def write_conversation(control: ControlTokens, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as OpenAI's API writes them, arguments of calls as values."""
    plain: list[dict[str, Any]] = []
    open_calls: dict[str, str] = {}  # the number of each call that waits for its result → the tool's name
    numbers: dict[str | None, list[str]] = {}  # the id of each such call → its numbers, first come first
    made = 0
    for is_result, some in groupby(messages, key=lambda message: message.role == "tool"):
        if is_result:
            results = [_write_result(control, message, open_calls, numbers) for message in some]
            plain += sorted(results, key=lambda result: str(result["tool_call_id"]))
            continue
        for message in some:
            turn: dict[str, Any] = {"role": message.role, "content": control.hide(message.content)}
            if message.reasoning is not None:
                turn["reasoning_content"] = control.hide(message.reasoning)
            if message.tool_calls:
                open_calls, numbers, turn["tool_calls"] = {}, {}, []
                for call in message.tool_calls:
                    made += 1
                    number = f"call{made:05d}"
                    open_calls[number] = call.name
                    numbers.setdefault(call.id, []).append(number)
                    function = {"name": control.hide(call.name), "arguments": hide_all(control, call.values)}
                    turn["tool_calls"].append({"type": "function", "id": number, "function": function})
            plain.append(turn)
    return plain


def write_tools(control: ControlTokens, tools: Sequence[Tool]) -> list[Any] | None:
    """Return tools as OpenAI's API writes them; None for none, as templates want it."""
    return [hide_all(control, tool.value) for tool in tools] or None


def hide_all(control: ControlTokens, value: Any) -> Any:
    """Return a JSON value with the control tokens in all its texts hidden."""
    if isinstance(value, str):
        return control.hide(value)
    if isinstance(value, list):
        return [hide_all(control, item) for item in value]
    if isinstance(value, Mapping):
        return {control.hide(key): hide_all(control, item) for key, item in value.items()}
    return value


def _write_result(
    control: ControlTokens, message: Message, open_calls: dict[str, str], numbers: dict[str | None, list[str]]
) -> dict[str, Any]:
    """Return a result with the number and the name of its call: by its id, else the first one still open."""
    waiting = (
        numbers.get(message.tool_call_id) or numbers.get(None) or list(chain.from_iterable(numbers.values()))
    )
    number = min(waiting, default="call00000")
    for others in numbers.values():
        if number in others:
            others.remove(number)
    return {
        "role": "tool",
        "tool_call_id": number,
        "name": control.hide(open_calls.get(number, "")),
        "content": control.hide(message.content),
    }
