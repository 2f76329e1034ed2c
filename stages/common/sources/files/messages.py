"""A raw record as messages that end with the answer to learn."""

from __future__ import annotations

import json
from typing import Any

from stages.common.messages import Message
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.sources.files.entries import BadRow, Record, shorten
from stages.common.sources.files.shapes import Shape
from stages.common.sources.files.turns import Turn, find_answer, is_conversation, parse_list, parse_turns

MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")


def to_messages(fields: Record, shape: Shape) -> list[Message]:
    """Turn a record into messages that end with the answer to learn.

    Raises:
        BadRow: a field is missing, empty or of another kind.
    """
    if shape.messages:
        if shape.messages not in fields or fields[shape.messages] in (None, ""):
            raise BadRow("missing_field", f"no {shape.messages!r}{_nearest_of(shape.messages, fields)}")
        _refuse_media(fields)
        turns = parse_turns(fields[shape.messages])
    else:
        turns = _pair_turns(fields, shape)
    messages = find_answer(turns)
    system = fields.get(shape.system) if shape.system else None
    if isinstance(system, str) and system.strip() and messages and messages[0].role != "system":
        messages = [Message("system", system), *messages]
    return messages


def _refuse_media(fields: Record) -> None:
    """Raise a BadRow if pictures, sound or video belong to a conversation: it is more than its text."""
    for name in MEDIA_COLUMNS:
        if fields.get(name):
            raise BadRow("not_text", f"the row has {name}")


def _pair_turns(fields: Record, shape: Shape) -> list[Turn]:
    """Return the turns of a record with prompt and completion."""
    prompt, completion = shape.prompt or "", shape.completion or ""
    for name in (prompt, completion):
        if name not in fields:
            raise BadRow("missing_field", f"no {name!r}{_nearest_of(name, fields)}")
    question, answer = fields[prompt], fields[completion]
    if is_conversation(question) and not isinstance(question, str):
        turns = parse_turns(question)
    else:
        context = fields.get(shape.context) if shape.context else None
        text = _join(_read_text(prompt, question, "no_question"), context)
        turns = [*_history(fields, shape), Turn(Message("user", text))]
    if is_conversation(answer) and not isinstance(answer, str):
        return [*turns, *parse_turns(answer)]
    if isinstance(answer, dict | list):  # a JSON answer that was not quoted
        return [*turns, Turn(Message("assistant", _to_json(completion, answer)))]
    return [*turns, Turn(Message("assistant", _read_text(completion, answer, "no_answer")))]


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
