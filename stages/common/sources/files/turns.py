"""Turns of a conversation, as OpenAI, ShareGPT and Hugging Face write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.common.messages import Message
from stages.common.sources.files.entries import BadRow, shorten

# ShareGPT's names, OpenAI's, and those of their relatives; compared in small letters.
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
TOOL_KEYS = ("tool_calls", "function_call")
WEIGHT_KEYS = ("weight", "loss_weight", "train")  # OpenAI's, LLaMA-Factory's, axolotl's


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn, and whether its author wants it to be learned (`WEIGHT_KEYS`)."""

    message: Message
    is_learned: bool = True


def parse_list(value: Any) -> list[Any]:
    """Return a list of turns, which may be in a cell as JSON.

    Raises:
        BadRow: it is neither a list nor the JSON of one.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong_messages", f"not JSON: {error}") from None
    if not isinstance(value, list):
        raise BadRow("wrong_messages", f"a {type(value).__name__} instead of a list")
    return value


def parse_turns(value: Any) -> list[Turn]:
    """Return the turns of a conversation.

    Raises:
        BadRow: a turn has no role or content, an unknown role, or calls a tool.
    """
    return [_parse_turn(turn, place) for place, turn in enumerate(parse_list(value), start=1)]


def find_answer(turns: list[Turn]) -> list[Message]:
    """Return the messages up to the last answer to learn: later turns of weight 0 are excluded.

    Raises:
        BadRow: every answer has the weight 0.
    """
    messages = [turn.message for turn in turns]
    if not turns or turns[-1].is_learned:
        return messages
    learned = [n for n, turn in enumerate(turns) if turn.message.role == "assistant" and turn.is_learned]
    if not learned:
        raise BadRow("weight_zero", "every answer has the weight 0: it is not to be learned")
    return messages[: learned[-1] + 1]


def _parse_turn(turn: Any, place: int) -> Turn:
    if not isinstance(turn, Mapping):
        raise BadRow("wrong_messages", f"message {place} has no role and content: {shorten(turn)}")
    role = turn.get("role", turn.get("from"))
    for key in TOOL_KEYS:
        if turn.get(key):
            raise BadRow("tool_call", f"message {place} has {key}: calls of tools are not learned")
    if isinstance(role, str) and role.strip().lower() in TOOL_ROLES:
        raise BadRow("tool_call", f"message {place} is of the role {role!r}: calls of tools are not learned")
    content = next((turn[key] for key in ("content", "value") if key in turn), None)
    if role is None or not {"content", "value"} & turn.keys():
        raise BadRow("wrong_messages", f"message {place} has no role and content: {shorten(turn)}")
    known = ROLES.get(str(role).strip().lower())
    if known is None:
        raise BadRow(
            "wrong_messages", f"unknown role {role!r} of message {place} (known: {', '.join(ROLES)})"
        )
    return Turn(Message(known, _parse_content(content, place)), _is_learned(turn, place))


def _parse_content(content: Any, place: int) -> str:
    """Return a text, or the texts of a list of parts."""
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type")) for part in content}
        texts = [part.get("text", part.get("value")) for part in content]
        if kinds == {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise BadRow("not_text", f"message {place} has parts of the type {', '.join(sorted(kinds))}")
    if not isinstance(content, str):
        raise BadRow("wrong_messages", f"the content of message {place} is a {type(content).__name__}")
    return content


def _is_learned(turn: Mapping[str, Any], place: int) -> bool:
    weight = next((turn[key] for key in WEIGHT_KEYS if turn.get(key) is not None), 1)
    if weight not in (0, 1):
        raise BadRow("wrong_messages", f"the weight of message {place} is {shorten(weight)}, not 0 or 1")
    return bool(weight)


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of turns, or its JSON."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, list) and bool(value) and all(_is_turn(turn) for turn in value)


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and ("role" in turn or "from" in turn)
        and ({"content", "value", *TOOL_KEYS} & turn.keys() != set())
    )
