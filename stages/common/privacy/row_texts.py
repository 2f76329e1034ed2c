"""The texts of a row that may hold personal data or a secret, with where each is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from stages.common.messages import Message, Tool
from stages.common.records import Row


def list_private_texts(row: Row) -> Iterator[tuple[str, str]]:
    """Yield where a text is, and the text: contents, reasoning, arguments of calls, then the tools.

    JSON comes as it is written, for what shows next to its key (`"password": "..."`), and then as the strings
    in it, for what an escape would hide.
    """
    for message in row.messages:
        yield from list_message_texts(message)
    if row.rejected:
        yield from ((f"{place} (rejected)", text) for place, text in list_message_texts(row.rejected))
    for tool in row.tools:
        yield from (("the description of a tool", text) for text in _read_tool(tool.text))


def list_message_texts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield where a text of a message is, and the text."""
    yield f"the message of the {message.role}", message.content
    if message.reasoning:
        yield f"the reasoning of the {message.role}", message.reasoning
    for call in message.tool_calls:
        yield from (("the arguments of a call", text) for text in _read_json(call.arguments))


@lru_cache(maxsize=4096)
def _read_tool(text: str) -> tuple[str, ...]:
    return _read_json(Tool(text).text)


def _read_json(text: str) -> tuple[str, ...]:
    return text, "\n".join(_list_strings(json.loads(text)))


def _list_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _list_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _list_strings(inner)
