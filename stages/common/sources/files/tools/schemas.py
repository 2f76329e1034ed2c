"""The tools of a row: OpenAI's `{type, function}`, the function alone, or xLAM's arguments by their names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from stages.common.messages import Tool
from stages.common.sources.files.entries import BadRow, shorten
from stages.common.sources.files.strict_json import decode_json, encode_json
from stages.common.sources.files.tools.xlam import convert_parameters, is_xlam
from stages.common.tools.canonical import FUNCTION_KEYS, has_nullable, write_tool
from stages.common.tools.schemas import MAX_TOOLS, find_name_problem, find_schema_problem

TOOL_NAMES = ("tools", "functions")  # of a column: OpenAI's, and its older one
XLAM = "tools with xLAM's arguments"
NULLABLE = "nullable in tools (OpenAPI 3.0), written as JSON Schema has it"
LEGACY_KEYS = ("parameters", "description")  # of a function, one of which tells it from anything with a name


class UnreadKey(str):
    """A key of a tool that is not read; it is told with the forms of the row, and reported as a column is."""

    __slots__ = ()


def read_tools(value: Any, forms: set[str]) -> tuple[Tool, ...]:
    """Return the tools of a row, of a list, its JSON text, or a list of JSON texts; what is empty has none.

    Args:
        forms: where the form of the tools is added, and which of their keys are not read (`UnreadKey`).

    Raises:
        BadRow: the value is no list of tools, or a tool cannot be taken.
    """
    if isinstance(value, str) and value.strip():
        value = _decode(value)
    if not value:
        return ()
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise BadRow("wrong_tools", f"the tools are a {type(value).__name__}, not a list")
    if len(entries) > MAX_TOOLS:
        raise BadRow("wrong_tools", f"{len(entries)} tools, and at most {MAX_TOOLS} are allowed in a row")
    entries = [_decode(entry) if isinstance(entry, str) else entry for entry in entries]
    tools = tuple(_read_tool(entry, number, forms) for number, entry in enumerate(entries, start=1))
    name, times = Counter(tool.name for tool in tools).most_common(1)[0]
    if times > 1:
        raise BadRow("wrong_tools", f"{times} tools have the name {name!r}")
    return tools


def is_tool_list(value: Any) -> bool:
    """Return whether a value is a list of tools, or its JSON text."""
    value = _decode_object(value)
    entries = [value] if isinstance(value, Mapping) else value
    return isinstance(entries, list) and bool(entries) and all(map(_is_tool, entries))


def _decode_object(value: Any) -> Any:
    """Return the value of the JSON text of an object or a list, and any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return decode_json(value)
    except ValueError:
        return value


def _is_tool(entry: Any) -> bool:
    entry = _decode_object(entry)
    if not isinstance(entry, Mapping):
        return False
    return isinstance(entry.get("function"), Mapping) or (
        "name" in entry and any(key in entry for key in LEGACY_KEYS)
    )


def _decode(text: str) -> Any:
    try:
        return decode_json(text)
    except ValueError as error:
        raise BadRow("wrong_tools", f"the tools are not JSON: {error}") from None


def _read_tool(entry: Any, number: int, forms: set[str]) -> Tool:
    if not isinstance(entry, Mapping):
        raise BadRow("wrong_tools", f"tool {number} is a {type(entry).__name__}, not an object")
    try:
        tool, found = _convert_tool(encode_json(entry))
    except ValueError as error:
        name = entry.get("name") or (entry.get("function") or {}).get("name")
        called = f" ({shorten(name)})" if isinstance(name, str) else ""
        raise BadRow("wrong_tools", f"tool {number}{called}: {error}") from None
    forms.update(found)
    return tool


def _decode_parameters(text: str) -> Any:
    try:
        return json.loads(encode_json(decode_json(text)))
    except ValueError as error:
        raise ValueError(f"its parameters are a text that is no JSON: {error}") from None


@lru_cache(maxsize=8192)  # most rows have the tools of others
def _convert_tool(text: str) -> tuple[Tool, tuple[str, ...]]:
    """Return a tool in its one text, the names of its own form, and its keys that are not read.

    Keys without a value are left out: Parquet writes them into every tool of a column.

    Raises:
        ValueError: it cannot be taken; the message has the reason.
    """
    entry = {key: value for key, value in json.loads(text).items() if value is not None}
    if (kind := entry.get("type", "function")) != "function":
        raise ValueError(f"it is of the type {shorten(kind)}; fix: only functions can be learned")
    inner = entry.get("function", {key: value for key, value in entry.items() if key != "type"})
    if not isinstance(inner, dict):
        raise ValueError(f"its function is a {type(inner).__name__}, not an object")
    function = {key: value for key, value in inner.items() if value is not None}
    if problem := find_name_problem(function.get("name")):
        raise ValueError(f"it {problem}")
    if not isinstance(function.get("description", ""), str):
        raise ValueError(f"its description is a {type(function['description']).__name__}, not a text")
    found: list[str] = _list_unread(entry, function)
    if "parameters" in function:
        parameters = function["parameters"]
        if isinstance(parameters, str):  # in Parquet often as text
            parameters = _decode_parameters(parameters)
        if isinstance(parameters, dict) and is_xlam(parameters):
            parameters = convert_parameters(parameters)
            found.append(XLAM)
        if problem := find_schema_problem(parameters):
            raise ValueError(problem)
        if has_nullable(parameters):
            found.append(NULLABLE)
        function["parameters"] = parameters
    return write_tool(function), tuple(found)


def _list_unread(entry: dict[str, Any], function: dict[str, Any]) -> list[str]:
    """Return the keys of a tool that no prompt has, by where they are."""
    outer = [key for key in entry if key not in ("type", "function")] if "function" in entry else []
    inner = [key for key in function if key not in FUNCTION_KEYS]
    if "function" in entry:
        inner = [f"function.{key}" for key in inner]
    return [UnreadKey(f"tools[].{key}") for key in (*outer, *inner)]
