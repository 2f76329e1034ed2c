"""The one text of a tool, for rows and requests alike: what is trained is what the service's prompt has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stages.common.messages import Tool
from stages.common.tools.schemas import DATA_KEYWORDS, NAMED_KEYWORDS

FUNCTION_KEYS = ("name", "description", "parameters")  # what a prompt tells of a function, in this order


def write_tool(function: Mapping[str, Any]) -> Tool:
    """Return a tool of a function as OpenAI's API describes it; what has no value is left out.

    Other keys are not in its text: `strict` and the like are for the API, and no template of a model that is
    served has been given them. `nullable` of OpenAPI 3.0 is written as JSON Schema has it.

    Raises:
        RecursionError: the parameters are nested too deeply.
    """
    kept = {key: function[key] for key in FUNCTION_KEYS if function.get(key) is not None}
    if has_nullable(kept.get("parameters")):
        kept["parameters"] = _convert_nullable(kept["parameters"])
    outer = {"type": "function", "function": kept}
    return Tool(json.dumps(outer, ensure_ascii=False, separators=(",", ":")))


def has_nullable(schema: Any) -> bool:
    """Return whether a schema says of a value that it may be null as OpenAPI 3.0 does."""
    return schema is not None and _convert_nullable(schema) != schema


def _convert_nullable(part: Any) -> Any:
    """Return a schema with `nullable` written as JSON Schema has it, in all schemas in it."""
    if isinstance(part, list):
        return [_convert_nullable(item) for item in part]
    if not isinstance(part, Mapping):
        return part
    inner = {
        keyword: _convert_inner(keyword, value)
        for keyword, value in part.items()
        if not (keyword == "nullable" and isinstance(value, bool))
    }
    return _allow_null(inner) if part.get("nullable") is True else inner


def _convert_inner(keyword: str, value: Any) -> Any:
    if keyword in NAMED_KEYWORDS and isinstance(value, Mapping):
        return {name: _convert_nullable(schema) for name, schema in value.items()}
    return value if keyword in DATA_KEYWORDS else _convert_nullable(value)


def _allow_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that takes null besides what it takes."""
    if {"$ref", "allOf", "anyOf", "oneOf", "const", "not"} & schema.keys():
        return {"anyOf": [schema, {"type": "null"}]}
    wider = dict(schema)
    if kinds := schema.get("type"):
        kinds = kinds if isinstance(kinds, list) else [kinds]
        wider["type"] = [*kinds, *(["null"] if "null" not in kinds else [])]
    if isinstance(listed := schema.get("enum"), list) and None not in listed:
        wider["enum"] = [*listed, None]
    return wider
