"""A raw record as messages that end with the answer to learn, and the tools that it may call."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from stages.common.messages import Message, Tool, join_system
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.sources.files.entries import BadRow, Record, shorten
from stages.common.sources.files.shapes import Shape
from stages.common.sources.files.tools.calls import read_calls
from stages.common.sources.files.tools.hermes import take_tools
from stages.common.sources.files.tools.schemas import read_tools
from stages.common.sources.files.turns import (
    Turn,
    find_answer,
    is_conversation,
    parse_list,
    parse_turns,
    take_thoughts,
)

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")

Conversation = tuple[list[Message], tuple[Tool, ...]]


def read_conversation(fields: Record, shape: Shape, forms: set[str]) -> Conversation:
    """Turn a record into messages that end with the answer to learn, and the tools of the conversation.

    Args:
        forms: where the forms in which tools are written are added.

    Raises:
        BadRow: a field is missing, empty or of another kind.
    """
    listed = fields.get(shape.tools) if shape.tools else None
    if listed is None and shape.rejected and isinstance(asked := fields.get(shape.prompt or ""), dict):
        listed = asked.get("tools")  # OpenAI's preference tuning
    tools = read_tools(listed, forms) if shape.tools or listed else ()
    messages = join_system(find_answer(_read_turns(fields, shape, forms), forms))
    system = fields.get(shape.system) if shape.system else None
    if isinstance(system, str) and system.strip() and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    if not messages or messages[0].role != "system":
        return messages, tools
    return _take_described_tools(messages, tools, forms)


def read_answer_turns(name: str, value: Any, shape: Shape, forms: set[str]) -> list[Turn]:
    """Return the turns of an answer, which can be a turn, a list of turns, a text or another JSON value."""
    if shape.rejected and isinstance(value, dict) and is_conversation([value]):
        return parse_turns([value], forms)
    if is_conversation(value) and (shape.messages or not isinstance(value, str)):
        return parse_turns(value, forms)
    if isinstance(value, dict | list):  # a JSON answer that was not quoted
        return [Turn(Message("assistant", _to_json(name, value)))]
    text, thoughts = take_thoughts(_read_text(name, value, "no_answer"), forms)
    return [Turn(Message("assistant", text, reasoning=thoughts))]


def _read_turns(fields: Record, shape: Shape, forms: set[str]) -> list[Turn]:
    if not shape.messages:
        return _pair_turns(fields, shape, forms)
    if shape.messages not in fields or fields[shape.messages] in (None, ""):
        raise BadRow("missing_field", f"no {shape.messages!r}{_nearest_of(shape.messages, fields)}")
    _refuse_media(fields)
    return parse_turns(fields[shape.messages], forms)


def _take_described_tools(messages: list[Message], tools: tuple[Tool, ...], forms: set[str]) -> Conversation:
    """Return the conversation with the tools that its system message describes, taken out of it.

    Raises:
        BadRow: the row lists other tools.
    """
    text, described = take_tools(messages[0].content, forms)
    if not described:
        return messages, tools
    listed = {tool.name for tool in tools}
    if listed and (unlisted := [tool.name for tool in described if tool.name not in listed]):
        raise BadRow(
            "wrong_tools", f"the system message describes {unlisted[0]!r}, which the row's tools do not have"
        )
    rest = messages[1:]
    return [replace(messages[0], content=text), *rest] if text else rest, tools or described


def _refuse_media(fields: Record) -> None:
    """Raise a BadRow if pictures, sound or video belong to a conversation: it is more than its text."""
    for name in MEDIA_COLUMNS:
        if fields.get(name):
            raise BadRow("not_text", f"the row has {name}")


def _pair_turns(fields: Record, shape: Shape, forms: set[str]) -> list[Turn]:
    """Return the turns of a record with prompt and completion."""
    prompt, completion = shape.prompt or "", shape.completion or ""
    for name in (prompt, completion):
        if name not in fields:
            raise BadRow("missing_field", f"no {name!r}{_nearest_of(name, fields)}")
    question, answer = fields[prompt], fields[completion]
    if shape.rejected and isinstance(question, dict) and is_conversation(question.get("messages")):
        question = question["messages"]  # OpenAI's preference tuning
    if is_conversation(question) and not isinstance(question, str):
        turns = parse_turns(question, forms)
    else:
        context = fields.get(shape.context) if shape.context else None
        text = _join(_read_text(prompt, question, "no_question"), context)
        turns = [*_history(fields, shape), Turn(Message("user", text))]
    if shape.name == "calls":
        return [*turns, Turn(_read_answers(completion, answer, forms))]
    return [*turns, *read_answer_turns(completion, answer, shape, forms)]


def _read_answers(name: str, value: Any, forms: set[str]) -> Message:
    """Return the answer of xLAM's `answers`: calls, or a text where none is to be made."""
    if isinstance(value, str) and value.strip() and not value.lstrip().startswith(("[", "{")):
        return Message("assistant", value)
    if value in (None, [], {}) or (isinstance(value, str) and value.strip() in ("", "[]")):
        raise BadRow("no_answer", f"{name!r} has neither a call nor a text")
    forms.add("calls in a column (xLAM)")
    return Message("assistant", "", read_calls(value, name))


def _history(fields: Record, shape: Shape) -> list[Turn]:
    """Return earlier turns: Alpaca's list of pairs of question and answer."""
    past = fields.get(shape.history) if shape.history else None
    if past in (None, "", []):
        return []
    turns = []
    for pair in parse_list(past):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("wrong_messages", f"the history has no pair of texts: {shorten(pair)}")
        turns += [Turn(Message("user", pair[0])), Turn(Message("assistant", pair[1]))]
    return turns


def _join(question: str, context: Any) -> str:
    if not isinstance(context, str) or not context.strip():
        return question
    return f"{question}\n\n{context}"


def _read_text(name: str, value: Any, reason: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(reason, f"{name!r} is empty")
    if isinstance(value, bool | int | float):
        return _to_json(name, value)
    if not isinstance(value, str):
        raise BadRow("not_text", f"{name!r} is a {type(value).__name__}")
    return value


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow("not_text", f"{name!r} is not JSON: {error}") from None


def _nearest_of(name: str, fields: Record) -> str:
    return suggest_nearest(name, map(str, fields))
