"""The JSON schema of the answers that a model has learned, for constrained decoding.

It must never exclude a right answer to a new request. So only what the task itself fixes is closed, the
labels and the names of the keys; values are constrained to their type and no further.

The order of `properties` carries meaning: engines that enforce a schema while decoding write the keys in that
order, and a model made to write them in another than it learned answers worse. Keep it when you store it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KINDS = {
    bool: "boolean",
    int: "number",  # a value that was whole in training may have a fraction elsewhere
    float: "number",
    str: "string",
    type(None): "null",
    list: "array",
    dict: "object",
}

Schema = dict[str, Any]


def read_objects(answers: Iterable[str]) -> list[dict[str, Any]] | None:
    """Return the answers as JSON objects, or None if one of them is none."""
    objects = []
    for answer in answers:
        try:
            value = json.loads(answer)
        except ValueError:
            return None
        if not isinstance(value, dict):
            return None
        objects.append(value)
    return objects or None


def derive_schema(objects: Sequence[dict[str, Any]], label_key: str | None) -> Schema:
    """Return a schema that all these answers fit: labels and keys closed, values by their kind.

    Args:
        label_key: whose values are the classes; None, or a key that no answer has: there are no classes.
    """
    order = find_key_order(objects)
    if order is None:
        # Whatever order the schema had, it would be wrong for some of the answers.
        return {"type": "object"}
    properties = {key: _kinds([o[key] for o in objects if key in o]) for key in order}
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if label_key in properties:
        labels = [o[label_key] for o in objects if label_key in o]
        if all(isinstance(label, str) for label in labels):
            properties[label_key] = {"enum": sorted(set(labels))}
        if len(labels) == len(objects):
            schema["required"] = [label_key]
    return schema


def _kinds(values: Sequence[Any]) -> Schema:
    kinds = sorted({KINDS[type(value)] for value in values})
    schema: Schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    items = [item for value in values if isinstance(value, list) for item in value]
    if items:
        schema["items"] = _kinds(items)
    return schema


def find_key_order(objects: Sequence[dict[str, Any]]) -> list[str] | None:
    """Return one order of all keys that every object keeps, or None if there is none.

    Keys that never occur together keep the order in which they are first seen.
    """
    after: dict[str, dict[str, None]] = {}  # key → the keys that come right after it somewhere
    for keys in (list(o) for o in objects):
        for key in keys:
            after.setdefault(key, {})
        for key, following in itertools.pairwise(keys):
            after[key][following] = None
    before = dict.fromkeys(after, 0)
    for followers in after.values():
        for key in followers:
            before[key] += 1
    order: list[str] = []
    while len(order) < len(after):
        free = next((key for key, count in before.items() if count == 0), None)
        if free is None:
            return None
        order.append(free)
        del before[free]
        for key in after[free]:
            before[key] -= 1
    return order


def order_keys(value: Mapping[str, Any], schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return an answer with its keys in the order in which the model writes them; others come last."""
    known = (schema or {}).get("properties", {})
    return {
        key: value[key] for key in (*(k for k in known if k in value), *(k for k in value if k not in known))
    }


def fits(schema: Schema, value: Any) -> bool:
    """Return whether a value fits a schema of `derive_schema`, its keys in the schema's order."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = KINDS[type(value)]
    if kind != schema["type"] and kind not in (schema["type"] if isinstance(schema["type"], list) else ()):
        return False
    if isinstance(value, list):
        return all(fits(schema["items"], item) for item in value) if value else True
    if isinstance(value, dict) and "properties" in schema:
        places = {key: place for place, key in enumerate(schema["properties"])}
        if not set(schema.get("required", ())) <= set(value) <= set(places):
            return False
        in_order = [places[key] for key in value] == sorted(places[key] for key in value)
        return in_order and all(fits(schema["properties"][key], v) for key, v in value.items())
    return True
