"""References within a JSON schema: where they lead, and whether one describes nothing."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote


def find_loop(schema: Any) -> str | None:
    """Return a reference that leads to itself without any keyword between, so that it describes nothing.

    A schema that holds itself, as that of a tree does, is none. Each reference is followed once, so that a
    chain takes a time linear in its length.
    """
    parts: list[Any] = [schema]
    harmless: set[str] = set()
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            if _leads_to_itself(schema, part.get("$ref"), harmless):
                return str(part["$ref"])
    return None


def resolve(schema: Any, reference: str) -> Any:
    """Return what a reference within a schema leads to.

    Raises:
        LookupError, TypeError, ValueError: it leads nowhere.
    """
    for step in reference.removeprefix("#").split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        schema = schema[int(key)] if isinstance(schema, list) else schema[key]
    return schema


def _leads_to_itself(schema: Any, reference: Any, harmless: set[str]) -> bool:
    """Return whether a reference leads to itself; if not, those on its way are added to `harmless`."""
    seen: set[str] = set()
    while isinstance(reference, str) and reference.startswith("#") and reference not in harmless:
        if reference in seen:
            return True
        seen.add(reference)
        reference = _follow(schema, reference)
    harmless |= seen
    return False


def _follow(schema: Any, reference: str) -> Any:
    """Return the reference at the place that a reference names; None if there is none."""
    try:
        target = resolve(schema, reference)
    except (LookupError, TypeError, ValueError):
        return None
    return target.get("$ref") if isinstance(target, dict) else None
