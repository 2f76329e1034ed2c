"""The JSON schemas of tools: which ones are taken, and whether the arguments of a call fit.

Training shows a schema, the grammar of the service is built from it, and arguments are checked against it. So
it describes an object, refers to nothing outside itself, and its patterns are checked with a time limit.
Whether the grammar can hold it, preflight tries with the grammar itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from stages.common.messages import Tool
from stages.common.params.checked_yaml import suggest_nearest
from stages.common.tools.references import find_loop, resolve
from stages.common.tools.validation import choose_validator, make_validator

MAX_TOOLS = 128  # of a row and of a request, as OpenAI's API has it
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # OpenAI's rule, which clients and grammars rely on
MAX_SHOWN_CHARS = 160
# Keywords whose value is data, and keywords whose value has schemas by their names.
DATA_KEYWORDS = ("const", "enum", "default", "example", "examples")
NAMED_KEYWORDS = ("properties", "$defs", "definitions", "dependentSchemas")
# With one of these, a schema may take arguments that its `properties` do not list.
OPEN_KEYWORDS = frozenset(
    {"additionalProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf", "if"}
)


def find_name_problem(name: Any) -> str | None:
    """Return why a value cannot be the name of a tool, with what to do; None if it can."""
    if not isinstance(name, str) or not name:
        return "has no name"
    if NAME.fullmatch(name):
        return None
    better = re.sub(r"[^a-zA-Z0-9_-]+", "_", name).strip("_")[:64] or "a_name"
    return (
        f"has the name {_shorten(name)!r}, and only up to 64 letters, digits, _ and - are allowed; "
        f"fix: call it {better!r}, in tools and calls"
    )


def find_schema_problem(schema: Any) -> str | None:
    """Return why a value cannot be the JSON schema of a tool's arguments, or None."""
    import jsonschema  # type: ignore[import-untyped]

    if not isinstance(schema, Mapping):
        return f"its parameters are a {type(schema).__name__}, not a JSON schema"
    if schema.get("type", "object") != "object":
        return f"its parameters are of the type {schema['type']!r}; fix: describe an object of arguments"
    if schema and not {"type", "properties", *OPEN_KEYWORDS} & schema.keys():
        shown = _shorten(", ".join(map(str, schema)))
        return (
            f"its parameters ({shown}) are neither a JSON schema of an object nor arguments with a type each"
        )
    try:
        choose_validator(schema).check_schema(schema)
        return _find_keyword_problem(schema) or _find_reference_problem(schema)
    except jsonschema.SchemaError as error:
        return f"its parameters are no JSON schema: {error.json_path}: {_shorten(error.message)}"
    except RecursionError:
        return "its parameters are nested too deeply"


def find_argument_problem(tool: Tool, arguments: Mapping[str, Any]) -> str | None:
    """Return why arguments do not fit a tool's schema, or None.

    A schema that does not mention further properties takes none: a name that it does not list is an error of
    the call, though JSON Schema alone would let it pass.
    """
    validator, known = _compile(tool.text)
    if known is not None and (unknown := next((name for name in arguments if name not in known), None)):
        return f"{unknown!r} is no argument of {tool.name}{suggest_nearest(unknown, known)}"
    try:
        error = next(validator.iter_errors(arguments), None)
    except RecursionError:
        return "the arguments are nested too deeply"
    except TimeoutError as too_slow:
        return _shorten(str(too_slow))
    return f"{error.json_path}: {_shorten(error.message)}" if error else None


@lru_cache(maxsize=4096)
def _compile(text: str) -> tuple[Any, frozenset[str] | None]:
    """Return the validator of a tool's arguments, and their names if no others are allowed."""
    schema = Tool(text).parameters
    known = None if OPEN_KEYWORDS & schema.keys() else frozenset(schema.get("properties", ()))
    return make_validator(schema), known


def _find_keyword_problem(schema: Mapping[str, Any]) -> str | None:
    for part in _walk(schema):
        if "patternProperties" in part:
            return "its parameters have patternProperties; fix: list the properties"
        for keyword in ("$dynamicRef", "$recursiveRef"):
            if keyword in part:
                return f"its parameters have {keyword}; fix: write the schema out"
        if isinstance(pattern := part.get("pattern"), str):
            try:
                re.compile(pattern)
            except re.error as error:
                return f"its parameters have the pattern {_shorten(pattern)!r}: {error}"
    return None


def _find_reference_problem(schema: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a `$ref`: it is remote, leads nowhere, or back to itself at once."""
    for part in _walk(schema):
        reference = part.get("$ref")
        if not isinstance(reference, str):
            continue
        if not reference.startswith("#"):
            return f"its parameters refer to {_shorten(reference)}, outside the schema"
        try:
            resolve(schema, reference)
        except (LookupError, TypeError, ValueError):
            return f"its parameters refer to {_shorten(reference)}, which is not there"
    if (loop := find_loop(schema)) is not None:
        return f"its parameters have a $ref that leads back to itself: {_shorten(loop)}"
    return None


def _walk(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all schemas in it, but not what `$ref` leads to."""
    if isinstance(part, list):
        for item in part:
            yield from _walk(item)
    elif isinstance(part, Mapping):
        yield part
        for keyword, value in part.items():
            if keyword in NAMED_KEYWORDS and isinstance(value, Mapping):
                for inner in value.values():
                    yield from _walk(inner)
            elif keyword not in DATA_KEYWORDS:
                yield from _walk(value)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
