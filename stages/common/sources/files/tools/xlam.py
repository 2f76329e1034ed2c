"""Parameters as xLAM and APIGen write them, `{argument: {type, description, default}}`, as a JSON schema.

The types are Python's: `str`, `List[int]`, `Dict[str, float]`, `Optional[str]`, `int, optional`, and
`int, default=3`. An argument without a default is required, unless its type is optional, or its own key
`required` tells. What else it has is that of a JSON schema: `enum`, `items`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 8
NAMES = {
    "str": "string", "string": "string", "text": "string",
    "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "number": "number", "double": "number",
    "bool": "boolean", "boolean": "boolean",
    "list": "array", "array": "array", "set": "array", "tuple": "array", "sequence": "array",
    "iterable": "array",
    "dict": "object", "object": "object", "mapping": "object",
    "none": "null", "null": "null", "nonetype": "null",
}  # fmt: skip
# What follows a type, as in docstrings of numpy.
OPTIONAL = re.compile(r"(?:,?\s*\(?optional\)?)?(?:,\s*default\b.*)?\s*$", re.IGNORECASE | re.DOTALL)
TYPE = re.compile(r"(?:typing\.)?(\w+)\s*(?:\[(.*)\])?", re.DOTALL)


def is_xlam(parameters: Mapping[str, Any]) -> bool:
    """Return whether parameters are arguments by their names, each with a type, and no JSON schema."""
    return bool(parameters) and all(
        isinstance(argument, Mapping) and isinstance(argument.get("type"), str)
        for argument in parameters.values()
    )


def convert_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of xLAM's parameters.

    Raises:
        ValueError: a type is unknown.
    """
    properties, required = {}, []
    for name, argument in parameters.items():
        schema, is_optional = convert_type(argument["type"], name)
        is_needed = argument.get("required")
        if not isinstance(is_needed, bool):  # else a list, of the names in an object
            is_needed = not is_optional and "default" not in argument
        own = {key: value for key, value in argument.items() if key != "type" and value is not None}
        properties[name] = {**schema, **own}
        if isinstance(own.get("required"), bool):
            del properties[name]["required"]
        if is_needed:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def convert_type(text: str, name: str) -> tuple[dict[str, Any], bool]:
    """Return the JSON schema of a Python type, and whether the argument may be left out.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: the type is unknown.
    """
    plain = OPTIONAL.sub("", text, count=1)
    is_optional = plain != text.rstrip()
    try:
        if inner := re.fullmatch(r"\s*(?:typing\.)?optional\s*\[(.*)\]\s*", plain, re.IGNORECASE | re.DOTALL):
            return _convert(inner[1], MAX_DEPTH), True
        return _convert(plain, MAX_DEPTH), is_optional
    except LookupError:
        raise ValueError(
            f"its argument {name!r} is of the type {text[:60]!r}, which is unknown; "
            "fix: a Python type such as str, int, float, bool, List[str], Dict[str, int], or a JSON schema"
        ) from None


def _convert(text: str, depth: int) -> dict[str, Any]:
    """Return the schema of a type; a LookupError if it is unknown."""
    found = TYPE.fullmatch(text.strip())
    if not found or depth == 0:
        raise LookupError
    name, inner = found[1].lower(), found[2]
    if name == "any" and inner is None:
        return {}
    if name in ("union", "optional") and inner is not None:
        kinds = [_convert(part, depth - 1) for part in _split(inner)]
        return {"anyOf": [*kinds, {"type": "null"}] if name == "optional" else kinds}
    kind = NAMES[name]
    if inner is None:
        return {"type": kind}
    parts = [_convert(part, depth - 1) for part in _split(inner) if part != "..."]
    if kind == "object" and len(parts) == 2:
        return {"type": kind, "additionalProperties": parts[1]}
    if kind == "array" and parts and all(part == parts[0] for part in parts):
        return {"type": kind, "items": parts[0]}
    if name == "tuple":
        return {"type": kind, "prefixItems": parts}
    raise LookupError


def _split(text: str) -> list[str]:
    """Return what the commas outside brackets separate."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
