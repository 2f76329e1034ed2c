"""Calls of tools as the field's formats write them, and their arguments as one JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.common.messages import ToolCall, format_arguments
from stages.common.sources.files.entries import BadRow, shorten
from stages.common.sources.files.strict_json import decode_json, encode_json, read_list
from stages.common.tools.schemas import find_name_problem

# Names of a column of calls, likeliest first: xLAM's is the first.
CALL_NAMES = ("answers", "answer", "tool_calls", "calls", "output", "completion")


def read_calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    """Return the calls of a list, of one call, or of the JSON text of either.

    Args:
        place: where they are, for the error.

    Raises:
        BadRow: one is no call.
    """
    if isinstance(value, str):
        try:
            value = decode_json(value)
        except ValueError as error:
            raise BadRow("wrong_call", f"{place}: the call is not JSON: {error}: {shorten(value)}") from None
    calls = value if isinstance(value, list) else [value]
    return tuple(read_call(call, f"{place}, call {number}") for number, call in enumerate(calls, start=1))


def is_call_list(value: Any) -> bool:
    """Return whether a value is a list of calls by their form, or its JSON text."""
    return all(map(_is_call, calls)) if (calls := read_list(value)) else False


def _is_call(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return isinstance(value.get("function"), Mapping) or {"name", "arguments"} <= value.keys()


def read_call(value: Any, place: str) -> ToolCall:
    """Return one call: OpenAI's `{id, type, function: {name, arguments}}`, or `{name, arguments}`.

    Raises:
        BadRow: it is none.
    """
    if not isinstance(value, Mapping):
        raise BadRow("wrong_call", f"{place} is a {type(value).__name__}, not an object: {shorten(value)}")
    try:
        encode_json(value)
    except ValueError as error:
        raise BadRow("wrong_call", f"{place}: {error}: {shorten(value)}") from None
    if (kind := value.get("type") or "function") != "function":
        raise BadRow("wrong_call", f"{place} is of the type {shorten(kind)}; only functions are learned")
    function = value.get("function", value)
    if isinstance(function, str):  # the name, next to the arguments
        function = {**value, "name": function}
    if not isinstance(function, Mapping):
        raise BadRow("wrong_call", f"{place}: its function is a {type(function).__name__}, not an object")
    if problem := find_name_problem(function.get("name")):
        raise BadRow("wrong_call", f"{place} {problem}")
    arguments = function.get("arguments", function.get("parameters"))
    return ToolCall(function["name"], read_arguments(arguments, place), read_id(value.get("id"), place))


def read_arguments(value: Any, place: str) -> str:
    """Return arguments, of an object or its JSON text, as the one JSON text of a record; without any, `{}`.

    Raises:
        BadRow: they are no object, or one in which a value would be lost.
    """
    if value is None or value == "":  # as servers write a call without arguments
        return "{}"
    try:
        decoded = decode_json(value) if isinstance(value, str) else value
        if not isinstance(decoded, Mapping):
            raise ValueError(f"a {type(decoded).__name__} instead of an object")
        encode_json(decoded)
        return format_arguments(decoded)
    except ValueError as error:
        raise BadRow("wrong_call", f"{place}: the arguments {shorten(value)}: {error}") from None


def read_id(value: Any, place: str) -> str | None:
    """Return the id of a call, None where it has none.

    Raises:
        BadRow: it is neither a text nor a number.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("wrong_call", f"{place}: the id is a {type(value).__name__}, not a text")
    return str(value)
