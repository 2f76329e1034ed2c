"""Arguments of calls as the grammar of the service writes them: in the schema's order, whole numbers as such.

The order of keys has no meaning in JSON, and 5.0 is an integer for JSON Schema. A grammar has one order, and
writes an integer without a point: a model that learned another spelling could not write it when it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from stages.common.messages import Tool, format_arguments
from stages.common.tools.references import resolve
from stages.common.tools.validation import make_validator

UNIONS = ("anyOf", "oneOf")
Spell = Callable[[Any, list[Any]], Any]  # of a value and the schemas that it has to fit


def list_changes(tool: Tool) -> dict[str, Callable[[Any], Any]]:
    """Return what is changed in the arguments of a call of `tool`, by the names of the changes."""
    schema = _Schema.of(tool.text)
    return {name: partial(schema.change, spell) for name, spell in _CHANGES.items()}


class _Schema:
    """The schema of a tool's arguments, which knows the schemas of each value in them."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._validator = make_validator(root)

    @staticmethod
    @lru_cache(maxsize=4096)  # most rows have the tools of others
    def of(text: str) -> _Schema:
        return _Schema(Tool(text).parameters)

    def change(self, spell: Spell, values: Any) -> Any:
        """Return arguments with each value in them spelled, the inner ones first."""
        return self._change(spell, values, list(self._open(self._root, values)))

    def _change(self, spell: Spell, value: Any, schemas: list[Any]) -> Any:
        """Return a value spelled by the schemas that it has to fit, which hold no references and unions."""
        if isinstance(value, dict):
            inner = {key: self._list_of_key(key, item, schemas) for key, item in value.items()}
            value = {key: self._change(spell, item, inner[key]) for key, item in value.items()}
        elif isinstance(value, list):
            value = [
                self._change(spell, item, self._list_of_item(place, item, schemas))
                for place, item in enumerate(value)
            ]
        return spell(value, schemas)

    def _list_of_key(self, key: str, value: Any, schemas: list[Any]) -> list[Any]:
        found: list[Any] = []
        for schema in schemas:
            named = schema.get("properties", {})
            inner = named[key] if key in named else schema.get("additionalProperties")
            found += self._open(inner, value)
        return found

    def _list_of_item(self, place: int, value: Any, schemas: list[Any]) -> list[Any]:
        found: list[Any] = []
        for schema in schemas:
            first = schema.get("prefixItems", ())
            found += self._open(first[place] if place < len(first) else schema.get("items"), value)
        return found

    def _open(self, schema: Any, value: Any, followed: tuple[str, ...] = ()) -> Iterator[Any]:
        """Yield the parts of a schema that say something of a value, in the order in which they are written.

        Of a union, that is the first schema that the value fits.
        """
        if not isinstance(schema, Mapping):
            return
        own: dict[str, Any] = {}
        for keyword, inner in schema.items():
            if keyword == "$ref" and isinstance(inner, str) and inner not in followed:
                if own:
                    yield own
                    own = {}
                yield from self._open(resolve(self._root, inner), value, (*followed, inner))
            elif keyword == "allOf" or keyword in UNIONS:
                if own:
                    yield own
                    own = {}
                for part in inner if keyword == "allOf" else self._choose(inner, value):
                    yield from self._open(part, value, followed)
            else:
                own[keyword] = inner
        if own:
            yield own

    def _choose(self, schemas: list[Any], value: Any) -> list[Any]:
        for schema in schemas:
            try:
                if self._validator.evolve(schema=schema).is_valid(value):
                    return [schema]
            except (TimeoutError, RecursionError):
                continue  # such arguments are rejected by the rule about calls
        return []


def _order(value: Any, schemas: list[Any]) -> Any:
    """Return an object with its keys in the order of the schema, those that it does not name behind."""
    if not isinstance(value, dict):
        return value
    named = [key for schema in schemas for key in schema.get("properties", ())]
    needed = [key for schema in schemas for key in schema.get("required", ())]
    return {key: value[key] for key in dict.fromkeys([*named, *needed, *value]) if key in value}


def _write_whole(value: Any, schemas: list[Any]) -> Any:
    """Return a number without its fraction of zero where the schema takes integers only."""
    if not isinstance(value, float) or not value.is_integer():
        return value
    return int(value) if any(_takes_whole(schema, value) for schema in schemas) else value


def _takes_whole(schema: Mapping[str, Any], value: float) -> bool:
    kinds = schema.get("type")
    if "enum" in schema or "const" in schema:
        listed = [*schema.get("enum", ()), schema.get("const")]
        return any(type(item) is int and item == value for item in listed)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return "integer" in kinds and "number" not in kinds


_CHANGES: Mapping[str, Spell] = {"argument_order": _order, "whole_numbers": _write_whole}
ARGUMENT_CHANGES = tuple(_CHANGES)


def is_same(before: Any, after: Any) -> bool:
    """Return whether two values are written alike: for Python 5.0 equals 5, and order does not count."""
    return format_arguments(before) == format_arguments(after)
