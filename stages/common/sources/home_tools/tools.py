"""The tools of the smart home: their schemas, and calls that fit them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stages.common.messages import Tool, ToolCall, format_arguments

FILE = Path(__file__).parent / "tools.json"


@cache
def read_tools() -> tuple[Tool, ...]:
    """Return the tools, the same in every conversation: a batch computes their text once."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Tool(json.dumps(value, ensure_ascii=False, separators=(",", ":"))) for value in values)


def make_call(name: str, arguments: Mapping[str, Any]) -> ToolCall | None:
    """Return a call with its arguments in the schema's order; None if they do not fit the schema."""
    schema = _schemas()[name]
    if not set(arguments) <= set(schema["properties"]) or not _validators()[name].is_valid(dict(arguments)):
        return None
    ordered = {key: arguments[key] for key in schema["properties"] if key in arguments}
    return ToolCall(name, format_arguments(ordered))


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    return {tool.name: tool.parameters for tool in read_tools()}


@cache
def _validators() -> dict[str, Any]:
    import jsonschema  # type: ignore[import-untyped]

    return {name: jsonschema.Draft202012Validator(schema) for name, schema in _schemas().items()}
