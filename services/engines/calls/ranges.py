"""Ranges of numbers: the bounds that a schema has together with what it refers to, combines and chooses from.

A grammar takes the tightest of them. Of a short range that begins behind a whole number it holds no bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.engines.protocol import SchemaUnsupported
from stages.common.tools.references import resolve

# Grammars hold bounds of numbers as float64, in which integers are exact up to here.
MAX_BOUND = 2**53
MAX_MERGED = 20_000  # schemas that are merged: choices of choices double with each other

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
MINIMA, MAXIMA = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
EXCLUSIVE = frozenset(("exclusiveMinimum", "exclusiveMaximum"))
UNIONS = ("anyOf", "oneOf")

Range = tuple[dict[str, float], bool]  # bounds by keyword, and whether only integers are taken


def check_ranges(schemas: Sequence[tuple[dict[str, Any], Any]]) -> None:
    """Check the ranges of schemas, each with the document that its references are about.

    Raises:
        SchemaUnsupported: a grammar would not hold one, or too many have to be merged.
    """
    steps = iter(range(MAX_MERGED))
    for schema, document in schemas:
        for bounds, only_integers in _list_ranges(schema, document, steps):
            _check_range(bounds, only_integers)


def _list_ranges(schema: dict[str, Any], document: Any, steps: Iterator[int]) -> Iterator[Range]:
    """Yield the range of a schema with its `$ref` and `allOf`, for each choice of its `anyOf` and `oneOf`."""
    states: list[tuple[dict[str, float], bool, list[Any], set[str]]] = [({}, False, [schema], set())]
    while states:
        bounds, only_integers, parts, followed = states.pop()
        while parts:
            if next(steps, None) is None:
                raise SchemaUnsupported(
                    "the JSON schema has exclusive bounds, and more references and choices together with "
                    f"them than the {MAX_MERGED} that are merged; write the bounds next to each other"
                )
            part = parts.pop()
            if isinstance(part, tuple):  # a choice
                states += ((dict(bounds), only_integers, [*parts, one], set(followed)) for one in part)
                break
            if not isinstance(part, dict):
                continue
            _tighten(bounds, part)
            only_integers = only_integers or part.get("type") == "integer"
            # What is chosen comes last, when all that holds for each choice is known.
            parts[:0] = [tuple(part[key]) for key in UNIONS if isinstance(part.get(key), list)]
            parts += part["allOf"] if isinstance(part.get("allOf"), list) else ()
            reference = part.get("$ref")
            if isinstance(reference, str) and reference not in followed:
                followed.add(reference)
                parts.append(_find(document, reference))
        else:
            yield bounds, only_integers


def _find(document: Any, reference: str) -> Any:
    """Return what a reference leads to; None where it leads nowhere, which the grammar refuses."""
    try:
        return resolve(document, reference)
    except (LookupError, TypeError, ValueError):
        return None


def _tighten(bounds: dict[str, float], schema: Mapping[str, Any]) -> None:
    for key in BOUNDS:
        value = schema.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_BOUND:
            continue
        tighter = max if key in MINIMA else min
        bounds[key] = tighter(value, bounds.get(key, value))


def _check_range(bounds: Mapping[str, float], only_integers: bool) -> None:
    """Refuse a range below 1 that begins behind a whole number: a grammar would write this number, too."""
    for excluded, others, sign in (("exclusiveMinimum", MAXIMA, 1), ("exclusiveMaximum", MINIMA, -1)):
        first = bounds.get(excluded)
        if only_integers or first is None or first != int(first) or sign * first < 0:
            continue
        for other in others:
            if other in bounds and 0 < sign * (bounds[other] - first) < 1:
                raise SchemaUnsupported(
                    f"{excluded} is {first} and {other} is {bounds[other]}; a grammar leaves out no whole "
                    "number of so short a range: give the smallest number that you allow as its bound"
                )
