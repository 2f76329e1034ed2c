"""JSON in messages and answers, read so that no text in it can keep a verdict from being written."""

from __future__ import annotations

import json
import re
from typing import Any

from stages.common.records import format_canonical_json
from stages.common.task.tool_answers import read_tool_answer, respell_calls

NO_JSON = object()  # the value of a text that is not JSON
MAX_VALUE_CHARS = 60  # of a category
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # in pairs they are one character


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, or `NO_JSON`; half of a surrogate pair in it becomes U+FFFD."""
    try:
        value = json.loads(text)
        return _replace_surrogates(value) if SURROGATE_ESCAPE.search(text) else value
    except (ValueError, RecursionError):
        return NO_JSON


def _replace_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_replace_surrogates(inner) for inner in value]
    if isinstance(value, dict):
        return {_replace_surrogates(key): _replace_surrogates(inner) for key, inner in value.items()}
    return value


def format_category(value: Any) -> str:
    """Return a JSON value as the name of a class, at most `MAX_VALUE_CHARS` long."""
    return (value if isinstance(value, str) else _canonical(value))[:MAX_VALUE_CHARS]


def _canonical(value: Any) -> str:
    """Return the one JSON text of a value, or a placeholder for one that is nested too deeply."""
    try:
        return format_canonical_json(value)
    except RecursionError:
        return "(nested too deeply)"


def is_same_answer(answer: str, label: str) -> bool:
    """Return whether two answers are equal: calls of tools in any order, JSON as JSON, else stripped text."""
    turns = [read_tool_answer(respell_calls(text)) for text in (answer, label)]
    if any(turn.calls or turn.malformed is not None for turn in turns):
        return turns[0].malformed is None and turns[0].calls == turns[1].calls
    values = parse_json(answer), parse_json(label)
    if NO_JSON in values:
        return answer.strip() == label.strip()
    return _canonical(values[0]) == _canonical(values[1])
