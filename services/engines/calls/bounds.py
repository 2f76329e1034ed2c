"""Bounds of a request's JSON schema: its size, and the numbers that a grammar holds exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import unquote

from services.engines.calls.ranges import BOUNDS, EXCLUSIVE, MAX_BOUND, check_ranges
from services.engines.protocol import SchemaUnsupported

MAX_SCHEMA_CHARS = 65_536
MAX_DEPTH = 64
MAX_PARTS = 10_000  # objects, lists and values; an Earley grammar of them is compiled in about a second
MIN_BOUND = 1e-9  # smaller ones are written with an exponent, which the grammar's patterns do not have
MAX_COUNT = 10_000  # of characters, items and properties
MAX_MULTIPLE = 5_000  # a grammar has a state for every remainder
# Wherever a property may begin, a grammar has four items for each that is optional, and at most 2,000 in all.
MAX_OPTIONAL = 498

COUNTS = tuple(
    f"{end}{what}" for what in ("Length", "Items", "Properties", "Contains") for end in ("min", "max")
)
VALUES = ("enum", "const", "default", "examples")  # hold values, which are no schemas
WRITTEN = ("enum", "const")  # of them, those that an answer may be
# Hold schemas by names, which are no keywords, whatever they are.
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")

Kind = Literal["schema", "part of a schema", "schemas by name", "written value", "value"]


def check_bounds(schema: str) -> None:
    """Check a schema's size and numbers, in time linear in its length and without compiling anything.

    Raises:
        SchemaUnsupported: a bound is exceeded; the message names it.
    """
    _check_length(schema)
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise SchemaUnsupported(f"the JSON schema is not JSON: {error}") from None
    _check_parts([value], 1)


def check_bounds_together(schemas: Sequence[Mapping[str, Any]]) -> None:
    """Check schemas, of which an answer may use any, against the bounds of one; references stay within each.

    Raises:
        SchemaUnsupported: as `check_bounds`.
    """
    _check_length(json.dumps({"anyOf": [*schemas]}))
    _check_parts(schemas, 3)


def _check_length(schema: str) -> None:
    if len(schema) > MAX_SCHEMA_CHARS:
        raise SchemaUnsupported(
            f"the JSON schema has {len(schema)} characters; at most {MAX_SCHEMA_CHARS} are read"
        )


def _check_parts(documents: Sequence[Any], depth_of_each: int) -> None:
    # A part, how deep it is, what it is, and the document that it is in.
    parts: list[tuple[Any, int, Kind, Any]] = [(one, depth_of_each, "schema", one) for one in documents]
    schemas: list[tuple[dict[str, Any], Any]] = []
    has_exclusive = False
    seen = 0
    while parts:
        value, depth, kind, document = parts.pop()
        seen += 1
        if depth > MAX_DEPTH:
            raise SchemaUnsupported(f"the JSON schema is nested more than {MAX_DEPTH} levels deep")
        if seen > MAX_PARTS:
            raise SchemaUnsupported(f"the JSON schema has more than {MAX_PARTS} parts")
        if isinstance(value, float) and not math.isfinite(value):
            raise SchemaUnsupported(f"the JSON schema holds {value}, which JSON does not have")
        if kind == "written value":
            _check_written(value)
        if isinstance(value, list):
            parts += ((part, depth + 1, kind, document) for part in value)
        elif isinstance(value, dict):
            if kind == "schema":
                schemas.append((value, document))
            if kind in ("schema", "part of a schema"):
                has_exclusive = has_exclusive or not EXCLUSIVE.isdisjoint(value)
                _check_optional(value)
                _check_numbers(value)
                _check_reference(value.get("$ref"))
            parts += ((part, depth + 1, _find_kind(kind, key), document) for key, part in value.items())
    if has_exclusive:
        check_ranges(schemas)


def _find_kind(kind: Kind, key: str) -> Kind:
    """Return what a key of an object of some kind holds."""
    if kind == "schemas by name":
        return "schema"
    if kind not in ("schema", "part of a schema"):
        return kind
    if key == "allOf":
        return "part of a schema"
    if key in NAMED:
        return "schemas by name"
    if key in WRITTEN:
        return "written value"
    return "value" if key in VALUES else "schema"


def _check_reference(reference: Any) -> None:
    """Refuse to take a value for a schema: nothing in it has been checked."""
    kind: Kind = "schema"
    for key in unquote(reference.partition("#")[2]).split("/") if isinstance(reference, str) else ():
        kind = _find_kind(kind, key.replace("~1", "/").replace("~0", "~"))
    if kind in ("value", "written value"):
        raise SchemaUnsupported(f"$ref is {reference[:80]!r}, which is a value; point to a schema in $defs")


def _check_written(value: Any) -> None:
    """Check a value that an answer may be: grammars write its integers as float64."""
    if isinstance(value, int) and abs(value) > MAX_BOUND:
        raise SchemaUnsupported(
            f"enum or const has {_show(value)}; a grammar holds integers up to {MAX_BOUND}; send it as text"
        )


def is_deep(value: Any) -> bool:
    """Return whether a JSON value is nested deeper than a schema may be."""
    parts = [value]
    for _ in range(MAX_DEPTH):
        nested = (part.values() if isinstance(part, dict) else part for part in parts)
        parts = [inner for one in nested for inner in one if isinstance(inner, dict | list)]
        if not parts:
            return False
    return True


def _check_optional(schema: dict[str, Any]) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return
    named = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    optional = len(properties.keys() - set(named))
    if optional > MAX_OPTIONAL:
        raise SchemaUnsupported(
            f"the JSON schema has an object with {optional} properties that are not required; "
            f"at most {MAX_OPTIONAL} are held"
        )


def _check_numbers(schema: dict[str, Any]) -> None:
    for key, value in schema.items():
        _check_number(key, value)


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if key in BOUNDS and value != 0 and not MIN_BOUND <= abs(value) <= MAX_BOUND:
        raise SchemaUnsupported(
            f"{key} is {_show(value)}; a grammar holds 0, and sizes from {MIN_BOUND:g} to {MAX_BOUND}"
        )
    if key in COUNTS and not 0 <= value <= MAX_COUNT:
        raise SchemaUnsupported(f"{key} is {_show(value)}; it may be 0 to {MAX_COUNT}")
    if key == "multipleOf" and not 0 < count_remainders(value) <= MAX_MULTIPLE:
        raise SchemaUnsupported(
            f"multipleOf is {_show(value)}; its digits without zeros at the ends may be 1 to {MAX_MULTIPLE}"
        )


def count_remainders(multiple: float) -> int:
    """Return how many remainders a grammar counts: 700 for 700, 25 for 0.025; 0 if it holds none."""
    if isinstance(multiple, int):
        return max(multiple, 0)
    if not MIN_BOUND <= multiple <= MAX_BOUND:
        return 0
    exact = Decimal(repr(multiple)).normalize()
    exponent = exact.as_tuple().exponent
    assert isinstance(exponent, int)  # it is a word for NaN and infinity
    return int(exact if exponent > 0 else exact.scaleb(-exponent))


def _show(value: float) -> str:
    return f"an integer of {len(str(value))} digits" if abs(value) > 10**30 else repr(value)
